import pytest
import sharded_cases
import torch
import torch.distributed as dist
from pruning_cases import network, train, zeros_are_held
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from helpers.errors import HelpersError
from helpers.sparsity import (
    apply_masks_,
    hold_masks,
    masks_2to4,
    masks_of,
    prune_2to4_,
    removed_weights,
    restore_weights_,
    verify_model,
)


def optimizers():
    return {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.1),
        "nesterov": lambda p: torch.optim.SGD(p, 0.02, 0.9, weight_decay=0.1, nesterov=True),
        "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
        "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    }


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
        hold_masks(optimizer, parallel, masks)
        train(parallel, optimizer)
        assert zeros_are_held(model, masks)
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


def test_masks_are_held_on_each_of_two_ranks(tmp_path):
    torch.multiprocessing.spawn(sharded_cases.check_all, (str(tmp_path / "store"),), nprocs=2)


# Optimizers of other kinds.


class Wrapped(torch.optim.Optimizer):
    """As Accelerate's: an optimizer by type that has not been set up as one."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure=None):
        return self.optimizer.step(closure)


class SlowWeights:
    """As Lookahead: after its step the weights are a mean that remembers the dense ones."""

    def __init__(self, fast):
        self._fast = fast
        self.param_groups = fast.param_groups
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def zero_grad(self, set_to_none=True):
        self._fast.zero_grad(set_to_none)

    def step(self, closure=None):
        self._fast.step(closure)
        parameters = [p for group in self.param_groups for p in group["params"]]
        for slow, parameter in zip(self.slow, parameters, strict=True):
            slow.lerp_(parameter.detach(), 0.5)
            parameter.data.copy_(slow)


class Chained:
    """Several optimizers as one."""

    def __init__(self, *optimizers):
        self.optimizers = optimizers
        self.param_groups = [group for each in optimizers for group in each.param_groups]

    def zero_grad(self):
        for each in self.optimizers:
            each.zero_grad()

    def step(self):
        for each in self.optimizers:
            each.step()


class SignDescent:
    """An optimizer that is none of PyTorch's."""

    def __init__(self, parameters):
        self.param_groups = [{"params": list(parameters)}]

    def zero_grad(self):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None

    def step(self):
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter -= 0.01 * parameter.grad.sign()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)


def wrapping_optimizers():
    return {
        "accelerate": lambda model: Wrapped(sgd(model)),
        "twice": lambda model: Wrapped(Wrapped(sgd(model))),
        "slow weights": lambda model: SlowWeights(sgd(model)),
        "slow weights in accelerate": lambda model: Wrapped(SlowWeights(sgd(model))),
        "chained": lambda model: Chained(
            torch.optim.SGD(model[:4].parameters(), lr=0.1),
            torch.optim.AdamW(model[4:].parameters()),
        ),
        "none of PyTorch's": lambda model: SignDescent(model.parameters()),
    }


@pytest.mark.parametrize("make", wrapping_optimizers().values(), ids=wrapping_optimizers())
def test_zeros_are_held_by_an_optimizer_that_wraps_others_until_they_are_released(make):
    model = network()
    optimizer = make(model)
    masks = prune_2to4_(model)
    handle = hold_masks(optimizer, model, masks, check_every=1)
    for _ in range(3):
        train(model, optimizer, steps=1)
        assert zeros_are_held(model, masks)
    handle.remove()
    train(model, optimizer, steps=1)
    assert not zeros_are_held(model, masks)


def test_the_zeros_are_put_back_if_only_the_inner_optimizer_steps():
    model = network()
    inner = sgd(model)
    masks = prune_2to4_(model)
    hold_masks(Wrapped(inner), model, masks)
    train(model, inner)
    assert zeros_are_held(model, masks)


def test_a_scheduler_may_wrap_the_step_of_a_wrapping_optimizer_before_and_after():
    for holds_first in (True, False):
        model = network()
        optimizer = Wrapped(sgd(model))
        optimizer.defaults = optimizer.optimizer.defaults
        masks = prune_2to4_(model)
        if holds_first:
            hold_masks(optimizer, model, masks)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        if not holds_first:
            hold_masks(optimizer, model, masks)
        for _ in range(2):
            train(model, optimizer, steps=1)
            scheduler.step()
            assert zeros_are_held(model, masks)


def test_a_wrapped_optimizer_returns_the_loss_of_its_closure():
    model = network()
    optimizer = Wrapped(torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2))
    masks = prune_2to4_(model)
    hold_masks(optimizer, model, masks)
    images = torch.randn(4, 1, 8, 8)

    def closure():
        optimizer.zero_grad()
        loss = model(images).square().mean()
        loss.backward()
        return loss

    expected = closure().item()
    assert optimizer.step(closure).item() == pytest.approx(expected)
    assert zeros_are_held(model, masks)


