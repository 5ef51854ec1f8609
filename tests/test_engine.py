import ast
import copy
import importlib
import inspect
import json
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from helpers import sparsity
from helpers.errors import InputError
from helpers.inference import engine, runners
from helpers.inference.channels_last import rewrite_1x1_as_matmul
from helpers.inference.engine import (
    Builder,
    build_engine,
    build_engine_for_shapes,
    build_with_controls,
    find_builder,
    why_no_builder,
)
from helpers.inference.engine_log import product_sizes
from helpers.inference.errors import EngineError
from helpers.inference.export import export_onnx
from helpers.inference.quantization import quantize_for_tensorrt

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


def test_without_a_gpu_tensorrt_rtx_builds(no_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.7"))
    found = find_builder()
    assert (found.name, found.version) == ("TensorRT-RTX", "1.7")
    assert "no GPU was found" in found.why


def test_with_a_gpu_tensorrt_comes_first(fake_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4"))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.7"))
    assert (find_builder().name, find_builder().version) == ("TensorRT", "11.4")


def test_a_tensorrt_that_does_not_load_is_passed_over_with_its_reason(fake_gpu, monkeypatch):
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


def test_an_old_tensorrt_is_passed_over_with_its_reason(fake_gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="8.6.1.post1"))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.7"))
    found = find_builder()
    assert found.name == "TensorRT-RTX"
    assert "TensorRT 8.6.1.post1 is too old" in found.why


def test_an_old_tensorrt_is_not_even_imported(fake_gpu, monkeypatch):
    """TensorRT-RTX may not load beside it."""
    monkeypatch.setattr(metadata, "version", lambda name: {"tensorrt": "8.6.1"}[name])
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", SimpleNamespace(__version__="1.7"))
    assert "TensorRT 8.6.1 is too old; version 10 or newer" in find_builder().why


@pytest.mark.parametrize("gpu", ["no_gpu", "fake_gpu"])
def test_a_missing_builder_says_how_to_install_one(gpu, request, monkeypatch):
    request.getfixturevalue(gpu)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(EngineError) as raised:
        find_builder()
    message = str(raised.value)
    assert why_no_builder() == message
    assert "pip install tensorrt-rtx-cu13" in message
    assert "no engine can be built" in message
    assert "\n" not in message


def test_with_a_builder_there_is_no_reason_against_one(rtx):
    assert why_no_builder() == ""


def test_an_engine_is_built_without_a_gpu_and_reported(rtx, exported, tmp_path):
    plan = tmp_path / "net.engine"
    report = build_engine(
        exported[1]["fp16"], plan, SHAPE, BATCHES, compute_capability="8.9", builder=rtx
    )
    assert plan.stat().st_size == round(report.megabytes * 1e6) > 1000
    assert report.built_for == "compute capability 8.9"
    assert (report.builder, report.version) == (rtx.name, rtx.version)
    assert report.sparse_flag
    assert report.seconds > 0
    assert report.log
    assert all(isinstance(line, str) for line in report.log)
    # TensorRT-RTX prints no sparsity report, and none may be claimed for it.
    assert report.eligible is None
    assert report.chosen is None
    assert (report.eligible_count, report.chosen_count) == (None, None)
    assert report.tactics is None  # and its kernels are chosen where the engine runs
    assert "no sparsity report" in repr(report)
    assert set(report.facts()) == set(vars(report)) - {"log"}


@pytest.mark.parametrize("capability", engine.RTX_COMPUTE_CAPABILITIES)
def test_every_compute_capability_that_is_offered_can_be_built_for(
    rtx, exported, tmp_path, capability
):
    plan = tmp_path / "net.engine"
    build_engine(
        exported[1]["fp16"], plan, SHAPE, BATCHES, compute_capability=capability, builder=rtx
    )
    assert plan.stat().st_size > 1000


def test_a_network_of_products_builds_too(rtx, exported, tmp_path):
    rewrite_1x1_as_matmul(exported[1]["fp16"], tmp_path / "products.onnx", SHAPE)
    build_engine(tmp_path / "products.onnx", tmp_path / "e", SHAPE, BATCHES, builder=rtx)
    assert (tmp_path / "e").stat().st_size > 1000


