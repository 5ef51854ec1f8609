import re

import pytest
import torch
import torch.nn.utils.prune as torch_prune
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pruning_cases import network, train, zeros_are_held
from safetensors.torch import load_file, save_file
from torch import nn

from helpers.errors import HelpersError
from helpers.products import watch_products
from helpers.sparsity import (
    apply_masks_,
    eligible_weights,
    hold_masks,
    is_2to4,
    kept_magnitude,
    mask_2to4,
    masks_2to4,
    masks_of,
    pack_masks,
    prune_2to4_,
    removed_weights,
    restore_weights_,
    sparsity_report,
    unpack_masks,
    verify_model,
)
from helpers.training.networks import create_model

# Pruning.


def test_the_eligible_weights_are_2to4_afterwards():
    model = network()
    masks = prune_2to4_(model)
    assert list(masks) == ["3.weight", "5.weight"]
    assert all(map(is_2to4, eligible_weights(model).values()))
    assert zeros_are_held(model, masks)


def test_pruning_is_by_magnitude_and_leaves_the_rest_unchanged():
    model, dense = network(), network().state_dict()
    masks = prune_2to4_(model)
    for key, value in model.state_dict().items():
        expected = dense[key] * mask_2to4(dense[key]) if key in masks else dense[key]
        assert torch.equal(value, expected)


def test_pruning_happens_in_place():
    model = network()
    parameters = list(map(id, model.parameters()))
    storage = model[3].weight.data_ptr()
    prune_2to4_(model)
    assert list(map(id, model.parameters())) == parameters
    assert model[3].weight.data_ptr() == storage
    assert model[3].weight.requires_grad


def test_pruning_a_pruned_network_changes_nothing():
    model = network()
    masks = prune_2to4_(model)
    before = [value.clone() for value in model.state_dict().values()]
    again = prune_2to4_(model)
    assert all(map(torch.equal, before, model.state_dict().values()))
    assert all(torch.equal(masks[name], again[name]) for name in masks)


def test_only_the_included_weights_are_pruned():
    model = network()
    assert list(prune_2to4_(model, include="5")) == ["5.weight"]
    assert is_2to4(model[5].weight)
    assert not is_2to4(model[3].weight)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nothing_is_changed_when_one_layer_has_nan(value):
    model = network()
    with torch.no_grad():
        model[5].weight[0, 0] = value
    before = model[3].weight.detach().clone()
    with pytest.raises(HelpersError, match=r"^5\.weight has NaN"):
        prune_2to4_(model)
    assert torch.equal(model[3].weight, before)


def test_pruning_keeps_the_stock_keys():
    model = create_model("resnext14_8x1d", 10)
    keys = list(model.state_dict())
    masks = prune_2to4_(model)
    hold_masks(torch.optim.SGD(model.parameters()), model, masks)
    assert list(model.state_dict()) == keys
    assert list(create_model("resnext14_8x1d", 10).state_dict()) == keys


@pytest.mark.parametrize(
    ("model", "selection", "message"),
    [
        (
            nn.Conv2d(3, 8, 3),
            {},
            r"no weight of Conv2d .*weight: 3 input channels.*sparsity_report",
        ),
        (nn.Linear(8, 8), {"exclude": nn.Linear}, r"\(weight: excluded\)"),
        (nn.BatchNorm2d(8), {}, r"BatchNorm2d has no linear layer"),
    ],
)
def test_pruning_warns_when_nothing_is_eligible(model, selection, message, caplog):
    assert prune_2to4_(model, **selection) == {}
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("helpers.sparsity.prune", "WARNING")
    assert re.search(f"^Nothing was pruned: .*{message}", record.getMessage())


def test_pruning_says_nothing_when_something_is_eligible(caplog):
    prune_2to4_(network())
    assert not caplog.records


def test_the_masks_of_a_pruned_network_are_read_from_its_zeros():
    model = network()
    masks = prune_2to4_(model)
    read = masks_of(model)
    assert list(read) == list(masks) == list(eligible_weights(model))
    assert all(torch.equal(read[name], masks[name]) for name in masks)


