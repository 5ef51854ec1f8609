import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rates_cases import A100, LARGE, SMALL, product

from helpers.errors import InputError
from helpers.measurement.calibration import calibration
from helpers.measurement.rates import AdviceError, Rates
from helpers.measurement.roofline import DATASHEETS, floor_ms


def test_a_datasheet_gives_the_floors_of_the_roofline():
    sheet = DATASHEETS["a100"]
    for sparse in (False, True):
        floor = floor_ms(64, 512, 256, "FP16", sheet.tflops["FP16"][sparse], 2039.0, sparse)
        assert A100.product_ms(64, 512, 256, "FP16", sparse) == floor
    assert not A100.measured
    assert A100.launch_ms == 0


def test_a_measured_product_takes_the_time_that_was_measured(recorded):
    rates = Rates.from_record(recorded(SMALL, LARGE))
    assert rates.measured
    assert rates.source == "products measured on NVIDIA X1"
    assert rates.product_ms(4096, 512, 512, "FP16", False) == 0.02
    assert rates.product_ms(4096, 512, 512, "FP16", True) == 0.0125


def test_another_product_runs_at_the_rate_of_the_one_nearest_in_logarithms(recorded):
    rates = Rates.from_record(recorded(SMALL, LARGE))
    # By difference 1500 would be nearer to 64; by ratio it is nearer to 4096.
    assert rates.product_ms(1500, 512, 512, "FP16", False) == pytest.approx(0.02 * 1500 / 4096)
    assert rates.product_ms(8192, 512, 512, "FP16", True) == pytest.approx(0.025)
    assert rates.product_ms(64, 1024, 512, "FP16", False) == pytest.approx(0.008)


def test_no_product_is_faster_than_any_that_was_measured(recorded):
    rates = Rates.from_record(recorded(SMALL, LARGE))
    assert (rates.launch_ms, rates.sparse_launch_ms) == (0.004, 0.005)
    assert rates.product_ms(1, 16, 16, "FP16", False) == 0.004
    assert rates.product_ms(1, 16, 16, "FP16", True) == 0.005


def test_no_product_is_faster_than_its_bytes(recorded):
    rates = Rates.from_record(recorded(SMALL, LARGE, bandwidth_gbps=1.0))
    moved = 2 * (4096 * 512 + 512 * 512 + 4096 * 512)
    assert rates.product_ms(4096, 512, 512, "FP16", False) == pytest.approx(moved / 1e9 * 1e3)


def test_products_that_did_not_run_both_ways_are_left_out(recorded):
    half = product(600, 512, 512, 0.001, None)
    rates = Rates.from_record(recorded(SMALL, half, LARGE))
    assert len(rates.products) == 2
    assert rates.launch_ms == 0.004


def test_rates_are_those_of_the_datatype(recorded):
    rates = Rates.from_record(recorded(LARGE, product(4096, 512, 512, 0.01, 0.008, "INT8")))
    assert rates.product_ms(4096, 512, 512, "INT8", False) == 0.01
    operations = 2 * 4096 * 512 * 512
    assert rates.best["INT8"] == pytest.approx((operations / 0.01 / 1e9, operations / 0.008 / 1e9))
    with pytest.raises(AdviceError, match=r"no rates in FP8 from products .* has FP16, INT8\."):
        rates.product_ms(16, 16, 16, "FP8", False)


def test_only_datatypes_that_advise_takes_are_offered_in_place_of_one_without_rates():
    with pytest.raises(AdviceError, match=r"for 2:4 it has FP16, BF16, INT8\."):
        A100.product_ms(16, 16, 16, "FP8", False)


SIZES = st.tuples(*[st.integers(1, 10**6)] * 3)
TIMES = st.floats(1e-3, 10)


@given(st.lists(st.tuples(SIZES, TIMES, TIMES), min_size=1, max_size=8), SIZES, st.booleans())
def test_every_time_respects_the_bytes_and_the_launch(tmp_path_factory, products, size, sparse):
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    rows = [product(*own, dense, compressed) for own, dense, compressed in products]
    record = {"machine": {"gpu": "X1"}, "bandwidth_gbps": 1000, "rows": rows}
    path.write_text(json.dumps(record))
    rates = Rates.from_record(path)
    time = rates.product_ms(*size, "FP16", sparse)
    assert time >= min(min(own[1:]) for own in products)
    assert time >= floor_ms(*size, "FP16", math.inf, 1000, sparse)
    assert math.isfinite(time)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"{", "gpu.json is not JSON"),
        (b"\xff\xfe\x00", "gpu.json is not JSON"),
        (b"[]", "gpu.json is not a record of a GPU"),
        (b'{"machine": {"gpu": "X1"}, "rows": []}', "KeyError: 'bandwidth_gbps'"),
        (b'{"machine": {}, "bandwidth_gbps": 1, "rows": []}', "KeyError: 'gpu'"),
        (b'{"machine": {"gpu": "X1"}, "bandwidth_gbps": 1, "rows": [{}]}', "KeyError: 'dense_ms'"),
        (b'{"machine": {"gpu": "X1"}, "bandwidth_gbps": 1, "rows": 3}', "not a record of a GPU"),
        (b"[" * 100_000, "gpu.json is not JSON"),
        (b"9" * 10_000, "gpu.json is not JSON"),
    ],
)
def test_a_file_that_is_not_a_record_is_refused_in_words(tmp_path, content, complaint):
    path = tmp_path / "gpu.json"
    path.write_bytes(content)
    with pytest.raises(AdviceError, match=complaint):
        Rates.from_record(path)


