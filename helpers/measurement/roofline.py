"""What the hardware allows: published peaks, and the least time that a product can take.

Imports neither PyTorch nor pandas, so that the command line can list datatypes and datasheets
without waiting for them. Explained in `07_sparse_tensor_cores.ipynb`.
"""

from dataclasses import dataclass

from helpers.errors import InputError

GROUP_METADATA_BITS = 4  # in every group, whatever the datatype


@dataclass(frozen=True)
class Datatype:
    """A number format that Tensor Cores multiply."""

    name: str
    input_bytes: int  # size of one activation or weight
    output_bytes: int  # size of one output
    pattern: tuple[int, int]  # (1, 2): the hardware keeps one weight of every two
    capability: tuple[int, int] = (8, 0)  # the first that has sparse Tensor Cores for it

    @property
    def compressed_share(self) -> float:
        """The bytes of a compressed weight over those of the dense one.

        A group of four is stored as two values and their two positions, of two bits each. In
        TF32 a group of two is stored as one value, whose position takes four bits as well: the
        hardware treats each 32-bit number as two of 16 bits and stores a position for each half.

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
        InputError: there is no such datatype.
    """
    if name not in DATATYPES:
        raise InputError(f"There is no datatype {name!r} here; there are {', '.join(DATATYPES)}.")
    return DATATYPES[name]


@dataclass(frozen=True, repr=False)
class Datasheet:
    """The peak rates of a GPU as NVIDIA publishes them, not as anyone measured them."""

    gpu: str
    tflops: dict[str, tuple[float, float]]  # 10^12 operations a second, dense and sparse
    bandwidth: float  # of the GPU's memory, in GB/s
    source: str
    multiprocessors: int
    cache_mb: float  # the last cache before the memory, in 10^6 bytes

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


def _tflops(tf32: float, half: float, int8: float, fp8: float | None = None) -> dict:
    """Return dense rates by datatype with the sparse ones, which are published as their doubles."""
    dense = {"TF32": tf32, "FP16": half, "BF16": half, "INT8": int8}
    if fp8 is not None:
        dense["FP8"] = fp8
    return {name: (rate, 2 * rate) for name, rate in dense.items()}


_AMPERE = {
    "TF32": (156.0, 312.0),
    "FP16": (312.0, 624.0),
    "BF16": (312.0, 624.0),
    "INT8": (624.0, 1248.0),
}
_GA102 = "NVIDIA Ampere GA102 GPU Architecture white paper"

# Rates of GeForce cards are those that accumulate in FP32.
DATASHEETS = {
    "a100": Datasheet(
        "NVIDIA A100 80 GB SXM", _AMPERE, 2039.0, "NVIDIA A100 Tensor Core GPU datasheet", 108, 40.0
    ),
    "h100": Datasheet(
        "NVIDIA H100 80 GB SXM",
        _HOPPER,
        3350.0,
        "NVIDIA H100 Tensor Core GPU datasheet and architecture white paper",
        132,
        50.0,
    ),
    "h200": Datasheet(
        "NVIDIA H200 SXM",
        _HOPPER,
        4800.0,
        "NVIDIA H200 Tensor Core GPU datasheet; its rates, rounded there, by H100's white paper",
        132,
        50.0,
    ),
}
# Cards that `advise` knows besides those of notebook 07.
MORE_DATASHEETS = {
    "a100-pcie": Datasheet(
        "NVIDIA A100 80 GB PCIe", _AMPERE, 1935.0, "NVIDIA A100 datasheet", 108, 40.0
    ),
    "h100-pcie": Datasheet(
        "NVIDIA H100 80 GB PCIe",
        _tflops(378.0, 756.5, 1513.0, 1513.0),
        2000.0,
        "NVIDIA H100 datasheet",
        114,
        50.0,
    ),
    "b200": Datasheet(
        "NVIDIA B200",
        _tflops(1125.0, 2250.0, 4500.0, 4500.0),
        8000.0,
        "HGX B200 datasheet",
        148,
        126.0,
    ),
    "rtx4090": Datasheet(
        "NVIDIA GeForce RTX 4090",
        _tflops(82.6, 165.2, 660.6, 330.3),
        1008.0,
        "NVIDIA Ada GPU Architecture white paper",
        128,
        72.0,
    ),
    "rtx5080": Datasheet(
        "NVIDIA GeForce RTX 5080",
        _tflops(56.3, 112.6, 450.2, 225.1),
        960.0,
        "NVIDIA RTX Blackwell GPU Architecture white paper",
        84,
        64.0,
    ),
    "a10": Datasheet(
        "NVIDIA A10", _tflops(62.5, 125.0, 250.0), 600.0, "NVIDIA A10 datasheet", 72, 6.0
    ),
    "a30": Datasheet(
        "NVIDIA A30", _tflops(82.0, 165.0, 330.0), 933.0, "NVIDIA A30 datasheet", 56, 24.0
    ),
    "a6000": Datasheet("NVIDIA RTX A6000", _tflops(77.4, 154.8, 309.7), 768.0, _GA102, 84, 6.0),
    "rtx3090": Datasheet(
        "NVIDIA GeForce RTX 3090", _tflops(35.6, 71.0, 284.0), 936.0, _GA102, 82, 6.0
    ),
    "l4": Datasheet(
        "NVIDIA L4", _tflops(60.0, 121.0, 242.5, 242.5), 300.0, "NVIDIA L4 datasheet", 58, 48.0
    ),
    "l40s": Datasheet(
        "NVIDIA L40S",
        _tflops(183.0, 362.0, 733.0, 733.0),
        864.0,
        "NVIDIA L40S datasheet",
        142,
        96.0,
    ),
}

