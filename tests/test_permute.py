"""Permuting channels keeps more magnitude and the same outputs, or nothing changes."""

import copy
import math

import pytest
import torch
from torch import nn

from helpers.errors import InputError
from helpers.sparsity import (
    eligible_weights,
    kept_magnitude,
    mask_2to4,
    permute,
    prune_2to4_,
    unchanged,
)
from helpers.sparsity.permute import permute_channels_
from helpers.training.networks import create_model

IMAGE = (torch.zeros(1, 1, 28, 28),)


def sabotage(monkeypatch: pytest.MonkeyPatch, weight: torch.Tensor, dim: int = 1) -> None:
    """Make the reordering go wrong in one weight: two of its channels change places as well."""
    reorder_ = permute.reorder_

    def wrong_(*args):
        reorder_(*args)
        order = torch.arange(weight.shape[dim])
        order[0], order[-1] = order[-1].item(), order[0].item()
        with torch.no_grad():
            weight.copy_(weight.index_select(dim, order))

    monkeypatch.setattr(permute, "reorder_", wrong_)


@pytest.fixture
def model() -> nn.Module:
    """The quick preset's network with uneven channels, as training leaves them."""
    torch.manual_seed(0)
    model = create_model("resnext14_8x1d", 10).eval()
    with torch.no_grad():
        for weight in eligible_weights(model, "any").values():
            weight.mul_(torch.randn(weight.shape[1]).exp().view(-1, *(1,) * (weight.dim() - 2)))
    return model


def kept(model: nn.Module, rules: str = "tensorrt") -> dict[str, float]:
    weights = eligible_weights(model, rules)
    return {name: kept_magnitude(weight, mask_2to4(weight)) for name, weight in weights.items()}


@pytest.mark.parametrize("rules", ["tensorrt", "asp"])
def test_more_magnitude_is_kept_and_the_network_computes_the_same(model, rules):
    images = torch.randn(4, 1, 28, 28)
    with torch.no_grad():
        expected = model(images)
    before = kept(model, rules)
    report = permute_channels_(model, IMAGE, rules, escapes=5)
    after = kept(model, rules)
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-4)
    assert set(report.weights.weight) == set(before)
    for row in report.weights.itertuples():
        assert row.before == pytest.approx(before[row.weight], abs=1e-3)
        assert row.after == pytest.approx(after[row.weight], abs=1e-3)
        assert row.permuted != bool(row.reason)
    assert sum(after.values()) > sum(before.values()) + len(after)  # points of per cent
    assert report.max_relative_error < 1e-9


@pytest.mark.parametrize("outputs", [8, 6])
def test_a_transposed_convolution_is_permuted_along_its_inputs(outputs):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.ConvTranspose2d(16, outputs, 2), nn.ReLU(),
        nn.Conv2d(outputs, 5, 1),
    ).eval()  # fmt: skip
    images = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        model[2].weight.mul_(torch.randn(16).exp().view(-1, 1, 1, 1))
        expected = model(images)
    report = permute_channels_(model, (images[:1],), "any", exclude="4.*")
    (row,) = (row for row in report.weights.itertuples() if row.weight == "2.weight")
    assert row.permuted
    weight = model[2].weight.transpose(0, 1)  # as the mask sees it: outputs, inputs
    assert row.after == pytest.approx(kept_magnitude(weight, mask_2to4(weight)), abs=1e-3)
    assert row.after > row.before + 1
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_behind_a_grouped_convolution_is_permuted_within_its_groups(model):
    """What no other tool does: conv3 of a ResNeXt block, through the groups of its conv2."""
    report = permute_channels_(model, IMAGE, escapes=5)
    rows = report.weights.set_index("weight")
    for stage in (3, 4):
        assert rows.permuted[f"layer{stage}.0.conv3.weight"]
    # The groups of the second stage have four channels, which is one stripe.
    assert "fewer than eight" in rows.reason["layer2.0.conv3.weight"]


def test_the_same_network_gets_the_same_order(model):
    again = copy.deepcopy(model)
    permute_channels_(model, IMAGE, escapes=5)
    permute_channels_(again, IMAGE, escapes=5)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_second_permutation_loses_nothing(model):
    permute_channels_(model, IMAGE, escapes=5)
    before = kept_sum(model)
    permute_channels_(model, IMAGE, escapes=5)
    assert kept_sum(model) >= before - 1e-3  # float32 sums of 10^4


