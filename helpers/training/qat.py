"""Train a model for INT8: quantisation-aware fine-tuning, with the zeros held.

For a network that loses accuracy when it is only calibrated. While it trains, the input and the
weight of each layer are rounded to INT8, as the quantised file will round them, and gradients
pass through the rounding as if it were not there. The scales of the inputs stay those of the
calibration; the scales of a weight follow from its largest numbers, as the quantiser computes
them. So the file that is quantised afterwards, from the same calibration, has the scales that
were trained with. Explained in `08_int8.ipynb`.

torchao's PT2E does not serve here, although its training holds the masks too (version 0.18 was
tried). Its quantiser for convolutions is part of its tests or of ExecuTorch; it places other
roundings than a file for TensorRT has, gives activations zero points, which TensorRT refuses, and
moves the scales while it trains. Its models also refuse `train()` and `eval()`, which a training
loop calls. The rounding and its gradient are PyTorch's own operators.

Source: Jacob et al., arXiv 1712.05877; the straight-through estimator is that of Bengio et al.,
arXiv 1308.3432.
"""

import copy
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from helpers.errors import InputError
from helpers.layers import CONVOLUTIONS
from helpers.sparsity.prune import Masks
from helpers.training.data import Splits
from helpers.training.loop import Epoch, train
from helpers.training.recipe import Recipe

LARGEST = 127  # symmetric: -128 has no opposite
_ORIGINAL = "parametrizations.weight.original"  # where a rounded weight has its numbers


class RoundInput(nn.Module):
    """Round activations to INT8 with one fixed scale; the gradient of what is cut off is zero."""

    scale: Tensor
    zero_point: Tensor

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32))

    def forward(self, input: Tensor) -> Tensor:
        return torch.fake_quantize_per_tensor_affine(
            input, self.scale, self.zero_point, -LARGEST, LARGEST
        )


class RoundWeight(nn.Module):
    """Round a weight to INT8, with a scale for each output channel from its largest number."""

    def forward(self, weight: Tensor) -> Tensor:
        largest = weight.detach().flatten(1).abs().amax(1)
        scales = torch.where(largest > 0, largest / LARGEST, 1.0)
        zero_points = torch.zeros_like(scales, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(
            weight, scales, zero_points, 0, -LARGEST, LARGEST
        )


def rounded_copy(model: nn.Module, input_scales: Mapping[str, float]) -> nn.Module:
    """Return a copy of a model whose layers round their input and their weight to INT8.

    Its logits are those of the quantised file, but for the branches of additions and the results
    that no layer multiplies, which stay as they are. Batch norms need not be folded: each
    multiplies an output channel, which has its own scale.

    Args:
        model: in floating point.
        input_scales: by the name of a linear layer or a convolution, the scale of its input. All
            other layers stay as they are.

    Raises:
        InputError: there are no scales, or one is of no such layer or not a positive number.
    """
    if not input_scales:
        raise InputError("There are no scales to train with; calibrate the model first.")
    rounded = copy.deepcopy(model)
    layers = dict(rounded.named_modules())
    for name, scale in input_scales.items():
        layer = layers.get(name)
        if not isinstance(layer, (nn.Linear, *CONVOLUTIONS)):
            raise InputError(
                f"The model has no linear layer or convolution {name}, which has a scale: the "
                "calibration is of another network. Calibrate this one."
            )
        if not 0 < scale < float("inf"):
            raise InputError(
                f"The scale of the input of {name} is {scale}, not a positive number. Calibrate "
                "the model again, with images that it was trained for."
            )
        layer.input_rounding = RoundInput(scale)
        layer.register_forward_pre_hook(_round_input)
        parametrize.register_parametrization(layer, "weight", RoundWeight())
    return rounded


def _round_input(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    rounding = layer.input_rounding
    assert isinstance(rounding, RoundInput)
    first, *others = inputs
    return (rounding(first), *others)


def train_int8(
    model: nn.Module,
    input_scales: Mapping[str, float],
    splits: Splits,
    recipe: Recipe,
    seed: int,
    masks: Masks | None = None,
    progress_file: Path | None = None,
) -> list[Epoch]:
    """Fine-tune a model for INT8 and leave it with its best weights, in evaluation mode.

    The best weights are those of the epoch that is most accurate in INT8 on the validation
    images. They remain floating-point numbers: export and quantise the model afterwards, with
    the ranges of the same calibration. They are weights for INT8 with these scales: a percentile
    cuts large activations off, and a model that was trained with that may need it.

    Args:
        model: calibrated; it receives the best weights.
        input_scales: as `rounded_copy` takes them; `helpers.inference.int8_placement` reads
            them from a file that was quantised after calibration alone.
        splits: training and validation images.
        recipe: a few epochs, at a hundredth of the learning rate of the training or so.
        seed: sets the order and the augmentation of the images.
        masks: weights to hold at zero, as `prune_2to4_` returned them, by the names in `model`.
        progress_file: as `train` takes it.

    Returns:
        One `Epoch` for each epoch; its accuracy is that in INT8.

    Raises:
        InputError: as `rounded_copy` and `train`.
        TrainingError: the loss became NaN or infinite.
    """
    rounded = rounded_copy(model, input_scales)
    moved = {f"{name}.weight": f"{name}.{_ORIGINAL}" for name in input_scales}
    held = {moved.get(name, name): mask for name, mask in (masks or {}).items()}
    epochs = train(rounded, splits, recipe, seed, held, progress_file)
    state = rounded.state_dict()
    back = {original: name for name, original in moved.items()}
    names = model.state_dict().keys()
    model.load_state_dict(
        {back.get(key, key): value for key, value in state.items() if back.get(key, key) in names}
    )
    model.eval()
    return epochs
