"""Work on the GPU, captured in a CUDA graph and timed by the GPU's own clock.

A graph is launched as a whole, so that what Python does between two kernels costs nothing.
Used from `06_infer_and_benchmark.ipynb` on.
"""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor


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
    with torch.cuda.stream(stream):  # libraries set themselves up here, which no graph can hold
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = work()
    return graph, result


def time_calls(
    calls: Sequence[Callable[[], Tensor]], repeats: int = 20, rounds: int = 10
) -> list[list[np.ndarray]]:
    """Return the GPU time of each of several calls in milliseconds, measured in turns.

    Args:
        calls: what to time; none may synchronise.
        repeats: calls in one graph, over which a time is the mean.
        rounds: as `time_graphs` takes it.

    Returns:
        As `time_graphs`, for one call.
    """
    graphs = [capture(partial(_repeat, call, repeats))[0] for call in calls]
    return [[times / repeats for times in own] for own in time_graphs(graphs, rounds)]


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
            start.record()
            graphs[turn].replay()
            end.record()
            end.synchronize()
            own[turn].append(start.elapsed_time(end))
        for kept, new in zip(times, own, strict=True):
            kept.append(np.array(new))
    return times


def _repeat(call: Callable[[], Tensor], times: int) -> Tensor:
    for _ in range(times):
        result = call()
    return result
