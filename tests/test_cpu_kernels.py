"""The CPU engine's layers against FP64, over shapes, buffers, threads, and instruction sets."""

import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from helpers.inference import cpu_kernels, cpu_layers
from helpers.inference.cpu_layers import CpuLayer
from helpers.sparsity import mask_2to4

NAN = float("nan")
cases = settings(max_examples=40, deadline=None)
ACTIVATIONS = {
    "": lambda x: x,
    "ReLU": torch.relu,
    "ReLU6": lambda x: x.clamp(0, 6),
    "hard-swish": lambda x: x * (x + 3).clamp(0, 6) / 6,
}
activations = st.sampled_from(list(ACTIVATIONS))
sizes = st.integers(7, 38)


def pair(low: int, high: int) -> st.SearchStrategy[tuple[int, int]]:
    return st.tuples(st.integers(low, high), st.integers(low, high))


def sparse_(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear:
    with torch.no_grad():
        layer.weight *= mask_2to4(layer.weight)
    return layer.requires_grad_(False)


def poison() -> None:
    """Fill the memory that layers share with NaN."""
    cpu_kernels._scratch.memory.fill(0xFF)


def assert_exact(
    layer: nn.Conv2d | nn.Linear,
    input: Tensor,
    activation: str = "",
    residual: bool = False,
    sparse: bool = True,
    threads: int = 1,
) -> Tensor:
    """Compare one layer with FP64; the output and the scratch are NaN before."""
    make = CpuLayer.from_conv if isinstance(layer, nn.Conv2d) else CpuLayer.from_linear
    ours = make(layer, activation, sparse)
    expected = layer.double()(input.double())
    layer.float()
    # With a hard-swish nothing is added.
    added = torch.randn(expected.shape) if residual and activation != "hard-swish" else None
    if added is not None:
        expected = expected + added.double()
    expected = ACTIVATIONS[activation](expected)
    out = torch.full(expected.shape, NAN)
    poison()
    result = ours(input, residual=added, out=out, threads=threads)
    assert result is out
    largest = expected.abs().max().clamp(min=1e-3)
    assert ((result - expected).abs().max() / largest).item() < 1e-5
    return result


@cases
@given(
    st.integers(1, 8), st.integers(1, 37), st.integers(1, 3), st.integers(1, 13),
    st.integers(1, 13), activations, st.booleans(), st.booleans(), st.sampled_from([1, 2]),
)  # fmt: skip
def test_pointwise_convolutions_are_exact(
    fours, rows, images, height, width, activation, residual, sparse, stride
):
    layer = sparse_(nn.Conv2d(4 * fours, rows, 1, stride))
    input = torch.randn(images, 4 * fours, height, width)
    assert_exact(layer, input, activation, residual, sparse)


@cases
@given(
    st.integers(1, 5), st.integers(1, 9), st.sampled_from([1, 2, 3]), st.integers(1, 2),
    pair(1, 3), pair(1, 3), pair(0, 3), pair(1, 3), st.tuples(st.integers(7, 18), sizes),
    activations, st.booleans(), st.booleans(),
)  # fmt: skip
def test_other_convolutions_are_exact(
    fours,
    rows,
    groups,
    images,
    kernel,
    stride,
    padding,
    dilation,
    size,
    activation,
    residual,
    sparse,
):
    layer = nn.Conv2d(4 * fours * groups, rows * groups, kernel, stride, padding, dilation, groups)
    input = torch.randn(images, 4 * fours * groups, *size)
    assert_exact(sparse_(layer), input, activation, residual, sparse)


@cases
@given(
    st.integers(1, 40), st.integers(1, 70), st.integers(1, 150),
    activations, st.booleans(), st.booleans(),
)  # fmt: skip
def test_linear_layers_are_exact(fours, rows, tokens, activation, residual, sparse):
    layer = sparse_(nn.Linear(4 * fours, rows, bias=tokens % 2 == 0))
    assert_exact(layer, torch.randn(tokens, 4 * fours), activation, residual, sparse)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(256, 64, 1), (1, 256, 16, 16)),  # read in place, depth in several blocks
        (nn.Conv2d(512, 70, 1), (1, 512, 7, 7)),  # the last vector cut short
        (nn.Conv2d(64, 32, 1, groups=2), (2, 64, 16, 16)),
        (nn.Conv2d(64, 66, 1), (5, 64, 7, 7)),  # tiles that lie in two images
        (nn.Conv2d(64, 32, 3, padding=1), (2, 64, 14, 14)),
        (nn.Conv2d(64, 32, 3, padding="same", dilation=2, bias=False), (1, 64, 9, 9)),
        (nn.Conv2d(64, 32, 2, padding="same"), (1, 64, 9, 9)),  # one more on the right
        (nn.Conv2d(256, 256, 3, padding=1, groups=32), (1, 256, 14, 14)),
        (nn.Conv2d(64, 64, 3, 2, 1, groups=4), (2, 64, 15, 15)),
        (nn.Linear(300, 100), (2, 50, 300)),
        (nn.Linear(300, 100), (300,)),
    ],
)
def test_layers_of_real_sizes_are_exact(layer, shape, activation, sparse):
    images = 5 * torch.randn(shape)  # so that outputs are beyond the bounds of the activations
    assert_exact(sparse_(layer), images, activation, residual=True, sparse=sparse)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(128, 1024, 1), (1, 128, 7, 7)),
        (nn.Conv2d(64, 66, 3, padding=1), (1, 64, 14, 14)),
        (nn.Linear(128, 512), (197, 128)),
    ],
)
def test_threads_do_not_change_a_bit(layer, shape):
    ours = (CpuLayer.from_conv if isinstance(layer, nn.Conv2d) else CpuLayer.from_linear)(
        sparse_(layer)
    )
    input = torch.randn(shape)
    assert torch.equal(ours(input, threads=1), ours(input, threads=64))


