import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from helpers.errors import HelpersError
from helpers.layers import layer_weights, model_inputs
from helpers.measurement.trace import trace_kernels
from helpers.parameters import checked_weight, no_grad_for, plain_name, unwrapped
from helpers.sparsity import (
    apply_masks_,
    compress_2to4,
    eligible_weights,
    hold_masks,
    is_2to4,
    load_compressed,
    mask_2to4,
    masks_2to4,
    masks_of,
    permute_channels_,
    prune_2to4_,
    prune_sparsegpt_,
    removed_weights,
    restore_weights_,
    save_compressed,
    sparsity_report,
    verify_checkpoint,
    verify_model,
)

EXAMPLE = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))


@pytest.fixture
def one_rank(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


# What can be asked of a model.


MASKS = masks_2to4(network())
REMOVED = removed_weights(network(), MASKS)


def hold(model, tmp_path):
    parameters = [*model.parameters(), nn.Parameter(torch.zeros(1))]
    return hold_masks(torch.optim.SGD(parameters, lr=0.1), model, MASKS)


def save_and_verify(model, tmp_path):
    save_compressed(network(), tmp_path / "dense.safetensors")
    return verify_checkpoint(tmp_path / "dense.safetensors", model)


BY_SHAPE = {
    "eligible_weights": lambda model, tmp_path: eligible_weights(model),
    "trace_kernels": lambda model, tmp_path: trace_kernels(
        model, model_inputs(model, example=EXAMPLE)
    ),
    "verify_checkpoint": save_and_verify,
}
BY_NUMBERS = {
    "prune_2to4_": lambda model, tmp_path: prune_2to4_(model),
    "masks_2to4": lambda model, tmp_path: masks_2to4(model),
    "masks_of": lambda model, tmp_path: masks_of(model),
    "apply_masks_": lambda model, tmp_path: apply_masks_(model, MASKS),
    "hold_masks": hold,
    "removed_weights": lambda model, tmp_path: removed_weights(model, MASKS),
    "restore_weights_": lambda model, tmp_path: restore_weights_(model, MASKS, REMOVED),
    "sparsity_report": lambda model, tmp_path: sparsity_report(model, example=EXAMPLE),
    "verify_model": lambda model, tmp_path: verify_model(model),
    "permute_channels_": lambda model, tmp_path: permute_channels_(model, EXAMPLE),
    "prune_sparsegpt_": lambda model, tmp_path: prune_sparsegpt_(model, [EXAMPLE]),
    "save_compressed": lambda model, tmp_path: save_compressed(
        model, tmp_path / "model.safetensors"
    ),
}
ALL = BY_SHAPE | BY_NUMBERS


class Packed(Tensor):
    """As those of torchao: a tensor by type whose numbers are in another one."""

    @staticmethod
    def __new__(cls, packed):
        return Tensor._make_wrapper_subclass(cls, packed.shape, dtype=torch.float32)

    def __init__(self, packed):
        self.packed = packed

    @classmethod
    def __torch_dispatch__(cls, func, types, args, kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].packed)
        raise NotImplementedError(f"{func} is not implemented for packed tensors")


def packed():
    model = network()
    weight = Packed(model[0].weight.detach().to(torch.int8))
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    return model


def placeholders():
    """As ZeRO-3 leaves a model between two uses."""
    model = network()
    for parameter in model.parameters():
        parameter.data = torch.empty(0)
    return model


