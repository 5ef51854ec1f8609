import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, prune

from helpers.errors import HelpersError, InputError
from helpers.layers import (
    count_macs,
    layer_kind,
    layer_table,
    layer_weights,
    model_inputs,
    shares_by_kind,
)
from helpers.training.networks import create_model


@pytest.fixture
def model():
    torch.manual_seed(0)
    return create_model("resnext14_8x1d", 10)


@pytest.fixture
def three_layers():
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.Conv2d(8, 6, 1, stride=2),
        nn.Flatten(),
        nn.Linear(6 * 3 * 2, 10),
    )


# Which weights there are.


def test_weights_go_by_the_names_of_the_parameters():
    model = nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.Sequential(nn.Linear(8, 2)))
    weights = layer_weights(model)
    assert list(weights) == ["0.weight", "2.0.weight"]
    assert [weight.layer_name for weight in weights.values()] == ["0", "2.0"]
    assert all(weight.tensor is model.get_parameter(name) for name, weight in weights.items())
    assert all(weight.is_parameter for weight in weights.values())


def test_a_network_of_one_layer_has_a_weight_without_a_layer_name():
    (weight,) = layer_weights(nn.Linear(4, 4)).values()
    assert (weight.name, weight.layer_name) == ("weight", "")


def test_attention_has_a_packed_projection_or_three_and_the_one_behind():
    packed, three = nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=4, vdim=12)
    assert list(layer_weights(packed)) == ["in_proj_weight", "out_proj.weight"]
    assert list(layer_weights(three)) == [
        "q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight",
    ]  # fmt: skip


def test_a_tied_weight_comes_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert list(layer_weights(model)) == ["0.weight", "1.weight"]


def test_a_computed_weight_goes_by_the_parameter_that_it_is_computed_from():
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4)))
    ((name, weight),) = layer_weights(model).items()
    assert name == weight.name == "0.parametrizations.weight.original1"
    assert weight.stored is model.get_parameter(name)
    assert (weight.layer_name, weight.attribute) == ("0", "weight")
    assert weight.is_computed and not weight.is_parameter
    assert torch.equal(weight.tensor, model[0].weight)


def test_a_tied_weight_names_all_its_uses():
    model = nn.ModuleDict({"table": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["table"].weight
    model["again"] = model["head"]
    (weight,) = layer_weights(model).values()
    assert weight.name == "head.weight"
    assert weight.tied_to == (("table.weight", model["table"]), ("again.weight", model["head"]))


def test_a_tied_weight_is_refused_if_one_of_its_layers_computes_another():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), Standardised(4, 4, 1))
    model[1].weight = model[0].weight
    (weight,) = layer_weights(model).values()
    assert weight.refusal == "computed before each product: zeros do not stay zero"


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_recurrent_layers_are_listed_and_counted_but_not_supported(kind):
    layer = kind(4, 6)
    weights = layer_weights(layer)
    assert set(weights) == {name for name, each in layer.named_parameters() if each.dim() == 2}
    assert {weight.refusal for weight in weights.values()} == {"recurrent: not supported"}
    table = layer_table(layer, example=torch.zeros(5, 4))
    assert set(table.kind) == {"recurrent"}
    assert table.macs.sum() == 5 * sum(weight.shape.numel() for weight in weights.values())


def test_gpt2s_linear_layer_has_its_inputs_in_rows(monkeypatch):
    class Conv1D(nn.Module):
        def __init__(self, outputs, inputs):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(inputs, outputs))
            self.bias = nn.Parameter(torch.zeros(outputs))

        def forward(self, x):
            return torch.addmm(self.bias, x, self.weight)

    assert layer_weights(Conv1D(8, 4)) == {}
    module = SimpleNamespace(Conv1D=Conv1D)
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)
    (weight,) = layer_weights(Conv1D(8, 4)).values()
    assert (weight.input_dim, weight.input_channels, weight.output_channels) == (0, 4, 8)
    assert (weight.is_parameter, weight.refusal, layer_kind(weight.layer)) == (True, "", "linear")
    assert layer_table(Conv1D(8, 4), example=torch.zeros(2, 4)).macs.tolist() == [2 * 32]


def test_a_layer_with_accelerates_hook_is_a_plain_one():
    layer = nn.Linear(4, 4)
    layer._old_forward = layer.forward
    layer.forward = lambda x: pytest.fail("it ran")
    (weight,) = layer_weights(layer).values()
    assert weight.is_parameter and not weight.refusal


