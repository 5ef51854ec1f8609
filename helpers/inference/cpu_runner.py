"""Run a model on a CPU with the fastest kernel for each layer, dense or 2:4.

Batch norm is folded; bias, residual and activation are computed in the layer before them; and what
the layers write goes into few buffers. Explained in `06_infer_and_benchmark.ipynb`.
"""

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from helpers.errors import InputError
from helpers.inference.autotune import (
    Autotuner,
    Choice,
    Timer,
    fingerprint,
    host_times,
    measure_twice,
    network_key,
)
from helpers.inference.cpu_layers import CpuLayer
from helpers.inference.fold import fold_batch_norm
from helpers.inference.kernels import Call, CpuKernel, Kernel, ProductLayer, staged
from helpers.inference.onednn import OneDnn, pool_channels_last_
from helpers.inference.runners import Runner, one_tensor
from helpers.inference.static_model import static_model
from helpers.inference.tuned_layers import choice_table, tune_layers_
from helpers.layers import is_plain
from helpers.sparsity.masks import is_2to4

if TYPE_CHECKING:
    import pandas as pd

# What a runner can be asked for, and what its name then says.
KERNELS = {
    "sparse": "2:4 kernels",
    "twin": "dense twin of the 2:4 kernels",
    "dense": "dense kernels",
}


class DenseCpu(CpuKernel):
    """The layer in the kernel of this package, with all four of every four weights.

    Images are stored by channels, and the output goes to a buffer. For layers that are not 2:4
    it is one more dense kernel to choose from; for 2:4 layers it is the sparse kernel's twin.
    """

    name = "dense kernel"
    by_channels = True
    sparse = False

    @classmethod
    def takes(cls, layer: ProductLayer) -> bool:
        if not is_plain(layer, nn.Linear, nn.Conv2d) or layer.weight.shape[1] % 4:
            return False
        return isinstance(layer, nn.Linear) or layer.padding_mode == "zeros"

    @cached_property
    def own(self) -> CpuLayer:
        """The weight in the kernel's order; made when it is first needed."""
        if isinstance(self.layer, nn.Conv2d):
            return CpuLayer.from_conv(self.layer, self.epilogue.activation, self.sparse)
        return CpuLayer.from_linear(self.layer, self.epilogue.activation, self.sparse)

    def bind(
        self, input: Tensor, residual: Tensor | None = None, **algorithm: int
    ) -> Callable[[], Tensor]:
        # As in `static_model`, which keeps buffers for the output and for operands that are not
        # contiguous: the system takes as long to clear new memory as some layers to compute.
        call = self.for_shape(input.shape, torch.empty(self.own.output_shape(input.shape)))
        operands = [input] if residual is None else [input, residual]
        stages = [None if each.is_contiguous() else torch.empty(each.shape) for each in operands]
        return partial(staged(call, stages), *operands)

    def for_shape(self, shape: torch.Size, out: Tensor | None = None) -> Call:
        output_shape = self.own.output_shape(shape)
        plan = self.own.plan(shape, torch.get_num_threads())
        if plan is None:
            return lambda input, residual=None: torch.empty(output_shape)
        run = plan.run

        def call(input: Tensor, residual: Tensor | None = None) -> Tensor:
            input = input.contiguous()
            output = torch.empty(output_shape) if out is None else out
            if residual is None:
                run(input.data_ptr(), output.data_ptr(), 0)
            else:
                residual = residual.contiguous()
                run(input.data_ptr(), output.data_ptr(), residual.data_ptr())
            return output

        return call


class SparseCpu(DenseCpu):
    """The layer with 2:4 weights, whose zeros are skipped."""

    name = "2:4 kernel"
    sparse = True

    @classmethod
    def takes(cls, layer: ProductLayer) -> bool:
        return super().takes(layer) and is_2to4(layer.weight.detach())

    def twin(self) -> DenseCpu:
        """Return the same kernel with the zeros multiplied: what differs is sparsity alone."""
        return DenseCpu(self.layer, self.epilogue)


class DenseCpuAlone(DenseCpu):
    """The dense kernel for a layer that cannot be sparse."""

    @classmethod
    def takes(cls, layer: ProductLayer) -> bool:
        return super().takes(layer) and not SparseCpu.takes(layer)


class OneDnnAlone(OneDnn):
    """oneDNN for a layer that no kernel of this package computes."""

    @classmethod
    def takes(cls, layer: ProductLayer) -> bool:
        return super().takes(layer) and not DenseCpu.takes(layer)


class OneDnnBetween(OneDnn):
    """oneDNN for any other layer: its time includes the way back from channels-last.

    The kernels of this package read and write images by channels, and oneDNN writes them
    channels-last.
    """

    @classmethod
    def takes(cls, layer: ProductLayer) -> bool:
        return super().takes(layer) and DenseCpu.takes(layer)

    def bind(
        self, input: Tensor, residual: Tensor | None = None, **algorithm: int
    ) -> Callable[[], Tensor]:
        call = self.for_shape(input.shape)
        if not input.is_contiguous():
            return lambda: call(input, residual)
        back = torch.empty(call(input, residual).shape)
        return lambda: back.copy_(call(input, residual))


DENSE: tuple[type[Kernel], ...] = (OneDnnAlone, OneDnnBetween, DenseCpu)
SPARSE: tuple[type[Kernel], ...] = (OneDnnAlone, OneDnnBetween, DenseCpuAlone, SparseCpu)
BY_CHANNELS, AS_IT_COMES = "by channels", "as it comes"


