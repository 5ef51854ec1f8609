"""Work on the GPU, captured in a CUDA graph and timed by the GPU's own clock.

A graph is launched as a whole, so that what Python does between two kernels costs nothing.
Used from `06_infer_and_benchmark.ipynb` on.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from helpers.errors import first_line
from helpers.inference.errors import DeadContextError

GRAPH_MS = 5.0  # of work in a graph of `time_calls`, if MOST_REPEATS calls take that long
MOST_REPEATS = 20


def raise_if_context_is_broken(error: BaseException, work: str = "an earlier step") -> None:
    """Raise if CUDA no longer works in this process after an error.

    After some errors, such as an illegal memory access, every later call fails or returns
    nothing that can be trusted. After others, such as a shape that a kernel does not take, the
    GPU works as before. Call this wherever a `RuntimeError` is caught and work goes on.

    Args:
        error: what was caught; it becomes the cause of the error that is raised.
        work: what was running, in words: the kernel, its shape, type and algorithm.

    Raises:
        DeadContextError: CUDA no longer works.
    """
    if isinstance(error, DeadContextError):  # known already, with the work that broke it
        raise error
    if not torch.cuda.is_initialized():
        return
    try:
        torch.cuda.synchronize()
    except RuntimeError as lasting:
        raise DeadContextError(
            f"CUDA no longer works in this process ({first_line(lasting)}), since {work} failed: "
            f"{first_line(error)}. Start Python again, and leave out what failed."
        ) from error


@contextmanager
def named(work: str) -> Iterator[None]:
    """Name some work if it leaves CUDA unusable.

    An error on the GPU is reported by a later call, so the work has to be awaited inside.

    Args:
        work: as `raise_if_context_is_broken` takes it.

    Raises:
        DeadContextError: CUDA no longer works after a `RuntimeError` of this block. If it does,
            that error passes on.
    """
    try:
        yield
    except RuntimeError as error:
        raise_if_context_is_broken(error, work)
        raise


def capture(
    work: Callable[[], Tensor | None], stream: torch.cuda.Stream | None = None
) -> tuple[torch.cuda.CUDAGraph, Tensor | None]:
    """Return a CUDA graph of some work, and the tensor that every replay writes.

    Args:
        work: is called twice, first outside of the graph; must always use the same tensors.
        stream: where the work is launched; a new stream of PyTorch's unless given.

    Raises:
        Exception: whatever the work raises, rather than what the capture that it ends raises.

    Source: PyTorch's documentation, "CUDA semantics", CUDA graphs.
    """
    stream = stream or torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    # The outer context restores the caller's stream; the inner one does not do so after a
    # capture that failed.
    with torch.cuda.stream(stream):
        work()  # libraries set themselves up here, which cannot be captured
        result = _captured(work, graph, stream)
    torch.cuda.current_stream().wait_stream(stream)
    return graph, result


def _captured(
    work: Callable[[], Tensor | None], graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream
) -> Tensor | None:
    """Capture some work, and return its result."""
    first: Exception | None = None
    try:
        # Other threads, such as a notebook's, may use the GPU meanwhile.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            try:
                return work()
            except Exception as error:
                first = error
                raise
    except Exception as error:
        if first is None or error is first:
            raise
        raise first from first.__cause__  # the end of the broken capture failed as well


def time_calls(
    calls: Sequence[Callable[[], Tensor]], repeats: int | None = None, rounds: int = 10
) -> list[list[np.ndarray]]:
    """Return the GPU time of each of several calls in milliseconds, measured in turns.

    Args:
        calls: what to time; none may synchronise.
        repeats: calls in one graph, over which a time is the mean; unless given, as many as
            take about 5 ms, and at most 20.
        rounds: as `time_graphs` takes it.

    Returns:
        As `time_graphs`, for one call.
    """
    counts = [repeats or _calls_per_graph(call) for call in calls]
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
        rounds: how often all graphs are timed, each time in order and in reverse (ABBA).

    Returns:
        For each graph, one array for each round, as
        `helpers.measurement.benchmark.bootstrap_ratio` takes them.
    """
    times: list[list[np.ndarray]] = [[] for _ in graphs]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    order = list(range(len(graphs)))
    for _ in range(rounds):
        own: list[list[float]] = [[] for _ in graphs]
        for turn in order + order[::-1]:
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
    """Return the median time of each graph or call, from `time_graphs` or `time_calls`."""
    return [float(np.median(np.concatenate(rounds))) for rounds in times]


def median_times(calls: Sequence[Callable[[], Tensor]]) -> list[float]:
    """Return the median GPU time of each call in milliseconds, measured in turns."""
    return medians(time_calls(calls))


def _calls_per_graph(call: Callable[[], Tensor]) -> int:
    """Return how many calls to put into one graph: fewer, the longer each takes."""
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
