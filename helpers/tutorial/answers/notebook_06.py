"""The answers to the exercises of notebook 06."""

from collections.abc import Callable
from typing import Any

import numpy as np

from helpers.tutorial.exercises import NO_HINT, UNTOUCHED, Judge, Value

ROUNDS = 201


def _drifting() -> tuple[np.ndarray, np.ndarray]:
    """Return times of a machine that slows down: in each round dense takes 1.5 times as long."""
    sparse = np.linspace(1.0, 3.0, ROUNDS)
    return 1.5 * sparse, sparse


def _noisy() -> tuple[np.ndarray, np.ndarray]:
    """Return times that scatter, each by itself; dense takes about 1.3 times as long."""
    generator = np.random.default_rng(0)
    dense, sparse = generator.lognormal(0, 0.2, (2, ROUNDS))
    return 1.3 * dense, sparse


def _speed_ups(dense: np.ndarray, sparse: np.ndarray, draws: int = 20_000) -> np.ndarray:
    """Return the speed-up of each draw of a paired bootstrap."""
    rounds = np.random.default_rng(1).integers(ROUNDS, size=(draws, ROUNDS))
    return np.median(dense[rounds], axis=1) / np.median(sparse[rounds], axis=1)


def _speed_up(function: Callable[[np.ndarray, np.ndarray], Any]) -> str:
    dense, sparse = _noisy()
    answer = function(dense, sparse)
    if answer is None:
        return UNTOUCHED
    try:
        value, low, high = (float(each) for each in answer)
    except (TypeError, ValueError):
        return "Return three numbers: the speed-up, and the low and the high end of its interval."
    expected = np.median(dense) / np.median(sparse)
    for wrong, hint in (
        (1 / expected, "That is how much longer sparse takes. Divide dense by sparse."),
        (dense.mean() / sparse.mean(), "Use the medians: one slow run moves a mean."),
        (np.median(dense / sparse), "Take the two medians first, then their ratio."),
    ):
        if np.isclose(value, wrong, rtol=1e-6):
            return hint
    if not np.isclose(value, expected, rtol=1e-6):
        return NO_HINT
    return _judge_interval(function, low, high)


def _judge_interval(function: Callable[..., Any], low: float, high: float) -> str:
    if not low < high:
        return "The low end of the interval is not below its high end."
    _, drift_low, drift_high = function(*_drifting())
    if drift_high - drift_low > 0.01:
        return (
            "Where every round gains 1.5x, the interval is wide: draw the same rounds for dense "
            "and sparse, so that a machine that slows down does so for both."
        )
    expected = np.percentile(_speed_ups(*_noisy()), [2.5, 97.5])
    width = expected[1] - expected[0]
    if high - low > 1.1 * width:
        return "It is too wide for 95 %: leave out 2.5 % of the draws at each end."
    if high - low < 0.9 * width:
        return (
            "It is too narrow for 95 %: take the 2.5th and the 97.5th percentile, of draws with "
            "as many rounds as there are."
        )
    return "" if np.allclose([low, high], expected, atol=0.1 * width) else NO_HINT


EXERCISES: dict[str, Judge] = {
    "06-images-per-second": Value(
        1600,
        mistakes={
            50: "Those are batches per second. Each has 32 images.",
            1.6: "That is per millisecond.",
            640: "That multiplies by the time. How many batches fit into one second?",
        },
    ),
    "06-speed-up": _speed_up,
}
