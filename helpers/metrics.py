"""How good predictions are, and how far the outputs of two models are apart.

Explained in `03_retrain.ipynb`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from torch import Tensor

from helpers.errors import InputError


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy over a set of images, with its sampling error; NaN over none."""

    correct: int
    total: int

    @property
    def top1(self) -> float:
        """Per cent of the images classified correctly."""
        return 100 * _share(self.correct, self.total)

    @property
    def standard_error(self) -> float:
        """Binomial standard error of `top1`, in points."""
        share = _share(self.correct, self.total)
        return 100 * math.sqrt(_share(share * (1 - share), self.total))

    def __repr__(self) -> str:
        return f"{self.top1:.2f} % ± {self.standard_error:.2f} top-1 on {self.total:,} images"


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images: only the images that one of them gets right count."""

    only_first: int  # images that the first model classifies correctly and the second does not
    only_second: int
    total: int

    @property
    def difference(self) -> float:
        """Top-1 of the second model minus that of the first, in points; NaN without images."""
        return 100 * _share(self.only_second - self.only_first, self.total)

    @property
    def standard_error(self) -> float:
        """Standard error of `difference`, in points; the chance that both share cancels out.

        Source: McNemar, "Note on the sampling error of the difference between correlated
        proportions or percentages", 1947.
        """
        differ = _share(self.only_first + self.only_second, self.total)
        variance = differ - (self.difference / 100) ** 2
        return 100 * math.sqrt(_share(variance, self.total))

    def __repr__(self) -> str:
        return (
            f"{self.difference:+.2f} ± {self.standard_error:.2f} points ({self.only_second} images "
            f"only the second model gets right, {self.only_first} only the first)"
        )


def _share(part: float, total: int) -> float:
    return part / total if total else math.nan


def predictions(logits: Tensor) -> Tensor:
    """Return the class of the largest logit (N) for logits (N, classes); -1 where one is NaN.

    PyTorch takes NaN for the largest, so a diverged model would predict some class by chance.
    """
    return logits.argmax(1).masked_fill(logits.isnan().any(1), -1)


def accuracy(logits: Tensor, labels: Tensor) -> Accuracy:
    """Return the top-1 accuracy of logits (N, classes) against labels (N).

    An image with a NaN among its logits counts as classified wrongly.

    Raises:
        InputError: the shapes do not match.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise InputError(
            f"Logits of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)} do "
            "not belong together: they should be (images, classes) and (images)."
        )
    if not len(labels):
        return Accuracy(0, 0)
    return Accuracy(int((predictions(logits) == labels).sum()), len(labels))


def compare_logits(first: Tensor, second: Tensor, labels: Tensor) -> Comparison:
    """Compare two sets of logits (N, classes) for the same images against labels (N).

    Raises:
        InputError: the shapes do not match.
    """
    if first.shape != second.shape or first.dim() != 2 or labels.shape != first.shape[:1]:
        raise InputError(
            f"Logits of shape {tuple(first.shape)} and {tuple(second.shape)} and labels of shape "
            f"{tuple(labels.shape)} are not of the same images."
        )
    one, other = (predictions(logits) == labels for logits in (first, second))
    return Comparison(int((one & ~other).sum()), int((other & ~one).sum()), len(labels))


def max_relative_error(logits: Tensor, reference: Tensor) -> float:
    """Return the largest difference from the reference, relative to its largest logit.

    The result is NaN if a logit is NaN or the reference is infinite, and infinite if only the
    reference is all zeros; neither is below any tolerance.

    Raises:
        InputError: the shapes differ, or there are no logits.
    """
    if logits.shape != reference.shape:
        raise InputError(
            f"Logits of shape {tuple(logits.shape)} cannot be compared with a reference of shape "
            f"{tuple(reference.shape)}: they are not of the same model and images."
        )
    if not logits.numel():
        raise InputError(f"There are no logits to compare in shape {tuple(logits.shape)}.")
    logits, reference = logits.double(), reference.double()
    largest = float((logits - reference).abs().max())
    scale = float(reference.abs().max())
    if scale == 0 and largest > 0:
        return math.inf
    return largest / scale if scale else largest  # 0 from zeros to zeros; NaN stays NaN


@dataclass(frozen=True)
class PairedDifference:
    """The mean of paired differences, and the ends of its interval."""

    mean: float
    low: float
    high: float
    pairs: int

    def __repr__(self) -> str:
        return f"{self.mean:+.2f} [{self.low:+.2f}, {self.high:+.2f}] over {self.pairs} pairs"


def paired_difference(
    first: Sequence[float], second: Sequence[float], confidence: float = 0.95
) -> PairedDifference:
    """Return how much larger the second values are, with an interval by Student's t.

    Args:
        first: values such as the accuracies of one procedure, one for each seed.
        second: those of another procedure, for the same seeds in the same order.
        confidence: how often such intervals hold the true mean, above 0 and below 1.

    Returns:
        The mean of second - first. The interval is unbounded for one pair.

    Raises:
        InputError: there are no values, or not as many of one as of the other, or the confidence
            is out of its range.
    """
    if not first or len(first) != len(second):
        raise InputError(
            f"{len(first)} and {len(second)} values are no pairs. Give as many of both, at least "
            "one."
        )
    if not 0 < confidence < 1:
        raise InputError(f"The confidence is {confidence}; give a number above 0 and below 1.")
    differences = [b - a for a, b in zip(first, second, strict=True)]
    mean = fmean(differences)
    if len(differences) == 1:
        return PairedDifference(mean, -math.inf, math.inf, 1)
    error = stdev(differences) / math.sqrt(len(differences))
    reach = error * _student_t(confidence, len(differences) - 1)
    return PairedDifference(mean, mean - reach, mean + reach, len(differences))


def _student_t(confidence: float, freedom: int) -> float:
    """Return the t that Student's distribution stays within, on both sides, with a probability."""
    low, high = 0.0, math.pi / 2  # of the angle whose tangent is t / sqrt(freedom)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < confidence else (low, middle)
    return math.tan(low) * math.sqrt(freedom)


def _within(angle: float, freedom: int) -> float:
    """Return the probability that Student's t stays within tan(angle) * sqrt(freedom).

    Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    odd = freedom % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(1, (freedom - odd) // 2 + 1):
        total += term
        term *= (2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k)) * math.cos(angle) ** 2
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
