"""`benchmarks/gpu.py` with its parts as far as they go without a GPU, and on fakes of one."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from test_child_process import impatient
from typer.testing import CliRunner

import gpu
import gpu_algorithms
import gpu_engines
import gpu_networks
import gpu_products
import gpu_run
from gpu import Session, attempts, probe, safest
from gpu_run import Job, Run, random_model
from gpu_worker import DEAD, PARTS, STOPPED, work
from helpers import machine
from helpers.errors import UnavailableError
from helpers.inference.runners import TorchRunner
from helpers.measurement.benchmark import check_outputs
from helpers.measurement.rates import Rates
from helpers.measurement.roofline import DATATYPES

QUICK = "resnext14_8x1d"


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    machine.versions.cache_clear()
    machine.describe.cache_clear()


@pytest.fixture
def do(tmp_path, no_gpu):
    """Do a job on the quick preset's network, in this process and on the CPU."""

    def do(part: str, **options) -> tuple[int, dict]:
        job = {"networks": [QUICK], "batch_sizes": [2, 1], "squares": [32], "seconds": 0.02}
        job = Job(part, str(tmp_path), str(tmp_path / "cache"), **(job | options))
        status = work(job)
        return status, json.loads((tmp_path / f"{gpu.record_of(job)}.json").read_text())

    return do


# --- the parts, on the CPU ---


def test_a_network_is_measured_over_its_batch_sizes_with_its_machine(do):
    status, record = do("network")
    assert status == 0
    assert {"date", "machine", "versions"} <= set(record)
    assert "gpu" not in record["machine"]
    assert record["runner"].endswith("cpu, dense"), "no sparse kernel ran here, and none is named"
    assert {(row["network"], row["batch"]) for row in record["rows"]} == {
        (name, batch) for name in ("dense", "sparse") for batch in (1, 2)
    }
    assert all(each["max_relative_error"] < 1e-4 for each in record["max_relative_errors"])
    assert {row["kernel"] for row in record["kernel_choices"]} == {"dense GEMM"}
    # TensorRT's, without the last layer's ten outputs and the first block's eight channels.
    assert record["eligible"] == 12 - 3
    assert (record["stopped"], record["failed"], "begun" in record) == ({}, [], False)


def test_a_later_run_measures_only_the_batch_sizes_that_are_missing(do):
    _, first = do("network", batch_sizes=[2])
    _, both = do("network", batch_sizes=[2, 1])
    assert [row for row in both["rows"] if row["batch"] == 2] == first["rows"]
    assert {row["batch"] for row in both["rows"]} == {1, 2}
    inputs = [row["input"].split("x")[0] for row in both["kernel_choices"]]
    assert inputs == sorted(inputs, reverse=True)
    assert len(inputs) == 2 * len(first["kernel_choices"])


def test_another_version_measures_again(do, monkeypatch):
    _, first = do("network", batch_sizes=[2])
    monkeypatch.setattr(machine, "versions", lambda: {"torch": "9.9"})
    _, second = do("network", batch_sizes=[2])
    assert len(second["rows"]) == len(first["rows"])
    assert second["rows"] != first["rows"]


def test_a_batch_that_fails_keeps_the_others_and_is_named_with_its_step(do, monkeypatch):
    sweep = gpu_networks.sweep

    def fail_once(runners, shape, batch, *arguments, **options):
        if batch == [2]:
            raise RuntimeError("too little memory")
        return sweep(runners, shape, batch, *arguments, **options)

    monkeypatch.setattr(gpu_networks, "sweep", fail_once)
    status, record = do("network")
    assert status == 0
    (failed,) = record["failed"]
    assert failed["batch"] == 2
    assert failed["reason"] == f"{QUICK}, batch 2 in FP16: times: too little memory"
    assert {row["batch"] for row in record["rows"]} == {1}
    monkeypatch.undo()