@pytest.fixture(scope="module")
def int8_files(exported, tmp_path_factory):
    """The INT8 files of the tiny network and of its dense control."""
    folder = tmp_path_factory.mktemp("int8")
    torch.manual_seed(0)
    images = torch.randn(16, *SHAPE)
    model, files = exported
    dense = copy.deepcopy(model)
    for parameter in dense.parameters():
        torch.nn.init.normal_(parameter)
    sources = {
        "sparse": files["fp16"],
        "dense": export_onnx(dense, folder / "dense_fp16.onnx", SHAPE, half=True),
    }
    for name, source in sources.items():
        quantize_for_tensorrt(source, folder / f"{name}.onnx", images)
    return {name: folder / f"{name}.onnx" for name in sources}


def test_int8_files_are_built_with_their_controls(rtx, int8_files, tmp_path):
    reports = build_with_controls(
        int8_files["dense"], int8_files["sparse"], tmp_path, SHAPE, BATCHES
    )
    assert [report.sparse_flag for report in reports.values()] == [True, True, False]
    assert {report.builder for report in reports.values()} == {"TensorRT-RTX"}
    assert all((tmp_path / f"{name}.engine").stat().st_size > 0 for name in reports)
    assert all(report.eligible_count is None for report in reports.values())


@pytest.mark.parametrize(
    ("here", "capability"), [((8, 9), "8.9"), ((9, 0), engine.DEFAULT_COMPUTE_CAPABILITY)]
)
def test_the_default_is_this_machines_gpu_where_tensorrt_rtx_knows_it(
    rtx, fake_gpu, monkeypatch, exported, tmp_path, here, capability
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: here)
    report = build_engine(exported[1]["fp16"], tmp_path / "e", SHAPE, BATCHES, builder=rtx)
    assert report.built_for == f"compute capability {capability}"


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
        def __init__(self, total: int, desc: str) -> None:
            self.total, self.desc, self.n, self.closed = total, desc, 0, False
            bars.append(self)

        def update(self, steps: int) -> None:
            assert steps >= 0
            self.n += steps

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(engine, "progress_bar", Bar)
    build_engine(exported[1]["fp16"], tmp_path / "e", SHAPE, BATCHES, builder=rtx)
    (bar,) = bars
    assert bar.desc == "Building engine"
    assert bar.n == bar.total > 1
    assert bar.closed


def test_an_unknown_compute_capability_is_refused_with_the_known_ones(rtx, exported, tmp_path):
    with pytest.raises(InputError, match=r"capability 9\.0\. Choose one of 7\.5, 8\.0, 8\.6"):
        build_engine(
            exported[1]["fp16"],
            tmp_path / "e",
            SHAPE,
            BATCHES,
            compute_capability="9.0",
            builder=rtx,
        )


def test_tensorrt_takes_no_compute_capability(trt, exported, tmp_path):
    full = Builder("TensorRT", trt, "11.4", "a fake one: the interfaces agree up to here")
    with pytest.raises(InputError, match="leave `compute_capability` out"):
        build_engine(
            exported[1]["fp16"],
            tmp_path / "e",
            SHAPE,
            BATCHES,
            compute_capability="8.6",
            builder=full,
        )


@pytest.mark.parametrize("level", [0, 5])
def test_the_optimisation_level_reaches_the_builder(
    rtx, trt, exported, tmp_path, monkeypatch, level
):
    seen = []
    real = trt.Builder.build_serialized_network

    def spy(self, network, config):
        seen.append(config.builder_optimization_level)
        return real(self, network, config)

    monkeypatch.setattr(trt.Builder, "build_serialized_network", spy)
    path = exported[1]["fp16"]
    report = build_engine(
        path, tmp_path / "e", SHAPE, BATCHES, builder=rtx, optimization_level=level
    )
    assert seen == [report.optimization_level] == [level]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"profile_batch_sizes": (4, 2, 8)}, "smallest, best and largest batch size"),
        ({"profile_batch_sizes": (0, 2, 8)}, "smallest, best and largest batch size"),
        ({"optimization_level": 6}, "0 to 5, not 6"),
        ({"timing_cache": Path("times")}, "Only TensorRT has a timing cache"),
    ],
)
def test_arguments_out_of_range_are_refused(rtx, exported, tmp_path, changes, message):
    arguments = {"image_shape": SHAPE, "profile_batch_sizes": BATCHES, "builder": rtx} | changes
    with pytest.raises(InputError, match=message):
        build_engine(exported[1]["fp16"], tmp_path / "e", **arguments)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("content", [b"no", b"", b"this is no model"])