@pytest.mark.parametrize(
    "options",
    [{"foreach": True}, {"fused": True}, {"foreach": False}, {"amsgrad": True}, {"maximize": True}],
)
def test_zeros_are_held_with_every_implementation_of_an_optimizer(options):
    model = network()
    masks = prune_2to4_(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, **options)
    hold_masks(optimizer, model, masks)
    train(model, optimizer)
    assert zeros_are_held(model, masks)


@pytest.mark.parametrize("optimizer", [None, "sgd", torch.optim.SGD, nn.Linear(2, 2)])
def test_what_is_no_optimizer_is_refused_at_the_call(optimizer):
    model = network()
    with pytest.raises(HelpersError, match="is no optimizer"):
        hold_masks(optimizer, model, prune_2to4_(model))


def test_an_optimizer_of_other_weights_is_refused_at_the_call():
    model = network()
    masks = prune_2to4_(model)
    copies = [parameter.detach().double() for parameter in model.parameters()]
    for other in (sgd(network()), torch.optim.SGD(copies), Wrapped(torch.optim.SGD(copies))):
        with pytest.raises(HelpersError, match=r"steps none of the weights that the masks"):
            hold_masks(other, model, masks)


def test_masks_may_be_held_for_frozen_weights_too():
    model = network()
    masks = prune_2to4_(model)
    model[3].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    hold_masks(optimizer, model, masks, check_every=1)
    train(model, optimizer)
    assert zeros_are_held(model, masks)


def test_the_same_masks_may_be_held_twice_and_other_masks_may_not():
    model = network()
    optimizer = sgd(model)
    masks = prune_2to4_(model)
    first, second = (hold_masks(optimizer, model, masks) for _ in range(2))
    other = {name: ~mask for name, mask in masks.items()}
    with pytest.raises(HelpersError, match=r"holds another mask for 3\.weight already.*remove"):
        hold_masks(optimizer, model, other)
    with pytest.raises(HelpersError, match="another mask"):
        hold_masks(Wrapped(optimizer), model, other)
    first.remove()
    train(model, optimizer, steps=1)
    assert zeros_are_held(model, masks)
    second.remove()
    second.remove()
    apply_masks_(model, other)
    hold_masks(optimizer, model, other)
    train(model, optimizer, steps=1)
    assert zeros_are_held(model, other)


def test_two_models_with_the_same_names_may_share_an_optimizer():
    models = network(), network()
    with torch.no_grad():
        models[1][3].weight.neg_().add_(0.01)
    optimizer = torch.optim.SGD([p for model in models for p in model.parameters()], lr=0.1)
    held = [prune_2to4_(model) for model in models]
    for model, masks in zip(models, held, strict=True):
        hold_masks(optimizer, model, masks)
    for model in models:
        model(torch.randn(4, 1, 8, 8)).square().mean().backward()
    optimizer.step()
    assert all(map(zeros_are_held, models, held))


def test_holding_no_masks_is_said(caplog):
    model = nn.Sequential(nn.Linear(6, 6))
    hold_masks(sgd(model), model, {})
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("No masks are held")


@pytest.mark.parametrize("masks", [None, ["3.weight"], {"3.weight": None}, {"3": torch.ones(1)}])
def test_what_is_no_dictionary_of_masks_is_refused(masks):
    model = network()
    with pytest.raises(
        HelpersError, match=r"masks are a|mask of 3\.weight is of type|no parameter"
    ):
        hold_masks(sgd(model), model, masks)
    with pytest.raises(HelpersError):
        apply_masks_(model, masks)


def test_the_masks_are_ready_before_the_first_step():
    """In the graph of a GPU, for instance, nothing may be allocated or copied from the host."""
    model = network()
    masks = prune_2to4_(model)
    optimizer = sgd(model)
    hold_masks(optimizer, model, masks)
    for mask in masks.values():
        mask.fill_(True)
    train(model, optimizer, steps=1)
    assert verify_model(model).query("eligible").is_2to4.all()


def test_a_model_that_shards_itself_is_resharded_at_every_step():
    class Sharded(nn.Sequential):
        """As FSDP2's: `reshard` brings back the parameters that the optimizer steps."""

        resharded = 0

        def reshard(self):
            self.resharded += 1

        def unshard(self):
            raise AssertionError("nothing asks for it")

    model = Sharded(nn.Linear(8, 8))
    optimizer = sgd(model)
    hold_masks(optimizer, model, prune_2to4_(model))
    before = model.resharded
    model(torch.randn(2, 8)).sum().backward()
    optimizer.step()
    assert model.resharded == before + 1
