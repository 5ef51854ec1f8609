import json

import numpy as np
import pytest

from helpers.errors import InputError
from helpers.measurement import calibration as module
from helpers.measurement.calibration import (
    CALIBRATION,
    Errors,
    calibration,
    correction_terms,
    reached,
    read_record,
    sheet_of,
)
from helpers.measurement.roofline import DATASHEETS, ESTIMATED_GPUS, MEASURED_GPUS
from helpers.tutorial.settings import project_root

SIZES = np.array([(64, 64, 64), (256, 4096, 4096), (8192, 4096, 4096)])
RECORD = json.loads(CALIBRATION.read_text())


@pytest.mark.parametrize("name", [*MEASURED_GPUS, *ESTIMATED_GPUS])
def test_every_gpu_has_times_that_grow_and_two_launch_floors(name):
    found = calibration(name)
    assert bool(found.donor) == (name in ESTIMATED_GPUS)
    assert ("scaled" in found.source) == (name in ESTIMATED_GPUS)
    assert found.datatypes
    for datatype, fitted in found.datatypes.items():
        for sparse in (False, True):
            times = found.milliseconds(SIZES, datatype, sparse)
            assert (np.diff(times) > 0).all()
            assert times.min() >= (fitted.sparse if sparse else fitted.dense).launch_us / 1000
        assert 0 < fitted.errors.ratio["median"] < fitted.errors.ratio["p90"]


def test_what_was_published_of_the_gpus_is_what_the_model_says():
    """Ranges that hold the medians of the published measurements, which are not kept here."""
    large = np.array([(8192, 4096, 4096)])
    for name, datatype, low, high in (
        ("a100", "FP16", 1.4, 1.8),
        ("a100", "INT8", 1.8, 2.2),
        ("h100", "BF16", 1.35, 1.75),
        ("h100", "FP8", 1.3, 1.9),
        ("rtx4090", "FP16", 1.8, 2.1),
    ):
        found = calibration(name)
        dense, sparse = (found.milliseconds(large, datatype, each) for each in (False, True))
        assert low < (dense / sparse).item() < high
    small = np.array([(64, 2048, 2048)])
    h100 = calibration("h100")
    dense, sparse = (h100.milliseconds(small, "BF16", each) for each in (False, True))
    assert sparse > dense


def test_the_record_says_where_it_comes_from_and_how_far_it_was_off():
    assert {"source", "licence", "date", "products"} <= set(RECORD)
    assert list(RECORD["gpus"]) == sorted(MEASURED_GPUS) or set(RECORD["gpus"]) == set(
        MEASURED_GPUS
    )
    assert CALIBRATION.is_relative_to(project_root() / "helpers"), "the wheel holds it too"


def test_no_measured_datatype_is_far_off():
    """Of two GPUs; the H100's limits are those that this project set itself."""
    for name, datatypes, median, p90 in (
        ("a100", ("FP16", "BF16", "INT8"), 0.055, 0.14),
        ("h100", ("BF16", "FP8", "INT8"), 0.065, 0.20),
    ):
        for datatype in datatypes:
            errors = RECORD["gpus"][name]["datatypes"][datatype]["errors"]
            assert errors["ratio"]["median"] < median
            assert errors["ratio"]["p90"] < p90
            assert errors["time"]["median"] < median
            assert errors["block"]["median"] < 0.06


def test_fp16_stands_on_bf16_where_it_was_not_measured():
    assert "FP16" not in RECORD["gpus"]["h100"]["datatypes"]
    h100 = calibration("h100")
    assert h100.datatypes["FP16"] is h100.datatypes["BF16"]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("", "There is no GPU ''"),
        ("rtx2080", "There is no GPU 'rtx2080' here; measured are a100, h100"),
        ("t4", "The T4 has no Sparse Tensor Cores"),
    ],
)
def test_an_unknown_gpu_is_refused(name, complaint):
    with pytest.raises(InputError, match=complaint):
        calibration(name)


def test_a_card_that_was_not_measured_is_its_donor_scaled_by_the_datasheets():
    a100, a30 = calibration("a100"), calibration("a30")
    assert a30.donor == a100.gpu
    large = np.array([(16384, 8192, 8192)])
    ratio = a30.milliseconds(large, "FP16", False) / a100.milliseconds(large, "FP16", False)
    peaks = sheet_of("a100").tflops["FP16"][0] / sheet_of("a30").tflops["FP16"][0]
    assert ratio == pytest.approx(peaks, rel=0.1)
    errors = RECORD["transfer"]["FP16"]
    assert a30.datatypes["FP16"].errors == Errors(**errors)
    assert (
        errors["time"]["median"]
        > RECORD["gpus"]["a100"]["datatypes"]["FP16"]["errors"]["time"]["median"]
    )


def test_names_of_cards_and_of_datasheets():
    assert sheet_of("a100-sxm") is DATASHEETS["a100"]
    assert sheet_of("a100").gpu.endswith("PCIe")
    with pytest.raises(InputError, match="There is no datasheet 'gb10'"):
        sheet_of("gb10")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (None, "holds no calibration \\(FileNotFoundError\\)"),
        ("{", "holds no calibration"),
        ("[]", "holds no calibration"),
        ('{"format": 0}', "has the format 0, but this version reads 1"),
    ],
)
def test_a_record_of_another_format_is_refused(tmp_path, text, complaint):
    path = tmp_path / "calibration.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=complaint):
        read_record(path)


def test_the_error_of_a_sum_is_smaller_than_that_of_a_product():
    errors = Errors({"p80": 0.1}, {"p80": 0.10}, {"p80": 0.06})
    one, four, many = (errors.sum_of(np.full(count, 1 / count)) for count in (1, 4, 1000))
    assert one == pytest.approx(0.10)
    assert four == pytest.approx(0.06)
    assert 0.03 < many < 0.06
    alike = Errors({"p80": 0.1}, {"p80": 0.05}, {"p80": 0.08})
    assert alike.sum_of(np.full(1000, 1e-3)) == pytest.approx(0.05)


def test_the_correction_fades_away_from_its_grid():
    far = correction_terms(np.array([(64, 4, 4), (10**6, 10**6, 4)]))
    assert far[:, 0].tolist() == [1, 1]
    assert far[:, 1:].max() < 0.01


def test_a_size_is_computed_once(monkeypatch):
    found = calibration("a100")
    first = found.milliseconds_of(123, 456, 789, "FP16", True)
    monkeypatch.setattr(module.Kernels, "microseconds", None)
    assert found.milliseconds_of(123, 456, 789, "FP16", True) == first


def test_what_is_reached_stands_beside_the_datasheet():
    table = reached(["a100", "gb10"]).set_index(["gpu", "datatype"])
    a100 = table.loc[("A100 80GB PCIe", "FP16")]
    assert 200 < a100.dense < 312
    assert a100.dense_share == pytest.approx(100 * a100.dense / 312)
    assert a100.sparse_share < a100.dense_share  # sparse kernels stay further from their peak
    assert table.loc["DGX Spark GB10"].dense_share.isna().all()  # nothing is published for it