def test_a_file_that_is_not_onnx_is_refused_by_its_name(rtx, tmp_path, content):
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.onnx is not an ONNX file that TensorRT-RTX can"):
        build_engine(tmp_path / "x.onnx", tmp_path / "e", SHAPE, BATCHES, builder=rtx)
    assert not (tmp_path / "e").exists()


def test_a_missing_onnx_file_says_how_to_make_it(rtx, tmp_path):
    with pytest.raises(InputError, match=r"x\.onnx is missing\. .* with export_onnx"):
        build_engine(tmp_path / "x.onnx", tmp_path / "e", SHAPE, BATCHES, builder=rtx)


@pytest.fixture
def two_inputs(tmp_path):
    """A file with inputs of two types, one of an open shape, and two outputs."""
    nodes = [
        helper.make_node("Cast", ["mask"], ["float"], to=TensorProto.FLOAT16),
        helper.make_node("Mul", ["x", "float"], ["y"]),
        helper.make_node("Relu", ["y"], ["z"]),
    ]
    shape = ["n", 4]
    graph = helper.make_graph(
        nodes,
        "graph",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT16, shape),
            helper.make_tensor_value_info("mask", TensorProto.INT64, [1, 4]),
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT16, shape) for name in "yz"],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, tmp_path / "two.onnx")
    return tmp_path / "two.onnx"


def test_an_engine_has_any_inputs_and_outputs(rtx, two_inputs, tmp_path):
    shapes = {"x": ((1, 4), (2, 4), (8, 4))}
    build_engine_for_shapes(two_inputs, tmp_path / "e", shapes, builder=rtx)
    assert (tmp_path / "e").stat().st_size > 1000


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({}, r"two\.onnx needs shapes for x; its inputs are x, mask"),
        ({"images": ((1,), (1,), (1,))}, r"two\.onnx has no input images; its inputs are x, mask"),
        ({"x": ((2, 4), (1, 4), (8, 4))}, r"cannot go from \(2, 4\) by \(1, 4\) to \(8, 4\)"),
        ({"x": ((1, 4), (1, 4), (8,))}, r"cannot go from"),
    ],
)
def test_shapes_that_do_not_fit_an_engine_are_refused(rtx, two_inputs, tmp_path, shapes, message):
    with pytest.raises(InputError, match=message):
        build_engine_for_shapes(two_inputs, tmp_path / "e", shapes, builder=rtx)
    assert not (tmp_path / "e").exists()


def test_a_failed_build_gives_the_builders_reason_and_leaves_the_old_engine(
    rtx, exported, tmp_path
):
    plan = tmp_path / "net.engine"
    plan.write_bytes(b"the engine of yesterday")
    with pytest.raises(EngineError, match=r"could not build .*fp16\.onnx: .*[Dd]imension mismatch"):
        build_engine(exported[1]["fp16"], plan, (3, 28, 28), BATCHES, builder=rtx)
    assert plan.read_bytes() == b"the engine of yesterday"
    assert [path.name for path in tmp_path.iterdir()] == ["net.engine"]


REPORT = [
    "(Sparsity) Found 2 layer(s) eligible to use sparse tactics: conv_a, conv_b + relu",
    "(Sparsity) Chose 1 layer(s) using sparse tactics: conv_b + relu",
]

