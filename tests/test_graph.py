"""Every channel that is said to be free to move is moved, and the outputs stay."""

import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations

from helpers.errors import HelpersError
from helpers.sparsity.channels import ChannelGroups, gather_index, reorder_
from helpers.sparsity.graph import find_channel_groups

WIDE = 24


def randomise_(model: nn.Module) -> nn.Module:
    """Give every parameter and running statistic values that no order leaves as they are."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                fan_in = value[0].numel() if value.dim() > 1 else 1
                value.copy_(torch.randn(value.shape, generator=generator) / fan_in**0.5)
        for module in model.modules():
            if isinstance(getattr(module, "running_var", None), torch.Tensor):
                module.running_var.abs_().add_(0.5)
    return model.double().eval()


def shuffle_every_set(model: nn.Module, *inputs: torch.Tensor):
    """Shuffle all that may move; return the groups, the moves and how far the outputs moved."""
    groups = find_channel_groups(model, inputs)
    with torch.no_grad():
        before = model(*inputs)
    generator = np.random.default_rng(0)
    first = np.unique(groups.coupled_group, return_index=True)[1]
    moves = []
    for number in set(groups.interchangeable_set.tolist()) - {-1}:
        members = np.flatnonzero(groups.interchangeable_set[first] == number)
        if len(members) > 1:
            moves.append((members, np.roll(generator.permutation(members), 1)))
    reorder_(groups, gather_index(groups, moves))
    with torch.no_grad():
        after = model(*inputs)
    pairs = zip(leaves(before), leaves(after), strict=True)
    error = max(float((b - a).abs().max() / b.abs().max().clamp_min(1e-12)) for b, a in pairs)
    return groups, moves, error


def leaves(outputs: object) -> list[torch.Tensor]:
    return torch.utils._pytree.tree_leaves(outputs)


def free_inputs(groups: ChannelGroups, weight: torch.Tensor) -> int:
    """Return how many of a weight's input channels may move."""
    inputs = groups.inputs_of(weight)
    return 0 if inputs is None else int((groups.interchangeable_set[inputs] >= 0).sum())


# --- networks of torchvision: unchanged, and every layer but the first and depthwise ones moves ---

NETWORKS = [
    "alexnet", "vgg11_bn", "squeezenet1_1", "resnet18", "resnet50", "resnext50_32x4d",
    "wide_resnet50_2", "densenet121", "googlenet", "inception_v3", "mobilenet_v2",
    "mobilenet_v3_large", "mobilenet_v3_small", "mnasnet1_0", "shufflenet_v2_x1_0",
    "shufflenet_v2_x2_0", "efficientnet_b0", "efficientnet_v2_s", "regnet_x_400mf",
    "regnet_y_400mf", "convnext_tiny", "swin_t", "swin_v2_t", "vit_b_16", "maxvit_t",
]  # fmt: skip
SIZES = {"inception_v3": 299, "vit_b_16": 224, "maxvit_t": 224}


@pytest.mark.parametrize("name", NETWORKS)
def test_no_network_of_torchvision_comes_out_changed(name):
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = randomise_(torchvision.models.get_model(name, weights=None, **options))
    size = SIZES.get(name, 96)
    groups, moves, error = shuffle_every_set(
        model, torch.randn(1, 3, size, size, dtype=torch.float64)
    )
    assert error < 1e-9
    assert moves
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.weight.shape[1] > 3
    }
    free = [name for name, layer in layers.items() if free_inputs(groups, layer.weight)]
    print(f"{name}: {len(free)} of {len(layers)} layers may be permuted")
    assert len(free) == len(layers)


# --- small graphs, each with one thing in it that has gone wrong somewhere ---


class Adversary(nn.Module):
    """A stem, something in the middle, and a head; the stem has WIDE outputs."""

    def __init__(self, out: int = WIDE) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDE, 3, padding=1)
        self.head = nn.Conv2d(out, 5, 1)

    def middle(self, x):
        return x

    def forward(self, x):
        return self.head(self.middle(self.stem(x)))


