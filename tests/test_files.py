import errno
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from helpers.errors import InputError, WriteError
from helpers.files import atomic_write, remove_unfinished, sha256, shown, write_json
from helpers.tutorial.settings import project_root


@dataclass(frozen=True)
class Point:
    x: int
    y: float


@dataclass(frozen=True)
class Track:
    points: tuple[Point, ...]
    where: Path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_path_below_the_working_folder_is_shown_relative_to_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "folder" / "net.onnx") == str(Path("folder", "net.onnx"))
    assert shown(Path("folder/../net.onnx")) == "net.onnx"


def test_a_path_elsewhere_is_shown_in_full(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for path in (tmp_path / "net.onnx", Path("../net.onnx")):
        assert shown(path) == str(tmp_path / "net.onnx")
    assert shown(tmp_path / "here too" / "net.onnx") == str(tmp_path / "here too" / "net.onnx")


def test_a_path_below_the_home_folder_is_shown_from_there(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert shown(tmp_path / "cache" / "triton") == str(Path("~", "cache", "triton"))


def test_a_link_is_shown_as_it_is_named(tmp_path, monkeypatch):
    (tmp_path / "net.onnx").symlink_to(tmp_path / "store" / "0123abcd")
    monkeypatch.chdir(tmp_path)
    assert shown(Path("net.onnx")) == "net.onnx"


def test_sha256_is_that_of_the_content(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# JSON.


def test_json_keeps_letters_readable(tmp_path):
    path = write_json(tmp_path / "facts.json", {"accuracy": "91.97 % ± 0.27"})
    assert "±" in path.read_text(encoding="utf-8")
    assert json.loads(path.read_text(encoding="utf-8")) == {"accuracy": "91.97 % ± 0.27"}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), np.float32("inf")])
def test_numbers_that_json_does_not_know_are_null_at_any_depth(tmp_path, value):
    content = {"a": value, "rows": [{"b": value}, Point(1, value), 2.5, np.array([value, 1])]}
    path = write_json(tmp_path / "facts.json", content)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "a": None,
        "rows": [{"b": None}, {"x": 1, "y": None}, 2.5, [None, 1]],
    }


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (np.float32(0.5), 0.5),
        (np.float64(0.1), 0.1),
        (np.int64(2**40), 2**40),
        (np.bool_(True), True),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.array(["a"]), ["a"]),
        (torch.tensor([1.0, 2.0]), [1, 2]),
        (torch.tensor(3), 3),
        (Path("folder/net.onnx"), str(Path("folder/net.onnx"))),
        (Point(np.int8(1), np.float16(0.25)), {"x": 1, "y": 0.25}),
        (Track((Point(1, 2),), Path("a")), {"points": [{"x": 1, "y": 2}], "where": "a"}),
        ([Point(1, 2.5)], [{"x": 1, "y": 2.5}]),
    ],
    ids=repr,
)
def test_what_results_consist_of_is_written(tmp_path, value, written):
    path = write_json(tmp_path / "facts.json", {"deep": [value]})
    assert json.loads(path.read_text()) == {"deep": [written]}


def recursive():
    content = {}
    content["itself"] = content
    return content


@pytest.mark.parametrize(
    "value", [object(), Point, {1, 2}, np.array([1j]), {(1, 2): "a key"}, recursive()], ids=repr
)
def test_what_json_cannot_hold_leaves_the_old_file(tmp_path, value):
    path = write_json(tmp_path / "facts.json", {"a": 1})
    with pytest.raises(InputError, match=r"facts\.json was not written as JSON: ") as caught:
        write_json(path, {"a": value})
    assert "\n" not in str(caught.value)
    assert json.loads(path.read_text()) == {"a": 1}
    assert names(tmp_path) == ["facts.json"]


# In one piece or not at all.


def test_a_new_file_takes_the_place_of_the_old_one(tmp_path):
    target = tmp_path / "deep" / "folder" / "file"
    for content in ("old", "new"):
        with atomic_write(target) as part:
            part.write_text(content)
        assert target.read_text() == content
    assert names(target.parent) == ["file"]


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path):
    target = tmp_path / "file"
    target.write_text("old")
    with atomic_write(target) as part:
        part.write_text("new")
        assert target.read_text() == "old"
        assert part.parent == target.parent  # one file system, so that replacing is atomic
    assert target.read_text() == "new"


def test_everybody_may_read_a_file(tmp_path):
    with atomic_write(tmp_path / "file") as part:
        part.write_text("text")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    "error", [ValueError("no"), OSError(errno.EIO, "broken"), KeyboardInterrupt(), SystemExit(1)]
)
def test_any_exception_leaves_the_old_file_and_no_other(tmp_path, error):
    target = tmp_path / "file"
    target.write_text("old")
    with pytest.raises(type(error)) as caught, atomic_write(target) as part:
        part.write_text("half of the new")
        raise error
    assert caught.value is error
    assert target.read_text() == "old"
    assert names(tmp_path) == ["file"]


FULL = [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("Could not write the model: No space left on device"),
]


