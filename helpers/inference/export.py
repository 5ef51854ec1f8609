"""From PyTorch to one ONNX file. Explained in `04_export_onnx.ipynb`."""

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from helpers.errors import InputError, first_line, root_cause
from helpers.inference.fold import fold_batch_norm

INPUT, OUTPUT = "images", "logits"  # the names in every file that is written here


def export_onnx(
    model: nn.Module, path: Path, image_shape: tuple[int, int, int], half: bool = False
) -> Path:
    """Write a model as one ONNX file with a dynamic batch.

    The input is `images` (N, C, H, W), the output `logits` (N, classes), both of the
    type of the weights.

    Args:
        model: the model; it is not changed.
        path: file to write; at most 2 GB, the limit of one ONNX file.
        image_shape: channels, height and width of an input image.
        half: FP16 weights and arithmetic instead of FP32.

    Raises:
        InputError: the model cannot be traced, or the exporter cannot write it.
    """
    folded = fold_batch_norm(model)
    example = torch.zeros(2, *image_shape)
    if half:
        folded, example = folded.half(), example.half()
    with warnings.catch_warnings():
        # The exporter uses what PyTorch has deprecated; users cannot fix that.
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", category=category)
        try:
            program = _program(folded, example)
        except Exception as error:  # the exporter raises classes without a common base
            cause = root_cause(error)
            raise InputError(
                f"PyTorch cannot write {type(model).__name__} as ONNX with a dynamic batch "
                f"({type(cause).__name__}: {first_line(cause)}). torch.onnx.export(model, "
                "(images,), dynamo=True) may write it with the batch of the images."
            ) from error
    assert program is not None  # it is None only where dynamo=False
    program.save(path, external_data=False)
    return Path(path)


def _program(model: nn.Module, example: Tensor) -> torch.onnx.ONNXProgram | None:
    def write() -> torch.onnx.ONNXProgram | None:
        return torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )

    try:
        return write()
    except Exception:
        # PyTorch cannot export every attention with a mask in the form that is fast on a CPU,
        # but it can as plain products, which compute the same.
        with sdpa_kernel(SDPBackend.MATH):
            return write()