def test_kept_magnitude_is_a_share_in_per_cent():
    weight = torch.tensor([[1.0, -3.0, 2.0, -0.0]], dtype=torch.float16)
    assert kept_magnitude(weight, mask_2to4(weight)) == pytest.approx(100 * 5 / 6)
    assert kept_magnitude(weight, torch.ones(1, 4, dtype=torch.bool)) == 100


# Without changing anything, and back again.


def test_masks_are_computed_without_changing_the_network():
    model = network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    masks = masks_2to4(model)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    apply_masks_(model, masks)
    assert zeros_are_held(model, masks)


def test_masks_of_a_dense_network_are_refused_by_name():
    model = network()
    prune_2to4_(model, exclude="5")
    with pytest.raises(HelpersError, match=r"^5\.weight is not 2:4.*exclude"):
        masks_of(model)
    assert list(masks_of(model, exclude="5")) == ["3.weight"]


def test_masks_of_a_weight_with_too_many_zeros_keep_two_of_four_all_the_same():
    model = nn.Sequential(nn.Linear(4, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 0.0, 0.0, 1.0]]))
    assert masks_of(model)["0.weight"].tolist() == [[True, False, False, True]]


def test_a_dense_network_is_restored_bit_by_bit():
    model = network()
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    masks = masks_2to4(model)
    removed = removed_weights(model, masks)
    assert [len(values) for values in removed.values()] == [8 * 8 * 9 // 2, 3 * 128 // 2]
    apply_masks_(model, masks)
    restore_weights_(model, masks, removed)
    assert all(torch.equal(dense[key], value) for key, value in model.state_dict().items())


def test_restoring_keeps_what_was_learnt_since():
    model = network()
    masks = masks_2to4(model)
    removed = removed_weights(model, masks)
    apply_masks_(model, masks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with hold_masks(optimizer, model, masks):
        train(model, optimizer)
    learnt = model[3].weight.detach().clone()
    restore_weights_(model, masks, removed)
    mask = masks["3.weight"]
    assert torch.equal(model[3].weight[mask], learnt[mask])
    assert torch.equal(model[3].weight[~mask], removed["3.weight"])


def test_values_of_other_masks_are_not_restored():
    model = network()
    masks = masks_2to4(model)
    removed = removed_weights(model, masks)
    before = model[3].weight.clone()
    for wrong in ({"3.weight": removed["3.weight"]}, removed | {"5.weight": torch.ones(3)}):
        with pytest.raises(HelpersError, match=r"^The mask of 5\.weight removes 192 values"):
            restore_weights_(model, masks, wrong)
        assert torch.equal(model[3].weight, before)


@given(
    st.dictionaries(
        st.text("ab.", min_size=1, max_size=4),
        arrays(bool, array_shapes(min_dims=1, max_dims=4, min_side=0, max_side=5)),
    )
)
def test_packed_masks_take_a_bit_each_and_come_back_exactly(masks):
    masks = {name: torch.from_numpy(mask) for name, mask in masks.items()}
    packed = pack_masks(masks)
    assert all(packed[name].nbytes == -(-mask.numel() // 8) for name, mask in masks.items())
    restored = unpack_masks(packed)
    assert list(restored) == list(masks)
    for name, mask in masks.items():
        assert restored[name].dtype == torch.bool
        assert torch.equal(restored[name], mask)


def test_packed_masks_survive_a_safetensors_file(tmp_path):
    masks = masks_2to4(network())
    save_file(pack_masks(masks), tmp_path / "masks.safetensors")
    restored = unpack_masks(load_file(tmp_path / "masks.safetensors"))
    assert restored.keys() == masks.keys()
    assert all(torch.equal(restored[name], mask) for name, mask in masks.items())


# A network of the reader's own.


class OwnConv(nn.Conv2d):
    pass


class OwnNetwork(nn.Module):
    """A stem of three channels, a subclass, attention, a transposed convolution, a tied weight."""

    def __init__(self):
        super().__init__()
        self.stem = OwnConv(3, 16, 3, padding=1)
        self.body = OwnConv(16, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose2d(16, 8, 2, stride=2)
        self.down = nn.Conv2d(8, 16, 2, stride=2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.embed = nn.Embedding(12, 16)
        self.head = nn.Linear(16, 12, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x, word):
        x = self.down(self.up(self.grouped(self.body(self.stem(x)).relu())))
        x = x.flatten(2).transpose(1, 2)
        x, _ = self.attention(x, x, x)
        return self.head(x.mean(1) + self.embed(word))


@pytest.mark.parametrize("rules", ["tensorrt", "asp", "cusparselt", "any"])
def test_a_network_of_the_readers_own_is_pruned_held_saved_and_loaded(rules, tmp_path):
    torch.manual_seed(0)
    model = OwnNetwork().bfloat16()
    example = torch.randn(2, 3, 4, 4).bfloat16(), torch.tensor([1, 2])
    keys = list(model.state_dict())
    masks = prune_2to4_(model, rules)
    assert {"attention.in_proj_weight", "attention.out_proj.weight"} <= masks.keys()
    assert ("body.weight" in masks) == (rules != "cusparselt")
    assert ("grouped.weight" in masks, "up.weight" in masks) == 2 * (rules == "any",)
    assert "stem.weight" not in masks

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    hold_masks(optimizer, model, masks, check_every=1)
    for _ in range(3):
        optimizer.zero_grad()
        model(*example).square().mean().backward()
        optimizer.step()
    assert zeros_are_held(model, masks)
    assert list(model.state_dict()) == keys

    torch.save(model.state_dict(), tmp_path / "own.pt")
    loaded = OwnNetwork().bfloat16()
    loaded.load_state_dict(torch.load(tmp_path / "own.pt"))
    assert torch.equal(loaded(*example), model(*example))
    read = masks_of(loaded, rules)
    assert read.keys() == masks.keys()
    assert all(torch.equal(read[name], masks[name]) for name in masks)
    report = sparsity_report(loaded, example=example, rules=rules)
    assert (report.eligible.kept == 100).all()


def test_packed_masks_without_a_shape_are_refused():
    packed = pack_masks({"fc.weight": torch.ones(4, 4, dtype=torch.bool)})
    del packed["fc.weight.shape"]
    with pytest.raises(HelpersError, match=r"fc\.weight\.shape is missing"):
        unpack_masks(packed)


def test_a_model_without_numbers_is_not_pruned():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(HelpersError, match=r"0\.weight is on the device `meta`"):
        prune_2to4_(model)


def test_an_embedding_that_is_pruned_by_way_of_the_head_is_named(caplog):
    model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 32, bias=False))
    model[1].weight = model[0].weight
    assert list(prune_2to4_(model)) == ["1.weight"]
    assert "0.weight (Embedding) is pruned too: it is 1.weight" in caplog.text


class Dynamic(nn.Linear):
    """Shows a computed weight by the name of its parameter, as ModelOpt's layers do."""

    def __getattr__(self, name):
        value = super().__getattr__(name)
        return value * torch.ones(()) if name == "weight" else value


def dynamic(layer: nn.Linear) -> nn.Linear:
    # Converted after its initialisation, which would write to the computed weight and be lost.
    layer.__class__ = Dynamic
    return layer


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
        lambda: nn.utils.weight_norm(nn.Linear(16, 16)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)),
        lambda: torch_prune.random_unstructured(nn.Linear(16, 16), "weight", 0.2),
        lambda: dynamic(nn.Linear(16, 16)),
    ],
    ids=["weight norm", "old weight norm", "spectral norm", "pruned by torch", "dynamic"],
)
def test_a_computed_weight_is_pruned_held_and_verified_where_it_is_used(make):
    torch.manual_seed(0)
    model, x = nn.Sequential(make(), nn.Linear(16, 16)), torch.randn(8, 16)
    masks = prune_2to4_(model)
    assert len(masks) == 2 and masks.keys() == masks_of(model).keys()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with hold_masks(optimizer, model, masks):
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    table = verify_model(model)
    assert table.weight.tolist() == list(masks)
    assert table.eligible.all() and table.is_2to4.all()
    factors = []
    with torch.no_grad(), watch_products({}, lambda product: factors.append(product.factor.T)):
        model.eval()(x)
    # Spectral norm also multiplies its weight by a vector, for the norm.
    used = [factor for factor in factors if factor.shape == (16, 16)]
    assert len(used) == 2
    assert all(is_2to4(factor) and factor.any() for factor in used)