# The GPUs that `advise` knows: products of some were measured and published; others are
# estimated from a similar one of these.
MEASURED_GPUS = ("a100", "h100", "b200", "rtx4090", "rtx5080", "gb10")
ESTIMATED_GPUS = (
    "a10", "a30", "a6000", "a100-sxm", "h100-sxm", "h200", "l4", "l40s", "rtx3090",
)  # fmt: skip


def require_positive(**numbers: float) -> None:
    """Refuse numbers that are not above zero; the message names them as they are passed.

    Raises:
        InputError: a number is zero, negative or NaN.
    """
    for name, number in numbers.items():
        if not number > 0:  # also refuses NaN
            raise InputError(f"{name} is {number}; give it a number above 0.")


def _bytes(
    m: int, n: int, k: int, datatype: str, sparse: bool, output_bytes: int | None = None
) -> float:
    """Return the bytes of activations, weight and outputs, each moved once."""
    require_positive(m=m, n=n, k=k)
    kind = datatype_named(datatype)
    weight = n * k * (kind.compressed_share if sparse else 1)
    output_bytes = kind.output_bytes if output_bytes is None else output_bytes
    return kind.input_bytes * (m * k + weight) + output_bytes * m * n


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

    It is the longer of two times: that of all operations at the peak rate, and that of all
    bytes, each moved once to or from the GPU's memory, at its bandwidth. A product whose
    operands are already in the GPU's cache can be faster than the second.

    Args:
        m: rows of the activations.
        n: outputs.
        k: inputs.
        datatype: a name in `DATATYPES`.
        peak_tflops: 10^12 operations a second, of 2 m n k; for `sparse` the sparse peak.
        bandwidth: GB/s.
        sparse: whether the weight is compressed.
        output_bytes: size of one output; the datatype's own by default.

    Raises:
        InputError: there is no such datatype, or a size, the peak or the bandwidth is not
            positive.

    Source: Williams et al., "Roofline: an insightful visual performance model for
    multicore architectures", 2009.
    """
    require_positive(peak_tflops=peak_tflops, bandwidth=bandwidth)
    arithmetic = 2 * m * n * k / (peak_tflops * 1e12)
    memory = _bytes(m, n, k, datatype, sparse, output_bytes) / (bandwidth * 1e9)
    return 1000 * max(arithmetic, memory)


def intensity(m: int, n: int, k: int, datatype: str, sparse: bool) -> float:
    """Return the arithmetic intensity of a product: its operations for each byte moved.

    Arguments and errors are those of `floor_ms`. Operations are 2 m n k, zeros included, so a
    compressed weight, which has fewer bytes, raises the intensity.
    """
    return 2 * m * n * k / _bytes(m, n, k, datatype, sparse)
