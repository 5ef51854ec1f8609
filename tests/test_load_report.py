import json

import numpy as np
import pytest

from helpers.errors import InputError
from helpers.serving.endpoint import ModelInput
from helpers.serving.load import ClosedLoop, OpenLoop
from helpers.tutorial import load_report, own_models
from helpers.tutorial.load_report import Endpoints, Loads


@pytest.fixture
def server(monkeypatch):
    """A server without a network: it sums the values of each image; `broken` models are wrong."""

    def answers(endpoint, requests):
        extra = endpoint.model == "broken"
        return [{"sums": each["images"].sum((1, 2)) + extra} for each in requests]

    def compare_loads(models, requests, arrivals, seconds, expected, tolerance, timeout):
        rows = []
        for each in arrivals:
            for name, endpoint in models.items():
                pairs = zip(answers(endpoint, requests[name]), expected[name], strict=True)
                wrong = sum(not np.array_equal(a["sums"], b["sums"]) for a, b in pairs)
                rows.append(
                    {
                        "model": name, "protocol": endpoint.protocol, **each.facts(), "batch": 4,
                        "requests": 16, "answered": 0 if endpoint.model == "silent" else 16 - wrong,
                        "images_per_second": 100.0, "p50": 1.0, "p95": 2.0, "p99": 3.0,
                        "sent_late_p99": 0.1, "errors": {"wrong answer": wrong} if wrong else {},
                    }
                )  # fmt: skip
        return load_report.pd.DataFrame(rows)

    monkeypatch.setattr(
        load_report, "find_inputs", lambda endpoint: [ModelInput("images", "FP32", (-1, 2, 2))]
    )
    monkeypatch.setattr(
        load_report,
        "ask_idle_server",
        lambda endpoint, requests, timeout: [{"sums": r["images"].sum((1, 2))} for r in requests],
    )
    monkeypatch.setattr(load_report, "compare_loads", compare_loads)


LOADS = Loads(batch=4, clients=[1, 3], rates=[20.0], seconds=1, timeout=5, seed=7)


def test_the_result_has_a_row_for_each_load_and_model(server, tmp_path):
    picture = tmp_path / "load.png"
    result = load_report.load_test(Endpoints(["dense", "sparse"], "http", ""), LOADS, 0.0, picture)
    assert result.passed
    assert picture.stat().st_size > 0
    facts = json.loads(result.json())
    assert [(row["model"], row["clients"], row["rate"]) for row in facts["rows"]] == [
        ("dense", 1, None), ("sparse", 1, None), ("dense", 3, None), ("sparse", 3, None),
        ("dense", None, 20), ("sparse", None, 20),
    ]  # fmt: skip
    assert (facts["protocol"], facts["seed"]) == ("http", 7)
    assert "none" in result.text.splitlines()[1]


@pytest.mark.parametrize("model", ["broken", "silent"])
def test_a_wrong_answer_or_none_at_all_is_no_success(server, model):
    result = load_report.load_test(Endpoints(["dense", model], "grpc", ""), LOADS, 0.0, None)
    assert isinstance(result, own_models.Result)
    assert not result.passed
    assert ("16 wrong answer" in result.text) == (model == "broken")


def test_the_loads_are_those_that_were_asked_for():
    assert LOADS.arrivals() == [ClosedLoop(1), ClosedLoop(3), OpenLoop(20.0, seed=7)]
    unless_given = Loads(8, [], [], 1, 1, 0).arrivals()
    assert unless_given == [ClosedLoop(number) for number in load_report.CLIENTS]
    assert Loads(8, [], [5.0], 1, 1, 0).arrivals() == [OpenLoop(5.0)]


def test_a_protocol_that_does_not_exist_is_an_error(server):
    with pytest.raises(InputError, match="no protocol 'ftp'"):
        load_report.load_test(Endpoints(["dense"], "ftp", ""), LOADS, 0.0, None)
