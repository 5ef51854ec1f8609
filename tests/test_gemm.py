import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass as to_cutlass,
)

from helpers import machine
from helpers.errors import InputError
from helpers.inference import cuda_graphs
from helpers.inference.cusparselt import why_no_sparse_gemms
from helpers.inference.errors import DeadContextError
from helpers.measurement import gemm
from helpers.measurement.gemm import (
    PRODUCTS,
    GemmError,
    measure_bandwidth,
    measure_gemms,
    shares,
    this_datasheet,
    why_not,
)
from helpers.measurement.roofline import DATASHEETS, DATATYPES
from helpers.sparsity import compress_2to4, mask_nm

SIZE = (32, 64, 96)
NUMBERS = list(gemm.MEASURED)

every_datatype = pytest.mark.parametrize("name", DATATYPES)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class FakeCusparselt:
    """PyTorch's binding of cuSPARSELt on the CPU, with its contract for every datatype."""

    milliseconds = 2.0
    eight_bits = (torch.int8, torch.float8_e4m3fn)

    def __init__(self, clock: list[float]) -> None:
        self.clock = clock
        self.weights: list[Tensor] = []
        self.calls: list[dict] = []
        self.change: Callable[[Tensor], Tensor] = lambda product: product

    def compress(self, weight: Tensor) -> Tensor:
        assert weight.is_contiguous()
        kept, of = (1, 2) if weight.dtype == torch.float32 else (2, 4)
        groups = weight.double().reshape(len(weight), -1, of)
        assert ((groups != 0).sum(2) <= kept).all()
        self.weights.append(weight)
        return weight.clone()

    def mm_search(
        self,
        compressed: Tensor,
        dense: Tensor,
        bias: Tensor | None,
        alpha: Tensor | None,
        out_dtype: torch.dtype | None,
        transpose_result: bool,
    ) -> tuple[int, int, int, int]:
        assert bias is alpha is None
        self.product(compressed, dense, out_dtype, transpose_result)
        return 7, 2, 1, 40

    def sparse_mm(
        self,
        compressed: Tensor,
        dense: Tensor,
        out_dtype: torch.dtype | None = None,
        transpose_result: bool = False,
        **algorithm: int,
    ) -> Tensor:
        self.clock[0] += self.milliseconds
        self.calls.append({"out_dtype": out_dtype, **algorithm})
        return self.change(self.product(compressed, dense, out_dtype, transpose_result))

    def product(
        self,
        compressed: Tensor,
        dense: Tensor,
        out_dtype: torch.dtype | None,
        transpose_result: bool,
    ) -> Tensor:
        assert compressed.dtype == dense.dtype
        assert dense.t().is_contiguous()
        if dense.dtype not in self.eight_bits and out_dtype is not None:
            raise RuntimeError("out_dtype support only available for int8/fp8 inputs")
        product = compressed.double() @ dense.double()
        product = product.to(out_dtype or dense.dtype)
        return product.t().contiguous() if transpose_result else product