def test_a_batch_starts_only_if_the_shortest_so_far_would_fit(do, monkeypatch):
    now, sweep = [0.0], gpu_networks.sweep

    def slow_sweep(*arguments, **options):
        now[0] += 200
        return sweep(*arguments, **options)

    monkeypatch.setattr(gpu_networks, "sweep", slow_sweep)
    for module in (gpu_networks, gpu_run):
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    _, record = do("network", limit=300)
    assert {row["batch"] for row in record["rows"]} == {2}
    assert record["missing"] == "no time was left from batch 1 on"


def test_int8_is_measured_beside_fp16_dense_and_sparse(do):
    _, record = do("int8", batch_sizes=[1])
    labels = {"dense", "sparse", "dense, INT8", "sparse, INT8"}
    assert {row["network"] for row in record["rows"]} == labels
    errors = {row["network"]: row["max_relative_error"] for row in record["max_relative_errors"]}
    assert errors["sparse"] < 1e-4 < errors["sparse, INT8"] < 0.1
    assert "dense INT8 GEMM" in {row["kernel"] for row in record["kernel_choices"]}
    status, record = do("int8", batch_sizes=[2], search=False)
    assert status == STOPPED
    assert "take cuSPARSELt's search" in record["stopped"]["FP16"]


def test_products_that_need_a_gpu_are_recorded_with_the_reason(do):
    for datatype in gpu_run.DATATYPES:
        status, record = do("products", datatype=datatype)
        assert status == 0
    assert {row["datatype"] for row in record["rows"]} == set(DATATYPES)
    assert len(record["rows"]) == len(DATATYPES)
    for row in record["rows"]:
        assert row["ratio"] is row["sparse_ms"] is None
        assert row["reason"].startswith("No NVIDIA GPU was found")
    assert record["bandwidth_gbps"] is None


def test_the_datatypes_are_those_of_the_roofline():
    assert set(gpu_run.DATATYPES) == set(DATATYPES)


def test_a_profile_of_each_model_goes_into_one_record(do):
    do("profile", model="dense")
    status, record = do("profile", model="sparse")
    assert status == STOPPED, "floors take the ceilings of this GPU"
    assert record["stopped"]["FP16"].startswith("AdviceError")
    assert record["stopped"]["FP16"].endswith("(during the floors of the slowest products)")
    for label in ("dense", "sparse"):
        overhead = record["overhead"][label]
        kernels = [kernel["ms"] for kernel in record["kernels"][label]]
        assert overhead["kernels"] == pytest.approx(sum(kernels))
        assert min(overhead["kernels"], overhead["p50"]) > 0
        assert overhead["gpu_p50"] is None


def test_a_profile_without_kernels_is_not_a_measurement(monkeypatch, no_gpu):
    class Runner:
        def run(self) -> None:
            pass

    monkeypatch.setattr(torch.profiler.profile, "key_averages", lambda self: [])
    with pytest.raises(UnavailableError, match="saw no kernel"):
        gpu_networks.kernel_times(Runner())


def test_a_random_model_is_right_in_fp16(no_gpu):
    shape = (3, 64, 64)
    model = random_model("resnet50", shape)
    runner = TorchRunner(model, dtype=torch.float16)
    assert check_outputs(runner, model, shape, 2, repeats=1) < 5e-3


def test_products_are_measured_with_as_many_rows_as_the_network_pads_them_to(tmp_path, no_gpu):
    run = Run(Job("products", str(tmp_path), "", ["resnet50"], [1, 2]))
    sizes = gpu_products.product_sizes(run, "resnet50")
    assert {(56, 2048, 512), (104, 2048, 512)} <= sizes  # 49 and 98 pixels
    assert all(m % 8 == 0 for m, _, _ in sizes)


# --- engines ---


class FakeReport:
    eligible = chosen = None

    def facts(self) -> dict:
        return {"seconds": 1.0}


