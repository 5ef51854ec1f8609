import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.measurement.product_model import Kernels

KERNELS = Kernels(
    launch_us=3.0,
    tile_us=1.0,
    part_us=4.0,
    step_ns=4.0,
    tile_tflops=300.0,
    peak_tflops=250.0,
    heat=0.05,
    feed_gbps=8000.0,
    cache_gbps=4000.0,
    memory_gbps=1500.0,
    side=8.0,
    alone=0.5,
    rounding=0.7,
)


def microseconds(*size, kernels=KERNELS, datatype="FP16", sparse=False, read=1.0):
    return kernels.microseconds(np.array([size]), datatype, sparse, 108, 40.0, read).item()


def test_a_tiny_product_takes_little_more_than_the_launch():
    assert 3.0 < microseconds(16, 16, 64) < 5.0


def test_a_huge_product_runs_at_the_sustained_rate_of_a_hot_gpu():
    size = (16384, 16384, 16384)
    floor = 2 * 16384**3 / 250e6 * 1.05
    assert floor < microseconds(*size) < 1.3 * floor


def test_a_narrow_product_waits_for_the_memory():
    m, n, k = 1_000_000, 64, 64
    moved = 2 * (m * k + n * k + m * n)
    assert microseconds(m, n, k) > moved / 1500e3


def test_one_tile_more_than_the_multiprocessors_takes_another_wave():
    # One row of tiles of 128 x 256 for each multiprocessor, and then one more.
    full = 108 * 256
    wave, more = microseconds(128, full, 4096), microseconds(128, full + 16, 4096)
    assert more > 1.02 * wave
    smooth = microseconds(128, full + 4096, 4096) / microseconds(128, full + 16, 4096)
    assert smooth < 1.25


@given(
    st.tuples(*[st.integers(1, 3000)] * 3),
    st.integers(0, 2),
    st.booleans(),
    st.sampled_from(["FP16", "INT8"]),
)
def test_a_cut_is_never_free_and_every_time_is_above_the_launch(size, axis, sparse, datatype):
    larger = list(size)
    larger[axis] *= 16
    small, large = (
        microseconds(*each, sparse=sparse, datatype=datatype) for each in (size, larger)
    )
    assert 3.0 < small < 1.1 * large


def test_a_compressed_weight_and_overlapping_windows_move_less():
    memory = Kernels(**(vars(KERNELS) | {"memory_gbps": 100.0, "cache_gbps": 100.0}))
    weight = (16, 16384, 16384)
    assert microseconds(*weight, kernels=memory, sparse=True) < 0.65 * microseconds(
        *weight, kernels=memory
    )
    pixels = (100_000, 64, 576)
    assert microseconds(*pixels, kernels=memory, read=1 / 9) < 0.4 * microseconds(
        *pixels, kernels=memory
    )


def test_the_vector_of_a_fit_holds_every_parameter():
    again = Kernels.from_vector(KERNELS.to_vector())
    assert vars(again) == pytest.approx(vars(KERNELS))


def test_many_products_at_once_take_the_times_of_each():
    sizes = np.array([(64, 512, 512), (4096, 4096, 1024), (7, 9, 11)])
    together = KERNELS.microseconds(sizes, "FP16", False, 108, 40.0)
    assert together == pytest.approx([microseconds(*each) for each in sizes])
