"""Prune the weights of an ONNX file 2:4 by magnitude, in a copy of the file.

The zeros are written where the numbers are stored: in the initializer or Constant that a product
takes its weight from, behind transpositions and casts, and in the integers of a quantised weight,
where a zero is its zero point. So the copy has the same graph as the file.

This answers what 2:4 would do to the speed of a model before anybody retrains it; its accuracy
suffers until it is retrained. `python -m helpers prune` does it (docs/cli.md).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from onnx import GraphProto, NodeProto, TensorProto
from onnx.external_data_helper import set_external_data
from onnx.numpy_helper import from_array
from torch import Tensor

from helpers.errors import InputError
from helpers.files import atomic_write, shown
from helpers.sparsity.masks import is_2to4, kept_magnitude_2to4, mask_2to4
from helpers.sparsity.onnx_constants import Scope, fold, quantises
from helpers.sparsity.onnx_file import STANDARD_DOMAINS, OnnxFile
from helpers.sparsity.onnx_report import FileWeight, select_file_weights
from helpers.sparsity.onnx_weights import NodeWeight

if TYPE_CHECKING:
    import pandas as pd

# Operators that put numbers elsewhere, that change only their type, and that keep zeros zero.
_MOVES = ("Flatten", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze")
_KEEPS = ("Cast", "CastLike", "Div", "Identity", "Mul", "Neg")
_RANKED = (np.float64, np.float32, np.float16, np.int8)  # as `mask_2to4` takes them
_ALIGNED = 4096  # ONNX Runtime maps external tensors that start at a multiple of this

COLUMNS = ["weight", "node", "op", "shape", "pruned", "kept", "also_used_by", "reason"]


@dataclass(frozen=True, eq=False)
class OnnxPruning:
    """What was pruned in an ONNX file, and what was not.

    `weights` has a row for each product with `weight` and `node` (names in the file), `op`,
    `shape` (output channels first), `pruned`, `kept` (the share of its magnitude in per cent),
    `also_used_by` (nodes other than products that take numbers from the same stored tensor) and
    `reason` (why it stays dense).
    """

    weights: "pd.DataFrame"
    rules: str
    changed: int  # numbers that were not zero before

    @property
    def is_unchanged(self) -> bool:
        """Whether the copy has the same numbers, since the weights were 2:4 already."""
        return self.changed == 0

    @property
    def summary(self) -> str:
        """The result in one line."""
        pruned = self.weights[self.weights.pruned]
        return (
            f"{len(pruned)} of {len(self.weights)} products have 2:4 weights now ({self.rules}): "
            f"{self.changed:,} numbers set to zero, at least {pruned.kept.min():.1f} % of the "
            "magnitude of each weight kept"
        )

    def facts(self) -> dict[str, Any]:
        """Return the totals by name."""
        pruned = int(self.weights.pruned.sum())
        return {"rules": self.rules, "pruned_products": pruned, "changed": self.changed}

    def rows(self) -> list[dict[str, Any]]:
        """Return the table as a list of dictionaries."""
        return self.weights.to_dict("records")

    def __str__(self) -> str:
        weights = self.weights
        table = weights[["weight", "op"]].assign(
            shape=["x".join(map(str, shape)) or "?" for shape in weights["shape"]],
            verdict=weights.pruned.map({True: "2:4", False: "dense"}),
            kept=weights.kept.map("{:.1f} %".format).where(weights.pruned, ""),
        )
        if weights.also_used_by.map(len).any():
            table["also used by"] = weights.also_used_by.map(", ".join)
        table["reason"] = weights.reason
        return f"{self.summary}\n\n{table.to_string(index=False)}\n"


def prune_onnx(
    source: Path,
    target: Path,
    rules: str = "tensorrt",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> OnnxPruning:
    """Write a copy of an ONNX file in which weights are pruned 2:4 by magnitude.

    Of every four numbers that a product sums over, the two with the largest magnitude are kept;
    the magnitude of a quantised weight is that of the dequantised one. A stored tensor that
    several products use is pruned once, and not at all if they sum over different axes of it.

    Args:
        source: an ONNX file, with its external data where it says. It is only read.
        target: the copy to write, in one piece or not at all; external data, if the file has
            some, beside it in `<target>.data`.
        rules: `tensorrt`, `asp`, `cusparselt` or `any`; see `why_not_sparse`.
        include: only weights that match one of these patterns, such as `layer4.*`, by their
            own name or their node's.
        exclude: no weights that match one of these patterns.

    Raises:
        InputError: the file cannot be read, the target is one of its files, a pattern matches no
            weight, no weight can be pruned, or one has NaN or infinite numbers. Nothing is
            written.
        WriteError: the target cannot be written.
    """
    file = OnnxFile(source)
    _require_other(file, target)
    weights = select_file_weights(file, rules, include, exclude)
    reasons = [each.reason for each in weights]
    kept = [float("nan")] * len(weights)
    also: list[tuple[str, ...]] = [()] * len(weights)
    stored: dict[int, _Stored] = {}  # by the identity of the tensor
    for number, each in enumerate(weights):
        if not each.reason:
            try:
                use = _find(number, each)
            except _CannotError as error:
                reasons[number] = str(error)
                continue
            stored.setdefault(id(use.tensor), _Stored(use.tensor)).uses.append(use)
    changed = 0
    others = _other_uses(file)
    pruned: dict[int, np.ndarray] = {}
    for key, own in stored.items():
        try:
            keep = _keep(own)
        except _CannotError as error:
            for use in own.uses:
                reasons[use.number] = str(error)
            continue
        array = file.array(own.tensor)
        pruned[key] = np.where(keep, array, array.dtype.type(0))
        changed += int(np.count_nonzero(array) - np.count_nonzero(pruned[key]))
        for use in own.uses:
            kept[use.number], also[use.number] = use.kept, tuple(others.get(own.tensor.name, ()))
    if not pruned:
        raise InputError(_why_nothing(source, rules, weights, reasons))
    _write(file, pruned, Path(target))
    return OnnxPruning(_table(weights, reasons, kept, also), rules, changed)


def _table(
    weights: Sequence[FileWeight],
    reasons: Sequence[str],
    kept: Sequence[float],
    also: Sequence[tuple[str, ...]],
) -> "pd.DataFrame":
    import pandas as pd

    rows = [
        [each.product.weight, each.product.node, each.product.op, each.shape, not reason, *rest,
         reason]
        for each, reason, *rest in zip(weights, reasons, kept, also, strict=True)
    ]  # fmt: skip
    return pd.DataFrame(rows, columns=COLUMNS)


def _why_nothing(
    path: Path, rules: str, weights: Sequence[FileWeight], reasons: Sequence[str]
) -> str:
    if not weights:
        return f"{shown(path)} multiplies by no weight, so nothing can be pruned."
    first = weights[0].product.weight
    return (
        f"No weight of {shown(path)} can be pruned by the rules {rules!r} ({first}: {reasons[0]}). "
        "A report shows the reason of each; other rules may allow more."
    )


# --- where the numbers of a weight are stored ---


class _CannotError(Exception):
    """Why a weight cannot be pruned where it is stored."""


@dataclass
class _Use:
    """A product and the stored tensor that its weight takes its numbers from."""

    number: int  # of the row
    product: NodeWeight
    operand: np.ndarray  # the weight as the node sees it
    tensor: TensorProto
    places: np.ndarray | None  # of the operand's numbers in the stored tensor; None: the same
    kept: float = float("nan")


@dataclass
class _Stored:
    """A stored tensor and the products that use it."""

    tensor: TensorProto
    uses: list[_Use] = field(default_factory=list)


def _find(number: int, weight: FileWeight) -> _Use:
    """Return where a weight is stored.

    Raises:
        _CannotError: its zeros could not be stored.
    """
    product, scope = weight.product, weight.scope
    if product.input_axis is None:
        raise _CannotError(f"{product.op} stores its numbers packed in bytes")
    operand = _value(scope, product.operand)
    tensor, moves = _origin(scope, product.operand)
    places = None
    shape = tuple(tensor.dims)
    if moves:
        places = np.arange(np.prod(shape, dtype=np.int64)).reshape(shape)
        for inner, node in reversed(moves):
            feeds = {name: _value(inner, name) for name in node.input[1:] if name}
            feeds[node.input[0]] = places
            places = fold(node, node.output[0], feeds, inner.opsets)
        shape = places.shape
    if shape != operand.shape:
        raise _CannotError(f"{tensor.name} is spread over a larger matrix")
    return _Use(number, product, operand, tensor, places)


def _value(scope: Scope, name: str) -> np.ndarray:
    value = scope.resolve(name).value
    assert value is not None  # otherwise the weight would not have been eligible
    return value


def _origin(scope: Scope, name: str) -> tuple[TensorProto, list[tuple[Scope, NodeProto]]]:
    """Return the stored tensor behind a constant, and the nodes that move its numbers, last first.

    Raises:
        _CannotError: an operator is on the way behind which a zero may be another number, or the
            tensor is stored in a way that is not written here.
    """
    moves: list[tuple[Scope, NodeProto]] = []
    while True:
        if name in scope.arguments:
            scope, name = scope.arguments[name]
        elif name in scope.tensors:
            tensor = scope.tensors[name]
            if not isinstance(tensor, TensorProto):
                raise _CannotError("it is stored as a sparse tensor")
            return tensor, moves
        elif name in scope.returns:
            scope, name = scope.returns[name]
        elif name not in scope.producers and scope.outer is not None:
            scope = scope.outer
        else:
            node = scope.producers[name]
            if node.op_type == "Constant":
                return _of_constant(node, scope), moves
            if node.op_type in _MOVES and node.domain in STANDARD_DOMAINS:
                moves.append((scope, node))
            elif not _keeps_zeros(node, name):
                raise _CannotError(f"it is computed by {node.op_type}")
            name = _data(node, scope)


def _keeps_zeros(node: NodeProto, name: str) -> bool:
    if quantises(node):  # zero points that are not 0 are not eligible
        return name == node.output[0]
    return node.op_type in _KEEPS and node.domain in STANDARD_DOMAINS


def _data(node: NodeProto, scope: Scope) -> str:
    """Return the input that an operator takes its numbers from: the larger of two factors."""
    if node.op_type != "Mul":
        return node.input[0]
    sizes = [_value(scope, name).size for name in node.input]
    return node.input[int(sizes[1] > sizes[0])]


def _of_constant(node: NodeProto, scope: Scope) -> TensorProto:
    (item,) = node.attribute
    if item.name != "value":
        raise _CannotError("it is stored as a list or a sparse tensor")
    if scope.calls:
        raise _CannotError("it is stored in a function")
    return item.t


def _other_uses(file: OnnxFile) -> dict[str, list[str]]:
    """Return by stored tensor the nodes that take numbers from it in other ways than a product."""
    found: dict[str, list[str]] = {}
    for node in file.model.graph.node:
        if node.op_type in ("Gather", "GatherElements", "GatherND", "GatherBlockQuantized"):
            found.setdefault(node.input[0], []).append(f"{node.op_type} {node.name}".strip())
    return found


# --- masks ---


def _keep(stored: _Stored) -> np.ndarray:
    """Return which numbers of a stored tensor to keep, true where no product uses them.

    Raises:
        _CannotError: the products that use it would need different zeros.
    """
    shape = tuple(stored.tensor.dims)
    keep = np.zeros(shape, bool)
    used = np.zeros(shape, bool)
    for use in stored.uses:
        weight, dim = _ranked(use)
        mask = mask_2to4(weight, use.product.weight, dim)
        use.kept = kept_magnitude_2to4(weight, use.product.weight, dim)
        chosen = mask.numpy().reshape(use.operand.shape)
        if use.places is None:
            keep |= chosen
            used[...] = True
        else:
            keep.ravel()[use.places[chosen]] = True
            used.ravel()[use.places.ravel()] = True
    keep |= ~used
    if len(stored.uses) == 1 and stored.uses[0].places is None:
        return keep
    for use in stored.uses:
        own = keep if use.places is None else keep.ravel()[use.places]
        if not is_2to4(*_with_axis(own, use.product)):
            nodes = " and ".join(each.product.node for each in stored.uses)
            raise _CannotError(f"{nodes} sum over different axes of {stored.tensor.name}")
    return keep


def _ranked(use: _Use) -> tuple[Tensor, int]:
    """Return a weight in a type that can be ranked by magnitude, and the axis of its sums."""
    array = use.operand
    if array.dtype not in _RANKED:
        array = array.astype(np.float32)
    return _with_axis(array, use.product)


def _with_axis(array: np.ndarray, product: NodeWeight) -> tuple[Tensor, int]:
    """Return an array in the shape of a weight, and the axis that its product sums over."""
    tensor = torch.from_numpy(np.array(array))  # a copy: PyTorch warns of memory it cannot write
    if tensor.dim() == 1:
        return tensor[None], 1
    assert product.input_axis is not None  # see `_find`
    return tensor, product.input_axis


# --- writing ---


def _require_other(file: OnnxFile, target: Path) -> None:
    """Refuse a target that is the file itself or one with its external data."""
    folder = file.path.parent
    read = [file.path]
    for tensor in _all_tensors(file.model):
        if file.is_elsewhere(tensor):
            read += [folder / item.value for item in tensor.external_data if item.key == "location"]
    data = _data_path(target)
    for written in (target, data):
        if written.exists() and any(path.exists() and written.samefile(path) for path in read):
            raise InputError(f"{shown(written)} belongs to the file to read; write to another one.")
    if len(read) > 1 and data.exists() and not target.exists():
        raise InputError(
            f"{shown(data)} exists, where the external data of {shown(target)} belong. Move it, "
            "or name another file."
        )


def _data_path(target: Path) -> Path:
    return target.with_name(f"{target.name}.data")


def _write(file: OnnxFile, pruned: dict[int, np.ndarray], target: Path) -> None:
    """Write the model of a file with these arrays in place of some stored tensors."""
    elsewhere, inside = [], []
    for tensor in _all_tensors(file.model):
        if file.is_elsewhere(tensor):
            elsewhere.append(tensor)
        elif tensor.data_location == TensorProto.EXTERNAL or id(tensor) in pruned:
            inside.append(tensor)
    # The tensors change in place, and `pruned` knows them by their identity.
    with atomic_write(target) as part:
        if elsewhere:
            with atomic_write(_data_path(target)) as data:
                _write_data(file, pruned, elsewhere, data, _data_path(target).name)
        for tensor in inside:
            content = _content(file, pruned, tensor)
            for name in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
                tensor.ClearField(name)
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = content
        part.write_bytes(file.model.SerializeToString())


def _write_data(
    file: OnnxFile,
    pruned: dict[int, np.ndarray],
    tensors: Sequence[TensorProto],
    path: Path,
    name: str,
) -> None:
    """Write tensors one after the other, and let them say where they are."""
    with open(path, "wb") as data:
        for tensor in tensors:
            content = _content(file, pruned, tensor)
            data.write(bytes(-data.tell() % _ALIGNED))
            offset = data.tell()
            data.write(content)
            tensor.raw_data = b""  # `set_external_data` asks for it
            set_external_data(tensor, name, offset, len(content))
            tensor.ClearField("raw_data")


def _content(file: OnnxFile, pruned: dict[int, np.ndarray], tensor: TensorProto) -> bytes:
    """Return the bytes of a tensor, new or as they are."""
    if id(tensor) in pruned:
        return from_array(pruned[id(tensor)]).raw_data
    return bytes(file.content(tensor))


def _all_tensors(model: onnx.ModelProto) -> list[TensorProto]:
    """Return every tensor that a file stores, wherever in it."""
    nodes = [node for function in model.functions for node in function.node]
    return [*_tensors_of_graph(model.graph), *_tensors_of_nodes(nodes)]


def _tensors_of_graph(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _tensors_of_nodes(graph.node)


def _tensors_of_nodes(nodes: Sequence[NodeProto]) -> Iterator[TensorProto]:
    for node in nodes:
        for item in node.attribute:
            if item.HasField("t"):
                yield item.t
            yield from item.tensors
            for graph in [item.g] if item.HasField("g") else item.graphs:
                yield from _tensors_of_graph(graph)
