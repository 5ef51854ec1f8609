"""Fit the model of a product's time to published measurements, and measure its error.

    python benchmarks/calibrate.py FOLDER

FOLDER holds `products.csv`: gpu, dtype, m, n, k, network, and the microseconds dense and sparse.
The measurements are not part of this repository; `SOURCE` says where they were published. Writes
`helpers/measurement/calibration.json`: the parameters for each GPU and datatype, and the errors
of predicting the products of each network from all other products.
"""

import argparse
import datetime
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers.files import write_json
from helpers.measurement.calibration import (
    CALIBRATION,
    DONORS,
    FORMAT,
    Calibration,
    Errors,
    Fitted,
    correction_terms,
    measured,
    scaled,
)
from helpers.measurement.product_model import Kernels
from helpers.measurement.roofline import datatype_named

SOURCE = (
    "bcacdwk/vllmbench (SlideSparse) at commit 92a8ca49, "
    "slidesparse/benchmark_kernel/kernel_speedup_results: cuBLASLt and cuSPARSELt 0.8.1, the "
    "fastest algorithm of a search on both sides, operands hot in the cache"
)
LICENCE = "Apache-2.0 (the measurements); CC BY 4.0 (these parameters)"


@dataclass(frozen=True)
class Card:
    """A card of the table: our name for it, and what the fit must know of it."""

    name: str
    multiprocessors: int
    cache_mb: float
    bandwidth: float  # GB/s by the datasheet, from where the fit starts
    # The penalty of the correction: of 0.1 and 0.5 what predicts unseen networks best.
    ridge: float = 0.5


CARDS = {
    "A100 80GB PCIe": Card("a100", 108, 40, 1935),
    "H100 80GB PCIe": Card("h100", 114, 50, 2000, ridge=0.1),
    "B200 180GB SXM": Card("b200", 148, 126, 8000),
    "RTX 4090": Card("rtx4090", 128, 72, 1008),
    "RTX 5080": Card("rtx5080", 84, 64, 960),
    "DGX Spark GB10": Card("gb10", 48, 24, 273),
}
# Its authors name cuBLASLt's dense INT8 on a B200 as slow, so the ratio is not a gain by 2:4.
LEFT_OUT = {("b200", "INT8")}
TOO_LARGE = 1e13  # MACs: the largest squares run for minutes, where no layer of a network is

# How far, in logarithms, a parameter may lie from its first guess at no great cost.
SPREAD = {
    "launch_us": 0.3, "tile_us": 1.0, "part_us": 1.0, "step_ns": 0.5, "tile_tflops": 0.2,
    "peak_tflops": 0.2, "heat": 1.0, "feed_gbps": 1.0, "cache_gbps": 0.5, "memory_gbps": 0.3,
    "side": 1.5, "alone": 0.5, "rounding": 1.5,
}  # fmt: skip
PRIOR = 0.1  # the weight of those guesses
USUAL = 0.05  # an error of 5 % is usual; of much larger ones only the sign counts
# Two datatypes of one width run in the same kernels, at nearly the same rates: each is fitted
# with the measurements of both, those of its twin at this weight.
TWINS = {"FP16": "BF16", "BF16": "FP16"}
TWIN_WEIGHT = 0.5


def first_guess(
    sizes: np.ndarray, times: np.ndarray, datatype: str, bandwidth: float, feed: float, side: float
) -> Kernels:
    """Return parameters to start from; `feed` and `side` set two that have several optima."""
    best = float((2e-6 * sizes.prod(axis=1) / times).max())
    width = datatype_named(datatype).input_bytes
    return Kernels(
        launch_us=3.0,
        tile_us=1.0,
        part_us=4.0,
        step_ns=4.0,
        tile_tflops=1.2 * best,
        peak_tflops=best,
        heat=0.05,
        feed_gbps=1000 * best * width / 128 * feed,
        cache_gbps=2.5 * bandwidth,
        memory_gbps=0.85 * bandwidth,
        side=side,
        alone=0.5,
        rounding=0.7,
    )


def robust_fit(
    predict: Callable[[np.ndarray], np.ndarray],
    target: np.ndarray,
    start: np.ndarray,
    spread: np.ndarray,
    steps: int = 30,
) -> tuple[np.ndarray, float]:
    """Return the vector whose predictions come closest to a target, and its cost.

    The method of Levenberg and Marquardt, with derivatives by differences, a loss that is square
    for usual errors and linear for large ones, and a square penalty for leaving the start.
    """

    def cost(errors: np.ndarray, vector: np.ndarray) -> float:
        losses = 2 * USUAL**2 * (np.sqrt(1 + (errors / USUAL) ** 2) - 1)
        return float(losses.sum() + ((PRIOR * (vector - start) / spread) ** 2).sum())

    small, penalty = 0.01, np.diag((PRIOR / spread) ** 2)
    vector, damping = start.copy(), 1.0
    errors = predict(vector) - target
    now = cost(errors, vector)
    for _ in range(steps):
        moved = [predict(vector + small * unit) - target for unit in np.eye(len(vector))]
        slopes = (np.stack(moved, axis=1) - errors[:, None]) / small
        weights = 1 / np.sqrt(1 + (errors / USUAL) ** 2)
        bend = slopes.T * weights @ slopes + penalty
        slope = slopes.T * weights @ errors + penalty @ (vector - start)
        before = now
        for _ in range(8):  # shorter and shorter steps, until one is downhill
            step = np.linalg.solve(bend + damping * np.diag(np.diag(bend)), -slope)
            tried = predict(vector + step) - target
            then = cost(tried, vector + step)
            if then < now:
                vector, errors, now = vector + step, tried, then
                damping = max(damping / 3, 1e-4)
                break
            damping *= 4
        if before - now < 1e-4 * now:
            break
    return vector, now