def outcome(model: nn.Module, *inputs: torch.Tensor):
    torch.manual_seed(0)
    inputs = inputs or (torch.randn(2, 3, 8, 8, dtype=torch.float64),)
    return shuffle_every_set(randomise_(model), *inputs)


def unchanged(model: nn.Module, *inputs: torch.Tensor) -> int:
    """Check that the network computes the same; return how many inputs of its head may move."""
    groups, _, error = outcome(model, *inputs)
    assert error < 1e-9
    return free_inputs(groups, model.head.weight)


def make(middle, out: int = WIDE, **layers: nn.Module) -> nn.Module:
    model = Adversary(out)
    for name, layer in layers.items():
        model.add_module(name, layer)
    model.middle = lambda x: middle(model, x)
    return model


def test_names_that_collide_without_their_dots_are_two_layers():
    net = nn.Sequential(*(nn.Conv2d(WIDE, WIDE, 1) for _ in range(12)))
    net[1] = nn.Sequential(nn.Conv2d(WIDE, WIDE, 1), nn.Conv2d(WIDE, WIDE, 1))
    assert unchanged(make(lambda m, x: m.net(x), net=net)) == WIDE


def test_a_module_used_twice_keeps_what_both_uses_need():
    twice = nn.Conv2d(WIDE, WIDE, 1)
    assert unchanged(make(lambda m, x: m.twice(F.relu(m.twice(x))), twice=twice)) == WIDE


def test_a_residual_addition_moves_both_branches():
    assert unchanged(make(lambda m, x: x + m.conv(x), conv=nn.Conv2d(WIDE, WIDE, 1))) == WIDE


def test_a_concatenation_into_a_grouped_convolution_stays_within_its_groups():
    other, grouped = nn.Conv2d(WIDE, WIDE, 1), nn.Conv2d(2 * WIDE, WIDE, 1, groups=3)
    model = make(
        lambda m, x: m.grouped(torch.cat([x, m.other(x)], 1)), other=other, grouped=grouped
    )
    groups, _, error = outcome(model)
    assert error < 1e-9
    inputs = groups.interchangeable_set[groups.inputs_of(grouped.weight)]
    sets = [set(of_group) for of_group in inputs.tolist()]
    assert not sets[0] & sets[1] and not sets[1] & sets[2]
    assert free_inputs(groups, grouped.weight) == 2 * WIDE


def test_each_group_of_a_grouped_convolution_has_a_permutation_of_its_own():
    grouped = nn.Conv2d(WIDE, WIDE, 3, padding=1, groups=3)
    model = make(lambda m, x: m.grouped(x), grouped=grouped)
    groups, moves, error = outcome(model)
    assert error < 1e-9 and len(moves) == 6  # three sets before it and three behind it
    assert free_inputs(groups, model.head.weight) == WIDE


def test_a_channel_shuffle_is_followed():
    def shuffle(m, x):
        n, _, h, w = x.shape
        x = x.view(n, 3, WIDE // 3, h, w).transpose(1, 2).reshape(n, WIDE, h, w)
        return m.grouped(x)

    model = make(shuffle, grouped=nn.Conv2d(WIDE, WIDE, 1, groups=2))
    assert unchanged(model) == WIDE


def test_squeeze_and_excite_moves_with_what_it_scales():
    down, up = nn.Conv2d(WIDE, 8, 1), nn.Conv2d(8, WIDE, 1)
    model = make(
        lambda m, x: x * torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3), keepdim=True))))),
        down=down, up=up,
    )  # fmt: skip
    assert unchanged(model) == WIDE


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(WIDE), nn.GroupNorm(3, WIDE), nn.InstanceNorm2d(WIDE, affine=True),
        nn.InstanceNorm2d(WIDE, track_running_stats=True, affine=True),
        nn.PReLU(), nn.PReLU(WIDE), nn.LayerNorm([WIDE, 8, 8]), nn.Hardswish(inplace=True),
        nn.RMSNorm([WIDE, 8, 8], eps=1e-5),
        nn.Conv2d(WIDE, WIDE, 3, padding="same", groups=WIDE), nn.ConvTranspose2d(WIDE, WIDE, 2),
        nn.Conv2d(WIDE, WIDE, 3, padding=1, padding_mode="reflect"), nn.MaxPool2d(2),
        nn.Dropout2d(), nn.AvgPool2d(2, ceil_mode=True),
        nn.Upsample(scale_factor=2), nn.AdaptiveAvgPool2d(3), nn.ReflectionPad2d(1), nn.Identity(),
        nn.Upsample(scale_factor=2, mode="bilinear"), nn.ZeroPad2d((1, 2, 0, 3)),
    ],
    ids=lambda layer: str(layer)[:40],
)  # fmt: skip
def test_layers_that_treat_channels_alike_let_them_move(layer):
    assert unchanged(make(lambda m, x: m.layer(x), layer=layer)) == WIDE


