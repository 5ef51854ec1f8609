"""The exercises of notebook 06: what is right, and which mistake gets which hint."""

import numpy as np
import pytest

from helpers.tutorial.answers.notebook_06 import EXERCISES
from helpers.tutorial.exercises import UNTOUCHED

judge = EXERCISES["06-speed-up"]


def bootstrap(share=2.5, paired=True, seed=0, draws=1000, rounds=None):
    """Return a solution, or one with a mistake."""

    def speed_up(dense, sparse):
        generator = np.random.default_rng(seed)
        count = len(dense)
        first, second = generator.integers(count, size=(2, draws, rounds or count))
        second = first if paired else second
        ratios = np.median(dense[first], axis=1) / np.median(sparse[second], axis=1)
        low, high = np.percentile(ratios, [share, 100 - share])
        return np.median(dense) / np.median(sparse), low, high

    return speed_up


@pytest.mark.parametrize("seed", range(5))
def test_a_paired_bootstrap_is_right_whatever_its_seed(seed):
    assert judge(bootstrap(seed=seed)) == ""


@pytest.mark.parametrize(
    ("mistake", "hint"),
    [
        (bootstrap(paired=False), "draw the same rounds"),
        (bootstrap(share=5), "too narrow"),
        (bootstrap(share=0), "too wide"),
        (bootstrap(rounds=20), "too wide"),
        (lambda dense, sparse: np.median(dense) / np.median(sparse), "three numbers"),
        (lambda dense, sparse: (np.median(sparse) / np.median(dense), 0, 1), "Divide dense"),
        (lambda dense, sparse: (dense.mean() / sparse.mean(), 0, 1), "medians"),
        (lambda dense, sparse: (np.median(dense / sparse), 0, 1), "two medians first"),
        (lambda dense, sparse: (np.median(dense) / np.median(sparse), 2, 1), "not below"),
        (lambda dense, sparse: (5, 0, 1), "hint below"),
    ],
)
def test_a_common_mistake_gets_its_hint(mistake, hint):
    assert hint in judge(mistake)


def test_an_untouched_function_is_told_from_a_wrong_one():
    assert judge(lambda dense, sparse: None) == UNTOUCHED
