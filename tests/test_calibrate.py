"""The fit of `benchmarks/calibrate.py` recovers parameters that made synthetic measurements."""

import numpy as np
import pandas as pd
import pytest
from test_product_model import KERNELS

import calibrate
from helpers.measurement.product_model import Kernels

CARD = calibrate.Card("x1", 108, 40.0, 1935.0)
ROWS = (64, 256, 1024, 4096, 16384)
LAYERS = {
    "one": ((2048, 2048), (8192, 2048)),
    "two": ((3072, 3072), (3072, 8192)),
    "three": ((5120, 2560), (2560, 6912)),
}


@pytest.fixture(scope="module")
def products():
    """Products as a GPU with known parameters would time them, with errors of 2 %."""
    faster = Kernels(**(vars(KERNELS) | {"tile_tflops": 500.0, "peak_tflops": 400.0}))
    sizes = [
        (m, n, k, name) for name, layers in LAYERS.items() for m in ROWS for n, k in layers
    ] + [(m, m, m, "") for m in ROWS]
    table = pd.DataFrame(sizes, columns=["m", "n", "k", "network"])
    noise = np.random.default_rng(0).normal(0, 0.02, (2, len(table)))
    for kernels, pattern, off in ((KERNELS, "dense", noise[0]), (faster, "sparse", noise[1])):
        times = kernels.microseconds(
            table[["m", "n", "k"]].to_numpy(), "FP16", pattern == "sparse", 108, 40.0
        )
        table[pattern] = times * np.exp(off)
    return table.assign(gpu="X1", dtype="FP16")


def test_the_fit_recovers_what_made_the_times(products):
    sizes = products[["m", "n", "k"]].to_numpy(float)
    fitted = calibrate.fit_kernels(sizes, products["dense"].to_numpy(), "FP16", False, CARD)
    assert fitted.peak_tflops == pytest.approx(250, rel=0.1)
    assert fitted.memory_gbps == pytest.approx(1500, rel=0.3)
    unseen = np.array([(512, 3584, 4096), (2048, 11008, 4096), (8192, 4096, 1024)])
    found, true = (
        each.microseconds(unseen, "FP16", False, 108, 40.0) for each in (fitted, KERNELS)
    )
    assert found == pytest.approx(true, rel=0.08)


def test_networks_that_were_left_out_are_predicted(products):
    fitted = calibrate.calibrate(products, "FP16", CARD)
    assert fitted.products == len(products)
    assert fitted.errors.time["median"] < 0.05
    assert fitted.errors.ratio["median"] < 0.06
    assert fitted.errors.block["median"] <= fitted.errors.ratio["p90"]


def test_one_wild_measurement_does_not_move_the_fit():
    line = np.arange(1.0, 21.0)
    wild = 3 * line
    wild[7] = 1000
    found, _ = calibrate.robust_fit(lambda v: v[0] * line, wild, np.array([1.0]), np.array([100.0]))
    assert found[0] == pytest.approx(3, rel=0.01)


def test_a_datatype_learns_from_its_twin_and_counts_only_its_own(products):
    both = pd.concat([products, products.assign(dtype="BF16")])
    assert calibrate.fit(both, "FP16", CARD).products == len(products)


def test_what_is_no_gain_by_sparsity_is_left_out(tmp_path, products):
    table = pd.concat(
        [products.assign(gpu="B200 180GB SXM", dtype=name) for name in ("INT8", "FP8")]
        + [products.assign(gpu="another")]
    )
    huge = table.iloc[[0]].assign(m=65536, n=65536, k=65536, dtype="FP8")
    pd.concat([table, huge]).to_csv(tmp_path / "products.csv", index=False)
    read = calibrate.read_products(tmp_path)
    assert set(read["dtype"]) == {"FP8"}
    assert len(read) == len(products)
    assert (read.network == "").sum() == len(ROWS)