def test_a_depthwise_convolution_with_a_multiplier_moves_its_outputs_together():
    layer = nn.Conv2d(WIDE, 2 * WIDE, 3, padding=1, groups=WIDE)
    assert unchanged(make(lambda m, x: m.layer(x), 2 * WIDE, layer=layer)) == 2 * WIDE


def test_channels_that_are_treated_differently_do_not_change_places():
    """Half of them go through a ReLU and are put back beside the others."""
    groups, _, error = outcome(make(lambda m, x: torch.cat([F.relu(x[:, :8]), x[:, 8:]], 1)))
    assert error < 1e-9
    sets = groups.interchangeable_set[np.unique(groups.coupled_group, return_index=True)[1]]
    assert {int((sets == each).sum()) for each in set(sets.tolist()) - {-1}} == {8, WIDE - 8}


@pytest.mark.parametrize(
    "middle",
    [
        lambda x: torch.cat([x[:, :8].roll(1, 2), x[:, 8:]], 1),
        lambda x: torch.cat([x[:, :8].flip(3), x[:, 8:]], 1),
        lambda x: torch.cat([x[:, :8].transpose(2, 3), x[:, 8:]], 1),
        lambda x: torch.cat([x[:, :8, 1:], x[:, 8:, :-1]], 1),
        lambda x: torch.cat(
            [x.chunk(3, 1)[0], x.chunk(3, 1)[1].roll(1, 3), x.chunk(3, 1)[2].flip(2)], 1
        ),
        lambda x: torch.stack([x[:, 0].transpose(1, 2), *x.unbind(1)[1:]], 1),
    ],
)
def test_channels_that_are_shifted_along_the_image_change_places_among_themselves(middle):
    assert unchanged(make(lambda m, x: middle(x))) == WIDE


@pytest.mark.parametrize("use", ["below each other", "added"])
def test_channels_that_are_coupled_in_another_order_do_not_change_places(use):
    """Half of the channels have `b` in the upper half of the image and `c` in the lower one."""

    def middle(m, x):
        a, b, c = m.a(x), m.b(x), m.c(x)
        upper = torch.cat([b[:, :8], c[:, 8:]], 1)
        lower = torch.cat([c[:, :8], b[:, 8:]], 1)
        if use == "added":
            return torch.cat([a, a], 2) + torch.cat([upper, lower], 2)
        return torch.cat([a, upper, lower], 2)

    layers = {name: nn.Conv2d(WIDE, WIDE, 1) for name in "abc"}
    assert unchanged(make(middle, **layers)) == WIDE


def test_an_operation_in_place_on_a_part_is_seen():
    def middle(m, x):
        x = x.clone()
        x[:, :8].relu_()
        return x

    assert unchanged(make(middle)) == WIDE


def test_a_part_that_is_overwritten_stays():
    def middle(m, x):
        x = x.clone()
        x[:, :8] = 0
        return x

    assert unchanged(make(middle)) == WIDE - 8


