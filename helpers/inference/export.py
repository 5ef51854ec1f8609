"""From PyTorch to one ONNX file. Explained in `04_export_onnx.ipynb`."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from helpers.errors import InputError, first_line, root_cause
from helpers.files import atomic_write
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
        WriteError: the disk is full or the folder cannot be written to.
    """
    # PyTorch traces attention in another form if its mask, a learned bias, requires a gradient.
    folded = fold_batch_norm(model).requires_grad_(False)
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
    with atomic_write(path) as part:
        program.save(part, external_data=False)
    return Path(path)


def _program(model: nn.Module, example: Tensor) -> torch.onnx.ONNXProgram | None:
    batch = ({0: torch.export.Dim("batch")},)
    names: dict[str, Any] = {"input_names": [INPUT], "output_names": [OUTPUT], "verbose": False}
    try:
        return torch.onnx.export(model, (example,), dynamo=True, dynamic_shapes=batch, **names)
    except Exception:
        program = program_of_products(model, (example,), batch)
        return torch.onnx.export(program, dynamo=True, dynamic_shapes=batch, **names)


def program_of_products(
    model: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: tuple[Any, ...] | None = None
) -> torch.export.ExportedProgram:
    """Return the graph of a model in which attention is matrix products and a softmax.

    It computes the same. PyTorch's exporter cannot write every attention that is one operator,
    such as one with more than four dimensions or with a mask that is computed.

    Args:
        model: as for `torch.export.export`.
        inputs: its positional inputs.
        dynamic_shapes: as for `torch.export.export`.
    """
    with sdpa_kernel(SDPBackend.MATH):
        program = torch.export.export(model, inputs, dynamic_shapes=dynamic_shapes, strict=False)
        attention = {
            operator: decompose
            for operator, decompose in torch.export.default_decompositions().items()
            if "scaled_dot_product" in operator.name()
        }
        return program.run_decompositions(attention)