@pytest.fixture
def cusparselt(monkeypatch, gpu_clock):
    fake = FakeCusparselt(gpu_clock)
    monkeypatch.setattr(torch, "_cslt_compress", fake.compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", fake.sparse_mm)
    monkeypatch.setattr(torch._C, "_cusparselt", fake, raising=False)
    return fake


@pytest.fixture
def dense_weights(monkeypatch, gpu_clock) -> list[Tensor]:
    """The weight of every dense product; each takes 3 ms on the GPU's clock."""
    weights = []

    def timed(product: Callable, x: Tensor, weight: Tensor, *args: Tensor, **options) -> Tensor:
        gpu_clock[0] += 3.0
        weights.append(weight.t())
        return product(x, weight, *args, **options)

    for name in ("mm", "_int_mm", "_scaled_mm"):
        monkeypatch.setattr(torch, name, partial(timed, getattr(torch, name)))
    return weights


@pytest.fixture
def lab(monkeypatch, captured, cusparselt, dense_weights):
    """A machine on which everything runs: on the CPU, by the GPU's clock."""
    monkeypatch.setattr(machine, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(gemm, "why_not", lambda name: "")
    return cusparselt


# --- the datatypes -------------------------------------------------------------------------


def test_every_datatype_has_its_product_with_the_bytes_that_the_roofline_counts():
    assert list(PRODUCTS) == list(DATATYPES)
    for name, products in PRODUCTS.items():
        assert products.dtype.itemsize == DATATYPES[name].input_bytes
        assert products.output.itemsize == DATATYPES[name].output_bytes


# --- measuring -----------------------------------------------------------------------------


def test_every_datatype_and_size_is_a_row_with_times_rates_and_their_ratio(lab):
    sizes = [SIZE, (64, 64, 64)]
    table = measure_gemms(sizes)
    assert list(table.columns) == ["datatype", "m", "n", "k", *NUMBERS, "reason"]
    assert list(table.datatype) == [name for name in DATATYPES for _ in sizes]
    assert list(table[["m", "n", "k"]].itertuples(index=False, name=None)) == sizes * 5
    assert set(table.reason) == {""}
    assert set(table.dense_ms) == {3.0}
    assert set(table.sparse_ms) == {2.0}
    assert table[["ratio", "ratio_low", "ratio_high"]].to_numpy() == pytest.approx(1.5)
    operations = 2 * table.m * table.n * table.k
    assert table.dense_tflops.to_numpy() == pytest.approx(operations / 3e-3 / 1e12)
    assert table.sparse_tflops.to_numpy() == pytest.approx(operations / 2e-3 / 1e12)


@every_datatype
def test_the_dense_product_multiplies_the_weight_that_was_not_pruned(lab, dense_weights, name):
    measure_gemms([SIZE], [name], rounds=2)
    (pruned,) = lab.weights
    zeros = [float((weight.double() == 0).double().mean()) for weight in dense_weights]
    assert zeros[0] >= 0.5, "the check has the pruned weight"
    assert max(zeros[1:]) < 0.05, "and whatever is timed the whole one"
    assert len(zeros) > 2 * 2 * 2
    whole = dense_weights[-1].double()
    kept = pruned.double() != 0
    assert torch.equal(pruned.double()[kept], whole[kept])


@every_datatype
def test_each_weight_has_the_pattern_of_its_datatype_and_no_negative_zero(lab, name):
    measure_gemms([SIZE], [name])
    (weight,) = lab.weights
    assert weight.dtype == PRODUCTS[name].dtype
    kept, of = DATATYPES[name].pattern
    filled = (weight.double() != 0).reshape(-1, of).sum(1)
    assert filled.max() == kept
    assert filled.double().mean() > 0.95 * kept
    assert not (torch.signbit(weight.double()) & (weight.double() == 0)).any()


@every_datatype
def test_cusparselt_runs_what_its_search_found_with_the_output_of_the_dense_product(lab, name):
    measure_gemms([SIZE], [name])
    eight_bits = {"INT8": torch.int32, "FP8": torch.float16}
    expected = {
        "out_dtype": eight_bits.get(name), "alg_id": 7, "split_k": 2, "split_k_mode": 1,
    }  # fmt: skip
    assert lab.calls
    assert all(call == expected for call in lab.calls)
    lab.calls.clear()
    measure_gemms([SIZE], [name], search=False)
    assert lab.calls
    assert all(call == {"out_dtype": eight_bits.get(name)} for call in lab.calls)


@every_datatype
def test_dense_and_sparse_are_the_product_with_the_transposed_weight(lab, name):
    products = PRODUCTS[name]
    x, values = products.operand(normal(32, 64)), normal(48, 64, seed=1)
    weight = products.operand(values.masked_fill(~mask_nm(values, *DATATYPES[name].pattern), 0))
    expected = x.double() @ weight.double().t()
    for product in (products.dense(x, weight)(), products.sparse(x, weight)()):
        assert product.shape == (32, 48)
        assert product.dtype == products.output
        error = (product.double() - expected).abs().max() / expected.abs().max()
        assert error <= products.tolerance / 2


@every_datatype
def test_operands_are_random_numbers_that_fill_the_datatype(name):
    numbers = PRODUCTS[name].operand(normal(256, 256)).double()
    scale = 127 / 4 if name == "INT8" else 1
    assert numbers.std() == pytest.approx(scale, rel=0.02)
    assert (numbers == 0).double().mean() < 0.05
    if name == "INT8":
        assert numbers.abs().max() == 127, "-128 has no positive counterpart"


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(lab):
    for seed in (0, 0, 1):
        measure_gemms([SIZE], ["FP16"], seed=seed)
    first, same, other = lab.weights
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("FP16", lambda product: product * 1.05),
        ("TF32", lambda product: product.flip(0)),
        ("BF16", lambda product: product * math.nan),
        ("FP8", lambda product: product * 0),
        ("INT8", lambda product: product + (torch.arange(product.numel()) == 5).view_as(product)),
    ],
    ids=["scaled", "wrong rows", "NaN", "zero", "one number off by one"],
)
def test_a_sparse_product_with_wrong_numbers_is_not_timed(lab, captured, name, change):
    lab.change = change
    (row,) = measure_gemms([SIZE], [name]).to_dict("records")
    assert row["reason"].startswith(f"The sparse {name} product differs from the dense one")
    assert all(math.isnan(row[number]) for number in NUMBERS)
    assert captured == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError("operation not supported\nat line 3"), "operation not supported"),
        (ValueError("Expected a multiple of 16"), "Expected a multiple of 16"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_a_refused_product_is_recorded_and_the_rest_measured(lab, monkeypatch, error, words):
    def refuse(compressed: Tensor, *args) -> tuple[int, int, int, int]:
        if compressed.dtype == torch.bfloat16 and len(compressed) == 64:
            raise error
        return FakeCusparselt.mm_search(lab, compressed, *args)

    monkeypatch.setattr(lab, "mm_search", refuse)
    table = measure_gemms([SIZE, (32, 32, 32)], ["BF16", "FP16"])
    reasons = [f"PyTorch does not run this product here: {words}", "", "", ""]
    assert list(table.reason) == reasons
    assert list(table.ratio.isna()) == [True, False, False, False]
    assert list(table[NUMBERS].isna().all(axis=1)) == [True, False, False, False]


def test_a_broken_cuda_context_ends_the_measurement(lab, monkeypatch):
    """After an illegal access nothing runs any more, so the next rows would have wrong reasons."""

    def crash(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nCompile with")

    monkeypatch.setattr(lab, "mm_search", crash)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    (refused,) = measure_gemms([SIZE], ["FP16"]).reason
    assert refused.startswith("PyTorch does not run this product here: CUDA error")
    monkeypatch.setattr(torch.cuda, "synchronize", crash)
    with pytest.raises(
        DeadContextError, match=r"sparse FP16 product of 32x64x96, while .*tried, failed: .*illegal"
    ):
        measure_gemms([SIZE], ["FP16"])
    measure_gemms([SIZE], ["FP16"], search=False)


@pytest.mark.parametrize(
    ("search", "algorithm"), [(True, "{'alg_id': 7"), (False, "the default algorithm")]
)
def test_a_product_that_breaks_cuda_when_it_runs_is_named_with_its_algorithm(
    lab, monkeypatch, search, algorithm
):
    def crash(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal instruction was encountered")

    monkeypatch.setattr(gemm, "_check_equal", crash)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", crash)
    with pytest.raises(DeadContextError, match=f"sparse BF16 product of 32x64x96 with {algorithm}"):
        measure_gemms([SIZE], "BF16", search=search)


def test_a_size_that_the_pattern_does_not_fit_is_recorded_too(lab):
    table = measure_gemms([(32, 32, 30)], ["FP16", "TF32"])
    fp16, tf32 = table.reason
    assert "in a multiple of 4" in fp16
    assert tf32 == "", "1:2 takes pairs"


def test_an_unavailable_product_is_a_row_with_its_reason(monkeypatch):
    monkeypatch.setattr(gemm, "why_not", lambda name: f"no {name} today")
    table = measure_gemms([SIZE, SIZE], ["FP8"])
    assert list(table.reason) == ["no FP8 today"] * 2
    assert table[NUMBERS].isna().all(axis=None)
    assert all(table[number].dtype == np.float64 for number in NUMBERS)


def test_nothing_to_measure_is_an_empty_table():
    table = measure_gemms([])
    assert list(table.columns) == ["datatype", "m", "n", "k", *NUMBERS, "reason"]
    assert table.empty


def test_one_datatype_may_be_named_without_a_list(lab):
    assert list(measure_gemms([SIZE], "FP16").datatype) == ["FP16"]


@pytest.mark.parametrize(
    "sizes", [[(32, 32)], (32, 32, 32), [(32, 32, 32.5)], [(32, 0, 32)], [(32, 32, -32)], ["abc"]]
)
def test_an_invalid_size_is_refused_before_measuring(lab, sizes):
    with pytest.raises(InputError, match=r"not the size of a product|give it a number above 0"):
        measure_gemms([SIZE, *sizes])
    assert lab.weights == []


def test_an_unknown_datatype_is_refused_before_anything_is_measured():
    names = "TF32, FP16, BF16, INT8, FP8"
    for ask in (why_not, lambda name: measure_gemms([SIZE], ["FP16", name])):
        with pytest.raises(InputError, match=f"no datatype 'FP4' here; there are {names}"):
            ask("FP4")


def fake_gpu(monkeypatch, capability: tuple[int, int]) -> None:
    monkeypatch.setattr(gemm, "why_no_sparse_gemms", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a fake GPU")


def test_fp8_needs_a_later_gpu_than_the_other_datatypes(monkeypatch):
    fake_gpu(monkeypatch, (8, 6))
    assert {name for name in DATATYPES if why_not(name)} == {"FP8"}
    assert why_not("FP8") == (
        "a fake GPU has no Tensor Cores for FP8, which came with compute capability 8.9; "
        "leave this datatype out here."
    )
    fake_gpu(monkeypatch, (8, 9))
    assert not any(why_not(name) for name in DATATYPES)


def test_without_a_gpu_every_datatype_has_the_reason_of_cusparselt(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {why_not(name) for name in DATATYPES} == {why_no_sparse_gemms()}
    assert why_no_sparse_gemms().startswith("No NVIDIA GPU was found")


# --- TF32 ----------------------------------------------------------------------------------


@pytest.fixture
def matmul():
    """PyTorch's setting for FP32 products on the GPU, put back as it was."""
    setting, legacy = torch.backends.cuda.matmul, torch.get_float32_matmul_precision()
    before = setting.fp32_precision
    yield setting
    torch.set_float32_matmul_precision(legacy)
    setting.fp32_precision = before


@pytest.mark.parametrize("setting", ["none", "ieee", "tf32"])
@pytest.mark.parametrize("fails", [False, True])
def test_tf32_is_allowed_only_within_the_product(matmul, monkeypatch, setting, fails):
    seen = []

    def mm(x: Tensor, weight: Tensor) -> Tensor:
        seen.append(matmul.fp32_precision)
        if fails:
            raise RuntimeError("out of memory")
        return x

    monkeypatch.setattr(torch, "mm", mm)
    matmul.fp32_precision = setting
    product = PRODUCTS["TF32"].dense(normal(4, 4), normal(4, 4))
    assert seen == []
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            product()
    else:
        product()
    assert seen == ["tf32"]
    assert matmul.fp32_precision == setting


@pytest.mark.parametrize("legacy", ["highest", "high"])
def test_a_setting_made_the_older_way_can_still_be_read_afterwards(matmul, legacy):
    torch.set_float32_matmul_precision(legacy)
    PRODUCTS["TF32"].dense(normal(4, 4), normal(4, 4))()
    assert matmul.allow_tf32 == (legacy == "high")
    assert torch.get_float32_matmul_precision() == legacy


# --- the memory ----------------------------------------------------------------------------


def test_the_bandwidth_counts_what_is_read_and_what_is_written(monkeypatch):
    copies = []

    def time_calls(calls: list[Callable[[], Tensor]]) -> list[list[np.ndarray]]:
        (call,) = calls
        copies.append(call())
        return [[np.array([0.5, 2.0]), np.array([0.5, 0.5])]]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(machine, "device", lambda: torch.device("cpu"))
    monkeypatch.setattr(cuda_graphs, "time_calls", time_calls)
    assert measure_bandwidth(8) == pytest.approx(2 * 8e6 / 0.5e-3 / 1e9)
    (copy,) = copies
    assert copy.nbytes == 8 * 10**6
    assert copy.std() == pytest.approx(1, rel=0.02), "random numbers were copied"


def test_without_a_gpu_there_is_no_bandwidth_to_measure(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(GemmError, match="No NVIDIA GPU was found"):
        measure_bandwidth()


# --- the bytes of a datatype ----------------------------------------------------------------


@pytest.mark.parametrize("name", ["FP16", "BF16", "INT8", "FP8"])
def test_a_compressed_weight_has_the_bytes_that_compress_2to4_gives_it(name):
    values = normal(32, 64)
    weight = PRODUCTS[name].operand(values.masked_fill(~mask_nm(values, 2, 4), 0))
    assert compress_2to4(weight).nbytes == DATATYPES[name].compressed_share * weight.nbytes


def test_a_compressed_tf32_weight_has_the_bytes_that_pytorch_gives_it():
    values = normal(32, 64)
    weight = values.masked_fill(~mask_nm(values, 1, 2), 0)
    kept, metadata = to_cutlass(weight)
    share = (kept.nbytes + metadata.nbytes) / weight.nbytes
    assert DATATYPES["TF32"].compressed_share == share == 0.5625


# --- beside the published peaks ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", None),
        ("NVIDIA A100 80GB PCIe", None),
        ("NVIDIA A100-SXM4-80GB MIG 1g.10gb", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_gpu_gets_a_datasheet_only_if_it_is_exactly_that_one(monkeypatch, name, key):
    monkeypatch.setattr(machine, "gpu", lambda: {"gpu": name})
    assert this_datasheet() == (None if key is None else DATASHEETS[key])


def test_without_a_gpu_there_is_no_datasheet(monkeypatch):
    monkeypatch.setattr(machine, "gpu", dict)
    assert this_datasheet() is None


def test_shares_are_per_cent_of_the_dense_and_the_sparse_peak():
    table = pd.DataFrame(
        {
            "datatype": ["FP16", "FP8", "INT8"],
            "dense_tflops": [156.0, 100.0, math.nan],
            "sparse_tflops": [312.0, 200.0, 624.0],
        }
    )
    before = table.copy()
    shown = shares(table, DATASHEETS["a100"])
    assert shown.dense_share.fillna(-1).tolist() == [50, -1, -1]
    assert shown.sparse_share.fillna(-1).tolist() == [50, -1, 50]
    pd.testing.assert_frame_equal(table, before)
    assert shares(table[:0], DATASHEETS["a100"]).empty


# --- on a GPU ------------------------------------------------------------------------------

needs_cusparselt = pytest.mark.skipif(
    bool(why_no_sparse_gemms()), reason=why_no_sparse_gemms() or "it is here"
)


@pytest.mark.gpu
@needs_cusparselt
@every_datatype
def test_both_products_are_right_and_timed_on_the_gpu(name):
    if reason := why_not(name):
        pytest.skip(reason)
    (row,) = measure_gemms([(512, 1024, 2048)], [name], rounds=3).to_dict("records")
    assert row["reason"] == ""
    assert row["ratio_low"] <= row["ratio"] <= row["ratio_high"]
    assert row["ratio"] == pytest.approx(row["dense_ms"] / row["sparse_ms"])


@pytest.mark.gpu
@needs_cusparselt
def test_tf32_rounds_more_than_fp32_on_the_gpu():
    x, weight = (normal(512, 512, seed=seed).cuda() for seed in (0, 1))
    exact = x.double() @ weight.double().t()
    fp32 = (torch.mm(x, weight.t()) - exact).abs().max()
    assert (PRODUCTS["TF32"].dense(x, weight)() - exact).abs().max() > 10 * fp32


@pytest.mark.gpu
@needs_cusparselt
def test_a_size_that_cusparselt_does_not_take_is_recorded_on_the_gpu():
    table = measure_gemms([(512, 1024, 2048), (3, 20, 36)], ["BF16"], rounds=2)
    assert list(table.reason == "") == [True, False]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU was found")
def test_the_memory_is_no_faster_than_its_datasheet():
    measured, sheet = measure_bandwidth(), this_datasheet()
    assert measured > 50
    if sheet is not None:
        assert 0.5 * sheet.bandwidth < measured < 1.02 * sheet.bandwidth
