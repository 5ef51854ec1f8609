"""2:4 structured sparsity: of every four weights along the input channels, two are zero.

    masks        the mask by magnitude, and the test of the pattern
    eligibility  which layers the hardware can run sparse, and why not the others
    prune        masks over a network, and holding them while it trains
    sparsegpt    masks whose kept weights make up for the removed ones
    compressed   values and 2-bit metadata, the form the GPU stores
    verify       is every eligible weight of an ONNX file 2:4?

Explained in `02_prune_2_4.ipynb`.
"""

from helpers.sparsity.compressed import Compressed, compress_2to4, decompress_2to4
from helpers.sparsity.eligibility import SparsityReport, eligible_layers, sparsity_report
from helpers.sparsity.masks import is_2to4, mask_2to4
from helpers.sparsity.prune import hold_masks, kept_magnitude, masks_of, prune_2to4_
from helpers.sparsity.sparsegpt import prune_sparsegpt_, sparsegpt_2to4
from helpers.sparsity.verify import verify_onnx

__all__ = [
    "Compressed",
    "SparsityReport",
    "compress_2to4",
    "decompress_2to4",
    "eligible_layers",
    "hold_masks",
    "is_2to4",
    "kept_magnitude",
    "mask_2to4",
    "masks_of",
    "prune_2to4_",
    "prune_sparsegpt_",
    "sparsegpt_2to4",
    "sparsity_report",
    "verify_onnx",
]
