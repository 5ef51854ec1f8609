import copy
import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from helpers.errors import HelpersError
from helpers.products import watch_products
from helpers.sparsity import is_2to4, mask_2to4, prune_2to4_
from helpers.sparsity.eligibility import select_weights
from helpers.sparsity.sparsegpt import _inputs, prune_sparsegpt_, sparsegpt_2to4


def correlated(rows, columns, seed=0):
    """Inputs whose columns follow from each other in part, so that one can stand in."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator) @ mixing


def smooth_images(count, channels, size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator)
    images = F.avg_pool2d(
        torch.randn(count, channels, size + 2, size + 2, generator=generator), 3, 1
    )
    return torch.einsum("nchw,cd->ndhw", images, mixing)


def seeded(make, *args, **kwargs):
    torch.manual_seed(3)
    return make(*args, **kwargs)


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(8 * 8 * 8, 3),
    ).train()


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# One matrix.


def slow_sparsegpt(weight, hessian, dampening):
    """SparseGPT row by row, each removal by the formula of the optimal brain surgeon.

    Columns that the sweep has passed are fixed; those left make up for the removal, with
    the inverse of their own part of the Hessian, inverted again each time.
    """
    columns = weight.shape[1]
    hessian = hessian + dampening * hessian.diagonal().mean() * torch.eye(columns)
    weight = weight.clone()
    for row, first in itertools.product(weight, range(0, columns, 4)):
        costs = []
        for column in range(first, first + 4):
            inverse = torch.linalg.inv(hessian[column:, column:])
            costs.append(float(row[column] ** 2 / inverse[0, 0]))
        removed = sorted(range(4), key=lambda i: (costs[i], -i))[:2]
        for column in sorted(first + i for i in removed):
            inverse = torch.linalg.inv(hessian[column:, column:])
            row[column:] -= row[column].clone() / inverse[0, 0] * inverse[0]
            row[column] = 0
    return weight


@pytest.mark.parametrize("dampening", [0.0, 0.01, 1.0])
@pytest.mark.parametrize("block_size", [4, 8, 128])
def test_it_agrees_with_the_optimal_brain_surgeon_row_by_row(dampening, block_size):
    inputs = correlated(100, 24).double()
    weight = seeded(torch.randn, 6, 24).double()
    hessian = inputs.T @ inputs
    pruned, mask = sparsegpt_2to4(weight, hessian, dampening, block_size)
    torch.testing.assert_close(pruned, slow_sparsegpt(weight, hessian, dampening))
    assert torch.equal(pruned != 0, mask)


@given(
    rows=st.integers(1, 5),
    groups_of_four=st.integers(1, 6),
    samples=st.integers(1, 40),
    dampening=st.floats(1e-4, 10),
    seed=st.integers(0, 2**20),
)
def test_two_of_every_four_are_kept_whatever_the_inputs(
    rows, groups_of_four, samples, dampening, seed
):
    inputs = correlated(samples, 4 * groups_of_four, seed).double()
    weight = torch.randn(rows, 4 * groups_of_four, generator=torch.Generator().manual_seed(seed))
    pruned, mask = sparsegpt_2to4(weight, inputs.T @ inputs, dampening)
    assert (mask.view(rows, -1, 4).sum(2) == 2).all()
    assert pruned.isfinite().all()
    assert (pruned[~mask] == 0).all()


@given(seed=st.integers(0, 2**20), scale=st.floats(1e-6, 1e6))
def test_the_units_of_inputs_and_weights_do_not_matter(seed, scale):
    inputs = correlated(50, 16, seed).double()
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(seed)).double()
    hessian = inputs.T @ inputs
    pruned, mask = sparsegpt_2to4(weight, hessian)
    scaled, scaled_mask = sparsegpt_2to4(scale * weight, hessian * scale)
    assert torch.equal(mask, scaled_mask)
    torch.testing.assert_close(scaled, scale * pruned)


def test_uncorrelated_inputs_of_one_size_give_the_mask_by_magnitude():
    weight = seeded(torch.randn, 8, 32).double()
    pruned, mask = sparsegpt_2to4(weight, torch.eye(32, dtype=torch.float64))
    assert torch.equal(mask, mask_2to4(weight))
    torch.testing.assert_close(pruned, weight * mask)


def test_ties_keep_the_lowest_columns():
    _, mask = sparsegpt_2to4(torch.ones(2, 8), torch.eye(8, dtype=torch.float64))
    assert mask.tolist() == [[True, True, False, False] * 2] * 2


def test_inputs_that_are_always_zero_are_given_up_first():
    inputs = correlated(50, 8)
    inputs[:, [1, 2, 4, 7]] = 0
    _, mask = sparsegpt_2to4(torch.ones(2, 8), (inputs.T @ inputs).double())
    assert mask.tolist() == [[True, False, False, True, False, True, True, False]] * 2


def test_a_layer_without_any_input_is_pruned_by_magnitude():
    weight = seeded(torch.randn, 2, 8).double()
    pruned, _ = sparsegpt_2to4(weight, torch.zeros(8, 8, dtype=torch.float64))
    assert torch.equal(pruned, weight * mask_2to4(weight))


def test_a_singular_hessian_is_reported_with_the_remedy():
    inputs = correlated(4, 16).double()  # fewer samples than columns
    with pytest.raises(HelpersError, match=r"fc\.weight is singular.*more calibration data or"):
        sparsegpt_2to4(torch.ones(2, 16), inputs.T @ inputs, dampening=0.0, name="fc.weight")


@pytest.mark.parametrize("wrong", [{"block_size": 6}, {"block_size": 0}, {"dampening": -1.0}])
def test_senseless_numbers_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(HelpersError, match=f"^{name} is"):
        sparsegpt_2to4(torch.ones(2, 8), torch.eye(8, dtype=torch.float64), **wrong)


# One layer.

# A convolution of every kind, and a linear layer: all from 8 channels to 4.
LAYERS = {
    "linear": lambda: nn.Linear(8, 4),
    "conv1d": lambda: nn.Conv1d(8, 4, 3),
    "conv2d": lambda: nn.Conv2d(8, 4, 3),
    "conv3d": lambda: nn.Conv3d(8, 4, 2, stride=2),
    "pointwise": lambda: nn.Conv2d(8, 4, 1, bias=False),
    "asymmetric": lambda: nn.Conv2d(8, 4, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(1, 3)),
    "stride and padding": lambda: nn.Conv2d(8, 4, 3, stride=2, padding=1),
    "same": lambda: nn.Conv2d(8, 4, 4, padding="same", dilation=2),
    "valid": lambda: nn.Conv2d(8, 4, 3, padding="valid"),
    "reflect": lambda: nn.Conv2d(8, 4, 3, padding=2, padding_mode="reflect"),
    "circular": lambda: nn.Conv2d(8, 4, 4, padding="same", padding_mode="circular"),
    "replicate": lambda: nn.Conv2d(8, 4, 3, padding=1, padding_mode="replicate"),
    "grouped": lambda: nn.Conv2d(8, 4, 3, groups=2, padding=1),
    "grouped and dilated": lambda: nn.Conv1d(8, 4, 3, groups=2, dilation=2),
    "transposed": lambda: nn.ConvTranspose2d(8, 4, 3),
    "transposed 1d": lambda: nn.ConvTranspose1d(8, 4, 4, stride=2, padding=1),
    "transposed 3d": lambda: nn.ConvTranspose3d(8, 4, 2, stride=2),
    "transposed, gaps": lambda: nn.ConvTranspose2d(8, 4, 2, stride=3),
    "transposed, cut": lambda: nn.ConvTranspose2d(8, 4, 2, padding=2, bias=False),
    "transposed, asymmetric": lambda: nn.ConvTranspose2d(
        8, 4, (3, 2), stride=(2, 3), padding=(1, 0), output_padding=(1, 2), dilation=(2, 1)
    ),
    "transposed, grouped": lambda: nn.ConvTranspose2d(8, 4, 3, stride=2, groups=2),
}


def inputs_for(layer, count=5):
    kernel = getattr(layer, "kernel_size", ())
    sizes = [9] * len(kernel) if len(kernel) < 3 else [4] * 3
    flat = correlated(count * math.prod(sizes), 8)
    return flat.view(count, *sizes, 8).movedim(-1, 1)


def rows_of(run, weight, *inputs):
    """What a weight is multiplied with when something runs on these inputs."""
    products = []
    with torch.no_grad(), watch_products({"weight": weight.parameter}, products.append):
        run(*inputs)
    (product,) = products
    return list(_inputs(product, weight))


def weight_of(layer):
    (weight,) = select_weights(layer, rules="any")
    return weight


def as_matrix(layer, tensor):
    """A weight as (groups, outputs of a group, kernel positions * inputs of a group)."""
    weight = weight_of(layer)
    grouped = tensor.unflatten(0, (weight.groups, -1))
    if weight.transposed:
        grouped = grouped.transpose(1, 2)
    return grouped.movedim(2, -1).flatten(2)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_the_unfolded_inputs_times_the_weight_are_the_layers_outputs(make):
    layer = seeded(make).double()
    inputs = inputs_for(layer).double()
    (rows,) = rows_of(layer, weight_of(layer), inputs)
    product = (rows @ as_matrix(layer, layer.weight).mT).movedim(0, 1).flatten(1)
    bias = 0 if layer.bias is None else layer.bias
    expected = layer(inputs).movedim(1, -1).reshape(-1, 4)
    torch.testing.assert_close(product + bias, expected)


def slow_hessian(layer, inputs):
    """The sum of x xᵀ for each output channel, from how each output depends on the weight."""

    def outputs(weight):
        named = {**dict(layer.named_parameters()), "weight": weight}
        return torch.func.functional_call(layer, named, (inputs,))

    slopes = (
        torch.func.jacrev(outputs)(layer.weight.detach())
        .movedim(1, 0)
        .flatten(1, -1 - layer.weight.dim())
    )
    hessians = []
    for channel, own in enumerate(slopes):  # (outputs of one channel, *weight)
        rows = torch.stack([as_matrix(layer, slope).flatten(0, 1)[channel] for slope in own])
        hessians.append(rows.T @ rows)
    return hessians


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_every_layer_is_pruned_by_the_inputs_that_its_outputs_depend_on(make):
    layer, dense, by_magnitude = (seeded(make).double() for _ in range(3))
    inputs = inputs_for(layer, count=2).double()
    (mask,) = prune_sparsegpt_(layer, [inputs], rules="any").values()
    expected = torch.stack(
        [
            slow_sparsegpt(row[None], hessian, 0.01)[0]
            for row, hessian in zip(
                as_matrix(dense, dense.weight.detach()).flatten(0, 1),
                slow_hessian(dense, inputs),
                strict=True,
            )
        ]
    )
    pruned = as_matrix(layer, layer.weight.detach()).flatten(0, 1)
    torch.testing.assert_close(pruned, expected)
    assert is_2to4(layer.weight, weight_of(layer).input_dim)
    assert torch.equal(layer.weight != 0, mask)
    prune_2to4_(by_magnitude, rules="any")
    assert output_error(layer, dense, inputs) < output_error(by_magnitude, dense, inputs)


def output_error(layer, dense, inputs):
    with torch.no_grad():
        return float((layer(inputs) - dense(inputs)).square().sum())


def test_a_single_image_is_unfolded_as_a_batch_of_one():
    layer, image = nn.Conv2d(4, 8, 3), torch.randn(4, 6, 6)
    (alone,), (batch,) = (rows_of(layer, weight_of(layer), x) for x in (image, image[None]))
    assert torch.equal(alone, batch)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_large_inputs_are_unfolded_in_parts(monkeypatch, kind):
    layer, images = kind(4, 8, 3, padding=1), torch.randn(5, 4, 6, 6)
    (whole,) = rows_of(layer, weight_of(layer), images)
    for images_at_once, sizes in ((2, [72, 72, 36]), (0.5, [18] * 10)):
        chunk = int(images_at_once * whole[0].numel()) // 5
        monkeypatch.setattr("helpers.sparsity.sparsegpt._CHUNK", chunk)
        parts = rows_of(layer, weight_of(layer), images)
        assert [part.shape[1] for part in parts] == sizes
        assert torch.equal(torch.cat(parts, 1), whole)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@given(
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    padding=st.integers(0, 3) | st.sampled_from(["same", "valid"]),
    dilation=st.integers(1, 3),
    groups=st.sampled_from([1, 2]),
)
def test_every_convolution_is_the_product_with_its_unfolded_inputs(
    kernel, stride, padding, dilation, groups
):
    stride = 1 if padding == "same" else stride
    images = seeded(torch.randn, 2, 4, 10, 11).double()
    weight = seeded(torch.randn, 2, 4 // groups, kernel, 2).double()
    matrix = weight.movedim(1, -1).reshape(groups, 2 // groups, -1)
    arguments = images, weight, None, stride, padding, dilation, groups
    layer = nn.Conv2d(4, 2, (kernel, 2), groups=groups).double()
    layer.weight = nn.Parameter(weight)
    (rows,) = rows_of(F.conv2d, weight_of(layer), *arguments)
    expected = F.conv2d(*arguments)
    outputs = (rows @ matrix.mT).movedim(0, 1).flatten(1)
    torch.testing.assert_close(outputs, expected.movedim(1, -1).reshape(-1, 2))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(32, 16),
        lambda: nn.Conv2d(32, 16, 1),
        lambda: nn.Conv2d(32, 16, 3, padding=1),
        lambda: nn.Conv2d(32, 16, 3, stride=2, padding="valid", dilation=2),
    ],
    ids=["linear", "1x1", "3x3", "dilated"],
)
def test_the_outputs_stay_closer_than_by_magnitude_or_by_the_mask_alone(make):
    dense, layer, by_magnitude, mask_only = (seeded(make) for _ in range(4))
    images = smooth_images(64, 32)
    inputs = images.mean((2, 3)) if isinstance(dense, nn.Linear) else images
    (mask,) = prune_sparsegpt_(layer, inputs.split(16)).values()
    prune_2to4_(by_magnitude)
    with torch.no_grad():
        mask_only.weight.mul_(mask)
    assert is_2to4(layer.weight)
    error = output_error(layer, dense, inputs)
    assert error < 0.7 * output_error(by_magnitude, dense, inputs)
    assert error < 0.7 * output_error(mask_only, dense, inputs)


def test_a_convolution_is_pruned_as_the_linear_layer_of_its_windows():
    conv = seeded(nn.Conv2d, 8, 8, 3, padding=1, bias=False)
    linear = nn.Linear(72, 8, bias=False)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.movedim(1, -1).flatten(1))
    images = smooth_images(16, 8)
    windows = F.unfold(images, 3, padding=1).unflatten(1, (8, 9)).permute(0, 3, 2, 1).flatten(2)
    (conv_mask,) = prune_sparsegpt_(conv, [images]).values()
    (linear_mask,) = prune_sparsegpt_(linear, [windows]).values()
    assert torch.equal(conv_mask.movedim(1, -1).flatten(1), linear_mask)
    torch.testing.assert_close(conv.weight.movedim(1, -1).flatten(1), linear.weight)


def test_a_grouped_convolution_is_pruned_as_separate_ones():
    grouped = seeded(nn.Conv2d, 32, 8, 3, groups=2, bias=False)
    images = smooth_images(16, 32)
    images[:, 16:] *= 100  # of a scale of its own: each group has its own dampening
    parts = [nn.Conv2d(16, 4, 3, bias=False) for _ in range(2)]
    for part, weight in zip(parts, grouped.weight.detach().chunk(2), strict=True):
        part.weight.data.copy_(weight)
    (mask,) = prune_sparsegpt_(grouped, [images], rules="asp").values()
    masks = [
        *prune_sparsegpt_(parts[0], [images[:, :16]]).values(),
        *prune_sparsegpt_(parts[1], [images[:, 16:]]).values(),
    ]
    assert torch.equal(mask, torch.cat(masks))
    torch.testing.assert_close(grouped.weight, torch.cat([part.weight for part in parts]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_type_and_memory_format_is_pruned_alike(dtype, memory_format):
    expected = seeded(nn.Conv2d, 8, 8, 3).to(dtype).double()
    layer = seeded(nn.Conv2d, 8, 8, 3).to(dtype).to(memory_format=memory_format)
    images = smooth_images(16, 8).to(dtype)
    storage, strides = layer.weight.data_ptr(), layer.weight.stride()
    (mask,) = prune_sparsegpt_(layer, [images]).values()
    prune_sparsegpt_(expected, [images.double()])
    assert is_2to4(layer.weight)
    assert (layer.weight[~mask] == 0).all()
    assert torch.equal(layer.weight, expected.weight.to(dtype))
    assert (layer.weight.data_ptr(), layer.weight.stride()) == (storage, strides)
    assert layer.weight.dtype == dtype and layer.weight.requires_grad


# A network.


def test_every_eligible_weight_is_pruned_and_nothing_else_changes():
    model = network()
    before = state(model)
    masks = prune_sparsegpt_(model, [smooth_images(8, 4)])
    assert list(masks) == ["0.weight", "3.weight", "6.weight"]
    for key, value in model.state_dict().items():
        if key in masks:
            assert is_2to4(value)
            assert masks[key].shape == value.shape
            assert (value[~masks[key]] == 0).all()
        else:
            assert torch.equal(value, before[key])


def test_modes_and_gradients_are_left_as_they_were():
    model = network()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    prune_sparsegpt_(model, [smooth_images(8, 4)])
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_the_same_images_give_the_same_weights():
    models = network(), network()
    for seed, model in enumerate(models):
        torch.manual_seed(seed)
        prune_sparsegpt_(model, [smooth_images(8, 4)])
    assert same(models[0].state_dict(), models[1].state_dict())


def test_the_cut_into_batches_does_not_matter():
    images = smooth_images(12, 4)
    together, apart = network(), network()
    prune_sparsegpt_(together, [images])
    prune_sparsegpt_(apart, [(part, "a label") for part in images.split(5)])
    for one, other in zip(together.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_data_loader_serves_as_calibration_images():
    images = smooth_images(12, 4)
    dataset = torch.utils.data.TensorDataset(images, torch.zeros(12))
    listed, loaded = network(), network()
    prune_sparsegpt_(listed, images.split(4))
    prune_sparsegpt_(loaded, torch.utils.data.DataLoader(dataset, batch_size=4))
    for one, other in zip(listed.parameters(), loaded.parameters(), strict=True):
        torch.testing.assert_close(one, other)


class Reversed(nn.Module):
    """Calls its layers in another order than it lists them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.last, self.first = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return self.last(self.first(input=x).relu())


