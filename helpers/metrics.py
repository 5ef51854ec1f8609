"""How good predictions are, and how far two models are apart.

Explained in `03_retrain.ipynb`.
"""

import math
from dataclasses import dataclass

from torch import Tensor

from helpers.errors import InputError


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy over a set of images, with the uncertainty of its size."""

    correct: int
    total: int

    @property
    def top1(self) -> float:
        """Per cent of the images classified correctly."""
        return 100 * self.correct / self.total

    @property
    def standard_error(self) -> float:
        """Binomial standard error of `top1`, in points."""
        share = self.correct / self.total
        return 100 * math.sqrt(share * (1 - share) / self.total)

    def __repr__(self) -> str:
        return f"{self.top1:.2f} % ± {self.standard_error:.2f} top-1 on {self.total:,} images"


def max_relative_error(logits: Tensor, reference: Tensor) -> float:
    """Return the largest difference of two sets of logits, relative to the largest logit.

    Raises:
        InputError: they are not of the same shape.
    """
    if logits.shape != reference.shape:
        raise InputError(
            f"Logits of shape {tuple(logits.shape)} cannot be compared with some of shape "
            f"{tuple(reference.shape)}; they are not of the same network and images."
        )
    logits, reference = logits.double(), reference.double()
    return float((logits - reference).abs().max() / reference.abs().max())


def accuracy(logits: Tensor, labels: Tensor) -> Accuracy:
    """Return the top-1 accuracy of logits (N, classes) against labels (N)."""
    return Accuracy(int((logits.argmax(1) == labels).sum()), len(labels))


@dataclass(frozen=True)
class Comparison:
    """How two networks did on the same images: only those that one of them gets right count."""

    only_first: int  # images that the first classifies correctly and the second does not
    only_second: int
    total: int

    @property
    def difference(self) -> float:
        """Top-1 of the second minus that of the first, in points."""
        return 100 * (self.only_second - self.only_first) / self.total

    @property
    def standard_error(self) -> float:
        """Standard error of `difference`, in points; what both share of chance drops out.

        Source: McNemar, "Note on the sampling error of the difference between correlated
        proportions or percentages", 1947.
        """
        differ = (self.only_first + self.only_second) / self.total
        return 100 * math.sqrt((differ - (self.difference / 100) ** 2) / self.total)

    def __repr__(self) -> str:
        return (
            f"{self.difference:+.2f} ± {self.standard_error:.2f} points: {self.only_second} images "
            f"only the second network has right, {self.only_first} only the first"
        )
