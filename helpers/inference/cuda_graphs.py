"""Work on the GPU, captured in a CUDA graph and timed by the GPU's own clock.

A graph is launched as a whole, so that what Python does between two kernels costs nothing.
Used from `06_infer_and_benchmark.ipynb` on.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from helpers.errors import UnavailableError


def require_working_context() -> None:
    """Refuse to go on if an earlier error broke this process's CUDA context.

    An illegal memory access or instruction does; a library that refuses a call does not.

    Raises:
        UnavailableError: the context is broken.
    """
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        first, *_ = str(error).splitlines() or [type(error).__name__]
        raise UnavailableError(
            f"An earlier kernel broke this process's CUDA context ({first}), so nothing more can "
            "run on the GPU here. Start a new process, and leave out what ran last."
        ) from error


def capture(
    work: Callable[[], Tensor | None], stream: torch.cuda.Stream | None = None
) -> tuple[torch.cuda.CUDAGraph, Tensor | None]:
    """Return a CUDA graph of some work, and the tensor that every replay fills anew.

    Args:
        work: is called twice, first outside of the graph; must always use the same tensors.
        stream: where the work is launched; one of PyTorch's unless it is given.

    Source: PyTorch's documentation, "CUDA semantics", CUDA graphs.
    """
    stream = stream or torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    # The outer context gives the caller's stream back; after a capture that failed the inner
    # one does not.
    with torch.cuda.stream(stream):
        work()  # libraries set themselves up here, which no graph can hold
        with torch.cuda.graph(graph, stream=stream):
            result = work()
    torch.cuda.current_stream().wait_stream(stream)
    return graph, result


GRAPH_MS = 5.0  # of work in a graph of `time_calls`, if MOST_REPEATS calls take as long
MOST_REPEATS = 20


def time_calls(
    calls: Sequence[Callable[[], Tensor]], repeats: int | None = None, rounds: int = 10
) -> list[list[np.ndarray]]:
    """Return the GPU time of each of several calls in milliseconds, measured in turns.

    Args:
        calls: what to time; none may synchronise.
        repeats: calls in one graph, over which a time is the mean; unless it is given as many
            as take some 5 ms, and not more than 20.
        rounds: as `time_graphs` takes it.

    Returns:
        As `time_graphs`, for one call.
    """
    counts = [repeats or _repeats(call) for call in calls]
    graphs = [
        capture(partial(_repeat, call, count))[0] for call, count in zip(calls, counts, strict=True)
    ]
    return [
        [times / count for times in own]
        for own, count in zip(time_graphs(graphs, rounds), counts, strict=True)
    ]


def time_graphs(graphs: Sequence[torch.cuda.CUDAGraph], rounds: int = 10) -> list[list[np.ndarray]]:
    """Return the GPU time of each of several graphs in milliseconds, measured in turns.

    Args:
        graphs: as `capture` returns them.
        rounds: rounds over all graphs, each there and back (ABBA).

    Returns:
        For each graph one array for each round, as `helpers.benchmark.bootstrap_ratio`
        takes them.
    """
    times: list[list[np.ndarray]] = [[] for _ in graphs]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    there = list(range(len(graphs)))
    for _ in range(rounds):
        own: list[list[float]] = [[] for _ in graphs]
        for turn in there + there[::-1]:
            # Not timed: it fills the GPU's caches, and keeps it busy until the host has sent
            # all that is timed.
            graphs[turn].replay()
            start.record()
            graphs[turn].replay()
            end.record()
            end.synchronize()
            own[turn].append(start.elapsed_time(end))
        for kept, new in zip(times, own, strict=True):
            kept.append(np.array(new))
    return times


def medians(times: Sequence[Sequence[np.ndarray]]) -> list[float]:
    """Return the median of each graph or call, as `time_graphs` or `time_calls` timed them."""
    return [float(np.median(np.concatenate(rounds))) for rounds in times]


def _repeats(call: Callable[[], Tensor]) -> int:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    call()
    start.record()
    call()
    end.record()
    end.synchronize()
    return max(1, int(GRAPH_MS / max(start.elapsed_time(end), GRAPH_MS / MOST_REPEATS)))


def _repeat(call: Callable[[], Tensor], times: int) -> Tensor:
    for _ in range(times):
        result = call()
    return result
