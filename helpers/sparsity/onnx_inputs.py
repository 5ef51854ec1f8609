"""The inputs of an ONNX file and their shapes.

Many files leave dimensions open, such as the batch. Whoever counts, builds or measures has to
say how large these are; here that is read, completed and checked.

The commands of `python -m helpers` for a file of your own use it; docs/cli.md explains them.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import helper

from helpers.errors import InputError
from helpers.files import shown

Shape = tuple[int, ...]

# A name and a shape as trtexec writes them, x:1x3x224x224, or as Polygraphy does,
# x:[1,3,224,224]. A name may contain colons itself.
_NAMED_SHAPE = re.compile(
    r"(?:(?P<name>[^,]+?):)?(?P<dims>\[[\d\s,]*\]|\d+(?:x\d+)*)(?:,\s*(?=.)|$)"
)


@dataclass(frozen=True)
class OnnxInput:
    """An input of a file: each of `dims` is a number, or the name of an open dimension."""

    name: str
    dtype: np.dtype
    dims: tuple[int | str, ...]

    @property
    def is_open(self) -> bool:
        """Whether its shape is not fixed by the file."""
        return not all(isinstance(size, int) for size in self.dims)

    def __str__(self) -> str:
        return f"{self.name} ({'x'.join(str(size) or '?' for size in self.dims) or 'a number'})"


def onnx_inputs(model: onnx.ModelProto, path: Path) -> list[OnnxInput]:
    """Return the inputs that a caller of a file has to give.

    Args:
        model: as `helpers.sparsity.onnx_file.load_onnx` returns it, or without its weights.
        path: where it was read, for messages.

    Raises:
        InputError: an input is no tensor of a known rank.
    """
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = []
    for item in model.graph.input:
        if item.name in stored:  # files of IR version 3 list their weights as inputs too
            continue
        kind = item.type.tensor_type
        if not item.type.HasField("tensor_type") or not kind.HasField("shape"):
            raise InputError(
                f"The input {item.name} of {shown(path)} is not a tensor with a number of "
                "dimensions. Export the model with tensors as inputs."
            )
        dims = tuple(
            dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else dim.dim_param
            for dim in kind.shape.dim
        )
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        inputs.append(OnnxInput(item.name, np.dtype(dtype), dims))
    return inputs


def parse_shapes(texts: Sequence[str]) -> dict[str, Shape]:
    """Return shapes by the names of inputs; the name of a shape without one is empty.

    Args:
        texts: each one or several of `x:1x3x224x224`, as trtexec takes them, or
            `x:[1,3,224,224]`, as Polygraphy does, separated by commas.

    Raises:
        InputError: a text is something else, or a name comes twice.
    """
    shapes: dict[str, Shape] = {}
    for text in texts:
        matches, end = [], 0
        while match := _NAMED_SHAPE.match(text, end):
            matches.append(match)
            end = match.end()
        if end != len(text) or not matches:
            raise InputError(
                f"{text!r} is not a shape. Write the name of an input and its dimensions, for "
                "example images:1x3x224x224; several inputs are separated by commas."
            )
        for match in matches:
            name = match["name"] or ""
            if name in shapes:
                raise InputError(f"The shape of {name or 'the input'} was given twice; leave one.")
            shapes[name] = tuple(map(int, re.findall(r"\d+", match["dims"])))
    return shapes


def complete_shapes(
    inputs: Sequence[OnnxInput],
    given: Mapping[str, Shape],
    path: Path,
    batch: int | None = None,
) -> dict[str, Shape]:
    """Return the shape of every input, from the file and from what the user gave.

    A dimension that has a name, such as `batch`, has one size in all inputs: it need be given
    for one of them only.

    Args:
        inputs: as `onnx_inputs` returns them.
        given: shapes by name, as `parse_shapes` returns them.
        path: of the file, for messages.
        batch: the size of an open first dimension whose input was not given; unless it is
            given, such an input is refused like any other.

    Raises:
        InputError: a name or a shape does not fit the file, or a dimension stays open.
    """
    given = _by_name(inputs, given, path)
    sizes: dict[str, int] = {}  # of the dimensions with a name
    for item in inputs:
        if item.name not in given:
            continue
        shape = given[item.name]
        fits = len(shape) == len(item.dims) and all(
            isinstance(dim, str) or dim == size for dim, size in zip(item.dims, shape, strict=True)
        )
        if not fits:
            raise InputError(
                f"The input {item} of {shown(path)} cannot have the shape {_text(shape)}. Keep "
                "the dimensions that the file fixes."
            )
        for dim, size in zip(item.dims, shape, strict=True):
            if isinstance(dim, str) and dim and sizes.setdefault(dim, size) != size:
                raise InputError(
                    f"The inputs of {shown(path)} share the dimension {dim}, which was given as "
                    f"{sizes[dim]} and as {size}. Give it one size."
                )
    complete = {}
    for item in inputs:
        if item.name in given:
            complete[item.name] = given[item.name]
            continue
        known = [dim if isinstance(dim, int) else sizes.get(dim) for dim in item.dims]
        if known and known[0] is None:
            known[0] = batch
        complete[item.name] = tuple(size for size in known if size is not None)
        if None in known:
            example = [size or (224 if place else 1) for place, size in enumerate(known)]
            raise InputError(
                f"The file {shown(path)} leaves the shape of its input {item} open. Give the "
                f"whole shape, for example {item.name}:{_text(example)}."
            )
    return complete


def _by_name(
    inputs: Sequence[OnnxInput], given: Mapping[str, Shape], path: Path
) -> dict[str, Shape]:
    """Return the given shapes with the name of the only input where none was given."""
    named = dict(given)
    if "" in named and len(inputs) == 1:
        named.setdefault(inputs[0].name, named.pop(""))
    known = {item.name for item in inputs}
    for name in named:
        if name not in known:
            problem = f"has no input {name}" if name else "has several inputs: name each shape"
            raise InputError(
                f"{shown(path)} {problem}; its inputs are {', '.join(map(str, inputs)) or 'none'}."
            )
    return named


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
