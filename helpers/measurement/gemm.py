"""Dense against sparse matrix products, datatype by datatype, as Tensor Cores run them.

Explained in `07_sparse_tensor_cores.ipynb`.
"""

import math
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from helpers import machine
from helpers.errors import HelpersError, InputError, UnavailableError, first_line
from helpers.inference import cuda_graphs
from helpers.inference.cusparselt import search_algorithm, why_no_sparse_gemms
from helpers.inference.errors import DeadContextError
from helpers.measurement.benchmark import bootstrap_ratio
from helpers.measurement.roofline import (
    DATASHEETS,
    DATATYPES,
    Datasheet,
    Datatype,
    datatype_named,
    require_positive,
)
from helpers.metrics import max_relative_error
from helpers.progress_bar import progress_bar
from helpers.sparsity import mask_nm

Product = Callable[[], Tensor]

ALGORITHM = ("alg_id", "split_k", "split_k_mode")  # what `search_algorithm` finds


class GemmError(UnavailableError):
    """A matrix product cannot be measured on this machine, or gives wrong numbers there."""


# --- the datatypes ---


def _dense(x: Tensor, weight: Tensor) -> Product:
    return partial(torch.mm, x, weight.t())


def _dense_tf32(x: Tensor, weight: Tensor) -> Product:
    def product() -> Tensor:
        with _tf32():
            return torch.mm(x, weight.t())

    return product


@contextmanager
def _tf32() -> Iterator[None]:
    """Let FP32 matrix products on the GPU run in TF32 inside this block."""
    # This is the newer setting. Once it has been set, reading the older `allow_tf32` may raise;
    # the newer one can always be read.
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def _dense_int8(x: Tensor, weight: Tensor) -> Product:
    return partial(torch._int_mm, x, weight.t())


def _dense_fp8(x: Tensor, weight: Tensor) -> Product:
    one = torch.ones((), device=x.device)
    return partial(
        torch._scaled_mm, x, weight.t(), one, one, out_dtype=torch.float16,
        use_fast_accum=True,  # the faster of two dense kernels, hence the fair control
    )  # fmt: skip


@dataclass(frozen=True)
class Products:
    """How PyTorch multiplies matrices of one datatype on Tensor Cores.

    `dense(x, weight)` returns a call without arguments that multiplies x (m, k) by the
    transposed weight (n, k), so that work done once is not timed.
    """

    dtype: torch.dtype  # of x and the weight
    output: torch.dtype  # of the product, the same for dense and sparse
    tolerance: float  # the largest maximum relative error of sparse against dense
    dense: Callable[[Tensor, Tensor], Product] = field(repr=False)

    def operand(self, values: Tensor) -> Tensor:
        """Return standard normal numbers (FP32) in this type; INT8 spans four deviations."""
        if not self.dtype.is_floating_point:
            values = (127 / 4 * values).round().clamp(-127, 127)
        return values.to(self.dtype)

    def sparse(self, x: Tensor, weight: Tensor, search: bool = True) -> "partial[Tensor]":
        """Return the product with a pruned weight, by cuSPARSELt's fastest kernel.

        Args:
            x: (m, k), contiguous.
            weight: (n, k), contiguous, in the datatype's pattern.
            search: try all algorithms for the fastest; if not, the default one is used.

        Returns:
            A call without arguments that returns (m, n), as `dense` does.

        Raises:
            DeadContextError: an algorithm left CUDA unusable.
            RuntimeError: cuSPARSELt does not support this type or these sizes here.
        """
        compressed = torch._cslt_compress(weight)
        # PyTorch accepts an output type only where it may differ from the input's.
        output = None if self.output == self.dtype else self.output
        algorithm: dict[str, Any] = (
            search_algorithm(compressed, x.t(), output=output) if search else {}
        )
        return partial(
            torch._cslt_sparse_mm, compressed, x.t(), out_dtype=output, transpose_result=True,
            **algorithm,
        )  # fmt: skip


PRODUCTS = {
    "TF32": Products(torch.float32, torch.float32, 1e-2, _dense_tf32),
    "FP16": Products(torch.float16, torch.float16, 1e-2, _dense),
    "BF16": Products(torch.bfloat16, torch.bfloat16, 5e-2, _dense),
    "INT8": Products(torch.int8, torch.int32, 0.0, _dense_int8),
    # Hopper accumulates FP8 products in about 14 bits: arXiv 2412.19437, section 3.3.2.
    "FP8": Products(torch.float8_e4m3fn, torch.float16, 5e-2, _dense_fp8),
}