def shards():
    """As FSDP1 with several ranks."""
    model = network()
    for parameter in model.parameters():
        parameter.data = parameter.detach().flatten()[: parameter.numel() // 2]
    return model


def offloaded():
    model = network()
    model[0].to("meta")
    return model


def freed():
    model = network()
    model[0].weight.untyped_storage().resize_(0)
    return model


def sparse_layout():
    model = network()
    model[0].weight = nn.Parameter(model[0].weight.detach().to_sparse(), requires_grad=False)
    return model


def quantized_weight():
    model = network()
    weight = torch.quantize_per_tensor(model[0].weight.detach(), 0.1, 0, torch.qint8)
    model[0].weight = nn.Parameter(weight, requires_grad=False)
    return model


WITHOUT_SHAPE = {
    "lazy": (
        lambda: nn.Sequential(nn.LazyLinear(32), nn.ReLU(), nn.LazyLinear(16)),
        r"0\.weight has no shape yet|0\.weight .*a lazy|0\.weight has no shape in the model yet",
    ),
    "placeholders": (placeholders, r"0\.weight is a placeholder|0\.weight is 32x16 in the file"),
}
WITHOUT_NUMBERS = {
    "meta": (offloaded, r"0\.weight .*on the device `meta`"),
    "freed": (freed, r"memory of 0\.weight has been freed|0\.weight .*memory has been freed"),
    "sparse": (sparse_layout, r"0\.weight .*torch\.sparse_coo"),
    "packed": (packed, r"0\.weight .*of type Packed"),
    "quantized": (quantized_weight, r"0\.weight .*quantized"),
}


@pytest.mark.parametrize("call", ALL)
@pytest.mark.parametrize("kind", WITHOUT_SHAPE)
def test_a_weight_whose_shape_is_not_known_is_an_error_at_every_call(kind, call, tmp_path):
    make, message = WITHOUT_SHAPE[kind]
    with pytest.raises(HelpersError, match=message):
        ALL[call](make(), tmp_path)


@pytest.mark.parametrize("call", BY_NUMBERS)
@pytest.mark.parametrize("kind", WITHOUT_NUMBERS)
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor")
def test_a_weight_without_numbers_of_its_own_is_an_error_at_every_call(kind, call, tmp_path):
    make, message = WITHOUT_NUMBERS[kind]
    with pytest.raises(HelpersError, match=message):
        ALL[call](make(), tmp_path)


def test_weights_that_hooks_load_in_time_are_not_counted_as_nothing():
    """As Accelerate's, which bring offloaded weights back for the time of a call."""
    model = network()
    numbers = model[0].weight.detach().clone()
    model[0].to("meta")

    def load(layer, inputs):
        layer.weight = nn.Parameter(numbers)
        layer.bias = nn.Parameter(torch.zeros(32))

    model[0].register_forward_pre_hook(load)
    with pytest.raises(HelpersError, match=r"^0\.weight has no numbers.*offloaded"):
        sparsity_report(model, example=EXAMPLE)
    assert model[0].weight.is_meta


def test_a_shard_is_an_error_that_says_how_to_gather_it():
    for call in (prune_2to4_, verify_model, lambda model: apply_masks_(model, MASKS)):
        with pytest.raises(HelpersError, match=r"0\.weight .*shape \(256,\).*summon_full_params"):
            call(shards())


def test_a_weight_that_is_left_out_may_be_of_any_kind():
    for make in (packed, offloaded, placeholders):
        model = make()
        if make is placeholders:
            model[2] = nn.Linear(32, 16)
        assert list(prune_2to4_(model, exclude="0")) == ["2.weight"]


@pytest.mark.parametrize("weight", [None, 1.0, "weight"])
def test_a_layer_whose_weight_is_no_tensor_is_an_error(weight):
    with pytest.raises(HelpersError, match=r"^fc\.weight is no tensor"):
        checked_weight(weight, "fc.weight")


# Models whose layers are gone.


def scripted():
    return torch.jit.script(network())


def traced():
    return torch.jit.trace(network(), EXAMPLE)


def frozen():
    return torch.jit.freeze(torch.jit.script(network().eval()))


def with_a_scripted_part():
    return nn.Sequential(frozen(), nn.Linear(16, 16))


def dynamically_quantized():
    return torch.ao.quantization.quantize_dynamic(network(), {nn.Linear})


def exported():
    return torch.export.export(network(), (EXAMPLE,)).module()


def unflattened():
    return torch.export.unflatten(torch.export.export(network(), (EXAMPLE,)))


CLOSED = {
    scripted: "TorchScript",
    traced: "TorchScript",
    frozen: "TorchScript",
    with_a_scripted_part: "TorchScript",
    dynamically_quantized: "packed for one kernel",
    exported: "as torch.export makes it",
    unflattened: "as torch.export makes it",
}
# Masks and a state_dict need names alone.
BY_NAME = {"apply_masks_", "hold_masks", "removed_weights", "restore_weights_", "save_compressed"}


@pytest.fixture(scope="module")
def closed():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript and its quantization are deprecated
        return {make: make() for make in CLOSED}


@pytest.mark.parametrize("call", [name for name in ALL if name not in BY_NAME])
@pytest.mark.parametrize("make", CLOSED)
def test_a_model_without_layers_is_an_error_and_never_without_weights(closed, make, call, tmp_path):
    with pytest.raises(HelpersError, match=CLOSED[make]):
        ALL[call](closed[make], tmp_path)


def test_masks_of_what_cannot_be_reached_are_an_error(closed):
    for make in (scripted, dynamically_quantized, with_a_scripted_part):
        with pytest.raises(HelpersError, match=CLOSED[make]):
            apply_masks_(closed[make], MASKS)


def test_a_model_that_has_become_constants_is_not_saved_as_an_empty_file(closed, tmp_path):
    with pytest.raises(HelpersError, match="no tensors to write"):
        save_compressed(closed[frozen], tmp_path / "frozen.safetensors")


def test_a_scripted_function_without_weights_is_no_obstacle():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        activation = torch.jit.script(nn.ReLU())
    assert list(prune_2to4_(nn.Sequential(nn.Linear(16, 16), activation))) == ["0.weight"]


@pytest.mark.parametrize("model", [{}, None, lambda x: x, nn.Linear])
def test_what_is_no_model_is_an_error(model):
    with pytest.raises(HelpersError, match="is no model"):
        prune_2to4_(model)


# Wrappers.


def wrappers():
    return {
        "compile": torch.compile,
        "DataParallel": nn.DataParallel,
        "DDP": nn.parallel.DistributedDataParallel,
        "compiled DDP": lambda model: torch.compile(nn.parallel.DistributedDataParallel(model)),
    }


@pytest.mark.parametrize("wrap", wrappers().values(), ids=wrappers())
def test_a_wrapped_model_has_the_names_and_values_of_the_model_inside(wrap, one_rank, tmp_path):
    inside = network()
    model = wrap(inside)
    assert unwrapped(model) is inside
    report = sparsity_report(model, example=EXAMPLE)
    assert report.layers.equals(sparsity_report(inside, example=EXAMPLE).layers)
    masks = prune_2to4_(model)
    assert list(masks) == ["0.weight", "2.weight"]
    assert verify_model(model).is_2to4.all()
    assert verify_model(model).equals(verify_model(inside))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    hold_masks(optimizer, model, masks, check_every=1)
    inside(EXAMPLE).square().mean().backward()
    optimizer.step()
    assert all((inside.get_parameter(name)[~mask] == 0).all() for name, mask in masks.items())
    assert save_compressed(model, tmp_path / "model.safetensors") == list(masks)
    inside.load_state_dict(load_compressed(tmp_path / "model.safetensors"))
    assert verify_checkpoint(tmp_path / "model.safetensors", model).is_2to4.all()


def test_a_compiled_block_has_the_names_of_the_block():
    model = network()
    expected = list(layer_weights(model))
    model[0] = torch.compile(model[0])
    assert list(layer_weights(model)) == expected == list(prune_2to4_(model))
    apply_masks_(model, MASKS)


def test_only_the_names_of_wrappers_are_taken_out():
    name = "_orig_mod.layers._fsdp_wrapped_module.0._checkpoint_wrapped_module.fc.weight"
    assert plain_name(name) == "layers.0.fc.weight"
    assert plain_name("module.my_orig_mod.weight") == "module.my_orig_mod.weight"
    assert plain_name("") == ""


# Inference mode.


def in_inference_mode():
    with torch.inference_mode():
        return network()


def test_a_model_made_in_inference_mode_is_pruned_as_any_other():
    model, plain = in_inference_mode(), network()
    masks, expected = prune_2to4_(model), prune_2to4_(plain)
    assert all(torch.equal(masks[name], expected[name]) for name in expected)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert one.is_inference()
        assert torch.equal(one, other)
    restore_weights_(model, masks, REMOVED)
    assert torch.equal(model[0].weight, network()[0].weight)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: prune_sparsegpt_(model, [EXAMPLE]),
        lambda model: permute_channels_(model, EXAMPLE),
    ],
)
def test_sparsegpt_and_permutations_change_a_model_made_in_inference_mode(change):
    model, plain = in_inference_mode(), network()
    for each in (model, plain):
        with no_grad_for(each.parameters()):
            each[2].weight *= torch.arange(32)  # in this order 2:4 keeps little
    change(model)
    change(plain)
    assert not torch.equal(model[0].weight, network()[0].weight)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.detach(), other.detach())


