"""Training, validation and test images of Fashion-MNIST, Imagenette and ImageNet.

The validation images are held out of the training images with a fixed seed: the
best weights are chosen on them, and the test images serve for the final figures
alone. Explained in `01_load_pretrained.ipynb`.
"""

import hashlib
import json
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
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

from helpers.errors import InputError, first_line
from helpers.files import shown
from helpers.machine import device
from helpers.training.distributed import Processes, processes
from helpers.training.image_folder import (
    ImageFolder,
    broken_images,
    list_images,
    read_image,
    warn_of_broken,
)

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
        workers: processes of each loader; 0 loads in this one. They import the script that starts
            them, so what it does belongs under `if __name__ == "__main__":`.
        seed: for the choice of the validation images.

    Raises:
        DataError: the data set is unknown, missing, truncated or too small for the split.
    """
    if dataset not in _LOADERS:
        raise DataError(f"There is no data set {dataset!r}. There are {', '.join(_LOADERS)}.")
    parts = _LOADERS[dataset](folder)
    if len(parts[1]) <= validation_images:
        raise DataError(
            f"{dataset} has {len(parts[1])} training images in {shown(folder)}, too few to hold "
            f"{validation_images} of them out for validation. Check that the data set is complete, "
            "or hold out fewer."
        )
    return _split(parts, validation_images, train_batch_size, batch_size, workers, seed)


def folder_splits(
    folder: Path,
    validation_images: int | None,
    train_batch_size: int,
    batch_size: int,
    workers: int = 0,
    seed: int = 0,
    image_size: int = 224,
    records: Path | None = None,
) -> Splits:
    """Return the photographs of a folder of your own, split into training, validation and test.

    Images that cannot be read are named in a warning and left out.

    Args:
        folder: has `train/` and `val/`, each with a folder for every class. The images of `val/`
            become the test images.
        validation_images: how many to hold out of `train/`; None: one in twenty.
        train_batch_size: images in a training batch; an incomplete last one is left out.
        batch_size: images in a validation or test batch.
        workers: processes of each loader and of the check; 0 loads in this one. They import the
            script that starts them, so what it does belongs under `if __name__ == "__main__":`.
        seed: for the choice of the validation images.
        image_size: height and width of the images that the loaders give.
        records: a folder for what the check of the images finds, so that it need not be repeated.

    Raises:
        InputError: a folder is missing or has no images, the classes of the two parts differ,
            or the processes that train together do not find the same images.
        DataError: there are too few training images for the split.
    """
    train = list_images(folder / "train")
    test = list_images(folder / "val", train.classes)
    listing = hashlib.sha256(repr((train.samples, test.samples)).encode()).hexdigest()
    processes().require_same(listing, f"images in {shown(folder)}")
    train, test = (
        _readable(part, workers, records and records / f"images_{part.folder.name}.json")
        for part in (train, test)
    )
    count = len(train.samples)
    held_out = max(count // 20, 1) if validation_images is None else validation_images
    if count <= held_out:
        raise DataError(
            f"{shown(train.folder)} has {count} images, too few to hold {held_out} of them out for "
            "validation. Add images, or hold out fewer."
        )
    augment, plain = _photo_transforms(image_size)
    parts = (
        _photos(train, augment, augmented=True),
        _photos(train, plain),
        _photos(test, plain),
        list(train.classes),
    )
    return _split(parts, held_out, train_batch_size, batch_size, workers, seed)


def _readable(images: ImageFolder, workers: int, record: Path | None) -> ImageFolder:
    """Return the images that can be read; the first process looks for them."""
    together = processes()
    found = None
    if together.is_first:
        broken = broken_images(images, workers, record)
        warn_of_broken(images, broken)
        found = json.dumps(list(broken)).encode()
    return images.without(json.loads(together.share(found) or b"[]"))


def _split(
    parts: "_Parts",
    validation_images: int,
    train_batch_size: int,
    batch_size: int,
    workers: int,
    seed: int,
) -> Splits:
    """Hold validation images out of the training images, and make the loaders."""
    augmented, plain, test, classes = parts
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
    kind = PhotoLoader if isinstance(_innermost(dataset), Photos) else DataLoader
    return kind(
        dataset,
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=shuffle,  # in a last batch of one image, batch norm would find no variance
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        multiprocessing_context=_start_of_workers() if workers else None,
        collate_fn=_collate,
    )


def _start_of_workers() -> multiprocessing.context.BaseContext:
    """Return how processes that load images start: not as a fork of this one.

    This process has threads, of PyTorch and of other loaders. What one of them had locked in the
    moment of the fork would stay locked in the worker, which would then wait for ever.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once, and not by each worker
    return context


def _innermost(dataset: Any) -> Any:
    """Return the data set inside of subsets and shares."""
    while isinstance(dataset, Subset | _Share):
        dataset = dataset.dataset
    return dataset


def training_share(loader: DataLoader, together: Processes, parts: int = 1) -> DataLoader:
    """Return a loader of this process's share of each batch of another loader.

    Together the processes see the batches of `loader` as one process would: the same images in
    the same order with the same augmentation.

    Raises:
        InputError: a batch has too few images to be shared, or the last one may be incomplete.
    """
    if loader.batch_size is not None and loader.batch_size < together.count * parts:
        raise InputError(
            f"A batch of {loader.batch_size} images cannot be shared by {together.count} processes "
            f"in {parts} parts each. Give a larger batch_size."
        )
    if together.count == 1:
        return loader
    if loader.batch_sampler is None or not loader.drop_last:
        raise InputError(
            "Several processes can share only whole batches: make the loader of the training "
            "images with a batch_size and with drop_last=True."
        )
    return _like(loader, _Share(loader.dataset, together), batch_sampler=loader.batch_sampler)


