"""Masks over a whole model: making them, pruning with them, and back to dense.

A model's masks are a dictionary from the names of its weights, as in the `state_dict` of the
model without wrappers, to boolean tensors that are true where the weight is kept. The mask of
a DTensor, which FSDP2 and tensor parallelism shard a weight into, is one that is sharded alike.
Explained in `02_prune_2_4.ipynb`.
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor, nn

from helpers.errors import InputError
from helpers.layers import Example, LayerWeight, layer_weights
from helpers.parameters import (
    checked_weight,
    from_shard,
    fully_sharded,
    local_part,
    no_grad_for,
    require_numbers,
    require_whole_groups,
    reshard_,
    shard_like,
    unwrapped,
    whole,
)
from helpers.sparsity.eligibility import (
    Candidate,
    Selection,
    select_weights,
    why_none_eligible,
)
from helpers.sparsity.masks import is_2to4, mask_2to4

Masks = dict[str, Tensor]

_logger = logging.getLogger(__name__)


def masks_2to4(
    model: nn.Module,
    rules: str = "tensorrt",
    include: Selection = (),
    exclude: Selection = (),
    example: Example | None = None,
) -> Masks:
    """Return the mask by magnitude of every eligible weight; the model is left unchanged.

    Args:
        model: any model.
        rules: by which weights are eligible; see `helpers.sparsity.eligible_weights`.
        include: only these weights, by name pattern or type of layer.
        exclude: not these weights.
        example: what to call the model with, as `eligible_weights` takes it: without it, a weight
            that a module outside of its layer standardises is eligible too.

    Raises:
        InputError: there are no such rules, a pattern fits no weight, or a weight has NaN
            or infinite values.
    """
    return _masks(_eligible(select_weights(model, rules, include, exclude, example)))


def _eligible(candidates: Sequence[Candidate]) -> list[Candidate]:
    return [weight for weight in candidates if weight.eligible]


def _masks(weights: Sequence[LayerWeight]) -> Masks:
    parts = [_local_part(weight) for weight in weights]
    if any(part.device.type != "cpu" for part in parts):
        masks = [_mask(weight, part) for weight, part in zip(weights, parts, strict=True)]
        return _placed(weights, masks)
    # One piece of memory for all masks: for a large one NumPy asks for huge pages, and
    # fetching small pages takes longer than the masks do: the first call on ResNeXt-101 takes
    # 30 ms, and 70 ms with a piece for each mask.
    sizes = [part.numel() for part in parts]
    memory = torch.from_numpy(np.empty(sum(sizes), dtype=np.bool_)).split(sizes)
    # The kernels release Python's lock: on a CPU, as many weights at a time as cores.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        masks = list(pool.map(_mask, weights, parts, memory))
    return _placed(weights, masks)


def _local_part(weight: LayerWeight) -> Tensor:
    """Return the part of a weight on this rank, which must hold whole groups of four."""
    require_numbers(weight.tensor, weight.name)
    require_whole_groups(weight.tensor, weight.name, weight.input_dim)
    return local_part(weight.tensor)


def _mask(weight: LayerWeight, part: Tensor, memory: Tensor | None = None) -> Tensor:
    out = None if memory is None else memory.view(part.shape)
    return mask_2to4(part, weight.name, weight.input_dim, out)


def _placed(weights: Sequence[LayerWeight], masks: Sequence[Tensor]) -> Masks:
    """Return masks by name, each sharded as its weight is."""
    return {
        weight.name: from_shard(mask, weight.tensor)
        for weight, mask in zip(weights, masks, strict=True)
    }


def apply_masks_(model: nn.Module, masks: Masks) -> None:
    """Set the weights that the masks do not keep to zero, in place.

    Raises:
        InputError: the model has no weight of that name and shape or no numbers for it, or a
            mask is not boolean; nothing has been changed then.
    """
    parts = _local_parts(model, masks)
    with no_grad_for(weight for weight, _ in parts.values()):
        for weight, mask in parts.values():
            weight.mul_(mask)


def _local_parts(model: nn.Module, masks: Masks) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the memory of each weight with a mask, and the mask of it.

    Of a sharded weight they are the part on this rank.
    """
    weights = writable_parameters(model, masks)
    parts = {}
    for (name, mask), weight in zip(masks.items(), weights, strict=True):
        local = local_part(weight).detach()
        parts[name] = (local, shard_like(mask, weight).to(local.device))
    return parts


def writable_parameters(model: nn.Module, masks: Masks) -> list[nn.Parameter]:
    """Return the parameters that masks belong to, in their order, if they have numbers.

    Raises:
        InputError: as `masked_parameters` does, or a weight is on the device `meta` or has no
            other memory of its own.
    """
    reshard_(fully_sharded(unwrapped(model)))
    parameters = masked_parameters(model, masks)
    for name, parameter in zip(masks, parameters, strict=True):
        require_numbers(parameter, name)
    return parameters


def masked_parameters(model: nn.Module, masks: Masks) -> list[nn.Parameter]:
    """Return the parameters that masks belong to, in their order.

    Raises:
        InputError: the model has no such parameter, or it has another shape, or a mask is not
            boolean.
    """
    model = unwrapped(model)
    if not isinstance(masks, Mapping):
        raise InputError(
            f"The masks are a {type(masks).__name__}. Give the dictionary that prune_2to4_ "
            "returned."
        )
    weights = []
    for name, mask in masks.items():
        try:
            weight = _parameter(model, name)
        except (AttributeError, RuntimeError) as error:  # the latter from TorchScript
            layer_weights(model)  # may know why
            raise InputError(
                f"The model has no parameter {name}. Give masks that were made from this model, "
                "and the model itself rather than a wrapper."
            ) from error
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise InputError(
                f"The mask of {name} is of type {kind}, and masks are boolean tensors. "
                "Convert it with .bool()."
            )
        if type(weight) is not nn.Parameter or weight.shape != mask.shape:
            checked_weight(weight, name)  # which may know why
        if weight.shape != mask.shape:
            raise InputError(
                f"{name} has shape {tuple(weight.shape)}, and its mask {tuple(mask.shape)}. "
                "Give masks that were made from this model."
            )
        weights.append(weight)
    return weights


