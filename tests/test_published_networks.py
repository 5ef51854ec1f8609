import json

import pandas as pd
import pytest

import published_networks
from helpers.tutorial.plots import plot_published

RESULT = json.loads(published_networks.RESULT.read_text())
ROWS = pd.DataFrame(RESULT["rows"])


def test_the_record_cites_every_measurement_and_holds_none():
    assert not {"dense", "sparse", "ratio", "measured"} & set(ROWS.columns)
    assert ROWS.source.str.len().min() > 10
    assert {"BERT-large seq 128", "BERT-large seq 384", "Inception v3"} <= set(ROWS.network)


def test_the_record_is_what_the_code_predicts():
    row = ROWS[(ROWS.network == "ResNeXt-101 32x8d") & (ROWS.batch == 256)].iloc[0]
    advice = published_networks.predict(row.network, row.batch, row.gpu, row.datatype)
    assert advice.speedup == pytest.approx(row.predicted, abs=1e-3)
    assert advice.interval == pytest.approx((row.low, row.high), abs=1e-3)


def test_the_case_study_is_predicted():
    """NVIDIA published at most 1.20x, and a user hardly any gain at batch 1."""
    own = ROWS[ROWS.network.str.startswith("ResNeXt-101")]
    assert own.error.abs().max() < 0.05


def test_the_newer_kernels_are_learnt_from_older_versions_only():
    def published(version, ratio, batch=8):
        name = f"TensorRT {version} tree"
        return {"network": "BERT-large seq 384", "batch": batch, "ratio": ratio, "library": name}

    table = pd.DataFrame(
        [
            published("8.0", 1.4),
            published("10.0", 1.26),
            published("10.15", 9.0),
            published("8.0", 2.0, batch=1),
            published("10.0", 1.0, batch=1),
        ]
    )
    assert published_networks.newer_kernels(table) == pytest.approx(0.9)
    rows = [
        {"library": "TensorRT 10.15", "gpu": "a100-sxm", "predicted": 1.3, "error": 0.1},
        {"library": "TensorRT 8.0", "gpu": "a100-sxm", "predicted": 1.3, "error": 0.1},
    ]
    new, old = published_networks.with_newer_kernels(rows, 0.9)
    assert new["adjusted"] == pytest.approx(1.17)
    assert new["adjusted_error"] == pytest.approx(-0.03)
    assert old == rows[1]


def test_the_picture_has_a_panel_for_each_network_and_library():
    groups = ROWS.groupby(["network", "gpu", "library"]).ngroups
    figure = plot_published(ROWS)
    assert sum(axis.axison for axis in figure.axes) == groups
