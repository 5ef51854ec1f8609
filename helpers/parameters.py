"""Where the weights of a live model are: inside wrappers, in shards, or nowhere yet.

A weight need not be a plain tensor in memory. FSDP2 and tensor parallelism keep a part of it on
each rank, DeepSpeed and lazy layers only a placeholder, quantization a packed form, and
`torch.jit` and `torch.export` leave no layer that it belongs to. Everything that reads or writes
the weights of a model looks at them through this module, which returns what can be handled and
raises one error for the rest. First used in `02_prune_2_4.ipynb`.
"""

import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from helpers.errors import InputError

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

# Where PyTorch's wrappers keep the module that they wrap. They pass attributes on, so that
# `get_parameter` finds a weight by its name without these parts too.
_WRAPPED = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})

# Operators that multiply, in the text of a TorchScript graph.
_SCRIPTED_PRODUCT = re.compile(
    r"(aten|prepacked|quantized|mkldnn\w*)::\w*(conv|linear|matmul|mm|einsum|bilinear|lstm|gru)"
)


# --- models ---


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of `torch.compile`, DataParallel and DDP.

    The model inside shares its weights with the wrapper, and has their names without a prefix.

    Raises:
        InputError: this is no `nn.Module`.
    """
    while True:
        if not isinstance(model, nn.Module):
            raise InputError(
                f"An object of type {type(model).__name__} is no model. Give an nn.Module: of an "
                "exported program or a state_dict the model that it comes from."
            )
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in model._modules:
            model = model.get_submodule("_orig_mod")
        else:
            return model


def plain_name(name: str) -> str:
    """Return the name of a parameter or a layer without the parts that wrappers put in."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPED)


def named_layers(
    model: nn.Module, remove_duplicate: bool = True
) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module of a model by its name, as if nothing in the model were wrapped.

    Weights that FSDP2 has gathered for a forward pass are given back first: what is written
    to the gathered ones is lost.

    Args:
        model: any model.
        remove_duplicate: whether a module that the model has twice comes once.

    Raises:
        InputError: the weights of a layer cannot be reached.
    """
    model = unwrapped(model)
    reshard_(fully_sharded(model))
    for name, layer in model.named_modules(remove_duplicate=remove_duplicate):
        name = plain_name(name)
        if reason := _why_closed(layer):
            raise InputError(f"{name or 'The model'} {reason}")
        yield name, layer


def _why_closed(layer: nn.Module) -> str:
    """Return why the weights in a layer cannot be told or changed; empty if they can."""
    kind = type(layer).__name__
    if isinstance(layer, torch.jit.ScriptModule):
        if any(parameter.dim() > 1 for parameter in layer.parameters()) or (
            hasattr(layer, "inlined_graph") and _SCRIPTED_PRODUCT.search(str(layer.inlined_graph))
        ):
            return (
                f"is a program of TorchScript ({kind}), which no longer has PyTorch's layers. "
                "Use the model from before torch.jit, and script it afterwards."
            )
        return ""
    if any(isinstance(value, torch.ScriptObject) for value in vars(layer).values()):
        return (
            f"keeps its weights packed for one kernel ({kind}), as quantized layers do. Use the "
            "model from before it was quantized or compiled."
        )
    graph = getattr(layer, "graph", None)
    if isinstance(graph, fx.Graph) and any(
        isinstance(node.target, torch._ops.OpOverload) for node in graph.nodes
    ):
        return (
            f"is a graph of operators ({kind}), as torch.export makes it, which no longer has "
            "PyTorch's layers. Use the model from before it was exported."
        )
    if "_flat_param" in layer._parameters:
        return f"keeps its weights in one flat parameter. {_GATHER}"
    return ""


def fully_sharded(model: nn.Module) -> list[Any]:
    """Return the modules of a model that FSDP2's `fully_shard` was applied to."""
    return [
        module
        for module in model.modules()
        if hasattr(type(module), "reshard") and hasattr(type(module), "unshard")
    ]


