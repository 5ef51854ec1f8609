"""Masks over a whole network, and keeping them while it trains.

Explained in `02_prune_2_4.ipynb` and `03_retrain.ipynb`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from helpers.sparsity.eligibility import eligible_layers
from helpers.sparsity.masks import mask_2to4


def prune_2to4_(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Set two of every four weights to zero by magnitude, in place.

    Args:
        model: any network.
        names: the layers to prune; by default all that TensorRT may run sparse.

    Returns:
        The mask of each layer's weight, by the layer's name.

    Raises:
        TutorialError: a weight cannot be pruned; no layer has been changed then.
    """
    if names is None:
        names = eligible_layers(model)
    weights = {name: model.get_submodule(name).weight for name in names}
    masks = {name: mask_2to4(weight, f"{name}.weight") for name, weight in weights.items()}
    with torch.no_grad():
        for name, mask in masks.items():
            weights[name].mul_(mask)
    return masks


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Return where the eligible weights of a pruned network are not zero, by layer name."""
    return {name: layer.weight.detach() != 0 for name, layer in eligible_layers(model).items()}


def hold_masks(optimizer: Optimizer, model: nn.Module, masks: dict[str, Tensor]) -> RemovableHandle:
    """Put the zeros back after every step of the optimizer.

    Gradients, momentum and weight decay may move a pruned weight; PyTorch calls this
    hook at the end of `optimizer.step()` and sets it to zero again before anybody
    sees it.

    Args:
        optimizer: any PyTorch optimizer over the network's parameters.
        model: the pruned network; its masks must be on the same device.
        masks: as `prune_2to4_` or `masks_of` returned them.

    Returns:
        A handle; `handle.remove()` ends the holding.
    """
    weights = [model.get_submodule(name).weight for name in masks]
    factors = [mask.to(weight.dtype) for mask, weight in zip(masks.values(), weights, strict=True)]

    def put_zeros_back(*_: object) -> None:
        with torch.no_grad():
            torch._foreach_mul_(weights, factors)

    return optimizer.register_step_post_hook(put_zeros_back)


def kept_magnitude(weight: Tensor, mask: Tensor) -> float:
    """Return the share of the summed magnitude that survives a mask, in per cent."""
    magnitude = weight.detach().abs().double()
    return 100 * float((magnitude * mask).sum() / magnitude.sum())
