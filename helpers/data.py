"""Training, validation and test images of each preset.

The validation images are held out of the training images with a fixed seed: the
best checkpoint is chosen on them, and the test set is used for nothing but the
final figures. Explained in `01_load_pretrained.ipynb`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from torchvision.models import ResNeXt101_32X8D_Weights
from torchvision.transforms import v2

from helpers.checks import TutorialError
from helpers.settings import Settings, relative

FASHION_MEAN, FASHION_STD = 0.286, 0.353  # of the 60,000 training images
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DataError(TutorialError):
    """A data set is missing or damaged."""


@dataclass(frozen=True)
class Splits:
    """Loaders of normalised images (N, C, H, W, float32) and labels (N, int64)."""

    train: DataLoader
    validation: DataLoader
    test: DataLoader
    classes: list[str]

    def __repr__(self) -> str:
        sizes = [f"{len(getattr(self, s).dataset):,} {s}" for s in ("train", "validation", "test")]
        return f"{', '.join(sizes)} images in {len(self.classes)} classes"


def load_splits(settings: Settings) -> Splits:
    """Return the images of a preset, split into training, validation and test.

    Raises:
        DataError: the data set is missing, truncated or too small for the split.
    """
    load = {"FashionMNIST": _fashion_mnist, "Imagenette": _imagenette, "ImageNet": _imagenet}
    augmented, plain, test, classes = load[settings.dataset](settings.data_dir)
    held_out = settings.validation_images
    if len(plain) <= held_out:
        raise DataError(
            f"{settings.dataset} has {len(plain)} training images in "
            f"{relative(settings.data_dir)}, and {held_out} of them are to be held out for "
            "validation. Is the data set complete?"
        )
    generator = torch.Generator().manual_seed(settings.seed)
    order = torch.randperm(len(plain), generator=generator).tolist()
    return Splits(
        train=_loader(Subset(augmented, order[held_out:]), settings, shuffle=True),
        validation=_loader(Subset(plain, order[:held_out]), settings),
        test=_loader(test, settings),
        classes=classes,
    )


def _loader(dataset: Dataset, settings: Settings, shuffle: bool = False) -> DataLoader:
    return DataLoader(
        dataset,
        # An engine takes no batch above the largest of its profile, so neither do we.
        batch_size=settings.recipe.batch_size if shuffle else max(settings.batches),
        shuffle=shuffle,
        drop_last=shuffle,  # a last batch of one image would upset batch norm
        num_workers=settings.workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=settings.workers > 0,
        collate_fn=_collate,
    )


def first_images(loader: DataLoader, count: int) -> tuple[Tensor, Tensor]:
    """Return the first `count` images of a loader and their labels."""
    images, labels = [], []
    for batch, targets in loader:
        images.append(batch)
        labels.append(targets)
        if sum(map(len, labels)) >= count:
            break
    return torch.cat(images)[:count], torch.cat(labels)[:count]


class InMemoryImages(Dataset):
    """Small images kept as one tensor, so that a batch costs one indexing."""

    def __init__(self, images: Tensor, labels: Tensor, flip: bool) -> None:
        self.images, self.labels, self.flip = images, labels, flip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a whole batch; the data loader prefers this over single items."""
        images = self.images[indices]
        if self.flip:
            mirrored = torch.rand(len(images)) < 0.5
            images[mirrored] = images[mirrored].flip(-1)
        return images, self.labels[indices]


def _collate(batch: Any) -> tuple[Tensor, Tensor]:
    """Pass a whole batch of `InMemoryImages` on; stack single images."""
    return batch if isinstance(batch, tuple) else default_collate(batch)


def _fashion_mnist(folder: Path) -> tuple[Dataset, Dataset, Dataset, list[str]]:
    raw = folder / "FashionMNIST" / "raw"
    for name, md5 in datasets.FashionMNIST.resources:
        if (raw / name).exists() and not check_integrity(raw / name, md5):
            raise DataError(
                f"{relative(raw / name)} is damaged: its checksum is not the published one. "
                f"Restore it with `git checkout -- {relative(raw / name)}`."
            )
    try:
        train = datasets.FashionMNIST(folder, train=True, download=True)
        test = datasets.FashionMNIST(folder, train=False, download=True)
    except (RuntimeError, ValueError, AssertionError, EOFError, KeyError, OSError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(
            f"Fashion-MNIST could not be read from {relative(raw)} ({reason}). The four .gz files "
            "belong there: `git checkout -- data/FashionMNIST` restores them. Delete any file "
            "there that does not end in .gz, see that the disk has 60 MB free, and run this again."
        ) from error

    def images(part: datasets.FashionMNIST) -> Tensor:
        return ((part.data / 255 - FASHION_MEAN) / FASHION_STD).unsqueeze(1)

    pixels = images(train)
    return (
        InMemoryImages(pixels, train.targets, flip=True),
        InMemoryImages(pixels, train.targets, flip=False),
        InMemoryImages(images(test), test.targets, flip=False),
        train.classes,
    )


def _photo_transforms() -> tuple[Callable, Callable]:
    """Return the transforms of the original training, and of its evaluation."""
    augment = v2.Compose(
        [
            v2.RandomResizedCrop(224),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    return augment, ResNeXt101_32X8D_Weights.IMAGENET1K_V1.transforms()


def _imagenette(folder: Path) -> tuple[Dataset, Dataset, Dataset, list[str]]:
    augment, plain = _photo_transforms()

    def part(split: str, transform: Callable) -> Dataset:
        return datasets.Imagenette(folder, split, "320px", download=True, transform=transform)

    try:
        train, held, test = part("train", augment), part("train", plain), part("val", plain)
    except (RuntimeError, OSError, KeyError) as error:
        raise DataError(
            f"Imagenette could not be read from {relative(folder)} or downloaded ({error}). "
            "Unpack imagenette2-320.tgz there, or set TUTORIAL_DATA to the folder that holds "
            "imagenette2-320/."
        ) from error
    if not len(train.classes) == len(test.classes) == 10:
        raise DataError(
            f"Imagenette in {relative(folder)} has {len(train.classes)} classes to train and "
            f"{len(test.classes)} to test; there should be ten. Unpack imagenette2-320.tgz again."
        )
    return train, held, test, [names[0] for names in train.classes]


def _imagenet(folder: Path) -> tuple[Dataset, Dataset, Dataset, list[str]]:
    augment, plain = _photo_transforms()
    root = folder / "imagenet"
    try:
        train = datasets.ImageFolder(root / "train", augment)
        held = datasets.ImageFolder(root / "train", plain)
        test = datasets.ImageFolder(root / "val", plain)
    except OSError as error:
        raise DataError(
            f"ImageNet was not found in {relative(root)} ({error}). It is not free to "
            "redistribute: get ILSVRC 2012 from image-net.org and lay it out as "
            "imagenet/train/<class>/*.JPEG and imagenet/val/<class>/*.JPEG, or set TUTORIAL_DATA."
        ) from error
    if len(test.classes) != 1000 or train.classes != test.classes:
        raise DataError(
            f"{relative(root)} has {len(train.classes)} training and {len(test.classes)} "
            "validation classes; the pretrained network knows ImageNet's 1000 in both."
        )
    return train, held, test, list(ResNeXt101_32X8D_Weights.IMAGENET1K_V1.meta["categories"])
