"""Rates and measured products for the tests of rates and of the advice."""

from helpers.measurement.rates import Rates
from helpers.measurement.roofline import DATASHEETS

A100 = Rates.from_datasheet(DATASHEETS["a100"])


def product(m, n, k, dense_ms, sparse_ms, datatype="FP16"):
    row = {"datatype": datatype, "m": m, "n": n, "k": k, "reason": ""}
    return row | {"dense_ms": dense_ms, "sparse_ms": sparse_ms}


SMALL, LARGE = product(64, 512, 512, 0.004, 0.005), product(4096, 512, 512, 0.02, 0.0125)
