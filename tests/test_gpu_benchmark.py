"""`benchmarks/gpu.py` as far as it goes without a GPU."""

import json

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import gpu
from helpers.inference.runners import TorchRunner
from helpers.measurement.rates import Rates
from helpers.measurement.roofline import DATATYPES


@pytest.fixture
def script():
    return gpu


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def measure(script, tmp_path, no_gpu):
    """Run the script on the quick preset's network, on the CPU; return what it wrote."""

    def run(*arguments: str) -> tuple[str, dict[str, dict]]:
        app = script.typer.Typer()
        app.command()(script.main)
        result = CliRunner().invoke(
            app,
            ["--out", str(tmp_path), "--networks", "resnext14_8x1d", "--batch-sizes", "2",
             "--batch-sizes", "1", "--squares", "32", "--seconds", "0.02", *arguments],
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        files = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
        return result.output, files

    return run


PARTS = ("products", "networks", "advice", "profile")


def only(*parts: str) -> list[str]:
    return [argument for part in parts for argument in ("--parts", part)]


def test_each_part_writes_what_it_could_measure_with_its_machine(measure):
    said, files = measure(*only(*PARTS))
    assert set(files) == {"products", "resnext14_8x1d", "advice", "profile"}
    for record in files.values():
        assert {"date", "machine", "versions"} <= set(record)
        assert "gpu" not in record["machine"]
    assert "s left" in said

    network = files["resnext14_8x1d"]
    assert network["runner"].endswith("cpu, dense"), "no sparse kernel ran here, and none is named"
    assert {(row["network"], row["batch"]) for row in network["rows"]} == {
        (name, batch) for name in ("dense", "sparse") for batch in (1, 2)
    }
    assert all(each["max_relative_error"] < 1e-4 for each in network["max_relative_errors"])
    assert {row["kernel"] for row in network["kernel_choices"]} == {"dense GEMM"}
    # TensorRT's, without the last layer's ten outputs and the first block's eight channels.
    assert network["eligible"] == 12 - 3


def test_what_needs_a_gpu_is_reported_without_figures(measure):
    _, files = measure(*only(*PARTS))
    assert len(files["products"]["rows"]) == len(DATATYPES)
    for row in files["products"]["rows"]:
        assert row["ratio"] is row["sparse_ms"] is None
        assert row["reason"].startswith("No NVIDIA GPU was found")
    assert files["products"]["bandwidth_gbps"] is None
    assert files["advice"]["stopped"].startswith("AdviceError")
    assert files["profile"]["kernels"]["dense"]
    for network in ("dense", "sparse"):
        overhead = files["profile"]["overhead"][network]
        kernels = [kernel["ms"] for kernel in files["profile"]["kernels"][network]]
        assert overhead["kernels"] == pytest.approx(sum(kernels))
        assert min(overhead["kernels"], overhead["p50"]) > 0
        assert overhead["gpu_p50"] is None
    assert "stopped" in files["profile"], "floors take the ceilings of this GPU"


def test_int8_is_measured_beside_fp16_dense_and_sparse(measure):
    _, files = measure(*only("int8"))
    record = files["int8"]
    labels = {"dense", "sparse", "dense, INT8", "sparse, INT8"}
    assert {row["network"] for row in record["rows"]} == labels
    errors = {each["network"]: each["max_relative_error"] for each in record["max_relative_errors"]}
    assert set(errors) == labels
    assert errors["sparse"] < 1e-4 < errors["sparse, INT8"] < 0.1
    assert "dense INT8 GEMM" in {row["kernel"] for row in record["kernel_choices"]}


def test_the_engines_are_built_with_their_controls_and_say_why_they_do_not_run(measure):
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is missing", exc_type=ImportError)
    _, files = measure(*only("engines"))
    builds = files["engines"]["builds"]
    assert list(builds) == [
        "sparse", "dense", "sparse_without_flag", "dense_products", "sparse_products",
    ]  # fmt: skip
    assert files["engines"]["stopped"].startswith("RunnerError: No NVIDIA GPU was found")
    assert "rows" not in files["engines"]


def test_a_failed_part_keeps_its_results_and_the_others_run(measure, script, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("the kernel has died")

    sweep, batches = script.sweep, []

    def sweep_once(runners, shape, batch, *arguments, **options):
        batches.extend(batch)
        return fail() if len(batches) > 1 else sweep(runners, shape, batch, *arguments, **options)

    monkeypatch.setattr(script.gemm, "measure_gemms", fail)
    monkeypatch.setattr(script, "sweep", sweep_once)
    _, files = measure(*only("products", "networks", "profile"))
    assert files["products"]["stopped"] == "RuntimeError: the kernel has died"
    network = files["resnext14_8x1d"]
    assert network["failed"] == [{"batch": 1, "reason": "RuntimeError: the kernel has died"}]
    assert {row["batch"] for row in network["rows"]} == {2}
    assert files["profile"]["kernels"]["sparse"]


def test_a_broken_gpu_ends_the_run_and_keeps_finished_datatypes(script, tmp_path, monkeypatch):
    """After an illegal instruction nothing works in this process any more."""

    def crash() -> None:
        raise RuntimeError("CUDA error: an illegal instruction was encountered")

    def measure_gemms(sizes, datatype, **_):
        if datatype == "FP16":
            monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
            monkeypatch.setattr(torch.cuda, "synchronize", crash)
            crash()
        return pd.DataFrame([{"datatype": datatype, "dense_ms": 1.0}])

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(script.gemm, "measure_gemms", measure_gemms)
    app = script.typer.Typer()
    app.command()(script.main)
    arguments = ["--out", str(tmp_path), *only("products", "networks")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "in this process (CUDA error: an illegal instruction" in result.output
    record = json.loads((tmp_path / "products.json").read_text())
    assert [row["datatype"] for row in record["rows"]] == ["TF32"]
    assert "illegal instruction" in record["stopped"]
    assert not list(tmp_path.glob("resnext*.json")), "no other part was started"


def test_a_profile_without_kernels_is_not_a_measurement(script, monkeypatch, no_gpu):
    class Runner:
        def run(self) -> None:
            pass

    monkeypatch.setattr(script.torch.profiler.profile, "key_averages", lambda self: [])
    with pytest.raises(script.UnavailableError, match="saw no kernel"):
        script.kernel_times(Runner())


def test_a_random_model_is_right_in_fp16(script, no_gpu):
    shape = (3, 64, 64)
    model = script.random_model("resnet50", shape)
    runner = TorchRunner(model, dtype=torch.float16)
    assert script.check_outputs(runner, model, shape, 2, repeats=1) < 5e-3


def test_products_are_measured_with_as_many_rows_as_the_network_pads_them_to(script, tmp_path):
    run = script.Run(tmp_path, ["resnet50"], [1, 2], 224, 0, [], 0)
    sizes = script.product_sizes(run, "resnet50")
    assert {(56, 2048, 512), (104, 2048, 512)} <= sizes  # 49 and 98 pixels
    assert all(m % 8 == 0 for m, _, _ in sizes)


def test_a_batch_starts_only_if_the_shortest_so_far_would_fit(measure, script, monkeypatch):
    now, sweep = [0.0], script.sweep

    def slow_sweep(*arguments, **options):
        now[0] += 200
        return sweep(*arguments, **options)

    monkeypatch.setattr(script, "sweep", slow_sweep)
    monkeypatch.setattr(script.time, "monotonic", lambda: now[0])
    _, files = measure(*only("networks"), "--minutes", "5")
    assert {row["batch"] for row in files["resnext14_8x1d"]["rows"]} == {2}
    assert files["resnext14_8x1d"]["missing"] == "no time was left from batch 1 on"


def test_every_file_says_that_no_time_was_left(measure):
    _, files = measure("--minutes", "0", *only("products", "networks"))
    assert set(files) == {"products", "resnext14_8x1d"}
    for record in files.values():
        assert "no time was left" in record["stopped"]


def test_a_run_that_stops_keeps_earlier_measurements(measure, script, tmp_path):
    _, before = measure(*only("networks"))
    said, after = measure("--minutes", "0", *only("networks"))
    assert after == before
    assert "resnext14_8x1d.json keeps the measurements of an earlier run" in said


def test_figures_stay_until_there_are_new_ones(measure, script, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("too little memory")

    _, before = measure(*only("networks"))
    with monkeypatch.context() as patch:
        patch.setattr(script, "sweep", fail)
        said, after = measure(*only("networks"))
    assert after == before
    assert "resnext14_8x1d.json keeps the measurements of an earlier run" in said
    _, after = measure(*only("networks"))
    assert after["resnext14_8x1d"]["rows"] != before["resnext14_8x1d"]["rows"]


def test_a_run_without_a_gpu_keeps_the_products_of_one(measure, tmp_path):
    record = {"machine": {"gpu": "invented"}, "rows": [{"dense_ms": 0.02, "sparse_ms": 0.01}]}
    (tmp_path / "products.json").write_text(json.dumps(record))
    said, files = measure(*only("products"))
    assert files["products"] == record
    assert "products.json keeps the measurements of an earlier run" in said


def test_a_file_that_is_not_a_record_is_overwritten(measure, tmp_path):
    (tmp_path / "products.json").write_text("no JSON")
    _, files = measure(*only("products"))
    assert files["products"]["rows"]


def test_the_advice_is_checked_against_files_of_an_earlier_run(measure, script, tmp_path):
    """The rates are invented; what is compared with them was measured."""
    measure(*only("networks"))
    for row in (network := json.loads((tmp_path / "resnext14_8x1d.json").read_text()))["rows"]:
        row["gpu_p50"] = 0.1
    network["machine"]["gpu"] = "invented"
    (tmp_path / "resnext14_8x1d.json").write_text(json.dumps(network))
    sizes = {"datatype": "FP16", "m": 64, "n": 64, "k": 64, "dense_ms": 0.02, "sparse_ms": 0.01}
    record = {"machine": {"gpu": "invented"}, "bandwidth_gbps": 1000, "rows": [sizes]}
    (tmp_path / "products.json").write_text(json.dumps(record | {"date": "2001-01-01"}))
    (tmp_path / "advice.json").write_text(json.dumps({"stopped": "no time was left"}))
    _, files = measure(*only("advice"))
    assert "advice" not in files, "it tells why an earlier run stopped"
    assert files["products"]["date"] == "2001-01-01"
    checked = {row["batch"]: row for row in files["products"]["checked"]}
    assert set(checked) == {1, 2}
    for row in network["rows"]:
        if row["network"] == "sparse":
            assert checked[row["batch"]]["measured"] == row["speedup"]
    assert all(row["measured_sparse_ms"] == 0.1 for row in checked.values())
    assert all(row["predicted"] >= 1 for row in checked.values())
    assert len(Rates.from_record(tmp_path / "products.json").checked) == 2

    before = files["products"]["checked"]
    (tmp_path / "resnext14_8x1d.json").write_text(json.dumps({"stopped": "no memory"}))
    _, files = measure(*only("advice"), "--networks", "resnet18")  # which has no file
    assert files["products"]["checked"] == before

    network["machine"]["gpu"] = "another"
    (tmp_path / "resnext14_8x1d.json").write_text(json.dumps(network))
    _, files = measure(*only("advice"))
    assert "were not measured on the same GPU" in files["advice"]["stopped"]
    assert files["products"]["checked"] == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--parts", "lunch"), "lunch; there are products, networks"),
        (("--datatypes", "FP4"), "FP4; there are TF32, FP16"),
        (("--networks", "../evil"), "../evil; there are resnext14_8x1d"),
        (("--batch-sizes", "0"), "greater than or equal to 1"),
        (("--seconds", "-1"), "greater than or equal to 0"),
        (("--out", "/proc/results"), "cannot be written to"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_measured(
    script, tmp_path, arguments, message
):
    app = script.typer.Typer()
    app.command()(script.main)
    result = CliRunner().invoke(app, ["--out", str(tmp_path / "results"), *arguments])
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "results").exists()
