"""Time several ways to do the same work, in turns."""

import statistics
import time
from collections.abc import Callable, Mapping


def in_turns(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each way in each round, after a first round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            result = way()
            times[name].append(time.perf_counter() - start)
            del result  # so that no way starts with the memory of another in use
    return {name: each[1:] for name, each in times.items()}


def medians(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each way, as `in_turns` measures them."""
    return {name: statistics.median(each) for name, each in in_turns(ways, rounds).items()}
