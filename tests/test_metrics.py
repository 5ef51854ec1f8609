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
    paired_difference,
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


def test_the_interval_of_paired_differences_is_students():
    # Mean 1, standard deviation 0.5, three pairs: the t of two degrees of freedom is 4.303.
    difference = paired_difference([1, 2, 3], [2, 2.5, 4.5])
    assert difference.mean == pytest.approx(1)
    assert difference.high - 1 == pytest.approx(4.30265 * 0.5 / math.sqrt(3), rel=1e-5)
    assert 1 - difference.low == pytest.approx(difference.high - 1)
    assert repr(difference) == "+1.00 [-0.24, +2.24] over 3 pairs"


@pytest.mark.parametrize(
    ("pairs", "confidence", "t"),
    [(2, 0.95, 12.7062), (4, 0.95, 3.18245), (5, 0.95, 2.77645), (5, 0.99, 4.60409),
     (10, 0.9, 1.83311), (31, 0.95, 2.04227)],
)  # fmt: skip
def test_the_reach_of_an_interval_is_the_printed_quantile_of_student(pairs, confidence, t):
    values = [float(number % 2) for number in range(pairs)]
    difference = paired_difference([0.0] * pairs, values, confidence)
    error = torch.tensor(values).double().std() / math.sqrt(pairs)
    assert difference.high - difference.mean == pytest.approx(t * float(error), rel=1e-5)


def test_one_pair_has_no_bounded_interval():
    difference = paired_difference([1.0], [3.0])
    assert (difference.mean, difference.low, difference.high) == (2, -INF, INF)


@pytest.mark.parametrize(
    ("first", "second", "confidence", "complaint"),
    [([], [], 0.95, "no pairs"), ([1], [1, 2], 0.95, "no pairs"), ([1], [1], 1, "confidence")],
)
def test_what_are_no_pairs_is_refused(first, second, confidence, complaint):
    with pytest.raises(InputError, match=complaint):
        paired_difference(first, second, confidence)


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