def test_a_record_without_usable_products_is_refused(recorded):
    for rows in ([], [product(8, 8, 8, None, None)], [product(8, 8, 8, 0.1, None)]):
        with pytest.raises(AdviceError, match="no product that ran both dense and sparse"):
            Rates.from_record(recorded(*rows))


COMPARED = {"network": "n", "datatype": "FP16", "batch": 1, "predicted": 1.2, "measured": 1.1}
NOT_NUMBERS = (0, -1, True, math.inf, -math.inf, math.nan, 10**400, 1e308, "1", [1], {})


@pytest.mark.parametrize("wrong", NOT_NUMBERS, ids=lambda value: repr(value)[:9])
@pytest.mark.parametrize("place", ["bandwidth", "size", "time", "batch", "measured"])
def test_impossible_numbers_are_refused_with_the_name_of_the_file(recorded, place, wrong):
    row, compared = dict(SMALL), dict(COMPARED)
    more = {"checked": [compared]}
    if place == "bandwidth":
        more["bandwidth_gbps"] = wrong
    elif place in ("size", "time"):
        row["k" if place == "size" else "sparse_ms"] = wrong
    else:
        compared[place] = wrong
    words = "gpu.json is not a record .* is not a (whole )?number from 1"
    with pytest.raises(AdviceError, match=words):
        Rates.from_record(recorded(row, **more))


@pytest.mark.parametrize(
    ("row", "more", "complaint"),
    [
        ({"m": 1.5}, {}, "1.5 is not a whole number"),
        ({"datatype": ["FP16"]}, {}, r"\['FP16'\] is not text"),
        ({"datatype": 5}, {}, "5 is not text"),
        ({}, {"machine": {"gpu": None}}, "None is not text"),
        ({}, {"machine": None}, "TypeError"),
        ({}, {"bandwidth_gbps": None}, "None is not a number"),
        ({}, {"checked": [COMPARED | {"measured": None}]}, "None is not a number"),
        ({}, {"checked": None}, "TypeError"),
        ({}, {"checked": [COMPARED | {"datatype": 5}]}, "5 is not text"),
        ({}, {"checked": [{"predicted": 1.0, "measured": 1.0}]}, "KeyError: 'network'"),
    ],
)
def test_words_and_sizes_of_a_record_are_read_as_such(recorded, row, more, complaint):
    with pytest.raises(AdviceError, match=f"gpu.json is not a record .*{complaint}"):
        Rates.from_record(recorded(SMALL | row, **more))


def test_a_missing_record_says_what_to_do(tmp_path):
    with pytest.raises(AdviceError, match=r"none.json cannot be read .*benchmarks/gpu.py"):
        Rates.from_record(tmp_path / "none.json")


def test_an_unknown_datatype_does_not_change_the_others(recorded):
    later = product(64, 512, 512, 0.003, 0.002, "FP4")
    rates = Rates.from_record(recorded(SMALL, LARGE, later))
    assert rates.product_ms(4096, 512, 512, "FP16", True) == 0.0125
    with pytest.raises(InputError, match="no datatype 'FP4'"):
        rates.product_ms(64, 512, 512, "FP4", True)


def test_calibrated_rates_are_the_models(monkeypatch):
    rates = Rates.calibrated("a100")
    found = calibration("a100")
    assert rates.measured
    assert rates.source == found.source
    for sparse in (False, True):
        expected = found.milliseconds([(4096, 512, 512)], "FP16", sparse).item()
        assert rates.product_ms(4096, 512, 512, "FP16", sparse) == expected
    # A sparse kernel starts more slowly; a convolution's overlapping windows are read once.
    assert rates.product_ms(16, 16, 16, "FP16", False) >= rates.launch_ms > 0
    assert rates.product_ms(10**6, 64, 576, "FP16", False, read=1 / 9) < rates.product_ms(
        10**6, 64, 576, "FP16", False
    )
    assert rates.errors("FP16") is found.datatypes["FP16"].errors
    assert A100.errors("FP16") is None
    for ask in (rates.errors, lambda name: rates.product_ms(64, 64, 64, name, True)):
        with pytest.raises(AdviceError, match="no rates in FP8 from a model fitted to products"):
            ask("FP8")


def test_rates_of_an_unknown_gpu_are_refused():
    with pytest.raises(AdviceError, match="There is no GPU 'x' here"):
        Rates.calibrated("x")
