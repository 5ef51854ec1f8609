"""The answers to the exercises of notebook 05."""

from collections.abc import Callable

from helpers.tutorial.exercises import NO_HINT, UNTOUCHED, Judge, Value

_START = "[07/19/2022-11:58:20] [I] [TRT] (Sparsity) "
_FOUND = f"{_START}Layers eligible for sparse math:"
_PICKED = f"{_START}TRT inference plan picked sparse implementation for layers:"

# Lines as TensorRT 8 prints them, and how many layers each lists.
_LINES = {
    f"{_FOUND} Conv_3 + Relu_4, Conv_8, Conv_7 + Add_9 + Relu_10, Gemm_11": 4,
    f"{_PICKED} Conv_3 + Relu_4, Conv_8": 2,
    f"{_PICKED} Conv_8": 1,
    _PICKED: 0,
}
# What a common mistake counts in them.
_MISTAKES: dict[tuple[int, ...], str] = {
    (4, 2, 1, 1): "It counts one layer in an empty list: `''.split(',')` returns one empty text.",
    (3, 1, 0, 0): "Between two layers stands one comma, so there is one layer more than commas.",
    (7, 3, 1, 0): "`Conv_3 + Relu_4` is one layer: TensorRT has fused the two operations.",
    (7, 3, 1, 1): (
        "`Conv_3 + Relu_4` is one layer: TensorRT has fused the two operations. And it counts "
        "one layer in an empty list."
    ),
}


def _count_layers(count: Callable[[str], int]) -> str:
    counts = tuple(count(line) for line in _LINES)
    if counts[0] is None:
        return UNTOUCHED
    if counts == tuple(_LINES.values()):
        return ""
    return _MISTAKES.get(counts, NO_HINT)


EXERCISES: dict[str, Judge] = {
    "05-never-sparse": Value(
        "layer1.0.conv2",
        mistakes={
            "layer1.0.conv1": "It is a 1x1 convolution, with which sparse kernels have no trouble.",
            "layer1.0.conv3": "It is a 1x1 convolution, with which sparse kernels have no trouble.",
        },
    ),
    "05-count-layers": _count_layers,
}