def test_the_modes_and_the_names_of_a_network_stay(model):
    names = list(model.state_dict())
    model.train()
    model.layer2.eval()
    permute_channels_(model, IMAGE, escapes=5)
    assert list(model.state_dict()) == names
    assert model.training and not model.layer2.training


def test_a_permuted_network_is_pruned_and_saved_as_any_other(model, tmp_path):
    permute_channels_(model, IMAGE, escapes=5)
    prune_2to4_(model)
    torch.save(model.state_dict(), tmp_path / "x.pt")
    other = create_model("resnext14_8x1d", 10)
    other.load_state_dict(torch.load(tmp_path / "x.pt", weights_only=True))


def test_excluded_layers_do_not_take_part(model):
    report = permute_channels_(model, IMAGE, exclude=["layer4.*", nn.Linear])
    assert not report.weights.weight.str.startswith(("layer4", "fc")).any()
    assert report.permuted.weight.str.startswith("layer3").any()


def test_a_network_in_bfloat16_is_permuted_too(model):
    model.bfloat16()
    report = permute_channels_(model, torch.zeros(1, 1, 28, 28, dtype=torch.bfloat16))
    assert len(report.permuted) > 8 and report.max_relative_error < 1e-9
    assert all(value.dtype == torch.bfloat16 for value in model.parameters())


def test_tied_weights_stay_tied():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)
    )
    model[2].weight = model[0].weight
    report = permute_channels_(model, torch.zeros(2, 16))
    assert model[2].weight is model[0].weight
    assert not len(report.permuted) and report.weights.reason.str.contains("outside").any()


def test_a_concatenation_that_shifts_the_groups_of_four_loses_nothing():
    """One reader sees the channels two further on than the other."""

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 32, 1)
            self.two = nn.Conv2d(3, 2, 1)
            self.plain = nn.Conv2d(32, 64, 1)
            self.shifted = nn.Conv2d(36, 16, 1)

        def forward(self, x):
            stem, two = self.stem(x), self.two(x)
            shifted = torch.cat([two, stem, two], 1)
            return self.plain(stem), self.shifted(shifted)

    torch.manual_seed(0)
    model = Shifted()
    before = kept_sum(model)
    report = permute_channels_(model, torch.zeros(1, 3, 4, 4))
    assert report.max_relative_error < 1e-9 and len(report.permuted)
    assert kept_sum(model) > before


def kept_sum(model: nn.Module) -> float:
    weights = eligible_weights(model).values()
    return sum(float((weight.abs() * mask_2to4(weight)).sum().detach()) for weight in weights)


def test_a_network_that_cannot_be_traced_is_left_unchanged_with_the_reason():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.two(self.one(x)) if x.sum() > 0 else x

    model = Branches()
    before = copy.deepcopy(model.state_dict())
    report = permute_channels_(model, torch.zeros(1, 8))
    assert not len(report.permuted) and (report.weights.before == report.weights.after).all()
    assert report.weights.reason.str.contains("Branches cannot be traced").all()
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_network_whose_outputs_change_is_restored(model, monkeypatch):
    """A wrong rule must not get through: here channels are moved in one layer only."""
    weight = model.layer2[0].conv1.weight
    before = copy.deepcopy(model.state_dict())

    def wrong_(groups, index):
        with torch.no_grad():
            weight.copy_(weight.flip(1))

    monkeypatch.setattr(permute, "reorder_", wrong_)
    with pytest.raises(InputError, match="The model has been restored"):
        permute_channels_(model, IMAGE, escapes=5)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_report_reads_well_as_a_line_as_text_and_in_a_notebook(model):
    report = permute_channels_(model, IMAGE, escapes=5)
    line = f"{len(report.permuted)} of {len(report.weights)} weights permuted"
    assert repr(report).startswith(line) and "\n" not in repr(report)
    assert "layer1.0.conv3.weight" in str(report)
    assert report._repr_html_().count("<tr") == len(report.weights) + 1


