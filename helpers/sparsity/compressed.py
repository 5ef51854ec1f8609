"""The form in which the GPU keeps a 2:4 weight: half the values, and where they stood.

Explained in `02_prune_2_4.ipynb`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from helpers.checks import TutorialError
from helpers.sparsity.masks import groups_of_four, is_2to4, mask_2to4


@dataclass(frozen=True)
class Compressed:
    """A 2:4 weight as values and 2-bit positions.

    `values` has the shape of the weight with half its input channels. `metadata` is
    a flat uint8 tensor: four positions of two bits in each byte, the lowest first,
    in the order of the values.
    """

    values: Tensor
    metadata: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of values and metadata together."""
        return self.values.nbytes + self.metadata.nbytes


def compress_2to4(weight: Tensor) -> Compressed:
    """Store a 2:4 weight as half its values and two bits for each.

    In FP16 the result takes 9/16 of the dense bytes, in INT8 5/8.

    Args:
        weight: (out, in) or (out, in, *kernel), already 2:4, with a multiple of eight
            values so that the metadata fills whole bytes.

    Raises:
        TutorialError: the weight is not 2:4, or does not fill whole bytes.
    """
    if not is_2to4(weight):
        raise TutorialError(
            "This weight is not 2:4: a group of four holds more than two non-zeros. "
            "Prune it with prune_2to4_ first."
        )
    if weight.numel() % 8:
        raise TutorialError(
            f"{weight.numel()} weights do not fill whole bytes of metadata; it takes a "
            "multiple of eight."
        )
    # Where a group has fewer than two non-zeros the mask fills up with zeros.
    ranked = weight if weight.is_floating_point() else weight.float()
    keep = groups_of_four(mask_2to4(ranked))
    lanes = torch.arange(4, device=weight.device).view(1, 1, 4, 1)
    order = torch.where(keep, lanes, 4).sort(dim=2).values[:, :, :2]
    values = groups_of_four(weight).gather(2, order)
    quads = order.flatten().view(-1, 4).to(torch.uint8)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=weight.device)
    shape = (weight.shape[0], weight.shape[1] // 2, *weight.shape[2:])
    return Compressed(values.reshape(shape), (quads << shifts).sum(1, dtype=torch.uint8))


def decompress_2to4(compressed: Compressed) -> Tensor:
    """Return the dense weight, with its zeros, that `compress_2to4` was given."""
    values, metadata = compressed.values, compressed.metadata
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=metadata.device)
    pairs = values.reshape(values.shape[0], values.shape[1] // 2, 2, -1)
    order = (metadata.unsqueeze(1) >> shifts & 3).long().reshape(pairs.shape)
    groups = values.new_zeros(pairs.shape[0], pairs.shape[1], 4, pairs.shape[3])
    groups.scatter_(2, order, pairs)
    return groups.reshape(values.shape[0], 2 * values.shape[1], *values.shape[2:])
