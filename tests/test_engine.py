import ast
import importlib
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers import engine, runners
from helpers.engine import (
    CHOSEN,
    ELIGIBLE,
    Builder,
    EngineError,
    EngineReport,
    build_engine,
    find_builder,
    sparse_layers,
)

SHAPE, BATCHES = (1, 28, 28), (1, 2, 8)


@pytest.fixture
def trt():
    return pytest.importorskip(
        "tensorrt_rtx", reason="TensorRT-RTX is not installed", exc_type=ImportError
    )


@pytest.fixture
def rtx(trt) -> Builder:
    return Builder("TensorRT-RTX", trt, trt.__version__, "the test asks for it")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def fake_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a fake GPU")


# --- which builder ----------------------------------------------------------------------


def test_without_a_gpu_tensorrt_rtx_builds(no_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.7"))
    found = find_builder()
    assert (found.name, found.version) == ("TensorRT-RTX", "1.7")
    assert "no GPU was found" in found.why


def test_with_a_gpu_tensorrt_comes_first(fake_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4"))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.7"))
    assert (find_builder().name, find_builder().version) == ("TensorRT", "11.4")


def test_a_tensorrt_that_does_not_load_gives_way_and_the_reason_is_kept(fake_gpu, monkeypatch):
    real = importlib.import_module
    fakes = {"tensorrt_rtx": SimpleNamespace(__version__="1.7")}

    def load(name: str) -> object:
        if name == "tensorrt":
            raise OSError("libnvinfer.so.11: cannot open shared object file")
        return fakes.get(name) or real(name)

    monkeypatch.setattr(importlib, "import_module", load)
    found = find_builder()
    assert found.name == "TensorRT-RTX"
    assert "libnvinfer.so.11" in found.why


@pytest.mark.parametrize("gpu", ["no_gpu", "fake_gpu"])
def test_no_builder_at_all_says_what_it_costs_and_how_to_get_one(gpu, request, monkeypatch):
    request.getfixturevalue(gpu)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(EngineError) as raised:
        find_builder()
    message = str(raised.value)
    assert "pip install tensorrt-rtx-cu13" in message
    assert "notebook 05 cannot run" in message
    assert "\n" not in message


# --- building ---------------------------------------------------------------------------


def test_an_engine_is_built_without_a_gpu_and_reported(rtx, exported, tmp_path):
    plan = tmp_path / "net.engine"
    report = build_engine(exported[1]["fp16"], plan, SHAPE, BATCHES, target="8.9", builder=rtx)
    assert plan.stat().st_size == round(report.megabytes * 1e6) > 1000
    assert report.target == "compute capability 8.9"
    assert (report.builder, report.version) == (rtx.name, rtx.version)
    assert report.sparse_flag
    assert report.seconds > 0
    assert report.log
    assert all(isinstance(line, str) for line in report.log)
    # TensorRT-RTX prints no sparsity report, and none may be claimed for it.
    assert report.eligible is None
    assert report.chosen is None
    assert "no sparsity report" in repr(report)
    assert set(report.facts()) == set(vars(report)) - {"log"}


@pytest.mark.parametrize("target", engine.RTX_TARGETS)
def test_every_target_that_is_offered_can_be_built_for(rtx, exported, tmp_path, target):
    plan = tmp_path / "net.engine"
    build_engine(exported[1]["fp16"], plan, SHAPE, BATCHES, target=target, builder=rtx)
    assert plan.stat().st_size > 1000


@pytest.mark.parametrize(("here", "target"), [((8, 9), "8.9"), ((9, 0), engine.DEFAULT_TARGET)])
def test_the_target_is_this_machines_gpu_where_tensorrt_rtx_knows_it(
    rtx, fake_gpu, monkeypatch, exported, tmp_path, here, target
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: here)
    report = build_engine(exported[1]["fp16"], tmp_path / "e", SHAPE, BATCHES, builder=rtx)
    assert report.target == f"compute capability {target}"