def test_each_layer_sees_what_the_pruned_layers_before_it_hand_on():
    model, by_hand = Reversed(), Reversed()
    inputs = correlated(64, 16)
    masks = prune_sparsegpt_(model, [inputs])
    assert list(masks) == ["last.weight", "first.weight"]  # in the order of the network
    prune_sparsegpt_(by_hand.first, [inputs])
    with torch.no_grad():
        handed_on = by_hand.first(inputs).relu()
    prune_sparsegpt_(by_hand.last, [handed_on])
    assert same(model.state_dict(), by_hand.state_dict())


class Twice(nn.Module):
    """Uses one weight twice: calls one layer again, or two layers that share it."""

    def __init__(self, shared):
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Linear(16, 16, bias=False)
        self.other = nn.Linear(16, 16, bias=False) if shared else self.one
        self.other.weight = self.one.weight

    def forward(self, x):
        first, second = x.chunk(2)
        return torch.cat([self.one(first), self.other(second)])


class Padding(nn.Conv2d):
    """A convolution of the user's own: pads in its `forward`."""

    def forward(self, x):
        return super().forward(F.pad(x, (1, 2, 0, 3), value=2.0))


class Functional(nn.Module):
    """Uses the weight of a layer without calling the layer."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 2, 0, 3), value=2.0), weight=self.conv.weight)


@pytest.mark.parametrize("kind", ["subclass", "functional"])
def test_a_convolution_of_the_users_own_is_pruned_by_what_it_multiplies(kind):
    own = seeded(Padding if kind == "subclass" else nn.Conv2d, 8, 8, 3)
    stock = seeded(nn.Conv2d, 8, 8, 3)
    images = smooth_images(8, 8)
    prune_sparsegpt_(Functional(own) if kind == "functional" else own, [images])
    prune_sparsegpt_(stock, [F.pad(images, (1, 2, 0, 3), value=2.0)])
    assert torch.equal(own.weight, stock.weight)


@pytest.mark.parametrize("shared", [False, True], ids=["called twice", "shared weight"])
def test_a_weight_that_is_used_twice_is_pruned_once_for_all_its_inputs(shared):
    model, alone = Twice(shared), Twice(shared).one
    inputs = correlated(64, 16)
    masks = prune_sparsegpt_(model, [inputs])
    prune_sparsegpt_(alone, [inputs])
    assert list(masks) == ["one.weight"]
    torch.testing.assert_close(model.one.weight, alone.weight)
    assert model.other.weight is model.one.weight


def test_the_network_is_not_run_past_the_layer_that_is_observed():
    model = network()
    runs = []
    model[4].register_forward_pre_hook(lambda *_: runs.append(1))
    prune_sparsegpt_(model, smooth_images(8, 4).split(2))
    # Once for the order of execution, then for the linear layer behind it, with four batches each.
    assert len(runs) == 4 + 4


def test_layers_can_be_left_dense():
    model = network()
    before = state(model)
    masks = prune_sparsegpt_(model, [smooth_images(8, 4)], exclude=["0.*"])
    assert list(masks) == ["3.weight", "6.weight"]
    assert torch.equal(model[0].weight, before["0.weight"])


@pytest.mark.parametrize("batch_first", [False, True])
def test_the_projections_of_attention_are_pruned_by_what_they_multiply(batch_first):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=batch_first)
    inputs = correlated(6 * 20, 16).view(6, 20, 16)
    projection = nn.Linear(16, 48)
    projection.weight.data.copy_(encoder.self_attn.in_proj_weight)
    masks = prune_sparsegpt_(encoder, [inputs])
    assert list(masks) == [
        "self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"
    ]  # fmt: skip
    assert all(is_2to4(encoder.get_parameter(name)) for name in masks)
    prune_sparsegpt_(projection, [inputs])
    torch.testing.assert_close(encoder.self_attn.in_proj_weight, projection.weight)


class Attention(nn.Module):
    """Attention with queries, keys and values that are the same or are not."""

    def __init__(self, alike, **options):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.alike = nn.MultiheadAttention(16, 2, **options), alike

    def forward(self, query, key, value):
        value = key if "v" in self.alike else value
        return self.inner(key if "q" in self.alike else query, key, value, need_weights=False)[0]


def queries_keys_values(key_size=16, value_size=16):
    sizes = 16, key_size, value_size
    return tuple(
        correlated(4 * 30, size, seed).view(30, 4, size) for seed, size in enumerate(sizes)
    )


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("alike", ["qkv", "kv", "qk", ""])
def test_each_projection_of_attention_is_pruned_by_its_own_inputs(alike, autocast):
    """Together they are one weight, whose rows have different inputs."""
    attention, inputs = Attention(alike), queries_keys_values()
    query, key, value = inputs
    own = [key if "q" in alike else query, key, key if "v" in alike else value]
    if autocast:
        own = [x.bfloat16() for x in own]
    linears = []
    for weight, x in zip(attention.inner.in_proj_weight.detach().chunk(3), own, strict=True):
        linear = nn.Linear(16, 16)
        linear.weight.data.copy_(weight)
        prune_sparsegpt_(linear.to(x.dtype), [x])
        linears.append(linear.weight)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        masks = prune_sparsegpt_(attention, [inputs])
    assert list(masks) == ["inner.in_proj_weight", "inner.out_proj.weight"]
    weight = attention.inner.in_proj_weight
    assert torch.equal(weight != 0, masks["inner.in_proj_weight"])
    if autocast:  # only the inputs are the same there
        assert is_2to4(weight)
    else:
        torch.testing.assert_close(weight, torch.cat(linears))


def test_separate_projections_of_attention_are_pruned_by_their_inputs():
    attention, inputs = Attention("", kdim=8, vdim=12), queries_keys_values(8, 12)
    linears = [nn.Linear(size, 16) for size in (16, 8, 12)]
    for name, linear, x in zip("qkv", linears, inputs, strict=True):
        linear.weight.data.copy_(attention.inner.get_parameter(f"{name}_proj_weight"))
        prune_sparsegpt_(linear, [x])
    masks = prune_sparsegpt_(attention, [inputs])
    assert list(masks) == [
        "inner.q_proj_weight", "inner.k_proj_weight", "inner.v_proj_weight", "inner.out_proj.weight"
    ]  # fmt: skip
    for name, linear in zip("qkv", linears, strict=True):
        pruned = attention.inner.get_parameter(f"{name}_proj_weight")
        torch.testing.assert_close(pruned, linear.weight)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_transformer_with_named_inputs_stays_closer_than_by_magnitude():
    def make():
        torch.manual_seed(0)
        return nn.Transformer(16, 2, 2, 2, 32, batch_first=True).eval()

    dense, pruned, by_magnitude = make(), make(), make()
    source, target = (correlated(40 * 12, 16, seed).view(40, 12, 16) for seed in (0, 1))
    padding = torch.zeros(40, 12, dtype=torch.bool)
    padding[::2, 9:] = True
    batch = {"src": source, "tgt": target, "src_key_padding_mask": padding}
    masks = prune_sparsegpt_(pruned, [batch])
    assert masks.keys() == prune_2to4_(by_magnitude).keys()
    with torch.no_grad():
        expected = dense(**batch)
        error, other = ((m(**batch) - expected).square().sum() for m in (pruned, by_magnitude))
    assert error < 0.7 * other


def model_with(forward):
    """A model with one linear layer and a `forward` of its own."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner = nn.Linear(16, 16)

    Own.forward = forward
    return Own()


