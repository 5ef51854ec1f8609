"""The ways to compute one layer of a model. Explained in `06_infer_and_benchmark.ipynb`.

A `Kernel` computes a layer, and with it what its `Epilogue` says was fused into the layer.
The kernels here run on any device. To add one, subclass `Kernel`, or `Gemm` for a layer that
is a matrix product; say in `takes` which layers it can compute; and name it in the runner.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.layers import is_plain

ProductLayer = nn.Linear | nn.Conv2d


# What may follow a layer and be fused into it, by its name here; in place.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "ReLU": torch.relu_,
    "ReLU6": partial(F.relu6, inplace=True),
    "hard-swish": partial(F.hardswish, inplace=True),
}


@dataclass(frozen=True)
class Epilogue:
    """What a kernel does to a layer's output before it returns it."""

    activation: str = ""  # one of `ACTIVATIONS`, or none
    add: bool = False  # a residual, before the activation

    def apply_(self, output: Tensor, residual: Tensor | None = None) -> Tensor:
        """Do it to a tensor, in place, for a kernel that cannot do it while it writes."""
        if residual is not None:
            # A residual of another shape or type makes the sum one of that shape or type.
            same = residual.shape == output.shape and residual.dtype == output.dtype
            output = output.add_(residual) if same else output + residual
        return self.activate_(output)

    def activate_(self, output: Tensor) -> Tensor:
        """Do only what follows the addition."""
        return ACTIVATIONS[self.activation](output) if self.activation else output

    def __str__(self) -> str:
        parts = ["residual"] if self.add else []
        return ", ".join([*parts, self.activation] if self.activation else parts)


NO_EPILOGUE = Epilogue()


class Kernel(ABC):
    """One way to compute a layer together with what is fused into it.

    Args:
        layer: holds the weight and the bias, already on its device and in its type.
        epilogue: what follows the layer and is computed with it.
    """

    name: str
    by_channels = False  # whether it reads and writes images by channels, into a given buffer

    def __init__(self, layer: ProductLayer, epilogue: Epilogue = NO_EPILOGUE) -> None:
        self.layer, self.epilogue = layer, epilogue

    @classmethod
    def takes(cls, layer: ProductLayer) -> bool:
        """Return whether this kernel can compute a layer of this kind and with this weight."""
        return True

    @classmethod
    def why_not(cls, layer: ProductLayer) -> str:
        """Return in words why a layer that this kernel takes must not run in it; else nothing."""
        return ""

    @abstractmethod
    def __call__(self, input: Tensor, residual: Tensor | None = None, **algorithm: int) -> Tensor:
        """Return what the layer returns for an input.

        Args:
            input: what the layer would be called with.
            residual: what is added, if the epilogue has `add`.
            **algorithm: as `search` returns it, or nothing.
        """

    def bind(
        self, input: Tensor, residual: Tensor | None = None, **algorithm: int
    ) -> Callable[[], Tensor]:
        """Return a call of this kernel, to be timed; what is set up once is done before."""
        return partial(self, input, residual, **algorithm)

    def fits(self, input: Tensor, residual: Tensor) -> bool:
        """Return whether a residual has the type and the shape of the layer's output."""
        output = self.layer(input)
        return residual.shape == output.shape and residual.dtype == output.dtype

    def expected(self, input: Tensor, reference: Tensor) -> Tensor:
        """Return what this kernel has to return for an input, up to the order of its sums.

        Args:
            input: what the kernel is called with.
            reference: what the dense layer returns for it.
        """
        return reference

    def search(self, input: Tensor) -> dict[str, int]:
        """Return the arguments with which this kernel is fastest for an input's shape."""
        return {}


# A kernel for inputs of one shape: returns the output for an input and what is added to it.
Call = Callable[..., Tensor]