@pytest.fixture
def builder(monkeypatch, tmp_path) -> list[str]:
    """A builder whose engines do not run; the labels of those that it was asked for."""
    built: list[str] = []

    def build_engine(onnx: Path, plan: Path, *_: object, **__: object) -> FakeReport:
        built.append(plan.stem)
        plan.write_text("an engine")
        return FakeReport()

    fake = type("Builder", (), {"name": "TensorRT-RTX", "version": "1.7"})
    monkeypatch.setattr(gpu_engines.engine, "find_builder", fake)
    monkeypatch.setattr(gpu_engines.engine, "build_engine", build_engine)
    monkeypatch.setattr(gpu_engines, "export_all", lambda *_: None)
    return built


def test_the_engines_say_why_they_do_not_run(do, builder):
    status, record = do("engines")
    assert status == STOPPED
    assert list(record["builds"]) == list(gpu_engines.BUILDS) == builder
    assert record["stopped"]["FP16"].startswith("RunnerError: No NVIDIA GPU was found")
    assert "rows" not in record


def test_finished_engines_are_kept_when_a_build_dies(do, builder, monkeypatch, tmp_path):
    build = gpu_engines.engine.build_engine

    def die_at_the_third(onnx: Path, plan: Path, *rest: object, **options: object) -> FakeReport:
        if len(builder) == 2:
            raise RuntimeError("the build was cut short")
        return build(onnx, plan, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(gpu_engines.engine, "build_engine", die_at_the_third)
        _, record = do("engines")
    assert list(record["builds"]) == ["sparse", "dense"]
    assert record["stopped"]["FP16"].endswith("(during the engine sparse_without_flag)")
    _, record = do("engines")
    assert builder == list(gpu_engines.BUILDS), "none was built twice"
    (plan,) = tmp_path.rglob("dense.engine")
    plan.unlink()
    do("engines")
    assert builder[-1] == "dense", "a lost engine is built again"


def test_no_engine_is_begun_that_would_not_be_finished(do, builder):
    """Each of the fake builds took a second."""
    status, record = do("engines", limit=0.4)
    assert status == 0
    assert builder == ["sparse"]
    assert record["missing"] == "no time was left from the engine dense on"
    assert record["stopped"] == {}


# --- a dead context ---


def test_a_dead_context_ends_the_process_and_keeps_the_rows_before_it(do, monkeypatch):
    """After an illegal instruction nothing works in this process any more."""

    def crash(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal instruction was encountered")

    def measure_gemm(size, datatype, **_) -> dict:
        if size == (64, 64, 64):
            monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
            monkeypatch.setattr(torch.cuda, "synchronize", crash)
            crash()
        m, n, k = size
        return {"datatype": datatype, "m": m, "n": n, "k": k, "dense_ms": 1.0, "reason": ""}

    monkeypatch.setattr(gpu_products.gemm, "measure_gemm", measure_gemm)
    do("products", datatype="BF16")
    status, record = do("products", squares=[32, 64, 128])
    assert status == DEAD
    assert [(row["datatype"], row["m"]) for row in record["rows"]] == [("BF16", 32), ("FP16", 32)]
    stopped = record["stopped"]["FP16"]
    assert "CUDA no longer works" in stopped
    assert "illegal instruction" in stopped
    assert stopped.endswith("(during the FP16 product of 64x64x64)")
    assert record["fatal"] == ["the FP16 product of 64x64x64"]
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    status, record = do("products", squares=[32, 64, 128])
    assert status == 0
    assert [row["m"] for row in record["rows"] if row["datatype"] == "FP16"] == [32, 128]


def test_a_record_of_another_machine_stays_until_there_are_figures(do, tmp_path, capfd):
    record = {"machine": {"gpu": "invented"}, "rows": [{"dense_ms": 0.02, "sparse_ms": 0.01}]}
    (tmp_path / "products.json").write_text(json.dumps(record))
    assert do("products") == (0, record)
    assert "products.json keeps the measurements of an earlier run" in capfd.readouterr().out


@pytest.mark.parametrize("text", ["no JSON", '{"rows": [{"dense_', "[1]"])
def test_a_file_that_is_not_a_record_is_overwritten(do, tmp_path, text):
    (tmp_path / "products.json").write_text(text)
    assert do("products")[1]["rows"]


# --- the advice ---


def test_the_advice_is_checked_against_files_of_an_earlier_run(do, tmp_path):
    """The rates are invented; what is compared with them was measured."""
    _, network = do("network")
    for row in network["rows"]:
        row["gpu_p50"] = 0.1
    network["machine"]["gpu"] = "invented"
    (tmp_path / f"{QUICK}.json").write_text(json.dumps(network))
    sizes = {"datatype": "FP16", "m": 64, "n": 64, "k": 64, "dense_ms": 0.02, "sparse_ms": 0.01}
    rows = [sizes, sizes | {"datatype": "BF16"}]
    products = {"machine": {"gpu": "invented"}, "bandwidth_gbps": 1000, "rows": rows}
    (tmp_path / "products.json").write_text(json.dumps(products | {"date": "2001-01-01"}))
    (tmp_path / f"{QUICK}_bf16.json").write_text(json.dumps(network))
    status, _ = do("advice")
    assert status == 0
    products = json.loads((tmp_path / "products.json").read_text())
    assert products["date"] == "2001-01-01"
    checked = {(row["datatype"], row["batch"]): row for row in products["checked"]}
    assert set(checked) == {("FP16", 1), ("FP16", 2), ("BF16", 1), ("BF16", 2)}
    for row in network["rows"]:
        if row["network"] == "sparse":
            assert checked["FP16", row["batch"]]["measured"] == row["speedup"]
    assert all(row["measured_sparse_ms"] == 0.1 for row in checked.values())
    assert all(row["predicted"] >= 1 for row in checked.values())
    assert len(Rates.from_record(tmp_path / "products.json").checked) == 4

    do("advice", networks=["resnet18"])  # which has no file
    assert json.loads((tmp_path / "products.json").read_text()) == products

    network["machine"]["gpu"] = "another"
    (tmp_path / f"{QUICK}.json").write_text(json.dumps(network))
    status, record = do("advice")
    assert status == STOPPED
    assert "were not measured on the same GPU" in record["stopped"]["FP16"]
    assert json.loads((tmp_path / "products.json").read_text()) == products


# --- the processes, on fake GPUs ---

FAKE = Path(__file__).with_name("fake_gpu_worker.py")


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Let the processes be those of a fake GPU; return a function that runs the whole script."""
    monkeypatch.setattr(gpu, "WORKER", FAKE)
    monkeypatch.setattr(gpu, "TESTS", {})
    for part, (_, least) in gpu.LIMITS.items():  # however slow the machine is that runs the tests
        monkeypatch.setitem(gpu.LIMITS, part, (3600, least))

    def run(
        *arguments: str, ends: dict[str, str] | None = None, missing: str = "", name: str = "H100"
    ):
        told = {"machine": {"gpu": name}, "missing": missing, "ends": ends or {}}
        monkeypatch.setenv("FAKE_GPU", json.dumps(told))
        app = gpu.typer.Typer()
        app.command()(gpu.main)
        result = CliRunner().invoke(
            app,
            ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache"),
             "--networks", "resnet50", "--batch-sizes", "256", "--batch-sizes", "32", *arguments],
        )  # fmt: skip
        if not isinstance(result.exception, SystemExit | None):
            raise result.exception
        files = (tmp_path / "out").glob("*.json")
        return result, {file.stem: json.loads(file.read_text()) for file in files}

    return run


def only(*parts: str) -> list[str]:
    return [argument for part in parts for argument in ("--parts", part)]


def processes(files: dict[str, dict]) -> list[str]:
    return [each["process"] for each in files["session"]["ended"]]


def test_the_checks_come_first_then_what_tells_most(fake):
    result, files = fake("--squares", "1024", "--squares", "4096", "--squares", "2048")
    assert result.exit_code == 0
    order = processes(files)
    assert order[0] == "machine"
    assert sum(each.startswith("probe") for each in order) == len(DATATYPES) * len(gpu.PROBED)
    assert {each.split()[0] for each in order[1:16]} == {"probe"}
    quick = order.index("network resnet50 FP16")
    assert order[16:quick] == [f"products {name}" for name in gpu_run.DATATYPES]
    assert order[quick + 1] == "advice"
    kinds = list(dict.fromkeys(each.split()[0] for each in order[quick + 2 :]))
    assert kinds == ["products", "network", "advice", "int8", "profile", "engines", "compiled"]
    for each in files["session"]["ended"]:
        assert each["ended"].startswith("ended well after")
        assert each["seconds"] >= 0
    assert files["session"]["machine"] == {"gpu": "H100"}
    assert files["session"]["versions"] == {"cusparselt": "0.8.1"}
    assert "resnet50_bf16" not in files


def test_where_the_search_kills_fp16_networks_run_in_bf16_and_products_by_default(fake):
    """What cuSPARSELt 0.8.1 does on an H100."""
    result, files = fake(*only("probe", "products", "networks"), ends={"FP16 searched 1024": "die"})
    assert result.exit_code == 0
    safe = dict.fromkeys(gpu_run.DATATYPES, "search") | {"FP16": "default"}
    assert files["probe"]["safe"] == safe
    (stopped,) = [row["stopped"] for row in files["probe"]["rows"] if row["stopped"]]
    assert re.fullmatch(
        r"The process was killed by SIGILL after \d+ s, during FP16 searched 1024\.", stopped
    )
    assert "resnet50" not in files
    assert {row["step"].split()[1] for row in files["resnet50_bf16"]["rows"]} == {"BF16"}
    ways = {row["datatype"]: row["step"].split()[2] for row in files["products"]["rows"]}
    assert ways == {name: "default" if name == "FP16" else "searched" for name in DATATYPES}


@pytest.mark.parametrize("how", ["die", "hang", "dead"])
def test_a_network_that_dies_in_fp16_goes_on_in_bf16(fake, monkeypatch, tmp_path, how):
    if how == "hang":
        monkeypatch.setitem(gpu.LIMITS, "network", (1, 0))
        impatient(monkeypatch, tmp_path / "out" / "gpu.log", "network FP16 searched 32")
    result, files = fake(*only("networks"), ends={"network FP16 searched 32": how})
    assert result.exit_code == 0
    died = files["resnet50"]
    assert died["fatal"] == ["network FP16 searched 32"]
    words = {
        "die": "The process was killed by SIGILL after",
        "hang": "The process did not end within 1 s and was killed",
        "dead": "CUDA no longer works, since network FP16",
    }
    assert died["stopped"]["FP16"].startswith(words[how])
    assert "network FP16 searched 32" in died["stopped"]["FP16"]
    assert "begun" not in died
    assert {row["step"].split()[1] for row in files["resnet50_bf16"]["rows"]} == {"BF16"}
    assert "goes on in another way: FP16 died" in result.output


def test_a_network_is_given_up_when_no_way_is_left(fake):
    ends = {"network": "dead"}
    _, files = fake(*only("networks"), ends=ends)
    tried = [row["process"] for row in files["session"]["ended"] if "network" in row["process"]]
    assert tried == [
        "network resnet50 FP16", "network resnet50 BF16", "network resnet50 FP16",
        "network resnet50 BF16",
    ]  # fmt: skip


def test_products_go_on_behind_the_ones_that_are_fatal(fake):
    squares = ["--squares", "1024", "--squares", "2048", "--squares", "4096"]
    ends = {f"products FP16 {way} 2048": "die" for way in ("searched", "default")}
    _, files = fake(*only("products"), "--datatypes", "FP16", *squares, ends=ends)
    steps = [row["step"] for row in files["products"]["rows"]]
    assert "products FP16 default 4096" in steps
    assert files["products"]["fatal"] == list(ends)


def test_half_a_record_is_replaced_by_the_next_process(fake):
    with pytest.raises(json.JSONDecodeError):
        fake(*only("engines"), ends={"engines": "half"})
    _, files = fake(*only("engines"))
    assert [row["step"] for row in files["engines"]["rows"]] == ["engines FP16 searched 0"]


def test_what_a_gpu_has_survived_is_not_tried_again_there(fake):
    fake(*only("probe"), "--datatypes", "FP16", ends={"FP16 searched 128": "die"})
    _, files = fake(*only("probe"), "--datatypes", "FP16")
    assert processes(files) == ["machine"]
    assert files["probe"]["safe"] == {"FP16": "default"}
    _, files = fake(*only("probe"), "--datatypes", "FP16", name="A100")
    assert files["probe"]["safe"] == {"FP16": "search"}
    assert len(processes(files)) == 1 + len(gpu.PROBED)


def test_without_a_gpu_one_sentence_says_what_is_missing(fake):
    result, files = fake(missing="No NVIDIA GPU was found, so there is nothing to measure.")
    assert result.exit_code == 1
    last = result.output.strip().splitlines()[-1]
    assert last == "No NVIDIA GPU was found, so there is nothing to measure."
    assert processes(files) == ["machine"]


def test_pytorch_that_does_not_start_is_told(fake, monkeypatch, tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text("raise SystemExit('No module named torch')")
    monkeypatch.setattr(gpu, "WORKER", worker)
    result, _ = fake()
    assert result.exit_code == 1
    assert "PyTorch does not start here: ended with exit status 1" in result.output
    assert "(No module named torch)." in result.output


def test_nothing_starts_without_time_for_it(fake):
    result, files = fake("--minutes", "0")
    assert result.exit_code == 0
    assert all("no time was left for it" in each["ended"] for each in files["session"]["ended"][1:])
    assert set(files) == {"machine", "probe", "session"}


def test_the_tests_leave_out_the_datatypes_that_break_cuda(monkeypatch, tmp_path):
    ran: list[list[str]] = []
    monkeypatch.setattr(Session, "child", lambda self, title, command, *_: ran.append(command))
    session = Session(Job("", str(tmp_path), str(tmp_path)), until=float("inf"))
    gpu.run_tests(session, {"FP16": "default", "BF16": "search", "TF32": ""})
    assert len(ran) == len(gpu.TESTS)
    for command in ran:
        assert command[:6] == ["-m", "pytest", "-m", "gpu", "-q", "-k"]
        assert command[6] == "not FP16 and not TF32"
        assert all(Path(file).exists() for file in command[7:])
    ran.clear()
    gpu.run_tests(session, {"FP16": "search"})
    assert "-k" not in ran[0]


@pytest.mark.parametrize(
    ("parts", "tried"),
    [({"probe", "algorithms"}, ["FP16"]), ({"algorithms"}, ["BF16", "FP16"]), ({"probe"}, None)],
)
def test_algorithms_are_tried_where_the_search_is_not_survived(monkeypatch, tmp_path, parts, tried):
    ran: list[list[str]] = []
    monkeypatch.setattr(Session, "child", lambda self, title, command, *_: ran.append(command))
    monkeypatch.setattr(gpu, "probe", lambda *_: {"BF16": "search", "FP16": "default"})
    session = Session(Job("", str(tmp_path), str(tmp_path)), until=float("inf"))
    gpu.measure(session, parts, ["BF16", "FP16"])
    out = str(tmp_path / "algorithms.json")
    assert ran == ([] if tried is None else [[str(gpu.ALGORITHMS), out, *tried]])


def own_outcome(datatype: str, algorithm: int) -> str:
    """What one algorithm of a fake library does; the process of some of them dies."""
    if algorithm in (3, 5):
        os._exit(1)
    return f"{datatype} {algorithm} is right"


def test_an_algorithm_that_kills_its_process_costs_no_other_one(monkeypatch):
    monkeypatch.setattr(gpu_algorithms, "MOST", 8)
    monkeypatch.setattr(gpu_algorithms, "SECONDS", 2)
    outcomes = gpu_algorithms.all_outcomes("FP16", own_outcome)
    dead = {number for number, how in outcomes.items() if how == "does not end within 2 s"}
    assert dead == {3, 5}
    assert {outcomes[number] for number in outcomes.keys() - dead} == {
        f"FP16 {number} is right" for number in (0, 1, 2, 4, 6, 7)
    }


def test_nothing_is_recorded_as_searched_where_the_search_breaks_cuda(monkeypatch, no_gpu):
    assert all(map(gpu_products.searches, DATATYPES))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert [name for name in DATATYPES if not gpu_products.searches(name)] == ["FP16"]


def test_an_algorithm_that_is_refused_is_told_with_the_reason(no_gpu):
    assert gpu_algorithms.outcome("FP16", 3).startswith("refused: ")


def test_every_module_with_a_gpu_test_is_run():
    folder = Path(__file__).parent
    marked = {
        file.stem.removeprefix("test_")
        for file in folder.glob("test_*.py")
        if "@pytest.mark.gpu" in file.read_text() and file != Path(__file__)
    }
    assert marked == {module for group in gpu.TESTS.values() for module in group}


def test_the_safest_way_is_the_best_that_every_probe_survived():
    both, default = {"default": "right", "searched": "right"}, {"default": "right"}
    assert safest([both, both]) == "search"
    assert safest([both, default]) == "default"
    assert safest([both, {"stopped": {}}]) == ""
    assert safest([{}, {}]) == "search", "there was no time for a probe"


def test_bf16_with_a_search_comes_before_fp16_without():
    assert list(attempts({"FP16": "default", "BF16": "search"})) == [
        ("BF16", True), ("FP16", False),
    ]  # fmt: skip
    assert list(attempts({"FP16": "search", "BF16": "search", "INT8": "search"})) == [
        ("FP16", True), ("BF16", True),
    ]  # fmt: skip
    assert list(attempts({"FP16": "", "INT8": "search"})) == []


def test_the_real_worker_is_started_in_its_own_process(tmp_path):
    session = Session(Job("", str(tmp_path), str(tmp_path)), until=float("inf"))
    ending = session.measure("machine")
    assert ending.fine, ending
    record = json.loads((tmp_path / "machine.json").read_text())
    assert record["versions"]["torch"] == machine.versions()["torch"]
    assert isinstance(record["missing"], str)


OWN = {"algorithms", "tests"}  # parts that have scripts of their own


def test_every_part_of_the_script_is_one_of_the_worker():
    wanted = {"network" if part == "networks" else part for part in gpu.PARTS} - OWN
    assert wanted | {"machine"} == set(PARTS)
    assert set(gpu.LIMITS) - OWN == set(PARTS)
    assert callable(probe)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--parts", "lunch"), "lunch; there are probe, algorithms, tests"),
        (("--datatypes", "FP4"), "FP4; there are BF16, INT8"),
        (("--networks", "../evil"), "../evil; there are resnext14_8x1d"),
        (("--batch-sizes", "0"), "greater than or equal to 1"),
        (("--seconds", "-1"), "greater than or equal to 0"),
        (("--out", "/proc/results"), "cannot be written to"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_is_measured(tmp_path, arguments, message):
    app = gpu.typer.Typer()
    app.command()(gpu.main)
    result = CliRunner().invoke(
        app, ["--out", str(tmp_path / "results"), "--cache", str(tmp_path / "cache"), *arguments]
    )
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert not (tmp_path / "results").exists()