class CpuRunner(Runner):
    """A model on the CPU in FP32, each layer in the fastest of its kernels.

    Each shape of images is prepared when it is first loaded, on these images: every layer's
    kernels are timed. The kernels of this package read images by channels, oneDNN reads them
    channels-last, and the way from one to the other takes as long as a small layer. So the layers
    choose twice, first as if every image came by channels, then for each image as the layer before
    leaves it, and the faster of the two models is kept.

    Args:
        model: a model in FP32 that torch.fx can trace; it is not changed.
        kernels: `sparse` chooses for each layer between oneDNN and this package's kernel, which
            skips zeros where the weight is 2:4; `twin` is the same with the zeros multiplied, in
            the layers for which the sparse kernel was chosen; `dense` chooses between oneDNN and
            the dense kernel.
        cache: JSON file for the choices of kernels, so that they are measured once.
        timer: times the kernels of a layer.

    Raises:
        InputError: there are no such kernels, the model cannot be traced, is not in FP32, holds
            values that are not finite, or has no 2:4 layer for `sparse` or `twin`; later on, it
            returns no single tensor, or the cache cannot be read.
        WriteError: later on, the cache cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        kernels: str = "sparse",
        cache: Path | None = None,
        timer: Timer = host_times,
    ) -> None:
        if kernels not in KERNELS:
            raise InputError(f"There are no kernels {kernels!r}; choose from {', '.join(KERNELS)}.")
        version = torch.__version__.partition("+")[0]
        self.name = f"PyTorch {version} with {KERNELS[kernels]}, CPU, FP32"
        self.kernels = kernels
        _require_fp32(model)
        self.autotuner = Autotuner(timer, cache)
        self.model = fold_batch_norm(model)
        pool_channels_last_(self.model)
        own = DENSE if kernels == "dense" else SPARSE
        self.layers = tune_layers_(self.model, own, autotuner=self.autotuner, residuals=True)
        if kernels != "dense" and not any(SparseCpu.name in each.kernels for each in self.layers):
            raise InputError(
                "No layer of the model has a 2:4 weight, so there are no zeros to skip. Prune the "
                "model with prune_2to4_ first, or pass kernels='dense'."
            )
        self.fingerprint = fingerprint(self.model)
        self.ready: dict[torch.Size, Callable[[Tensor], Tensor]] = {}  # by the images' shape
        self.threads = torch.get_num_threads()

    @torch.inference_mode()
    def load(self, images: Tensor) -> None:
        if images.dtype != torch.float32:
            raise InputError(
                f"{self.name}: the images are {images.dtype}, and this runner computes in FP32. "
                "Pass images.float()."
            )
        # A copy: a model may write into its input, which is the caller's.
        self.images = images.to("cpu", memory_format=torch.contiguous_format, copy=True)
        if torch.get_num_threads() != self.threads:  # with others, other kernels may be faster
            self.threads = torch.get_num_threads()
            self.ready.clear()
            for layer in self.layers:
                layer.choices.clear()
        if images.shape not in self.ready:
            self.ready[images.shape] = self.prepare_for_shape(self.images)
        self.current = self.ready[images.shape]

    def prepare_for_shape(self, images: Tensor) -> Callable[[Tensor], Tensor]:
        """Return the model for images of one shape, each layer in the kernel that it chooses."""
        before = [layer.choices for layer in self.layers]
        models: dict[str, Callable[[Tensor], Tensor]] = {}
        choices: dict[str, list[dict[torch.Size, Choice]]] = {}
        for layout in (BY_CHANNELS, AS_IT_COMES):
            for layer, known in zip(self.layers, before, strict=True):
                layer.by_channels, layer.choices = layout == BY_CHANNELS, dict(known)
            models[layout] = static_model(self.model, images)
            one_tensor(models[layout](images.clone()), self.name)
            choices[layout] = [layer.choices for layer in self.layers]
        zeros = "dense" if self.kernels == "dense" else "sparse"  # the twin chooses as the sparse
        key = network_key(self.fingerprint, images, [f"{zeros} {layout}" for layout in models])
        layout = self.autotuner.cache.get(key, lambda: self._faster(models, images)).kernel
        for layer, chosen in zip(self.layers, choices[layout], strict=True):
            layer.by_channels, layer.choices = layout == BY_CHANNELS, chosen
        if self.kernels == "twin":  # the same choices, other kernels
            return static_model(self.model, images, self._substitute)
        return models[layout]

    def _faster(self, models: Mapping[str, Callable[[Tensor], Tensor]], images: Tensor) -> Choice:
        calls = {layout: partial(model, images.clone()) for layout, model in models.items()}
        measured = measure_twice(self.autotuner.timer, calls)
        times = measured.shortest
        best = min(times, key=times.__getitem__)
        return Choice(best, {}, times, reliable=measured.support(best))

    def _substitute(self, kernel: Kernel) -> Kernel:
        if self.kernels == "twin" and isinstance(kernel, SparseCpu):
            return kernel.twin()
        return kernel

    @torch.inference_mode()
    def run(self) -> None:
        self.logits = self.current(self.images)

    def fetch(self) -> Tensor:
        return self.logits.clone()

    @torch.inference_mode()
    def invalidate_output(self) -> None:
        self.logits.fill_(float("nan"))

    def kernel_choices(self) -> "pd.DataFrame":
        """Return one row for each layer and input shape so far: which kernel is its fastest.

        The columns are `layer`, `input` (such as 32x64x56x56), `kernel`, and the milliseconds of
        every kernel, under its name. With `twin`, the layers that say `2:4 kernel` run its twin.
        """
        return choice_table(self.layers)


def _require_fp32(model: nn.Module) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        if tensor.dtype != torch.float32:
            raise InputError(
                f"{name} is {tensor.dtype}, and this runner computes in FP32. Pass model.float()."
            )
        if not torch.isfinite(tensor).all():
            raise InputError(
                f"{name} holds NaN or infinite values. Go back to a checkpoint from before the "
                "training diverged."
            )