# What the layer is called with is always the same, 64 vectors `x`.
CALIBRATION_BATCHES = {
    "a tensor": (lambda self, x: self.inner(x), lambda x: x),
    "with a label": (lambda self, x: self.inner(x), lambda x: [x, "a label"]),
    "with labels for an option": (lambda self, x, y=None: self.inner(x), lambda x: (x, x)),
    "two inputs": (lambda self, x, y: self.inner(x - y), lambda x: (2 * x, x)),
    "two and a label": (lambda self, x, y: self.inner(x - y), lambda x: [2 * x, x, "label"]),
    "names": (lambda self, *, x, by=1: self.inner(x * by), lambda x: {"x": x / 2, "by": 2}),
    "an option": (lambda self, x, y=0: self.inner(x + y), lambda x: {"x": 2 * x, "y": -x}),
    "a list": (lambda self, images: self.inner(torch.cat(images)), lambda x: (x.chunk(3), "boxes")),
    "any names": (lambda self, **named: self.inner(named["x"]), lambda x: {"x": x}),
    "any number": (lambda self, *inputs: self.inner(inputs[0]), lambda x: [x, "label"]),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The model gets 1 of the 2 items")
@pytest.mark.parametrize(
    ("forward", "batch"), CALIBRATION_BATCHES.values(), ids=CALIBRATION_BATCHES
)
def test_a_model_gets_the_inputs_that_it_requires(forward, batch):
    model, linear, inputs = model_with(forward), model_with(nn.Identity()), correlated(64, 16)
    assert list(prune_sparsegpt_(model, [batch(inputs)])) == ["inner.weight"]
    prune_sparsegpt_(linear.inner, [inputs])
    assert torch.equal(model.inner.weight, linear.inner.weight)


def test_items_that_could_be_inputs_but_are_not_required_are_warned_of():
    inputs = correlated(64, 16)
    model = model_with(lambda self, x, mask=None: self.inner(x))
    with pytest.warns(match=r"gets 1 of the 2 items .*\(x, mask=None\).* dictionaries of named"):
        prune_sparsegpt_(model, [(inputs, inputs)])
    for forward, batch in (
        (lambda self, x: self.inner(x), (inputs, "label")),
        (lambda self, x, mask=None: self.inner(x), inputs),
        (lambda self, x, *, mask=None: self.inner(x), [inputs, "label"]),
    ):
        with warnings.catch_warnings(action="error"):
            prune_sparsegpt_(model_with(forward), [batch])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (lambda x: x, r"does not fit Own\.forward\(x, y\): missing .*'y'.* tuples with all inputs"),
        (lambda x: (x,), "missing a required argument: 'y'"),
        (lambda x: {"x": x}, "missing a required argument: 'y'"),
        (lambda x: {"x": x, "y": x, "z": x}, "unexpected keyword argument 'z'"),
        (lambda x: "images", "batch is a str without a tensor"),
        (lambda x: [], "batch is a list without a tensor"),
        (lambda x: {"x": 1, "y": 2}, "batch is a dict without a tensor"),
        (lambda x: x.numpy(), "batch is a ndarray without a tensor"),
    ],
)
def test_a_batch_that_the_model_does_not_take_is_refused(batch, message):
    model, inputs = model_with(lambda self, x, y: self.inner(x + y)), correlated(64, 16)
    fails(model, message, [batch(inputs)])