def evaluation_share(loader: DataLoader, together: Processes) -> DataLoader:
    """Return a loader of this process's share of the images of another loader.

    Each image is in the share of exactly one process. A share may have no images.
    """
    share = range(together.rank, len(loader.dataset), together.count)  # type: ignore[arg-type]  # has a length
    return _like(loader, Subset(loader.dataset, share), batch_size=loader.batch_size)


def _like(loader: DataLoader, dataset: Dataset, **batches: Any) -> DataLoader:
    """Return a loader of other images that works as an existing one."""
    return type(loader)(
        dataset,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
        persistent_workers=loader.persistent_workers,
        multiprocessing_context=loader.multiprocessing_context,
        collate_fn=loader.collate_fn,
        **batches,
    )


class _Share(Dataset):
    """A data set that is asked for a whole batch and returns one process's share of it."""

    def __init__(self, dataset: Dataset, together: Processes) -> None:
        self.dataset, self.together = dataset, together
        self.in_memory = isinstance(_innermost(dataset), InMemoryImages)

    def __getitems__(self, indices: list[int]) -> Any:
        own = slice(self.together.rank, None, self.together.count)
        if self.in_memory:
            # One draw flips the whole batch, and each process must make the same draws.
            images, labels = self.dataset.__getitems__(indices)  # type: ignore[attr-defined]  # of InMemoryImages and Subset
            return images[own], labels[own]
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(indices[own])
        return [self.dataset[index] for index in indices[own]]


def first_images(loader: DataLoader, count: int) -> tuple[Tensor, Tensor]:
    """Return the first `count` images of a loader and their labels, on the CPU."""
    images, labels = [], []
    for batch, targets in loader:
        images.append(batch.cpu())
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


class Photos(Dataset):
    """Photographs in files, read and cut when they are asked for: bytes (3, H, W) and a class.

    How an image is augmented depends on the epoch's seed and its number alone, so neither the
    number of workers nor that of processes changes it.
    """

    def __init__(
        self, samples: Sequence[tuple[str, int]], transform: Callable, augmented: bool = False
    ) -> None:
        self.samples, self.transform, self.augmented = samples, transform, augmented
        # In shared memory: workers that outlive an epoch see the seed of the next one.
        self.seed = torch.zeros((), dtype=torch.int64).share_memory_()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        try:
            image = read_image(path)
        except Exception as error:  # Pillow fails in many ways on a damaged file
            raise DataError(
                f"{shown(Path(path))} cannot be read ({first_line(error)}). Replace it, or delete "
                "it and train again."
            ) from error
        with torch.random.fork_rng(devices=[], enabled=self.augmented):
            if self.augmented:
                seed = (int(self.seed) * 1_000_003 + index) % 2**63
                torch.default_generator.manual_seed(seed)  # leaves the GPU's generator alone
            return self.transform(image), label


class PhotoLoader(DataLoader):
    """Loads photographs as bytes, and normalises them on the device."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # wraps the loader's own
        photos = _innermost(self.dataset)
        if photos.augmented:
            # One draw decides the order and the augmentation, whether workers are new or not.
            photos.seed.random_()
            generator = torch.Generator().manual_seed(int(photos.seed))
            self.batch_sampler.sampler.generator = generator  # type: ignore[union-attr]  # is random
        try:
            for images, labels in super().__iter__():
                images = images.to(device(), non_blocking=True)
                images = v2.functional.to_dtype(images, torch.float32, scale=True)
                yield v2.functional.normalize(images, IMAGENET_MEAN, IMAGENET_STD), labels
        except DataError as error:
            # A worker's error arrives with its traceback as the message.
            raise DataError(str(error).strip().rpartition("DataError: ")[2]) from error


Images: TypeAlias = InMemoryImages | Photos

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


def _photo_transforms(size: int = 224) -> tuple[Callable, Callable]:
    """Return the transforms of the original training, and of its evaluation, to bytes."""
    augment = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip(), v2.PILToTensor()]
    plain = [v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), v2.PILToTensor()]
    return v2.Compose(augment), v2.Compose(plain)


def _photos(images: ImageFolder, transform: Callable, augmented: bool = False) -> Photos:
    samples = [(str(images.folder / path), label) for path, label in images.samples]
    return Photos(samples, transform, augmented)


def _imagenette(folder: Path) -> _Parts:
    augment, plain = _photo_transforms()
    try:
        train, test = (
            datasets.Imagenette(folder, split, "320px", download=True) for split in ("train", "val")
        )
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
    return (
        Photos(train._samples, augment, augmented=True),
        Photos(train._samples, plain),
        Photos(test._samples, plain),
        [names[0] for names in train.classes],
    )


def _imagenet(folder: Path) -> _Parts:
    augment, plain = _photo_transforms()
    root = folder / "imagenet"
    try:
        train, test = (datasets.ImageFolder(root / part) for part in ("train", "val"))
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
    return (
        Photos(train.samples, augment, augmented=True),
        Photos(train.samples, plain),
        Photos(test.samples, plain),
        list(ResNeXt101_32X8D_Weights.IMAGENET1K_V1.meta["categories"]),
    )


_LOADERS = {"FashionMNIST": _fashion_mnist, "Imagenette": _imagenette, "ImageNet": _imagenet}
