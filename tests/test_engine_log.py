import json
import math
import re

import numpy as np
import pytest
from conftest import SHAPE
from hypothesis import given
from hypothesis import strategies as st

from helpers.inference.channels_last import rewrite_1x1_as_matmul
from helpers.inference.engine_log import (
    CHOSEN,
    ELIGIBLE,
    kernel_times,
    last_report,
    leaving_int8,
    product_sizes,
    read_sparsity,
    read_tactics,
    sparse_count,
    sparse_layers,
    why_dense,
)
from helpers.inference.quantization import quantize_for_tensorrt
from helpers.sparsity.verify import verify_onnx
from helpers.tutorial.settings import project_root

REPORT = [
    "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: conv_a, conv_b + relu",
    "(Sparsity) Chose 1 layer(s) using sparse tactics: conv_b + relu",
]

TENSORRT_8 = [
    "[V] something else",
    "(Sparsity) Layers eligible for sparse math: conv_a, conv_b + relu",
    "(Sparsity) TRT inference plan picked sparse implementation for layers: conv_b + relu",
]

TENSORRT_10 = [f"[V] {line}" for line in REPORT]


@pytest.mark.parametrize("log", [TENSORRT_8, TENSORRT_10, tuple(TENSORRT_10)])
def test_the_lists_of_tensorrt_8_and_of_10_and_11_are_read(log):
    assert sparse_layers(log, ELIGIBLE) == ("conv_a", "conv_b + relu")
    assert sparse_layers(log, CHOSEN) == ("conv_b + relu",)
    assert (sparse_count(log, ELIGIBLE), sparse_count(log, CHOSEN)) == (2, 1)


@pytest.mark.parametrize("first", [TENSORRT_8, TENSORRT_10])
def test_of_several_reports_the_last_pair_counts(first):
    last = [
        "(Sparsity) Found 3 layer(s) eligible to use sparse tactics: x, y, z",
        "(Sparsity) Chose 2 layer(s) using sparse tactics: x, z",
    ]
    log = [*first, "between", *last, "after"]
    assert last_report(log) == [*last, "after"]
    assert sparse_layers(log, ELIGIBLE) == ("x", "y", "z")
    assert sparse_layers(log, CHOSEN) == ("x", "z")


def test_choices_of_an_earlier_pass_are_ignored():
    unfinished = [*TENSORRT_10, "(Sparsity) Found 1 layer(s) eligible to use sparse tactics: x"]
    assert sparse_layers(last_report(unfinished), ELIGIBLE) == ("x",)
    assert sparse_layers(last_report(unfinished), CHOSEN) is None
    assert last_report(["no", "word"]) == []


def test_counted_layers_without_names_are_not_none():
    log = [
        "(Sparsity) Found 39 layer(s) eligible to use sparse tactics",
        "(Sparsity) Chose 0 layer(s) using sparse tactics",
    ]
    assert sparse_layers(log, ELIGIBLE) is None
    assert sparse_count(log, ELIGIBLE) == 39
    assert sparse_layers(log, CHOSEN) == ()
    assert sparse_count(log, CHOSEN) == 0


def test_no_report_is_not_a_report_of_none():
    silent = ["Building engine", "conv_a uses sparse weights"]
    assert sparse_layers(silent, ELIGIBLE) is None
    assert sparse_count(silent, ELIGIBLE) is None
    assert sparse_layers([], CHOSEN) is None
    log = [
        "(Sparsity) Found 0 layer(s) eligible to use sparse tactics",
        "(Sparsity) Chose 0 layer(s) using sparse tactics: ",
    ]
    assert sparse_layers(log, ELIGIBLE) == ()
    assert sparse_layers(log, CHOSEN) == ()
    old = ["(Sparsity) TRT inference plan picked sparse implementation for layers:"]
    assert sparse_layers(old, CHOSEN) == ()


def test_the_log_that_notebook_05_shows_is_read():
    path = project_root() / "data" / "reference" / "builder_log.json"
    recorded = json.loads(path.read_text())
    assert recorded["url"].startswith("https://github.com/NVIDIA/TensorRT/issues/")
    report = read_sparsity(recorded["log"])
    assert (report.eligible_count, report.chosen_count) == (50, 0)
    assert report.dense == report.eligible
    assert all(re.fullmatch(r"(Conv|MatMul|Gemm)_\d+", name) for name in report.eligible)


NAMES = st.sampled_from(
    ["conv", "/layer1/conv + /Relu", "conv + PWN(PWN(a, b), c)", "{f[a...b], g}"]
)


@given(st.lists(NAMES))
def test_names_with_commas_stay_whole(names):
    log = [f"(Sparsity) Chose {len(names)} layer(s) using sparse tactics: {', '.join(names)}"]
    assert sparse_layers(log, CHOSEN) == tuple(names)