@pytest.mark.parametrize(
    "middle",
    [
        lambda m, x: x + x.flip(1),
        lambda m, x: x + x.roll(1, 1),
        lambda m, x: x.cumsum(1),
        lambda m, x: x.softmax(1),
        lambda m, x: x * torch.arange(WIDE, dtype=x.dtype).view(1, -1, 1, 1),
        lambda m, x: x / x.norm(dim=1, keepdim=True),
        lambda m, x: x * x.mean(1, keepdim=True),
        lambda m, x: x * x[:, :1],
        lambda m, x: F.glu(torch.cat([x, x], 1), 1),
        lambda m, x: torch.where(x > 0, x, x.flip(1)),
        lambda m, x: x[:, torch.tensor([*range(12, WIDE), *range(12)])],
        lambda m, x: F.pad(x, (0, 0, 0, 0, 2, 2))[:, 1:-3],
        lambda m, x: x.reshape(x.shape[0], 8, 8, -1).permute(0, 3, 1, 2),
        lambda m, x: x.sum(1, keepdim=True).expand_as(x),
        lambda m, x: x.max(1, keepdim=True)[0] + x,
        lambda m, x: x.sort(1)[0],
        lambda m, x: x * x.view(2, WIDE, 1, 8, 8)[:, :, 0] + 1,
        lambda m, x: x.unflatten(1, (4, 6)).flip(1).flatten(1, 2) + x,
        lambda m, x: torch.stack([x, x.flip(1)], 2).flatten(1, 2)[:, ::2],
    ],
)
def test_what_mixes_channels_in_other_ways_leaves_the_network_unchanged(middle):
    unchanged(make(middle))


@pytest.mark.parametrize(
    "middle",
    [
        F.hardswish,
        F.mish,
        F.logsigmoid,
        lambda x: x.type_as(x.relu()),
        lambda x: x.multiply(x),
        lambda x: x.flatten(2).reshape_as(x),
        lambda x: x.flatten(2).view_as(x),
        lambda x: F.glu(torch.cat([x, x], 1), 1),
        lambda x: F.normalize(x.flatten(2), dim=2).view_as(x),
        lambda x: F.normalize(x, dim=1),
        lambda x: x * x.norm(dim=(2, 3), keepdim=True),
        lambda x: x * x.std(1, keepdim=True),
        lambda x: x - x.amax(1, keepdim=True),
        lambda x: x.softmax(1),
        lambda x: x.flatten(2).softmax(2).view_as(x),
        lambda x: x.cumsum(2),
        lambda x: x * x.max(2, keepdim=True)[0],
        lambda x: x + x.mean(),
        lambda x: x.flatten(2).topk(64)[0].view_as(x),
        lambda x: x[:, :, torch.tensor([0, 3, 5])],
        lambda x: x.gather(2, torch.zeros_like(x, dtype=torch.long)),
        lambda x: x.tile(1, 1, 2, 1),
        lambda x: F.fold(F.unfold(x, 2, stride=2), 8, 2, stride=2),
        lambda x: x.unfold(2, 2, 2).sum(4),
        lambda x: F.interpolate(x, size=5, mode="bicubic", antialias=True),
        lambda x: F.grid_sample(x, torch.zeros(2, 3, 3, 2, dtype=x.dtype), align_corners=False),
        lambda x: x.unflatten(3, (4, 2)).permute(0, 1, 2, 3, 4),
        lambda x: x.logsumexp(1, True) + x,
        lambda x: torch.view_as_real(torch.view_as_complex(x.unflatten(3, (4, 2)))).flatten(3),
        lambda x: F.rms_norm(x.movedim(1, -1), (WIDE,)).movedim(-1, 1),
    ],
)
def test_operators_that_treat_channels_alike_let_them_move(middle):
    def four_dims(m, x):
        y = middle(x)
        return y if y.dim() == 4 else y.flatten(3)

    assert unchanged(make(four_dims)) == WIDE


