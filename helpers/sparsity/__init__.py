"""2:4 structured sparsity: of every four weights along the input channels, two are zero.

    masks        the mask by magnitude, and the test of the pattern
    eligibility  which layers the hardware can run sparse, and why not the others
    prune        masks over a network, and holding them while it trains
    compressed   values and 2-bit metadata, the form the GPU stores; a whole network in one file
    verify       is every eligible weight of a file or a network 2:4?

Explained in `02_prune_2_4.ipynb`.
"""

from helpers.sparsity.compressed import (
    Compressed,
    compress_2to4,
    decompress_2to4,
    load_compressed,
    save_compressed,
)
from helpers.sparsity.eligibility import SparsityReport, eligible_layers, sparsity_report
from helpers.sparsity.masks import is_2to4, mask_2to4
from helpers.sparsity.prune import hold_masks, kept_magnitude, masks_of, prune_2to4_
from helpers.sparsity.verify import verify_checkpoint, verify_file, verify_model, verify_onnx

__all__ = [
    "Compressed",
    "SparsityReport",
    "compress_2to4",
    "decompress_2to4",
    "eligible_layers",
    "hold_masks",
    "is_2to4",
    "kept_magnitude",
    "load_compressed",
    "mask_2to4",
    "masks_of",
    "prune_2to4_",
    "save_compressed",
    "sparsity_report",
    "verify_checkpoint",
    "verify_file",
    "verify_model",
    "verify_onnx",
]
