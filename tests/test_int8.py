import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inference_cases import fake_cusparselt, random
from torch import Tensor, nn

from helpers.errors import InputError
from helpers.inference.cusparselt import SparseInt8Gemm
from helpers.inference.int8 import (
    LARGEST,
    MOST_ERROR,
    DenseInt8Gemm,
    Int8Layer,
    calibrate_,
    quantize,
    weight_scales,
)
from helpers.inference.kernels import Epilogue
from helpers.metrics import max_relative_error
from helpers.sparsity import is_2to4, prune_2to4_
from helpers.sparsity.onnx_constants import quantize as quantize_onnx

INT8_ERROR = 0.05  # of the largest output: half a step of 255, of input and weight, in each term


def test_a_weight_has_one_scale_for_each_output_and_its_zeros_stay():
    layer = nn.Conv2d(8, 6, 3)
    prune_2to4_(layer, "any")
    with torch.no_grad():
        layer.weight[2] = 0
    scales = weight_scales(layer.weight)
    integers = quantize(layer.weight.detach(), scales.view(-1, 1, 1, 1))
    assert integers.dtype == torch.int8
    largest = [LARGEST, LARGEST, 0, LARGEST, LARGEST, LARGEST]
    assert integers.flatten(1).abs().amax(1).tolist() == largest
    assert scales[2] == 1
    assert is_2to4(integers)
    assert ((integers == 0) >= (layer.weight == 0)).all()


@given(st.lists(st.floats(-300, 300, width=32), min_size=1), st.floats(0.01, 2))
def test_rounding_is_that_of_onnx_but_for_the_lowest_number(values, scale):
    ours = quantize(torch.tensor(values), torch.tensor(scale)).numpy()
    numbers, scale = np.array(values, np.float32), np.array(scale, np.float32)
    theirs = quantize_onnx(numbers, scale, None, np.dtype(np.int8))
    assert (ours == np.maximum(theirs, -LARGEST)).all()


def test_a_model_notes_the_range_of_each_layer_over_all_images():
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    images = random(70, 32)
    images[69, 3] = -9.0  # in the last batch
    notes = calibrate_(model, images)
    assert list(notes) == ["0", "2"]
    assert notes["0"].input_scale == pytest.approx(9 / LARGEST)
    with torch.inference_mode():
        hidden = model[1](model[0](images))
    assert notes["2"].input_scale == pytest.approx(float(hidden.max()) / LARGEST)
    assert [model[0].int8, model[2].int8] == list(notes.values())
    assert not any(layer._forward_hooks for layer in model.modules())


def test_the_error_of_a_layer_is_what_int8_changes_of_its_output():
    layer = nn.Linear(32, 32, bias=False)
    images = random(64, 32)
    usual = calibrate_(nn.Sequential(layer), images)["0"].error
    assert 0.003 < usual < 0.02
    images[0, 0] = 400.0  # one outlier, and the others have few levels left
    images[1:, 0] = 0.0
    with torch.no_grad():
        layer.weight[:, 0] = 0
    assert calibrate_(nn.Sequential(layer), images)["0"].error > 0.3 > MOST_ERROR


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(0, 32), r"^There are 0 calibration images, too few"),
        (torch.zeros(1, 32), r"^There are 1 calibration images, too few .* Give at least 8"),
        (torch.full((8, 32), float("nan")), "calibration images have NaN"),
        (torch.full((8, 32), 1e38), "input of 1 is not finite"),
    ],
)
def test_calibration_images_that_tell_nothing_are_refused(images, message):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    with torch.no_grad():
        model[0].weight.fill_(1.0)
    with pytest.raises(InputError, match=message):
        calibrate_(model, images)
    assert not hasattr(model[1], "int8")
    assert not any(layer._forward_hooks for layer in model.modules())


def calibrated(layer: nn.Module, images: Tensor) -> nn.Module:
    calibrate_(nn.Sequential(layer), images)
    return layer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", [DenseInt8Gemm, SparseInt8Gemm])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["", "ReLU"])
def test_an_int8_gemm_is_the_convolution_up_to_rounding(kind, dtype, bias, activation):
    torch.manual_seed(0)
    layer = nn.Conv2d(64, 32, 1, (2, 1), bias=bias)
    prune_2to4_(layer)
    layer = layer.to(dtype)
    images = random(3, 64, 7, 5).to(dtype)
    with torch.inference_mode(), fake_cusparselt() as fake:
        kernel = kind(calibrated(layer, images.repeat(3, 1, 1, 1)), Epilogue(activation))
        output = kernel(images, **kernel.search(images))
        expected = layer(images).relu() if activation else layer(images)
        exact = kernel.expected(images, expected)
    assert output.dtype == dtype
    assert output.shape == expected.shape
    assert 0 < max_relative_error(output, expected) < INT8_ERROR
    assert max_relative_error(output, exact) <= torch.finfo(dtype).eps
    if kind is SparseInt8Gemm:
        assert fake.calls[-1] == {"alg_id": 5, "split_k": 2, "split_k_mode": 1}


def test_the_dense_int8_gemm_runs_in_fp32_too():
    layer = calibrated(nn.Linear(32, 32), random(40, 32))
    with torch.inference_mode():
        for rows in (1, 17, 40):
            x = random(rows, 32, seed=rows)
            assert max_relative_error(DenseInt8Gemm(layer)(x), layer(x)) < INT8_ERROR


def test_values_beyond_the_calibration_data_are_cut_off():
    layer = calibrated(nn.Linear(32, 32, bias=False), torch.full((8, 32), 0.5))
    with torch.inference_mode():
        kernel = DenseInt8Gemm(layer)
        torch.testing.assert_close(
            kernel(torch.full((1, 32), 9.0)), kernel(torch.full((1, 32), 0.5))
        )


def test_an_int8_gemm_takes_calibrated_layers_and_says_why_it_must_not_run_some():
    layer = nn.Linear(32, 32)
    assert not DenseInt8Gemm.takes(layer)
    layer.int8 = Int8Layer(0.1, MOST_ERROR)
    assert DenseInt8Gemm.takes(layer)
    assert not SparseInt8Gemm.takes(layer), "the weights are not 2:4"
    prune_2to4_(layer)
    assert SparseInt8Gemm.takes(layer)
    assert SparseInt8Gemm.why_not(layer) == ""
    layer.int8 = Int8Layer(0.1, 0.123)
    assert (
        DenseInt8Gemm.why_not(layer) == "INT8 changes 12% of the layer's output, and may change 10%"
    )
    small = nn.Linear(48, 32)
    small.int8 = Int8Layer(0.1, 0.0)
    assert "not multiples of 32" in DenseInt8Gemm.why_not(small)
