import json
import logging
import os
import re
import subprocess
import sys
import warnings

import numpy as np
import onnx
import pytest
import torch
import typer.main
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torchvision.models.resnet import Bottleneck, ResNet
from typer.testing import CliRunner

from helpers.errors import HelpersError, InputError, WriteError
from helpers.files import sha256
from helpers.inference.errors import RunnerError
from helpers.inference.export import export_onnx
from helpers.measurement.benchmark import BenchmarkError
from helpers.metrics import Comparison
from helpers.sparsity import eligible_weights, is_2to4, prune_2to4_, save_compressed
from helpers.training.loop import TrainingInterrupted
from helpers.training.networks import create_model, load_checkpoint, save_checkpoint
from helpers.tutorial import commands, learner_copies, own_models, setup, steps
from helpers.tutorial.artifacts import NOTEBOOKS, Artifacts
from helpers.tutorial.checks import CheckError, TutorialError
from helpers.tutorial.settings import project_root

COMMANDS = [
    "setup", "evaluate", "prune", "retrain", "export", "build", "benchmark", "summary", "verify",
    "pretrain", "dense-control", "save-reference", "tutorial", "advise", "report", "load-test",
    "quantize", "repository", "serve", "learn", "catch-up",
]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads on networks this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(command_line):
    return command_line


def test_help_lists_the_commands():
    result = CliRunner().invoke(commands.app, ["--help"], env={"COLUMNS": "100"})
    assert result.exit_code == 0
    listed = [line.strip(" │").partition(" ")[0] for line in result.output.splitlines()]
    assert set(COMMANDS) <= set(listed)
    assert set(typer.main.get_command(commands.app).commands) == set(COMMANDS)


HEAVY = {"torch", "pandas", "onnx", "onnxruntime", "torchvision", "numba", "matplotlib", "IPython"}