def test_input_channels_are_those_of_one_group_along_the_right_dimension():
    cases = {
        nn.Linear(12, 4): (1, 12),
        nn.Conv2d(8, 4, 3, groups=2): (1, 4),
        nn.ConvTranspose2d(12, 8, 3): (0, 12),
        nn.ConvTranspose1d(12, 8, 3, groups=2): (0, 6),
    }
    for layer, expected in cases.items():
        (weight,) = layer_weights(layer).values()
        assert (weight.input_dim, weight.input_channels) == expected


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.Linear(4, 4), "linear"),
        (nn.Conv2d(4, 4, 3), "3x3 convolution"),
        (nn.Conv3d(4, 4, (1, 3, 3), groups=2), "grouped 1x3x3 convolution"),
        (nn.ConvTranspose2d(4, 4, 2), "transposed 2x2 convolution"),
        (nn.MultiheadAttention(4, 1), "attention"),
    ],
)
def test_a_layer_has_a_kind_in_words(layer, kind):
    assert layer_kind(layer) == kind


# What they cost.


def test_macs_are_those_counted_by_hand(three_layers):
    table = layer_table(three_layers, (4, 6, 4))
    assert table.weight.tolist() == ["0.weight", "2.weight", "4.weight"]
    assert table.kind.tolist() == ["grouped 3x3 convolution", "1x1 convolution", "linear"]
    assert table["shape"].tolist() == ["8x2x3x3", "6x8x1x1", "10x36"]
    assert table.groups.tolist() == [2, 1, 1]
    assert table.parameters.tolist() == [144, 48, 360]
    # positions x output channels x length of a filter
    assert table.macs.tolist() == [24 * 8 * (2 * 9), 6 * 6 * 8, 10 * 36]


@pytest.mark.parametrize(
    ("layer", "example", "macs"),
    [
        (nn.Conv1d(4, 8, 3), (1, 4, 10), 8 * 8 * (4 * 3)),
        (nn.Conv3d(2, 4, 3), (1, 2, 5, 4, 3), (3 * 2 * 1) * 4 * (2 * 27)),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (1, 4, 3, 5), 15 * 4 * 6 * 4),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), (1, 4, 7), 7 * 4 * 3 * 3),
        (nn.Linear(8, 3), (2, 5, 8), 10 * 8 * 3),
    ],
)
def test_macs_of_every_kind_of_layer_for_an_example(layer, example, macs):
    assert layer_table(layer, example=torch.zeros(example)).macs.tolist() == [macs]


@pytest.mark.parametrize("batch_first", [False, True])
def test_macs_of_packed_attention_are_counted_in_eval_and_training(batch_first):
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first)
    for mode in (True, False):
        encoder.train(mode)
        table = layer_table(encoder, example=torch.zeros(3, 5, 8)).set_index("weight")
        assert table.macs.to_dict() == {
            "self_attn.in_proj_weight": 15 * 24 * 8,
            "self_attn.out_proj.weight": 15 * 8 * 8,
            "linear1.weight": 15 * 16 * 8,
            "linear2.weight": 15 * 8 * 16,
        }
    assert torch.backends.mha.get_fastpath_enabled()


def test_macs_of_cross_attention_go_by_the_length_of_each_input():
    attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=12)
    query, key, value = torch.zeros(3, 1, 8), torch.zeros(5, 1, 4), torch.zeros(5, 1, 12)
    table = layer_table(attention, example=(query, key, value))
    assert table.macs.tolist() == [3 * 64, 5 * 8 * 4, 5 * 8 * 12, 3 * 64]


def test_a_layer_that_runs_twice_costs_twice():
    shared = nn.Linear(4, 4)
    tied = nn.Linear(4, 4)
    tied.weight = shared.weight
    table = layer_table(nn.Sequential(shared, shared, tied), example=torch.zeros(1, 4))
    assert table.macs.tolist() == [3 * 16]


class Backwards(nn.Module):
    """Runs its layers in another order than it was given them, and one not at all."""

    def __init__(self):
        super().__init__()
        self.never, self.second, self.first = nn.Linear(4, 2), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, y):
        return self.second(self.first(x)) + y


def test_rows_are_in_order_of_execution_and_what_never_runs_comes_last():
    table = layer_table(Backwards(), example=(torch.zeros(1, 4), torch.zeros(1, 4)))
    assert table.weight.tolist() == ["first.weight", "second.weight", "never.weight"]
    assert table.macs.tolist() == [16, 16, 0]


