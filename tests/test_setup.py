import json

import pytest

from helpers import machine
from helpers.inference import engine
from helpers.tutorial import backends, setup
from helpers.tutorial.artifacts import Artifacts


def test_the_setup_is_printed_and_recorded(tiny_settings, monkeypatch, capsys):
    found = engine.Builder("TensorRT-RTX", json, "1.7", "the test says so")
    monkeypatch.setattr(engine, "find_builder", lambda: found)
    monkeypatch.setattr(setup, "setup_report", lambda _: [(True, "Python"), (False, "onnx")])
    reasons = {"TensorRT": "No GPU.", "ONNX Runtime": ""}
    monkeypatch.setattr(backends, "backend_status", lambda: reasons)
    setup.check_setup(tiny_settings)
    assert capsys.readouterr().out.splitlines() == [
        "[OK] Python",
        "[FAIL] onnx",
        "[OK] engines: TensorRT-RTX 1.7 (the test says so)",
        "[--] inference with TensorRT: No GPU.",
        "[OK] inference with ONNX Runtime",
    ]
    record = json.loads(Artifacts(tiny_settings).require("00_setup.json").read_text())
    assert record == {"machine": machine.describe(), "builder": "TensorRT-RTX"}


def test_a_machine_without_an_engine_builder_is_recorded_too(tiny_settings, monkeypatch, capsys):
    """As on macOS."""
    monkeypatch.setattr(engine, "why_no_builder", lambda: "None loads here.")
    setup.check_setup(tiny_settings)
    assert "[--] engines: None loads here." in capsys.readouterr().out
    record = json.loads(Artifacts(tiny_settings).require("00_setup.json").read_text())
    assert record["builder"] is None


@pytest.mark.parametrize(("cores", "said"), [(1, "1 core, "), (2, "2 cores, ")])
def test_the_machine_is_described_in_one_line(tiny_settings, monkeypatch, cores, said):
    here = {"cores": cores, "memory_gib": 4.0, "cpu": "a processor"}
    monkeypatch.setattr(setup, "describe", lambda: here)
    lines = [line for _, line in setup.setup_report(tiny_settings)]
    assert f"{said}4.0 GiB, a processor" in lines