class Heads(nn.Module):
    """Attention as language models and image models write it, over tokens of WIDE channels."""

    def __init__(self, attend, heads: int = 3, of_keys: int = 3, **layers: nn.Module) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(6, WIDE), nn.Linear(WIDE, 5)
        self.q = nn.Linear(WIDE, WIDE)
        self.k, self.v = (nn.Linear(WIDE, WIDE * of_keys // heads) for _ in range(2))
        self.attend, self.heads, self.of_keys = attend, heads, of_keys
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x):
        x = self.stem(x)
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = (
            layer(x).unflatten(2, (self.of_keys, -1)).transpose(1, 2) for layer in (self.k, self.v)
        )
        return self.head(self.attend(self, q, k, v).transpose(1, 2).flatten(2))


def rotate(x):
    angles = torch.arange(x.shape[2])[:, None] * 0.1 / torch.arange(1, x.shape[3] // 2 + 1)
    cos, sin = (torch.cat([each, each], 1).to(x) for each in (angles.cos(), angles.sin()))
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def talk(m, q, k, v):
    scores = m.before((q @ k.transpose(2, 3)).movedim(1, 3)).softmax(2)
    return m.after(scores).movedim(3, 1) @ v


SDPA = F.scaled_dot_product_attention


@pytest.mark.parametrize(
    "attend",
    [
        lambda m, q, k, v: SDPA(rotate(q), rotate(k), v),
        lambda m, q, k, v: q.softmax(3) @ (k.softmax(2).transpose(2, 3) @ v),
        lambda m, q, k, v: ((v.transpose(2, 3) @ k.relu()) @ q.relu().transpose(2, 3)).transpose(
            2, 3
        ),
        lambda m, q, k, v: torch.einsum("bhqk,bhkd->bhqd", (q @ k.transpose(2, 3)).softmax(3), v),
        lambda m, q, k, v: SDPA(
            *(F.normalize(x, dim=3).transpose(2, 3) for x in (q, k, v))
        ).transpose(2, 3),
        lambda m, q, k, v: torch.baddbmm(
            torch.zeros(1, 1, 1, dtype=v.dtype),
            (q @ k.transpose(2, 3)).flatten(0, 1),
            v.flatten(0, 1),
        ).view_as(q),
    ],
)
def test_attention_in_any_form_moves_the_values(attend):
    assert unchanged(Heads(attend), torch.randn(2, 7, 6, dtype=torch.float64)) == WIDE


def test_heads_that_talk_to_each_other_move_the_values():
    model = Heads(talk, before=nn.Linear(3, 3), after=nn.Linear(3, 3))
    assert unchanged(model, torch.randn(2, 7, 6, dtype=torch.float64)) == WIDE


def test_heads_that_share_their_keys_move_the_values_together():
    model = Heads(lambda m, q, k, v: SDPA(q, k, v, enable_gqa=True), of_keys=1)
    assert unchanged(model, torch.randn(2, 7, 6, dtype=torch.float64)) == WIDE


def test_a_rotation_in_a_head_keeps_its_queries_and_keys_in_place():
    """The cosines are the same for every head, but differ along it."""
    model = Heads(lambda m, q, k, v: SDPA(rotate(q), rotate(k), v))
    tokens = torch.randn(2, 7, 6, dtype=torch.float64)
    groups, _, error = outcome(model, tokens)
    assert error < 1e-9
    alone = np.bincount(groups.interchangeable_set[np.unique(groups.coupled_group, True)[1]] + 1)
    queries = groups.placements[id(model.q.weight)].axes[0]
    for number in groups.interchangeable_set[queries]:
        assert number == -1 or alone[number + 1] == 1


def standardised(m, x):
    weight = m.conv.weight
    mean, variance = weight.mean((1, 2, 3), keepdim=True), weight.var((1, 2, 3), keepdim=True)
    return F.conv2d(x, (weight - mean) / (variance + 1e-5).sqrt() * m.gain, m.conv.bias)


def standardised_by_batch_norm(m, x):
    weight = m.conv.weight.reshape(1, WIDE, -1)
    weight = F.batch_norm(weight, None, None, m.gain.view(-1) * 0.3, training=True)
    return F.conv2d(x, weight.reshape_as(m.conv.weight), m.conv.bias)


@pytest.mark.parametrize("use", [standardised, standardised_by_batch_norm])
def test_a_weight_that_is_standardised_moves(use):
    model = make(use, conv=nn.Conv2d(WIDE, WIDE, 3))
    model.gain = nn.Parameter(torch.ones(WIDE, 1, 1, 1))
    assert unchanged(model) == WIDE
    groups = find_channel_groups(model, (torch.randn(2, 3, 8, 8, dtype=torch.float64),))
    assert free_inputs(groups, model.conv.weight) == WIDE


@pytest.mark.parametrize("context", [torch.no_grad, lambda: torch.autocast("cpu", enabled=False)])
def test_a_part_that_runs_in_a_context_is_followed(context):
    def middle(m, x):
        with context():
            return x * m.conv(x)

    assert unchanged(make(middle, conv=nn.Conv2d(WIDE, WIDE, 1))) == WIDE


def test_tokens_and_channels_that_are_both_mixed_move_each_by_themselves():
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.head = nn.Linear(6, WIDE), nn.Linear(WIDE, 5)
            self.up, self.down = nn.Linear(7, 16), nn.Linear(16, 7)

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2))

    model, x = Mixer(), torch.randn(2, 7, 6, dtype=torch.float64)
    assert unchanged(model, x) == WIDE
    assert free_inputs(find_channel_groups(model, (x,)), model.down.weight) == 16