@pytest.mark.parametrize("training", [True, False])
def test_counting_leaves_the_network_as_it_was(model, training):
    model.train(training)
    frozen = model.bn1.eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    layer_table(model, (1, 28, 28))
    assert {layer.training for layer in model.modules() if layer is not frozen} == {training}
    assert not frozen.training
    assert not any(layer._forward_hooks for layer in model.modules())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_counting_removes_its_hooks_when_the_image_does_not_fit(three_layers):
    with pytest.raises(RuntimeError):
        layer_table(three_layers, (3, 6, 4))
    assert not any(layer._forward_hooks for layer in three_layers.modules())
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("inputs", [{}, {"image_shape": (4, 6, 4), "example": torch.zeros(1)}])
def test_counting_takes_one_kind_of_input(three_layers, inputs):
    with pytest.raises(HelpersError, match=r"either `image_shape`.*or `example`"):
        layer_table(three_layers, **inputs)


def test_named_inputs_are_given_by_name():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, *, x, scale):
            return {"answer": (self.inner(x) * scale, None)}

    example = {"x": torch.zeros(2, 4), "scale": 2.0}
    assert layer_table(Named(), example=example).macs.tolist() == [32]


def test_a_layer_may_return_anything():
    class Pair(nn.Linear):
        def forward(self, x):
            return super().forward(x), None

    assert layer_table(Pair(4, 4), example=torch.zeros(2, 4)).macs.tolist() == [32]


@pytest.mark.parametrize("model", [nn.ReLU(), nn.BatchNorm2d(3), nn.Sequential()], ids=repr)
def test_a_model_without_layers_has_an_empty_table(model):
    table = layer_table(model, (3, 4, 4))
    assert table.empty
    assert list(table.columns) == ["weight", "kind", "shape", "groups", "parameters", "macs"]
    assert shares_by_kind(table).empty


@pytest.mark.parametrize("example", [3, "abc", (), {}, torch.zeros(0, 4), torch.tensor(1.0)])
def test_an_example_has_a_tensor_with_a_batch(example):
    with pytest.raises(InputError, match="`example` holds no tensor with a batch"):
        layer_table(nn.Linear(4, 4), example=example)


@pytest.mark.parametrize("shape", ["abc", (4, 0, 4), (4, -6, 4), (4, 6.0, 4), (4, True, 4), 4])
def test_sides_of_an_image_are_counts(shape):
    with pytest.raises(InputError, match="There are no images of shape"):
        layer_table(nn.Linear(4, 4), shape)


def test_images_are_made_like_the_first_parameter_or_where_they_are_asked_for():
    ((image,), named) = model_inputs(nn.Conv2d(3, 4, 1).double(), (3, 8, 6), batch=2)
    assert (image.shape, image.dtype, named) == ((2, 3, 8, 6), torch.float64, {})
    ((image,), _) = model_inputs(nn.ReLU(), (3, 8, 6), device="meta")
    assert (image.shape, image.dtype, image.device.type) == ((1, 3, 8, 6), torch.float32, "meta")


def test_only_layers_have_a_kind():
    with pytest.raises(InputError, match="A ReLU is not a linear layer"):
        layer_kind(nn.ReLU())


def test_weights_that_are_known_already_are_taken(model):
    weights = layer_weights(model)
    given = layer_table(model, (1, 28, 28), weights=weights)
    assert given.equals(layer_table(model, (1, 28, 28)))


