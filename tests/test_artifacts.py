import errno
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import SafetensorError

from helpers.files import atomic_write, sha256
from helpers.machine import versions
from helpers.training.networks import resnext14_8x1d, save_checkpoint
from helpers.tutorial import artifacts as module
from helpers.tutorial.artifacts import BARE, LEAVES, NOTEBOOKS, ArtifactError, Artifacts
from helpers.tutorial.settings import project_root

DENSE, PRUNED, RETRAINED = (
    "01_dense.safetensors",
    "02_pruned.safetensors",
    "03_retrained.safetensors",
)


@pytest.fixture
def artifacts(settings):
    return Artifacts(settings)


def write(artifacts, name, content, parents=()):
    with artifacts.writing(name, parents) as path:
        path.write_text(content)


@pytest.fixture
def chain(artifacts):
    """Three artifacts, each made from the one before."""
    write(artifacts, DENSE, "dense")
    write(artifacts, PRUNED, "pruned", [DENSE])
    write(artifacts, RETRAINED, "retrained", [PRUNED])
    return artifacts


def refusal(artifacts, name):
    with pytest.raises(ArtifactError) as error:
        artifacts.require(name)
    message = str(error.value)
    assert "\n" not in message
    return message


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# What is required must be there, whole and up to date.


def test_an_artifact_that_is_whole_is_returned(chain):
    assert chain.require(RETRAINED).read_text() == "retrained"


def test_every_notebook_named_exists():
    assert all((project_root() / "notebooks" / name).is_file() for name in NOTEBOOKS.values())


def test_a_missing_artifact_names_the_notebook_that_makes_it(artifacts):
    assert refusal(artifacts, PRUNED) == (
        "02_pruned.safetensors is missing. Run 02_prune_2_4.ipynb first, from top to bottom."
    )


def test_a_missing_sidecar_counts_as_missing(chain):
    chain.sidecar(DENSE).unlink()
    assert refusal(chain, DENSE).startswith("01_dense.safetensors is missing. Run 01_")


@pytest.mark.parametrize("content", ["retraine", "retrained!", "Retrained", ""])
def test_a_truncated_or_changed_artifact_is_refused(chain, content):
    chain.path(RETRAINED).write_text(content)
    message = refusal(chain, RETRAINED)
    assert message.startswith("03_retrained.safetensors is damaged")
    assert "Run 03_retrain.ipynb" in message


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b"null", b"\xff\xfe", b'{"a": 1}'])
def test_a_damaged_sidecar_is_refused(chain, content):
    chain.sidecar(PRUNED).write_bytes(content)
    message = refusal(chain, PRUNED)
    assert message.startswith("02_pruned.safetensors.json is damaged. Run 02_prune_2_4.ipynb")


@pytest.mark.parametrize("change", [{"parents": None}, {"parents": []}, {"parents": {"no": "x"}}])
def test_a_sidecar_with_damaged_parents_is_refused(chain, change):
    sidecar = json.loads(chain.sidecar(PRUNED).read_text())
    chain.sidecar(PRUNED).write_text(json.dumps(sidecar | change))
    assert refusal(chain, PRUNED).startswith("02_pruned.safetensors.json is damaged")


def test_a_child_is_outdated_when_its_parent_is_rewritten_with_other_bytes(chain):
    write(chain, DENSE, "dense, trained again")
    message = refusal(chain, PRUNED)
    assert message.startswith("02_pruned.safetensors is out of date: 01_dense.safetensors")
    assert "Run 02_prune_2_4.ipynb" in message


def test_a_grandchild_names_the_first_step_to_repeat(chain):
    write(chain, DENSE, "dense, trained again")
    message = refusal(chain, RETRAINED)
    assert message.startswith("02_pruned.safetensors is out of date")
    assert "Run 02_prune_2_4.ipynb" in message


def test_a_child_stays_valid_when_its_parent_is_rewritten_with_the_same_bytes(chain):
    write(chain, DENSE, "dense")
    assert chain.require(RETRAINED) == chain.path(RETRAINED)


def test_a_child_without_its_parent_is_refused(chain):
    chain.path(DENSE).unlink()
    assert refusal(chain, PRUNED).startswith("01_dense.safetensors is missing. Run 01_")


