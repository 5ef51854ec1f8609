"""The answers to the exercises of notebook 08."""

from collections.abc import Callable
from typing import Any

import torch

from helpers.sparsity import mask_2to4
from helpers.tutorial.exercises import UNTOUCHED, Judge, Value

_DEAD = 2  # the output channel without a weight


def _pruned() -> torch.Tensor:
    """Return a 2:4 weight of a 3x3 convolution whose channels differ in size; one is all zeros."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, 3, 3, generator=generator)
    weight *= torch.tensor([1, 0.1, 0, 0.01, 10, 3]).view(-1, 1, 1, 1)
    return weight * mask_2to4(weight)


def _quantise(function: Callable[[torch.Tensor], Any]) -> str:
    weight = _pruned()
    answer = function(weight.clone())
    if answer is None:
        return UNTOUCHED
    try:
        numbers, scales = answer
        scales = torch.as_tensor(scales, dtype=torch.float32).flatten()
        dtype, shape = numbers.dtype, numbers.shape
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return "Return two tensors: the numbers and the scales."
    if shape != weight.shape or dtype != torch.int8:
        return (
            f"The numbers are {dtype} of shape {tuple(shape)}; they should be torch.int8 in the "
            f"shape of the weight, {tuple(weight.shape)}."
        )
    if len(scales) != len(weight):
        return f"There are {len(scales)} scales for {len(weight)} output channels."
    alive = torch.arange(len(weight)) != _DEAD
    if numbers[alive][weight[alive] == 0].any():
        return "A pruned weight became another number than 0: do not use a zero point."
    if not (scales.isfinite() & (scales > 0)).all() or numbers[_DEAD].any():
        return (
            "One channel of the weight that was tried is all zeros, so its largest magnitude is 0, "
            "and 0 / 0 is no number. Give such a channel any scale above 0."
        )
    return _judge_numbers(weight, numbers, scales.view(-1, 1, 1, 1))


def _judge_numbers(weight: torch.Tensor, numbers: torch.Tensor, scales: torch.Tensor) -> str:
    error = (scales * numbers - weight).abs().max(dim=1).values / scales[:, 0]
    largest = numbers.int().abs().amax((1, 2, 3))
    if 0.5001 < error.max() < 1:
        return "Round to the nearest number: `to(torch.int8)` cuts the digits off."
    if error.max() >= 1 or largest.tolist() != [127 * (number != _DEAD) for number in range(6)]:
        return (
            "The largest magnitude of each channel should become 127 or -127; by channel it "
            f"becomes {largest.tolist()}."
        )
    return ""


EXERCISES: dict[str, Judge] = {
    "08-int8-bytes": Value(
        0.3125,
        tolerance=1e-6,
        mistakes={
            0.625: "That is the share of the dense INT8 bytes. FP16 takes two bytes a number.",
            0.25: "That counts the values alone. Their positions take two bits each.",
        },
    ),
    "08-quantise": _quantise,
}