def _parameter(model: nn.Module, name: str) -> nn.Parameter:
    owner, _, attribute = name.rpartition(".")
    # ModelOpt's layers show a computed weight by the name of the parameter.
    parameter = model.get_submodule(owner)._parameters.get(attribute)
    return model.get_parameter(name) if parameter is None else parameter


def prune_2to4_(
    model: nn.Module,
    rules: str = "tensorrt",
    include: Selection = (),
    exclude: Selection = (),
    example: Example | None = None,
) -> Masks:
    """Set two of every four eligible weights to zero by magnitude, in place.

    If no weight is eligible, a warning is logged that says why.

    Args:
        model: any model.
        rules: by which weights are eligible; see `helpers.sparsity.eligible_weights`.
        include: only these weights, by name pattern or type of layer.
        exclude: not these weights.
        example: what to call the model with, as `eligible_weights` takes it: without it, a weight
            that a module outside of its layer standardises is pruned too.

    Returns:
        The masks, for `hold_masks`.

    Raises:
        InputError: as `masks_2to4` does; nothing has been changed then.

    Source: Mishra et al., arXiv 2104.08378.
    """
    candidates = select_weights(model, rules, include, exclude, example)
    masks = _masks(_eligible(candidates))
    if not masks:
        _logger.warning("Nothing was pruned: %s", why_none_eligible(model, rules, candidates))
    for weight in _eligible(candidates):
        for other, module in weight.tied_to:
            if not isinstance(module, type(weight.layer)):
                kind = type(module).__name__
                _logger.warning("%s (%s) is pruned too: it is %s", other, kind, weight.name)
    apply_masks_(model, masks)
    return masks


def masks_of(
    model: nn.Module,
    rules: str = "tensorrt",
    include: Selection = (),
    exclude: Selection = (),
    example: Example | None = None,
) -> Masks:
    """Return the masks of a model that has been pruned, from where its zeros are.

    A mask keeps two of every four even where more than two are zero.

    Args:
        model: the pruned model.
        rules: those it was pruned by.
        include: as it was pruned.
        exclude: as it was pruned.
        example: as it was pruned.

    Raises:
        InputError: an eligible weight is not 2:4.
    """
    weights = _eligible(select_weights(model, rules, include, exclude, example))
    for weight in weights:
        if not is_2to4(_local_part(weight), weight.input_dim):
            raise not_2to4(weight.name, "Prune the model first, or exclude this weight.")
    return _masks(weights)


def not_2to4(name: str, remedy: str) -> InputError:
    """Return the error of a weight that should be 2:4, and what to do about it."""
    return InputError(f"{name} is not 2:4: a group of four holds more than two non-zeros. {remedy}")


def removed_weights(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """Return the values that masks would set to zero; call it before pruning.

    They are half of each weight, or of the part of it on this rank, as one flat tensor: what
    `restore_weights_` needs.

    Raises:
        InputError: the model has no weight of a mask's name and shape, or a mask is not
            boolean.
    """
    parts = _local_parts(model, masks)
    return {name: weight[~mask] for name, (weight, mask) in parts.items()}


def restore_weights_(model: nn.Module, masks: Masks, removed: dict[str, Tensor]) -> None:
    """Put back the values that pruning has removed, in place; the others are left unchanged.

    Args:
        model: the pruned model.
        masks: those it was pruned with.
        removed: what `removed_weights` returned before.

    Raises:
        InputError: masks, values and the model's weights do not belong together; nothing
            has been changed then.
    """
    parts = _local_parts(model, masks)
    for name, (_, mask) in parts.items():
        zeros = int((~mask).sum())
        if name not in removed or removed[name].numel() != zeros:
            raise InputError(
                f"The mask of {name} removes {zeros} values, and `removed` does not hold as many "
                "for it. Give what removed_weights returned for the same masks."
            )
    with no_grad_for(weight for weight, _ in parts.values()):
        for name, (weight, mask) in parts.items():
            weight[~mask] = removed[name].to(weight)


_SHAPE = ".shape"


def pack_masks(masks: Masks) -> dict[str, Tensor]:
    """Return masks at one bit for each weight, as plain tensors that any format can store.

    Returns:
        For each mask its bits (uint8) under its name, and its shape (int64) under the name
        followed by `.shape`.
    """
    packed = {}
    for name, mask in masks.items():
        packed[name] = torch.from_numpy(np.packbits(whole(mask).cpu().numpy()))
        packed[name + _SHAPE] = torch.tensor(mask.shape, device="cpu")
    return packed


def unpack_masks(packed: Mapping[str, Tensor]) -> Masks:
    """Return the masks, on the CPU, that `pack_masks` was given.

    Raises:
        InputError: the shape of a mask is missing.
    """
    masks = {}
    for name in (name for name in packed if not name.endswith(_SHAPE)):
        if name + _SHAPE not in packed:
            raise InputError(f"{name}{_SHAPE} is missing. Give all that pack_masks returned.")
        shape = torch.Size(packed[name + _SHAPE].tolist())
        bits = np.unpackbits(packed[name].cpu().numpy(), count=shape.numel())
        masks[name] = torch.from_numpy(bits).view(torch.bool).view(shape)
    return masks
