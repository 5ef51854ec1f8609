import math
from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from rates_cases import A100
from torch import nn
from torch.nn.utils import parametrizations

from helpers.layers import layer_table
from helpers.measurement.advice import advise
from helpers.measurement.rates import Rates
from helpers.measurement.roofline import DATASHEETS
from helpers.measurement.trace import TracedLayer, trace_kernels
from helpers.training.networks import create_model

IMAGE = (3, 224, 224)


@cache
def on_meta(name):
    with torch.device("meta"):
        return create_model(name, 1000)


def test_kernels_are_in_the_order_in_which_they_run():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4, bias=False)).train()
    kernels = trace_kernels(model, ((torch.zeros(2, 8),), {}))
    layers = [kernel for kernel in kernels if isinstance(kernel, TracedLayer)]
    assert [kernels.index(layer) for layer in layers] == [0, 2]
    assert [layer.weight.name for layer in layers] == ["0.weight", "2.weight"]
    assert [(layer.m, layer.n, layer.k) for layer in layers] == [(2, 16, 8), (2, 4, 16)]
    assert [kernel.operations for kernel in kernels] == [2 * 2 * 16 * 8, 0, 2 * 2 * 4 * 16]
    assert [(kernel.read, kernel.written) for kernel in kernels] == [
        (16 + 128, 32), (32, 32), (32 + 64, 8)
    ]  # fmt: skip
    assert model.training


def sizes(model, image_shape, batch=1):
    layers = advise(model, A100, image_shape, batch=batch).layers
    return layers.set_index("layer")[["m", "n", "k", "groups"]].T.to_dict("list")


def test_layers_have_the_sizes_of_their_products():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.Conv2d(16, 32, 1, stride=2),
        nn.Conv2d(32, 32, (3, 5), padding=(1, 2), groups=4),
        nn.ConvTranspose2d(32, 24, 2, stride=2, groups=2),
        nn.Flatten(2),
        nn.Linear(64, 48),
    )
    assert sizes(model, (3, 8, 8), batch=10) == {
        "0": [640, 16, 27, 1],
        "1": [160, 32, 16, 1],
        "2": [160, 8, 8 * 15, 4],
        "3": [160, 12 * 4, 16, 2],
        "5": [240, 48, 64, 1],
    }


@pytest.mark.parametrize("name", ["resnet50", "vit_b_16"])
@pytest.mark.parametrize("datatype", ["FP16", "INT8", "FP8"])
@pytest.mark.parametrize("batch", [1, 64])
def test_a_layer_is_bound_by_what_its_time_is_counted_from(name, datatype, batch):
    sheet = DATASHEETS["h200"]
    rates = Rates.from_datasheet(sheet)
    layers = advise(on_meta(name), rates, IMAGE, batch=batch, datatype=datatype).layers
    products = layers[layers.sparse_ms.notna()]
    assert len(products) > 25
    arithmetic = 2 * products.m * products.n * products.k / sheet.tflops[datatype][0] / 1e9
    at_peak = products.dense_ms <= arithmetic * (1 + 1e-9)
    assert (at_peak == (products.bound == "arithmetic")).all()
    if name == "resnet50" and datatype == "FP16" and batch == 64:
        assert products.set_index("layer").bound["layer3.0.downsample.0"] == "arithmetic"


def test_a_strided_1x1_convolution_reads_only_the_pixels_that_it_looks_at():
    layer = nn.Conv2d(16, 32, 1, stride=2)
    (row,) = (
        advise(layer, replace(A100, best={"FP16": (math.inf, math.inf)}), (16, 8, 8))
        .layers[["dense_ms", "bound"]]
        .to_dict("records")
    )
    assert row["bound"] == "memory"
    assert row["dense_ms"] == pytest.approx(2 * (16 * 16 + 16 * 32 + 16 * 32) / 2039e6)