@pytest.mark.parametrize("error", FULL, ids=["disk", "quota", "safetensors", "other"])
def test_a_full_disk_is_reported_in_one_sentence(tmp_path, error):
    target = tmp_path / "net.safetensors"
    target.write_text("old")
    with pytest.raises(WriteError) as caught, atomic_write(target) as part:
        part.write_text("half")
        raise error
    message = str(caught.value)
    assert message.startswith(f"{target} could not be written: the disk is full; free some space")
    assert message.endswith("What was there before is unchanged.")
    assert "\n" not in message
    assert isinstance(caught.value, OSError)
    assert target.read_text() == "old"
    assert names(tmp_path) == [target.name]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_device_that_is_full_is_reported(tmp_path):
    with (
        pytest.raises(WriteError, match="the disk is full"),
        atomic_write(tmp_path / "file"),
        open("/dev/full", "w") as device,
    ):
        device.write("anything")
    assert names(tmp_path) == []


ON_A_FULL_DISK = """
import sys
from pathlib import Path
from helpers.errors import WriteError
from helpers.training.networks import resnext14_8x1d

target = Path(sys.argv[1]) / "file"
target.write_text("old")
model = resnext14_8x1d()
try:
    {write}
except WriteError as error:
    print(error)
assert target.read_text() == "old"
assert [path.name for path in target.parent.iterdir()] == [target.name]
"""
WRITERS = {
    "a checkpoint": """
    from helpers.training.networks import save_checkpoint
    save_checkpoint(model, target, "resnext14_8x1d")""",
    "a compressed checkpoint": """
    from helpers.sparsity import prune_2to4_, save_compressed
    prune_2to4_(model)
    save_compressed(model, target)""",
    "an ONNX file": """
    from helpers.inference.export import export_onnx
    export_onnx(model, target, (1, 28, 28))""",
    "the progress of a training": """
    import torch
    from torch.utils.data import DataLoader, TensorDataset
    from helpers.training.data import Splits
    from helpers.training.loop import train
    from helpers.training.recipe import Recipe
    images = DataLoader(TensorDataset(torch.randn(32, 1, 28, 28), torch.arange(32) % 10), 32)
    recipe = Recipe(epochs=1, batch_size=32, learning_rate=0.1, weight_decay=0.0)
    target.unlink()  # a file that is of no training would be kept under another name
    try:
        train(model, Splits(images, images, images, []), recipe, 0, progress_file=target)
    finally:
        assert not target.exists()
        target.write_text("old")""",
}


@pytest.mark.parametrize("what", WRITERS)
def test_what_does_not_fit_on_the_disk_leaves_the_old_file(tmp_path, what):
    mount = f"mount -t tmpfs -o size=200k tmpfs '{tmp_path}'"
    own_mounts = [shutil.which("unshare") or "unshare", "--mount", "sh", "-c"]
    try:
        subprocess.run([*own_mounts, mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system is not permitted here")
    script = f'{mount} && exec "$0" -c "$1" "$2"'
    program = ON_A_FULL_DISK.replace("{write}", WRITERS[what].strip())
    run = subprocess.run(
        [*own_mounts, script, sys.executable, program, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=project_root(),
    )
    assert run.returncode == 0, run.stderr
    assert "file could not be written: the disk is full" in run.stdout


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM, errno.EROFS])
@pytest.mark.parametrize("call", ["mkdir", "mkstemp"])
def test_a_folder_that_is_not_writable_is_reported_in_one_sentence(
    tmp_path, monkeypatch, call, code
):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(*{"mkdir": (Path, "mkdir"), "mkstemp": (tempfile, "mkstemp")}[call], refuse)
    with pytest.raises(WriteError) as caught, atomic_write(tmp_path / "new" / "file"):
        pass
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'new' / 'file'} could not be written: ")
    assert "its folder is not writable; change its permissions" in message
    assert "\n" not in message


def test_a_file_in_place_of_the_folder_is_reported(tmp_path):
    (tmp_path / "folder").write_text("a file")
    for target in (tmp_path / "folder" / "file", tmp_path / "folder" / "deep" / "file"):
        with pytest.raises(WriteError, match="part of its path is a file"), atomic_write(target):
            pass
    assert (tmp_path / "folder").read_text() == "a file"


def test_a_folder_in_place_of_the_file_is_reported(tmp_path):
    (tmp_path / "name").mkdir()
    with pytest.raises(WriteError, match="a folder of that name"):
        write_json(tmp_path / "name", {})
    assert names(tmp_path) == ["name"]


def test_what_a_killed_write_has_left_is_deleted(tmp_path):
    path = tmp_path / "file.pt"
    writing = atomic_write(path)
    writing.__enter__().write_text("half")  # and then it is killed
    (tmp_path / ".file.json.abc").write_text("of another file")
    remove_unfinished(path)
    assert [each.name for each in tmp_path.iterdir()] == [".file.json.abc"]
    with atomic_write(path) as part:
        part.write_text("whole")
    remove_unfinished(path)
    assert path.read_text() == "whole"
