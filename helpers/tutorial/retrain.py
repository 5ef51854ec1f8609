"""Retrain the network of a preset, or a pruned checkpoint of your own: `python -m helpers retrain`.

The same call runs in one process and in several that `torchrun` has started. Explained in
`03_retrain.ipynb` and docs/retraining.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from helpers.errors import InputError, first_line
from helpers.files import shown
from helpers.layers import in_mode
from helpers.sparsity import masks_of
from helpers.sparsity.compressed import read_checkpoint
from helpers.training import loop, networks
from helpers.training.data import folder_splits
from helpers.training.distributed import Processes, process_group
from helpers.training.progress import Epoch
from helpers.training.recipe import Recipe, make_recipe, read_recipe
from helpers.training.run_folder import RunFolder
from helpers.tutorial import inputs, plots
from helpers.tutorial.artifacts import Artifacts
from helpers.tutorial.settings import Settings

_PROGRESS = "progress.pt"  # in a run folder


def choose_recipe(default: Recipe, path: Path | None, changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a file, or else the default one, with some of its values changed.

    Raises:
        InputError: the file is missing or no recipe, or a value is unknown or out of its range.
    """
    if path is not None:
        return read_recipe(path, changes)
    return make_recipe({**asdict(default), **changes})


def retrain_preset(settings: Settings, recipe: Recipe) -> None:
    """Repeat the training of a preset with the zeros held; resumable (notebook 03).

    Raises:
        ArtifactError: the pruned network is missing.
        InputError, DataError, TrainingError, UnavailableError: as the modules of training raise.
    """
    with process_group() as together:
        artifacts = Artifacts(settings)
        model = networks.load_checkpoint(artifacts.require("02_pruned.safetensors"))
        teacher = None
        if recipe.distillation:
            teacher = networks.load_checkpoint(artifacts.require("01_dense.safetensors"))
        rules = artifacts.facts("02_pruned.safetensors")["rules"]
        splits = inputs.load_splits(replace(settings, recipe=recipe))
        history = loop.train(
            model,
            splits,
            recipe,
            settings.seed,
            masks=masks_of(model, rules),
            progress_file=artifacts.path("03_progress.pt"),
            teacher=teacher,
            on_epoch=_keep_records(artifacts.path("03_run"), recipe, together),
        )
        accuracy = loop.evaluate_together(model, splits.test, recipe.channels_last)
        if together.is_first:
            facts = {"test": accuracy, "recipe": recipe, "history": history}
            parents = ["02_pruned.safetensors"]
            with artifacts.writing("03_retrained.safetensors", parents, facts) as path:
                networks.save_checkpoint(model, path, settings.model)
            print(f"retrained: {accuracy}")


@dataclass(frozen=True)
class Pruning:
    """How a checkpoint was pruned; what `prune_2to4_` was called with."""

    rules: str = "tensorrt"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()


@dataclass(frozen=True)
class OwnImages:
    """Photographs of your own, and how to load them."""

    folder: Path  # with train/ and val/
    validation_images: int | None = None  # held out of train/; None: one in twenty
    size: int = 224  # height and width in pixels
    workers: int = 4


def retrain_file(
    source: Path,
    target: Path,
    images: OwnImages,
    recipe: Recipe,
    seed: int,
    pruning: "Pruning",
    network: str | None = None,
    teacher: Path | None = None,
    run: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Retrain a pruned checkpoint of your own on photographs of your own; resumable.

    Args:
        source: the pruned checkpoint, a .safetensors file.
        target: the retrained checkpoint to write.
        images: to train on.
        recipe: the procedure of the original training.
        pruning: how the checkpoint was pruned.
        seed: sets the held out images, the order and the augmentation.
        network: of a checkpoint that does not name it.
        teacher: the dense checkpoint of the same classes to learn from, if the recipe distils.
        run: the folder for progress, metrics and curves; else beside the target.
        overwrite: replace a target that this training has not written.

    Raises:
        InputError: a file is missing, damaged or does not fit to the images, a weight is not
            2:4, or the target exists.
        DataError, TrainingError, UnavailableError: as the modules of training raise.
    """
    run = run or target.with_suffix(".run")
    if target.exists() and not overwrite and not (run / _PROGRESS).exists():
        raise InputError(f"{shown(target)} exists. Name another file, or add --overwrite.")
    with process_group() as together:
        name = network or read_checkpoint(source).network
        model = networks.load_checkpoint(source, network)
        masks = masks_of(model, pruning.rules, pruning.include, pruning.exclude)
        splits = folder_splits(
            images.folder,
            images.validation_images,
            recipe.batch_size,
            recipe.batch_size,
            images.workers,
            seed,
            images.size,
            records=run,
        )
        classes = len(splits.classes)
        _require_fit(model, source, classes, images)
        dense = None
        if teacher is not None:
            dense = networks.load_checkpoint(teacher, network)
            _require_fit(dense, teacher, classes, images)
        history = loop.train(
            model,
            splits,
            recipe,
            seed,
            masks,
            progress_file=run / _PROGRESS,
            teacher=dense,
            on_epoch=_keep_records(run, recipe, together),
        )
        pruned = networks.load_checkpoint(source, network)
        before, after = (
            loop.evaluate_together(each, splits.test, recipe.channels_last)
            for each in (pruned, model)
        )
        if together.is_first:
            networks.save_checkpoint(model, target, str(name))
            print(f"pruned:    {before}")
            print(f"retrained: {after}")
            print(f"{shown(target)}: the best of {len(history)} epochs; {shown(run)} has the rest")


def _require_fit(model: nn.Module, path: Path, classes: int, images: OwnImages) -> None:
    """Raise an error if a model does not take the images or has other classes."""
    size = images.size
    try:
        with in_mode(model, training=False), torch.inference_mode():
            outputs = model(torch.zeros(1, 3, size, size)).shape[1]
    except RuntimeError as error:
        raise InputError(
            f"The network of {shown(path)} cannot take images of 3x{size}x{size} "
            f"({first_line(error)}). Give the --image-size that it was trained on; it must take "
            "RGB."
        ) from error
    if outputs != classes:
        raise InputError(
            f"{shown(path)} has {outputs} classes and {shown(images.folder)} has {classes}. Give "
            "the images that the checkpoint was trained on."
        )


def _keep_records(
    folder: Path, recipe: Recipe, together: Processes
) -> Callable[[list[Epoch]], None] | None:
    """Return what keeps the run folder up to date after every epoch; in the first process."""
    if not together.is_first:
        return None
    records = RunFolder(folder, recipe, together)

    def keep(history: list[Epoch]) -> None:
        records.record(history)
        plots.save(plots.plot_history(history), folder / "curves.png")

    return keep
