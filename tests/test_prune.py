import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.utils.prune as torch_prune
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

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


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),  # stays dense
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.Linear(8 * 4 * 4, 3),
    )


def optimizers():
    return {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.1),
        "nesterov": lambda p: torch.optim.SGD(p, 0.02, 0.9, weight_decay=0.1, nesterov=True),
        "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    }


def train(model, optimizer, steps=3):
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 1, 8, 8)).square().mean().backward()
        optimizer.step()


def zeros_are_held(model, masks):
    return all((model.get_parameter(n)[~mask] == 0).all() for n, mask in masks.items())


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
    model = create_model("resnext14_8x4d", 10)
    keys = list(model.state_dict())
    masks = prune_2to4_(model)
    hold_masks(torch.optim.SGD(model.parameters()), model, masks)
    assert list(model.state_dict()) == keys
    assert list(create_model("resnext14_8x4d", 10).state_dict()) == keys


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


# Holding the zeros.


@pytest.mark.parametrize("make", optimizers().values(), ids=optimizers())
def test_zeros_are_lost_without_holding_them(make):
    model = network()
    masks = prune_2to4_(model)
    train(model, make(model.parameters()), steps=1)
    assert not zeros_are_held(model, masks)


@pytest.mark.parametrize("make", optimizers().values(), ids=optimizers())
def test_zeros_are_held_through_every_step(make):
    model = network()
    masks = prune_2to4_(model)
    optimizer = make(model.parameters())
    hold_masks(optimizer, model, masks)
    before = model[3].weight.detach().clone()
    for _ in range(3):
        train(model, optimizer, steps=1)
        assert zeros_are_held(model, masks)
    kept = masks["3.weight"]
    assert (model[3].weight[kept] != before[kept]).all()


@pytest.mark.parametrize("make", optimizers().values(), ids=optimizers())
def test_holding_is_the_same_as_setting_the_zeros_by_hand(make):
    held, by_hand = network(), network()
    masks = prune_2to4_(held)
    optimizer = make(held.parameters())
    hold_masks(optimizer, held, masks)
    train(held, optimizer)

    prune_2to4_(by_hand)
    optimizer = make(by_hand.parameters())
    torch.manual_seed(1)
    for _ in range(3):
        optimizer.zero_grad()
        by_hand(torch.randn(4, 1, 8, 8)).square().mean().backward()
        optimizer.step()
        for name, mask in masks.items():
            by_hand.get_parameter(name).data[~mask] = 0
    for one, other in zip(held.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("make", optimizers().values(), ids=optimizers())
def test_zeros_are_held_with_the_momentum_of_a_dense_training(make, when):
    model = network()
    dense = make(model.parameters())
    train(model, dense)
    masks = prune_2to4_(model)
    optimizer = make(model.parameters())
    if when == "before":
        hold_masks(optimizer, model, masks)
    optimizer.load_state_dict(dense.state_dict())
    if when == "after":
        hold_masks(optimizer, model, masks)
    train(model, optimizer)
    assert zeros_are_held(model, masks)


def test_zeros_are_held_with_masks_read_from_a_loaded_network():
    model = network()
    prune_2to4_(model)
    loaded = network()
    loaded.load_state_dict(model.state_dict())
    masks = masks_of(loaded)
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)
    hold_masks(optimizer, loaded, masks)
    train(loaded, optimizer)
    assert zeros_are_held(loaded, masks)


def test_zeros_are_held_in_a_channels_last_network():
    model = network().to(memory_format=torch.channels_last)
    masks = prune_2to4_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hold_masks(optimizer, model, masks)
    train(model, optimizer)
    assert zeros_are_held(model, masks)


def test_zeros_are_held_when_a_scheduler_wraps_the_step():
    model = network()
    masks = prune_2to4_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    hold_masks(optimizer, model, masks)
    for _ in range(2):
        train(model, optimizer, steps=1)
        scheduler.step()
    assert zeros_are_held(model, masks)


@pytest.mark.parametrize("overflow", [False, True])
def test_zeros_are_held_in_mixed_precision_with_a_gradient_scaler(overflow):
    model = network()
    masks = prune_2to4_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)
    hold_masks(optimizer, model, masks)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = model[3].weight.detach().clone()
    for step in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(torch.randn(4, 1, 8, 8)).float().square().mean()
        scaler.scale(loss).backward()
        if overflow and step == 1:  # the scaler leaves this step out
            model[3].weight.grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        assert zeros_are_held(model, masks)
    assert scaler.get_scale() == (2.0**9 if overflow else 2.0**10)
    assert model[3].weight.isfinite().all()
    assert not torch.equal(model[3].weight, before)


def test_removing_the_handle_ends_the_holding():
    model = network()
    masks = prune_2to4_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    handle = hold_masks(optimizer, model, masks)
    train(model, optimizer, steps=1)
    assert zeros_are_held(model, masks)
    handle.remove()
    train(model, optimizer, steps=1)
    assert not zeros_are_held(model, masks)


def test_an_averaged_copy_stays_2to4():
    model = network()
    masks = prune_2to4_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hold_masks(optimizer, model, masks)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(2):
        train(model, optimizer, steps=1)
        ema.update_parameters(model)
    assert zeros_are_held(ema.module, masks)
    assert not torch.equal(ema.module[3].weight, model[3].weight)