INFORMATION = json.dumps(
    {
        "Layers": [
            {"Name": "reformat", "LayerType": "Reformat"},
            {"Name": "conv_a", "TacticName": "sm80_xmma_fprop", "HasSparseWeights": 1},
            {"Name": "conv_b + relu", "TacticName": "sm80_xmma_sparse_conv", "HasSparseWeights": 1},
        ]
    }
)


class Gpu:
    """What a GPU would answer; a test changes the answers, and reads what was asked."""

    def __init__(self) -> None:
        self.log = REPORT
        self.plan_loads = True
        self.caches: list[bytes] = []
        self.cache_fits = True
        self.typed: list[bool] = []
        self.flags: list[bool] = []


@pytest.fixture
def gpu(trt, fake_gpu, monkeypatch) -> Gpu:
    gpu = Gpu()
    real = {
        name: getattr(trt.Builder, name) for name in ("create_network", "build_serialized_network")
    }
    strongly_typed = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def create_network(self, flags=0):
        gpu.typed.append(flags == strongly_typed)
        return real["create_network"](self, flags)

    def build_serialized_network(self, network, config):
        gpu.flags.append(config.get_flag(trt.BuilderFlag.SPARSE_WEIGHTS))
        for line in gpu.log:
            self.logger.log(trt.ILogger.VERBOSE, line)
        return real["build_serialized_network"](self, network, config)

    class Runtime:
        def __init__(self, logger: object) -> None:
            self.logger = logger

        def deserialize_cuda_engine(self, plan: object) -> object:
            if not gpu.plan_loads:
                self.logger.log(trt.ILogger.ERROR, "out of memory")
                return None
            inspector = SimpleNamespace(get_engine_information=lambda style: INFORMATION)
            return SimpleNamespace(create_engine_inspector=lambda: inspector)

    def create_timing_cache(self, content: bytes) -> object:
        gpu.caches.append(content)
        return SimpleNamespace() if gpu.cache_fits is not None else None

    monkeypatch.setattr(trt.Builder, "create_network", create_network)
    monkeypatch.setattr(trt.Builder, "build_serialized_network", build_serialized_network)
    monkeypatch.setattr(trt, "Runtime", Runtime)
    config = trt.IBuilderConfig
    monkeypatch.setattr(config, "create_timing_cache", create_timing_cache)
    monkeypatch.setattr(
        config, "set_timing_cache", lambda self, cache, ignore_mismatch: gpu.cache_fits
    )
    times = SimpleNamespace(serialize=lambda: b"times of " + gpu.caches[-1])
    monkeypatch.setattr(config, "get_timing_cache", lambda self: times)
    return gpu


@pytest.fixture
def tensorrt(trt, gpu) -> Builder:
    return Builder("TensorRT", trt, "11.4", "the test asks for it")


def test_the_report_has_the_log_of_tensorrt_and_the_kernels_of_the_engine(
    tensorrt, exported, tmp_path
):
    report = build_engine(exported[1]["fp16"], tmp_path / "e", SHAPE, BATCHES, builder=tensorrt)
    assert report.built_for == "a fake GPU"
    assert (report.eligible_count, report.chosen_count) == (2, 1)
    assert report.eligible == ("conv_a", "conv_b + relu")
    assert report.chosen == ("conv_b + relu",)
    assert set(report.reasons) == {"conv_a"}
    assert list(report.sparse_tactics) == ["conv_b + relu"]
    assert report.disagreements() == ()
    assert set(report.facts()) == set(vars(report)) - {"log"}
    json.dumps(report.facts())


def test_layers_that_tensorrt_only_counts_are_reported_as_counted(
    tensorrt, gpu, exported, tmp_path
):
    gpu.log = [line.partition(":")[0] for line in REPORT]
    report = build_engine(exported[1]["fp16"], tmp_path / "e", SHAPE, BATCHES, builder=tensorrt)
    assert (report.eligible_count, report.chosen_count) == (2, 1)
    assert report.eligible is report.chosen is None
    assert report.reasons == {}


