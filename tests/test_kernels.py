import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from inference_cases import fake_cusparselt, random
from torch import nn

from helpers.inference.cusparselt import SparseGemm
from helpers.inference.kernels import DenseGemm, DenseLayer, Epilogue
from helpers.sparsity import prune_2to4_


@given(
    kind=st.sampled_from([DenseGemm, SparseGemm]),
    batch=st.integers(1, 5),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    channels=st.tuples(*[st.sampled_from([16, 32, 48])] * 2),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    bias=st.booleans(),
    relu=st.booleans(),
    layout=st.sampled_from(["channels first", "channels last", "some of the channels"]),
)
def test_a_gemm_is_the_convolution(kind, batch, size, channels, stride, bias, relu, layout):
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
        expected = layer(images).relu() if relu else layer(images)
        output = kind(layer, Epilogue(relu=relu))(images)
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


@pytest.mark.parametrize("kind", [DenseLayer, DenseGemm])
@pytest.mark.parametrize("bias", [True, False])
def test_an_epilogue_is_computed_with_the_layer(kind, bias):
    torch.manual_seed(0)
    layer = nn.Linear(16, 32, bias=bias)
    x = random(5, 16)
    with torch.inference_mode():
        output, expected = kind(layer, Epilogue(relu=True))(x), layer(x).relu()
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert (str(Epilogue(relu=True)), str(Epilogue())) == ("ReLU", "")