def test_the_projections_of_attention_are_layers():
    layer = nn.MultiheadAttention(32, 4, kdim=16, vdim=48, batch_first=True)
    query, key, value = torch.zeros(2, 5, 32), torch.zeros(2, 7, 16), torch.zeros(2, 7, 48)
    layers = advise(layer, A100, example=(query, key, value)).layers
    assert layers[["m", "n", "k"]].to_numpy().tolist() == [
        [10, 32, 32], [14, 32, 16], [14, 32, 48], [10, 32, 32],
    ]  # fmt: skip
    assert layers.kind.tolist() == ["attention"] * 3 + ["linear"]


@pytest.mark.parametrize("name", ["resnext101_32x8d", "vit_b_16"])
def test_the_products_are_all_the_macs_of_the_network(name):
    model = on_meta(name)
    layers = advise(model, A100, IMAGE, batch=3).layers
    table = layer_table(model, IMAGE)
    assert (layers.m * layers.n * layers.k * layers.groups).sum() == 3 * table.macs.sum()


def test_a_weight_used_without_its_layer_is_the_layers():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(32, 16)

        def forward(self, x):
            return F.linear(x, self.inner.weight) + x @ self.inner.weight.t()

    layers = advise(Functional(), A100, example=torch.zeros(8, 32)).layers
    assert layers[["layer", "m", "n", "k"]].to_numpy().tolist() == [["inner", 8, 16, 32]] * 2


def test_a_weight_shared_with_an_embedding_is_found():
    model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64, bias=False))
    model[1].weight = model[0].weight
    advice = advise(model, A100, example=torch.zeros(2, 5, dtype=torch.long))
    assert advice.layers[["m", "n", "k"]].to_numpy().tolist() == [[10, 64, 32]]
    # The embedding reads the rows that it returns, and not the whole table.
    assert advice.rest_ms == pytest.approx(2 * 2 * 10 * 32 / 2039e6)


def rest_numbers(model, example):
    """Return how many numbers are read and written outside of layers."""
    return pytest.approx(advise(model, A100, example=example).rest_ms * 2039e6 / 2)


IMAGES = torch.zeros(2, 16, 8, 8)


@pytest.mark.parametrize(
    "after",
    [
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.ReLU6(inplace=True),
        nn.Sequential(nn.BatchNorm2d(16), nn.ReLU(inplace=True)),
        nn.Dropout(inplace=True),
        nn.Sequential(nn.Flatten(), nn.Dropout()),
    ],
)
def test_folded_fused_and_view_operations_are_free(after):
    model = nn.Sequential(nn.Conv2d(16, 16, 1), after)
    assert rest_numbers(model, IMAGES) == 0


@pytest.mark.parametrize(
    ("after", "numbers"),
    [
        (nn.GELU(), 2 * 2048),
        (nn.MaxPool2d(2), 2048 + 512),
        (nn.AdaptiveAvgPool2d(1), 2048 + 32),
        (nn.Softmax(1), 2 * 2048),
        (nn.LayerNorm(8), 2 * 2048 + 16),
        (nn.Sequential(nn.GELU(), nn.ReLU()), 4 * 2048),
        (nn.Sequential(nn.GELU(), nn.BatchNorm2d(16), nn.ReLU()), 4 * 2048 + 4 * 16),
    ],
)
def test_other_operations_count_what_they_read_and_write(after, numbers):
    model = nn.Sequential(nn.Conv2d(16, 16, 1), after)
    assert rest_numbers(model, IMAGES) == numbers


def test_a_residual_addition_reads_two_and_writes_one_with_its_relu():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(16, 16, 1)

        def forward(self, x):
            return F.relu_(self.conv(x).add_(x))

    assert rest_numbers(Residual(), IMAGES) == 3 * 2048


def test_operations_on_weights_alone_are_free():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1000, 1))

        def forward(self, x):
            scale = (self.scale.exp() * torch.ones_like(x[:1]).sum()).mean()
            return x * scale

    assert rest_numbers(Scaled(), torch.zeros(4, 4)) == 33


