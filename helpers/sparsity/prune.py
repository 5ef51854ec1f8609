"""Masks over a whole model, and keeping them while it trains.

A model's masks are a dictionary from the names of its weights, as in `state_dict`, to
boolean tensors that are true where the weight is kept. Explained in `02_prune_2_4.ipynb`
and `03_retrain.ipynb`.
"""

import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from helpers.errors import InputError
from helpers.layers import LayerWeight, layer_weights
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
    model: nn.Module, rules: str = "tensorrt", include: Selection = (), exclude: Selection = ()
) -> Masks:
    """Return the mask by magnitude of every eligible weight; the model is left unchanged.

    Args:
        model: any model.
        rules: by which weights are eligible; see `helpers.sparsity.eligible_weights`.
        include: only these weights, by name pattern or type of layer.
        exclude: not these weights.

    Raises:
        InputError: there are no such rules, a pattern fits no weight, or a weight has NaN
            or infinite values.
    """
    return _masks(_eligible(select_weights(model, rules, include, exclude)))


def _eligible(candidates: Sequence[Candidate]) -> list[Candidate]:
    return [weight for weight in candidates if weight.eligible]


def _masks(weights: Sequence[LayerWeight]) -> Masks:
    if any(weight.tensor.device.type != "cpu" for weight in weights):
        return {weight.name: _mask(weight) for weight in weights}
    # One piece of memory for all masks: for a large one NumPy asks for huge pages, and
    # fetching small pages takes longer than the masks do: the first call on ResNeXt-101 takes
    # 30 ms, and 70 ms with a piece for each mask.
    sizes = [weight.tensor.numel() for weight in weights]
    memory = torch.from_numpy(np.empty(sum(sizes), dtype=np.bool_)).split(sizes)
    # The kernels release Python's lock: on a CPU, as many weights at a time as cores.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        masks = list(pool.map(_mask, weights, memory))
    return {weight.name: mask for weight, mask in zip(weights, masks, strict=True)}


def _mask(weight: LayerWeight, memory: Tensor | None = None) -> Tensor:
    out = None if memory is None else memory.view(weight.tensor.shape)
    return mask_2to4(weight.tensor, weight.name, weight.input_dim, out)


def apply_masks_(model: nn.Module, masks: Masks) -> None:
    """Set the weights that the masks do not keep to zero, in place.

    Raises:
        InputError: the model has no weight of that name and shape, or a mask is not
            boolean; nothing has been changed then.
    """
    weights = _parameters(model, masks)
    with torch.no_grad():
        for weight, mask in zip(weights, masks.values(), strict=True):
            weight.mul_(mask.to(weight.device))


def _parameters(model: nn.Module, masks: Masks) -> list[nn.Parameter]:
    """Return the parameters that masks belong to, in their order."""
    weights = []
    for name, mask in masks.items():
        try:
            weight = model.get_parameter(name)
        except AttributeError as error:
            raise InputError(
                f"The model has no parameter {name}. Give masks that were made from this model, "
                "and the model itself rather than a wrapper such as DistributedDataParallel."
            ) from error
        if weight.shape != mask.shape:
            raise InputError(
                f"{name} has shape {tuple(weight.shape)}, and its mask {tuple(mask.shape)}. "
                "Give masks that were made from this model."
            )
        if mask.dtype != torch.bool:
            raise InputError(
                f"The mask of {name} is of type {mask.dtype}, and masks are boolean. "
                "Convert it with .bool()."
            )
        weights.append(weight)
    return weights


def prune_2to4_(
    model: nn.Module, rules: str = "tensorrt", include: Selection = (), exclude: Selection = ()
) -> Masks:
    """Set two of every four eligible weights to zero by magnitude, in place.

    If no weight is eligible, a warning is logged that says why.

    Args:
        model: any model.
        rules: by which weights are eligible; see `helpers.sparsity.eligible_weights`.
        include: only these weights, by name pattern or type of layer.
        exclude: not these weights.

    Returns:
        The masks, for `hold_masks`.

    Raises:
        InputError: as `masks_2to4` does; nothing has been changed then.

    Source: Mishra et al., arXiv 2104.08378.
    """
    candidates = select_weights(model, rules, include, exclude)
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
    model: nn.Module, rules: str = "tensorrt", include: Selection = (), exclude: Selection = ()
) -> Masks:
    """Return the masks of a model that has been pruned, from where its zeros are.

    A mask keeps two of every four even where more than two are zero.

    Args:
        model: the pruned model.
        rules: those it was pruned by.
        include: as it was pruned.
        exclude: as it was pruned.

    Raises:
        InputError: an eligible weight is not 2:4.
    """
    weights = _eligible(select_weights(model, rules, include, exclude))
    for weight in weights:
        if not is_2to4(weight.tensor, weight.input_dim):
            raise _not_2to4(weight.name, "Prune the model first, or exclude this weight.")
    return _masks(weights)