def why_not(datatype: str) -> str:
    """Return in one sentence why dense and sparse cannot be compared here; empty if they can.

    Args:
        datatype: a name in `DATATYPES`.

    Raises:
        InputError: there is no such datatype.
    """
    needed = datatype_named(datatype).capability
    if reason := why_no_sparse_gemms():
        return reason
    if torch.cuda.get_device_capability() < needed:
        return (
            f"{torch.cuda.get_device_name()} has no Tensor Cores for {datatype}, which came with "
            f"compute capability {needed[0]}.{needed[1]}; leave this datatype out here."
        )
    return ""


# --- measuring ---


MEASURED = (
    "dense_ms", "sparse_ms", "dense_tflops", "sparse_tflops", "ratio", "ratio_low", "ratio_high",
)  # fmt: skip


def measure_gemms(
    sizes: Sequence[tuple[int, int, int]],
    datatypes: Sequence[str] | str | None = None,
    rounds: int = 10,
    seed: int = 0,
    search: bool = True,
) -> pd.DataFrame:
    """Measure the product of activations and a weight, dense and sparse in turns, by size.

    The weight is pruned in the datatype's own pattern. Before anything is timed, the sparse
    product must equal the dense product of the same pruned weight; the dense product that is
    timed multiplies by the unpruned weight. Operands are random numbers, since zeros cost less
    power. They stay in place between calls, so small ones come from the GPU's cache. As in any
    PyTorch program, cuSPARSELt tries its kernels and the fastest is used, while cuBLAS chooses
    one by its own heuristics. Where trying them breaks CUDA, as in FP16 on an H100, cuSPARSELt's
    default kernel is measured.

    Args:
        sizes: (m, n, k), for activations (m, k), a weight (n, k) and outputs (m, n).
        datatypes: names in `DATATYPES`, or one of them; all by default.
        rounds: in each, both products are timed in order and in reverse.
        seed: of the numbers and of the bootstrap.
        search: let cuSPARSELt try all its algorithms; if not, its default one is measured.

    Returns:
        One row for each datatype and size, with `datatype`, `m`, `n`, `k`, the medians `dense_ms`
        and `sparse_ms`, `dense_tflops` and `sparse_tflops` (10^12 operations a second;
        both count 2 m n k operations, as datasheets do, so a sparse kernel can reach at most
        twice the dense rate), `ratio` (dense time over sparse time) with the ends of its 95 %
        interval, `ratio_low` and `ratio_high`, and `reason`: why the numbers of this row are
        missing (NaN), or empty.

    Raises:
        InputError: there is no such datatype, or a size is not three positive numbers.
        DeadContextError: a product left CUDA unusable, after which nothing can run in this
            process. `measure_gemm` lets a caller keep the rows before it.
    """
    names = [datatypes] if isinstance(datatypes, str) else datatypes
    chosen = [datatype_named(name).name for name in (DATATYPES if names is None else names)]
    products = [(_size(size), name) for name in chosen for size in sizes]
    rows = [
        measure_gemm(size, name, rounds, seed, search)
        for size, name in progress_bar(products, desc="matrix products")
    ]
    return pd.DataFrame(rows, columns=["datatype", "m", "n", "k", *MEASURED, "reason"])


def _size(size: Any) -> tuple[int, int, int]:
    try:
        m, n, k = map(operator.index, size)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{size!r} is not the size of a product; `sizes` takes several (m, n, k) of whole "
            "numbers, such as [(64, 128, 256)]."
        ) from error
    require_positive(m=m, n=n, k=k)
    return m, n, k


def measure_gemm(
    size: tuple[int, int, int],
    datatype: str,
    rounds: int = 10,
    seed: int = 0,
    search: bool = True,
) -> dict[str, str | float]:
    """Measure one product; the row of `measure_gemms`, whose arguments and errors are the same."""
    m, n, k = _size(size)
    row: dict[str, str | float] = {"datatype": datatype, "m": m, "n": n, "k": k}
    row |= dict.fromkeys(MEASURED, math.nan)
    reason = why_not(datatype)
    if not reason:
        try:
            row |= _measure(datatype_named(datatype), (m, n, k), rounds, seed, search)
        except DeadContextError:
            raise
        except HelpersError as error:
            reason = str(error)
        except (RuntimeError, ValueError) as error:  # what PyTorch raises for its libraries
            cuda_graphs.raise_if_context_is_broken(error, f"the {datatype} product of {m}x{n}x{k}")
            reason = f"PyTorch does not run this product here: {first_line(error)}"
        torch.cuda.empty_cache()
    return row | {"reason": reason}