def test_zeros_are_held_when_gradients_are_accumulated():
    model = network()
    masks = prune_2to4_(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    hold_masks(optimizer, model, masks)
    for step in range(4):
        model(torch.randn(4, 1, 8, 8)).square().mean().backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()
        assert zeros_are_held(model, masks)


def test_zeros_are_held_by_each_of_several_optimizers():
    model = network()
    masks = prune_2to4_(model)
    pair = (
        torch.optim.SGD(model[:4].parameters(), lr=0.1),
        torch.optim.AdamW(model[4:].parameters()),
    )
    for optimizer in pair:
        hold_masks(optimizer, model, masks)
    for _ in range(2):
        model(torch.randn(4, 1, 8, 8)).square().mean().backward()
        for optimizer in pair:
            optimizer.step()
        assert zeros_are_held(model, masks)


def test_two_networks_are_held_side_by_side():
    models = network(), nn.Sequential(nn.Flatten(), nn.Linear(64, 8))
    held = [prune_2to4_(model) for model in models]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
    for optimizer, model, masks in zip(optimizers, models, held, strict=True):
        hold_masks(optimizer, model, masks)
    for optimizer, model, masks in zip(optimizers, models, held, strict=True):
        train(model, optimizer)
        assert zeros_are_held(model, masks)


def test_zeros_are_held_under_distributed_data_parallel(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = network()
        masks = prune_2to4_(model)
        parallel = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
        hold_masks(optimizer, model, masks)
        train(parallel, optimizer)
        assert zeros_are_held(model, masks)
        with pytest.raises(HelpersError, match="rather than a wrapper"):
            hold_masks(optimizer, parallel, masks)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.double(),
        lambda model: model.to(memory_format=torch.channels_last),
        lambda model: model.load_state_dict(model.state_dict(), assign=True),
    ],
)
def test_zeros_are_held_when_the_weights_change_during_training(change):
    model = network()
    masks = prune_2to4_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    hold_masks(optimizer, model, masks)
    train(model, optimizer, steps=1)
    change(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 1
    optimizer.step()
    assert zeros_are_held(model, masks)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_holding_does_not_hide_a_diverged_weight(value):
    model = network()
    masks = prune_2to4_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hold_masks(optimizer, model, masks)
    with torch.no_grad():
        model[5].weight[~masks["5.weight"]] = value
    optimizer.step()
    assert not model[5].weight.isfinite().all()


def test_a_check_finds_who_else_has_written_to_the_weights():
    model = network()
    dense = {key: value.clone() for key, value in model.state_dict().items()}
    masks = prune_2to4_(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    hold_masks(optimizer, model, masks, check_every=2)
    train(model, optimizer, steps=3)  # checked before the first and the third
    model.load_state_dict(dense)
    train(model, optimizer, steps=1)  # not checked
    model.load_state_dict(dense)
    with pytest.raises(HelpersError, match=r"^3\.weight is not 2:4.*besides this optimizer"):
        train(model, optimizer, steps=1)


def test_a_check_ends_with_the_holding():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    holding = hold_masks(optimizer, model, masks_2to4(model), check_every=1)
    with pytest.raises(HelpersError, match="not 2:4"), holding:
        train(model, optimizer, steps=1)
    train(model, optimizer, steps=1)


def test_masks_of_another_network_are_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    wrong = {"3.weight": torch.ones(8, 4, 3, 3, dtype=torch.bool)}
    for masks, message in (({"9.weight": wrong["3.weight"]}, "no parameter 9"), (wrong, "shape")):
        before = model[3].weight.clone()
        with pytest.raises(HelpersError, match=message):
            apply_masks_(model, {"5.weight": model[5].weight > 0} | masks)
        with pytest.raises(HelpersError, match=message):
            hold_masks(optimizer, model, masks)
        assert torch.equal(model[3].weight, before)
    assert (model[5].weight != 0).all(), "nothing is changed before all is checked"


@pytest.mark.parametrize("check_every", [0, 1])
def test_without_masks_nothing_is_held(check_every):
    model = nn.Sequential(nn.Linear(6, 6))
    masks = prune_2to4_(model)
    assert masks == {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model[0].weight.detach().clone()
    with hold_masks(optimizer, model, masks, check_every):
        model(torch.ones(1, 6)).sum().backward()
        optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before - 0.1)


def test_an_optimizer_without_step_hooks_is_refused_at_the_call():
    class Wrapper(torch.optim.Optimizer):
        """As Accelerate's: an optimizer by type that has not been set up as one."""

        def __init__(self, optimizer):
            self.optimizer = optimizer

    model = network()
    masks = prune_2to4_(model)
    inner = torch.optim.SGD(model.parameters(), lr=0.1)
    for wrong in (Wrapper(inner), None):
        with pytest.raises(HelpersError, match=r"no hooks around its steps.*optimizer\.optimizer"):
            hold_masks(wrong, model, masks)
    hold_masks(Wrapper(inner).optimizer, model, masks)
    train(model, inner, steps=1)
    assert zeros_are_held(model, masks)


def test_a_negative_number_of_steps_is_refused_at_the_call():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(HelpersError, match=r"^check_every is -1"):
        hold_masks(optimizer, model, {}, check_every=-1)


def test_masks_that_are_not_boolean_are_refused():
    model = network()
    masks = {name: mask.byte() for name, mask in masks_2to4(model).items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for call in (
        lambda: apply_masks_(model, masks),
        lambda: hold_masks(optimizer, model, masks),
        lambda: removed_weights(model, masks),
        lambda: restore_weights_(model, masks, {}),
    ):
        with pytest.raises(HelpersError, match=r"^The mask of 3\.weight is of type torch\.uint8"):
            call()


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


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 16)),
        lambda: nn.utils.weight_norm(nn.Linear(16, 16)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16)),
        lambda: torch_prune.random_unstructured(nn.Linear(16, 16), "weight", 0.2),
        lambda: Dynamic(16, 16),
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