def test_inference_mode_is_needed_only_for_tensors_made_in_it():
    with torch.inference_mode():
        made = torch.zeros(2)
    for tensors, expected in (([torch.zeros(2)], False), ([torch.zeros(2), made], True)):
        with no_grad_for(tensors):
            assert torch.is_inference_mode_enabled() is expected
            assert not torch.is_grad_enabled()


# Shards on one rank; `sharded_cases` has two.


@pytest.mark.filterwarnings("ignore:.*NO_SHARD")
def test_a_model_in_fsdp1_is_pruned_where_its_weights_are_whole(one_rank):
    from torch.distributed.fsdp import FullyShardedDataParallel

    for original in (True, False):
        wrapped = FullyShardedDataParallel(
            network(), use_orig_params=original, device_id=torch.device("cpu")
        )
        if not original:
            with pytest.raises(HelpersError, match=r"one flat parameter.*summon_full_params"):
                prune_2to4_(wrapped)
        with FullyShardedDataParallel.summon_full_params(wrapped):
            masks = prune_2to4_(wrapped)
        assert list(masks) == ["0.weight", "2.weight"]
        state = wrapped.state_dict()
        assert all((state[name][~mask] == 0).all() for name, mask in masks.items())
        optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
        with pytest.raises(HelpersError, match=r"fully_shard|one flat parameter"):
            hold_masks(optimizer, wrapped, masks)


