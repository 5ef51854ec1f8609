"""The answers to the exercises of notebook 09."""

from collections.abc import Callable

import numpy as np

from helpers.tutorial.exercises import NO_HINT, UNTOUCHED, Judge, Value


def _stalled() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return when requests were due, sent and answered, in seconds.

    One connection takes one request after the other, and the server stalls at times, which delays
    those that follow.
    """
    generator = np.random.default_rng(0)
    due = np.cumsum(generator.exponential(0.01, 20_000))
    taken = generator.uniform(0.002, 0.006, len(due))
    taken[2000::2000] = np.linspace(0.5, 0.9, 9)
    sent, answered = np.empty_like(due), np.empty_like(due)
    free = 0.0
    for number in range(len(due)):
        sent[number] = max(due[number], free)
        free = answered[number] = sent[number] + taken[number]
    return due, sent, answered


def _p99(function: Callable[[np.ndarray, np.ndarray, np.ndarray], float]) -> str:
    due, sent, answered = _stalled()
    found = function(due, sent, answered)
    if found is None:
        return UNTOUCHED
    waited, served = 1000 * (answered - due), 1000 * (answered - sent)

    def near(expected: float) -> bool:
        return bool(abs(found - expected) <= 0.02 * abs(expected))

    if near(np.percentile(waited, 99)):
        return ""
    for wrong, hint in (
        (np.percentile(waited, 99) / 1000, "Those are seconds. Return milliseconds."),
        (
            np.percentile(served, 99),
            "Counted from `sent`, a stall delays one request alone, and those that had to wait "
            "to be sent look fast. Count from `due`.",
        ),
        (waited.mean(), "That is the mean."),
        (np.median(waited), "That is the median, p50."),
        (np.percentile(waited, 95), "That is p95."),
        (waited.max(), "That is the slowest request. One in a hundred takes longer than p99."),
        (
            np.percentile(waited, 1),
            "That is p1, which 99 of a hundred requests exceed. `np.percentile` takes per cent: "
            "99, not 0.99 or 1.",
        ),
    ):
        if near(wrong):
            return hint
    return NO_HINT


EXERCISES: dict[str, Judge] = {
    "09-saturation": Value(
        250,
        mistakes={
            2000: "Those are images per second. Each request has eight.",
            31.25: "The server computes all eight images of a request in the 4 ms.",
            125: "One batch at a time, and none waits for the network: the 4 ms are all.",
        },
    ),
    "09-p99": _p99,
}