@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize(
    ("vectors", "blocks"), [(196, 16), (49, 32), (13, 64), (4, 512)], ids=["56", "28", "14", "7"]
)
def test_all_threads_have_as_much_to_do(vectors, blocks, in_place, threads):
    """In layers of ResNet-50, with pictures of 56, 28, 14 and 7 pixels to a side."""
    tiles, parts = cpu_layers._tiles_and_parts(vectors, 7, 1, blocks, in_place, threads)
    assert vectors / tiles <= 7
    busy = threads * [0.0]
    for tile in range(tiles):
        width = vectors * (tile + 1) // tiles - vectors * tile // tiles
        for _ in range(parts):
            busy[busy.index(min(busy))] += width / parts
    assert max(busy) < 1.25 * vectors / threads


def test_the_input_is_rather_brought_in_once_than_for_each_thread():
    """Seven tiles for two threads: eight narrower ones, where two parts would each bring it in."""
    assert cpu_layers._tiles_and_parts(49, 7, 1, 32, in_place=False, threads=2) == (8, 1)
    assert cpu_layers._tiles_and_parts(49, 7, 1, 32, in_place=False, threads=1) == (7, 1)


def test_threads_start_without_the_openmp_of_pytorch(monkeypatch):
    ours = CpuLayer.from_conv(sparse_(nn.Conv2d(64, 66, 3, padding=1)))
    input = torch.randn(1, 64, 14, 14)
    expected = ours(input, threads=1)
    monkeypatch.setattr(cpu_kernels, "_gomp", lambda: None)
    monkeypatch.setattr(cpu_kernels, "_thread_number", lambda: 0)
    assert torch.equal(ours(input, threads=2), expected)


def test_the_residual_may_be_the_output():
    layer = sparse_(nn.Conv2d(64, 66, 1))
    input, residual = torch.randn(1, 64, 14, 14), torch.randn(1, 66, 14, 14)
    ours = CpuLayer.from_conv(layer)
    apart = ours(input, residual=residual)
    assert torch.equal(ours(input, residual=residual, out=residual), apart)


def test_a_plan_keeps_the_weights_that_it_reads():
    layer, input = sparse_(nn.Conv2d(64, 66, 1)), torch.randn(1, 64, 14, 14)
    out = torch.full((1, 66, 14, 14), NAN)
    ours = CpuLayer.from_conv(layer)
    weights = weakref.ref(ours._packed.values)
    plan = ours.plan(input.shape, 1)
    del ours
    gc.collect()
    assert weights() is not None
    plan.run(input.data_ptr(), out.data_ptr(), 0)
    assert ((out - layer(input)).abs().max() < 1e-4).item()


def test_an_empty_batch_gives_an_empty_output():
    assert CpuLayer.from_conv(sparse_(nn.Conv2d(8, 6, 1)))(torch.ones(0, 8, 5, 5)).shape == (
        0, 6, 5, 5,
    )  # fmt: skip


def test_nan_of_the_input_stays_where_it_is_multiplied():
    layer = nn.Linear(8, 4).requires_grad_(False)
    layer.weight.copy_(torch.tensor([1.0, 1, 0, 0, 1, 1, 0, 0]).expand(4, 8))
    input = torch.ones(3, 8)
    input[1, 0] = NAN
    output = CpuLayer.from_linear(layer, "ReLU")(input)
    assert output[1].isnan().all() and output[[0, 2]].isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda conv: conv.weight.fill_(1), "is not 2:4"),
        (lambda conv: conv.weight.fill_(NAN), "NaN or infinite"),
        (lambda conv: conv.bias.fill_(NAN), "bias has NaN"),
        (lambda conv: conv.half(), "FP32 on the CPU"),
    ],
)
def test_bad_weights_are_refused_in_one_sentence(change, message):
    conv = sparse_(nn.Conv2d(8, 4, 1))
    change(conv)
    with pytest.raises(ValueError, match=message):
        CpuLayer.from_conv(conv)


