"""Starting in the middle: what is made, what is kept, what is refused."""

import json
import re
from dataclasses import replace

import nbformat
import pytest
import torch

from helpers.inference import engine
from helpers.training import loop
from helpers.training.networks import load_checkpoint
from helpers.tutorial import catch_up as module
from helpers.tutorial import inputs, steps
from helpers.tutorial.artifacts import BARE, LEAVES, NOTEBOOKS, ArtifactError, Artifacts
from helpers.tutorial.catch_up import READS, catch_up, keep_retrained
from helpers.tutorial.checks import TutorialError
from helpers.tutorial.settings import project_root


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """The quick preset in an empty folder, after catching up to notebook 05; nothing measured."""
    from helpers.tutorial.settings import Settings

    settings = replace(Settings.load("quick"), artifacts_dir=tmp_path_factory.mktemp("artifacts"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "evaluate", lambda *_: pytest.fail("an accuracy was measured"))
        assert catch_up(settings, "05") == ["00", "01", "02", "03", "04"]
    return settings


def test_every_file_that_the_notebooks_ahead_read_is_there(ready):
    artifacts = Artifacts(ready)
    for number in ("00", "01", "02", "03", "04"):
        for name in set(LEAVES[number]) - set(BARE):
            assert artifacts.require(name)


def test_the_steps_ahead_run(ready):
    steps.build(ready, None)
    assert catch_up(ready, "06") == []


def test_without_an_engine_builder_the_other_files_are_made(ready, monkeypatch, capsys):
    artifacts = Artifacts(ready)
    for name in LEAVES["05"]:
        artifacts.path(name).unlink(missing_ok=True)
    monkeypatch.setattr(engine, "why_no_builder", lambda: "None loads here.")
    catch_up(ready, "06")
    assert "No engines: None loads here." in capsys.readouterr().out
    assert not any(artifacts.path(name).exists() for name in LEAVES["05"])


def test_the_facts_are_those_of_the_recorded_run(ready):
    recorded = json.loads((ready.data_dir / "reference" / "quick_cpu.json").read_text())["summary"]
    artifacts = Artifacts(ready)
    for name, word in (
        ("01_dense.safetensors", "dense"),
        ("02_pruned.safetensors", "pruned"),
        ("03_retrained.safetensors", "retrained"),
    ):
        top1 = artifacts.facts(name)["test"]["correct"] / 100
        assert recorded[f"{word}, test top-1"].startswith(f"{top1:.2f} %")


def test_the_weights_are_those_that_ship_and_two_of_four_are_zero(ready):
    shipped = load_checkpoint(inputs.retrained_path(ready)).state_dict()
    taken = load_checkpoint(Artifacts(ready).require("03_retrained.safetensors")).state_dict()
    assert all(torch.equal(taken[key], value) for key, value in shipped.items())


def test_what_is_there_is_kept(ready, capsys):
    before = {path: path.stat().st_mtime_ns for path in ready.artifacts_dir.iterdir()}
    assert catch_up(ready, "05") == []
    assert {path: path.stat().st_mtime_ns for path in ready.artifacts_dir.iterdir()} == before
    assert "03_retrained.safetensors kept" in capsys.readouterr().out


def test_a_damaged_file_is_named_and_kept(settings):
    catch_up(settings, "02")
    path = settings.artifacts_dir / "01_dense.safetensors"
    path.write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match=r"^01_dense\.safetensors is damaged"):
        catch_up(settings, "03")
    assert path.read_bytes() == b"damaged"


def test_a_network_that_was_pruned_otherwise_is_not_given_retrained_weights(settings, monkeypatch):
    catch_up(settings, "02")
    monkeypatch.setattr(inputs, "load_splits", lambda _: pytest.fail("images were loaded"))
    monkeypatch.setattr(steps.inputs, "load_splits", lambda _: pytest.fail("images were loaded"))
    card = inputs.retrained_card(settings)
    steps.prune(settings, "any", module.Accuracy(**card["pruned_test"]))
    with pytest.raises(TutorialError, match=r"^02_pruned\.safetensors is not the one that"):
        catch_up(settings, "04")
    assert not (settings.artifacts_dir / "03_retrained.safetensors").exists()


def test_no_other_preset_ships_retrained_weights(settings):
    other = replace(settings, preset="full")
    catch_up(settings, "03")
    with pytest.raises(TutorialError, match=r"^No retrained network of the preset full is part"):
        catch_up(other, "04")


def test_an_unknown_notebook_is_refused_with_the_known_ones(settings):
    with pytest.raises(TutorialError, match=r"There is no notebook '12'\. There are 00, 01"):
        catch_up(settings, "12")


def test_the_retrained_network_is_kept_as_it_is_shipped(ready, tmp_path):
    copy = replace(ready, data_dir=tmp_path)
    path = keep_retrained(copy)
    shipped = inputs.retrained_path(ready)
    assert path.read_bytes() == shipped.read_bytes()
    ours, theirs = (json.loads(each.with_suffix(".json").read_text()) for each in (path, shipped))
    assert set(theirs) <= set(ours)
    for key in ("sha256", "seed", "parents", "dense_sha256", "pruned_test", "test", "recipe"):
        assert ours[key] == theirs[key]


@pytest.mark.parametrize("number", NOTEBOOKS)
def test_each_notebook_reads_what_this_module_says(number):
    first = nbformat.read(project_root() / "notebooks" / NOTEBOOKS[number], as_version=4).cells[0]
    (row,) = re.findall(r"^\| \*\*Reads\*\* \| (.*) \|$", first.source, re.M)
    assert set(re.findall(r"`(\d\d)_", row)) <= set(READS[number])
