"""The exercises of notebook 08: what is right, and which mistake gets which hint."""

import pytest
import torch

from helpers.tutorial.answers.notebook_08 import EXERCISES
from helpers.tutorial.exercises import UNTOUCHED

judge = EXERCISES["08-quantise"]


def quantise(weight, largest=127, dead=1.0, rounded=True, dtype=torch.int8):
    scales = weight.abs().flatten(1).amax(1) / largest
    scales[scales == 0] = dead
    numbers = weight / scales.view(-1, 1, 1, 1)
    return (numbers.round() if rounded else numbers).to(dtype), scales


def with_zero_point(weight):
    numbers, scales = quantise(weight, largest=60)
    return numbers + 3, scales


def one_scale(weight):
    scale = weight.abs().max() / 127
    return (weight / scale).round().to(torch.int8), scale


def test_a_symmetric_scale_for_each_channel_is_right():
    assert judge(quantise) == ""
    assert judge(lambda weight: list(quantise(weight, dead=0.5))) == ""


@pytest.mark.parametrize(
    ("mistake", "hint"),
    [
        (lambda weight: quantise(weight)[0], "two tensors"),
        (lambda weight: [each.tolist() for each in quantise(weight)], "two tensors"),
        (lambda weight: quantise(weight, dtype=torch.int32), "torch.int8"),
        (lambda weight: (quantise(weight)[0].flatten(1), quantise(weight)[1]), "shape"),
        (one_scale, "1 scales for 6"),
        (lambda weight: quantise(weight, dead=0.0), "all zeros"),
        (lambda weight: quantise(weight, dead=float("nan")), "all zeros"),
        (with_zero_point, "zero point"),
        (lambda weight: quantise(weight, largest=100), "should become 127"),
        (lambda weight: quantise(weight, largest=255), "should become 127"),
        (lambda weight: quantise(weight, rounded=False), "Round"),
        (lambda weight: None, UNTOUCHED),
    ],
)
def test_a_common_mistake_gets_its_hint(mistake, hint):
    assert hint in judge(mistake)
