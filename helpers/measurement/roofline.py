"""What the hardware could do: published peaks, and the least time of a product.

Explained in `07_sparse_tensor_cores.ipynb`.
"""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

from helpers import machine
from helpers.errors import UnavailableError

GROUP_METADATA_BITS = 4  # of every group, whatever its datatype


class GemmError(UnavailableError):
    """A matrix product cannot be measured, or gives wrong numbers."""


@dataclass(frozen=True)
class Datatype:
    """A type of numbers that Tensor Cores multiply."""

    name: str
    input_bytes: int  # of one number of the activations or of the weight
    output_bytes: int  # of one number of the product
    pattern: tuple[int, int]  # how many weights the hardware keeps, of how many
    capability: tuple[int, int] = (8, 0)  # of the first GPU with sparse Tensor Cores for it

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


DATATYPES = {
    datatype.name: datatype
    for datatype in (
        Datatype("TF32", 4, 4, (1, 2)),
        Datatype("FP16", 2, 2, (2, 4)),
        Datatype("BF16", 2, 2, (2, 4)),
        Datatype("INT8", 1, 4, (2, 4)),
        Datatype("FP8", 1, 2, (2, 4), (8, 9)),
    )
}
TWO_OF_FOUR = [name for name, datatype in DATATYPES.items() if datatype.pattern == (2, 4)]


def datatype_named(name: str) -> Datatype:
    """Return a datatype of `DATATYPES`.

    Raises:
        GemmError: there is no such datatype.
    """
    if name not in DATATYPES:
        raise GemmError(f"There is no datatype {name!r} here; there are {', '.join(DATATYPES)}.")
    return DATATYPES[name]


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


def _bytes(
    m: int, n: int, k: int, datatype: str, sparse: bool, output_bytes: int | None = None
) -> float:
    """Return the bytes of x, the weight and the product, each moved once."""
    require_positive(m=m, n=n, k=k)
    kind = datatype_named(datatype)
    weight = n * k * (kind.compressed_share if sparse else 1)
    each = kind.output_bytes if output_bytes is None else output_bytes
    return kind.input_bytes * (m * k + weight) + each * m * n


def require_positive(**numbers: float) -> None:
    """Refuse numbers that are not above zero, by their names."""
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
    require_positive(peak_tflops=peak_tflops, bandwidth=bandwidth)
    seconds = (
        2 * m * n * k / (peak_tflops * 1e12),
        _bytes(m, n, k, datatype, sparse, output_bytes) / (bandwidth * 1e9),
    )
    return 1000 * max(seconds)


def intensity(m: int, n: int, k: int, datatype: str, sparse: bool) -> float:
    """Return the operations of a product for each byte that it moves.

    Arguments and errors are those of `floor_ms`. Operations are 2 m n k, zeros included, so
    that a compressed weight, with its fewer bytes, gives more of them for each byte.
    """
    return 2 * m * n * k / _bytes(m, n, k, datatype, sparse)


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
