"""The model of a product's time as fitted to published measurements of a GPU, with its errors.

`calibration.json` beside this module holds the parameters; `benchmarks/calibrate.py` wrote it.
Explained in `07_sparse_tensor_cores.ipynb`.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers.errors import InputError
from helpers.files import shown
from helpers.measurement.product_model import Kernels
from helpers.measurement.roofline import (
    DATASHEETS,
    ESTIMATED_GPUS,
    MEASURED_GPUS,
    MORE_DATASHEETS,
    Datasheet,
)

CALIBRATION = Path(__file__).with_name("calibration.json")
FORMAT = 1

# The centres of the correction's bumps and their widths, in the natural logarithms of m, of
# n / k, and of the root of n k. A fixed grid: no measurement is kept.
_CENTRES = np.stack(
    np.meshgrid(
        np.log([64, 400, 2500, 16000]), [-1.6, -0.7, 0.1, 0.9, 2.0], [7.3, 8.7], indexing="ij"
    ),
    axis=-1,
).reshape(-1, 3)
_WIDTHS = np.array([1.5, 0.7, 1.0])
_ROWS = np.log([64, 16384])  # beyond these the correction stays what it is there


def correction_terms(sizes: np.ndarray) -> np.ndarray:
    """Return the terms of the correction: a constant, and a bump around each centre.

    Args:
        sizes: (products, 3): m, n and k of each.

    Returns:
        (products, terms) float64.
    """
    m, n, k = np.log(np.asarray(sizes, dtype=float)).T
    place = np.stack([m.clip(*_ROWS), n - k, (n + k) / 2], axis=1)
    away = (place[:, None] - _CENTRES) / _WIDTHS
    return np.hstack([np.ones((len(m), 1)), np.exp(-0.5 * (away**2).sum(axis=2))])


@dataclass(frozen=True)
class Errors:
    """How far predictions of products were off that the fit had not seen.

    Each is a quantile of the absolute difference of the natural logarithms of prediction and
    measurement: `time` of one product, dense or sparse; `ratio` of dense to sparse of one
    product; `block` of the ratio of four layers of a block, summed. The keys are median, p80, p90.
    """

    time: dict[str, float]
    ratio: dict[str, float]
    block: dict[str, float]

    def sum_of(self, shares: np.ndarray) -> float:
        """Return the p80 of the ratio of a sum of products.

        One part of the error is the same for all products, another differs: the error of a
        block of four tells how much averages out.

        Args:
            shares: (products,) the share of each different product in the time; adds up to 1.
        """
        one, four = self.ratio["p80"] ** 2, self.block["p80"] ** 2
        common = min(max((4 * four - one) / 3, 0.0), one)
        return float(np.sqrt(common + (one - common) * (np.asarray(shares) ** 2).sum()))


@dataclass(frozen=True, repr=False)
class Fitted:
    """The fitted model of one GPU and datatype."""

    dense: Kernels
    sparse: Kernels
    dense_correction: tuple[float, ...]
    sparse_correction: tuple[float, ...]
    products: int
    errors: Errors

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Fitted":
        """Return the model that was written as JSON."""
        return cls(
            Kernels(**values["dense"]),
            Kernels(**values["sparse"]),
            tuple(values["dense_correction"]),
            tuple(values["sparse_correction"]),
            values["products"],
            Errors(**values["errors"]),
        )


@dataclass(frozen=True, eq=False, repr=False)
class Calibration:
    """What the model says of one GPU.

    `name` is the GPU's short name and `gpu` the card in words. `donor` is empty, or names the
    card that was measured if this one was not: its parameters are then scaled by datasheets.
    """

    name: str
    gpu: str
    multiprocessors: int
    cache_mb: float
    datatypes: dict[str, Fitted]
    donor: str = ""

    @property
    def source(self) -> str:
        """Where the times come from, in words."""
        if self.donor:
            return (
                f"products published for the {self.donor}, scaled to the {self.gpu} by their "
                "datasheets"
            )
        return f"a model fitted to products published for the {self.gpu}"

    def milliseconds(
        self, sizes: np.ndarray, datatype: str, sparse: bool, read: np.ndarray | float = 1.0
    ) -> np.ndarray:
        """Return the time of each product in milliseconds.

        Args:
            sizes: (products, 3): m, n and k of each.
            datatype: one of `datatypes`.
            sparse: whether the weights are compressed.
            read: (products,) the numbers that the activations have in memory over m k, below 1
                for a convolution whose windows overlap.

        Returns:
            (products,) float64.
        """
        fitted = self.datatypes[datatype]
        kernels = fitted.sparse if sparse else fitted.dense
        sizes = np.asarray(sizes, dtype=float).reshape(-1, 3)
        times = kernels.microseconds(
            sizes, datatype, sparse, self.multiprocessors, self.cache_mb, read
        )
        weights = fitted.sparse_correction if sparse else fitted.dense_correction
        times = times * np.exp(correction_terms(sizes) @ np.array(weights))
        return np.maximum(times, kernels.launch_us) / 1000

    def milliseconds_of(
        self, m: int, n: int, k: int, datatype: str, sparse: bool, read: float = 1.0
    ) -> float:
        """Return the time of one product in milliseconds; a size that came before costs nothing."""
        return _milliseconds_of(self, m, n, k, datatype, sparse, read)


@cache
def _milliseconds_of(
    calibration: Calibration, m: int, n: int, k: int, datatype: str, sparse: bool, read: float
) -> float:
    sizes = np.array([[m, n, k]], dtype=float)
    return float(calibration.milliseconds(sizes, datatype, sparse, read)[0])


# --- the GPUs that there are ---

# The datasheets of cards that have another name there.
_SHEETS = {"a100": "a100-pcie", "h100": "h100-pcie", "a100-sxm": "a100", "h100-sxm": "h100"}
# From which measured card the parameters of another are scaled: one of its generation. For the
# measured cards themselves it serves to find the error of scaling.
DONORS = {
    "a100": "h100", "h100": "a100", "b200": "h100", "rtx4090": "rtx5080", "rtx5080": "rtx4090",
    "a100-sxm": "a100", "a30": "a100", "a10": "a100", "a6000": "a100", "rtx3090": "a100",
    "l4": "rtx4090", "l40s": "rtx4090", "h100-sxm": "h100", "h200": "h100",
}  # fmt: skip
NO_SPARSE = {"t4": "T4", "v100": "V100", "p100": "P100"}


def sheet_of(name: str) -> Datasheet:
    """Return the datasheet of a GPU by its name here.

    Raises:
        InputError: there is none.
    """
    sheets = DATASHEETS | MORE_DATASHEETS
    found = _SHEETS.get(name, name)
    if found not in sheets:
        raise InputError(f"There is no datasheet {name!r}; there are {', '.join(sheets)}.")
    return sheets[found]


@cache
def _record() -> dict[str, Any]:
    return read_record(CALIBRATION)


def read_record(path: Path) -> dict[str, Any]:
    """Return what `benchmarks/calibrate.py` wrote.

    Raises:
        InputError: the file is missing, damaged or of another format.
    """
    try:
        record = json.loads(path.read_text())
        found = record["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{shown(path)} holds no calibration ({type(error).__name__}). Get the file again, or "
            "write it with benchmarks/calibrate.py."
        ) from error
    if found != FORMAT:
        raise InputError(
            f"{shown(path)} has the format {found}, but this version reads {FORMAT}. Write it "
            "again with benchmarks/calibrate.py."
        )
    return record


@cache
def calibration(name: str) -> Calibration:
    """Return the model of a GPU: fitted to its own measurements, or scaled from a similar card.

    Raises:
        InputError: there is no such GPU here, or it has no Sparse Tensor Cores.
    """
    if name in NO_SPARSE:
        raise InputError(
            f"The {NO_SPARSE[name]} has no Sparse Tensor Cores, so 2:4 gains nothing on it; they "
            "came with compute capability 8.0."
        )
    if name in _record()["gpus"]:
        return measured(name, _record()["gpus"][name])
    if name not in DONORS:
        raise InputError(
            f"There is no GPU {name!r} here; measured are {', '.join(MEASURED_GPUS)}, and "
            f"estimated from a similar card {', '.join(ESTIMATED_GPUS)}."
        )
    donor = calibration(DONORS[name])
    errors = {kind: Errors(**each) for kind, each in _record()["transfer"].items()}
    return scaled(donor, name, errors)


def measured(name: str, values: Mapping[str, Any]) -> Calibration:
    """Return the model of a measured card as the record has it.

    Two datatypes of one width run in the same kernels: where BF16 was measured and FP16 was
    not, BF16's parameters serve for both.
    """
    datatypes = {kind: Fitted.from_json(each) for kind, each in values["datatypes"].items()}
    if "BF16" in datatypes:
        datatypes.setdefault("FP16", datatypes["BF16"])
    return Calibration(
        name, values["gpu"], values["multiprocessors"], values["cache_mb"], datatypes
    )


def scaled(donor: Calibration, name: str, errors: Mapping[str, Errors]) -> Calibration:
    """Return a measured card's model scaled to another card by the datasheets of both.

    Rates within the kernels follow the peaks, that of the cache the number of multiprocessors, that
    of the memory its bandwidth. The times to start kernels and waves stay.

    Args:
        donor: the measured card.
        name: of the other.
        errors: of such an estimate, by datatype.
    """
    old, new = sheet_of(donor.name), sheet_of(name)
    datatypes = {}
    for kind, fitted in donor.datatypes.items():
        if kind not in new.tflops or kind not in old.tflops or kind not in errors:
            continue
        kernels = []
        for sparse, each in enumerate((fitted.dense, fitted.sparse)):
            rate = new.tflops[kind][sparse] / old.tflops[kind][sparse]
            kernels.append(
                replace(
                    each,
                    tile_tflops=each.tile_tflops * rate,
                    peak_tflops=each.peak_tflops * rate,
                    feed_gbps=each.feed_gbps * rate,
                    cache_gbps=each.cache_gbps * new.multiprocessors / old.multiprocessors,
                    memory_gbps=each.memory_gbps * new.bandwidth / old.bandwidth,
                )
            )
        dense, sparse_kernels = kernels
        datatypes[kind] = replace(
            fitted, dense=dense, sparse=sparse_kernels, errors=errors[kind], products=0
        )
    return Calibration(name, new.gpu, new.multiprocessors, new.cache_mb, datatypes, donor=donor.gpu)


# --- what the fitted model says ---


def fitted_gains(
    names: Sequence[str], datatype: str, rows: Sequence[int], width: int
) -> pd.DataFrame:
    """Return how many times faster a layer becomes by its number of rows, for each GPU.

    Args:
        names: of GPUs; those without this datatype are left out.
        datatype: of weights and activations.
        rows: m, such as batch size times pixels.
        width: outputs and inputs of the layer.

    Returns:
        The columns `gpu`, `name`, `rows`, `gain`, and `low` and `high`, between which 8 of 10
        measured products lay that the fit had not seen.
    """
    tables = []
    sizes = np.array([(m, width, width) for m in rows])
    for name in names:
        found = calibration(name)
        if datatype not in found.datatypes:
            continue
        dense, sparse = (found.milliseconds(sizes, datatype, each) for each in (False, True))
        gain, spread = dense / sparse, math.exp(found.datatypes[datatype].errors.ratio["p80"])
        columns = {"gpu": found.gpu, "name": name, "rows": list(rows), "gain": gain}
        tables.append(pd.DataFrame({**columns, "low": gain / spread, "high": gain * spread}))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def reached(names: Sequence[str] = MEASURED_GPUS) -> pd.DataFrame:
    """Return the highest rates of large products by the fitted model, beside the datasheet's.

    Returns:
        The columns `gpu`, `datatype`, `dense` and `sparse` in TFLOP/s (TOPS for INT8), and
        `dense_share` and `sparse_share`, in per cent of the published peaks; NaN without any.
    """
    sides = (2048, 4096, 8192)
    sizes = np.array([(m, n, k) for m in (4096, 8192, 16384) for n in sides for k in sides])
    operations = 2e-9 * sizes.prod(axis=1)
    rows = []
    for name in names:
        found = calibration(name)
        for datatype in found.datatypes:
            row: dict[str, Any] = {"gpu": found.gpu, "datatype": datatype}
            for sparse, pattern in enumerate(("dense", "sparse")):
                times = found.milliseconds(sizes, datatype, bool(sparse))
                row[pattern] = float((operations / times).max())
            for sparse, pattern in enumerate(("dense", "sparse")):
                known = name != "gb10" and datatype in sheet_of(name).tflops
                peak = sheet_of(name).tflops[datatype][sparse] if known else math.nan
                row[f"{pattern}_share"] = 100 * row[pattern] / peak
            rows.append(row)
    return pd.DataFrame(rows)
