import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.errors import InputError
from helpers.measurement.roofline import (
    DATASHEETS,
    DATATYPES,
    TWO_OF_FOUR,
    datatype_named,
    floor_ms,
    intensity,
)

# --- the roofline --------------------------------------------------------------------------

sides = st.sampled_from([1, 8, 64, 1000, 4096, 16384])
sizes = st.tuples(sides, sides, sides)
names = st.sampled_from(sorted(DATATYPES))
peaks = st.floats(1, 5000)
bandwidths = st.floats(100, 8000)


def test_bytes_are_counted_by_hand():
    # x, weight and outputs of 2 x 4 by 8 x 4.
    x, weight, outputs = 2 * 4, 8 * 4, 2 * 8
    operations = 2 * 2 * 8 * 4
    dense = {
        "FP16": 2 * (x + weight) + 2 * outputs,
        "TF32": 4 * (x + weight) + 4 * outputs,
        "INT8": x + weight + 4 * outputs,
        "FP8": x + weight + 2 * outputs,
    }
    sparse = {"FP16": 0.5625, "TF32": 0.5625, "INT8": 0.625, "FP8": 0.625}
    for name, moved in dense.items():
        assert intensity(2, 8, 4, name, False) == pytest.approx(operations / moved)
        saved = DATATYPES[name].input_bytes * weight * (1 - sparse[name])
        assert intensity(2, 8, 4, name, True) == pytest.approx(operations / (moved - saved))


def test_the_floor_of_known_products():
    # 2 * 4096^3 operations at 989.4 TFLOP/s; and one row, which reads the weight.
    assert floor_ms(4096, 4096, 4096, "FP16", 989.4, 4800, False) == pytest.approx(
        0.13891, rel=1e-4
    )
    weight = 4096 * 4096 * 2 / 4800e9 * 1e3
    assert floor_ms(1, 4096, 4096, "FP16", 989.4, 4800, False) == pytest.approx(weight, rel=1e-3)
    sparse = floor_ms(1, 4096, 4096, "FP16", 1978.9, 4800, True)
    assert sparse == pytest.approx(0.5625 * weight, rel=1e-3)


@given(sizes, names, peaks, bandwidths, st.booleans())
def test_the_floor_is_the_lower_of_both_roofs(size, name, peak, bandwidth, sparse):
    rate = 2 * math.prod(size) / floor_ms(*size, name, peak, bandwidth, sparse) / 1e9
    roof = min(peak, intensity(*size, name, sparse) * bandwidth / 1000)
    assert rate == pytest.approx(roof)


@given(sizes, names, peaks, bandwidths)
def test_sparse_saves_at_most_half_and_never_costs_time(size, name, peak, bandwidth):
    dense = floor_ms(*size, name, peak, bandwidth, False)
    sparse = floor_ms(*size, name, 2 * peak, bandwidth, True)
    assert 0.5 * dense <= sparse * (1 + 1e-9)
    assert sparse <= dense
    assert 1 < intensity(*size, name, True) / intensity(*size, name, False) < 2


@given(sizes, names, peaks, bandwidths, st.booleans())
def test_better_hardware_and_smaller_products_are_never_slower(size, name, peak, bandwidth, sparse):
    floor = floor_ms(*size, name, peak, bandwidth, sparse)
    assert floor_ms(*size, name, 2 * peak, bandwidth, sparse) <= floor
    assert floor_ms(*size, name, peak, 2 * bandwidth, sparse) <= floor
    both = floor_ms(*size, name, 2 * peak, 2 * bandwidth, sparse)
    assert both == pytest.approx(floor / 2)
    for side in range(3):
        larger = [length * (2 if side == place else 1) for place, length in enumerate(size)]
        assert floor_ms(*larger, name, peak, bandwidth, sparse) >= floor


@pytest.mark.parametrize("wrong", [0, -1, -math.inf, math.nan])
@pytest.mark.parametrize("place", ["m", "n", "k", "peak_tflops", "bandwidth"])
def test_a_floor_of_a_size_that_is_not_positive_is_refused(place, wrong):
    known = {"m": 8, "n": 8, "k": 8, "peak_tflops": 100, "bandwidth": 1000} | {place: wrong}
    with pytest.raises(InputError, match=f"{place} is {wrong}; give it a number above 0"):
        floor_ms(**known, datatype="FP16", sparse=False)
    if place in "mnk":
        with pytest.raises(InputError, match=f"{place} is {wrong}"):
            intensity(*(known[side] for side in "mnk"), "FP16", False)


def test_the_outputs_may_have_another_width_than_the_datatypes_own():
    moved = 8 * 16 + 4 * 16 + 8 * 4
    floor = floor_ms(8, 4, 16, "INT8", math.inf, 1000, False, output_bytes=1)
    assert floor == pytest.approx(moved / 1000e6)
    own = floor_ms(8, 4, 16, "INT8", math.inf, 1000, False)
    assert own - floor == pytest.approx(3 * 8 * 4 / 1000e6)


# --- datasheets ----------------------------------------------------------------------------


@pytest.mark.parametrize("sheet", DATASHEETS.values(), ids=DATASHEETS)
def test_a_datasheet_promises_twice_the_rate_for_sparse(sheet):
    assert set(sheet.tflops) <= set(DATATYPES)
    for dense, sparse in sheet.tflops.values():
        assert sparse == pytest.approx(2 * dense, rel=1e-3), "they are rounded"
    assert sheet.tflops["FP16"] == sheet.tflops["BF16"]
    assert sheet.source in repr(sheet)
    assert "published" in repr(sheet)


def test_an_a100_has_no_fp8():
    assert "FP8" not in DATASHEETS["a100"].tflops
    assert {"FP8"} == set(DATATYPES) - set(DATASHEETS["a100"].tflops)


# --- light to import -----------------------------------------------------------------------


def test_neither_torch_nor_pandas_is_imported():
    """The command line takes its help texts from here."""
    code = "import sys, helpers.measurement.roofline; print(*sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert {"torch", "pandas", "numpy"}.isdisjoint(told.stdout.split())


def test_two_of_four_are_all_datatypes_but_tf32():
    assert TWO_OF_FOUR == ["FP16", "BF16", "INT8", "FP8"]
    assert datatype_named("TF32").pattern == (1, 2)