def test_positions_that_are_looked_up_in_a_buffer_do_not_move():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.place = nn.Embedding(20, WIDE), nn.Embedding(16, WIDE)
            self.head = nn.Linear(WIDE, 5)
            self.register_buffer("positions", torch.arange(16).unsqueeze(0))

        def forward(self, tokens):
            return self.head(self.embed(tokens) + self.place(self.positions[:, : tokens.shape[1]]))

    assert unchanged(Positions(), torch.arange(24).view(2, 12) % 20) == WIDE


def test_a_mean_over_the_channels_lets_them_move():
    assert unchanged(make(lambda m, x: x * torch.sigmoid(x.mean(1, keepdim=True)))) == WIDE


def test_a_spatial_attention_map_stays_and_lets_the_channels_move():
    gate = nn.Conv2d(WIDE, 1, 1)
    assert unchanged(make(lambda m, x: x * torch.sigmoid(m.gate(x)), gate=gate)) == WIDE


def test_a_map_over_the_image_from_a_linear_layer_stays():
    """Its outputs are pixels, which meet every channel: they must not change places."""
    pixels = nn.Linear(WIDE, 64)
    model = make(lambda m, x: x * m.pixels(x.mean((2, 3))).view(-1, 1, 8, 8), pixels=pixels)
    assert unchanged(model) == WIDE


def test_a_pixel_shuffle_moves_whole_channels():
    _, moves, error = outcome(make(lambda m, x: F.pixel_shuffle(x, 2), WIDE // 4))
    assert error < 1e-9 and moves


def test_a_weight_reused_by_a_functional_call_serves_both():
    conv = nn.Conv2d(WIDE, WIDE, 1)
    assert unchanged(make(lambda m, x: F.conv2d(m.conv(x), m.conv.weight), conv=conv)) == WIDE


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: F.conv2d(m.conv(x), m.conv.weight.transpose(0, 1)),
        lambda m, x: F.conv2d(x, m.conv.weight * 2),
        lambda m, x: m.conv(x) + m.conv.weight.sum(),
        lambda m, x: m.conv(x * m.conv.weight.std()),
        lambda m, x: F.conv2d(m.conv(x), m.conv.weight.flip(0)),
        lambda m, x: m.conv(F.conv2d(x, m.conv.weight.flip(1))),
    ],
)
def test_a_weight_that_is_computed_with_leaves_the_network_unchanged(use):
    unchanged(make(use, conv=nn.Conv2d(WIDE, WIDE, 1)))


@pytest.mark.parametrize(
    "parametrize", [parametrizations.weight_norm, parametrizations.spectral_norm]
)
def test_a_parametrized_weight_stays(parametrize):
    unchanged(make(lambda m, x: m.conv(x), conv=parametrize(nn.Conv2d(WIDE, WIDE, 1))))


def test_parameters_and_buffers_beside_the_layers_move_with_the_channels():
    model = make(lambda m, x: x * m.scale + m.shift)
    model.scale = nn.Parameter(torch.zeros(WIDE, 1, 1))
    model.register_buffer("shift", torch.zeros(1, WIDE, 8, 8))
    assert unchanged(model) == WIDE


