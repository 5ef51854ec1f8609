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

import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from helpers import machine
from helpers.errors import HelpersError
from helpers.inference import cuda_graphs
from helpers.inference.cusparselt import search_algorithm, why_no_sparse_gemms
from helpers.measurement.benchmark import bootstrap_ratio
from helpers.measurement.roofline import (
    DATATYPES,
    Datatype,
    GemmError,
    datatype_named,
    require_positive,
)
from helpers.metrics import max_relative_error
from helpers.sparsity import mask_nm

Product = Callable[[], Tensor]


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
    """Let FP32 matrix products on the GPU run in TF32 meanwhile."""
    # Reading the older `allow_tf32` raises once somebody has set this newer one; never the reverse.
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
        use_fast_accum=True,  # the faster of the two dense kernels: the fair control
    )  # fmt: skip


@dataclass(frozen=True)
class Products:
    """How PyTorch multiplies matrices of one datatype on Tensor Cores.

    `dense(x, weight)` returns the product of x (m, k) and the transposed weight (n, k) as a
    call without arguments, so that what has to be set up once is not timed.
    """

    dtype: torch.dtype  # of x and the weight
    output: torch.dtype  # of the product, the same for dense and sparse
    tolerance: float  # how far sparse may be from dense, relative to the largest number
    dense: Callable[[Tensor, Tensor], Product] = field(repr=False)

    def operand(self, values: Tensor) -> Tensor:
        """Return standard normal numbers (FP32) in this type; INT8 covers four deviations."""
        if not self.dtype.is_floating_point:
            values = (127 / 4 * values).round().clamp(-127, 127)
        return values.to(self.dtype)

    def sparse(self, x: Tensor, weight: Tensor) -> Product:
        """Return the product with a weight of the pattern, by cuSPARSELt's fastest kernel.

        Args:
            x: (m, k), contiguous.
            weight: (n, k), contiguous.

        Returns:
            A call without arguments that returns (m, n), as `dense` does.

        Raises:
            RuntimeError: cuSPARSELt does not take this type or these sizes here.
        """
        compressed = torch._cslt_compress(weight)
        # PyTorch takes a type for the output only where it can differ from that of the input.
        output = None if self.output == self.dtype else self.output
        algorithm = search_algorithm(compressed, x.t(), output=output)
        return partial(
            torch._cslt_sparse_mm, compressed, x.t(), out_dtype=output, transpose_result=True,
            **algorithm,
        )  # fmt: skip


PRODUCTS = {
    "TF32": Products(torch.float32, torch.float32, 1e-2, _dense_tf32),
    "FP16": Products(torch.float16, torch.float16, 1e-2, _dense),
    "BF16": Products(torch.bfloat16, torch.bfloat16, 5e-2, _dense),
    "INT8": Products(torch.int8, torch.int32, 0.0, _dense_int8),
    # Hopper adds FP8 products with about 14 bits: arXiv 2412.19437, section 3.3.2.
    "FP8": Products(torch.float8_e4m3fn, torch.float16, 5e-2, _dense_fp8),
}