@pytest.mark.parametrize("sparse", [True, False])
def test_the_sparse_flag_reaches_the_builder(rtx, trt, exported, tmp_path, monkeypatch, sparse):
    seen = []
    real = trt.Builder.build_serialized_network

    def spy(self, network, config):
        seen.append(config.get_flag(trt.BuilderFlag.SPARSE_WEIGHTS))
        return real(self, network, config)

    monkeypatch.setattr(trt.Builder, "build_serialized_network", spy)
    path = exported[1]["fp16"]
    report = build_engine(path, tmp_path / "e", SHAPE, BATCHES, sparse=sparse, builder=rtx)
    assert seen == [sparse]
    assert report.sparse_flag == sparse


def test_one_progress_bar_is_filled_and_closed(rtx, exported, tmp_path, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, total: int, desc: str, leave: bool) -> None:
            self.total, self.desc, self.n, self.closed = total, desc, 0, False
            bars.append(self)

        def update(self, steps: int) -> None:
            assert steps >= 0
            self.n += steps

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(engine, "tqdm", Bar)
    build_engine(exported[1]["fp16"], tmp_path / "e", SHAPE, BATCHES, builder=rtx)
    (bar,) = bars
    assert bar.desc == "Building engine"
    assert bar.n == bar.total > 1
    assert bar.closed


def test_an_unknown_target_is_refused_with_the_known_ones(rtx, exported, tmp_path):
    with pytest.raises(EngineError, match=r"capability 9\.0\. Choose one of 7\.5, 8\.0, 8\.6"):
        build_engine(exported[1]["fp16"], tmp_path / "e", SHAPE, BATCHES, target="9.0", builder=rtx)


def test_tensorrt_takes_no_target(trt, exported, tmp_path):
    full = Builder("TensorRT", trt, "11.4", "a fake one: the interfaces agree up to here")
    with pytest.raises(EngineError, match="leave `target` out"):
        build_engine(
            exported[1]["fp16"], tmp_path / "e", SHAPE, BATCHES, target="8.6", builder=full
        )


@pytest.mark.parametrize("content", [b"no", b"", b"this is no model"])
def test_a_file_that_is_not_onnx_is_refused_by_its_name(rtx, tmp_path, content):
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(EngineError, match=r"x\.onnx is not an ONNX file that TensorRT-RTX can"):
        build_engine(tmp_path / "x.onnx", tmp_path / "e", SHAPE, BATCHES, builder=rtx)
    assert not (tmp_path / "e").exists()


def test_a_missing_onnx_file_names_its_notebook(rtx, tmp_path):
    with pytest.raises(EngineError, match=r"x\.onnx is missing\. Run 04_export_onnx\.ipynb"):
        build_engine(tmp_path / "x.onnx", tmp_path / "e", SHAPE, BATCHES, builder=rtx)


def test_a_failed_build_gives_the_builders_reason_and_leaves_the_old_engine(
    rtx, exported, tmp_path
):
    plan = tmp_path / "net.engine"
    plan.write_bytes(b"the engine of yesterday")
    with pytest.raises(EngineError, match=r"could not build fp16\.onnx: .*[Dd]imension mismatch"):
        build_engine(exported[1]["fp16"], plan, (3, 28, 28), BATCHES, builder=rtx)
    assert plan.read_bytes() == b"the engine of yesterday"
    assert [path.name for path in tmp_path.iterdir()] == ["net.engine"]


# --- what the log says about sparsity ------------------------------------------------------

TENSORRT_8 = [
    "[V] something else",
    "(Sparsity) Layers eligible for sparse math: conv_a, conv_b + relu",
    "(Sparsity) TRT inference plan picked sparse implementation for layers: conv_b + relu",
]
TENSORRT_10 = [
    "[V] (Sparsity) Found 2 layer(s) eligible to use sparse tactics: conv_a, conv_b + relu",
    "[V] (Sparsity) Chose 1 layer(s) using sparse tactics: conv_b + relu",
]


@pytest.mark.parametrize("log", [TENSORRT_8, TENSORRT_10, tuple(TENSORRT_10)])
def test_sparse_layers_reads_the_lists_of_tensorrt_8_and_of_10_and_11(log):
    assert sparse_layers(log, ELIGIBLE) == ("conv_a", "conv_b + relu")
    assert sparse_layers(log, CHOSEN) == ("conv_b + relu",)