def test_a_damaged_parent_stops_the_step(chain):
    chain.path(DENSE).write_text("damaged")
    with pytest.raises(ArtifactError, match=r"01_dense\.safetensors is damaged"):
        write(chain, PRUNED, "new", [DENSE])
    assert chain.path(PRUNED).read_text() == "pruned"


# The sidecar.


def test_the_sidecar_records_where_an_artifact_comes_from(chain):
    sidecar = json.loads(chain.sidecar(PRUNED).read_text())
    assert sidecar["made_by"] == "02_prune_2_4.ipynb"
    assert sidecar["preset"] == "quick"
    assert sidecar["seed"] == chain.settings.seed
    assert sidecar["sha256"] == sha256(chain.path(PRUNED))
    assert sidecar["parents"] == {DENSE: sha256(chain.path(DENSE))}
    assert sidecar["versions"] == versions()


def test_facts_added_inside_the_block_are_recorded(artifacts):
    facts = {"before": 1}
    with artifacts.writing(DENSE, facts=facts) as path:
        path.write_text("dense")
        facts["inside"] = 2
    assert artifacts.facts(DENSE) == {"before": 1, "inside": 2}


def test_an_artifact_without_facts_has_none(chain):
    assert chain.facts(DENSE) == {}


def test_a_checkpoint_is_readable_by_all_users(artifacts):
    with artifacts.writing(DENSE) as path:
        save_checkpoint(resnext14_8x1d(), path, "resnext14_8x1d")
    assert artifacts.require(DENSE).stat().st_mode & 0o777 == 0o644


@dataclass(frozen=True)
class Point:
    x: int
    y: float


def test_dataclasses_are_written_as_objects(artifacts):
    with artifacts.writing(DENSE, facts={"points": [Point(1, 2.5)]}) as path:
        path.write_text("dense")
    assert artifacts.facts(DENSE) == {"points": [{"x": 1, "y": 2.5}]}


def test_a_failed_step_leaves_its_artifact_unchanged(chain):
    before = chain.describe(PRUNED)
    listing = names(chain.folder)
    with pytest.raises(ZeroDivisionError), chain.writing(PRUNED, [DENSE]) as path:
        path.write_text("half")
        _ = 1 / 0
    assert chain.describe(PRUNED) == before
    assert chain.path(PRUNED).read_text() == "pruned"
    assert names(chain.folder) == listing


FULL = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("Could not write the model: No space left on device"),
]


@pytest.mark.parametrize("error", FULL, ids=["disk", "quota", "safetensors", "other"])
def test_a_full_disk_is_reported_in_one_sentence(chain, error):
    listing = names(chain.folder)
    with pytest.raises(ArtifactError) as caught, chain.writing(PRUNED, [DENSE]) as path:
        path.write_text("half")
        raise error
    message = str(caught.value)
    assert "02_pruned.safetensors could not be written" in message
    assert "the disk is full; free some space" in message
    assert "TUTORIAL_ARTIFACTS sets the folder" in message
    assert "\n" not in message
    assert chain.require(PRUNED).read_text() == "pruned"
    assert names(chain.folder) == listing


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
@pytest.mark.parametrize("call", ["mkdir", "mkstemp"])
def test_a_read_only_folder_is_reported_in_one_sentence(artifacts, monkeypatch, call, code):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(*{"mkdir": (Path, "mkdir"), "mkstemp": (tempfile, "mkstemp")}[call], refuse)
    with pytest.raises(ArtifactError) as caught:
        write(artifacts, DENSE, "dense")
    message = str(caught.value)
    assert "01_dense.safetensors could not be written" in message
    assert "change its permissions" in message
    assert "TUTORIAL_ARTIFACTS sets the folder" in message
    assert "\n" not in message


def test_an_artifact_without_room_for_its_sidecar_is_refused(chain, monkeypatch):
    def full(path, _):
        with atomic_write(path):
            raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_json", full)
        with pytest.raises(ArtifactError, match="disk is full"):
            write(chain, PRUNED, "pruned again", [DENSE])
    assert "Run 02_prune_2_4.ipynb" in refusal(chain, PRUNED)


# The name says which notebook makes an artifact.


@pytest.mark.parametrize(
    "name", ["report.json", "99_report.json", "", "1_dense.safetensors", "01", "01_"]
)
def test_a_name_without_the_number_of_a_notebook_is_refused_before_the_work(artifacts, name):
    with (
        pytest.raises(ArtifactError, match="begin it with the number of the notebook"),
        artifacts.writing(name),
    ):
        pytest.fail("the work was begun")
    assert not artifacts.folder.exists()
    assert refusal(artifacts, name).startswith(f"{name!r} is not a name for an artifact")


