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
from tqdm.auto import tqdm

from helpers import cuda_graphs, machine
from helpers.benchmark import bootstrap_ratio
from helpers.checks import TutorialError
from helpers.sparse_torch import search_algorithm, why_no_sparse_gemms
from helpers.sparsity import mask_nm
from helpers.training import relative_gap

Product = Callable[[], Tensor]

GROUP_METADATA_BITS = 4  # of every group, whatever its datatype


class GemmError(TutorialError):
    """A matrix product cannot be measured, or gives wrong numbers."""


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
class Datatype:
    """A type of numbers that Tensor Cores multiply, and how PyTorch multiplies matrices of it.

    `dense(x, weight)` returns the product of x (m, k) and the transposed weight (n, k) as a
    call without arguments, so that what has to be set up once is not timed.
    """

    name: str
    dtype: torch.dtype  # of x and the weight
    output: torch.dtype  # of the product, the same for dense and sparse
    pattern: tuple[int, int]  # how many weights the hardware keeps, of how many
    tolerance: float  # how far sparse may be from dense, relative to the largest number
    dense: Callable[[Tensor, Tensor], Product] = field(repr=False)
    capability: tuple[int, int] = (8, 0)  # of the first GPU with sparse Tensor Cores for it

    @property
    def input_bytes(self) -> int:
        """Bytes of one number of x or of the weight."""
        return self.dtype.itemsize

    @property
    def output_bytes(self) -> int:
        """Bytes of one number of the product."""
        return self.output.itemsize

    @property
    def compressed_share(self) -> float:
        """The bytes of a compressed weight over those of the dense one.

        A group of four is stored as two values with a position of two bits each. In TF32 a
        group of two is stored as one value, and its place takes four bits too: the hardware
        sees each 32-bit number as two of 16 bits, and the metadata names both of its halves.

        Source: `torch.sparse._semi_structured_conversions`; PTX ISA, `mma.sp`.
        """
        kept, of = self.pattern
        bits = 8 * self.input_bytes
        return (kept * bits + GROUP_METADATA_BITS) / (of * bits)

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


DATATYPES = {
    datatype.name: datatype
    for datatype in (
        Datatype("TF32", torch.float32, torch.float32, (1, 2), 1e-2, _dense_tf32),
        Datatype("FP16", torch.float16, torch.float16, (2, 4), 1e-2, _dense),
        Datatype("BF16", torch.bfloat16, torch.bfloat16, (2, 4), 5e-2, _dense),
        Datatype("INT8", torch.int8, torch.int32, (2, 4), 0.0, _dense_int8),
        # Hopper adds FP8 products with about 14 bits: arXiv 2412.19437, section 3.3.2.
        Datatype("FP8", torch.float8_e4m3fn, torch.float16, (2, 4), 5e-2, _dense_fp8, (8, 9)),
    )
}


def _datatype(name: str) -> Datatype:
    if name not in DATATYPES:
        raise GemmError(f"There is no datatype {name!r} here; there are {', '.join(DATATYPES)}.")
    return DATATYPES[name]


def why_not(datatype: str) -> str:
    """Return in one sentence why dense and sparse cannot be compared here; empty if they can.

    Args:
        datatype: a name in `DATATYPES`.

    Raises:
        GemmError: there is no such datatype.
    """
    needed = _datatype(datatype).capability
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
    chosen = [_datatype(name) for name in (DATATYPES if names is None else names)]
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
    _require_positive(m=m, n=n, k=k)
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
    except TutorialError as error:
        return row | {"reason": str(error)}
    except (RuntimeError, ValueError) as error:  # what PyTorch raises for its libraries
        first, *_ = str(error).splitlines() or [type(error).__name__]
        return row | {"reason": f"PyTorch does not run this product here: {first}"}


def _measure(
    datatype: Datatype, size: tuple[int, int, int], rounds: int, seed: int
) -> dict[str, float]:
    m, n, k = size
    device = machine.device()
    generator = torch.Generator(device).manual_seed(seed)
    x = datatype.operand(torch.randn(m, k, device=device, generator=generator))
    values = torch.randn(n, k, device=device, generator=generator)
    # Filled, not multiplied: a negative weight times zero would be -0.0.
    pruned = datatype.operand(values.masked_fill(~mask_nm(values, *datatype.pattern), 0))
    dense, sparse = datatype.dense(x, datatype.operand(values)), datatype.sparse(x, pruned)
    _check_equal(datatype, sparse(), datatype.dense(x, pruned)())
    times = cuda_graphs.time_calls([dense, sparse], rounds=rounds)
    dense_ms, sparse_ms = cuda_graphs.medians(times)
    ratio = bootstrap_ratio(*times, seed=seed)
    operations = _operations(m, n, k)
    rates = [operations / ms / 1e9 for ms in (dense_ms, sparse_ms)]
    numbers = (dense_ms, sparse_ms, *rates, ratio.value, ratio.low, ratio.high)
    return dict(zip(MEASURED, numbers, strict=True))


