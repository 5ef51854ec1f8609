"""From PyTorch to one ONNX file. Explained in `04_export_onnx.ipynb`."""

import copy
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse

INPUT, OUTPUT = "images", "logits"


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """Return a copy in evaluation mode with every batch norm folded into its convolution.

    Folding multiplies each output channel by a number, so zeros stay zeros: a 2:4
    weight is 2:4 afterwards. It is done in FP32, before any cast to FP16.

    Args:
        model: a network that torch.fx can trace.
    """
    return fuse(copy.deepcopy(model).cpu().float().eval())


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


def relative_gap(logits: Tensor, reference: Tensor) -> float:
    """Return the largest difference of two sets of logits, relative to the largest logit."""
    logits, reference = logits.double(), reference.double()
    return float((logits - reference).abs().max() / reference.abs().max())
