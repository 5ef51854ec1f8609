"""Run a 2:4 model in PyTorch on Sparse Tensor Cores, with cuSPARSELt.

A 1x1 convolution over channels-last images multiplies a matrix (pixels, channels) by
its weight, as a linear layer does, and for that product cuSPARSELt has sparse kernels, in FP16,
BF16 and INT8. Each layer uses whichever of its kernels is fastest at the batch size it is given;
if a dense model is faster still than the model of these layers, the dense one runs.

An INT8 product reads and writes FP16 or BF16: between two products of a residual network stands a
convolution or an addition, which PyTorch does not run in INT8. Rounding the input costs a pass over
it, which `torch.compile` fuses with what comes before.
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
from helpers.inference.attention import split_self_attention_
from helpers.inference.autotune import Autotuner
from helpers.inference.cusparselt import (
    SparseGemm,
    SparseInt8Gemm,
    UnsearchedSparseGemm,
    why_no_sparse_gemms,
)
from helpers.inference.errors import RunnerError
from helpers.inference.int8 import DenseInt8Gemm, Int8Gemm, calibrate_
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
    "dense_int8": (DenseGemm, DenseInt8Gemm),
    "cusparselt_int8": (DenseGemm, SparseGemm, DenseInt8Gemm, SparseInt8Gemm),
    "cusparselt without search": (DenseGemm, UnsearchedSparseGemm),
}
# The networks that are compared with one of some kernels: those of fewer kernels.
SIMPLER = {
    "cusparselt": ("dense",),
    "cusparselt without search": ("dense",),
    "dense_int8": ("dense",),
    "cusparselt_int8": ("dense", "cusparselt"),
}


def use_gemms_(
    folded: fx.GraphModule,
    kernels: str = "cusparselt",
    autotuner: Autotuner | None = None,
    calibration: Tensor | None = None,
) -> list[TunedLayer]:
    """Let the layers of a model that are matrix products run as such, in place.

    These are linear layers, 1x1 convolutions and the projections of self-attention, of the
    shapes that cuSPARSELt takes. A ReLU that follows is taken into the layer; all other
    layers are left unchanged. The model then computes the same outputs, up to the rounding of
    INT8 where that is among the kernels, and can no longer be trained.

    Args:
        folded: as `fold_batch_norm` returns it, already on its device and in its type.
        kernels: `cusparselt`, where weights that are not 2:4 still get a dense product;
            `cusparselt without search`, if trying all of its algorithms breaks CUDA;
            `dense`, which runs on any device and is the fair control; `cusparselt_int8` and
            `dense_int8`, which have INT8 products beside those.
        autotuner: chooses for each layer; without one every layer is a GEMM, a sparse one
            where it can be, in INT8 where it may be.
        calibration: images for the scales of INT8, which needs them.

    Returns:
        The new layers, in order of execution.

    Raises:
        InputError: there are no such kernels, the model has no layer for them, or INT8 has no
            calibration images or such as `calibrate_` refuses.
    """
    if kernels not in KERNELS:
        raise InputError(f"There are no kernels {kernels!r}; choose from {', '.join(KERNELS)}.")
    wanted = KERNELS[kernels][-1]
    is_int8 = issubclass(wanted, Int8Gemm)
    if is_int8:
        if calibration is None:
            raise InputError(
                f"The kernels {kernels!r} need calibration images for the scales of INT8; give "
                "some hundreds of training images as `calibration`."
            )
        split_self_attention_(folded)  # its projections are calibrated too
        calibrate_(folded, calibration)
    tuned = tune_layers_(folded, KERNELS[kernels], _fits_cusparselt, autotuner)
    if not any(wanted.name in layer.kernels for layer in tuned):
        step = 32 if is_int8 else 16
        raise InputError(
            f"No layer of the model can run as a {wanted.name}: that takes linear layers and 1x1 "
            f"convolutions whose channels are multiples of {step}, and for a sparse GEMM 2:4 "
            "weights. Prune the model with prune_2to4_ first."
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
        kernels: as `use_gemms_` takes them; `dense` and `dense_int8` are the same code path
            without sparsity, which also runs on a CPU.
        dtype: as in `TorchRunner`; cuSPARSELt takes FP16 and BF16. On an H100 some of its FP16
            kernels leave the GPU unusable, so FP16 is left to its default kernel there.
        cache: JSON file for the choices of kernels, so that they are measured once.
        compile: let `torch.compile` fuse what is between the products, such as residual
            additions with their ReLU, as in `TorchRunner`.
        calibration: training images (N, C, H, W), some hundreds, for the scales of INT8.

    Raises:
        RunnerError: the kernels do not run here; later on, a kernel returns wrong numbers, or
            the model cannot be captured.
        InputError: there are no such kernels, they do not take this type, the model has no
            layer for them, or INT8 has no calibration images or such as it cannot use.
    """

    def __init__(
        self,
        model: nn.Module,
        kernels: str = "cusparselt",
        dtype: torch.dtype | None = None,
        cache: Path | None = None,
        compile: bool = False,
        calibration: Tensor | None = None,
    ) -> None:
        if kernels.startswith("cusparselt"):
            _require_cusparselt(kernels, dtype)
        super().__init__(model, dtype, compile)
        self.name += f", {kernels}"
        self.kernels = kernels
        autotuner = Autotuner(cuda_graphs.median_times, cache) if self.on_gpu else None
        if calibration is not None:
            calibration = calibration.to(self.device, self.dtype)
        self.networks = {"layers": self.model}
        for name in (*SIMPLER.get(kernels, ()), kernels):
            self.networks[name] = self._same_layers()
            self.layers = use_gemms_(self.networks[name], name, autotuner, calibration)
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
        of that and its dense product; or one of the runner's `kernels`, where each layer is the
        fastest of these two, its sparse product and, in INT8, its products in INT8.
        """
        times = self.milliseconds[shape]
        return min(times, key=times.__getitem__)

    def kernel_choices(self) -> "pd.DataFrame":
        """Return one row for each layer and input shape so far: which kernel is its fastest.

        The columns are `layer`, `input` (such as 32x64x56x56), `kernel`, and on a GPU the
        milliseconds of every kernel, under its name; `refused` says why a kernel does not run,
        where one does not, for instance because INT8 would change too much. `network_times`
        tells whether the network of these kernels is the fastest and is therefore run.
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


def _require_cusparselt(kernels: str, dtype: torch.dtype | None) -> None:
    if reason := why_no_sparse_gemms():
        dense = "dense_int8" if kernels.endswith("int8") else "dense"
        raise RunnerError(f"{reason} With kernels={dense!r} the model runs in dense products.")
    if dtype not in (None, torch.float16, torch.bfloat16):
        raise InputError(
            f"cuSPARSELt does not run in {dtype} here; use torch.float16 or torch.bfloat16."
        )