def test_a_linear_layer_of_single_vectors_is_pruned():
    batched, single = (seeded(nn.Linear, 16, 8, bias=False) for _ in range(2))
    inputs = correlated(64, 16)
    prune_sparsegpt_(batched, [inputs])
    prune_sparsegpt_(single, list(inputs))
    torch.testing.assert_close(batched.weight, single.weight)


def test_under_autocast_layers_see_what_the_pruned_ones_before_them_hand_on():
    inside, outside = Reversed(), Reversed()
    inputs = correlated(64, 16)
    forward = outside.forward
    outside.forward = torch.autocast("cpu", torch.bfloat16)(forward)
    prune_sparsegpt_(outside, [inputs])
    with torch.autocast("cpu", torch.bfloat16):
        prune_sparsegpt_(inside, [inputs])
    assert same(inside.state_dict(), outside.state_dict())


def test_a_model_without_an_eligible_weight_is_left_unchanged_with_a_warning(caplog):
    for model in (nn.Sequential(nn.ReLU()), nn.Conv2d(3, 8, 3)):
        assert prune_sparsegpt_(model, [torch.zeros(2, 3, 8, 8)]) == {}
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2


def test_a_model_without_numbers_is_refused():
    with pytest.raises(HelpersError, match="on the device `meta`, without numbers"):
        prune_sparsegpt_(nn.Linear(8, 8, device="meta"), [torch.zeros(2, 8)])