def test_a_linear_layer_behind_a_flattening_moves_whole_images():
    model = nn.Sequential(nn.Conv2d(3, WIDE, 3), nn.Flatten(), nn.Linear(WIDE * 36, 5))
    groups, moves, error = outcome(model)
    assert error < 1e-9 and len(moves[0][0]) == WIDE
    assert free_inputs(groups, model[2].weight) == WIDE * 36


def test_several_outputs_stay_each():
    class Tapped(Adversary):
        def forward(self, x):
            x = self.stem(x)
            return {"head": self.head(x), "taps": [x, x[:, :3]]}

    assert unchanged(Tapped()) == 0


def test_an_auxiliary_head_that_only_training_uses_moves_too():
    class Auxiliary(Adversary):
        def __init__(self) -> None:
            super().__init__()
            self.aux = nn.Conv2d(WIDE, 2, 1)

        def forward(self, x):
            x = F.relu(self.stem(x))
            return (self.head(x), self.aux(x)) if self.training else self.head(x)

    model = Auxiliary()
    assert unchanged(model) == WIDE
    model = randomise_(Auxiliary()).train()
    assert shuffle_every_set(model, torch.randn(2, 3, 8, 8, dtype=torch.float64))[2] < 1e-9
    assert model.training


class Tokens(nn.Module):
    """A class token before as many others as there are channels, at learned positions."""

    def __init__(self):
        super().__init__()
        self.embed, self.first, self.last = nn.Linear(8, WIDE), nn.Linear(WIDE, 8), nn.Linear(8, 3)
        self.token = nn.Parameter(torch.zeros(1, 1, WIDE))
        self.positions = nn.Parameter(torch.zeros(1, WIDE, WIDE))

    def forward(self, x):
        x = self.embed(x)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1)
        return self.last(self.first(x + self.positions).mean(1))


def test_channels_behind_a_class_token_move_with_the_positions_of_all_tokens():
    model = randomise_(Tokens())
    groups, _, error = shuffle_every_set(model, torch.randn(2, WIDE - 1, 8).double())
    assert error < 1e-12
    assert free_inputs(groups, model.first.weight) == WIDE
    along_tokens = groups.placements[id(model.positions)].axes[1]
    assert (groups.interchangeable_set[along_tokens] == -1).all()


class Experts(nn.Module):
    """As many experts as make their number a dimension of channels, all of them used."""

    def __init__(self, hidden):
        super().__init__()
        self.embed, self.last = nn.Linear(8, WIDE), nn.Linear(WIDE, 3)
        self.up = nn.Parameter(torch.zeros(8, WIDE, hidden))
        self.down = nn.Parameter(torch.zeros(8, hidden, WIDE))

    def forward(self, x):
        return self.last(((self.embed(x) @ self.up).relu() @ self.down).sum(0))


@pytest.mark.parametrize("hidden", [6, 16])
def test_what_multiplies_the_weights_of_all_experts_moves(hidden):
    model = randomise_(Experts(hidden))
    groups, moves, error = shuffle_every_set(model, torch.randn(5, 8).double())
    assert error < 1e-12 and moves
    assert free_inputs(groups, model.last.weight) == WIDE