class RmsNorm(nn.Module):
    """A norm that computes in FP32 whatever it is given, as language models have it."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))

    def forward(self, x):
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Residual(nn.Module):
    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm = RmsNorm(features)
        self.up, self.down = nn.Linear(features, features), nn.Linear(features, features)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(self.norm(x))))


def test_a_deep_network_with_norms_in_fp32_is_compared_in_double_precision():
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual(32) for _ in range(32)), RmsNorm(32), nn.Linear(32, 8)).eval()
    for parameter in model.parameters():
        if parameter.dim() == 2:
            nn.init.normal_(parameter, std=0.5)
    report = permute_channels_(nn.Sequential(nn.Linear(8, 32), model), torch.zeros(4, 8), escapes=0)
    assert len(report.permuted) > 32 and report.max_relative_error < 1e-10


class Sandwich(nn.Module):
    """Two layers that may be permuted, with something between or behind them."""

    def __init__(self, between=lambda x: x, behind=lambda x: x) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(8, 32), nn.Linear(32, 8)
        self.between, self.behind = between, behind

    def forward(self, x):
        return self.behind(self.two(self.between(self.one(x))))


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x.float(),
        lambda x: x.to(torch.float32).relu(),
        lambda x: x + torch.tensor([0.5]),
        lambda x: torch.relu(x, out=torch.empty_like(x)) if x.is_meta else x.relu(),
        lambda x: x.clone().copy_(x.relu()),
        lambda x: torch.softmax(x, -1, dtype=torch.float32) * 32,
        lambda x: torch.view_as_complex(x.float().unflatten(-1, (16, 2))).abs().repeat(1, 2),
        lambda x: x.bfloat16().float(),
    ],
)
def test_what_a_model_computes_in_a_lower_precision_is_compared_in_double(between):
    torch.manual_seed(0)
    report = permute_channels_(Sandwich(between).eval(), torch.zeros(4, 8), escapes=0)
    assert report.max_relative_error < 1e-6 and report.precision == "float64"


def left_alone(model: nn.Module, match: str, example: torch.Tensor | None = None) -> None:
    """Check that an error in one sentence is raised and that nothing has changed."""
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=match) as raised:
        permute_channels_(model, torch.zeros(4, 8) if example is None else example, escapes=0)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def single_only(x):
    if x.dtype == torch.float64:
        raise TypeError("no kernel for double\nand a second line")
    return x * 1.5


def never(x):
    if type(x) is torch.Tensor and not torch.compiler.is_exporting():
        raise TypeError("no kernel at all\nand a second line")
    return x


def test_a_model_that_does_not_run_in_double_precision_is_compared_in_single():
    torch.manual_seed(0)
    report = permute_channels_(Sandwich(single_only).eval(), torch.zeros(4, 8), escapes=0)
    assert len(report.permuted) and report.precision == "float32"
    assert 0 < report.max_relative_error < 1e-5 and repr(report).endswith("in float32")


def test_a_model_that_does_not_run_is_an_error_in_one_sentence():
    left_alone(Sandwich(never), r"Sandwich does not run .*no kernel at all\)")


def test_a_last_layer_that_starts_from_zero_hides_no_mistake(monkeypatch):
    torch.manual_seed(0)
    model = Sandwich()
    with torch.no_grad():
        model.two.weight.zero_()
        model.two.bias.zero_()
    wider = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 32), nn.Linear(32, 8), model)
    report = permute_channels_(wider, torch.zeros(4, 8), escapes=0)
    assert len(report.permuted) and report.max_relative_error > 0
    assert not model.two.weight.any() and not model.two.bias.any()
    sabotage(monkeypatch, wider[1].weight)
    left_alone(wider, "would compute something else")


def test_nothing_moved_is_not_called_equal():
    report = permute_channels_(nn.Sequential(nn.Linear(8, 8)), torch.zeros(2, 8))
    assert math.isnan(report.max_relative_error) and not report.precision
    assert repr(report).endswith("no outputs were compared")


@pytest.mark.parametrize("behind", [lambda x: x.argmax(-1), lambda x: {"classes": x.argmax(-1)}])
def test_a_model_without_floating_point_outputs_is_not_called_equal(behind):
    left_alone(Sandwich(behind=behind), "or there are none")


def test_outputs_that_are_nan_prove_nothing():
    left_alone(Sandwich(behind=lambda x: (x - x) / (x - x)), "Sandwich returns NaN")


def test_outputs_that_are_infinite_for_masked_entries_are_compared_by_the_others():
    masked = torch.tensor([True, False] * 4)
    model = Sandwich(behind=lambda x: x.masked_fill(masked, -torch.inf))
    report = permute_channels_(model, torch.zeros(4, 8), escapes=0)
    assert len(report.permuted) and report.max_relative_error < 1e-9


def test_an_interrupted_comparison_restores_the_model(model, monkeypatch):
    before = copy.deepcopy(model.state_dict())

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(unchanged.Outputs, "check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        permute_channels_(model, IMAGE, escapes=0)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class WithOption(nn.Module):
    """Has an input that may be None, and a layer that no graph shows in either mode."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)
        self.unused = nn.Linear(16, 16)

    def forward(self, x, mask=None):
        x = self.first(x)
        return self.second(x if mask is None else x * mask)


