import pytest
import torch
from torch import nn

from helpers.checks import TutorialError
from helpers.models import create_model
from helpers.sparsity import (
    eligible_weights,
    hold_masks,
    is_2to4,
    kept_magnitude,
    mask_2to4,
    masks_of,
    prune_2to4_,
)


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


def test_pruning_is_by_magnitude_and_leaves_the_rest_alone():
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
    with pytest.raises(TutorialError, match=r"^5\.weight has NaN"):
        prune_2to4_(model)
    assert torch.equal(model[3].weight, before)


def test_pruning_keeps_the_stock_keys():
    model = create_model("resnext14_8x4d", 10)
    keys = list(model.state_dict())
    masks = prune_2to4_(model)
    hold_masks(torch.optim.SGD(model.parameters()), model, masks)
    assert list(model.state_dict()) == keys
    assert list(create_model("resnext14_8x4d", 10).state_dict()) == keys


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