# What a notebook has left, which its last cell shows.


def test_every_notebook_leaves_something_under_its_own_number():
    assert list(LEAVES) == list(NOTEBOOKS)
    for number, files in LEAVES.items():
        assert files
        assert all(file.startswith(f"{number}_") for file in files)
    assert set(BARE) < {file for files in LEAVES.values() for file in files}


def test_what_a_notebook_has_left_is_shown_with_its_size_and_origin(chain):
    chain.path("03_progress.pt").write_bytes(bytes(2_500_000))
    table = chain.left_by("03")
    assert list(table.index) == LEAVES["03"]
    assert list(table["size"]) == ["0.0 kB", "2.5 MB"]
    assert list(table["made from"]) == [PRUNED, ""]


def test_the_size_of_a_folder_is_that_of_its_files(artifacts):
    (artifacts.folder / "09_repository" / "dense").mkdir(parents=True)
    (artifacts.folder / "09_repository" / "dense" / "model").write_bytes(bytes(1500))
    (artifacts.folder / "09_repository" / "list").write_bytes(bytes(500))
    write(artifacts, "09_serving.json", "{}")
    assert artifacts.left_by("09")["size"]["09_repository"] == "2.0 kB"


@pytest.mark.parametrize("missing", LEAVES["03"])
def test_what_a_notebook_should_have_left_and_has_not_is_named(chain, missing):
    chain.path("03_progress.pt").write_text("progress")
    chain.path(missing).unlink()
    with pytest.raises(ArtifactError, match=rf"^{missing} is missing\. Run 03_retrain\.ipynb"):
        chain.left_by("03")


def test_damage_shows_in_what_a_notebook_has_left(chain):
    chain.path(DENSE).write_text("damaged")
    with pytest.raises(ArtifactError, match=r"^01_dense\.safetensors is damaged"):
        chain.left_by("02")


def test_the_notebooks_are_named_if_another_is_asked_for(artifacts):
    with pytest.raises(ArtifactError, match=r"^There is no notebook '2'\. There are 00, 01, "):
        artifacts.left_by("2")


# A checksum is taken once while its file is unchanged.


@pytest.fixture
def taken(monkeypatch) -> list[str]:
    """The names of the files whose checksums are taken, in order."""
    names = []

    def counted(path: Path) -> str:
        names.append(path.name)
        return sha256(path)

    monkeypatch.setattr(module, "sha256", counted)
    return names


def test_a_checksum_is_taken_once_while_the_file_is_unchanged(chain, settings, taken):
    artifacts = Artifacts(settings)
    for _ in range(3):
        artifacts.require(RETRAINED)
        artifacts.facts(PRUNED)
    assert sorted(taken) == [DENSE, PRUNED, RETRAINED]


def test_writing_takes_the_checksum_of_each_parent_once_and_of_the_new_file(chain, settings, taken):
    with Artifacts(settings).writing("04_dense_fp32.onnx", [RETRAINED, PRUNED, DENSE]) as path:
        path.write_text("exported")
    assert sorted(taken)[-3:] == [DENSE, PRUNED, RETRAINED]
    assert len(taken) == 4


def test_a_changed_file_is_detected(chain):
    chain.require(RETRAINED)
    chain.path(DENSE).write_text("another one")
    assert refusal(chain, RETRAINED).startswith("01_dense.safetensors is damaged")


def test_a_replaced_file_of_the_same_size_and_time_is_detected(chain):
    chain.require(DENSE)
    old = chain.path(DENSE).stat()
    with atomic_write(chain.path(DENSE)) as part:
        part.write_text("DENSE")
    os.utime(chain.path(DENSE), ns=(old.st_atime_ns, old.st_mtime_ns))
    assert refusal(chain, DENSE).startswith("01_dense.safetensors is damaged")


def test_a_repaired_file_is_accepted(chain):
    content = chain.path(DENSE).read_bytes()
    chain.path(DENSE).write_text("damaged")
    refusal(chain, DENSE)
    chain.path(DENSE).write_bytes(content)
    assert chain.require(DENSE).read_bytes() == content
