"""`benchmarks/serving.py` for seconds, on a small network. No time is asserted."""

import asyncio
import json
import os
import re
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.figure import Figure

import serving
from helpers.inference.export import OUTPUT
from helpers.serving.endpoint import NO_CONNECTION
from helpers.serving.errors import ServingError
from helpers.serving.load import NOT_SENT, TIMED_OUT, ClosedLoop, Load, OpenLoop, Outcome
from helpers.serving.triton_binary import find_triton
from helpers.tutorial.settings import project_root

SHAPE = (1, 28, 28)
REFUSED = {"unavailable"}


@pytest.fixture(scope="module")
def found(resnext_files, tmp_path_factory):
    """A server with the same small network under both names."""
    for protocol in serving.PROTOCOLS:
        pytest.importorskip(f"tritonclient.{protocol}.aio", exc_type=ImportError)
    try:
        find_triton()
    except ServingError as error:
        pytest.skip(str(error))
    files = dict.fromkeys(("dense", "sparse"), resnext_files["fp32"])
    with serving.served_files(files, SHAPE, 10, tmp_path_factory.mktemp("served")) as server:
        yield server


@pytest.mark.parametrize("protocol", serving.PROTOCOLS)
@pytest.mark.parametrize("arrivals", [ClosedLoop(4), OpenLoop(50)])
def test_every_answer_is_the_bare_runners_own(found, protocol, arrivals):
    load = found.load("sparse", protocol, 8, arrivals, 1.0)
    assert load.answered > 0
    assert set(load.errors) <= REFUSED


@pytest.mark.parametrize("protocol", serving.PROTOCOLS)
def test_a_notebook_can_load_a_server_inside_its_own_event_loop(found, protocol):
    async def cell() -> Load:
        return found.load("dense", protocol, 1, ClosedLoop(2), 0.2)

    assert asyncio.run(cell()).answered > 0


def test_a_wrong_answer_is_not_overlooked(found, monkeypatch):
    def expected(self, model, batch):
        return [{OUTPUT: np.zeros((batch, 10), np.float32)}] * serving.DIFFERENT

    monkeypatch.setattr(serving.Served, "expected", expected)
    with pytest.raises(serving.WrongAnswerError, match="wrong answer"):
        found.load("dense", "grpc", 2, ClosedLoop(1), 0.2)


def test_overhead_and_throughput_have_a_row_for_each_case(found):
    short = {"rounds": 2, "seconds": 0.02}
    rows = serving.measure_overhead(found, batches=(1, 8), **short)
    assert len(rows) == 2 * 2 * 2
    assert all(row["added_ms"] == row["served_ms"] - row["bare_ms"] for row in rows)
    rows = serving.measure_throughput(found, clients=(1, 4), **short)
    assert [row["clients"] for row in rows] == [1, 4] * 4
    assert all(row["images_per_second"] > 0 for row in rows)
    assert all(0 < row["kept_at_most"] <= 1 for row in rows)
    assert {*rows[0]["processor_ms"]} == {"bare", "client", "server", "model"}


def test_the_processor_time_of_a_load_is_told_apart_by_process(found):
    before = serving.processor_seconds(found.server.pid)
    load = found.load("dense", "grpc", 8, ClosedLoop(4), 1.0)
    after = serving.processor_seconds(found.server.pid)
    assert load.answered > 0
    assert all(after[process] > before[process] for process in ("client", "server", "model"))


def test_a_curve_can_be_drawn(found):
    rows = serving.measure_curve(found, clients=(1, 2), shares=(0.5,), seconds=0.2)
    assert [row["loop"] for row in rows] == ["closed"] * 4 + ["open"] * 2
    record = {"machine": {"cores": 2}, "curve": rows}
    assert isinstance(serving.draw(record), Figure)


def test_under_overload_every_request_is_answered_refused_or_counted(found):
    row = serving.measure_soak(found, seconds=3.0, probe_seconds=0.5)
    assert row["same_process"]
    assert row["answered"] > 0
    assert row["after"]["answered"] > 0
    assert set(row["errors"]) <= {*REFUSED, TIMED_OUT, NOT_SENT}
    assert row["answered"] + sum(row["errors"].values()) == row["requests"]
    assert len(row["memory_mib"]) == len(row["memory_seconds"]) > 0
    assert isinstance(serving.draw_soak(row), Figure)


