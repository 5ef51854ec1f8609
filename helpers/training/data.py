"""Training, validation and test images of Fashion-MNIST, Imagenette and ImageNet.

The validation images are held out of the training images with a fixed seed: the
best weights are chosen on them, and the test images serve for the final figures
alone. Explained in `01_load_pretrained.ipynb`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset, default_collate
from torchvision import datasets
from torchvision.datasets.utils import check_integrity
from torchvision.models import ResNeXt101_32X8D_Weights
from torchvision.transforms import v2

from helpers.errors import InputError
from helpers.files import shown

FASHION_MEAN, FASHION_STD = 0.286, 0.353  # of the 60,000 training images
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DataError(InputError):
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


def make_splits(
    dataset: str,
    folder: Path,
    validation_images: int,
    train_batch_size: int,
    batch_size: int,
    workers: int = 0,
    seed: int = 0,
) -> Splits:
    """Return the images of a data set, split into training, validation and test.

    Args:
        dataset: `FashionMNIST`, `Imagenette` or `ImageNet`.
        folder: where it is, or is downloaded to (Fashion-MNIST and Imagenette).
        validation_images: how many to hold out of the training images.
        train_batch_size: images in a training batch; an incomplete last one is left out.
        batch_size: images in a validation or test batch.
        workers: processes of each loader; 0 loads in this one.
        seed: for the choice of the validation images.

    Raises:
        DataError: the data set is unknown, missing, truncated or too small for the split.
    """
    if dataset not in _LOADERS:
        raise DataError(f"There is no data set {dataset!r}. There are {', '.join(_LOADERS)}.")
    augmented, plain, test, classes = _LOADERS[dataset](folder)
    if len(plain) <= validation_images:
        raise DataError(
            f"{dataset} has {len(plain)} training images in {shown(folder)}, too few to hold "
            f"{validation_images} of them out for validation. Check that the data set is complete, "
            "or hold out fewer."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(plain), generator=generator).tolist()
    held_out, rest = order[:validation_images], order[validation_images:]
    return Splits(
        train=_loader(Subset(augmented, rest), train_batch_size, workers, shuffle=True),
        validation=_loader(Subset(plain, held_out), batch_size, workers),
        test=_loader(test, batch_size, workers),
        classes=classes,
    )


def _loader(dataset: Dataset, batch_size: int, workers: int, shuffle: bool = False) -> DataLoader:
    return DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=shuffle,  # in a last batch of one image, batch norm would find no variance
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
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
    """Small images kept as one tensor, so that a batch takes one indexing operation."""

    def __init__(self, images: Tensor, labels: Tensor, flip: bool) -> None:
        self.images, self.labels, self.flip = images, labels, flip

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a whole batch; the data loader prefers this to single items."""
        images = self.images[indices]
        if self.flip:
            mirrored = torch.rand(len(images)) < 0.5
            images[mirrored] = images[mirrored].flip(-1)
        return images, self.labels[indices]


def _collate(batch: Any) -> tuple[Tensor, Tensor]:
    """Pass a whole batch of `InMemoryImages` on; stack single images."""
    return batch if isinstance(batch, tuple) else default_collate(batch)


Images: TypeAlias = InMemoryImages | datasets.VisionDataset

# Of one data set: training images as trained on, the same ones as evaluated, test images, classes.
_Parts = tuple[Images, Images, Images, list[str]]


def _fashion_mnist(folder: Path) -> _Parts:
    raw = folder / "FashionMNIST" / "raw"
    for name, md5 in datasets.FashionMNIST.resources:
        if (raw / name).exists() and not check_integrity(raw / name, md5):
            raise DataError(
                f"{shown(raw / name)} is damaged: its checksum is not the published one. "
                "Delete it and run this again to download it, or restore the file of this project "
                f"with `git checkout -- {shown(raw / name)}`."
            )
    try:
        train = datasets.FashionMNIST(folder, train=True, download=True)
        test = datasets.FashionMNIST(folder, train=False, download=True)
    except (RuntimeError, ValueError, AssertionError, EOFError, KeyError, OSError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise DataError(
            f"Fashion-MNIST could not be read from {shown(raw)} ({reason}). The four .gz files "
            "belong there: in this project, `git checkout -- data/FashionMNIST` restores them. "
            "Delete any file there that does not end in .gz, check that the disk has 60 MB free, "
            "and run this again."
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


def _imagenette(folder: Path) -> _Parts:
    augment, plain = _photo_transforms()

    def part(split: str, transform: Callable) -> datasets.Imagenette:
        return datasets.Imagenette(folder, split, "320px", download=True, transform=transform)

    try:
        train, held, test = part("train", augment), part("train", plain), part("val", plain)
    except (RuntimeError, OSError, KeyError) as error:
        raise DataError(
            f"Imagenette could not be read from {shown(folder)} or downloaded ({error}). "
            "Unpack imagenette2-320.tgz there, or give the folder that holds imagenette2-320/."
        ) from error
    if not len(train.classes) == len(test.classes) == 10:
        raise DataError(
            f"Imagenette in {shown(folder)} has {len(train.classes)} training and "
            f"{len(test.classes)} test classes instead of ten. Unpack imagenette2-320.tgz again."
        )
    return train, held, test, [names[0] for names in train.classes]


def _imagenet(folder: Path) -> _Parts:
    augment, plain = _photo_transforms()
    root = folder / "imagenet"
    try:
        train = datasets.ImageFolder(root / "train", augment)
        held = datasets.ImageFolder(root / "train", plain)
        test = datasets.ImageFolder(root / "val", plain)
    except OSError as error:
        raise DataError(
            f"ImageNet was not found in {shown(root)} ({error}). Its license forbids "
            "redistribution: get ILSVRC 2012 from image-net.org, arrange it as "
            "imagenet/train/<class>/*.JPEG and imagenet/val/<class>/*.JPEG, and give the folder "
            "that holds imagenet/."
        ) from error
    if len(test.classes) != 1000 or train.classes != test.classes:
        raise DataError(
            f"{shown(root)} has {len(train.classes)} training and {len(test.classes)} validation "
            "classes, and they are not the same 1000. Unpack ILSVRC 2012 again."
        )
    return train, held, test, list(ResNeXt101_32X8D_Weights.IMAGENET1K_V1.meta["categories"])


_LOADERS = {"FashionMNIST": _fashion_mnist, "Imagenette": _imagenette, "ImageNet": _imagenet}