class Transposing(nn.Module):
    """Multiplies by a weight in a way that is not x Wᵀ."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.way = nn.Linear(16, 16, bias=False), way

    def forward(self, x):
        return self.way(x, self.inner.weight)


@pytest.mark.parametrize(
    ("way", "reason"),
    [
        (lambda x, weight: x @ weight, "transposed, or in other parts than whole rows"),
        (lambda x, weight: F.linear(x, weight.T), "transposed, or in other parts"),
        (lambda x, weight: F.linear(x, weight.T.contiguous()), "transposed, or in other parts"),
        (lambda x, weight: x[:, :8] @ weight[:, :8].T, "transposed, or in other parts"),
        (lambda x, weight: x[:, ::2] @ weight[:, ::2].T, "transposed, or in other parts"),
        (lambda x, weight: F.linear(x, weight[::2]), "transposed, or in other parts"),
        (lambda x, weight: weight.T @ x.T, "transposed, or in other parts"),
        (lambda x, weight: weight.T @ x[0], "transposed, or in other parts"),
        (lambda x, weight: x[:, None] @ weight.view(2, 8, 16)[[0] * 16].mT, "computes another"),
        (
            lambda x, weight: x.view(2, 8, 16) @ weight.view(2, 8, 16).mT,
            "in a product of another form",
        ),
        (
            lambda x, weight: F.conv_transpose1d(x[:, :, None], weight[:, :, None]),
            "as the filters of another kind of convolution",
        ),
    ],
)
def test_a_weight_in_a_product_of_another_form_is_named_with_the_reason(way, reason):
    fails(Transposing(way), f"prune inner.weight: .*{reason}", [correlated(16, 16)])


@pytest.mark.parametrize(
    "way",
    [
        lambda x, weight: x @ weight.T,
        lambda x, weight: (weight @ x.T).T,
        lambda x, weight: torch.einsum("bi,oi->bo", x, weight),
        lambda x, weight: torch.matmul(weight, x.view(4, 16, 16).mT),
        lambda x, weight: F.linear(x, weight.clone()),
        lambda x, weight: torch.cat([F.linear(x, weight[:4]), F.linear(x, weight[4:])], 1),
        lambda x, weight: torch.stack([x @ row for row in weight], 1),
        lambda x, weight: torch.stack([weight @ vector for vector in x]),
        lambda x, weight: F.conv2d(x[:, :, None, None], weight[:, :, None, None]),
    ],
)
def test_a_product_that_is_written_out_is_pruned_as_the_linear_layer(way):
    model, inputs = Transposing(way), correlated(64, 16)
    linear = nn.Linear(16, 16, bias=False)
    linear.weight.data.copy_(model.inner.weight)
    prune_sparsegpt_(model, [inputs])
    prune_sparsegpt_(linear, [inputs])
    torch.testing.assert_close(model.inner.weight, linear.weight)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_filters_that_are_used_as_a_matrix_are_pruned_as_the_convolution(memory_format):
    class AsMatrix(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = seeded(nn.Conv2d, 8, 4, 3).to(memory_format=memory_format)

        def forward(self, x):
            return F.unfold(x, 3).mT @ self.conv.weight.flatten(1).T

    model, conv, images = AsMatrix(), seeded(nn.Conv2d, 8, 4, 3), smooth_images(8, 8)
    prune_sparsegpt_(model, [images])
    prune_sparsegpt_(conv, [images])
    torch.testing.assert_close(model.conv.weight, conv.weight, rtol=1e-4, atol=1e-5)


def test_a_matrix_that_is_used_as_filters_is_pruned_as_the_linear_layer():
    """As patches are embedded: groups of four lie along the columns of the matrix."""

    def embed(x, weight):
        return F.conv2d(x.view(-1, 1, 4, 4), weight.view(16, 1, 4, 4))

    model, inputs = Transposing(embed), correlated(64, 16)
    linear = copy.deepcopy(model.inner)
    prune_sparsegpt_(model, [inputs])
    prune_sparsegpt_(linear, [inputs])
    torch.testing.assert_close(model.inner.weight, linear.weight)


@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d, nn.ConvTranspose1d])
def test_a_batch_without_inputs_changes_nothing(kind):
    """As for an expert that no token of a batch is sent to."""
    size = () if kind is nn.Linear else (3,)
    layer, other = (seeded(kind, 16, 8, *size) for _ in range(2))
    inputs = correlated(64, 16).view(64, 16, *[1] * len(size)).expand(-1, -1, *[5] * len(size))
    prune_sparsegpt_(layer, [inputs[:0], inputs], rules="any")
    prune_sparsegpt_(other, [inputs], rules="any")
    assert torch.equal(layer.weight, other.weight)
    prune_sparsegpt_(other, [inputs[:0]], rules="any")
    assert is_2to4(other.weight, weight_of(other).input_dim)


def test_rows_that_are_not_used_are_pruned_by_magnitude():
    model, inputs = Transposing(lambda x, weight: F.linear(x, weight[:8])), correlated(64, 16)
    dense = model.inner.weight.detach().clone()
    prune_sparsegpt_(model, [inputs])
    unused = model.inner.weight.detach()[8:]
    assert torch.equal(unused, dense[8:] * mask_2to4(dense[8:]))


def test_a_layer_that_only_a_later_batch_reaches_is_pruned_by_that_batch():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.few, self.many = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.few(self.few(x)) if len(x) < 10 else self.many(x)

    model, many = Experts(), Experts().many
    inputs = correlated(64, 16)
    assert list(prune_sparsegpt_(model, [inputs[:8], inputs[8:]])) == ["few.weight", "many.weight"]
    prune_sparsegpt_(many, [inputs[8:]])
    torch.testing.assert_close(model.many.weight, many.weight)


# What goes wrong leaves no trace.


class Interrupted:
    """Batches that come to an error after so many passes over them."""

    def __init__(self, passes, error):
        self.passes, self.error = passes, error

    def __iter__(self):
        self.passes -= 1
        yield smooth_images(8, 4)
        if self.passes < 0:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_network_is_as_it_was(error):
    model = network()
    before = state(model)
    with pytest.raises(error):
        prune_sparsegpt_(model, Interrupted(passes=3, error=error))
    assert same(model.state_dict(), before)
    assert all(module.training for module in model.modules())


def fails(model, message, calibration_data=None, **kwargs):
    before = state(model)
    with pytest.raises(HelpersError, match=message):
        prune_sparsegpt_(model, calibration_data or [smooth_images(8, 4)], **kwargs)
    for key, value in model.state_dict().items():
        assert torch.equal(value.nan_to_num(7), before[key].nan_to_num(7))


def test_a_generator_is_refused_before_anything_is_done():
    fails(network(), "iterator", calibration_data=(images for images in [smooth_images(8, 4)]))


def test_no_images_are_refused():
    with pytest.raises(HelpersError, match="no calibration data"):
        prune_sparsegpt_(network(), [])


def test_images_that_cannot_be_read_again_are_reported():
    class Once:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter([smooth_images(8, 4)] if self.passes == 1 else [])

    fails(network(), "no calibration data", calibration_data=Once())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(value):
    model = network()
    with torch.no_grad():
        model[3].weight[0, 0] = value
    fails(model, r"^3\.weight has NaN or infinite")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_inputs_that_are_not_finite_name_the_layer(value):
    model = network()
    with torch.no_grad():
        model[1].bias[0] = value
    fails(model, r"inputs of 3\.weight have NaN or infinite")


def test_a_singular_hessian_in_a_later_layer_restores_the_earlier_ones():
    fails(network(), r"Hessian of 6\.weight is singular", dampening=0.0)


def test_a_layer_that_is_never_called_is_named():
    model = network()
    model.add_module("unused", nn.Identity())
    model.unused.inner, model.unused.other = nn.Linear(8, 8), nn.Linear(8, 8)
    names = r"unused\.inner\.weight, unused\.other\.weight"
    fails(model, rf"cannot prune {names}: .* since its layer does not run.*`exclude`")


def test_a_weight_that_is_standardised_outside_its_layer_is_named():
    class Standardised(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(4, 8, 1)

        def forward(self, x):
            weight = self.inner.weight
            return F.conv2d(x, weight - weight.mean(1, keepdim=True), self.inner.bias)

    fails(
        nn.Sequential(Standardised()),
        r"cannot prune 0\.inner\.weight: .* or computes another weight from it",
    )


def test_unknown_rules_are_refused():
    fails(network(), "'abacus'", rules="abacus")


def test_a_weight_that_no_longer_fits_its_type_is_reported():
    layer = seeded(nn.Linear, 8, 8).half()
    with torch.no_grad():
        layer.weight.fill_(60000)
    inputs = torch.ones(8, 8).half() + 0.01 * seeded(torch.randn, 8, 8).half()
    fails(layer, "too large for torch.float16", calibration_data=[inputs])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_a_gpu_prunes_as_the_cpu_does():
    images = smooth_images(12, 4)
    on_cpu, on_gpu = network(), network().cuda()
    prune_sparsegpt_(on_cpu, images.split(4))
    masks = prune_sparsegpt_(on_gpu, images.split(4))
    assert all(mask.is_cuda for mask in masks.values())
    for one, other in zip(on_cpu.parameters(), on_gpu.parameters(), strict=True):
        torch.testing.assert_close(one, other.cpu(), rtol=1e-3, atol=1e-3)