HELP = """
import runpy, sys
try:
    runpy.run_module("helpers", run_name="__main__", alter_sys=True)
except SystemExit as end:
    print(end.code, *sorted(set(sys.modules)))
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["advise", "--help"], ["prune", "--help"], ["load-test", "--help"]]
)
def test_help_waits_for_no_heavy_module(arguments):
    result = subprocess.run(
        [sys.executable, "-c", HELP, *arguments],
        cwd=project_root(),
        capture_output=True,
        text=True,
        check=True,
    )
    status, *loaded = result.stdout.splitlines()[-1].split()
    assert status == "0"
    assert "helpers.tutorial.commands" in loaded
    assert not HEAVY & set(loaded)


def failing(_: object) -> None:
    raise InputError("The weight is not a matrix. Give one with two dimensions.")


def test_an_error_is_one_sentence_and_exit_2(run, monkeypatch):
    monkeypatch.setattr(setup, "check_setup", failing)
    status, _, errors = run("setup")
    assert status == 2
    assert errors == "InputError: The weight is not a matrix. Give one with two dimensions.\n"


@pytest.mark.parametrize("arguments", [["--debug", "setup"], ["setup", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(run, monkeypatch, arguments):
    monkeypatch.setattr(setup, "check_setup", failing)
    monkeypatch.setattr(sys, "argv", ["helpers", *arguments])
    with pytest.raises(HelpersError) as raised:
        commands.main()
    assert raised.traceback[-1].name == "failing"


def test_an_unexpected_error_keeps_its_traceback(run, monkeypatch):
    monkeypatch.setattr(setup, "check_setup", lambda _: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["helpers", "setup"])
    with pytest.raises(ZeroDivisionError):
        commands.main()


def test_what_the_library_logs_is_printed_once(run, monkeypatch):
    def logs(_: object) -> None:
        logging.getLogger("helpers.training.loop").info("continuing after epoch %d", 2)
        logging.getLogger("helpers.training.loop").debug("not for everybody")

    monkeypatch.setattr(setup, "check_setup", logs)
    for _ in range(2):
        assert run("setup") == (0, "continuing after epoch 2\n", "")


def test_an_unknown_preset_is_one_sentence_and_exit_2():
    result = subprocess.run(
        [sys.executable, "-m", "helpers", "setup"],
        cwd=project_root(),
        env=os.environ | {"TUTORIAL_PRESET": "enormous"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("TutorialError: There is no preset 'enormous'.")
    assert line.endswith("quick, imagenette, full")


@pytest.mark.parametrize(
    ("command", "missing", "number"),
    [
        ("prune", "01_dense.safetensors", "01"),
        ("retrain", "02_pruned.safetensors", "02"),
        ("export", "01_dense.safetensors", "01"),
        ("build", "04_dense_fp16.onnx", "04"),
        ("summary", "01_dense.safetensors", "01"),
        ("save-reference", "06_benchmark.json", "06"),
    ],
)
def test_a_step_out_of_order_names_the_notebook_to_run(run, command, missing, number):
    status, _, errors = run(command)
    assert status == 2
    (line,) = errors.splitlines()
    assert line == f"ArtifactError: {missing} is missing. Run {NOTEBOOKS[number]} first, " + (
        "from top to bottom."
    )


def test_pruning_and_retraining_follow_the_rules(run, tiny_settings):
    artifacts = Artifacts(tiny_settings)
    with artifacts.writing("01_dense.safetensors", facts={}) as path:
        save_checkpoint(create_model("resnext14_8x1d", 10), path, "resnext14_8x1d")
    status, _, errors = run("prune", "--rules", "nobodys")
    assert status == 2
    assert errors.startswith("InputError: ")
    assert "'nobodys'" in errors
    assert "tensorrt, asp, cusparselt, any" in errors
    for command in (("prune", "--rules", "any"), ("retrain",)):
        status, *said = run(*command)
        assert status == 0, said
    grouped = "layer2.0.conv2.weight"
    for name in ("02_pruned.safetensors", "03_retrained.safetensors"):
        weights = eligible_weights(load_checkpoint(artifacts.require(name)), "any")
        assert grouped in weights
        assert all(map(is_2to4, weights.values()))


def test_verify_exits_0_on_a_sparse_file_and_1_on_a_dense_one(run, exported, tiny_net, tmp_path):
    status, table, _ = run("verify", exported[1]["fp16"])
    assert status == 0
    assert "is_2to4" in table
    assert table.splitlines()[-1] == "2 of 2 eligible weights are 2:4"
    export_onnx(tiny_net, tmp_path / "dense.onnx", (1, 28, 28))
    status, table, errors = run("verify", tmp_path / "dense.onnx")
    assert status == 1
    assert "is_2to4" in table
    assert table.splitlines()[-1] == "0 of 2 eligible weights are 2:4"
    assert errors == ""


@pytest.fixture
def quantised_file(tmp_path):
    """Return a function that writes a file of a 2:4 layer, and one with an INT8 weight."""

    def write(sparse=True, unknown=False, opset=17):
        fours = np.tile(np.int8([1, 0, 0, 2] if sparse else [1, 2, 3, 4]), (4, 2))
        weights = {"w": np.tile(np.float32([0, 1, 1, 0]), (8, 2)), "q": fours,
                   "s": np.float32(0.5), "z": np.int8(0)}  # fmt: skip
        nodes = [
            helper.make_node("Gemm", ["x", "w"], ["a"], "plain", transB=1),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["v"]),
            helper.make_node("Gemm", ["a", "v"], ["y"], "quantised", transB=1),
            *[helper.make_node("Magic", ["a", "w"], ["b"], "magic", domain="acme")] * unknown,
        ]
        graph = helper.make_graph(
            nodes,
            "graph",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])],
            [numpy_helper.from_array(value, name) for name, value in weights.items()],
        )
        opsets = [helper.make_opsetid("", opset)]
        onnx.save(
            helper.make_model(graph, opset_imports=opsets, ir_version=10), tmp_path / "net.onnx"
        )
        return tmp_path / "net.onnx"

    return write


@pytest.mark.parametrize("opset", [11, 13, 17, 19, 21])
def test_verify_sees_a_dense_weight_behind_quantisation(run, quantised_file, opset):
    status, table, _ = run("verify", quantised_file(sparse=False, opset=opset))
    assert (status, table.splitlines()[-1]) == (1, "1 of 2 eligible weights are 2:4")
    status, table, _ = run("verify", quantised_file(opset=opset))
    assert (status, table.splitlines()[-1]) == (0, "2 of 2 eligible weights are 2:4")


def test_verify_fails_for_what_cannot_be_judged_unless_it_is_allowed(run, quantised_file):
    path = quantised_file(unknown=True)
    status, said, _ = run("verify", path)
    assert status == 1
    assert "Magic of acme is not known here, and may multiply by it" in said
    *_, unjudged, verdict = said.splitlines()
    assert unjudged.startswith(
        "1 product was not judged, for the reason given: accept with --allow"
    )
    assert verdict == "2 of 2 eligible weights are 2:4"
    assert run("verify", path, "--allow-unjudged")[0] == 0
    assert run("verify", path, "--exclude", "mag*")[0] == 0
    path = quantised_file(sparse=False, unknown=True)
    assert run("verify", path, "--allow-unjudged")[0] == 1


def test_verify_leaves_out_what_is_meant_to_stay_dense(run, quantised_file):
    path = quantised_file(sparse=False)
    status, said, _ = run("verify", path, "--exclude", "quantised")
    assert (status, said.splitlines()[-1]) == (0, "1 of 1 eligible weights are 2:4")
    assert "excluded" in said
    assert run("verify", path, "--exclude", "q", "--exclude", "w")[0] == 2  # nothing is left
    status, _, errors = run("verify", path, "--exclude", "quantized")
    assert status == 2
    assert "Nothing in the file matches 'quantized'" in errors


def test_verify_prints_json_for_programs(run, quantised_file):
    status, said, _ = run("verify", quantised_file(sparse=False, unknown=True), "--json")
    found = json.loads(said)
    assert status == 1
    assert [found[key] for key in ("passed", "eligible", "eligible_2to4", "not_judged")] == [
        False, 2, 1, 1,
    ]  # fmt: skip
    assert [row["node"] for row in found["rows"]] == ["plain", "quantised", "magic"]
    assert found["rows"][2]["zeros"] is None


def test_verify_reads_checkpoints_compressed_or_not(run, tmp_path):
    model = create_model("resnext14_8x1d", 10)
    save_checkpoint(model, tmp_path / "dense.safetensors", "resnext14_8x1d")
    assert run("verify", tmp_path / "dense.safetensors")[0] == 1
    prune_2to4_(model)
    save_compressed(model, tmp_path / "sparse.safetensors")
    status, table, _ = run("verify", "--model", "resnext14_8x1d", tmp_path / "sparse.safetensors")
    assert status == 0
    assert table.splitlines()[-1] == "12 of 12 eligible weights are 2:4"


def test_verify_refuses_a_network_for_a_file_that_is_not_a_checkpoint(run, exported):
    status, _, errors = run("verify", "--model", "resnet50", exported[1]["fp16"])
    assert status == 2
    assert "only those need --model: leave it out" in errors


def test_verify_refuses_the_checkpoint_of_another_network(run, tmp_path):
    model = create_model("resnet50", 10)
    prune_2to4_(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("conv2.weight"):
                weight.fill_(1)  # in resnext50_32x4d these are grouped, and stay dense
    save_compressed(model, tmp_path / "half.safetensors")
    status, table, _ = run("verify", "--model", "resnet50", tmp_path / "half.safetensors")
    assert status == 1
    assert "37 of 53 eligible weights" in table
    status, _, errors = run("verify", "--model", "resnext50_32x4d", tmp_path / "half.safetensors")
    assert status == 2
    assert "does not hold the weights of" in errors


def test_verify_refuses_a_file_that_is_not_onnx(run, tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"no")
    status, _, errors = run("verify", tmp_path / "x.onnx")
    assert status == 2
    (line,) = errors.splitlines()
    assert line.startswith(f"InputError: {tmp_path / 'x.onnx'} is not a valid ONNX model")


def test_advice_comes_by_batch_and_says_what_a_datasheet_gives(run):
    batches = ("--batch", 64, "--batch", 2, "--batch", 64)
    status, said, _ = run(
        "advise", "resnet50", *batches, "--gpu", "H100", "--datatype", "fp16", "--datasheet"
    )
    assert status == 0
    title, floors, header, *batches = said.partition("\n\n")[0].splitlines()
    assert title == "resnet50 at 224x224 in FP16, from the NVIDIA H100 80 GB SXM's datasheet"
    assert floors.startswith("Floors, not measurements: ")
    assert header.split() == ["batch", "dense_ms", "sparse_ms", "speedup"]
    assert [row.split()[0] for row in batches] == ["2", "64"]
    verdict = said.partition("\n\n")[2].splitlines()[0]
    assert verdict.startswith(f"{float(batches[1].split()[3]):.2f}x at batch 64 in FP16 if dense")


def test_advice_is_calibrated_by_default_and_has_an_interval(run):
    status, said, _ = run("advise", "resnet50", "--batch", 64, "--gpu", "L4")
    assert status == 0
    title, header, row = said.partition("\n\n")[0].splitlines()
    assert title == (
        "resnet50 at 224x224 in FP16, from products published for the RTX 4090, scaled to the "
        "NVIDIA L4 by their datasheets"
    )
    assert header.split() == ["batch", "dense_ms", "sparse_ms", "speedup", "low", "high"]
    speedup, low, high = map(float, row.split()[3:])
    assert 1 <= low <= speedup <= high
    verdict = said.partition("\n\n")[2].splitlines()[0]
    assert re.match(rf"{low:.2f}x to {high:.2f}x at batch 64 in FP16; .*gain", verdict)


def test_advice_takes_a_measured_gpu_and_a_checkpoint(run, tmp_path):
    row = {"datatype": "BF16", "m": 64, "n": 64, "k": 64, "dense_ms": 0.004, "sparse_ms": 0.003}
    record = {"machine": {"gpu": "NVIDIA X1"}, "bandwidth_gbps": 1000, "rows": [row]}
    (tmp_path / "gpu.json").write_text(json.dumps(record))
    model = create_model("resnext14_8x1d", 10)
    save_checkpoint(model, tmp_path / "dense.safetensors", "resnext14_8x1d")
    status, said, _ = run(
        "advise", tmp_path / "dense.safetensors", "--rates", tmp_path / "gpu.json",
        "--datatype", "BF16", "--batch", 4,
    )  # fmt: skip
    assert status == 0
    assert "at 28x28 in BF16, from products measured on NVIDIA X1" in said
    assert "Floors" not in said
    assert "never compared with a measurement end to end" in said


def test_advice_is_given_for_a_network_that_cannot_be_made_without_numbers(run):
    status, said, _ = run("advise", "regnet_x_400mf", "--image-size", 64, "--batch", 1)
    assert status == 0
    assert said.startswith("regnet_x_400mf at 64x64 in FP16")


@pytest.mark.parametrize(("name", "size"), [("inception_v3", 299), ("vit_h_14", 224)])
def test_advice_is_for_images_of_the_size_that_the_network_is_made_for(run, name, size):
    status, said, _ = run("advise", name, "--batch", 1)
    assert status == 0
    assert said.startswith(f"{name} at {size}x{size} in FP16")


def test_a_checkpoint_says_for_what_images_its_network_is_made(run, tmp_path, monkeypatch):
    model = create_model("resnet18", 10)
    save_checkpoint(model, tmp_path / "r.safetensors", "resnet18")
    monkeypatch.setattr(own_models, "_image_size", {"resnet18": 96}.get)
    assert "at 96x96 in FP16" in run("advise", tmp_path / "r.safetensors", "--batch", 1)[1]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("resnet51",), "There is no classification network 'resnet51'"),
        (("fcn_resnet50",), "There is no classification network 'fcn_resnet50'"),
        (("m.pt",), "m.pt is not a checkpoint: those end in .safetensors"),
        (("resnet50", "--gpu", ""), "There is no GPU ''"),
        (("resnet50", "--gpu", "t4"), "The T4 has no Sparse Tensor Cores"),
        (("resnet50", "--gpu", "gb10", "--datasheet"), "There is no datasheet 'gb10'"),
        (("resnet50", "--gpu", "a100", "--datatype", "fp8"), "There are no rates in FP8"),
        (("resnet50", "--batch", 0), "There are no images of shape (3, 224, 224)"),
        (("resnet50", "--batch", 10**17), "The model does not run on these"),
        (("resnet50", "--image-size", 0), "There are no images of shape (3, 0, 0)"),
        (("resnet50", "--image-size", -5), "There are no images of shape (3, -5"),
        (("resnet50", "--image-size", 10**9), "The model does not run on these"),
        (("resnet50", "--datatype", "fp17"), "There is no 2:4 in 'FP17'"),
        (("resnet50", "--gpu", "b300"), "There is no GPU 'b300' here; measured are a100"),
        (("resnet50", "--gpu", "a100", "--rates", "x.json"), "Give either --rates"),
        (("resnet50", "--datasheet", "--rates", "x.json"), "Give either --rates"),
        (("resnet50", "--rates", "x.json"), "x.json cannot be read"),
        (("resnet50", "--datatype", "TF32"), "There is no 2:4 in 'TF32'"),
        (
            ("vit_b_16", "--image-size", 384),
            "The model does not run on these shapes (AssertionError: Wrong image "
            "height! Expected 224 but got 384!)",
        ),
    ],
)
def test_advice_that_cannot_be_given_is_refused_in_one_sentence(run, arguments, complaint):
    status, _, errors = run("advise", *arguments)
    assert status == 2
    (line,) = errors.splitlines()
    kind, _, sentence = line.partition(": ")
    assert kind in ("AdviceError", "InputError", "TutorialError")
    assert sentence.startswith(complaint)


# --- files of one's own ---


@pytest.fixture(scope="module")
def case_study(tmp_path_factory):
    """Stand-ins for NVIDIA's dense and sparse ResNeXt-101 32x8d files: one block for each stage.

    Theirs were exported by TorchScript with opset 11 to 13, in FP32, with batch norms folded,
    an input `input_1` and a batch that is open.
    """
    folder = tmp_path_factory.mktemp("ngc")
    torch.manual_seed(0)
    model = ResNet(Bottleneck, [1, 1, 1, 1], groups=32, width_per_group=8, num_classes=16).eval()
    paths = {}
    for name in ("dense", "sparse"):
        if name == "sparse":
            prune_2to4_(model)
        paths[name] = folder / f"resnext_{name}.onnx"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporter is deprecated
            torch.onnx.export(
                model,
                (torch.zeros(2, 3, 32, 32),),
                str(paths[name]),
                dynamo=False,
                opset_version=13,
                input_names=["input_1"],
                output_names=["output_1"],
                dynamic_axes={"input_1": {0: "batch"}, "output_1": {0: "batch"}},
            )
    return paths


def test_the_case_studys_files_from_report_to_benchmark(run, case_study, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is missing", exc_type=ImportError)
    dense, sparse = case_study["dense"], case_study["sparse"]
    status, said, _ = run("report", dense)
    assert status == 0
    assert said.startswith("13 of 18 products can be sparse (tensorrt), and 0 of them are 2:4.")
    assert run("verify", dense)[0] == 1
    assert run("verify", sparse)[0] == 0
    status, said, _ = run("prune", dense, tmp_path / "pruned.onnx")
    assert status == 0
    assert "13 of 18 products have 2:4 weights now" in said
    assert "until the model is retrained" in said
    assert run("verify", tmp_path / "pruned.onnx")[0] == 0
    pruned, own = (
        {each.name: numpy_helper.to_array(each) for each in onnx.load(path).graph.initializer}
        for path in (tmp_path / "pruned.onnx", sparse)
    )
    assert pruned.keys() == own.keys()
    for name, values in own.items():  # of the model that was pruned before it was exported
        np.testing.assert_array_equal(pruned[name], values)
    status, said, _ = run(
        "build", sparse, "-o", tmp_path / "s.engine", "--shapes", "input_1:4x3x32x32"
    )
    assert status == 0
    assert (tmp_path / "s.engine").stat().st_size > 10_000
    status, said, errors = run(
        "benchmark", dense, sparse, "--shape", "input_1:2x3x32x32", "--duration", 0.1,
        "--backend", "cpu",
    )  # fmt: skip
    assert status == 0, errors
    assert "ONNX Runtime on a CPU multiplies by the zeros as by any other number" in said
    assert [line.split()[0] for line in said.splitlines()[4:7]] == ["dense", "dense", "sparse"]
    status, said, _ = run("advise", dense, "--shape", "input_1:8x3x32x32")
    assert status == 0
    assert "in FP16, from a model fitted to products published for the A100" in " ".join(
        said.split()
    )


def test_a_file_is_quantised_with_pictures_or_arrays(run, case_study, tmp_path):
    generator = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for number in range(10):
        pixels = generator.integers(0, 256, (50, 60, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pictures" / f"{number}.png")
    sparse, target = case_study["sparse"], tmp_path / "int8.onnx"
    status, said, errors = run(
        "quantize", sparse, target, "--calibration", tmp_path / "pictures", "--image-size", 32,
        "--expect-sparse", "--no-first",
    )  # fmt: skip
    assert status == 0, errors
    assert "17 of 18 products in INT8 for TensorRT, calibrated by min-max on 10 images" in said
    assert "in floating point: the first product" in said
    assert run("verify", target)[0] == 0

    images = generator.standard_normal((16, 3, 32, 32), dtype=np.float32)
    np.savez(tmp_path / "images.npz", input_1=images)
    facts = as_json(
        run, "quantize", sparse, target, "--calibration", tmp_path / "images.npz", "--overwrite",
        "--for", "cpu", "--percentile", 99.9, "--count", 12,
    )  # fmt: skip
    assert (facts["runs_on"], facts["images"]) == ("CPU", 12)
    assert facts["calibration"] == "percentile 99.9"
    assert facts["widened"]
    assert facts["quantised"] == str(target)


def as_json(run, *arguments):
    status, said, errors = run(*arguments, "--json")
    assert status in (0, 1), errors
    return json.loads(said)


def test_every_command_on_a_file_prints_json_and_nothing_else(run, case_study, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is missing", exc_type=ImportError)
    dense = case_study["dense"]
    report = as_json(run, "report", dense)
    assert (report["eligible"], report["eligible_2to4"], report["products"]) == (13, 0, 18)
    assert report["shapes"] == {"input_1": [1, 3, 32, 32]}
    assert {"weight", "op", "shape", "eligible", "reason", "is_2to4", "macs", "share"} <= set(
        report["rows"][0]
    )
    found = as_json(run, "verify", dense)
    assert (found["passed"], found["eligible"], found["eligible_2to4"]) == (False, 13, 0)
    pruned = as_json(run, "prune", dense, tmp_path / "p.onnx")
    assert pruned["pruned_products"] == 13
    shape = ("--shape", "2x3x32x32")
    built = as_json(run, "build", dense, "-o", tmp_path / "e", *shape)
    assert built["builder"] == "TensorRT-RTX"
    measured = as_json(
        run, "benchmark", dense, *shape, "--duration", 0.05, "--backend", "cpu", "--warm-up", 1
    )
    assert [row["network"] for row in measured["rows"]] == ["dense", "dense again", "sparse"]
    assert measured["sparse"] is None
    assert measured["shapes"] == {"input_1": [2, 3, 32, 32]}
    assert measured["versions"]
    advice = as_json(run, "advise", dense, *shape)
    assert len(advice["layers"]) == 18


def test_checkpoints_and_networks_are_reported_and_pruned(run, tmp_path):
    model = create_model("resnext14_8x1d", 10)
    save_checkpoint(model, tmp_path / "dense.safetensors", "resnext14_8x1d")
    for name in ("resnext14_8x1d", tmp_path / "dense.safetensors"):
        status, said, _ = run("report", name)
        assert status == 0
        assert said.startswith("12 of 17 layers can be sparse (tensorrt)")
    target = tmp_path / "sparse.safetensors"
    status, said, _ = run("prune", tmp_path / "dense.safetensors", target, "--exclude", "fc")
    assert status == 0
    assert "sparse.safetensors: 11 weights pruned 2:4 (tensorrt)" in said
    assert as_json(run, "verify", target)["eligible_2to4"] == 11


def test_one_sparse_file_is_measured_alone(run, case_study):
    status, said, _ = run(
        "benchmark", case_study["sparse"], "--shape", "1x3x32x32", "--duration", 0.05,
        "--backend", "cpu",
    )  # fmt: skip
    assert status == 0
    assert "is 2:4 already, so no pruned copy was made" in said


def test_inputs_can_come_from_a_file(run, case_study, tmp_path):
    dense, inputs = case_study["dense"], tmp_path / "x.npz"
    np.savez(inputs, input_1=np.ones((1, 3, 32, 32), np.float32))
    options = ("--loadInputs", inputs, "--duration", 0.05, "--backend", "cpu")
    assert as_json(run, "benchmark", dense, *options)["shapes"] == {"input_1": [1, 3, 32, 32]}
    np.savez(inputs, input_1=np.ones((1, 4, 32, 32), np.float32))
    status, _, errors = run("benchmark", dense, *options)
    assert status == 2
    assert "cannot have the shape 1x4x32x32" in errors


def test_an_engine_is_built_for_a_range_of_shapes(run, case_study, tmp_path):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is missing", exc_type=ImportError)
    shapes = [
        f"--{end}Shapes=input_1:{batch}x3x32x32"
        for end, batch in (("min", 1), ("opt", 4), ("max", 8))
    ]
    plan = tmp_path / "e.engine"
    assert run("build", case_study["dense"], f"--saveEngine={plan}", *shapes)[0] == 0
    for wrong, complaint in (
        (shapes[:2], "Give all three: --min-shape, --opt-shape and --max-shape."),
        ([*shapes, "--shape", "1x3x32x32"], "Give either --shape, or --min-shape"),
        ([shapes[0], shapes[1], "--maxShapes=1x3x32x32"], "cannot go from"),
    ):
        status, _, errors = run("build", case_study["dense"], "-o", tmp_path / "f", *wrong)
        assert status == 2
        assert complaint in errors
        assert not (tmp_path / "f").exists()


SHAPE = ("--shape", "1x3x32x32")
IMAGES = ("--calibration", "{images}.npz")


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (("report", "{none}.onnx"), 2, "cannot be read: No such file"),
        (("report", "{text}"), 2, "is not a valid ONNX model"),
        (("report", "{cut}"), 2, "is not a valid ONNX model"),
        (("report", "{dense}", "--image-size", 32), 2, "use --shape"),
        (("report", "{dense}", "--shape", "image:1x3x32x32"), 2, "has no input image"),
        (("report", "{dense}", "--shape", "1x3"), 2, "cannot have the shape 1x3"),
        (("report", "{dense}", "--shape", "big"), 2, "'big' is not a shape"),
        (("report", "resnet18", "--shape", "1x3x32x32"), 2, "give --image-size instead"),
        (("prune", "{dense}"), 2, "Name the pruned copy to write after the file."),
        (("prune", "{dense}", "{dense}"), 2, "is the file to read; write to another one"),
        (("prune", "{dense}", "{sparse}"), 2, "exists. Name another file, or add --overwrite"),
        (("prune", "{dense}", "{none}.safetensors"), 2, "both must be ONNX files, or both"),
        (("prune", "{none}.onnx", "{none}2.onnx"), 2, "cannot be read: No such file"),
        (("prune", "{text}", "{none}.onnx"), 2, "is not a valid ONNX model"),
        (("prune", "{dense}", "{text}/out.onnx"), 2, "could not be written"),
        (("prune", "{nan}", "{none}.onnx"), 2, "NaN or infinite"),
        (("prune", "{dense}", "{none}.onnx", "--include", "nothing"), 2, "matches 'nothing'"),
        (("prune", "{dense}", "{none}.onnx", "--model", "resnet50"), 2, "leave it out"),
        (("prune", "--overwrite"), 2, "--overwrite is for a file of your own"),
        (("quantize", "{dense}"), 2, "Name the copy to write after the file, and --calibration."),
        (("quantize", "{dense}", "{dense}", *IMAGES), 2, "is the file to read"),
        (("quantize", "{dense}", "{sparse}", *IMAGES), 2, "exists. Name another file, or add"),
        (("quantize", "{dense}", "q.engine", *IMAGES), 2, "does not end in .onnx"),
        (("quantize", "{cut}", "{none}.onnx", *IMAGES), 2, "is not a valid ONNX model"),
        (
            ("quantize", "{dense}", "{none}.onnx", *IMAGES, "--expect-sparse"),
            2,
            "was expected to be 2:4",
        ),
        (("quantize", "{dense}", "{none}.onnx", *IMAGES, "--for", "tpu"), 2, "no --for 'tpu'"),
        (("quantize", "{dense}", "{none}.onnx", *IMAGES, "--reduce-range"), 2, "add --for cpu"),
        (("quantize", "{dense}", "{none}.onnx", *IMAGES, "--exclude", "x"), 2, "matches 'x'"),
        (("quantize", "{dense}", "{none}.onnx", *IMAGES, "--count", 1), 2, "is 1 calibration"),
        (("quantize", "{dense}", "{none}.onnx", "--calibration", "no"), 2, "is neither a folder"),
        (("quantize", "--count", 9), 2, "--count is for a file of your own"),
        (("build", "{none}.onnx"), 2, "cannot be read: No such file"),
        (("build", "{dense}"), 2, "leaves the shape of its input input_1"),
        (("build", "{cut}", *SHAPE), 2, "is not a valid ONNX model"),
        (("build", "{dense}", *SHAPE, "-o", "{sparse}"), 2, "exists"),
        (("build", "{dense}", "--shape", "x:1"), 2, "has no input x"),
        (("build", "model.pt"), 2, "does not end in .onnx"),
        (("build", "--shape", "x:1"), 2, "--shape is for a file of your own"),
        (("benchmark", "{dense}"), 2, "leaves the shape of its input input_1"),
        (("benchmark", "{dense}", "{other}", *SHAPE), 2, "have different inputs"),
        (("benchmark", "{dense}", *SHAPE, "--backend", "tpu"), 2, "There is no backend 'tpu'"),
        (("benchmark", "{dense}", *SHAPE, "--backend", "engine"), 3, "No NVIDIA GPU was found"),
        (("benchmark", "{dense}", *SHAPE, "--duration", -1), 2, "no negative seconds"),
        (("benchmark", "{nan}", *SHAPE, "--backend", "cpu"), 2, "NaN or infinite"),
        (("benchmark", "{nan}", "{nan}", *SHAPE, "--backend", "cpu"), 1, "is not finite"),
        (("benchmark", "{dense}", *SHAPE, "--load-inputs", "x.npz"), 2, "Give either --shape or"),
        (("benchmark", "--duration", 1), 2, "--duration is for a file of your own"),
        (("advise", "{text}"), 2, "is not a valid ONNX model"),
        (("advise", "{dense}", "--shape", "y:1"), 2, "has no input y"),
        (("verify", "{text}"), 2, "is not a valid ONNX model"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    run, case_study, tmp_path, monkeypatch, arguments, status, complaint
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    files = {"none": tmp_path / "none", **case_study}
    files |= {name: tmp_path / f"{name}.onnx" for name in ("text", "cut", "nan", "other")}
    files["text"].write_text("this is a text, not a model\n")
    files["cut"].write_bytes(case_study["dense"].read_bytes()[:100_000])
    model = onnx.load(case_study["dense"])
    for tensor in model.graph.initializer:
        if tensor.name == "fc.weight":
            tensor.raw_data = b"\xff" * len(tensor.raw_data)
    onnx.save(model, files["nan"])
    model = onnx.load(case_study["dense"])
    model.graph.input[0].name = "another"
    for node in model.graph.node:
        node.input[:] = ["another" if name == "input_1" else name for name in node.input]
    onnx.save(model, files["other"])
    files["images"] = tmp_path / "images"
    pictures = np.random.default_rng(0).standard_normal((16, 3, 32, 32), dtype=np.float32)
    np.savez(tmp_path / "images.npz", input_1=pictures)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    found, _, errors = run(*(str(each).format(**files) for each in arguments))
    assert (found, len(errors.strip().splitlines())) == (status, 1), errors
    assert complaint in errors
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert len(list(case_study["dense"].parent.iterdir())) == 2


def test_catching_up_leaves_the_files_for_the_learners_copies(run, tiny_settings, monkeypatch):
    shipped = project_root() / "data"
    monkeypatch.setenv("TUTORIAL_DATA", str(shipped))
    status, said, errors = run("catch-up", "03")
    assert status == 0, errors
    assert said.endswith("Ready for notebook 03.\n")
    assert Artifacts(tiny_settings).require("02_pruned.safetensors").exists()


def test_copies_are_made_without_opening_jupyterlab(run, monkeypatch):
    made = []
    monkeypatch.setattr(learner_copies, "make_copies", lambda: made.append("copies"))
    monkeypatch.setattr(learner_copies, "open_lab", made.append)
    assert run("learn", "--no-lab") == (0, "", "")
    assert made == ["copies"]
    assert run("learn", "--no-browser", "--port=9999") == (0, "", "")
    assert made == ["copies", "copies", ["--no-browser", "--port=9999"]]


def test_exit_statuses_tell_no_from_wrong_and_from_unavailable():
    assert commands.exit_status(InputError("")) == 2
    assert commands.exit_status(WriteError("")) == 2
    assert commands.exit_status(TutorialError("")) == 2
    assert commands.exit_status(CheckError("")) == 1
    assert commands.exit_status(BenchmarkError("")) == 1
    assert commands.exit_status(RunnerError("")) == 3


@pytest.mark.parametrize(
    ("stop", "said"),
    [(KeyboardInterrupt(), "Interrupted."), (TrainingInterrupted("2 are kept."), "2 are kept.")],
)
def test_ctrl_c_ends_a_command_in_one_sentence_with_130(run, monkeypatch, stop, said):
    def stopping(*_: object) -> None:
        raise stop

    monkeypatch.setattr(steps, "evaluate", stopping)
    assert run("evaluate") == (130, "", f"{said}\n")


def test_the_same_weights_are_the_same_file(tmp_path):
    model = create_model("resnext14_8x1d", 10)
    for attempt in range(10):
        save_checkpoint(model, tmp_path / f"{attempt}.safetensors", "resnext14_8x1d")
    assert len({sha256(path) for path in tmp_path.iterdir()}) == 1


def test_the_whole_case_study_from_pretraining_to_the_reference(run, tiny_settings):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is missing", exc_type=ImportError)
    artifacts = Artifacts(tiny_settings)
    said = {}
    for command in (
        "setup", "pretrain", "evaluate", "prune", "retrain", "dense-control", "export", "quantize",
        "build", "benchmark", "summary", "save-reference",
    ):  # fmt: skip
        status, said[command], errors = run(command)
        assert status == 0, errors

    card = json.loads(
        (tiny_settings.data_dir / "pretrained/resnext14_8x1d_fashionmnist.json").read_text()
    )
    assert artifacts.facts("01_dense.safetensors")["test"] == card["test"]
    assert len(card["history"]) == tiny_settings.recipe.epochs
    control = tiny_settings.data_dir / "reference" / "quick_dense_control.json"
    recorded = json.loads(control.read_text())
    assert len(recorded["history"]) == tiny_settings.recipe.epochs
    retrained = artifacts.facts("03_retrained.safetensors")["test"]
    comparison = Comparison(**recorded["retrained_against_it"])
    gained = comparison.only_second - comparison.only_first
    assert gained == retrained["correct"] - recorded["test"]["correct"]

    assert "[OK] engines:" in said["setup"]
    assert "dense:" in said["evaluate"]
    assert "pruned, 12 layers:" in said["prune"]
    assert "all 12 eligible weights of the ONNX file are 2:4" in said["export"]
    retrained = load_checkpoint(artifacts.require("03_retrained.safetensors"))
    assert all(map(is_2to4, eligible_weights(retrained).values()))
    assert said["quantize"].count("17 of 17 products in INT8 for TensorRT") == 2
    assert said["quantize"].count("17 of 17 products in INT8 for CPU") == 2
    for name in ("dense", "sparse"):
        facts = artifacts.facts(f"08_{name}_int8_cpu.onnx")
        assert len(facts["widened"]) == 3
        assert artifacts.require(f"08_{name}_int8.onnx").is_file()
        assert artifacts.facts(f"04_{name}_fp32.onnx")["max_relative_error"] < 1e-4
    for name in ("dense", "sparse"):
        assert artifacts.facts(f"05_{name}.engine")["sparse_flag"]
        assert artifacts.require(f"05_{name}.engine").stat().st_size > 10_000
    rows = json.loads(artifacts.require("06_benchmark.json").read_text())["rows"]
    measured = {(row["network"], row["batch"]) for row in rows}
    networks = ("dense", "sparse", "dense again")
    assert {(n, b) for n in networks for b in tiny_settings.batch_sizes} <= measured
    assert "clear of chance" in said["benchmark"] or "than dense" in said["benchmark"]
    assert all(row["speedup_low"] <= row["speedup_high"] for row in rows)
    assert (artifacts.figures / "06_case_study.png").exists()
    assert "latency p50, batch 4" in said["summary"]
    record, network = said["save-reference"].split()
    assert (tiny_settings.data_dir / "reference" / record).exists()
    assert (tiny_settings.data_dir / "pretrained" / network).exists()

    # A second run over what is there changes nothing but dates and times.
    status, again, _ = run("retrain")
    assert status == 0
    assert "03_progress.pt has all epochs (2)" in again
    repeated = load_checkpoint(artifacts.require("03_retrained.safetensors")).state_dict()
    assert all(torch.equal(repeated[key], value) for key, value in retrained.state_dict().items())

    # A step repeated makes those after it outdated, and they say so.
    with artifacts.writing("01_dense.safetensors", facts={"test": card["test"]}) as path:
        path.write_bytes(artifacts.path("02_pruned.safetensors").read_bytes())
    status, _, errors = run("retrain")
    assert status == 2
    assert "02_pruned.safetensors is out of date" in errors
