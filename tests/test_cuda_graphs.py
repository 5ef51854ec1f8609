from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import cuda_graphs


def test_calls_are_timed_in_turns_round_by_round(captured, gpu_clock):
    ran = []

    def kernel(name: str, milliseconds: float) -> Callable[[], Tensor]:
        def call() -> Tensor:
            ran.append(name)
            # Once in a while something else keeps the GPU busy.
            gpu_clock[0] += milliseconds + (1000 if len(ran) == 31 else 0)
            return torch.zeros(())

        return call

    calls = [kernel("a", 2.0), kernel("b", 3.0)]
    a, b = cuda_graphs.time_calls(calls, repeats=5, rounds=4)
    measured = ran[2 * 2 * 5 :]  # after warm-up and capture
    assert measured[::5] == ["a", "b", "b", "a"] * 4
    assert [len(times) for times in (*a, *b)] == [2] * 8
    assert np.median(np.concatenate(a)) == 2.0
    assert np.median(np.concatenate(b)) == 3.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU was found")
def test_a_replay_computes_anew_from_the_same_tensor():
    own = torch.ones(8, device="cuda")
    graph, doubled = cuda_graphs.capture(lambda: 2 * own)
    own.fill_(3)
    graph.replay()
    torch.cuda.synchronize()
    assert doubled.tolist() == [6.0] * 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU was found")
def test_more_work_takes_more_time():
    small, large = (torch.randn(size, size, device="cuda") for size in (256, 4096))
    times = cuda_graphs.time_calls([lambda: small @ small, lambda: large @ large], rounds=3)
    assert np.median(np.concatenate(times[0])) < np.median(np.concatenate(times[1]))
