"""The ways to compute one layer of a network. Explained in `06_infer_and_benchmark.ipynb`."""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Kernel(ABC):
    """One way to compute a layer, and the ReLU that follows it where `relu` says so."""

    name: str

    def __init__(self, layer: nn.Linear | nn.Conv2d, relu: bool) -> None:
        self.layer, self.relu = layer, relu

    @abstractmethod
    def __call__(self, input: Tensor, **algorithm: int) -> Tensor:
        """Return what the layer returns for an input."""

    def search(self, input: Tensor) -> dict[str, int]:
        """Return the arguments with which this kernel is the fastest for an input's shape."""
        return {}


class DenseLayer(Kernel):
    """The layer as PyTorch runs it: a convolution stays one."""

    name = "dense layer"

    def __call__(self, input: Tensor, **algorithm: int) -> Tensor:
        output = self.layer(input)
        return output.relu_() if self.relu else output


class Gemm(Kernel):
    """The layer as a product of matrices, (pixels, in) by (in, out), in channels-last."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, relu: bool) -> None:
        super().__init__(layer, relu)
        self.weight = layer.weight.detach().flatten(1)
        self.bias = None if layer.bias is None else layer.bias.detach()

    @abstractmethod
    def multiply(self, rows: Tensor, **algorithm: int) -> Tensor:
        """Return the product (rows, out) for rows (rows, in), with bias and ReLU."""

    def __call__(self, input: Tensor, **algorithm: int) -> Tensor:
        pixels = self._channels_last(input)
        product = self.multiply(self._rows(pixels), **algorithm)
        output = product.view(*pixels.shape[:-1], len(self.weight))
        return output.movedim(-1, -3) if isinstance(self.layer, nn.Conv2d) else output

    def _channels_last(self, input: Tensor) -> Tensor:
        """Return the pixels that the layer looks at, with the channels as the last dimension."""
        if isinstance(self.layer, nn.Linear):
            return input
        down, right = self.layer.stride
        return input[..., ::down, ::right].movedim(-3, -1)

    def _rows(self, pixels: Tensor) -> Tensor:
        return pixels.reshape(-1, pixels.shape[-1])


class DenseGemm(Gemm):
    """The product with the dense weight; it runs on a CPU too."""

    name = "dense GEMM"

    def multiply(self, rows: Tensor, **algorithm: int) -> Tensor:
        if self.relu and self.bias is not None:
            return torch._addmm_activation(self.bias, rows, self.weight.t(), use_gelu=False)
        product = F.linear(rows, self.weight, self.bias)
        return product.relu_() if self.relu else product
