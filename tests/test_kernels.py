import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inference_cases import fake_cusparselt, random
from torch import nn

from helpers.inference.cusparselt import SparseGemm
from helpers.inference.kernels import DenseGemm, DenseLayer, Epilogue
from helpers.inference.onednn import OneDnn
from helpers.sparsity import prune_2to4_

ACTIVATIONS = {
    "": lambda x: x,
    "ReLU": torch.relu,
    "ReLU6": lambda x: x.clamp(0, 6),
    "hard-swish": lambda x: x * (x + 3).clamp(0, 6) / 6,
}


@given(
    kind=st.sampled_from([DenseGemm, SparseGemm]),
    batch=st.integers(1, 5),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    channels=st.tuples(*[st.sampled_from([16, 32, 48])] * 2),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    bias=st.booleans(),
    activation=st.sampled_from(list(ACTIVATIONS)),
    layout=st.sampled_from(["channels first", "channels last", "some of the channels"]),
)
def test_a_gemm_is_the_convolution(kind, batch, size, channels, stride, bias, activation, layout):
    inputs, outputs = channels
    torch.manual_seed(0)
    layer = nn.Conv2d(inputs, outputs, 1, stride, bias=bias)
    prune_2to4_(layer)
    images = random(batch, inputs, *size)
    if layout != "channels first":
        images = images.contiguous(memory_format=torch.channels_last)
    if layout == "some of the channels":
        images = torch.cat([images, images], 1)[:, :inputs]
    with torch.inference_mode(), fake_cusparselt():
        expected = ACTIVATIONS[activation](layer(images))
        output = kind(layer, Epilogue(activation))(images)
    assert output.shape == expected.shape
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [DenseGemm, SparseGemm])
@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16)])
def test_a_gemm_is_the_linear_layer_for_any_number_of_dimensions(cusparselt, kind, shape):
    torch.manual_seed(0)
    layer = nn.Linear(16, 32)
    prune_2to4_(layer)
    with torch.inference_mode():
        output, expected = kind(layer)(random(*shape)), layer(random(*shape))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "taken"),
    [
        (nn.Linear(16, 10), True),
        (nn.Conv2d(16, 32, 1, stride=2), True),
        (nn.Conv2d(16, 32, 1, padding="same"), True),
        (nn.Conv2d(16, 32, 1, padding=1), False),
        (nn.Conv2d(16, 32, 1, groups=2), False),
        (nn.Conv2d(16, 32, 3), False),
        (nn.modules.linear.NonDynamicallyQuantizableLinear(16, 16), False),
    ],
)
def test_a_gemm_takes_exactly_the_layers_that_are_matrix_products(layer, taken):
    assert DenseGemm.takes(layer) == taken
    assert not SparseGemm.takes(layer), "the weights are not 2:4"
    prune_2to4_(layer, "any")
    assert SparseGemm.takes(layer) == taken


@pytest.mark.parametrize("kind", [DenseLayer, DenseGemm, OneDnn])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_epilogue_is_computed_with_the_layer(kind, bias, activation):
    torch.manual_seed(0)
    layer = nn.Linear(16, 32, bias=bias)
    x = 5 * random(5, 16)
    with torch.inference_mode():
        output = kind(layer, Epilogue(activation))(x)
        expected = ACTIVATIONS[activation](layer(x))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layer", [nn.Linear(8, 16), nn.Conv2d(8, 16, 3, padding=1)])
@pytest.mark.parametrize("kind", [DenseLayer, OneDnn])
@pytest.mark.parametrize("activation", ["", "ReLU", "ReLU6"])
def test_a_residual_is_added_before_the_activation(kind, layer, activation):
    x = 5 * random(2, 8, 8, 8)
    with torch.inference_mode():
        added = 5 * random(*layer(x).shape, seed=1)
        output = kind(layer, Epilogue(activation, add=True))(x, added)
        expected = ACTIVATIONS[activation](layer(x) + added)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_an_epilogue_is_told_in_words():
    epilogues = Epilogue(), Epilogue("ReLU6"), Epilogue(add=True), Epilogue("ReLU", add=True)
    assert list(map(str, epilogues)) == ["", "ReLU6", "residual", "residual, ReLU"]