def test_an_engine_that_does_not_load_again_is_not_written(tensorrt, gpu, exported, tmp_path):
    gpu.plan_loads = False
    with pytest.raises(EngineError, match=r"does not load the engine .* out of memory"):
        build_engine(exported[1]["fp16"], tmp_path / "e", SHAPE, BATCHES, builder=tensorrt)
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize(("version", "asked"), [("10.14.1", True), ("11.4", False)])
def test_a_network_is_strongly_typed_in_tensorrt_10_too(
    trt, gpu, exported, tmp_path, version, asked
):
    builder = Builder("TensorRT", trt, version, "the test asks for it")
    build_engine(exported[1]["fp16"], tmp_path / "e", SHAPE, BATCHES, builder=builder)
    assert gpu.typed == [asked]


def test_each_build_starts_from_the_times_of_the_one_before(tensorrt, gpu, exported, tmp_path):
    cache = tmp_path / "timing.cache"
    for _ in range(2):
        build_engine(
            exported[1]["fp16"],
            tmp_path / "e",
            SHAPE,
            BATCHES,
            builder=tensorrt,
            timing_cache=cache,
        )
    assert gpu.caches == [b"", b"times of "]
    assert cache.read_bytes() == b"times of times of "


@pytest.mark.parametrize("answer", [False, None])
def test_a_timing_cache_that_does_not_fit_is_refused_by_its_name(
    tensorrt, gpu, exported, tmp_path, answer
):
    gpu.cache_fits = answer
    cache = tmp_path / "timing.cache"
    cache.write_bytes(b"another GPU's")
    with pytest.raises(InputError, match=r"timing\.cache is not a timing cache of TensorRT 11\.4"):
        build_engine(
            exported[1]["fp16"],
            tmp_path / "e",
            SHAPE,
            BATCHES,
            builder=tensorrt,
            timing_cache=cache,
        )
    assert cache.read_bytes() == b"another GPU's"


def test_without_a_timing_cache_none_is_made(tensorrt, gpu, exported, tmp_path):
    build_engine(exported[1]["fp16"], tmp_path / "e", SHAPE, BATCHES, builder=tensorrt)
    assert gpu.caches == []
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


def test_the_controls_are_built_like_the_sparse_engine(tensorrt, gpu, exported, tmp_path):
    dense, sparse = exported[1]["fp32"], exported[1]["fp16"]
    reports = build_with_controls(
        dense, sparse, tmp_path, SHAPE, BATCHES, builder=tensorrt, optimization_level=1
    )
    assert list(reports) == ["sparse", "dense", "sparse_without_flag"]
    assert gpu.flags == [report.sparse_flag for report in reports.values()] == [True, True, False]
    assert {report.optimization_level for report in reports.values()} == {1}
    sizes = {name: (tmp_path / f"{name}.engine").stat().st_size for name in reports}
    assert sizes["sparse"] == sizes["sparse_without_flag"] < sizes["dense"]


def test_the_report_of_an_int8_file_tells_which_layer_leaves_int8(
    tensorrt, gpu, int8_files, tmp_path
):
    *_, conv, last = product_sizes(int8_files["sparse"])
    gpu.log = [
        f"(Sparsity) Found 2 layer(s) eligible to use sparse tactics: {conv} + relu, {last}",
        "(Sparsity) Chose 0 layer(s) using sparse tactics",
    ]
    reports = build_with_controls(
        int8_files["dense"], int8_files["sparse"], tmp_path, SHAPE, BATCHES, builder=tensorrt
    )
    reasons = reports["sparse"].layers().reason
    assert reasons[0].startswith("small: 16 outputs")
    assert reasons[1].startswith("its result is not quantised")


