"""Read calibration images from a folder of pictures or from an `.npz` file.

Calibration data must look like the inputs of inference: prepared in the same way. For pictures
that is the usual way of classifiers: the shorter edge resized, the centre cut out, normalised.
Used by `python -m helpers quantize` for a file of your own (docs/cli.md).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2

from helpers.errors import InputError, first_line
from helpers.files import shown
from helpers.inference.file_runners import load_arrays
from helpers.sparsity.onnx_inputs import OnnxInput
from helpers.training.data import IMAGENET_MEAN, IMAGENET_STD

_ENDINGS = (".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".webp")
_SHORTER_EDGE = 8 / 7  # of the picture over the part that is cut out: 256 to 224 in ImageNet


def load_calibration_images(
    path: Path,
    inputs: Sequence[OnnxInput],
    count: int = 512,
    image_size: int | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> dict[str, np.ndarray]:
    """Return calibration data for the inputs of an ONNX file, by their names.

    Args:
        path: a folder of pictures, searched with all its folders, or an `.npz` file with an array
            for each input.
        inputs: of the file.
        count: how many images to take at most, spread evenly over the files in the order of
            their names.
        image_size: height and width, where the file leaves them open; for pictures.
        mean: of each channel, subtracted from numbers between 0 and 1; for pictures.
        std: of each channel, which the result is divided by; for pictures.

    Raises:
        InputError: there are no images, one cannot be read, or the file takes something else.
    """
    if path.suffix == ".npz":
        arrays = load_arrays(path)
        return {name: array[_spread(len(array), count)] for name, array in arrays.items()}
    if not path.is_dir():
        raise InputError(
            f"{shown(path)} is neither a folder of pictures nor an .npz file. Give one of them as "
            "calibration data."
        )
    channels, height, width = _shape(inputs, image_size)
    if len(mean) != channels or len(std) != channels:
        raise InputError(
            f"The input {inputs[0]} takes {channels} channels: give --mean and --std with one "
            "number for each."
        )
    files = sorted(each for each in path.rglob("*") if each.suffix.lower() in _ENDINGS)
    if not files:
        raise InputError(f"{shown(path)} has no pictures ({', '.join(_ENDINGS)}).")
    prepare = v2.Compose(
        [
            v2.Resize(round(max(height, width) * _SHORTER_EDGE), antialias=True),
            v2.CenterCrop((height, width)),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(list(mean), list(std)),
        ]
    )
    mode = "L" if channels == 1 else "RGB"
    images = [prepare(_open(files[place], mode)) for place in _spread(len(files), count)]
    return {inputs[0].name: torch.stack(images).numpy()}


def _spread(total: int, count: int) -> np.ndarray:
    """Return at most `count` places, spread evenly over `total`."""
    return np.linspace(0, total - 1, min(total, count)).round().astype(int)


def _shape(inputs: Sequence[OnnxInput], image_size: int | None) -> tuple[int, int, int]:
    """Return channels, height and width of the pictures that a file takes."""
    if len(inputs) != 1 or len(inputs[0].dims) != 4 or inputs[0].dims[1] not in (1, 3):
        raise InputError(
            f"The file takes {', '.join(map(str, inputs))}, not images (N, C, H, W) of one or "
            "three channels. Give its calibration data as an .npz file."
        )
    height, width = (image_size or dim for dim in inputs[0].dims[2:])
    if not isinstance(height, int) or not isinstance(width, int):
        raise InputError(f"The file leaves the size of its input {inputs[0]} open: --image-size.")
    return int(inputs[0].dims[1]), height, width


def _open(path: Path, mode: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert(mode)
    except Exception as error:  # Pillow raises classes without a common base
        raise InputError(
            f"{shown(path)} cannot be read as a picture ({first_line(error)}). Remove it from the "
            "folder."
        ) from error
