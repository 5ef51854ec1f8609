"""The 2:4 mask of one weight tensor. Explained in `02_prune_2_4.ipynb`."""

import torch
from torch import Tensor

from helpers.checks import TutorialError


def groups_of_four(weight: Tensor, name: str = "the weight") -> Tensor:
    """View a weight with its input channels in groups of four.

    Args:
        weight: (out, in) of a linear layer or (out, in, *kernel) of a convolution.
        name: what to call it in an error.

    Returns:
        A view of shape (out, in / 4, 4, kernel positions); dimension 2 is the group.

    Raises:
        TutorialError: fewer than two dimensions, or `in` is no multiple of four.
    """
    if weight.dim() < 2 or weight.shape[1] % 4:
        raise TutorialError(
            f"{name} has shape {tuple(weight.shape)}: the 2:4 pattern needs input channels "
            "(dimension 1) in a multiple of four. Leave this layer dense."
        )
    return weight.reshape(weight.shape[0], weight.shape[1] // 4, 4, -1)


def mask_2to4(weight: Tensor, name: str = "the weight") -> Tensor:
    """Keep the two largest magnitudes of every four weights along the input channels.

    Of equal magnitudes the one with the lower channel is kept, so exactly two of
    every four survive.

    Args:
        weight: (out, in) or (out, in, *kernel), any floating-point type and device.
        name: what to call it in an error.

    Returns:
        A boolean mask of the same shape; true where the weight is kept.

    Raises:
        TutorialError: `in` is no multiple of four, or a value is NaN or infinite.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", arXiv
    2104.08378. Explained in `02_prune_2_4.ipynb`.
    """
    if not torch.isfinite(weight).all():
        raise TutorialError(
            f"{name} has NaN or infinite values, which have no magnitude to rank. "
            "Go back to a checkpoint from before the training diverged."
        )
    a, b, c, d = groups_of_four(weight.detach().abs(), name).unbind(2)
    # Six comparisons decide every rank. `>=` lets the lower channel win a tie; a
    # weight survives if it beats at least two of its three neighbours.
    ab, ac, ad, bc, bd, cd = a >= b, a >= c, a >= d, b >= c, b >= d, c >= d
    keep = torch.stack(
        [
            _two_of_three(ab, ac, ad),
            _two_of_three(~ab, bc, bd),
            _two_of_three(~ac, ~bc, cd),
            _two_of_three(~ad, ~bd, ~cd),
        ],
        dim=2,
    )
    return keep.reshape(weight.shape)


def _two_of_three(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return (x & y) | (z & (x | y))


def is_2to4(weight: Tensor) -> bool:
    """Return whether every four weights along the input channels hold at most two non-zeros.

    Args:
        weight: (out, in) or (out, in, *kernel); `in` must be a multiple of four.
    """
    return bool(((groups_of_four(weight) != 0).sum(dim=2) <= 2).all())
