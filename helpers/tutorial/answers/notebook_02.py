"""The answers to the exercises of notebook 02."""

import torch
from torch import Tensor

from helpers.sparsity import mask_2to4
from helpers.tutorial.exercises import Function, Judge, Value


def _random(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


_EQUALS = torch.tensor([[1.0, -1.0, -2.0, 2.0], [3.0, 3.0, 0.0, -4.0]])


def mask_1to2(weight: Tensor) -> Tensor:
    pairs = weight.abs().unflatten(1, (-1, 2))
    first = pairs[..., 0] >= pairs[..., 1]
    return torch.stack([first, ~first], dim=-1).flatten(1)


def _signed(weight: Tensor) -> Tensor:
    return mask_1to2(weight - weight.min())


def _along_outputs(weight: Tensor) -> Tensor:
    return mask_1to2(weight.T).T


def _smaller(weight: Tensor) -> Tensor:
    return ~mask_1to2(weight)


def _pruned(weight: Tensor) -> Tensor:
    return weight * mask_1to2(weight)


def _second_of_equals(weight: Tensor) -> Tensor:
    return mask_1to2(weight.flip(1)).flip(1)


def prune_along_outputs(weight: Tensor) -> Tensor:
    return (weight.T * mask_2to4(weight.T)).T


def _along_inputs(weight: Tensor) -> Tensor:
    return weight * mask_2to4(weight)


def _left_turned(weight: Tensor) -> Tensor:
    return weight.T * mask_2to4(weight.T)


def _mask_alone(weight: Tensor) -> Tensor:
    return mask_2to4(weight.T).T


EXERCISES: dict[str, Judge] = {
    "02-bytes": Value(
        0.75,
        tolerance=0.001,
        mistakes={
            0.5: "That counts the kept values alone. Their positions take two bits each.",
            0.625: "That is the share for values of one byte. These have half a byte.",
            0.25: "That is the share of the positions alone.",
        },
    ),
    "02-mask-1to2": Function(
        mask_1to2,
        [
            (_random(4, 8),),
            (_random(6, 2),),
            (torch.tensor([[1.0, -1.0, -2.0, 2.0], [3.0, 3.0, 0.0, -4.0]]),),
        ],
        mistakes={
            _signed: "-3 is larger than 1 in magnitude: compare absolute values.",
            _along_outputs: "A pair is two neighbouring columns, the input channels.",
            _smaller: "It marks the weights to remove. The mask is true where a weight is kept.",
            _pruned: "It returns the pruned weight. The mask has only true and false.",
            _second_of_equals: "Almost: of equal magnitudes keep the first.",
        },
    ),
    "02-along-outputs": Function(
        prune_along_outputs,
        [(_random(8, 12),), (_random(4, 4),)],
        mistakes={
            _along_inputs: "These groups run along the input channels, as they should for the "
            "hardware. This time let them run along the outputs.",
            _left_turned: "The weight comes back transposed. Transpose it a second time.",
            _mask_alone: "That is the mask. Return the weight with zeros.",
        },
    ),
}