class Standardised(nn.Conv2d):
    """Multiplies by another weight than it holds."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


@pytest.mark.parametrize(
    "layer",
    [
        Standardised(4, 6, 3),
        parametrizations.weight_norm(nn.Conv2d(4, 6, 3)),
        parametrizations.spectral_norm(nn.Conv2d(4, 6, 3)),
        pytest.param(
            lambda: nn.utils.weight_norm(nn.Conv2d(4, 6, 3)),
            marks=pytest.mark.filterwarnings("ignore::FutureWarning"),
        ),
        nn.utils.spectral_norm(nn.Conv2d(4, 6, 3)),
        prune.identity(nn.Conv2d(4, 6, 3), "weight"),
    ],
    ids=["standardised", "weight norm", "spectral norm", "old weight norm", "old spectral norm",
         "pruned by torch"],
)  # fmt: skip
def test_a_weight_that_is_computed_at_each_call_is_counted(layer):
    layer = layer() if not isinstance(layer, nn.Module) else layer
    table = layer_table(nn.Sequential(layer), (4, 7, 7))
    assert table.macs.tolist() == [25 * 6 * 4 * 9]


def test_other_products_within_a_layer_are_not_with_its_weight():
    class Gated(nn.Linear):
        def forward(self, x):
            gate = torch.ones(8, 8) @ torch.ones(8)
            return super().forward(x) * (x @ gate.view(8, 1)) * (x.T @ x).sum()

    assert layer_table(Gated(8, 4), example=torch.zeros(2, 8)).macs.tolist() == [2 * 8 * 4]


def test_a_computed_projection_of_attention_is_counted():
    attention = nn.MultiheadAttention(8, 2)
    parametrizations.weight_norm(attention, "in_proj_weight")
    parametrizations.weight_norm(attention.out_proj)
    query, key = torch.zeros(3, 1, 8), torch.zeros(5, 1, 8)
    table = layer_table(attention, example=(query, key, key)).set_index("weight")
    assert table.macs.to_dict() == {
        "parametrizations.in_proj_weight.original1": 13 * 64,
        "out_proj.parametrizations.weight.original1": 3 * 64,
    }


def test_a_model_may_differentiate_as_it_runs():
    class Force(nn.Module):
        def __init__(self):
            super().__init__()
            self.energy = nn.Linear(4, 1)

        def forward(self, x):
            with torch.enable_grad():
                x = x.detach().requires_grad_()
                return torch.autograd.grad(self.energy(x).square().sum(), x)[0]

    # Forward, and back to the input.
    assert layer_table(Force(), example=torch.zeros(2, 4)).macs.tolist() == [2 * 2 * 4]


def test_shares_add_up_to_a_hundred_per_cent(model):
    shares = shares_by_kind(layer_table(model, (1, 28, 28)))
    assert shares["layers"].sum() == 17
    assert shares["parameters, %"].sum() == pytest.approx(100, abs=0.05)
    assert shares["MACs, %"].sum() == pytest.approx(100, abs=0.05)
    assert shares.index[0] == "1x1 convolution"


class Everything(nn.Module):
    """Multiplies in every way that is no layer: experts, buffers, activations."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.zeros(3, 4, 4))
        self.inner = nn.Linear(4, 4)
        self.register_buffer("basis", torch.zeros(4, 4))

    def forward(self, x):
        x = self.inner(x) @ self.basis + x @ self.inner.weight
        y = torch.einsum("ni,eio->eno", x, self.experts).mean(0)
        return F.scaled_dot_product_attention(x, y, y)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_product_of_a_network_is_counted_once(device):
    with torch.device(device):
        model, x = Everything(), torch.zeros(2, 4)
    count = count_macs(model, ((x,), {}), layer_weights(model))
    # The second use of the layer's weight sums over its outputs.
    assert count.layers == {"inner.weight": 2 * 2 * 16}
    assert count.sparse == {"inner.weight": 2 * 16}
    assert count.parameters == {"experts": 3 * 2 * 16}
    assert count.without_weight == 2 * 16 + 2 * (2 * 2 * 4)
    assert count.total == (2 + 3 + 1) * 2 * 16 + 2 * 16


class Lending(nn.Module):
    """Uses the weights of its layers without calling them, beside calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(4, 8, 3), nn.Linear(8, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.conv2d(self.conv(x), self.conv.weight[:, :, :1, :1].new_ones(8, 8, 1, 1))
        x = F.conv2d(x[:, :4], weight=self.conv.weight)
        x = F.linear(x.mean((2, 3)), self.linear.weight)
        return x + self.linear(x[:, :8])


def test_weights_that_are_used_without_their_layer_are_counted():
    table = layer_table(Lending(), (4, 8, 8)).set_index("weight")
    assert table.macs["conv.weight"] == 4 * 8 * 9 * (6 * 6 + 4 * 4)
    assert table.macs["linear.weight"] == 2 * 8 * 16


def test_swins_attention_is_counted_with_the_weights_that_it_takes():
    torch.manual_seed(0)
    model = torchvision.models.SwinTransformer([4, 4], 16, [2], [2], [4, 4], num_classes=10)
    table = layer_table(model, (3, 16, 16)).set_index("weight")
    block = "features.1.0.attn."
    assert table.macs[block + "qkv.weight"] == 16 * 3 * 16 * 16  # 16 patches
    assert table.macs[block + "proj.weight"] == 16 * 16 * 16