def test_a_server_that_is_killed_comes_back_without_a_wrong_answer(found):
    starts = found.server.starts
    row = serving.measure_kill(found, seconds=6.0)
    assert set(row["errors"]) <= {NO_CONNECTION, *REFUSED, TIMED_OUT}
    assert row["errors"][NO_CONNECTION] > 0
    found.server.wait_until_ready()
    assert found.server.starts == starts + 1
    load = found.load("sparse", "grpc", 8, ClosedLoop(2), 0.5)
    assert load.answered > 0
    assert load.errors == {}


def test_the_page_on_deployment_names_the_metrics_that_the_server_has(found):
    page = (project_root() / "docs" / "deploy.md").read_text()
    named = set(
        re.findall(r"\b(?:nv|model)_[a-z_]+(?:duration_us|count|success|failure|requests)", page)
    )
    assert len(named) > 6
    with urllib.request.urlopen(f"http://{found.server.metrics_address}/metrics") as answer:
        text = answer.read().decode()
    assert named <= set(re.findall(r"^# TYPE (\w+)", text, re.M))


# --- without a server ---


def load_of(*milliseconds: float, error: str = "") -> Load:
    """One request each second, which took so long."""
    outcomes = tuple(
        Outcome(second, second, second + each / 1000, error)
        for second, each in enumerate(milliseconds)
    )
    return Load(ClosedLoop(1), 8, float(len(milliseconds)), outcomes, {})


def test_the_latency_is_normal_from_the_second_on_after_which_it_stays_so():
    assert serving.seconds_until_normal(load_of(5, 5, 5), usual_ms=5) == 0
    assert serving.seconds_until_normal(load_of(50, 5, 5), usual_ms=5) == 1
    assert serving.seconds_until_normal(load_of(5, 50, 5, 6), usual_ms=5) == 2
    assert serving.seconds_until_normal(load_of(5, 5, 50), usual_ms=5) == np.inf
    refused = replace(load_of(1, 1), outcomes=load_of(1, 1, error="unavailable").outcomes)
    assert serving.seconds_until_normal(refused, usual_ms=5) == np.inf


def test_the_growth_of_memory_leaves_out_the_first_part():
    watch = serving.MemoryWatch(os.getpid())
    watch.samples = [(second, 50.0 + second) for second in range(50)]
    watch.samples += [(second, 100.0) for second in range(50, 90)]
    watch.samples += [(second, 103.0) for second in range(90, 100)]
    assert watch.growth(after=50) == pytest.approx(0.03)
    assert watch.growth(after=0) > 0.5
    assert np.isnan(watch.growth(after=1000))


def test_the_memory_is_that_of_a_process_and_its_children():
    assert serving.memory_mib(os.getpid()) > 10


def test_the_verdicts_follow_the_figures():
    record = {
        "overhead": [
            {"batch": 8, "added_ms": 1.2, "ratio": {"value": 2.0}},
            {"batch": 32, "added_ms": 9.0, "ratio": {"value": 1.2}},
        ],
        "throughput": [
            {"clients": 4, "protocol": "grpc", "kept": {"value": 0.95}},
            {"clients": 4, "protocol": "http", "kept": {"value": 0.5}},
        ],
        "kill": {"within": True},
        "soak": {"within": False},
    }
    assert list(serving.verdicts(record).values()) == [True, False, True, True, False]
    assert serving.verdicts({}) == {}


def test_the_record_has_the_verdicts_of_its_figures():
    record = json.loads(serving.RESULT.read_text())
    assert record["verdicts"] == serving.verdicts(record)
    assert {"kill", "locust", "soak"} <= set(record)
    for part in (record["kill"], record["soak"]):
        assert "wrong answer" not in part["errors"]
        assert part["answered"] + sum(part["errors"].values()) == part["requests"]