@pytest.mark.gpu
def test_on_a_gpu_only_the_flag_and_2to4_weights_make_layers_eligible(tmp_path):
    try:
        builder = find_builder()
    except EngineError as error:
        pytest.skip(str(error))
    if builder.name != "TensorRT":
        pytest.skip(builder.why)
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 512, 3), nn.ReLU(), nn.Conv2d(512, 512, 1), nn.ReLU(), nn.Conv2d(512, 512, 3)
    )
    dense = export_onnx(net, tmp_path / "dense.onnx", (3, 16, 16), half=True)
    sparsity.prune_2to4_(net)
    sparse = export_onnx(net, tmp_path / "sparse.onnx", (3, 16, 16), half=True)
    cache = tmp_path / "timing.cache"
    reports = build_with_controls(
        dense, sparse, tmp_path, (3, 16, 16), (1, 32, 32), timing_cache=cache
    )
    assert cache.stat().st_size > 0
    assert all(report.tactics for report in reports.values())
    eligible = {name: report.eligible_count or 0 for name, report in reports.items()}
    assert eligible["sparse"] > 0
    assert eligible["dense"] == eligible["sparse_without_flag"] == 0
    assert not reports["dense"].sparse_tactics
    assert not reports["sparse_without_flag"].sparse_tactics


# What the helpers call their TensorRT objects, and the class of each.
CLASSES = {
    "build": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "problem": "ParserError",
    "config": "IBuilderConfig",
    "profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "plan": "IHostMemory",
    "runtime": "Runtime",
    "runtime_config": "IRuntimeConfig",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "inspector": "EngineInspector",
    "self.engine": "ICudaEngine",
    "self.context": "IExecutionContext",
}

MODULES = {"trt", "self.trt", "builder.module"}

# Names for what TensorRT returns that is not of its own making: text, numbers, NumPy's types.
PLAIN = {"reason", "dtype"}


def dotted(node: ast.AST) -> str:
    """Return `a.b.c` for such an expression, nothing for any other."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def from_tensorrt(node: ast.AST) -> tuple[str, str] | None:
    """Return the owner and the rest of a name of TensorRT's: ("trt", "BuilderFlag.TF32")."""
    for owner in MODULES | set(CLASSES):
        if (name := dotted(node)).startswith(owner + "."):
            return owner, name.removeprefix(owner + ".")
    return None


def resolve(trt: object, owner: str, names: str) -> object:
    place = trt if owner in MODULES else getattr(trt, CLASSES[owner])
    for name in names.split("."):
        assert hasattr(place, name), f"{owner}.{names} does not exist in TensorRT"
        place = getattr(place, name)
    return place


@pytest.fixture(params=[engine, runners], ids=["engine", "runners"])
def source(request) -> tuple[object, ast.Module]:
    return request.param, ast.parse(Path(inspect.getsourcefile(request.param)).read_text())


def test_every_name_that_the_helpers_take_from_tensorrt_exists(trt, source):
    module, tree = source
    used = {found for node in ast.walk(tree) if (found := from_tensorrt(node))}
    expected = {
        engine: {("trt", "BuilderFlag.SPARSE_WEIGHTS"), ("config", "add_optimization_profile")},
        runners: {("self.trt", "nptype"), ("self.context", "execute_async_v3")},
    }
    assert expected[module] <= used, "the names were not collected"
    for owner, names in used:
        resolve(trt, owner, names)


def test_every_keyword_that_the_helpers_give_tensorrt_exists(trt, source):
    _, tree = source
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (found := from_tensorrt(node.func)):
            signature = resolve(trt, *found).__doc__ or ""
            for keyword in node.keywords:
                assert f"{keyword.arg}:" in signature, f"{found}: {keyword.arg}"


def test_every_tensorrt_object_that_the_helpers_name_is_one_whose_class_is_known(source):
    _, tree = source
    made = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and from_tensorrt(node.value.func)
    ]
    assert made, "the assignments were not collected"
    for node in made:
        for target in node.targets:
            assert dotted(target) in set(CLASSES) | PLAIN, ast.unparse(node)


def test_the_methods_that_tensorrt_calls_have_its_names(trt):
    bases = {"Logger": trt.ILogger, "Progress": trt.IProgressMonitor}
    own = {"last_error"}  # for the helpers themselves
    for made in (engine._make_logger(trt), engine._make_progress_bar(trt)):
        base = bases.pop(type(made).__name__)
        methods = {name for name, value in vars(type(made)).items() if inspect.isfunction(value)}
        assert methods - own <= set(dir(base))
    assert not bases