def fit_kernels(
    sizes: np.ndarray, times: np.ndarray, datatype: str, sparse: bool, card: Card
) -> Kernels:
    """Return the parameters that fit measured times best.

    Args:
        sizes: (products, 3): m, n and k of each.
        times: (products,) microseconds.
        datatype: of the products.
        sparse: whether the weights were compressed.
        card: that they were measured on.
    """

    def predict(vector: np.ndarray) -> np.ndarray:
        kernels = Kernels.from_vector(vector)
        found = kernels.microseconds(sizes, datatype, sparse, card.multiprocessors, card.cache_mb)
        return np.log(found)

    spread = np.array([SPREAD[each.name] for each in fields(Kernels)])
    starts = [
        first_guess(sizes, times, datatype, card.bandwidth, feed, side).to_vector()
        for feed, side in ((1.0, 8.0), (2.0, 60.0))
    ]
    found = [robust_fit(predict, np.log(times), start, spread) for start in starts]
    return Kernels.from_vector(min(found, key=lambda each: each[1])[0])


def fit_correction(
    sizes: np.ndarray, errors: np.ndarray, trust: np.ndarray, ridge: float
) -> tuple[float, ...]:
    """Return the weights of the correction's terms for errors in logarithms: a robust ridge.

    Args:
        sizes: (products, 3): m, n and k of each.
        errors: (products,) the logarithm of the measured over the predicted time.
        trust: (products,) how much each counts.
        ridge: the penalty for large weights.
    """
    terms = correction_terms(sizes)
    penalty = ridge * np.eye(terms.shape[1])
    penalty[0, 0] = 0.01  # the constant
    weights = trust
    for _ in range(8):
        found = np.linalg.solve(terms.T * weights @ terms + penalty, terms.T * weights @ errors)
        weights = trust / np.sqrt(1 + ((errors - terms @ found) / USUAL) ** 2)
    return tuple(found.round(4).tolist())


def fit(products: pd.DataFrame, datatype: str, card: Card) -> Fitted:
    """Return the model of one GPU and datatype, whose errors are not known yet.

    Args:
        products: of the datatype, and of its twin if there is one.
        datatype: that the model is for.
        card: that they were measured on.
    """
    sizes = products[["m", "n", "k"]].to_numpy(float)
    own = (products["dtype"] == datatype).to_numpy()
    trust = np.where(own, 1.0, TWIN_WEIGHT)

    def one(sparse: bool) -> tuple[Kernels, tuple[float, ...]]:
        times = products["sparse" if sparse else "dense"].to_numpy(float)
        kernels = fit_kernels(sizes, times, datatype, sparse, card)
        found = kernels.microseconds(sizes, datatype, sparse, card.multiprocessors, card.cache_mb)
        return kernels, fit_correction(sizes, np.log(times / found), trust, card.ridge)

    dense, dense_correction = one(sparse=False)
    sparse, sparse_correction = one(sparse=True)
    unknown: dict[str, float] = {}
    errors = Errors(unknown, unknown, unknown)
    return Fitted(dense, sparse, dense_correction, sparse_correction, int(own.sum()), errors)


def predicted(products: pd.DataFrame, calibration: Calibration, datatype: str) -> pd.DataFrame:
    """Return products with the predicted microseconds `dense_p` and `sparse_p`."""
    sizes = products[["m", "n", "k"]].to_numpy(float)
    dense = 1000 * calibration.milliseconds(sizes, datatype, sparse=False)
    sparse = 1000 * calibration.milliseconds(sizes, datatype, sparse=True)
    return products.assign(dense_p=dense, sparse_p=sparse)


def quantiles(errors: np.ndarray) -> dict[str, float]:
    """Return the median, the 80th and the 90th percentile of absolute errors."""
    found = np.quantile(np.abs(errors), [0.5, 0.8, 0.9]).round(4).tolist()
    return dict(zip(("median", "p80", "p90"), found, strict=True))


def errors_of(table: pd.DataFrame) -> Errors:
    """Return the errors of a table that `predicted` returned."""

    def off(rows: pd.DataFrame) -> np.ndarray:
        measured, expected = rows["dense"] / rows["sparse"], rows["dense_p"] / rows["sparse_p"]
        return np.log(expected / measured).to_numpy()

    times = [np.log(table[f"{each}_p"] / table[each]).to_numpy() for each in ("dense", "sparse")]
    columns = ["dense", "sparse", "dense_p", "sparse_p"]
    blocks = table.groupby(["network", "m"])[columns].sum()
    return Errors(
        time=quantiles(np.concatenate(times)),
        ratio=quantiles(off(table)),
        block=quantiles(off(blocks)),
    )


