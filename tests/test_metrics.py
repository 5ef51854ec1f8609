import math

import pytest
import torch

from helpers.errors import InputError
from helpers.metrics import (
    Accuracy,
    Comparison,
    accuracy,
    compare_logits,
    max_relative_error,
    predictions,
)

NAN, INF = math.nan, math.inf


def test_accuracy_and_its_binomial_standard_error():
    result = Accuracy(8_000, 10_000)
    assert result.top1 == pytest.approx(80)
    assert result.standard_error == pytest.approx(0.4)  # 100 * sqrt(0.8 * 0.2 / 10,000)
    assert repr(result) == "80.00 % ± 0.40 top-1 on 10,000 images"


def test_the_accuracy_on_no_images_is_unknown():
    result = accuracy(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert result == Accuracy(0, 0)
    assert math.isnan(result.top1)
    assert math.isnan(result.standard_error)
    assert repr(result) == "nan % ± nan top-1 on 0 images"


def test_accuracy_counts_the_largest_logit_of_each_image():
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    assert accuracy(logits, torch.tensor([1, 2, 2])) == Accuracy(2, 3)


def test_a_logit_that_is_nan_is_never_right():
    logits = torch.tensor([[NAN, NAN, NAN], [0, NAN, 0], [0, 1, NAN], [0, INF, 0], [-INF, 0, -1]])
    assert predictions(logits).tolist() == [-1, -1, -1, 1, 1]
    assert accuracy(logits, torch.tensor([0, 1, 1, 1, 1])) == Accuracy(2, 5)


@pytest.mark.parametrize(("logits", "labels"), [((2, 3), (3,)), ((3, 3), (1,)), ((3,), (3,))])
def test_logits_and_labels_of_different_images_are_refused(logits, labels):
    with pytest.raises(InputError, match="do not belong together"):
        accuracy(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))


def test_the_error_of_a_difference_is_that_of_paired_proportions():
    comparison = Comparison(only_first=111, only_second=174, total=10_000)
    pairs = torch.tensor([-1.0] * 111 + [1.0] * 174 + [0.0] * (10_000 - 285), dtype=torch.float64)
    assert comparison.difference == pytest.approx(100 * pairs.mean().item())
    assert comparison.standard_error == pytest.approx(
        100 * pairs.std(correction=0).item() / 10_000**0.5
    )
    assert str(comparison) == (
        "+0.63 ± 0.17 points (174 images only the second model gets right, 111 only the first)"
    )


@pytest.mark.parametrize("total", [1, 3, 7, 49, 10_000])
def test_models_that_differ_on_every_image_have_no_error_of_chance(total):
    assert Comparison(0, total, total).difference == 100
    assert Comparison(0, total, total).standard_error == 0
    assert Comparison(total, 0, total).standard_error == 0


def test_a_comparison_on_no_images_is_unknown():
    assert math.isnan(Comparison(0, 0, 0).difference)
    assert math.isnan(Comparison(0, 0, 0).standard_error)


@pytest.mark.parametrize(
    ("logits", "reference", "expected"),
    [
        ([1.0, -4.0], [1.0, -4.0], 0),
        ([1.0, -3.0], [1.0, -4.0], 0.25),
        ([0.0, 0.0], [0.0, 0.0], 0),
        ([0.0, 1e-30], [0.0, 0.0], INF),
        ([1.0, INF], [1.0, 2.0], INF),
        ([NAN, 1.0], [1.0, 1.0], NAN),
        ([1.0, 1.0], [NAN, 1.0], NAN),
        ([0.0, NAN], [0.0, 0.0], NAN),
        ([1.0, 1.0], [INF, 1.0], NAN),
        ([INF, 1.0], [INF, 1.0], NAN),
    ],
)
def test_the_largest_difference_is_relative_to_the_largest_logit(logits, reference, expected):
    found = max_relative_error(torch.tensor([logits]), torch.tensor([reference]))
    assert found == pytest.approx(expected, nan_ok=True)


def test_half_precision_does_not_overflow():
    logits = torch.tensor([60_000.0, -60_000.0], dtype=torch.float16)
    assert max_relative_error(logits, -logits) == 2


def test_logits_of_other_shapes_or_none_are_refused():
    with pytest.raises(InputError, match=r"shape \(2, 1\) cannot be compared .* \(2, 10\)"):
        max_relative_error(torch.ones(2, 1), torch.ones(2, 10))
    with pytest.raises(InputError, match=r"no logits to compare in shape \(0, 10\)"):
        max_relative_error(torch.ones(0, 10), torch.ones(0, 10))


def test_logits_are_compared_image_by_image():
    labels = torch.tensor([0, 1, 0, 1])
    first = torch.eye(2)[[0, 1, 1, 0]]  # right, right, wrong, wrong
    second = torch.eye(2)[[0, 0, 0, 0]]  # right, wrong, right, wrong
    assert compare_logits(first, second, labels) == Comparison(1, 1, 4)
    second[0] = NAN
    assert compare_logits(first, second, labels) == Comparison(2, 1, 4)
    assert compare_logits(second, first, labels) == Comparison(1, 2, 4)


def test_logits_of_other_images_are_not_compared():
    with pytest.raises(InputError, match="are not of the same images"):
        compare_logits(torch.ones(2, 3), torch.ones(3, 3), torch.ones(2))
    with pytest.raises(InputError, match="are not of the same images"):
        compare_logits(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3))