@pytest.mark.parametrize("first", [TENSORRT_8, TENSORRT_10])
def test_of_several_reports_the_last_pair_counts(first):
    last = [
        "(Sparsity) Found 3 layer(s) eligible to use sparse tactics: x, y, z",
        "(Sparsity) Chose 2 layer(s) using sparse tactics: x, z",
    ]
    log = [*first, "between", *last, "after"]
    assert sparse_layers(log, ELIGIBLE) == ("x", "y", "z")
    assert sparse_layers(log, CHOSEN) == ("x", "z")


def test_no_report_is_not_a_report_of_none():
    silent = ["Building engine", "conv_a uses sparse weights"]
    assert sparse_layers(silent, ELIGIBLE) is None
    assert sparse_layers([], CHOSEN) is None
    log = [
        "(Sparsity) Found 0 layer(s) eligible to use sparse tactics",
        "(Sparsity) Chose 0 layer(s) using sparse tactics: ",
    ]
    assert sparse_layers(log, ELIGIBLE) == ()
    assert sparse_layers(log, CHOSEN) == ()


def report(**changes: object) -> EngineReport:
    values = {
        "builder": "TensorRT", "version": "11.4", "target": "A100", "sparse_flag": True,
        "megabytes": 1.5, "seconds": 2.0, "eligible": ("a", "b", "c"), "chosen": ("c",), "log": (),
    }  # fmt: skip
    return EngineReport(**(values | changes))


def test_the_report_lists_each_eligible_layer_and_whether_it_runs_sparse():
    table = report().layers()
    assert list(table.columns) == ["layer", "sparse kernel"]
    assert dict(table.to_numpy()) == {"a": False, "b": False, "c": True}
    assert repr(report()) == (
        "TensorRT 11.4 for A100: 1.50 MB in 2.0 s, 1 of 3 eligible layers sparse"
    )


def test_eligible_and_none_chosen_is_told_so():
    assert "0 of 3 eligible layers sparse" in repr(report(chosen=None))
    assert not report(chosen=()).layers()["sparse kernel"].any()


def test_a_builder_without_a_sparsity_report_has_no_table():
    with pytest.raises(EngineError, match=r"TensorRT 11\.4 prints no sparsity report"):
        report(eligible=None, chosen=None).layers()


# --- the interface that the helpers rely on -----------------------------------------------

# What the helpers call their TensorRT objects, and the class of each.
CLASSES = {
    "build": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "plan": "IHostMemory",
    "self.runtime": "Runtime",
    "self.engine": "ICudaEngine",
    "self.context": "IExecutionContext",
}
MODULES = {"trt", "self.trt", "builder.module"}


def chains(source: str) -> set[tuple[str, str]]:
    """Return (owner, attribute) of every dotted name in a source: ("trt", "Builder")."""

    def dotted(node: ast.AST) -> str | None:
        if isinstance(node, ast.Name):
            return node.id
        if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
            return f"{owner}.{node.attr}"
        return None

    found = set()
    for node in ast.walk(ast.parse(source)):
        name = dotted(node) if isinstance(node, ast.Attribute) else None
        for owner in MODULES | set(CLASSES):
            if name and name.startswith(owner + "."):
                found.add((owner, name.removeprefix(owner + ".")))
    return found


@pytest.mark.parametrize("module", [engine, runners])
def test_every_name_that_the_helpers_take_from_tensorrt_exists(trt, module):
    used = chains(Path(inspect.getsourcefile(module)).read_text())
    expected = {
        engine: {("trt", "BuilderFlag.SPARSE_WEIGHTS"), ("config", "add_optimization_profile")},
        runners: {("self.trt", "nptype"), ("self.context", "execute_async_v3")},
    }
    assert expected[module] <= used, "the names were not collected"
    for owner, attributes in used:
        place = trt if owner in MODULES else getattr(trt, CLASSES[owner])
        for attribute in attributes.split("."):
            assert hasattr(place, attribute), f"{owner}.{attributes} does not exist in TensorRT"
            place = getattr(place, attribute)