TRIALS = [
    "--------------- Timing Runner: conv_a (CaskConvolution[0x80000009])",
    "Tactic Name: sm80_xmma_fprop Tactic: 0x0000000000000001 Time: 0.02",
    "Tactic Name: sm80_xmma_sparse_conv Tactic: 0x0000000000000002 Time: 0.03",
    "Tactic Name: sm80_xmma_other Tactic: 0x0000000000000003 Time: inf",
    "Fastest Tactic: 0x0000000000000001 Time: 0.02",
    "--------------- Timing Runner: conv_b + relu (CaskConvolution)",
    "Tactic Name: sm80_xmma_fprop Tactic: 0x0000000000000001 Time: 1e-05",
    "--------------- Timing Runner: conv_c (CaskGemmConvolution[0x80000009])",
    "Tactic Name: sm90_xmma_sparse_gemm Tactic: 0x0000000000000004 Time: 0.5",
    "Tactic Name: sm80_xmma_fprop Tactic: 0x0000000000000001 Time: 1.25",
    "--------------- Timing Runner: conv_a (CaskConvolution[0x80000009])",
    "Tactic Name: sm80_xmma_fprop Tactic: 0x0000000000000001 Time: 0.01",
    "Tactic Name: sm80_xmma_sparse_conv Tactic: 0x0000000000000002 Time: 0.04",
    "--------------- Timing Runner: {ForeignNode[a...b]} (Myelin[0x80000023])",
    "Tactic: 0x0000000000000000 Time: 18.7728",
]


def test_the_fastest_trial_of_each_kernel_is_kept_for_each_layer():
    assert kernel_times(TRIALS) == {
        "conv_a": {"sm80_xmma_fprop": 0.01, "sm80_xmma_sparse_conv": 0.03},
        "conv_b + relu": {"sm80_xmma_fprop": 1e-05},
        "conv_c": {"sm90_xmma_sparse_gemm": 0.5, "sm80_xmma_fprop": 1.25},
    }


def test_logged_times_tell_why_a_layer_runs_dense(tmp_path):
    layers = ("conv_a", "conv_b + relu", "conv_c")
    assert why_dense(layers, kernel_times(TRIALS), tmp_path / "not_needed.onnx") == {
        "conv_a": "slower: 0.03 ms sparse, 0.01 ms dense",
        "conv_b + relu": "no sparse kernel was tried",
        "conv_c": (
            "faster alone (0.5 ms sparse, 1.25 ms dense), "
            "so something around it decided, such as layouts"
        ),
    }


def test_without_times_the_size_of_a_layer_is_named(exported):
    path = exported[1]["fp16"]
    table = verify_onnx(path)
    conv = table.node[table.op == "Conv"].iloc[-1]
    reasons = why_dense((f"{conv} + relu",), {}, path)
    assert reasons == {
        f"{conv} + relu": "small: 16 outputs, each a sum of 8; sparse kernels tend to win from "
        "256 on"
    }


def test_an_unknown_reason_is_not_invented(exported):
    reasons = why_dense(("{ForeignNode[a...b]}",), {}, exported[1]["fp16"])
    assert list(reasons.values()) == ["the builder chose a dense kernel and logged no times"]


def test_a_layer_without_a_tactic_of_its_own_has_an_empty_name():
    layers = [
        {"Name": "reformat", "LayerType": "Reformat"},
        {"Name": "conv_a", "TacticName": "sm80_xmma_fprop", "HasSparseWeights": 1},
    ]
    tactics = read_tactics(json.dumps({"Layers": layers}))
    assert tactics == {"reformat": "", "conv_a": "sm80_xmma_fprop"}


def test_the_sizes_of_products_are_read_from_the_shapes_alone(exported, tmp_path):
    path = exported[1]["fp32"]
    products = tmp_path / "products.onnx"
    rewrite_1x1_as_matmul(path, products, (1, 28, 28))
    for file in (path, products):
        table = verify_onnx(file)
        rows = table[table.eligible]
        expected = {
            node: (shape[0], math.prod(shape[1:]))
            for node, shape in zip(rows.node, rows["shape"], strict=True)
        }
        assert len(expected) == 2
        sizes = product_sizes(file)
        assert {node: sizes[node] for node in expected} == expected


@pytest.fixture(scope="module")
def quantised(resnext_files, tmp_path_factory):
    """The FP16 file of the pruned ResNeXt, and the INT8 file made from it."""
    path = tmp_path_factory.mktemp("int8") / "int8.onnx"
    images = np.random.default_rng(0).standard_normal((8, *SHAPE), np.float32)
    quantize_for_tensorrt(resnext_files["fp16"], path, images)
    return resnext_files["fp16"], path


def test_a_quantised_file_has_the_sizes_of_its_source(quantised):
    source, int8 = map(product_sizes, quantised)
    assert len(source) > 10
    assert int8 == source


def test_only_the_last_layer_of_a_quantised_network_leaves_int8(quantised):
    source, int8 = quantised
    *convs, last = product_sizes(int8)
    assert leaving_int8(int8) == {last}
    assert leaving_int8(source) == set()
    reasons = why_dense((f"{convs[-1]} + relu", last), {}, int8)
    assert list(reasons.values())[1].startswith("its result is not quantised")
    assert "its result" not in next(iter(reasons.values()))


def test_the_last_report_is_read_with_the_layers_that_stay_dense():
    report = read_sparsity(["start", *TENSORRT_8, *TENSORRT_10])
    assert (report.eligible_count, report.chosen_count) == (2, 1)
    assert report.dense == ("conv_a",)
    counted = read_sparsity([line.partition(":")[0] for line in REPORT])
    assert (counted.eligible_count, counted.eligible, counted.dense) == (2, None, ())
