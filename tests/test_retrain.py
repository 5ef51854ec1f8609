"""`python -m helpers retrain`, on files of your own and on a preset, and docs/retraining.md."""

import json
import re
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main
from PIL import Image

from helpers.sparsity import prune_2to4_, verify_model
from helpers.training.networks import create_model, load_checkpoint, save_checkpoint
from helpers.training.recipe import Recipe, read_recipe, write_recipe
from helpers.tutorial import commands
from helpers.tutorial.artifacts import Artifacts
from helpers.tutorial.settings import PRESETS, RECIPES, project_root

NETWORK = "shufflenet_v2_x0_5"  # a small one
OPTIONS = (
    "--epochs", "1", "--batch-size", "4", "--image-size", "32", "--learning-rate", "0.01",
    "--workers", "0", "--validation-images", "2", "--step-epochs", "none",
)  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(command_line):
    """Run the command in this process; return exit status, output and errors."""
    return partial(command_line, "retrain")


@pytest.fixture(scope="module")
def files_of_ones_own(tmp_path_factory):
    """Images of two classes, a dense and a pruned checkpoint."""
    folder = tmp_path_factory.mktemp("own")
    generator = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for name in ("cat", "dog"):
            (folder / "photos" / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 255, (36, 40, 3), dtype=np.uint8)
                path = folder / "photos" / part / name / f"{number}.jpg"
                Image.fromarray(pixels).save(path)
    torch.manual_seed(0)
    model = create_model(NETWORK, 2)
    save_checkpoint(model, folder / "dense.safetensors", NETWORK)
    prune_2to4_(model)
    save_checkpoint(model, folder / "pruned.safetensors", NETWORK)
    return folder


def arguments(folder, target, *more):
    return (folder / "pruned.safetensors", target, "--images", folder / "photos", *OPTIONS, *more)


def test_a_checkpoint_of_ones_own_is_retrained_and_resumed(run, files_of_ones_own, tmp_path):
    own, target = files_of_ones_own, tmp_path / "sparse.safetensors"
    teacher = ("--distillation", "0.5", "--teacher", own / "dense.safetensors", "--amp", "bf16")
    status, said, errors = run(*arguments(own, target, *teacher))
    assert status == 0, errors
    assert "pruned:    " in said
    assert "on 6 images" in said
    model, before = load_checkpoint(target), load_checkpoint(own / "pruned.safetensors")
    assert verify_model(model).query("eligible").is_2to4.all()
    assert not torch.equal(model.fc.weight, before.fc.weight)
    found = {path.name for path in (tmp_path / "sparse.run").iterdir()}
    assert {
        "recipe.yaml", "starts.jsonl", "metrics.jsonl", "curves.png", "progress.pt",
        "images_train.json", "images_val.json",
    } <= found  # fmt: skip
    recipe = read_recipe(tmp_path / "sparse.run" / "recipe.yaml")
    assert (recipe.epochs, recipe.amp, recipe.momentum) == (1, "bf16", 0.9)

    more = ("--epochs", "1", "--accumulation", "2")
    status, said, errors = run(*arguments(own, target, *teacher, *more))
    assert status == 0, errors
    assert "progress.pt has all epochs (1)" in said
    again = load_checkpoint(target).state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())
    starts = (tmp_path / "sparse.run" / "starts.jsonl").read_text().splitlines()
    assert len(starts) == 2
    assert json.loads(starts[0])["processes"] == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--recipe", "absent.yaml"), "The recipe absent.yaml cannot be read"),
        (("--amp", "fp8"), "amp of a recipe must be bf16, fp16 or None, not fp8"),
        (("--distillation", "0.5"), "there is no teacher"),
        (("--batch-size", "100"), "no whole batch of training images"),
        (("--model", "resnet18"), "does not hold the weights of resnet18"),
        (("--image-size", "0"), "cannot take images of 3x0x0"),
    ],
)
def test_what_does_not_fit_is_told_in_one_sentence(
    run, files_of_ones_own, tmp_path, monkeypatch, more, message
):
    monkeypatch.chdir(tmp_path)
    status, _, errors = run(*arguments(files_of_ones_own, "sparse.safetensors", *more))
    assert status == 2
    (line,) = [each for each in errors.splitlines() if "Error: " in each]
    assert message in line
    assert not (tmp_path / "sparse.safetensors").exists()


def test_a_checkpoint_with_other_classes_is_refused(run, files_of_ones_own, tmp_path):
    model = create_model(NETWORK, 3)
    prune_2to4_(model)
    save_checkpoint(model, tmp_path / "three.safetensors", NETWORK)
    command = arguments(files_of_ones_own, tmp_path / "sparse.safetensors")
    status, _, errors = run(tmp_path / "three.safetensors", *command[1:])
    assert status == 2
    assert "three.safetensors has 3 classes and" in errors
    assert "has 2. Give the images" in errors


