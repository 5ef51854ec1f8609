from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.inference import cuda_graphs
from helpers.inference.errors import DeadContextError


def test_calls_are_timed_in_turns_round_by_round(captured, gpu_clock):
    ran = []

    def kernel(name: str, milliseconds: float) -> Callable[[], Tensor]:
        def call() -> Tensor:
            ran.append(name)
            # Once in a while something else keeps the GPU busy.
            gpu_clock[0] += milliseconds + (1000 if len(ran) == 46 else 0)
            return torch.zeros(())

        return call

    calls = [kernel("a", 2.0), kernel("b", 3.0)]
    a, b = cuda_graphs.time_calls(calls, repeats=5, rounds=4)
    replays = ran[2 * 2 * 5 :: 5]  # after warm-up and capture
    assert replays[::2] == ["a", "b", "b", "a"] * 4
    assert replays[1::2] == replays[::2], "each is timed right after a replay that is not"
    assert [len(times) for times in (*a, *b)] == [2] * 8
    assert np.median(np.concatenate(a)) == 2.0
    assert np.median(np.concatenate(b)) == 3.0


@pytest.mark.parametrize(("milliseconds", "calls"), [(0.0, 20), (0.01, 20), (1.0, 5), (70.0, 1)])
def test_a_graph_holds_fewer_calls_of_longer_ones(captured, gpu_clock, milliseconds, calls):
    ran = []

    def call() -> Tensor:
        ran.append(0)
        gpu_clock[0] += milliseconds
        return torch.zeros(())

    (times,) = cuda_graphs.time_calls([call], rounds=1)
    replays = 4  # two turns, each after a replay that is not timed
    assert len(ran) == 2 + (2 + replays) * calls
    assert times[0].tolist() == pytest.approx([milliseconds] * 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU was found")
def test_a_replay_computes_again_from_the_same_tensor():
    own = torch.ones(8, device="cuda")
    graph, doubled = cuda_graphs.capture(lambda: 2 * own)
    own.fill_(3)
    graph.replay()
    torch.cuda.synchronize()
    assert doubled.tolist() == [6.0] * 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU was found")
def test_a_failed_capture_restores_the_stream():
    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError) as raised:
        cuda_graphs.capture(lambda: torch.ones((), device="cuda").cpu())  # waits for the GPU
    cuda_graphs.raise_if_context_is_broken(raised.value)
    assert torch.cuda.current_stream() == before
    own = torch.ones(8, device="cuda")
    graph, doubled = cuda_graphs.capture(lambda: 2 * own)
    graph.replay()
    assert doubled.tolist() == [2.0] * 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU was found")
def test_more_work_takes_more_time():
    small, large = (torch.randn(size, size, device="cuda") for size in (256, 4096))
    times = cuda_graphs.time_calls([lambda: small @ small, lambda: large @ large], rounds=3)
    assert np.median(np.concatenate(times[0])) < np.median(np.concatenate(times[1]))


@pytest.mark.parametrize(("started", "calls"), [(True, ["synchronize"]), (False, [])])
def test_a_gpu_that_still_works_or_was_never_used_raises_nothing(monkeypatch, started, calls):
    seen = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: started)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("synchronize"))
    cuda_graphs.raise_if_context_is_broken(RuntimeError("shape not supported"))
    assert seen == calls


def test_a_broken_gpu_is_reported_with_its_cause(monkeypatch):
    def synchronize() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel ...")

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    cause = RuntimeError("the kernel failed\nfor many reasons")
    with pytest.raises(DeadContextError, match=r"illegal .*the kernel failed\. Start") as raised:
        cuda_graphs.raise_if_context_is_broken(cause)
    assert raised.value.__cause__ is cause
    assert "\n" not in str(raised.value)
    with (
        pytest.raises(DeadContextError, match=r"since the GEMM of 8x16 failed: .*reasons") as named,
        cuda_graphs.named("a model"),
        cuda_graphs.named("the GEMM of 8x16"),
    ):
        raise RuntimeError("reasons")
    assert isinstance(named.value.__cause__, RuntimeError), "the innermost name is kept"


def test_an_error_that_leaves_cuda_working_passes_on(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with pytest.raises(RuntimeError, match="shape not supported"), cuda_graphs.named("a GEMM"):
        raise RuntimeError("shape not supported")


@pytest.fixture
def broken_capture(monkeypatch):
    """CUDA graphs whose capture cannot be ended once the work in it has failed."""

    @contextmanager
    def graph(_: object, stream: object, capture_error_mode: str):
        assert capture_error_mode == "thread_local"
        try:
            yield
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())


def test_what_the_work_raises_is_not_hidden_by_the_end_of_its_capture(broken_capture):
    calls = []

    def work() -> None:
        calls.append(0)
        if len(calls) == 2:
            raise ValueError("the engine refused to run")

    with pytest.raises(ValueError, match="refused"):
        cuda_graphs.capture(work, MagicMock())


def test_a_capture_that_cannot_be_ended_is_an_error_itself(broken_capture):
    with pytest.raises(RuntimeError, match="previous error"):
        cuda_graphs.capture(lambda: None, MagicMock())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU was found")
def test_a_gpu_works_after_a_refused_argument():
    with pytest.raises(RuntimeError) as raised:
        torch.ones(2, 3, device="cuda") @ torch.ones(2, 3, device="cuda")
    cuda_graphs.raise_if_context_is_broken(raised.value)