def _check_equal(datatype: Datatype, sparse: Tensor, dense: Tensor) -> None:
    gap = relative_gap(sparse, dense)
    if not gap <= datatype.tolerance:  # NaN is not below it either
        raise GemmError(
            f"The sparse {datatype.name} product is off the dense one of the same weight by "
            f"{gap:.1e} of the largest number, where {datatype.tolerance:g} is allowed, so its "
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


# --- what the hardware could do ---


@dataclass(frozen=True, repr=False)
class Datasheet:
    """The peak rates of a GPU as NVIDIA publishes them; none of them was measured here."""

    gpu: str
    tflops: dict[str, tuple[float, float]]  # 10^12 operations a second, dense and sparse
    bandwidth: float  # of the GPU's memory, in GB/s
    source: str

    def __repr__(self) -> str:
        rates = [f"{name} {dense:g} / {sparse:g}" for name, (dense, sparse) in self.tflops.items()]
        return (
            f"{self.gpu}, dense / sparse TFLOP/s: {', '.join(rates)}; {self.bandwidth:g} GB/s "
            f"(published: {self.source})"
        )


_HOPPER = {
    "TF32": (494.7, 989.4),
    "FP16": (989.4, 1978.9),
    "BF16": (989.4, 1978.9),
    "INT8": (1978.9, 3957.8),
    "FP8": (1978.9, 3957.8),
}

DATASHEETS = {
    "a100": Datasheet(
        "NVIDIA A100 80 GB SXM",
        {
            "TF32": (156.0, 312.0),
            "FP16": (312.0, 624.0),
            "BF16": (312.0, 624.0),
            "INT8": (624.0, 1248.0),
        },
        2039.0,
        "NVIDIA A100 Tensor Core GPU datasheet",
    ),
    "h100": Datasheet(
        "NVIDIA H100 80 GB SXM",
        _HOPPER,
        3350.0,
        "NVIDIA H100 Tensor Core GPU datasheet and architecture white paper",
    ),
    "h200": Datasheet(
        "NVIDIA H200 SXM",
        _HOPPER,
        4800.0,
        "NVIDIA H200 Tensor Core GPU datasheet; its rates, rounded there, by H100's white paper",
    ),
}

# By the driver's whole name: the PCIe and NVL cards, other memory sizes and MIG slices, which
# are slower, have longer ones.
_NAMES = {"A100-SXM4-80GB": "a100", "H100 80GB HBM3": "h100", "H200": "h200"}


def this_datasheet() -> Datasheet | None:
    """Return the datasheet of the GPU in this machine; None without one, or if it is unknown."""
    name = machine.gpu().get("gpu", "").removeprefix("NVIDIA ")
    return DATASHEETS[_NAMES[name]] if name in _NAMES else None


def _operations(m: int, n: int, k: int) -> int:
    """Return the operations of a product as datasheets count them, those with zeros too."""
    return 2 * m * n * k


def _bytes(
    m: int, n: int, k: int, datatype: str, sparse: bool, output_bytes: int | None = None
) -> float:
    """Return the bytes of x, the weight and the product, each moved once."""
    _require_positive(m=m, n=n, k=k)
    kind = _datatype(datatype)
    weight = n * k * (kind.compressed_share if sparse else 1)
    each = kind.output_bytes if output_bytes is None else output_bytes
    return kind.input_bytes * (m * k + weight) + each * m * n


def _require_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if not number > 0:  # nor is NaN
            raise GemmError(f"{name} is {number}; give it a number above 0.")


def floor_ms(
    m: int,
    n: int,
    k: int,
    datatype: str,
    peak_tflops: float,
    bandwidth: float,
    sparse: bool,
    output_bytes: int | None = None,
) -> float:
    """Return the least time of a product in milliseconds, by the roofline model.

    It is the longer of all operations at the peak rate and all bytes, moved once from and to
    the GPU's memory, at its bandwidth. A product whose operands are in the GPU's cache
    already can be faster than the second.

    Args:
        m: rows of the activations.
        n: outputs.
        k: inputs.
        datatype: a name in `DATATYPES`.
        peak_tflops: 10^12 operations a second, of 2 m n k; for `sparse` the sparse peak.
        bandwidth: GB/s.
        sparse: whether the weight is compressed.
        output_bytes: of one number of the product; unless given, the datatype's own.

    Raises:
        GemmError: there is no such datatype, or a size, the peak or the bandwidth is not
            positive.

    Source: Williams et al., "Roofline: an insightful visual performance model for
    multicore architectures", 2009. Explained in `07_sparse_tensor_cores.ipynb`.
    """
    _require_positive(peak_tflops=peak_tflops, bandwidth=bandwidth)
    seconds = (
        _operations(m, n, k) / (peak_tflops * 1e12),
        _bytes(m, n, k, datatype, sparse, output_bytes) / (bandwidth * 1e9),
    )
    return 1000 * max(seconds)


def intensity(m: int, n: int, k: int, datatype: str, sparse: bool) -> float:
    """Return the operations of a product for each byte that it moves.

    Arguments and errors are those of `floor_ms`. Operations are 2 m n k, zeros included, so
    that a compressed weight, with its fewer bytes, gives more of them for each byte.
    """
    return _operations(m, n, k) / _bytes(m, n, k, datatype, sparse)


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
