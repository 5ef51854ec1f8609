"""Run a 2:4 model in PyTorch on Sparse Tensor Cores, with cuSPARSELt.

A 1x1 convolution over channels-last images multiplies a matrix (pixels, channels) by
its weight, as a linear layer does, and for that product cuSPARSELt has sparse kernels.
Each layer uses whichever of its kernels is fastest at the batch size it is given; if a dense
model is faster still than the model of these layers, the dense one runs.
Explained in `06_infer_and_benchmark.ipynb`.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from helpers.errors import InputError
from helpers.inference import cuda_graphs
from helpers.inference.autotune import Autotuner
from helpers.inference.cusparselt import (
    SparseGemm,
    UnsearchedSparseGemm,
    why_no_sparse_gemms,
)
from helpers.inference.errors import RunnerError
from helpers.inference.kernels import DenseGemm, Gemm
from helpers.inference.runners import CapturedModel, TorchRunner
from helpers.inference.tuned_layers import TunedLayer, choice_table, tune_layers_
from helpers.layers import LayerWeight
from helpers.sparsity.eligibility import why_not_sparse

if TYPE_CHECKING:
    import pandas as pd

KERNELS: dict[str, tuple[type[Gemm], ...]] = {
    "dense": (DenseGemm,),
    "cusparselt": (DenseGemm, SparseGemm),
    "cusparselt without search": (DenseGemm, UnsearchedSparseGemm),
}


def use_gemms_(
    folded: fx.GraphModule, kernels: str = "cusparselt", autotuner: Autotuner | None = None
) -> list[TunedLayer]:
    """Let the layers of a model that are matrix products run as such, in place.

    These are linear layers, 1x1 convolutions and the projections of self-attention, of the
    shapes that cuSPARSELt takes. A ReLU that follows is taken into the layer; all other
    layers are left unchanged. The model then computes the same outputs, and can no longer
    be trained.

    Args:
        folded: as `fold_batch_norm` returns it, already on its device and in its type.
        kernels: `cusparselt`, where weights that are not 2:4 still get a dense product;
            `cusparselt without search`, if trying all of its algorithms breaks CUDA;
            or `dense`, which runs on any device and is the fair control.
        autotuner: chooses for each layer; without one every layer is a GEMM, a sparse one
            where it can be.

    Returns:
        The new layers, in order of execution.

    Raises:
        InputError: there are no such kernels, or the model has no layer for them.
    """
    if kernels not in KERNELS:
        raise InputError(f"There are no kernels {kernels!r}; choose from {', '.join(KERNELS)}.")
    tuned = tune_layers_(folded, KERNELS[kernels], _fits_cusparselt, autotuner)
    wanted = KERNELS[kernels][-1].name
    if not any(wanted in layer.kernels for layer in tuned):
        raise InputError(
            f"No layer of the model can run as a {wanted}: that takes linear layers and 1x1 "
            "convolutions whose channels are multiples of 16, and for a sparse GEMM 2:4 weights. "
            "Prune the model with prune_2to4_ first."
        )
    return tuned


def _fits_cusparselt(weight: LayerWeight) -> bool:
    # The dense control replaces the same layers, so that only sparsity makes a difference.
    return not why_not_sparse(weight, "cusparselt")


class SparseTorchRunner(TorchRunner):
    """PyTorch with sparse matrix products where they are the fastest.

    On a GPU each batch size is prepared when it is first loaded, on these images: every
    layer's kernels are timed, then the model of the fastest kernels is timed in turns with the
    dense models, and the fastest of all is kept. On a CPU, where this runner serves as a test of
    the conversion, nothing is timed; there `SparseCpuRunner` chooses and gains.

    Args:
        model: a model pruned 2:4; it is not changed.
        kernels: as `use_gemms_` takes them; `dense` is the same code path without sparsity,
            which also runs on a CPU.
        dtype: FP16 on a GPU and FP32 on a CPU unless given; `cusparselt` takes FP16 and BF16.
        cache: JSON file for the choices of kernels, so that they are measured once.
        compile: let `torch.compile` fuse what is between the products, such as residual
            additions with their ReLU, as in `TorchRunner`.

    Raises:
        RunnerError: the kernels do not run here; later on, a kernel returns wrong numbers, or
            the model cannot be captured.
        InputError: there are no such kernels, they do not take this type, or the model has no
            layer for them.
    """

    def __init__(
        self,
        model: nn.Module,
        kernels: str = "cusparselt",
        dtype: torch.dtype | None = None,
        cache: Path | None = None,
        compile: bool = False,
    ) -> None:
        if kernels.startswith("cusparselt"):
            _require_cusparselt(dtype)
        super().__init__(model, dtype, compile)
        self.name += f", {kernels}"
        self.kernels = kernels
        autotuner = Autotuner(cuda_graphs.median_times, cache) if self.on_gpu else None
        self.networks = {"layers": self.model, "dense": self._same_layers()}
        self.layers = use_gemms_(self.networks["dense"], "dense", autotuner)
        if kernels != "dense":
            self.networks[kernels] = self._same_layers()
            self.layers = use_gemms_(self.networks[kernels], kernels, autotuner)
        self.milliseconds: dict[torch.Size, dict[str, float]] = {}

    def _same_layers(self) -> fx.GraphModule:
        """Return another graph over the same layers: `use_gemms_` replaces them in it alone."""
        return fx.GraphModule(self.model, copy.deepcopy(self.model.graph))

    def prepare_for_shape(self, images: Tensor) -> CapturedModel | Callable[[Tensor], Tensor]:
        if not self.on_gpu:
            return self.compile_for_shape(self.networks[self.kernels])
        captured = {}
        for name, network in self.networks.items():
            network(images)  # every layer meets its input and chooses
            captured[name] = self.capture_for_shape(network, images)
        # Layers that win alone can still lose together, by what the dense ones are fused with.
        times = cuda_graphs.time_graphs([each.graph for each in captured.values()], rounds=5)
        medians = cuda_graphs.medians(times)
        self.milliseconds[images.shape] = dict(zip(captured, medians, strict=True))
        return captured[self.fastest(images.shape)]

    def fastest(self, shape: torch.Size) -> str:
        """Return which network runs images of a shape that was loaded on a GPU.

        It is `layers`, every layer as PyTorch runs it; `dense`, where each layer is the faster
        of that and its dense product; or the runner's `kernels`, where each is the fastest of
        these two and its sparse product.
        """
        times = self.milliseconds[shape]
        return min(times, key=times.__getitem__)

    def kernel_choices(self) -> "pd.DataFrame":
        """Return one row for each layer and input shape so far: which kernel is its fastest.

        The columns are `layer`, `input` (such as 32x64x56x56), `kernel`, and on a GPU the
        milliseconds of every kernel, under its name; `refused` says why a kernel does not run,
        where one does not. `network_times` tells whether the network of these kernels is the
        fastest and is therefore run.
        """
        return choice_table(self.layers)

    def network_times(self) -> "pd.DataFrame":
        """Return one row for each input shape so far: how fast each network is, and which runs.

        The columns are `input`, the milliseconds of each network under its name, as `fastest`
        explains them, and `runs`. Without a GPU there are no rows.
        """
        import pandas as pd

        rows = [
            {"input": "x".join(map(str, shape)), **times, "runs": self.fastest(shape)}
            for shape, times in self.milliseconds.items()
        ]
        return pd.DataFrame(rows, columns=["input", *self.networks, "runs"])


def _require_cusparselt(dtype: torch.dtype | None) -> None:
    if reason := why_no_sparse_gemms():
        raise RunnerError(f"{reason} With kernels='dense' the model runs in dense products.")
    if dtype not in (None, torch.float16, torch.bfloat16):
        raise InputError(
            f"cuSPARSELt does not run in {dtype} here; use torch.float16 or torch.bfloat16."
        )