def reshard_(modules: Iterable[Any]) -> None:
    """Let modules of `fully_sharded` go back to their shards, if they have gathered them."""
    for module in modules:
        module.reshard()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Gather the weights that FSDP2 has sharded, on all ranks, and then give them back."""
    modules = fully_sharded(model)
    for module in modules:
        module.unshard()
    try:
        yield
    finally:
        reshard_(modules)


# --- their weights ---

_GATHER = (
    "Gather it first, with deepspeed.zero.GatheredParameters or "
    "FullyShardedDataParallel.summon_full_params, or do this before the model is wrapped."
)


def checked_weight(weight: object, name: str) -> Tensor:
    """Return a weight if it is a tensor whose shape is the weight's and whose kind is known.

    It may still have no numbers, on the device `meta`: see `require_numbers`.

    Raises:
        InputError: it is none, or a lazy or sharded placeholder, or a tensor of another library
            that wraps its numbers.
    """
    # Almost always so; it keeps the cost of a look at a weight below a microsecond.
    if type(weight) is nn.Parameter and weight.dim() > 1 and not weight.is_quantized:
        return weight
    if not isinstance(weight, Tensor):
        raise InputError(
            f"{name} is no tensor, but of type {type(weight).__name__}. Leave its layer out with "
            "`exclude`, or give the model from before it was converted."
        )
    _require_shape(weight, name)
    if weight.dim() < 2:
        raise _elsewhere(weight, name)
    local = local_part(weight)
    if local.is_quantized or wraps_numbers(local):
        kind = "quantized" if local.is_quantized else f"of type {type(local).__name__}"
        raise InputError(
            f"{name} is {kind}, and no plain tensor whose numbers can be read and changed. Do this "
            "before the weights are converted, or leave this one out with `exclude`."
        )
    return weight


def _require_shape(parameter: Tensor, name: str) -> None:
    if is_lazy(parameter):
        raise InputError(
            f"{name} has no shape yet, because its layer is lazy. Run the model once first."
        )


def require_no_placeholder(parameter: Tensor, name: str) -> None:
    """Raise an error for a parameter without elements, whose numbers are kept elsewhere."""
    if parameter.shape == (0,):
        raise _elsewhere(parameter, name)


def _elsewhere(parameter: Tensor, name: str) -> InputError:
    return InputError(
        f"{name} is a placeholder or a shard of shape {tuple(parameter.shape)} for numbers that "
        f"are kept elsewhere, as DeepSpeed's ZeRO-3 and FSDP1 do. {_GATHER}"
    )


def wraps_numbers(tensor: Tensor) -> bool:
    """Return whether a tensor computes in a way of its own, as those of torchao and DTensors do."""
    return type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__


def require_numbers(weight: Tensor, name: str) -> None:
    """Raise an error for a tensor whose numbers are not in its own memory, one after another."""
    checked = checked_weight(weight, name) if weight.dim() > 1 or is_lazy(weight) else weight
    if checked.is_meta:
        raise InputError(
            f"{name} is on the device `meta`, without numbers. Load weights first, or bring back "
            "those that were offloaded."
        )
    if checked.layout != torch.strided:
        raise InputError(
            f"{name} is a {checked.layout} tensor, and the pattern is one of dense tensors. "
            "Convert it with .to_dense()."
        )
    if is_freed(checked):
        raise InputError(
            f"The memory of {name} has been freed, as sharded training does between two uses. "
            f"{_GATHER}"
        )


def is_freed(tensor: Tensor) -> bool:
    """Return whether the memory of a tensor was given back, so that reading it would crash."""
    if tensor.layout != torch.strided:  # a sparse tensor has no memory of its own
        return False
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def require_runnable(parameters: Mapping[str, Tensor], inputs: Iterable[Tensor]) -> None:
    """Raise an error if a parameter has no numbers while the inputs of its model have some.

    Hooks may load it in time, as those of Accelerate do for offloaded weights, but the product
    is then one of another tensor.
    """
    with_numbers = any(not each.is_meta for each in inputs)
    for name, parameter in parameters.items():
        _require_shape(parameter, name)
        if is_freed(parameter) or (parameter.is_meta and with_numbers):
            raise InputError(
                f"{name} has no numbers, and so the model cannot run: it is on the device `meta`, "
                "or its memory has been freed. Load weights first, or bring back those that were "
                "offloaded."
            )


@contextmanager
def no_grad_for(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Compute with tensors, and change them in place, without a gradient.

    Tensors that were made in inference mode can be changed in that mode alone.
    """
    inference = any(tensor.is_inference() for tensor in tensors)
    with torch.inference_mode() if inference else torch.no_grad():
        yield