class FromOneValue(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.start = start
        self.embed, self.first, self.last = nn.Linear(8, WIDE), nn.Linear(WIDE, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        return self.last(self.first(self.start(x) + x))


@pytest.mark.parametrize(
    "start",
    [torch.zeros_like, lambda x: torch.full(x.shape, 2.0), lambda x: x.new_ones(x.shape[1:])],
)
def test_channels_that_meet_one_value_everywhere_move(start):
    model = randomise_(FromOneValue(start))
    groups, _, error = shuffle_every_set(model, torch.randn(2, 5, 8).double())
    assert error < 1e-12
    assert free_inputs(groups, model.first.weight) == WIDE


def test_channels_that_meet_a_count_of_one_value_stay():
    model = randomise_(FromOneValue(lambda x: torch.ones_like(x).cumsum(-1)))
    groups, _, error = shuffle_every_set(model, torch.randn(2, 5, 8).double())
    assert error < 1e-12
    assert free_inputs(groups, model.first.weight) == 0


class Attention(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, WIDE)
        self.block = nn.TransformerEncoderLayer(
            WIDE, 3, 32, batch_first=True, dropout=0.0, **options
        )
        self.head = nn.Linear(WIDE, 5)

    def forward(self, tokens):
        return self.head(self.block(self.embed(tokens)))


@pytest.mark.parametrize("options", [{}, {"norm_first": True}, {"activation": F.gelu}])
def test_a_transformer_moves_its_stream_its_heads_and_its_hidden_layer(options):
    model = Attention(**options)
    tokens = torch.randint(0, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    assert unchanged(model, tokens) == WIDE
    groups = find_channel_groups(model, (tokens,))
    assert free_inputs(groups, model.block.self_attn.in_proj_weight) == WIDE
    assert free_inputs(groups, model.block.linear2.weight) == 32
    out = groups.interchangeable_set[groups.inputs_of(model.block.self_attn.out_proj.weight)[0]]
    assert len(set(out.tolist())) == 3 and -1 not in out  # within each head


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}, {"bias": False}])
def test_recurrent_layers_move_their_inputs_and_their_states(kind, options):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.rnn = nn.Linear(4, WIDE), kind(WIDE, WIDE, batch_first=True, **options)
            width = 2 * WIDE if self.rnn.bidirectional else WIDE
            self.head = nn.Linear(2 * width, 5)

        def forward(self, x):
            outputs, state = self.rnn(self.stem(x))
            last = (state[0] if isinstance(state, tuple) else state)[-1:]
            repeated = torch.cat([last.transpose(0, 1)] * self.head.in_features, 2)
            width = self.head.in_features - outputs.shape[2]
            return self.head(torch.cat([outputs, repeated[..., :width].expand(-1, 6, -1)], 2))

    model = Recurrent()
    assert unchanged(model, torch.randn(2, 6, 4, dtype=torch.float64)) == model.head.in_features
    groups = find_channel_groups(model, (torch.randn(2, 6, 4, dtype=torch.float64),))
    assert free_inputs(groups, model.rnn.weight_ih_l0) == WIDE


def test_what_stays_has_a_reason_in_words():
    model = make(lambda m, x: x.cumsum(1))
    groups, _, _ = outcome(model)
    assert groups.why_fixed(groups.inputs_of(model.stem.weight)[0, 0]) == "it comes from outside"
    assert "aten.cumsum" in groups.why_fixed(groups.inputs_of(model.head.weight)[0, 0])


def test_a_network_that_cannot_be_traced_says_so_and_keeps_its_mode():
    class Branches(Adversary):
        def middle(self, x):
            return x if x.sum() > 0 else -x

    model = Branches().train()
    model.stem.eval()
    with pytest.raises(HelpersError, match="Branches cannot be traced in evaluation mode"):
        find_channel_groups(model, (torch.randn(1, 3, 8, 8),))
    assert model.training and not model.stem.training


def test_only_pytorchs_loggers_are_silenced_and_get_their_levels_back(monkeypatch, caplog, capfd):
    export = torch.export.export
    inner = logging.getLogger("torch.export")

    def chatty(*args):
        logging.getLogger("somebody.else").warning("heard")
        inner.error("not heard")
        return export(*args)

    monkeypatch.setattr(torch.export, "export", chatty)
    levels = {name: logging.getLogger(name).level for name in logging.root.manager.loggerDict}
    inner.setLevel(logging.INFO)
    try:
        find_channel_groups(nn.Linear(4, 4), (torch.zeros(1, 4),))
        assert inner.level == logging.INFO
    finally:
        inner.setLevel(levels.get("torch.export", logging.NOTSET))
    assert "heard" in caplog.messages and "not heard" not in caplog.messages
    assert "not heard" not in capfd.readouterr().err
    for name, level in levels.items():
        assert logging.getLogger(name).level == level
