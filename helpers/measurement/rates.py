"""How fast a GPU multiplies and moves data, measured or by its datasheet.

Explained in `07_sparse_tensor_cores.ipynb`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers.errors import InputError
from helpers.files import shown
from helpers.measurement.calibration import Calibration, Errors, calibration
from helpers.measurement.roofline import TWO_OF_FOUR, Datasheet, datatype_named, floor_ms


class AdviceError(InputError):
    """Nothing can be predicted: the rates, the model or the input do not allow it."""


# The columns of a record's tables.
PRODUCT = {"datatype": str, "m": int, "n": int, "k": int, "dense_ms": float, "sparse_ms": float}
CHECKED = {"network": str, "datatype": str, "batch": int, "predicted": float, "measured": float}
# No GPU is outside of these ranges, and nothing that is computed within them overflows.
KINDS = {str: "text", int: "a whole number from 1 to 1e9", float: "a number from 1e-9 to 1e9"}


def _value(value: Any, kind: type) -> Any:
    """Return a value of a record in its type."""
    if kind is str:
        fits = isinstance(value, str)
    else:
        fits = type(value) in (int, float) and 1e-9 <= value <= 1e9 and kind(value) == value
    if not fits:
        raise ValueError(f"{value!r:.40} is not {KINDS[kind]}")
    return kind(value)


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, type]) -> pd.DataFrame:
    values = [[_value(row[name], kind) for name, kind in columns.items()] for row in rows]
    return pd.DataFrame(values, columns=list(columns))


@dataclass(frozen=True, eq=False)
class Rates:
    """How fast a GPU multiplies and moves data, measured or by its datasheet.

    `best` holds the highest rates in TFLOP/s, dense and sparse, by datatype; `bandwidth` is in
    GB/s; `launch_ms` is the least time of any kernel, 0 by a datasheet. `products` are the
    measured ones, in the columns of `helpers.measurement.gemm.measure_gemms`, or None.
    `checked` are end-to-end speed-ups that were predicted from these products and then
    measured on the same GPU: `network`, `datatype`, `batch`, `predicted`, `measured`.
    `calibration` is the model that was fitted to published products of the GPU, or None.
    `sparse_launch_ms` is the least time of a sparse kernel, which starts more slowly.
    """

    source: str
    best: dict[str, tuple[float, float]]
    bandwidth: float
    launch_ms: float = 0.0
    products: pd.DataFrame | None = field(default=None, repr=False)
    checked: pd.DataFrame = field(default_factory=lambda: _table([], CHECKED), repr=False)
    calibration: Calibration | None = field(default=None, repr=False)
    sparse_launch_ms: float = 0.0

    @classmethod
    def from_datasheet(cls, sheet: Datasheet) -> "Rates":
        """Return a GPU's published peaks, which give the floors of its kernels' times.

        Args:
            sheet: one of `helpers.measurement.roofline.DATASHEETS`.
        """
        return cls(f"the {sheet.gpu}'s datasheet", sheet.tflops, sheet.bandwidth)

    @classmethod
    def calibrated(cls, gpu: str) -> "Rates":
        """Return a GPU's rates by a model that was fitted to published measurements.

        Args:
            gpu: a name that `helpers.measurement.calibration.calibration` takes, such as a100.

        Raises:
            AdviceError: there is no such GPU, or it has no Sparse Tensor Cores.
        """
        try:
            found = calibration(gpu)
        except InputError as error:
            raise AdviceError(str(error)) from error
        kernels = [(name, each.dense, each.sparse) for name, each in found.datatypes.items()]
        return cls(
            found.source,
            {name: (dense.peak_tflops, sparse.peak_tflops) for name, dense, sparse in kernels},
            min(dense.memory_gbps for _, dense, _ in kernels),
            min(dense.launch_us for _, dense, _ in kernels) / 1000,
            calibration=found,
            sparse_launch_ms=min(sparse.launch_us for _, _, sparse in kernels) / 1000,
        )

    @classmethod
    def from_record(cls, path: Path) -> "Rates":
        """Return what was measured on a GPU, from the record that `benchmarks/gpu.py` writes.

        Args:
            path: JSON with `machine` (its `gpu`), `bandwidth_gbps`, `rows` as
                `helpers.measurement.gemm.measure_gemms` returns them, and optionally `checked`.

        Raises:
            AdviceError: the file is missing, is not such a record, or holds no product that ran.
        """
        path = Path(path)
        record = _read_json(path)
        try:
            gpu = _value(record["machine"]["gpu"], str)
            bandwidth = _value(record["bandwidth_gbps"], float)
            ran = [row for row in record["rows"] if None not in (row["dense_ms"], row["sparse_ms"])]
            products, checked = _table(ran, PRODUCT), _table(record.get("checked", []), CHECKED)
        except (KeyError, TypeError, ValueError) as error:
            raise AdviceError(
                f"{shown(path)} is not a record of a GPU ({type(error).__name__}: {error}). It "
                f"needs machine.gpu, bandwidth_gbps and rows with {', '.join(PRODUCT)}; record "
                "it again with benchmarks/gpu.py."
            ) from error
        if products.empty:
            raise AdviceError(
                f"{shown(path)} holds no product that ran both dense and sparse. Record it "
                "again with benchmarks/gpu.py, on a GPU with Sparse Tensor Cores."
            )
        operations = 2e-9 * (products.m.astype(float) * products.n * products.k)
        dense, sparse = operations / products.dense_ms, operations / products.sparse_ms
        best = {
            name: (float(dense[rows].max()), float(sparse[rows].max()))
            for name, rows in products.groupby("datatype").groups.items()
        }
        least, sparse_least = float(products.dense_ms.min()), float(products.sparse_ms.min())
        source = f"products measured on {gpu}"
        return cls(source, best, bandwidth, least, products, checked, sparse_launch_ms=sparse_least)

    @property
    def measured(self) -> bool:
        """Whether the rates were measured, here or by others; if not, they are a datasheet's."""
        return self.products is not None or self.calibration is not None

    def errors(self, datatype: str) -> Errors | None:
        """Return how far these rates were off where they were checked; None if never."""
        if self.calibration is None:
            return None
        self._best_in(datatype)
        return self.calibration.datatypes[datatype].errors

    def product_ms(
        self, m: int, n: int, k: int, datatype: str, sparse: bool, read: float = 1.0
    ) -> float:
        """Return the time in milliseconds of a product of activations (m, k) and a weight (n, k).

        Measured: at the rate of the product that is nearest in the logarithms of m, n and k,
        but not less than the time to move its bytes, or than any kernel of its kind takes.
        Calibrated: by the fitted model. By a datasheet: `floor_ms`. Outputs count in the width of
        the inputs, as the next layer reads them.

        Args:
            m: rows of the activations.
            n: outputs.
            k: inputs.
            datatype: a name in `DATATYPES`.
            sparse: whether the weight is compressed.
            read: the numbers that the activations have in memory over m k; only the calibrated
                model uses it.

        Raises:
            AdviceError: there are no rates in this datatype.
        """
        dense_rate, sparse_rate = self._best_in(datatype)
        if self.calibration is not None:
            return self.calibration.milliseconds_of(m, n, k, datatype, sparse, read)
        rate = sparse_rate if sparse else dense_rate
        width = datatype_named(datatype).input_bytes
        floor = floor_ms(m, n, k, datatype, rate, self.bandwidth, sparse, output_bytes=width)
        if self.products is None:
            return floor
        own = self.products[self.products.datatype == datatype]
        sizes = own[["m", "n", "k"]].to_numpy(float)
        nearest = (np.log(sizes / [m, n, k]) ** 2).sum(axis=1).argmin()
        times = own["sparse_ms" if sparse else "dense_ms"].to_numpy()
        scaled = times[nearest] * (m * n * k / sizes[nearest].prod())
        return max(scaled, floor, self.sparse_launch_ms if sparse else self.launch_ms)

    def limits(self, operations: float, moved: float, datatype: str) -> dict[str, float]:
        """Return the least milliseconds of a dense kernel by each thing that may limit it.

        Args:
            operations: two for each multiply-accumulate, at the best dense rate.
            moved: bytes read and written.
            datatype: of the operations.

        Raises:
            AdviceError: there are no rates in this datatype.
        """
        dense_rate, _ = self._best_in(datatype)
        return {
            "arithmetic": operations / dense_rate / 1e9,
            "memory": moved / self.bandwidth / 1e6,
            "launch": self.launch_ms,
        }

    def _best_in(self, datatype: str) -> tuple[float, float]:
        if datatype not in self.best:
            known = [name for name in TWO_OF_FOUR if name in self.best]
            raise AdviceError(
                f"There are no rates in {datatype} from {self.source}; for 2:4 it has "
                f"{', '.join(known) or 'none'}. Choose one of these, or another source of rates."
            )
        return self.best[datatype]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise AdviceError(
            f"{shown(path)} cannot be read ({error.strerror}). Record a GPU with "
            "benchmarks/gpu.py, or use the rates of a datasheet."
        ) from error
    except (ValueError, RecursionError) as error:  # not JSON, not text, or nested too deeply
        raise AdviceError(
            f"{shown(path)} is not JSON ({error}). Record it again with benchmarks/gpu.py."
        ) from error