def test_what_fsdp2_has_gathered_is_given_back_before_it_is_pruned(one_rank):
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=one_rank)
    with torch.no_grad():
        model(EXAMPLE)  # the root keeps its weights gathered
    masks = prune_2to4_(model)
    model.unshard()
    for name, mask in masks.items():
        assert (model.get_parameter(name)[~mask.full_tensor()] == 0).all()


@pytest.mark.parametrize("call", [mask_2to4, is_2to4, compress_2to4])
def test_a_single_weight_must_lie_on_this_rank(call, one_rank):
    weight = prune_2to4_(network())["0.weight"].float()
    sharded = distribute_tensor(weight, one_rank, [Shard(0)])
    with pytest.raises(HelpersError, match=r"weight is a DTensor.*\.full_tensor\(\)"):
        call(sharded)
    call(sharded.to_local())
    call(sharded.full_tensor())


@pytest.mark.parametrize("call", ["permute_channels_", "prune_sparsegpt_", "trace_kernels"])
def test_what_needs_a_whole_model_says_so(call, one_rank, tmp_path):
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=one_rank)
    with pytest.raises(HelpersError, match=r"0\.weight is sharded"):
        ALL[call](model, tmp_path)


def test_the_state_of_a_sharded_model_is_not_saved_in_part(one_rank, tmp_path):
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=one_rank)
    with pytest.raises(HelpersError, match=r"0\.weight .*DTensor.*full_tensor"):
        save_compressed(model, tmp_path / "model.safetensors")
    assert not list(tmp_path.glob("*.safetensors"))


def test_looking_at_weights_changes_nothing():
    model = network()
    before = copy.deepcopy(model.state_dict())
    layer_weights(torch.compile(model))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