def test_an_input_that_is_not_a_tensor_is_left_unchanged():
    model, x = WithOption().eval(), torch.randn(2, 16)
    before = model(x)
    report = permute_channels_(model, (x, None), escapes=0)
    assert list(report.permuted.weight) == ["second.weight"]
    torch.testing.assert_close(model(x), before)


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised before it is used."""

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return torch.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class SharedValues(nn.Module):
    """Attention of four heads, which share the keys and values of two."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.out = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        q = self.q(x).unflatten(2, (4, 16)).transpose(1, 2)
        k, v = self.kv(x).unflatten(2, (4, 16)).transpose(1, 2).chunk(2, 1)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return x + 1e-6 * self.out(attended.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    """A gated layer between norms in FP32, as in language models."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RmsNorm(32)
        self.gate, self.up, self.down = nn.Linear(32, 64), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(y)) * self.up(y))


class ToSequence(nn.Module):
    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(32, 32, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0][:, -1]


KINDS = {
    "deep, with norms in FP32": lambda: (
        nn.Sequential(nn.Embedding(50, 32), *[Gated() for _ in range(12)], nn.Linear(32, 8)),
        torch.arange(20).view(2, 10),
        "6.down.weight",
    ),
    "shared values, barely scaled": lambda: (
        nn.Sequential(nn.Linear(8, 32), SharedValues(), nn.Linear(32, 8)),
        torch.zeros(2, 5, 8),
        "1.out.weight",
    ),
    "standardised convolutions": lambda: (
        nn.Sequential(nn.Conv2d(3, 32, 3), Standardised(32, 32, 3), nn.Conv2d(32, 5, 1)),
        torch.zeros(2, 3, 8, 8),
        "1.weight",
    ),
    "recurrent": lambda: (
        nn.Sequential(nn.Conv2d(3, 32, 3), ToSequence(), LastState(), nn.Linear(32, 5)),
        torch.zeros(2, 3, 6, 6),
        "3.weight",
    ),
    "runs in single precision only": lambda: (
        nn.Sequential(nn.Linear(8, 32), Sandwich(single_only), nn.Linear(8, 8))[1],
        torch.zeros(4, 8),
        "two.weight",
    ),
    "bfloat16": lambda: (
        Sandwich(torch.relu).bfloat16(),
        torch.zeros(4, 8, dtype=torch.bfloat16),
        "two.weight",
    ),
    "zeros": lambda: (
        nn.Sequential(
            nn.Conv2d(3, 32, 1),
            nn.Hardswish(),
            nn.Conv2d(32, 32, 1),
            nn.GroupNorm(2, 32),
            Zero(32, 32, 1),
        ),
        torch.zeros(2, 3, 4, 4),
        "2.weight",
    ),
}


class Zero(nn.Conv2d):
    """A convolution that starts from zero."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


@pytest.mark.parametrize("kind", KINDS)
def test_two_channels_in_a_wrong_place_are_found_in_every_kind_of_network(kind, monkeypatch):
    torch.manual_seed(0)
    model, example, name = KINDS[kind]()
    model.eval()
    report = permute_channels_(model, example, escapes=0)
    assert len(report.permuted) and report.max_relative_error < 1e-5
    weight = model.get_parameter(name)
    if weight.dim() == 1:
        nn.init.normal_(weight)
    sabotage(monkeypatch, weight, dim=min(weight.dim() - 1, 1))
    left_alone(model, "would compute something else", example)


def test_heads_that_share_their_values_are_permuted():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), SharedValues(), nn.Linear(32, 8)).eval()
    rows = permute_channels_(model, torch.zeros(2, 5, 8)).weights.set_index("weight")
    assert rows.permuted["1.out.weight"]
    assert rows.after["1.out.weight"] > rows.before["1.out.weight"]
