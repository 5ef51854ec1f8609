"""How fast a GPU multiplies and moves, measured or by its datasheet.

Explained in `07_sparse_tensor_cores.ipynb`.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers.errors import InputError
from helpers.files import shown
from helpers.measurement.roofline import DATATYPES, TWO_OF_FOUR, Datasheet, floor_ms


class AdviceError(InputError):
    """Nothing can be predicted: the rates, the network or the input do not allow it."""


def _number(value: Any) -> float:
    # No GPU is outside of this range, and nothing that is computed within it overflows.
    if type(value) not in (int, float) or not 1e-9 <= value <= 1e9:
        raise ValueError(f"{value!r:.40} is no number from 1e-9 to 1e9")
    return float(value)


def _whole(value: Any) -> int:
    if _number(value) % 1:
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r:.40} is no text")
    return value


def _known_datatype(value: Any) -> str:
    if _text(value) not in DATATYPES:
        raise ValueError(f"{value!r:.40} is none of {', '.join(DATATYPES)}")
    return value


# The columns of a record's tables, and what reads their values.
SIZE = {"m": _whole, "n": _whole, "k": _whole}
TIMES = {"dense_ms": _number, "sparse_ms": _number}
PRODUCT = {"datatype": _known_datatype, **SIZE, **TIMES}
CHECKED = {
    "network": _text,
    "datatype": _known_datatype,
    "batch": _whole,
    "predicted": _number,
    "measured": _number,
}


def _table(rows: list[dict[str, Any]], columns: dict[str, Callable[[Any], Any]]) -> pd.DataFrame:
    read = [{name: reader(row[name]) for name, reader in columns.items()} for row in rows]
    return pd.DataFrame(read, columns=list(columns))


@dataclass(frozen=True, eq=False)
class Rates:
    """How fast a GPU multiplies and moves, as it was measured or by its datasheet.

    `best` holds the highest rates in TFLOP/s, dense and sparse, by datatype; `bandwidth` is in
    GB/s; `launch_ms` is the least time of any kernel, 0 by a datasheet. `products` are the
    measured ones, in the columns of `helpers.gemm.measure_gemms`, or None. `checked` are
    speed-ups of whole networks that were predicted from them and then measured on this GPU:
    `network`, `datatype`, `batch`, `predicted`, `measured`.
    """

    source: str
    best: dict[str, tuple[float, float]]
    bandwidth: float
    launch_ms: float = 0.0
    products: pd.DataFrame | None = field(default=None, repr=False)
    checked: pd.DataFrame = field(default_factory=lambda: _table([], CHECKED), repr=False)

    @classmethod
    def from_datasheet(cls, sheet: Datasheet) -> "Rates":
        """Return a GPU's published peaks, which give the floors of its kernels' times.

        Args:
            sheet: one of `helpers.gemm.DATASHEETS`.
        """
        return cls(f"the {sheet.gpu}'s datasheet", sheet.tflops, sheet.bandwidth)

    @classmethod
    def from_record(cls, path: Path) -> "Rates":
        """Return what was measured on a GPU, from the record that `benchmarks/gpu.py` writes.

        Args:
            path: JSON with `machine` (its `gpu`), `bandwidth_gbps`, `rows` as
                `helpers.gemm.measure_gemms` returns them, and perhaps `checked`.

        Raises:
            AdviceError: the file is missing or not such a record.
        """
        path = Path(path)
        record = _read(path)
        try:
            gpu, bandwidth = _text(record["machine"]["gpu"]), _number(record["bandwidth_gbps"])
            ran = [row for row in record["rows"] if None not in [row[name] for name in TIMES]]
            products, checked = _table(ran, PRODUCT), _table(record.get("checked", []), CHECKED)
        except (KeyError, TypeError, ValueError) as error:
            raise AdviceError(
                f"{shown(path)} is no record of a GPU ({type(error).__name__}: {error}). It "
                f"needs machine.gpu, bandwidth_gbps and rows with {', '.join(PRODUCT)}; record "
                "it again with benchmarks/gpu.py."
            ) from error
        if products.empty:
            raise AdviceError(
                f"{shown(path)} holds no product that ran both dense and sparse. Record it "
                "again with benchmarks/gpu.py, on a GPU with Sparse Tensor Cores."
            )
        times = products[[*TIMES]]
        rates = times.rdiv(2e-9 * products[[*SIZE]].astype(float).prod(axis=1), axis=0)
        best = rates.groupby(products.datatype).max()
        return cls(
            f"products measured on {gpu}",
            {name: tuple(own) for name, own in zip(best.index, best.values.tolist(), strict=True)},
            bandwidth,
            float(times.min(axis=None)),
            products,
            checked,
        )

    @property
    def measured(self) -> bool:
        """Whether the rates were measured; else they are published."""
        return self.products is not None

    def product_ms(self, m: int, n: int, k: int, datatype: str, sparse: bool) -> float:
        """Return the time in milliseconds of a product of activations (m, k) and a weight (n, k).

        Measured: at the rate of the product that is nearest in the logarithms of m, n and k,
        but not less than its bytes or any kernel take. By a datasheet: `floor_ms`. The outputs
        are counted in the width of the inputs, in which the next layer takes them.

        Raises:
            AdviceError: there are no rates in this datatype.
        """
        peak, width = self._best(datatype)[sparse], DATATYPES[datatype].input_bytes
        floor = floor_ms(m, n, k, datatype, peak, self.bandwidth, sparse, output_bytes=width)
        if self.products is None:
            return floor
        own = self.products[self.products.datatype == datatype]
        sizes = own[[*SIZE]].to_numpy(float)
        nearest = (np.log(sizes / [m, n, k]) ** 2).sum(axis=1).argmin()
        times = own["sparse_ms" if sparse else "dense_ms"].to_numpy()
        scaled = times[nearest] * (m * n * k / sizes[nearest].prod())
        return max(scaled, floor, self.launch_ms)

    def limits(self, operations: float, moved: float, datatype: str) -> dict[str, float]:
        """Return the least milliseconds that each of three things allows a dense kernel.

        Args:
            operations: two for each multiply-accumulate, at the best dense rate.
            moved: bytes read and written.
            datatype: of the operations.

        Raises:
            AdviceError: there are no rates in this datatype.
        """
        return {
            "arithmetic": operations / self._best(datatype)[0] / 1e9,
            "memory": moved / self.bandwidth / 1e6,
            "launch": self.launch_ms,
        }

    def _best(self, datatype: str) -> tuple[float, float]:
        if datatype not in self.best:
            raise AdviceError(
                f"There are no rates in {datatype} from {self.source}; for 2:4 it has "
                f"{', '.join(filter(self.best.get, TWO_OF_FOUR)) or 'none'}. Take one of these, "
                "or another source of rates."
            )
        return self.best[datatype]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise AdviceError(
            f"{shown(path)} cannot be read ({error.strerror}). Record a GPU with "
            "benchmarks/gpu.py, or take the rates of a datasheet."
        ) from error
    except (ValueError, RecursionError) as error:  # no JSON, no text, or nested without end
        raise AdviceError(
            f"{shown(path)} is not JSON ({error}). Record it again with benchmarks/gpu.py."
        ) from error
