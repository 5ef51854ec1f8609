import copy

import pytest
import torch
from conftest import SHAPE
from inference_cases import random
from torch import nn

from helpers.errors import InputError
from helpers.inference.activation_ranges import activation_ranges
from helpers.inference.export import export_onnx
from helpers.inference.int8_placement import input_scales
from helpers.inference.onnx_session import OnnxSession
from helpers.inference.quantization import quantize_for_tensorrt
from helpers.sparsity import is_2to4, prune_2to4_
from helpers.training.loop import evaluate
from helpers.training.qat import LARGEST, RoundInput, RoundWeight, rounded_copy, train_int8
from helpers.training.recipe import Recipe

RECIPE = Recipe(epochs=2, batch_size=32, learning_rate=0.01, weight_decay=1e-4)


def chain() -> nn.Module:
    """Layers whose inputs alone are quantised, so that the rounded copy computes all of a file."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=3, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=3, groups=8), nn.ReLU(),
        nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10),
    )  # fmt: skip
    net(random(64, *SHAPE))
    prune_2to4_(net)
    return net.eval()


@pytest.fixture(scope="module")
def quantised(tmp_path_factory):
    """The chain, its INT8 file after calibration alone, and the ranges of that."""
    model, folder = chain(), tmp_path_factory.mktemp("qat")
    source = export_onnx(model, folder / "fp32.onnx", SHAPE)
    ranges = activation_ranges(source, random(32, *SHAPE, seed=1))
    quantize_for_tensorrt(source, folder / "int8.onnx", ranges)
    return model, folder / "int8.onnx", ranges


def test_a_rounded_copy_computes_what_the_quantised_file_does(quantised):
    model, path, _ = quantised
    scales = input_scales(path)
    assert list(scales) == ["0", "3", "5", "8"]
    images = random(32, *SHAPE, seed=2)
    (logits,) = OnnxSession(path).run(images.numpy(), ["logits"])
    logits = torch.from_numpy(logits)
    with torch.inference_mode():
        of_float = (model(images) - logits).abs().mean()
        of_copy = (rounded_copy(model, scales).eval()(images) - logits).abs().mean()
    assert of_float > 1e-4
    assert of_copy < of_float / 10  # a number half-way between two levels may go to either


def test_training_holds_the_zeros_and_leaves_floating_point_weights_of_the_same_names(
    quantised, tiny_splits, tmp_path
):
    model, path, ranges = quantised
    trained = copy.deepcopy(model)
    masks = prune_2to4_(trained)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    scales = input_scales(path)
    epochs = train_int8(trained, scales, tiny_splits, RECIPE, 0, masks)
    assert len(epochs) == 2
    after = trained.state_dict()
    assert list(after) == list(before)
    assert [type(layer) for layer in trained.modules()] == [
        type(layer) for layer in model.modules()
    ]
    assert not trained.training
    for name, mask in masks.items():
        assert is_2to4(after[name])
        assert (after[name][~mask] == 0).all()
        assert not torch.equal(after[name], before[name])
    best = max(epoch.validation for epoch in epochs)
    assert evaluate(rounded_copy(trained, scales), tiny_splits.validation).top1 == best
    # The same calibration gives the file the scales that were trained with.
    source = export_onnx(trained, tmp_path / "trained.onnx", SHAPE)
    quantize_for_tensorrt(source, tmp_path / "int8.onnx", ranges, expect_sparse=True)
    assert input_scales(tmp_path / "int8.onnx") == scales


def test_gradients_pass_through_the_rounding_but_not_through_what_is_cut_off():
    values = torch.tensor([0.2, -1.0, 1.3, -9.0], requires_grad=True)
    RoundInput(0.01)(values).sum().backward()
    assert values.grad.tolist() == [1, 1, 0, 0]
    weight = random(4, 8).requires_grad_()
    RoundWeight()(weight).sum().backward()
    assert (weight.grad == 1).all()


def test_a_weight_is_rounded_by_channel_and_zeros_stay():
    weight = random(4, 8, 3, 3)
    weight[2], weight[0, :4] = 0, 0
    rounded = RoundWeight()(weight)
    assert (rounded[weight == 0] == 0).all()
    steps = weight.flatten(1).abs().amax(1) / LARGEST
    for channel in (0, 1, 3):
        levels = rounded[channel] / steps[channel]
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
        assert (rounded[channel] - weight[channel]).abs().max() <= 0.501 * steps[channel]


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({}, "There are no scales to train with"),
        ({"1": 0.1}, "no linear layer or convolution 1, which has a scale.*another network"),
        ({"layer9": 0.1}, "no linear layer or convolution layer9"),
        ({"0": 0.0}, r"scale of the input of 0 is 0\.0, not a positive number"),
        ({"0": float("nan")}, "scale of the input of 0 is nan"),
    ],
)
def test_scales_of_something_else_are_refused(scales, message):
    with pytest.raises(InputError, match=message):
        rounded_copy(chain(), scales)


def test_a_file_without_quantised_layers_has_no_scales(quantised, tmp_path):
    path = export_onnx(quantised[0], tmp_path / "fp32.onnx", SHAPE)
    with pytest.raises(InputError, match=r"fp32\.onnx has no quantised weight"):
        input_scales(path)
