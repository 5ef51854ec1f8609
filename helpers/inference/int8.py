"""A layer of a model as a product of whole numbers of 8 bits.

Symmetric: a number is a whole number from -127 to 127, times a scale. So zero stays zero, and a
2:4 weight stays 2:4. A weight has one scale for each output channel. The input of a layer has
one scale, since the sums over its channels could not be scaled otherwise; calibration data say
how large the input gets. The scales are explained in `08_int8.ipynb`, the kernels in
`06_infer_and_benchmark.ipynb`.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.errors import InputError
from helpers.inference.kernels import NO_EPILOGUE, Epilogue, Gemm, ProductLayer, pad_rows
from helpers.sparsity.eligibility import why_not_cusparselt

LARGEST = 127  # -128 has no opposite
MIN_IMAGES = 8
BATCH = 32  # calibration images that run through a model at a time
# A layer whose output changes by more than this share of its root mean square keeps its floating
# point: the error of one layer passes through all later ones.
MOST_ERROR = 0.1


def scale_of(largest: Tensor) -> Tensor:
    """Return the scale with which the largest magnitude becomes 127; 1 where it is 0."""
    return torch.where(largest > 0, largest.float() / LARGEST, 1.0)


def weight_scales(weight: Tensor) -> Tensor:
    """Return the scale (FP32) of each output channel of a weight (out, ...)."""
    return scale_of(weight.detach().flatten(1).abs().amax(1))


def quantize(values: Tensor, scale: Tensor | float) -> Tensor:
    """Return values over their scale, rounded to whole numbers from -127 to 127 (INT8)."""
    return (values / scale).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)


@dataclass(frozen=True)
class Int8Layer:
    """What calibration data say about a layer in INT8."""

    input_scale: float
    # Root mean square of what INT8 changes of the output, over that of the output.
    error: float


def calibrate_(model: nn.Module, images: Tensor) -> dict[str, Int8Layer]:
    """Note on each linear layer and 2-D convolution of a model how to run it in INT8, in place.

    The note is the layer's attribute `int8`; kernels for INT8 take only layers that have one.

    Args:
        model: as it will run, on its device and in its type.
        images: calibration data, what the model is called with.

    Returns:
        The notes by the layers' names, for all layers that were called.

    Raises:
        InputError: there are too few images, or they or the inputs of a layer are not finite.
    """
    if len(images) < MIN_IMAGES:
        raise InputError(
            f"There are {len(images)} calibration images, too few to tell how large the inputs of "
            f"the layers get. Give at least {MIN_IMAGES}, better some hundreds, of the training "
            "images."
        )
    if not images.isfinite().all():
        raise InputError("The calibration images have NaN or infinite values; check their source.")
    names = {layer: name for name, layer in model.named_modules() if _is_product(layer)}
    largest: dict[nn.Module, Tensor] = {}
    squares: dict[nn.Module, Tensor] = {}  # of the outputs, and of what INT8 changes of them

    def see_range(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        size = inputs[0].abs().amax()
        largest[layer] = torch.maximum(largest.get(layer, size), size)

    def see_error(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        changed = _output(layer, inputs[0], scale_of(largest[layer])) - output
        both = torch.stack([each.float().square().sum() for each in (output, changed)])
        squares[layer] = squares.get(layer, 0) + both

    for see in (see_range, see_error):
        handles = [layer.register_forward_hook(see) for layer in names]
        try:
            with torch.inference_mode():
                for batch in images.split(BATCH):
                    model(batch)
        finally:
            for handle in handles:
                handle.remove()
    notes = {}
    for layer, (output, changed) in squares.items():
        if not largest[layer].isfinite():
            raise InputError(
                f"The input of {names[layer]} is not finite on the calibration images, so it has "
                "no scale. Use BF16, or look for what makes the model diverge."
            )
        error = float((changed / output).sqrt()) if output else 0.0
        notes[names[layer]] = Int8Layer(float(scale_of(largest[layer])), error)
        layer.int8 = notes[names[layer]]  # type: ignore[assignment]  # neither tensor nor module
    return notes


def _is_product(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear | nn.Conv2d)


def _output(layer: ProductLayer, input: Tensor, scale: Tensor) -> Tensor:
    """Return what a layer returns when its input and its weight are rounded to INT8."""
    scales = weight_scales(layer.weight).view(-1, *[1] * (layer.weight.dim() - 1))
    weight = quantize(layer.weight, scales) * scales
    rounded = (quantize(input, scale) * scale).to(input.dtype)
    if isinstance(layer, nn.Linear):
        return F.linear(rounded, weight.to(input.dtype), layer.bias)
    return layer._conv_forward(rounded, weight.to(input.dtype), layer.bias)


class Int8Gemm(Gemm):
    """The layer as a product of two INT8 matrices, on a layer that `calibrate_` has noted.

    Each sum is a whole number of 32 bits. Multiplied by the scale of the input and that of its
    output channel, it is the layer's output in the type of its input.
    """

    def __init__(self, layer: ProductLayer, epilogue: Epilogue = NO_EPILOGUE) -> None:
        super().__init__(layer, epilogue)
        self.input_scale = _note(layer).input_scale
        scales = weight_scales(self.weight)
        self.integers = quantize(self.weight, scales[:, None])
        self.factors = self.input_scale * scales

    @classmethod
    def takes(cls, layer: ProductLayer) -> bool:
        return super().takes(layer) and hasattr(layer, "int8")

    @classmethod
    def why_not(cls, layer: ProductLayer) -> str:
        rows, columns = layer.weight.flatten(1).shape
        if reason := why_not_cusparselt(rows, columns, element_size=1):
            return reason
        error = _note(layer).error
        if error <= MOST_ERROR:
            return ""
        return f"INT8 changes {error:.0%} of the layer's output, and may change {MOST_ERROR:.0%}"

    @abstractmethod
    def scaled_product(self, rows: Tensor, dtype: torch.dtype, **algorithm: int) -> Tensor:
        """Return the product (rows, out) for INT8 rows (rows, in), times `factors`, in a type."""

    def multiply(self, rows: Tensor, **algorithm: int) -> Tensor:
        return self._finish(self.scaled_product(self.rounded(rows), rows.dtype, **algorithm))

    def rounded(self, rows: Tensor) -> Tensor:
        """Return rows in INT8, contiguous."""
        return quantize(rows, self.input_scale).contiguous()

    def expected(self, input: Tensor, reference: Tensor) -> Tensor:
        return self.by_rows(input, self._multiply_exactly)

    def _multiply_exactly(self, rows: Tensor) -> Tensor:
        # The whole numbers as floating-point ones: any library multiplies those.
        product = self.rounded(rows).double() @ self.integers.double().t()
        return self._finish((product * self.factors).to(rows.dtype))

    def _finish(self, product: Tensor) -> Tensor:
        return self.epilogue.apply_(product if self.bias is None else product.add_(self.bias))


def _note(layer: nn.Module) -> Int8Layer:
    note = layer.int8
    assert isinstance(note, Int8Layer)
    return note


class DenseInt8Gemm(Int8Gemm):
    """The product with the dense weight in INT8: the control of the sparse one.

    PyTorch returns the sums themselves, which are then scaled in a step of their own; cuSPARSELt
    scales them while it writes. So the two kernels differ by more than sparsity. `measure_gemms`
    compares the products alone.
    """

    name = "dense INT8 GEMM"
    STEP = 32  # on a GPU it takes 17 rows or more

    def scaled_product(self, rows: Tensor, dtype: torch.dtype, **algorithm: int) -> Tensor:
        sums = torch._int_mm(pad_rows(rows, self.STEP), self.integers.t())[: len(rows)]
        return (sums * self.factors).to(dtype)