def why_not(datatype: str) -> str:
    """Return in one sentence why dense and sparse cannot be compared here; empty if they can.

    Args:
        datatype: a name in `DATATYPES`.

    Raises:
        GemmError: there is no such datatype.
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
) -> pd.DataFrame:
    """Measure the product of activations and a weight, dense and sparse in turns, by size.

    The weight is pruned in the datatype's own pattern. Before anything is timed, the sparse
    product must equal the dense one of the same pruned weight; the dense product that is
    timed has the whole weight. Operands are random numbers, since zeros cost less power.
    They stay where they are between the calls, so that small ones come from the GPU's cache.
    cuSPARSELt tries its kernels and takes the fastest, cuBLAS takes one by its own rules:
    so does each in PyTorch.

    Args:
        sizes: (m, n, k), for activations (m, k), a weight (n, k) and outputs (m, n).
        datatypes: names in `DATATYPES`, or one of them; all unless given.
        rounds: turns of both contenders, there and back.
        seed: of the numbers and of the intervals' draws.

    Returns:
        One row for each datatype and size: `datatype`, `m`, `n`, `k`, the medians `dense_ms`
        and `sparse_ms`, `dense_tflops` and `sparse_tflops` (10^12 operations a second;
        both count 2 m n k operations, as datasheets do, so that twice the dense rate is
        all that a sparse kernel can reach), `ratio` (dense time over sparse time) with the
        ends of its 95 % interval, `ratio_low` and `ratio_high`, and `reason`: empty, or in
        words why there are no numbers in this row (NaN).

    Raises:
        GemmError: there is no such datatype, or a size is not three positive numbers.

    Explained in `07_sparse_tensor_cores.ipynb`.
    """
    names = [datatypes] if isinstance(datatypes, str) else datatypes
    chosen = [datatype_named(name) for name in (DATATYPES if names is None else names)]
    sizes = [_size(size) for size in sizes]
    rows = []
    products = [(datatype, size) for datatype in chosen for size in sizes]
    for datatype, size in tqdm(products, desc="matrix products", leave=False):
        rows.append(_row(datatype, size, rounds, seed))
        torch.cuda.empty_cache()
    return pd.DataFrame(rows, columns=["datatype", *"mnk", *MEASURED, "reason"])


def _size(size: Any) -> tuple[int, int, int]:
    try:
        m, n, k = map(operator.index, size)
    except (TypeError, ValueError) as error:
        raise GemmError(
            f"{size!r} is no size of a product; `sizes` takes several (m, n, k) of whole "
            "numbers, such as [(64, 128, 256)]."
        ) from error
    require_positive(m=m, n=n, k=k)
    return m, n, k


def _row(
    datatype: Datatype, size: tuple[int, int, int], rounds: int, seed: int
) -> dict[str, str | float]:
    row = {"datatype": datatype.name, **dict(zip("mnk", size, strict=True))}
    row |= dict.fromkeys(MEASURED, math.nan) | {"reason": why_not(datatype.name)}
    if row["reason"]:
        return row
    try:
        return row | _measure(datatype, size, rounds, seed)
    except HelpersError as error:
        return row | {"reason": str(error)}
    except (RuntimeError, ValueError) as error:  # what PyTorch raises for its libraries
        first, *_ = str(error).splitlines() or [type(error).__name__]
        return row | {"reason": f"PyTorch does not run this product here: {first}"}


def _measure(
    datatype: Datatype, size: tuple[int, int, int], rounds: int, seed: int
) -> dict[str, float]:
    m, n, k = size
    products = PRODUCTS[datatype.name]
    device = machine.device()
    generator = torch.Generator(device).manual_seed(seed)
    x = products.operand(torch.randn(m, k, device=device, generator=generator))
    values = torch.randn(n, k, device=device, generator=generator)
    # Filled, not multiplied: a negative weight times zero would be -0.0.
    pruned = products.operand(values.masked_fill(~mask_nm(values, *datatype.pattern), 0))
    dense, sparse = products.dense(x, products.operand(values)), products.sparse(x, pruned)
    _check_equal(datatype, sparse(), products.dense(x, pruned)())
    times = cuda_graphs.time_calls([dense, sparse], rounds=rounds)
    dense_ms, sparse_ms = cuda_graphs.medians(times)
    ratio = bootstrap_ratio(*times, seed=seed)
    operations = 2 * m * n * k
    rates = [operations / ms / 1e9 for ms in (dense_ms, sparse_ms)]
    numbers = (dense_ms, sparse_ms, *rates, ratio.value, ratio.low, ratio.high)
    return dict(zip(MEASURED, numbers, strict=True))


def _check_equal(datatype: Datatype, sparse: Tensor, dense: Tensor) -> None:
    gap = max_relative_error(sparse, dense)
    tolerance = PRODUCTS[datatype.name].tolerance
    if not gap <= tolerance:  # NaN is not below it either
        raise GemmError(
            f"The sparse {datatype.name} product is off the dense one of the same weight by "
            f"{gap:.1e} of the largest number, where {tolerance:g} is allowed, so its "
            f"time would mean nothing; use another version of PyTorch than {torch.__version__}."
        )


def measure_bandwidth(megabytes: int = 1024) -> float:
    """Return how fast the GPU's memory is in GB/s, by copying within it, read and written bytes.

    Args:
        megabytes: size of what is copied, in 10^6 bytes; much more than the GPU's cache.

    Raises:
        GemmError: there is no GPU.

    Explained in `07_sparse_tensor_cores.ipynb`.
    """
    if not torch.cuda.is_available():
        raise GemmError(
            "No NVIDIA GPU was found, so there is no GPU memory to measure; take the bandwidth "
            "of a datasheet in `DATASHEETS`."
        )
    source = torch.randn(megabytes * 10**6 // 4, device=machine.device())
    copy = partial(torch.empty_like(source).copy_, source)
    (milliseconds,) = cuda_graphs.medians(cuda_graphs.time_calls([copy]))
    return 2 * source.nbytes / milliseconds / 1e6