def test_a_dense_checkpoint_is_refused(run, files_of_ones_own, tmp_path):
    command = arguments(files_of_ones_own, tmp_path / "sparse.safetensors")
    status, _, errors = run(files_of_ones_own / "dense.safetensors", *command[1:])
    assert status == 2
    assert "is not 2:4" in errors


def test_a_file_that_was_there_before_is_not_replaced(run, files_of_ones_own, tmp_path):
    target = tmp_path / "sparse.safetensors"
    target.write_text("precious")
    status, _, errors = run(*arguments(files_of_ones_own, target))
    assert status == 2
    assert "exists. Name another file, or add --overwrite." in errors
    assert target.read_text() == "precious"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_leaves_what_was_there(run, files_of_ones_own, tmp_path, monkeypatch):
    target = tmp_path / "sparse.safetensors"
    assert run(*arguments(files_of_ones_own, target))[0] == 0
    before = {path: path.read_bytes() for path in (tmp_path / "sparse.run").glob("*.pt")}

    save = torch.save

    def full(content, file):
        with open("/dev/full", "wb") as device:
            save(content, device)

    monkeypatch.setattr(torch, "save", full)
    status, _, errors = run(*arguments(files_of_ones_own, target, "--seed", "5"))
    assert status == 2
    assert "the disk is full" in errors
    (kept,) = (tmp_path / "sparse.run").glob("*.old.pt")
    assert kept.read_bytes() == next(iter(before.values()))
    assert load_checkpoint(target)


def test_a_file_needs_a_copy_and_images(run, files_of_ones_own):
    status, _, errors = run(files_of_ones_own / "pruned.safetensors")
    assert status == 2
    assert "Name the retrained copy to write after the file, and the --images." in errors


# --- presets ---


def test_a_preset_is_retrained_with_other_values(run, tiny_settings, tmp_path):
    artifacts = Artifacts(tiny_settings)
    model = create_model("resnext14_8x1d", 10)
    rules = {"rules": "tensorrt"}
    with artifacts.writing("01_dense.safetensors", facts={}) as path:
        save_checkpoint(model, path, "resnext14_8x1d")
    prune_2to4_(model)
    parents = ["01_dense.safetensors"]
    with artifacts.writing("02_pruned.safetensors", parents, rules) as path:
        save_checkpoint(model, path, "resnext14_8x1d")
    write_recipe(tiny_settings.recipe, tmp_path / "recipe.yaml")
    more = ("--recipe", tmp_path / "recipe.yaml", "--epochs", "1", "--distillation", "0.5")
    status, said, errors = run(*more)
    assert status == 0, errors
    assert "retrained: " in said
    facts = artifacts.facts("03_retrained.safetensors")
    assert facts["recipe"] == asdict(Recipe(1, 32, 0.1, 5e-4, warmup=0.2, distillation=0.5))
    assert (artifacts.path("03_run") / "curves.png").exists()
    status, _, errors = run("--seed", "3")
    assert status == 2
    assert "--seed is for a file of your own: name the file first." in errors


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_has_a_recipe_beside_it(preset):
    assert read_recipe(RECIPES / f"{preset}.yaml") == PRESETS[preset].recipe


def test_the_published_recipe_is_torchvisions():
    assert PRESETS["full"].recipe == Recipe(100, 256, 0.1, 1e-4, momentum=0.9, step_epochs=30)


# --- the command line and the page ---

PAGE = (project_root() / "docs" / "retraining.md").read_text()
COMMAND = typer.main.get_command(commands.app).commands["retrain"]


def test_every_value_of_a_recipe_has_an_option_and_a_row():
    names = {parameter.name for parameter in COMMAND.params}
    table = PAGE.partition("\n## The recipe\n")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert re.findall(r"`(\w+)`", "".join(rows)) == [
        "epochs", "batch_size", "learning_rate", "weight_decay",
        *(field.name for field in fields(Recipe)[4:]),
    ]  # fmt: skip
    for field in fields(Recipe):
        assert {field.name, f"{field.name}_"} & names


def test_the_options_of_the_page_exist():
    known = {option for each in COMMAND.params for option in each.opts}
    known |= {"--nproc-per-node", "--nnodes", "--max-restarts", "--logdir"}  # of others
    known |= {"--rdzv-backend", "--rdzv-endpoint", "--rdzv-id"}
    slurm = re.findall(r"#SBATCH (--[\w-]+)", PAGE)
    named = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", PAGE)) - set(slurm)
    assert {"--images", "--amp", "--workers"} <= named <= known
