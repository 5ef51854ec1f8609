"""2:4 structured sparsity: of every four weights along the input channels, two are zero.

    masks        the mask by magnitude, and the test of the pattern
    eligibility  which weights can run sparse, and why the others cannot
    prune        masks over a model, pruning with them, and back to dense
    hold         keep the pruned weights at zero while a model trains
    sparsegpt    one-shot pruning that corrects the weights it keeps
    permute      an order of the channels in which pruning removes less
    compressed   values and 2-bit metadata, the form the GPU stores; a whole model in one file
    verify       is every eligible weight of a file or a model 2:4?

`permute` is built on `graph` (which channels may be exchanged) and `search` (which order
keeps the most); `compiled` holds the loops that numba compiles. Explained in
`02_prune_2_4.ipynb`.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from helpers.sparsity.compressed import (
    Compressed,
    compress_2to4,
    decompress_2to4,
    load_compressed,
    save_compressed,
)
from helpers.sparsity.eligibility import SparsityReport, eligible_weights, sparsity_report
from helpers.sparsity.hold import HeldMasks, hold_masks
from helpers.sparsity.masks import (
    is_2to4,
    kept_magnitude,
    mask_2to4,
    mask_2to4_transposable,
    mask_nm,
)
from helpers.sparsity.prune import (
    apply_masks_,
    masks_2to4,
    masks_of,
    pack_masks,
    prune_2to4_,
    removed_weights,
    restore_weights_,
    unpack_masks,
)
from helpers.sparsity.sparsegpt import prune_sparsegpt_, sparsegpt_2to4
from helpers.sparsity.verify import verify_checkpoint, verify_file, verify_model, verify_onnx

if TYPE_CHECKING:
    from helpers.sparsity.permute import PermutationReport, permute_channels_

__all__ = [
    "Compressed",
    "HeldMasks",
    "PermutationReport",
    "SparsityReport",
    "apply_masks_",
    "compress_2to4",
    "decompress_2to4",
    "eligible_weights",
    "hold_masks",
    "is_2to4",
    "kept_magnitude",
    "load_compressed",
    "mask_2to4",
    "mask_2to4_transposable",
    "mask_nm",
    "masks_2to4",
    "masks_of",
    "pack_masks",
    "permute_channels_",
    "prune_2to4_",
    "prune_sparsegpt_",
    "removed_weights",
    "restore_weights_",
    "save_compressed",
    "sparsegpt_2to4",
    "sparsity_report",
    "unpack_masks",
    "verify_checkpoint",
    "verify_file",
    "verify_model",
    "verify_onnx",
]

# `permute` imports numba, which takes longer than the rest of the package.
_LOADED_ON_USE = {"PermutationReport": "permute", "permute_channels_": "permute"}


def __getattr__(name: str) -> object:
    if name not in _LOADED_ON_USE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LOADED_ON_USE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LOADED_ON_USE})
