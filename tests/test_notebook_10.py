"""The exercises of notebook 10: what is right, and which mistake gets which hint."""

import pytest
import torch

from helpers.sparsity import mask_2to4
from helpers.tutorial.answers.notebook_10 import EXERCISES
from helpers.tutorial.exercises import NO_HINT, UNTOUCHED

judge = EXERCISES["10-half-inputs"]


def sums(weight):
    return weight.abs().sum(0, keepdim=True)


def larger_half(weight):
    kept = sums(weight)[0].topk(weight.shape[1] // 2).indices
    return torch.zeros_like(weight).index_fill(1, kept, 1)


@pytest.mark.parametrize(
    "mask_of",
    [
        lambda weight: mask_2to4(sums(weight)).expand_as(weight),
        lambda weight: mask_2to4(sums(weight)).repeat(len(weight), 1).float(),
        lambda weight: mask_2to4(weight.abs().mean(0, keepdim=True)).expand_as(weight),
    ],
)
def test_the_same_two_of_every_four_inputs_are_right(mask_of):
    assert judge(mask_of) == ""


@pytest.mark.parametrize(
    ("mistake", "hint"),
    [
        (mask_2to4, "plain 2:4 mask"),
        (lambda weight: mask_2to4(sums(weight)), "one row"),
        (lambda weight: mask_2to4(sums(weight))[0], "one row"),
        (lambda weight: mask_2to4(weight.sum(0, keepdim=True)).expand_as(weight), "opposite signs"),
        (lambda weight: ~mask_2to4(sums(weight)).expand_as(weight), "True is where"),
        (larger_half, "larger half of all inputs"),
        (lambda weight: torch.ones(2, 2), "shape of the weight"),
        (torch.ones_like, NO_HINT),
    ],
)
def test_a_common_mistake_gets_its_hint(mistake, hint):
    assert hint in judge(mistake)


def test_an_untouched_function_is_told_from_a_wrong_one():
    assert judge(lambda weight: None) == UNTOUCHED


@pytest.mark.parametrize(
    ("answer", "hint"),
    [(0.05, "the mean"), (0.2, "worst"), (0.17, "other end"), (-0.27, "sign"), (1.0, NO_HINT)],
)
def test_a_loss_that_is_not_the_end_of_the_interval_gets_its_hint(answer, hint):
    assert hint in EXERCISES["10-possible-loss"](answer)


def test_the_lower_end_of_the_interval_is_the_loss_that_is_left_open():
    assert EXERCISES["10-possible-loss"](0.27) == ""