# --- shards ---


def is_dtensor(tensor: Tensor) -> TypeGuard["DTensor"]:
    """Return whether a tensor is a DTensor, of which each rank holds a part."""
    if type(tensor) is nn.Parameter or type(tensor) is Tensor:
        return False
    # Without this module there is no such tensor, and loading it takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor on this rank: a shard of a DTensor, else the tensor."""
    return tensor._local_tensor if is_dtensor(tensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return all of a tensor; of a DTensor by communication, in which all ranks must take part."""
    return tensor.full_tensor().detach() if is_dtensor(tensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """Return the part of a tensor that belongs to the local part of another of the same shape.

    No rank sends anything, unless `tensor` is a DTensor with other placements.
    """
    if not is_dtensor(like):
        return whole(tensor)
    from torch.distributed.tensor import distribute_tensor

    if is_dtensor(tensor):
        return local_part(tensor.redistribute(like.device_mesh, like.placements))
    device = local_part(like).device
    mesh, placements = like.device_mesh, like.placements
    return local_part(distribute_tensor(tensor.to(device), mesh, placements, src_data_rank=None))


def from_shard(local: Tensor, like: Tensor) -> Tensor:
    """Return a tensor placed as another one, given the part of it on this rank."""
    if not is_dtensor(like):
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def require_whole_groups(weight: Tensor, name: str, dim: int) -> None:
    """Raise an error if four numbers of a DTensor along a dimension may lie on two ranks."""
    if not is_dtensor(weight):
        return
    along = [n for n, each in enumerate(weight.placements) if getattr(each, "dim", None) == dim]
    ranks = [weight.device_mesh.size(n) for n in along]
    # PyTorch gives each rank as many as the first one, and the last ranks what is left.
    aligned = len(ranks) == 1 and -(-weight.shape[dim] // ranks[0]) % 4 == 0
    if along and not (aligned and weight.placements[along[0]].is_shard()):
        raise InputError(
            f"{name} is sharded along its input channels (dimension {dim}), and a group of four "
            "may lie on two ranks. Shard it along another dimension, or prune it before."
        )


def require_local(tensor: Tensor, name: str) -> None:
    """Raise an error for a DTensor where a tensor in the memory of this rank is needed."""
    if is_dtensor(tensor):
        raise InputError(
            f"{name} is a DTensor, of which each rank holds a part. Give the part, .to_local(), or "
            "all of it, .full_tensor()."
        )


def require_unsharded(weight: Tensor, name: str) -> None:
    """Raise an error for a weight of a model that is sharded."""
    if is_dtensor(weight) or _is_gathered(weight):
        raise InputError(
            f"{name} is sharded: each rank keeps a part of it, and this needs a model that is "
            "whole. Do it before the model is sharded."
        )


def require_lasting(weight: Tensor, name: str) -> None:
    """Raise an error for a weight that is put together only for a while, from shards."""
    if _is_gathered(weight):
        raise InputError(
            f"{name} is a view of what DeepSpeed's ZeRO-3 or FSDP1 keeps in shards, so the zeros "
            "cannot be put back after a step. Shard the model with FSDP2's fully_shard."
        )


def _is_gathered(weight: Tensor) -> bool:
    # How DeepSpeed and FSDP1 mark the parameters that they move to and from their shards.
    return hasattr(weight, "ds_id") or hasattr(weight, "_fsdp_flattened")