def _not_2to4(name: str, remedy: str) -> InputError:
    return InputError(f"{name} is not 2:4: a group of four holds more than two non-zeros. {remedy}")


@dataclass(frozen=True)
class HeldMasks:
    """Handle returned by `hold_masks`; `remove()`, or the end of a `with` block, releases them."""

    handles: tuple[RemovableHandle, ...]

    def remove(self) -> None:
        """Let the optimizer change every weight again."""
        for handle in self.handles:
            handle.remove()

    def __enter__(self) -> "HeldMasks":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def hold_masks(
    optimizer: Optimizer, model: nn.Module, masks: Masks, check_every: int = 0
) -> HeldMasks:
    """Set the pruned weights to zero again after every step of the optimizer.

    Gradients, momentum and weight decay may move a pruned weight; PyTorch calls this
    hook at the end of `optimizer.step()`, which sets it to zero again before anything
    reads it. NaN and infinite weights are left unchanged, for the training loop to notice.

    Args:
        optimizer: any PyTorch optimizer over the model's parameters; with several, hold the
            masks in each.
        model: the model itself, not a wrapper such as DistributedDataParallel. Its weights
            are looked up by name at every step, so it may change device or data type.
        masks: as `prune_2to4_` or `masks_of` returned them. Without any, nothing is done.
        check_every: before the first step and then before every so many, require that the
            weights are 2:4. The check finds what else has written to them since: another
            optimizer, a dense checkpoint. 0: never.

    Returns:
        A handle; `handle.remove()` stops the holding.

    Raises:
        InputError: the model has no weight of a mask's name and shape, `optimizer` has no
            step hooks, or `check_every` is negative; later, in a checked step, a weight is
            not 2:4.
    """
    _parameters(model, masks)  # a mistake shows here, and not in the first step
    if check_every < 0:
        raise InputError(f"check_every is {check_every}; give a number of steps, or 0 for never.")
    input_dims: dict[str, int] = {}
    if check_every:
        input_dims = {name: weight.input_dim for name, weight in layer_weights(model).items()}
    factors: dict[str, Tensor] = {}
    steps = 0

    def put_zeros_back(*_: object) -> None:
        weights: list[Tensor] = [*_parameters(model, masks)]
        for (name, mask), weight in zip(masks.items(), weights, strict=True):
            if name not in factors or not _alike(factors[name], weight):
                # Of the weight's own type and strides: only then is it one multiplication.
                factors[name] = torch.empty_like(weight, requires_grad=False).copy_(mask)
        if weights:
            with torch.no_grad():
                torch._foreach_mul_(weights, [factors[name] for name in masks])

    def check(*_: object) -> None:
        nonlocal steps
        if steps % check_every == 0:
            for name, weight in zip(masks, _parameters(model, masks), strict=True):
                if not is_2to4(weight, input_dims.get(name, 1)):
                    remedy = "Something besides this optimizer wrote to it, or training diverged."
                    raise _not_2to4(name, remedy)
        steps += 1

    try:
        handles = [optimizer.register_step_post_hook(put_zeros_back)]
        if check_every:
            handles.append(optimizer.register_step_pre_hook(check))
    except AttributeError as error:
        raise InputError(
            f"{type(optimizer).__name__} has no hooks around its steps, so masks cannot be held in "
            "it. Give the PyTorch optimizer itself; if this object wraps one, as Accelerate's "
            "does, that is usually `optimizer.optimizer`."
        ) from error
    return HeldMasks(tuple(handles))


def _alike(factor: Tensor, weight: Tensor) -> bool:
    return (
        factor.dtype == weight.dtype
        and factor.device == weight.device
        and factor.stride() == weight.stride()
    )


def removed_weights(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """Return the values that masks would set to zero; call it before pruning.

    They are half of each weight, as one flat tensor: what `restore_weights_` needs.

    Raises:
        InputError: the model has no weight of a mask's name and shape, or a mask is not
            boolean.
    """
    weights = zip(masks.items(), _parameters(model, masks), strict=True)
    return {name: weight.detach()[~mask.to(weight.device)] for (name, mask), weight in weights}


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
    weights = _parameters(model, masks)
    for name, mask in masks.items():
        zeros = int((~mask).sum())
        if name not in removed or removed[name].numel() != zeros:
            raise InputError(
                f"The mask of {name} removes {zeros} values, and `removed` does not hold as many "
                "for it. Give what removed_weights returned for the same masks."
            )
    with torch.no_grad():
        for (name, mask), weight in zip(masks.items(), weights, strict=True):
            weight[~mask.to(weight.device)] = removed[name].to(weight)


_SHAPE = ".shape"


def pack_masks(masks: Masks) -> dict[str, Tensor]:
    """Return masks at one bit for each weight, as plain tensors that any format can store.

    Returns:
        For each mask its bits (uint8) under its name, and its shape (int64) under the name
        followed by `.shape`.
    """
    packed = {}
    for name, mask in masks.items():
        packed[name] = torch.from_numpy(np.packbits(mask.cpu().numpy()))
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
