"""Masks over a whole network, and keeping them while it trains.

A network's masks are a dictionary from the names of its weights, as in `state_dict`, to
boolean tensors that are true where the weight is kept. Explained in `02_prune_2_4.ipynb`
and `03_retrain.ipynb`.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from helpers.errors import InputError
from helpers.layers import LayerWeight, layer_weights
from helpers.sparsity.eligibility import Selection, eligible_weights
from helpers.sparsity.masks import is_2to4, mask_2to4

Masks = dict[str, Tensor]


def masks_2to4(
    model: nn.Module, target: str = "tensorrt", include: Selection = (), exclude: Selection = ()
) -> Masks:
    """Return the mask by magnitude of every eligible weight; the network stays as it is.

    Args:
        model: any network.
        target: what is to run the network; see `helpers.sparsity.eligible_weights`.
        include: only these weights, by name pattern or type of layer.
        exclude: not these weights.

    Raises:
        InputError: there is no such target, a pattern fits no weight, or a weight has NaN
            or infinite values.

    Explained in `02_prune_2_4.ipynb`.
    """
    weights = _eligible(model, target, include, exclude)
    if any(weight.tensor.device.type != "cpu" for weight in weights):
        return {weight.name: _mask(weight) for weight in weights}
    # One piece of memory for all masks: NumPy asks for huge pages, and fetching small ones
    # takes longer than the masks do.
    sizes = [weight.tensor.numel() for weight in weights]
    memory = torch.from_numpy(np.empty(sum(sizes), dtype=np.bool_)).split(sizes)
    # The kernel lets go of Python's lock: on a CPU, as many weights at a time as cores.
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        masks = list(pool.map(_mask, weights, memory))
    return {weight.name: mask for weight, mask in zip(weights, masks, strict=True)}


def _mask(weight: LayerWeight, memory: Tensor | None = None) -> Tensor:
    out = None if memory is None else memory.view(weight.tensor.shape)
    return mask_2to4(weight.tensor, weight.name, weight.input_dim, out)


def _eligible(
    model: nn.Module, target: str, include: Selection, exclude: Selection
) -> list[LayerWeight]:
    weights = layer_weights(model)
    return [weights[name] for name in eligible_weights(model, target, include, exclude)]


def apply_masks_(model: nn.Module, masks: Masks) -> None:
    """Set the weights that the masks do not keep to zero, in place.

    Raises:
        InputError: the network has no weight of that name and shape; nothing has been
            changed then.
    """
    weights = _weights(model, masks)
    with torch.no_grad():
        for weight, mask in zip(weights, masks.values(), strict=True):
            weight.mul_(mask.to(weight.device))


def _weights(model: nn.Module, masks: Masks) -> list[nn.Parameter]:
    """Return the parameters that masks belong to, in their order."""
    weights = []
    for name, mask in masks.items():
        try:
            weight = model.get_parameter(name)
        except AttributeError as error:
            raise InputError(
                f"The network has no parameter {name}. Give it the masks of this very network, "
                "and the network itself rather than a wrapper such as DistributedDataParallel."
            ) from error
        if weight.shape != mask.shape:
            raise InputError(
                f"{name} has shape {tuple(weight.shape)}, its mask {tuple(mask.shape)}. "
                "Give the masks of this very network."
            )
        weights.append(weight)
    return weights


def prune_2to4_(
    model: nn.Module, target: str = "tensorrt", include: Selection = (), exclude: Selection = ()
) -> Masks:
    """Set two of every four eligible weights to zero by magnitude, in place.

    Args:
        model: any network.
        target: what is to run the network; see `helpers.sparsity.eligible_weights`.
        include: only these weights, by name pattern or type of layer.
        exclude: not these weights.

    Returns:
        The masks, for `hold_masks`.

    Raises:
        InputError: as `masks_2to4` does; nothing has been changed then.

    Source: Mishra et al., arXiv 2104.08378. Explained in `02_prune_2_4.ipynb`.
    """
    masks = masks_2to4(model, target, include, exclude)
    apply_masks_(model, masks)
    return masks


def masks_of(
    model: nn.Module, target: str = "tensorrt", include: Selection = (), exclude: Selection = ()
) -> Masks:
    """Return the masks of a network that has been pruned, from where its zeros are.

    A mask keeps two of every four even where more than two are zero.

    Args:
        model: the pruned network.
        target: the one it was pruned for.
        include: as it was pruned.
        exclude: as it was pruned.

    Raises:
        InputError: an eligible weight is not 2:4.

    Explained in `03_retrain.ipynb`.
    """
    for weight in _eligible(model, target, include, exclude):
        if not is_2to4(weight.tensor, weight.input_dim):
            raise _not_2to4(weight.name, "Prune the network first, or exclude this weight.")
    return masks_2to4(model, target, include, exclude)


def _not_2to4(name: str, remedy: str) -> InputError:
    return InputError(f"{name} is not 2:4: a group of four holds more than two non-zeros. {remedy}")


@dataclass(frozen=True)
class HeldMasks:
    """The holding of masks; `remove()`, or the end of a `with` block, ends it."""

    handles: tuple[RemovableHandle, ...]

    def remove(self) -> None:
        """Let the weights move freely again."""
        for handle in self.handles:
            handle.remove()

    def __enter__(self) -> "HeldMasks":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def hold_masks(
    optimizer: Optimizer, model: nn.Module, masks: Masks, check_every: int = 0
) -> HeldMasks:
    """Put the zeros back after every step of the optimizer.

    Gradients, momentum and weight decay may move a pruned weight; PyTorch calls this
    hook at the end of `optimizer.step()` and sets it to zero again before anybody
    sees it. NaN and infinite weights stay what they are, for the training loop to notice.

    Args:
        optimizer: any PyTorch optimizer over the network's parameters; with several, hold the
            masks in each.
        model: the network itself, not a wrapper such as DistributedDataParallel. Its weights
            are looked up by name at every step, so it may change device or data type.
        masks: as `prune_2to4_` or `masks_of` returned them.
        check_every: before the first step and then every so many, require that the weights
            are 2:4. It finds what else has written to them since: another optimizer, a
            dense checkpoint. 0: never.

    Returns:
        A handle; `handle.remove()` ends the holding.

    Raises:
        InputError: the network has no weight of a mask's name and shape; later, in a
            checked step, a weight is not 2:4.

    Explained in `03_retrain.ipynb`.
    """
    _weights(model, masks)  # a mistake shows here, and not in the first step
    input_dims = {name: weight.input_dim for name, weight in layer_weights(model).items()}
    factors: dict[str, Tensor] = {}
    steps = 0

    def put_zeros_back(*_: object) -> None:
        weights = _weights(model, masks)
        for (name, mask), weight in zip(masks.items(), weights, strict=True):
            if name not in factors or not _alike(factors[name], weight):
                # Of the weight's own type and strides: only then is it one multiplication.
                factors[name] = torch.empty_like(weight, requires_grad=False).copy_(mask)
        with torch.no_grad():
            torch._foreach_mul_(weights, list(factors.values()))

    def check(*_: object) -> None:
        nonlocal steps
        if steps % check_every == 0:
            for name, weight in zip(masks, _weights(model, masks), strict=True):
                if not is_2to4(weight, input_dims.get(name, 1)):
                    remedy = "Something besides this optimizer wrote to it, or training diverged."
                    raise _not_2to4(name, remedy)
        steps += 1

    handles = [optimizer.register_step_post_hook(put_zeros_back)]
    if check_every:
        handles.append(optimizer.register_step_pre_hook(check))
    return HeldMasks(tuple(handles))


def _alike(factor: Tensor, weight: Tensor) -> bool:
    return (
        factor.dtype == weight.dtype
        and factor.device == weight.device
        and factor.stride() == weight.stride()
    )


def removed_weights(model: nn.Module, masks: Masks) -> dict[str, Tensor]:
    """Return the values that masks would set to zero; call it before pruning.

    They are half of each weight, in a flat tensor each: what `restore_weights_` needs.

    Raises:
        InputError: the network has no weight of a mask's name and shape.
    """
    weights = zip(masks.items(), _weights(model, masks), strict=True)
    return {name: weight.detach()[~mask.to(weight.device)] for (name, mask), weight in weights}


def restore_weights_(model: nn.Module, masks: Masks, removed: dict[str, Tensor]) -> None:
    """Put the values back that pruning has removed, in place; the others stay as they are.

    Args:
        model: the pruned network.
        masks: those it was pruned with.
        removed: what `removed_weights` returned before.

    Raises:
        InputError: masks, values and the network's weights do not belong together; nothing
            has been changed then.
    """
    weights = _weights(model, masks)
    for name, mask in masks.items():
        zeros = int((~mask).sum())
        if name not in removed or removed[name].numel() != zeros:
            raise InputError(
                f"{name} has lost {zeros} values, and `removed` does not have as many for it. "
                "Give what removed_weights returned for the same masks."
            )
    with torch.no_grad():
        for (name, mask), weight in zip(masks.items(), weights, strict=True):
            weight[~mask.to(weight.device)] = removed[name].to(weight)


_SHAPE = ".shape"


def pack_masks(masks: Masks) -> dict[str, Tensor]:
    """Return masks at one bit for each weight, as plain tensors that any format can store.

    Returns:
        For each mask its bits (uint8) under its name, and its shape (int64) under the name
        with `.shape` behind it.
    """
    packed = {}
    for name, mask in masks.items():
        packed[name] = torch.from_numpy(np.packbits(mask.cpu().numpy()))
        packed[name + _SHAPE] = torch.tensor(mask.shape, device="cpu")
    return packed


def unpack_masks(packed: dict[str, Tensor]) -> Masks:
    """Return the masks, on the CPU, that `pack_masks` was given."""
    masks = {}
    for name in (name for name in packed if not name.endswith(_SHAPE)):
        shape = torch.Size(packed[name + _SHAPE].tolist())
        bits = np.unpackbits(packed[name].cpu().numpy(), count=shape.numel())
        masks[name] = torch.from_numpy(bits).view(torch.bool).view(shape)
    return masks