def calibrate(products: pd.DataFrame, datatype: str, card: Card) -> Fitted:
    """Return the model of one GPU and datatype, with the errors of leaving each network out.

    Args:
        products: of the datatype, and of its twin if there is one.
        datatype: that the model is for.
        card: that they were measured on.
    """
    unseen = []
    for network in sorted(set(products.network) - {""}):
        rest = fit(products[products.network != network], datatype, card)
        one = Calibration(card.name, "", card.multiprocessors, card.cache_mb, {datatype: rest})
        left_out = (products.network == network) & (products["dtype"] == datatype)
        unseen.append(predicted(products[left_out], one, datatype))
    fitted = fit(products, datatype, card)
    return replace(fitted, errors=errors_of(pd.concat(unseen)))


def errors_of_scaling(products: pd.DataFrame, gpus: dict[str, Any]) -> dict[str, Errors]:
    """Return the errors of pretending that a measured card was not, by datatype.

    Args:
        products: as `read_products` returns them.
        gpus: the fitted models by name, as they are written.
    """
    tables: dict[str, list[pd.DataFrame]] = {}
    for gpu, card in CARDS.items():
        if card.name not in DONORS:
            continue
        donor = measured(DONORS[card.name], gpus[DONORS[card.name]])
        known = {name: fitted.errors for name, fitted in donor.datatypes.items()}
        other = scaled(donor, card.name, known)
        for datatype, rows in products[products.gpu == gpu].groupby("dtype"):
            if datatype in other.datatypes:
                layers = rows[rows.network != ""]
                layers = layers.assign(network=gpu + layers.network)
                tables.setdefault(datatype, []).append(predicted(layers, other, datatype))
    return {datatype: errors_of(pd.concat(each)) for datatype, each in tables.items()}


def read_products(folder: Path) -> pd.DataFrame:
    """Return the published products that the fit uses; `network` is empty for squares."""
    table = pd.read_csv(folder / "products.csv", keep_default_na=False)
    table = table[table.gpu.isin(CARDS)]
    names = [CARDS[gpu].name for gpu in table.gpu]
    known = np.array([pair not in LEFT_OUT for pair in zip(names, table.dtype, strict=True)])
    return table[known & (table[["m", "n", "k"]].prod(axis=1) < TOO_LARGE)]


def _rounded(values: Any) -> Any:
    """Return nested numbers with four significant digits."""
    if isinstance(values, dict):
        return {name: _rounded(each) for name, each in values.items()}
    if isinstance(values, list | tuple):
        return [_rounded(each) for each in values]
    return float(f"{values:.4g}") if isinstance(values, float) else values


def told(errors: Errors) -> str:
    """Return errors in one line."""
    kinds = {"time": errors.time, "ratio": errors.ratio, "block": errors.block}
    return "median and p90: " + ", ".join(
        f"{name} {each['median']:.1%} {each['p90']:.1%}" for name, each in kinds.items()
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit, print the errors, and write the parameters."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="holds products.csv")
    parser.add_argument("--out", type=Path, default=CALIBRATION)
    parser.add_argument("--processes", type=int, default=1)
    options = parser.parse_args(arguments)
    products = read_products(options.folder)
    pairs = products[["gpu", "dtype"]].drop_duplicates().itertuples(index=False, name=None)
    with ProcessPoolExecutor(options.processes) as pool:
        waiting = {}
        for gpu, datatype in pairs:
            used = products["dtype"].isin([datatype, TWINS.get(datatype, datatype)])
            rows = products[used & (products.gpu == gpu)]
            waiting[gpu, datatype] = pool.submit(calibrate, rows, datatype, CARDS[gpu])
        gpus: dict[str, Any] = {}
        for (gpu, datatype), result in waiting.items():
            card, fitted = CARDS[gpu], result.result()
            entry = {"gpu": gpu, "multiprocessors": card.multiprocessors, "cache_mb": card.cache_mb}
            gpus.setdefault(card.name, entry | {"datatypes": {}})
            gpus[card.name]["datatypes"][datatype] = _rounded(asdict(fitted))
            print(f"{card.name:8} {datatype:4} {told(fitted.errors)}", flush=True)
    scaling = errors_of_scaling(products, gpus)
    for datatype, errors in scaling.items():
        print(f"scaled   {datatype:4} {told(errors)}")
    write_json(
        options.out,
        {
            "format": FORMAT,
            "what": "parameters of helpers.measurement.product_model, fitted to published times",
            "source": SOURCE,
            "licence": LICENCE,
            "date": datetime.date.today().isoformat(),
            "products": len(products),
            "gpus": gpus,
            "transfer": _rounded({name: asdict(each) for name, each in scaling.items()}),
        },
    )


if __name__ == "__main__":
    main()
