"""Folders of photographs: which are there, which are broken, and how one is read.

Explained in docs/retraining.md.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from PIL import Image

from helpers.errors import InputError, first_line
from helpers.files import shown, write_json

_logger = logging.getLogger(__name__)

# Those of torchvision's ImageFolder. It is not imported here: the processes that check the
# images start much faster without PyTorch.
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")

_NAMED = 5  # broken images that a message names; the file of the check has all


@dataclass(frozen=True)
class ImageFolder:
    """Photographs in a folder with one subfolder for each class."""

    folder: Path
    classes: tuple[str, ...]
    samples: tuple[tuple[str, int], ...]  # path below the folder, number of the class

    def without(self, broken: Sequence[str]) -> "ImageFolder":
        """Return the same without the images of these paths below the folder."""
        left_out = set(broken)
        kept = tuple(sample for sample in self.samples if sample[0] not in left_out)
        return ImageFolder(self.folder, self.classes, kept)


def list_images(folder: Path, classes: Sequence[str] | None = None) -> ImageFolder:
    """Return the photographs of a folder, in the order of their names.

    Args:
        folder: has a subfolder for each class.
        classes: those that it must have, and no others; else those that it has.

    Raises:
        InputError: the folder is missing, has no images, or lacks a class or images of one.
    """
    if not folder.is_dir():
        raise InputError(f"{shown(folder)} is missing: put a folder for each class in it.")
    found = sorted(each.name for each in folder.iterdir() if each.is_dir())
    found = [name for name in found if not name.startswith(".")]
    if not found:
        raise InputError(f"{shown(folder)} has no folders: put one for each class in it.")
    wanted = found if classes is None else list(classes)
    for name in wanted:
        if name not in found:
            raise InputError(
                f"{shown(folder)} has no folder {name}, which is one of the {len(wanted)} classes. "
                "Add it, with images of that class."
            )
    for name in found:
        if name not in wanted:
            raise InputError(
                f"{shown(folder)} has a folder {name}, which is none of the {len(wanted)} classes. "
                "Remove it, or add images of that class to the training images."
            )
    samples = []
    for number, name in enumerate(wanted):
        paths = sorted(
            path.relative_to(folder).as_posix()
            for path in (folder / name).rglob("*")
            if path.suffix.lower() in ENDINGS
        )
        if not paths:
            raise InputError(
                f"{shown(folder / name)} has no images. Supported are {', '.join(ENDINGS)}."
            )
        samples += [(path, number) for path in paths]
    return ImageFolder(folder, tuple(wanted), tuple(samples))


def read_image(path: Path | str) -> Image.Image:
    """Return a photograph in RGB with eight bits for each channel.

    Grey, CMYK, and palettes are converted. Of 16-bit grey, the upper eight bits remain: Pillow's
    own conversion would make everything above 255 white.

    Raises:
        ValueError: the pixels are 32-bit numbers, whose range the file does not tell.
        Exception: whatever Pillow raises for a file that is damaged.
    """
    with Image.open(path) as image:
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
            grey = (np.asarray(image) >> 8).astype(np.uint8)
            return Image.fromarray(grey).convert("RGB")
        if image.mode in ("I", "F"):
            raise ValueError("its pixels are 32-bit numbers without a known range")
        return image.convert("RGB")


def broken_images(images: ImageFolder, workers: int, record: Path | None = None) -> dict[str, str]:
    """Return the images that cannot be read, by path below the folder, each with the reason.

    Each file is decoded as a whole, which finds truncated ones.

    Args:
        images: those to check.
        workers: processes that decode; 0 decodes in this one.
        record: a JSON file that keeps the result. As long as no path, size or date of the images
            has changed, the next call reads it instead.

    Raises:
        WriteError: the record cannot be written.
    """
    state = _state(images)
    if record is not None and record.exists():
        stored = json.loads(record.read_text(encoding="utf-8"))
        if stored["state"] == state:
            return stored["broken"]
    paths = [path for path, _ in images.samples]
    if workers:
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            reasons = list(pool.map(_reason, repeat(images.folder), paths, chunksize=64))
    else:
        reasons = list(map(partial(_reason, images.folder), paths))
    broken = {path: why for path, why in zip(paths, reasons, strict=True) if why is not None}
    if record is not None:
        write_json(record, {"images": len(paths), "state": state, "broken": broken})
    return broken


def _reason(folder: Path, path: str) -> str | None:
    """Return why an image cannot be read; None if it can."""
    try:
        read_image(folder / path)
    except Exception as error:  # Pillow fails in many ways on a damaged file
        return first_line(error).replace(str(folder / path), path)
    return None


def _state(images: ImageFolder) -> str:
    """Return a checksum of the paths, sizes and dates of images."""
    digest = hashlib.sha256()
    for path, number in images.samples:
        status = (images.folder / path).stat()
        digest.update(f"{path}\0{number}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def warn_of_broken(images: ImageFolder, broken: dict[str, str]) -> None:
    """Log how many images are left out, and the names of the first ones."""
    if not broken:
        return
    named = [f"{path} ({why})" for path, why in list(broken.items())[:_NAMED]]
    more = f", and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
    _logger.warning(
        "%d of %d images of %s cannot be read and are left out: %s%s.",
        len(broken),
        len(images.samples),
        shown(images.folder),
        ", ".join(named),
        more,
    )
