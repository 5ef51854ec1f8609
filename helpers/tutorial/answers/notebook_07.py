"""The answers to the exercises of notebook 07."""

from collections.abc import Callable
from typing import Any

from helpers.measurement import roofline
from helpers.tutorial.exercises import NO_HINT, UNTOUCHED, Judge, Value

_SHEET = roofline.DATASHEETS["a100"]
_TOKENS = 197  # of a 224x224 image in ViT-B/16: 14x14 patches and one for the class
# Outputs and inputs of the layers of ViT-B/16: in and out of attention, of the MLP, the last one.
_LAYERS = ((2304, 768), (768, 768), (3072, 768), (768, 3072), (1000, 768))
_CASES = [
    (batch * _TOKENS, outputs, inputs, sparse)
    for batch in (1, 2, 3, 4, 8)
    for outputs, inputs in _LAYERS
    for sparse in (False, True)
]


def _side(
    rows: int,
    outputs: int,
    inputs: int,
    sparse: bool,
    bytes_each: int = 2,
    compress: bool = True,
    sparse_peak: bool = True,
    with_outputs: bool = True,
) -> str:
    """Return what a layer waits for; the defaults are right, and all else a mistake."""
    peak = _SHEET.tflops["FP16"][sparse and sparse_peak]
    share = roofline.DATATYPES["FP16"].compressed_share if sparse and compress else 1
    moved = rows * inputs + share * outputs * inputs + with_outputs * rows * outputs
    arithmetic = 2 * rows * outputs * inputs / peak / 1e9
    memory = bytes_each * moved / _SHEET.bandwidth / 1e6
    return "arithmetic" if arithmetic > memory else "memory"


_MISTAKES: dict[str, dict[str, Any]] = {
    "A number in FP16 takes two bytes, and a multiply-add counts as two operations.": {
        "bytes_each": 4
    },
    "How many bytes does a number in FP16 take?": {"bytes_each": 1},
    "The sparse weight is stored compressed: `compressed_share` of its dense bytes.": {
        "compress": False
    },
    "A sparse product has the sparse peak, the second of the two rates.": {"sparse_peak": False},
    "The outputs are written too, which also takes time.": {"with_outputs": False},
}


def _judge_side(side: Callable[[int, int, int, bool], str]) -> str:
    found = [side(*case) for case in _CASES]
    if found[0] is None:
        return UNTOUCHED
    if not set(found) <= {"memory", "arithmetic"}:
        return 'Return one of the two words "memory" and "arithmetic".'
    if found == [_side(*case) for case in _CASES]:
        return ""
    for hint, mistake in _MISTAKES.items():
        if found == [_side(*case, **mistake) for case in _CASES]:
            return hint
    return NO_HINT


def _gain() -> float:
    """Return what the layer behind attention gains on an A100 at batch size 2, by the floors."""
    dense_peak, sparse_peak = _SHEET.tflops["FP16"]
    size = (2 * _TOKENS, 768, 768, "FP16")
    dense = roofline.floor_ms(*size, dense_peak, _SHEET.bandwidth, sparse=False)
    return dense / roofline.floor_ms(*size, sparse_peak, _SHEET.bandwidth, sparse=True)


EXERCISES: dict[str, Judge] = {
    "07-vit-gain": Value(
        _gain,
        tolerance=0.015,
        mistakes={
            2: "That is the gain of the arithmetic. Which of its two times is longer when sparse?",
            1.27: "That is the gain of the memory alone. What did the dense layer wait for?",
            1: "It gains: the dense layer waits for the arithmetic.",
        },
    ),
    "07-side": _judge_side,
}
