"""What each of two ranks checks about a sharded model; `test_hold.py` starts the ranks."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from helpers.errors import HelpersError
from helpers.sparsity import (
    hold_masks,
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

IMAGES = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(8, 12, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(12 * 16, 16),
        nn.Linear(16, 3),  # two rows on one rank and one on the other
        nn.Linear(3, 1),  # not eligible, and nothing on the second rank
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        model(IMAGES).square().mean().backward()
        optimizer.step()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()


def same(model: nn.Module, expected: nn.Module) -> bool:
    """Return whether a sharded model has the weights of a whole one, up to rounding."""
    for (name, one), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(whole(one), other.detach(), msg=name)
    return True


def shards_are_pruned_as_the_whole_is(mesh) -> None:
    expected, model = network(), network()
    masks = prune_2to4_(expected)
    fully_shard(model[3], mesh=mesh)
    fully_shard(model, mesh=mesh)
    shards = prune_2to4_(model)
    assert list(shards) == list(masks) == ["0.weight", "3.weight", "4.weight"]
    assert all(torch.equal(whole(shards[name]), masks[name]) for name in masks)
    for name, parameter in model.named_parameters():
        assert torch.equal(whole(parameter), expected.get_parameter(name))
    tables = [verify_model(each).drop(columns="type") for each in (model, expected)]
    assert tables[0].equals(tables[1])
    read = masks_of(model)
    assert all(torch.equal(whole(read[name]), masks[name]) for name in masks)
    packed = unpack_masks(pack_masks(shards))
    assert all(torch.equal(packed[name], masks[name]) for name in masks)
    report, other = (sparsity_report(each, example=IMAGES) for each in (model, expected))
    assert report.layers.kept.equals(other.layers.kept)


def shards_are_held_as_the_whole_is(mesh) -> None:
    expected = network()
    masks = prune_2to4_(expected)
    optimizer = sgd(expected)
    hold_masks(optimizer, expected, masks)
    train(expected, optimizer)
    for pruned_first in (True, False):
        model = network()
        held = prune_2to4_(model) if pruned_first else {}
        fully_shard(model, mesh=mesh)
        held = held or prune_2to4_(model)
        optimizer = sgd(model)
        handle = hold_masks(optimizer, model, held, check_every=1)
        train(model, optimizer)
        assert same(model, expected)
        handle.remove()
        train(model, optimizer)
        assert not verify_model(model).query("eligible").is_2to4.any()


def gathered_weights_are_no_way_around_the_masks(mesh) -> None:
    model = network()
    fully_shard(model, mesh=mesh)
    masks = prune_2to4_(model)
    optimizer = sgd(model)
    hold_masks(optimizer, model, masks)
    model.set_reshard_after_backward(False)
    train(model, optimizer)
    model.reshard()
    assert verify_model(model).query("eligible").is_2to4.all()


def an_optimizer_of_the_weights_before_sharding_is_refused(mesh) -> None:
    model = network()
    masks = prune_2to4_(model)
    optimizer = sgd(model)
    fully_shard(model, mesh=mesh)
    with pytest.raises(HelpersError, match=r"steps none of the weights.*after fully_shard"):
        hold_masks(optimizer, model, masks)


def what_was_removed_from_shards_is_put_back(mesh) -> None:
    model = network()
    fully_shard(model, mesh=mesh)
    masks = masks_2to4(model)
    removed = removed_weights(model, masks)
    prune_2to4_(model)
    restore_weights_(model, masks, removed)
    assert same(model, network())


def shards_along_the_input_channels_need_whole_groups_of_four(mesh) -> None:
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    for width in (16, 12):  # eight of sixteen channels on each rank, or six of twelve
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 4))
        weight = model[2].weight.detach().clone()
        parallelize_module(model, mesh, plan)
        if width == 12:
            with pytest.raises(HelpersError, match=r"^2\.weight is sharded along its input"):
                prune_2to4_(model)
            masks = prune_2to4_(model, exclude="2")
            assert list(masks) == ["0.weight"]
        else:
            masks = prune_2to4_(model)
            assert torch.equal(whole(masks["2.weight"]), mask_2to4(weight))
            assert torch.equal(whole(model[2].weight), weight * mask_2to4(weight))


def a_shard_of_fsdp1_is_no_weight(mesh) -> None:
    model = FullyShardedDataParallel(network(), use_orig_params=True, device_id=torch.device("cpu"))
    masks = masks_2to4(network())
    for call in (
        lambda: prune_2to4_(model),
        lambda: verify_model(model),
        lambda: hold_masks(sgd(model), model, masks),
    ):
        with pytest.raises(HelpersError, match=r"0\.weight .*summon_full_params"):
            call()
    with FullyShardedDataParallel.summon_full_params(model):
        pruned = prune_2to4_(model)
        with pytest.raises(HelpersError, match=r"0\.weight is a view"):
            hold_masks(sgd(model), model, masks)
    assert all(torch.equal(pruned[name], masks[name]) for name in masks)
    with FullyShardedDataParallel.summon_full_params(model, writeback=False):
        assert verify_model(model).query("eligible").is_2to4.all()


CASES = (
    shards_are_pruned_as_the_whole_is,
    shards_are_held_as_the_whole_is,
    gathered_weights_are_no_way_around_the_masks,
    an_optimizer_of_the_weights_before_sharding_is_refused,
    what_was_removed_from_shards_is_put_back,
    shards_along_the_input_channels_need_whole_groups_of_four,
    a_shard_of_fsdp1_is_no_weight,
)


def check_all(rank: int, store: str) -> None:
    """Run every case as one of two ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    try:
        for case in CASES:
            case(init_device_mesh("cpu", (2,)))
    finally:
        dist.destroy_process_group()