def test_convolutions_of_other_kinds_are_refused():
    with pytest.raises(ValueError, match="multiple of four"):
        CpuLayer.from_conv(nn.Conv2d(3, 8, 3), sparse=False)
    with pytest.raises(ValueError, match="'reflect'"):
        CpuLayer.from_conv(nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), sparse=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input": torch.ones(1, 8, 5, 5).half()}, "input is torch.float16"),
        ({"input": torch.ones(1, 9, 5, 5)}, "input has shape"),
        ({"input": torch.ones(8, 5, 5)}, "input has shape"),
        ({"input": torch.ones(1, 8, 2, 2)}, "does not fit"),
        ({"input": torch.ones(1, 5, 5, 8).permute(0, 3, 1, 2)}, "not contiguous"),
        ({"residual": torch.ones(1, 4, 5, 5)}, "residual has shape"),
        ({"out": torch.ones(1, 4, 3, 3).double()}, "output is torch.float64"),
    ],
)
def test_bad_tensors_are_refused_in_one_sentence(arguments, message):
    layer = CpuLayer.from_conv(sparse_(nn.Conv2d(8, 4, 3)))
    with pytest.raises(ValueError, match=message):
        layer(**({"input": torch.ones(1, 8, 5, 5)} | arguments))


def test_an_output_over_the_input_is_refused():
    layer = CpuLayer.from_conv(sparse_(nn.Conv2d(8, 8, 1)))
    input = torch.ones(1, 8, 5, 5)
    with pytest.raises(ValueError, match="overwrite the input"):
        layer(input, out=input)


def run(program: str, environment: Mapping[str, str] | None = None) -> str:
    """Run a program in a new process, and return what it wrote to its error stream."""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stderr


def check_every_kind() -> None:
    """Compare a few layers of every kind with FP64; run by the test below."""
    for sparse, activation in product([True, False], ACTIVATIONS):
        assert_exact(
            sparse_(nn.Conv2d(72, 21, 1)), torch.randn(3, 72, 5, 5), activation, True, sparse
        )
        assert_exact(
            sparse_(nn.Conv2d(256, 24, 1)), torch.randn(1, 256, 8, 8), activation, False, sparse
        )
        for stride in (1, 2, 3):
            layer = sparse_(nn.Conv2d(24, 10, 3, stride, padding=1, groups=2))
            assert_exact(layer, torch.randn(2, 24, 11, 37), activation, True, sparse)
        assert_exact(sparse_(nn.Linear(100, 30)), torch.randn(35, 100), activation, True, sparse, 2)


@pytest.mark.parametrize(
    ("processor", "features", "lanes"),
    [("haswell", "+avx,+avx2,+fma,+bmi,+bmi2", 8), ("x86-64", "+sse,+sse2", 4)],
)
def test_layers_are_exact_on_lesser_processors(processor, features, lanes):
    if not cpu_kernels.IS_X86 or lanes > cpu_kernels.LANES:
        pytest.skip(f"this processor has no vectors of {lanes} as x86 has them")
    program = (
        "from helpers.inference import cpu_kernels\n"
        "from tests.test_cpu_kernels import check_every_kind\n"
        f"assert cpu_kernels.LANES == {lanes}\n"
        "check_every_kind()\n"
    )
    environment = {"NUMBA_CPU_NAME": processor, "NUMBA_CPU_FEATURES": features}
    run(program, os.environ | environment)


def test_a_folder_that_cannot_be_written_costs_a_warning():
    made = SimpleNamespace(cache_hits=0)

    def compile(keep: bool) -> SimpleNamespace:
        if keep:
            raise RuntimeError("cannot cache function 'work': no locator available for file 'x'")
        return made

    with pytest.warns(RuntimeWarning, match="Set NUMBA_CACHE_DIR"):
        assert cpu_kernels._compiled(compile, "kernel") is made


def test_what_is_compiled_is_found_again_by_the_next_process():
    program = (
        "import logging, torch\n"
        "from torch import nn\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "from helpers.inference.cpu_layers import CpuLayer\n"
        "layer = CpuLayer.from_conv(nn.Conv2d(4, 4, 1), sparse=False)\n"
        "layer(torch.ones(1, 4, 2, 2))\n"
    )
    runs = [run(program), run(program)]
    assert "Compiled" not in runs[1]