def test_attention_is_counted_by_its_operations_and_bytes():
    class Attention(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

    q, k = torch.zeros(2, 4, 64, 32), torch.zeros(2, 4, 96, 32)
    operations = 2 * 2 * 2 * 4 * 64 * 96 * 32
    moved = 2 * 2 * (2 * 4 * 32) * (64 + 96)
    at_once = replace(A100, bandwidth=math.inf)
    assert advise(Attention(), at_once, example=(q, k, k.clone())).rest_ms == pytest.approx(
        operations / 312e9
    )
    free = replace(A100, best={"FP16": (math.inf, math.inf)})
    assert advise(Attention(), free, example=(q, k, k.clone())).rest_ms == pytest.approx(
        moved / 2039e6
    )


def test_each_part_of_a_tensor_is_read():
    class Parts(nn.Module):
        def forward(self, x):
            left, right = x.chunk(2)
            return left * right + left * left

    # Two different parts, then the same one twice, then a sum of two: 16 numbers each.
    assert rest_numbers(Parts(), torch.zeros(8, 4)) == (2 + 1) * 16 + (1 + 1) * 16 + (2 + 1) * 16


class Behind(nn.Module):
    """A layer behind something that was computed in an unusual way."""

    def __init__(self, way) -> None:
        super().__init__()
        self.lstm, self.head, self.way = nn.LSTM(64, 64, batch_first=True), nn.Linear(64, 64), way

    def forward(self, x):
        return self.head(self.way(self, x))


def in_a_buffer(own: Behind, x: torch.Tensor) -> torch.Tensor:
    buffer = torch.zeros(len(x), 4, 64)  # on no particular device
    for place in range(4):
        buffer[:, place] = x[:, place].relu()
    return buffer


@pytest.mark.parametrize(
    "way",
    [
        lambda own, x: own.lstm(x)[1][0][-1],
        lambda own, x: torch.var_mean(x.relu(), 1)[1],
        lambda own, x: x.relu().max(1)[1].float(),
        in_a_buffer,
    ],
    ids=["state", "second output", "indices", "buffer"],
)
def test_a_layer_behind_any_output_of_an_operation_is_counted(way):
    advice = advise(Behind(way), A100, example=torch.zeros(8, 4, 64))
    assert advice.layers.layer.tolist()[-1] == "head"


def test_the_same_tensor_given_twice_is_read_once():
    attention = nn.MultiheadAttention(64, 4, batch_first=True)
    x = torch.zeros(2, 8, 64)
    itself = advise(attention, A100, example=(x, x, x))
    assert itself.layers[["m", "n", "k"]].to_numpy().tolist() == [[16, 192, 64], [16, 64, 64]]
    assert len(advise(attention, A100, example=(x, x.clone(), x.clone())).layers) > 2


def test_a_computed_weight_is_a_layer_without_the_cost_of_computing_it():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(64, 64)), nn.Linear(64, 64))
    advice = advise(model, replace(A100, bandwidth=math.inf), example=torch.zeros(8, 64))
    assert advice.layers.layer.tolist() == ["0", "1"]
    assert advice.layers[["m", "n", "k"]].to_numpy().tolist() == [[8, 64, 64]] * 2
    assert advice.layers.reason.tolist() == [""] * 2
    assert advice.rest_ms == 0


class Standardised(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True))


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x):
        return F.linear(x, self.inner.weight - self.inner.weight.mean(1, keepdim=True))


def test_a_weight_that_is_computed_with_outside_of_its_layer_stays_dense():
    advice = advise(Outer(), A100, example=torch.zeros(8, 64))
    assert advice.layers.reason.tolist() == [
        "computed with outside of its layer: unknown whether zeros stay zero"
    ]


def test_a_weight_that_loses_its_zeros_is_a_layer_that_stays_dense():
    advice = advise(Standardised(64, 64), A100, example=torch.zeros(8, 64))
    assert advice.layers.reason.tolist() == ["computed before each product: zeros do not stay zero"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_that_a_hook_computes_is_left_as_it_was():
    layer = nn.utils.weight_norm(nn.Linear(64, 64))
    before = layer.weight
    trace_kernels(layer, ((torch.zeros(2, 64),), {}))
    assert layer.weight is before
