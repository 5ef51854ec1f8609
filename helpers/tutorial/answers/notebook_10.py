"""The answers to the exercises of notebook 10."""

from collections.abc import Callable

import torch
from torch import Tensor

from helpers.metrics import paired_difference
from helpers.sparsity import mask_2to4
from helpers.tutorial.exercises import NO_HINT, UNTOUCHED, Judge, Value

DIFFERENCES = [-0.15, -0.10, 0.25, -0.05, -0.20]  # points, one for each seed


def judge_half_inputs(mask_of: Callable[[Tensor], Tensor | None]) -> str:
    """Judge a function that keeps the same two of every four inputs for all outputs."""
    generator = torch.Generator().manual_seed(0)
    for outputs, inputs in ((1, 4), (6, 8), (16, 32)):
        weight = torch.randn(outputs, inputs, generator=generator)
        mask = mask_of(weight.clone())
        if mask is None:
            return UNTOUCHED
        hint = _hint(mask.to(torch.bool), weight)
        if hint:
            return hint
    return ""


def _hint(mask: Tensor, weight: Tensor) -> str:
    """Return nothing if a mask is right, else what to change."""
    sums = weight.abs().sum(0, keepdim=True)
    expected = mask_2to4(sums)
    if mask.shape in (expected.shape, expected[0].shape) and mask.shape != weight.shape:
        return "That is one row. Repeat it for every output: `expand_as(weight)`."
    if mask.shape != weight.shape:
        return "The mask needs the shape of the weight, (outputs, inputs)."
    if torch.equal(mask, expected.expand_as(mask)):
        return ""
    if torch.equal(mask, mask_2to4(weight)):
        return "Each output chooses its own two inputs there: that is the plain 2:4 mask."
    if torch.equal(mask, mask_2to4(weight.sum(0, keepdim=True)).expand_as(mask)):
        return "Take the magnitudes before you add them up: weights of opposite signs cancel."
    if torch.equal(mask, ~expected.expand_as(mask)):
        return "True is where a weight is kept."
    largest = sums[0].topk(weight.shape[1] // 2).indices
    if torch.equal(mask, torch.zeros_like(mask).index_fill(1, largest, True)):
        return "That keeps the larger half of all inputs. Keep two of every four."
    return NO_HINT


EXERCISES: dict[str, Judge] = {
    "10-half-inputs": judge_half_inputs,
    "10-possible-loss": Value(
        lambda: -paired_difference([0.0] * len(DIFFERENCES), DIFFERENCES).low,
        tolerance=0.005,
        mistakes={
            0.05: "That is the mean of the five. The mean of all seeds may lie lower.",
            0.2: "That is the worst of five seeds, not an end of the interval.",
            0.17: "That is the other end of the interval, where 2:4 gains.",
            -0.27: "Give the loss without its sign.",
        },
    ),
}
