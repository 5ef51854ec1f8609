"""Run a 2:4 model on a CPU faster than a dense library can.

A dense library multiplies by the zeros too. Here each layer skips them where that is faster,
and if the whole model then still loses against the fastest dense runner, that one runs.
Explained in `06_infer_and_benchmark.ipynb`.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from helpers.errors import InputError
from helpers.inference.autotune import (
    Choice,
    ChoiceCache,
    Timer,
    host_times,
    host_times_apart,
    measure_twice,
    network_key,
    takes_still,
)
from helpers.inference.cpu_runner import CpuRunner
from helpers.inference.dense_cpu import (
    DenseCpuRunner,
    NetworkTimer,
    batch_sizes_by_name,
    network_table,
)
from helpers.inference.runners import Runner
from helpers.metrics import max_relative_error

if TYPE_CHECKING:
    import pandas as pd

SPARSE, DENSE = "2:4 kernels", "dense runner"
# The largest relative error by which the outputs of a dense runner of the same model may differ.
SAME_MODEL = 1e-3
# The 2:4 kernels have to save this share of the dense runner's time. A smaller difference may
# turn round in the next measurement.
MARGIN = 0.03


class SparseCpuRunner(CpuRunner):
    """A 2:4 model on the CPU in FP32, never slower than the fastest dense runner.

    Each shape of images is prepared when it is first loaded, on these images: each layer
    chooses the fastest of its kernels, as in `CpuRunner`; then the model of these layers takes
    turns with a dense runner of the same model. It is used if it is faster by more than
    noise in both of two measurements; otherwise the dense one is. If both measurements agree, the
    outcome is kept in the cache, and a later process believes it if the model that runs takes as
    long as it took then. Otherwise other programs have disturbed one of the processes, and the
    models are compared again.

    `name` says at which batch sizes the dense runner runs.

    Args:
        model: a model pruned 2:4, in FP32; it is not changed.
        kernels: as `CpuRunner` takes them; only `sparse` is compared with the dense runner. The
            others are the controls.
        cache: JSON file for the choices, so that they are measured once.
        dense: a runner of this same model to compare with; unless given, the fastest of
            `DenseCpuRunner`.
        timer: times the kernels of a layer.
        network_timer: times the runs of whole models.

    Raises:
        InputError: as `CpuRunner`; later on, the dense runner computes something else.
        WriteError: later on, the cache cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        kernels: str = "sparse",
        cache: Path | None = None,
        dense: Runner | None = None,
        timer: Timer = host_times,
        network_timer: NetworkTimer = host_times_apart,
    ) -> None:
        super().__init__(model, kernels, cache, timer)
        self.dense = dense or DenseCpuRunner(model, cache, network_timer)
        self.network_timer, self.network_cache = network_timer, ChoiceCache(cache)
        self.own_name = self.name
        self.network_choices: dict[tuple[torch.Size, int], Choice] = {}
        self.ran: dict[int, str] = {}  # the name of the runner, by batch size

    def load(self, images: Tensor) -> None:
        super().load(images)
        self.dense_runs = self._choice().kernel == DENSE
        if self.dense_runs:
            self.dense.load(self.images)
        self.ran[len(images)] = self.running
        self.name = self.own_name + "".join(
            f"; at batch size {sizes} {name}, which is faster there"
            for name, sizes in batch_sizes_by_name(self.ran).items()
            if name != self.own_name
        )

    def _choice(self) -> Choice:
        """Return what runs the loaded images."""
        if self.kernels != "sparse":
            return Choice(SPARSE, {}, {})
        key = self.images.shape, torch.get_num_threads()
        if key not in self.network_choices:
            own = network_key(self.fingerprint, self.images, {SPARSE: self, DENSE: self.dense})
            self.network_choices[key] = self.network_cache.get(
                own, self._measure, self._still_holds
            )
        return self.network_choices[key]

    def _measure(self) -> Choice:
        self.dense_runs = False
        self.run()
        self.dense.load(self.images)
        self.dense.run()
        error = max_relative_error(self.dense.fetch(), self.fetch())
        if not error <= SAME_MODEL:  # a NaN is not below it either
            raise InputError(
                f"{self.dense.name} and {self.name} return outputs that differ by {error:.1e} of "
                "the largest. Pass as `dense` a runner of the same model, with the same weights."
            )
        measured = measure_twice(self.network_timer, {DENSE: self.dense.run, SPARSE: self.run})
        faster = [times[SPARSE] < (1 - MARGIN) * times[DENSE] for times in measured.measurements]
        chosen = SPARSE if all(faster) else DENSE
        return Choice(chosen, {}, measured.shortest, reliable=len(set(faster)) == 1)

    def _still_holds(self, choice: Choice) -> bool:
        self.dense_runs = choice.kernel == DENSE
        if self.dense_runs:
            self.dense.load(self.images)
        return takes_still(self.network_timer, self.run, choice.milliseconds[choice.kernel])

    @property
    def running(self) -> str:
        return self.dense.running if self.dense_runs else self.own_name

    def run(self) -> None:
        if self.dense_runs:
            self.dense.run()
        else:
            super().run()

    def fetch(self) -> Tensor:
        return self.dense.fetch() if self.dense_runs else super().fetch()

    def invalidate_output(self) -> None:
        if self.dense_runs:
            self.dense.invalidate_output()
        else:
            super().invalidate_output()

    def network_times(self) -> "pd.DataFrame":
        """Return one row for each input shape so far: how fast the models are, and which runs.

        The columns are `input`, `threads`, the milliseconds of the `2:4 kernels` and of the
        `dense runner`, and `runs`, which of the two runs.
        """
        return network_table(self.network_choices)
