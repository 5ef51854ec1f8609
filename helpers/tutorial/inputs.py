"""What a preset starts from: its pretrained model and its images.

Explained in `01_load_pretrained.ipynb`.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import ResNeXt101_32X8D_Weights

from helpers.errors import first_line
from helpers.files import sha256, shown
from helpers.training.data import DataError, Splits, make_splits
from helpers.training.networks import (
    CheckpointError,
    create_model,
    imagenette_indices,
    load_checkpoint,
    restrict_head_,
)
from helpers.tutorial.settings import Settings


def pretrained_path(settings: Settings) -> Path:
    """Return the path of the quick preset's pretrained checkpoint in the repository."""
    name = f"{settings.model}_{settings.dataset.lower()}.safetensors"
    return settings.data_dir / "pretrained" / name


def retrained_path(settings: Settings) -> Path:
    """Return the path of the quick preset's retrained checkpoint in the repository."""
    path = pretrained_path(settings)
    return path.with_stem(f"{path.stem}_retrained")


def pretrained_card(settings: Settings) -> dict[str, Any]:
    """Return the card of the quick preset's pretrained checkpoint in the repository.

    Raises:
        CheckpointError: the checkpoint or its card is missing or damaged.
    """
    return _require_shipped(pretrained_path(settings), "pretrain")


def retrained_card(settings: Settings) -> dict[str, Any]:
    """Return the card of the quick preset's retrained checkpoint in the repository.

    Raises:
        CheckpointError: the checkpoint or its card is missing or damaged.
    """
    return _require_shipped(retrained_path(settings), "retrain")


def load_pretrained(settings: Settings) -> nn.Module:
    """Return the trained dense network that the case study starts from.

    quick: the checkpoint in `data/pretrained/`. full: torchvision's `IMAGENET1K_V1`
    weights. imagenette: the same with the last layer restricted to Imagenette's ten
    classes, which needs no training.

    Raises:
        CheckpointError: the weights are missing, damaged or cannot be downloaded.
    """
    if settings.model == "resnext14_8x1d":
        pretrained_card(settings)
        return load_checkpoint(pretrained_path(settings))
    weights = ResNeXt101_32X8D_Weights.IMAGENET1K_V1
    model = create_model(settings.model, num_classes=1000)
    try:
        state = weights.get_state_dict(check_hash=True, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except Exception as error:  # torch.load fails in many ways on a damaged file
        name = weights.url.rpartition("/")[2]
        raise CheckpointError(
            f"torchvision's weights {name} could not be downloaded or read ({first_line(error)}). "
            "Put the whole file into hub/checkpoints/ below TORCH_HOME, which is now "
            f"{shown(Path(torch.hub.get_dir()).parent)}, or use the quick preset, which needs "
            "no network."
        ) from error
    if settings.dataset == "Imagenette":
        restrict_head_(model, imagenette_indices())
    return model


def _require_shipped(path: Path, command: str) -> dict[str, Any]:
    """Return the card of a checkpoint in the repository, after comparing the two."""
    card = path.with_suffix(".json")
    restore = "Restore it with `git checkout -- data/pretrained`."
    if not path.exists() or not card.exists():
        missing = card if path.exists() else path
        raise CheckpointError(
            f"{shown(missing)} is missing. {restore} "
            f"Or train the network again with `python -m helpers {command}`."
        )
    try:
        content = json.loads(card.read_text())
        recorded = content["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{shown(card)} is damaged. {restore}") from error
    if sha256(path) != recorded:
        raise CheckpointError(
            f"{shown(path)} is damaged: its checksum is not the one in {card.name}. {restore}"
        )
    return content


def load_splits(settings: Settings) -> Splits:
    """Return the images of a preset, split into training, validation and test.

    Raises:
        DataError: the data set is missing, truncated or too small for the split.
    """
    try:
        return make_splits(
            settings.dataset,
            settings.data_dir,
            settings.validation_images,
            train_batch_size=settings.recipe.batch_size,
            # An engine takes no batch above the largest of its profile, so test batches stay
            # within it.
            batch_size=max(settings.batch_sizes),
            workers=settings.workers,
            seed=settings.seed,
        )
    except DataError as error:
        raise DataError(
            f"{error} The environment variable TUTORIAL_DATA sets the folder of the images."
        ) from error