class CpuKernel(Kernel):
    """A kernel that sets itself up for each shape of its input, for FP32 on a CPU."""

    @abstractmethod
    def for_shape(self, shape: torch.Size, out: Tensor | None = None) -> Call:
        """Return this kernel for inputs of one shape.

        Args:
            shape: of the input.
            out: a contiguous tensor to write every output to, if the kernel works by channels.
        """

    def __call__(self, input: Tensor, residual: Tensor | None = None, **algorithm: int) -> Tensor:
        return self.for_shape(input.shape)(input, residual)

    def bind(
        self, input: Tensor, residual: Tensor | None = None, **algorithm: int
    ) -> Callable[[], Tensor]:
        return partial(self.for_shape(input.shape), input, residual)


def staged(call: Call, stages: Sequence[Tensor | None]) -> Call:
    """Return a call whose operands are copied to these tensors first, where there is one."""
    if not any(stage is not None for stage in stages):
        return call

    def copy_and_call(*given: Tensor) -> Tensor:
        return call(
            *(
                operand if stage is None else stage.copy_(operand)
                for operand, stage in zip(given, stages, strict=True)
            )
        )

    return copy_and_call


class DenseLayer(Kernel):
    """The layer as PyTorch runs it: a convolution remains a convolution."""

    name = "dense layer"

    def __call__(self, input: Tensor, residual: Tensor | None = None, **algorithm: int) -> Tensor:
        return self.epilogue.apply_(self.layer(input), residual)


class Gemm(Kernel):
    """The layer as a product of matrices, (pixels, in) by (in, out), in channels-last.

    It computes linear layers, and 1x1 convolutions without groups or padding.
    """

    def __init__(self, layer: ProductLayer, epilogue: Epilogue = NO_EPILOGUE) -> None:
        super().__init__(layer, epilogue)
        self.weight = layer.weight.detach().flatten(1)
        self.bias = None if layer.bias is None else layer.bias.detach()

    @classmethod
    def takes(cls, layer: ProductLayer) -> bool:
        if not is_plain(layer, nn.Linear, nn.Conv2d):
            return False
        if isinstance(layer, nn.Linear):
            return True
        padded = layer.padding not in ((0, 0), "valid", "same")
        return layer.kernel_size == (1, 1) and layer.groups == 1 and not padded

    @abstractmethod
    def multiply(self, rows: Tensor, **algorithm: int) -> Tensor:
        """Return the product (rows, out) for rows (rows, in), with bias and epilogue."""

    def __call__(self, input: Tensor, residual: Tensor | None = None, **algorithm: int) -> Tensor:
        assert residual is None  # no product here adds one
        return self.by_rows(input, lambda rows: self.multiply(rows, **algorithm))

    def by_rows(self, input: Tensor, multiply: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the layer's output for an input by a function of its rows, as `multiply` is."""
        pixels = self.channels_last(input)
        output = multiply(self.as_rows(pixels)).view(*pixels.shape[:-1], len(self.weight))
        return output.movedim(-1, -3) if isinstance(self.layer, nn.Conv2d) else output

    def channels_last(self, input: Tensor) -> Tensor:
        """Return the pixels that the layer reads, with the channels as the last dimension."""
        if isinstance(self.layer, nn.Linear):
            return input
        down, right = self.layer.stride
        return input[..., ::down, ::right].movedim(-3, -1)

    def as_rows(self, pixels: Tensor) -> Tensor:
        """Return pixels (..., in) as a matrix (rows, in)."""
        return pixels.reshape(-1, pixels.shape[-1])


def pad_rows(rows: Tensor, step: int) -> Tensor:
    """Return a matrix with rows of zeros added, so that their number is a multiple of `step`."""
    missing = -len(rows) % step
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


class DenseGemm(Gemm):
    """The product with the dense weight."""

    name = "dense GEMM"

    def multiply(self, rows: Tensor, **algorithm: int) -> Tensor:
        if self.epilogue.activation == "ReLU" and self.bias is not None:
            return torch._addmm_activation(self.bias, rows, self.weight.t(), use_gelu=False)
        return self.epilogue.apply_(F.linear(rows, self.weight, self.bias))