def _measure(
    datatype: Datatype, size: tuple[int, int, int], rounds: int, seed: int, search: bool
) -> dict[str, float]:
    m, n, k = size
    products = PRODUCTS[datatype.name]
    device = machine.device()
    generator = torch.Generator(device).manual_seed(seed)
    x = products.operand(torch.randn(m, k, device=device, generator=generator))
    values = torch.randn(n, k, device=device, generator=generator)
    # Masked, not multiplied: a negative weight times zero would be -0.0.
    pruned = products.operand(values.masked_fill(~mask_nm(values, *datatype.pattern), 0))
    of = f"{datatype.name} product of {m}x{n}x{k}"
    with cuda_graphs.named(f"the dense {of}"):
        dense, expected = products.dense(x, products.operand(values)), products.dense(x, pruned)()
        if x.is_cuda:  # its errors are not those of the sparse product
            torch.cuda.synchronize()
    with cuda_graphs.named(f"the sparse {of}, while its algorithms were tried,"):
        sparse = products.sparse(x, pruned, search)
    tried = {name: value for name, value in sparse.keywords.items() if name in ALGORITHM}
    with cuda_graphs.named(f"the sparse {of} with {tried or 'the default algorithm'}"):
        _check_equal(datatype, sparse(), expected)
        times = cuda_graphs.time_calls([dense, sparse], rounds=rounds)
    dense_ms, sparse_ms = cuda_graphs.medians(times)
    dense_times, sparse_times = times
    ratio = bootstrap_ratio(dense_times, sparse_times, seed=seed)
    operations = 2 * m * n * k
    return {
        "dense_ms": dense_ms,
        "sparse_ms": sparse_ms,
        "dense_tflops": operations / dense_ms / 1e9,
        "sparse_tflops": operations / sparse_ms / 1e9,
        "ratio": ratio.value,
        "ratio_low": ratio.low,
        "ratio_high": ratio.high,
    }


def _check_equal(datatype: Datatype, sparse: Tensor, dense: Tensor) -> None:
    error = max_relative_error(sparse, dense)
    tolerance = PRODUCTS[datatype.name].tolerance
    if not error <= tolerance:  # also refuses NaN
        raise GemmError(
            f"The sparse {datatype.name} product differs from the dense one of the same weight by "
            f"{error:.1e} of the largest number, where {tolerance:g} is allowed, so its time would "
            f"mean nothing; use another version of PyTorch than {torch.__version__}."
        )


def measure_bandwidth(megabytes: int = 1024) -> float:
    """Return the bandwidth of the GPU's memory in GB/s: bytes read and written by a copy.

    Args:
        megabytes: size of what is copied, in 10^6 bytes; much larger than the GPU's cache.

    Raises:
        GemmError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise GemmError(
            "No NVIDIA GPU was found, so there is no GPU memory to measure; use the bandwidth "
            "of a datasheet in `roofline.DATASHEETS`."
        )
    source = torch.randn(megabytes * 10**6 // 4, device=machine.device())
    copy = partial(torch.empty_like(source).copy_, source)
    (milliseconds,) = cuda_graphs.medians(cuda_graphs.time_calls([copy]))
    return 2 * source.nbytes / milliseconds / 1e6


# --- beside the published peaks ---

# By the driver's whole name: the PCIe and NVL cards, other memory sizes and MIG slices, which
# are slower, have longer ones.
_SHEETS = {"A100-SXM4-80GB": "a100", "H100 80GB HBM3": "h100", "H200": "h200"}


def this_datasheet() -> Datasheet | None:
    """Return the datasheet of this machine's GPU; None without a GPU, or if it is unknown."""
    sheet = _SHEETS.get(machine.gpu().get("gpu", "").removeprefix("NVIDIA "))
    return None if sheet is None else DATASHEETS[sheet]


def shares(table: pd.DataFrame, sheet: Datasheet) -> pd.DataFrame:
    """Return a table of `measure_gemms` with its rates in per cent of the published peaks.

    Args:
        table: as `measure_gemms` returns it.
        sheet: of the GPU that it was measured on.

    Returns:
        A copy with the columns `dense_share` and `sparse_share`, each of its own peak; NaN
        where nothing was measured or the datasheet has no peak.
    """
    peaks = [sheet.tflops.get(name, (math.nan, math.nan)) for name in table.datatype]
    dense, sparse = np.array(peaks, dtype=float).reshape(-1, 2).T
    return table.assign(
        dense_share=100 * table.dense_tflops / dense,
        sparse_share=100 * table.sparse_tflops / sparse,
    )
