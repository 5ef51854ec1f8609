"""From PyTorch to one ONNX file. Explained in `04_export_onnx.ipynb`."""

import warnings
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor, nn

from helpers.errors import InputError
from helpers.files import shown
from helpers.inference.fold import fold_batch_norm
from helpers.metrics import max_relative_error

INPUT, OUTPUT = "images", "logits"


def export_onnx(
    model: nn.Module, path: Path, image_shape: tuple[int, int, int], half: bool = False
) -> Path:
    """Write a network as one ONNX file with a dynamic batch.

    The input is `images` (N, C, H, W), the output `logits` (N, classes), both of the
    type of the weights.

    Args:
        model: the network; it is not changed.
        path: file to write; at most 2 GB, the limit of one ONNX file.
        image_shape: channels, height and width of an input image.
        half: FP16 weights and arithmetic instead of FP32.
    """
    folded = fold_batch_norm(model)
    example = torch.zeros(2, *image_shape)
    if half:
        folded, example = folded.half(), example.half()
    with warnings.catch_warnings():
        # The exporter warns about itself: deprecations inside torch that no reader can mend.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            folded,
            (example,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )
    program.save(path, external_data=False)
    return Path(path)


def onnx_max_relative_error(path: Path, reference: Path, images: Tensor) -> float:
    """Return the largest `max_relative_error` of two ONNX files' outputs, run by ONNX Runtime.

    Args:
        path: a file with one input.
        reference: another one, with the same input and outputs.
        images: (N, C, H, W), of any floating-point type.

    Raises:
        InputError: a file is missing, damaged, or does not take such images.

    The gap is explained in `04_export_onnx.ipynb`.
    """
    pairs = zip(_run(path, images), _run(reference, images), strict=True)
    return max(max_relative_error(output, expected) for output, expected in pairs)


def _run(path: Path, images: Tensor) -> list[Tensor]:
    """Return the outputs of an ONNX file."""
    try:
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (taken,) = session.get_inputs()
        half = taken.type == "tensor(float16)"
        feed = images.numpy().astype(np.float16 if half else np.float32)
        return [torch.from_numpy(output) for output in session.run(None, {taken.name: feed})]
    except Exception as error:  # ONNX Runtime has a dozen classes without a common base
        raise InputError(
            f"{shown(path)} does not run in ONNX Runtime on images of shape "
            f"{tuple(images.shape)}: {error}"
        ) from error
