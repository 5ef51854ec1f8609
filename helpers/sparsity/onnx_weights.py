"""The weights of an ONNX file as its nodes see them.

Whatever a file computes from constants alone (casts, transpositions, reshapes,
dequantisation) is computed first. Used in `04_export_onnx.ipynb`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto, helper
from onnx.numpy_helper import to_array
from onnx.reference import ReferenceEvaluator

from helpers.errors import InputError
from helpers.files import shown

# The operators that TensorRT runs sparse, and their inputs that can be weights.
_SPARSE_OPS = {"Conv": (1,), "Gemm": (0, 1), "MatMul": (0, 1)}
# Other operators that multiply by weights.
_DENSE_OPS = {
    "ConvInteger": (1,),
    "ConvTranspose": (1,),
    "DeformConv": (1,),
    "Einsum": (0, 1, 2, 3),
    "GRU": (1, 2),
    "LSTM": (1, 2),
    "MatMulInteger": (0, 1),
    "QLinearConv": (3,),
    "QLinearMatMul": (0, 3),
    "RNN": (1, 2),
}
_RANDOM_OPS = ("Bernoulli", "Multinomial", "RandomNormalLike", "RandomUniformLike")
STANDARD_DOMAINS = ("", "ai.onnx")
_FLOATS = (AttributeProto.FLOAT, AttributeProto.FLOATS)

_Stored = TensorProto | onnx.SparseTensorProto


def load_onnx(path: Path) -> onnx.ModelProto:
    """Return an ONNX model; tensors in external files are checked, but not read.

    Raises:
        InputError: the file is missing or is not an ONNX model.
    """
    try:
        model = onnx.load(path, load_external_data=False)
        # The checker parses the file once more, in C++: it takes a path or bytes, no parsed
        # model, and looks for external data only if it has the path.
        onnx.checker.check_model(str(path))
    except OSError as error:
        raise InputError(f"{shown(path)} cannot be read: {error.strerror}.") from error
    except Exception as error:  # protobuf and ONNX raise classes without a common base
        reason = str(error).partition("\n")[0]
        raise InputError(f"{shown(path)} is not a valid ONNX model: {reason}") from error
    return model


@dataclass(frozen=True)
class NodeWeight:
    """A weight that a node of an ONNX file multiplies by.

    `value` is None if the numbers are not known, and `why_unknown` says why. With `in_fours` the
    value is shaped (out, in, ...), where `in` is the axis that is summed over; without, the
    operator never runs sparse and the value has the shape in which it is stored.
    """

    node: str
    op: str
    weight: str  # its name in the file, or if its numbers are not known in the node
    value: np.ndarray | None
    groups: int = 1
    in_fours: bool = False
    why_unknown: str = ""


def node_weights(path: Path) -> Iterator[NodeWeight]:
    """Yield the weights of every convolution, matrix product and recurrent layer in a file.

    A weight that is computed at run time is included if its node could run sparse, and so are
    the weights in the bodies of If, Loop and Scan and in local functions.

    Raises:
        InputError: the file is missing or damaged, or is not an ONNX model.
    """
    model = load_onnx(path)
    try:
        scope = _Scope(
            nodes=list(model.graph.node),
            tensors=_initializers(model.graph),
            opsets={item.domain: item.version for item in model.opset_import},
            folder=Path(path).parent,
            functions={_key(function): function for function in model.functions},
        )
        for node, inner in scope.walk():
            yield from _weights_of(node, inner)
    except RecursionError as error:
        raise InputError(
            f"The constants or functions of {shown(path)} are nested too deeply. Simplify the "
            "model first, for example with onnxruntime's or polygraphy's constant folding."
        ) from error


def _weights_of(node: NodeProto, scope: "_Scope") -> Iterator[NodeWeight]:
    """Yield the weights of one node; most nodes have none."""
    if node.domain not in STANDARD_DOMAINS:
        return
    sides = _SPARSE_OPS.get(node.op_type) or _DENSE_OPS.get(node.op_type, ())
    candidates = [side for side in sides if side < len(node.input) and node.input[side]]
    constant = [side for side in candidates if scope.is_constant(node.input[side])]
    for side in constant:
        yield _weight_at(node, scope, side)
    if not constant and node.op_type in _SPARSE_OPS:
        why = "the weight is computed at run time"
        name = node.input[candidates[-1]]
        yield NodeWeight(node.name, node.op_type, name, None, why_unknown=why)


def _weight_at(node: NodeProto, scope: "_Scope", side: int) -> NodeWeight:
    name = node.input[side]
    source = scope.resolve(name)
    if source.value is None:
        return NodeWeight(node.name, node.op_type, name, None, why_unknown=source.why_unknown)
    weight = NodeWeight(node.name, node.op_type, source.name, source.value)
    if source.value.size == 0 or source.value.ndim < (1 if node.op_type == "MatMul" else 2):
        why = f"a weight cannot have the shape {source.value.shape}"
        return replace(weight, value=None, why_unknown=why)
    if node.op_type in _DENSE_OPS:
        return weight
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    value = _output_channels_first(source.value, node.op_type, side, attributes)
    return replace(weight, value=value, groups=attributes.get("group", 1), in_fours=True)


def _output_channels_first(
    weight: np.ndarray, op: str, side: int, attributes: dict[str, Any]
) -> np.ndarray:
    """Return a weight as (out, in, ...), where `in` is the axis that is summed over."""
    if op == "Gemm":
        transposed = attributes.get("transB" if side else "transA", 0)
        return weight if bool(transposed) == bool(side) else weight.T
    if op == "MatMul":
        # The sum is over the last axis of the left factor and the last but one of the right.
        weight = weight.swapaxes(-1, -2) if side and weight.ndim > 1 else weight
        return weight.reshape(-1, weight.shape[-1])
    return weight


@dataclass(frozen=True)
class _Constant:
    """A tensor that depends only on what is stored in the file."""

    name: str  # of the stored tensor that it is computed from
    value: np.ndarray | None  # None: not known, and `why_unknown` says why
    why_unknown: str = ""


# `onnx.inliner.inline_local_functions` is no replacement for the function calls below: it drops
# the default values of a function's attributes, and leaves a call as it is where the function is
# written for another opset. `onnxscript.optimizer.fold_constants` is none for `_evaluate`: its
# results lose the names under which the weights are stored.


@dataclass
class _Scope:
    """The names in a graph, in the body of a node, or in one call of a function."""

    nodes: list[NodeProto]
    tensors: dict[str, _Stored]
    opsets: dict[str, int]
    folder: Path
    functions: dict[tuple[str, str, str], FunctionProto]
    outer: "_Scope | None" = None  # of a body: the graph that its node is in
    # Of a call: for each input of the function, the scope that calls it and the name there.
    arguments: "dict[str, tuple[_Scope, str]]" = field(default_factory=dict)
    inputs: frozenset[str] = frozenset()  # of a body: they come at run time

    def __post_init__(self) -> None:
        self.producers = {name: node for node in self.nodes for name in node.output}
        self.inner: list[list[_Scope]] = []  # of each node: the function it calls, or its bodies
        self.returns: dict[str, tuple[_Scope, str]] = {}  # of each output of a call
        self.computed: set[str] = set()  # at run time
        # ONNX orders nodes so that each comes after those that it needs.
        for node in self.nodes:
            function = self.functions.get(_key(node))
            if function is not None:
                self._add_call(node, function)
                continue
            bodies = [self._body(graph) for graph in _graphs(node)]
            self.inner.append(bodies)
            if bodies or not self._is_foldable(node):
                self.computed.update(node.output)

    def walk(self) -> "Iterator[tuple[NodeProto, _Scope]]":
        """Yield every node with its scope, each before those in its body."""
        for node, scopes in zip(self.nodes, self.inner, strict=True):
            yield node, self
            for scope in scopes:
                yield from scope.walk()

    def is_constant(self, name: str) -> bool:
        """Return whether a tensor depends only on what is stored in the file."""
        if not name:  # an input that is left out
            return True
        if name in self.arguments:
            caller, argument = self.arguments[name]
            return caller.is_constant(argument)
        if name in self.inputs or name in self.computed:
            return False
        if name in self.tensors or name in self.producers:
            return True
        return self.outer is not None and self.outer.is_constant(name)

    def resolve(self, name: str) -> _Constant:
        """Return a tensor for which `is_constant` holds."""
        if name in self.arguments:
            caller, argument = self.arguments[name]
            return caller.resolve(argument)
        if name in self.tensors:
            return _Constant(name, _array(self.tensors[name], self.folder))
        if name in self.returns:
            function, output = self.returns[name]
            return function.resolve(output)
        if name in self.producers or self.outer is None:
            return self._evaluate(self.producers[name], name)
        return self.outer.resolve(name)

    def _evaluate(self, node: NodeProto, name: str) -> _Constant:
        if node.op_type == "Constant":
            return _Constant(name, _constant(node, self.folder))
        found = {source: self.resolve(source) for source in node.input if source}
        for constant in found.values():
            if constant.value is None:
                return constant
        feeds = {source: constant.value for source, constant in found.items()}
        inputs = [helper.make_value_info(source, onnx.TypeProto()) for source in feeds]
        outputs = [helper.make_value_info(name, onnx.TypeProto())]
        graph = helper.make_graph([node], "constant", inputs, outputs)
        try:
            (value,) = ReferenceEvaluator(graph, opsets=self.opsets).run([name], feeds)
        except Exception:  # a custom operator may raise anything
            return _Constant(name, None, f"{node.op_type} before it cannot be evaluated")
        return _Constant(found[node.input[0]].name, np.asarray(value))

    def _is_foldable(self, node: NodeProto) -> bool:
        if node.op_type == "Constant":
            return True
        known = all(map(self.is_constant, node.input))
        return len(node.input) > 0 and known and node.op_type not in _RANDOM_OPS

    def _body(self, graph: GraphProto) -> "_Scope":
        return replace(
            self,
            nodes=list(graph.node),
            tensors=_initializers(graph),
            outer=self,
            arguments={},
            inputs=frozenset(item.name for item in graph.input),
        )

    def _add_call(self, node: NodeProto, function: FunctionProto) -> None:
        attributes = {item.name: item for item in (*function.attribute_proto, *node.attribute)}
        arguments = dict(zip_longest(function.input, node.input, fillvalue=""))
        scope = replace(
            self,
            nodes=[_with_arguments(inner, arguments, attributes) for inner in function.node],
            tensors={},
            opsets={item.domain: item.version for item in function.opset_import},
            outer=None,
            arguments={name: (self, given) for name, given in arguments.items()},
            inputs=frozenset(),
        )
        self.inner.append([scope])
        for name, output in zip(node.output, function.output, strict=False):
            self.returns[name] = scope, output
            if not scope.is_constant(output):
                self.computed.add(name)


def _key(item: NodeProto | FunctionProto) -> tuple[str, str, str]:
    """Return what a call and its function have in common: domain, name, overload."""
    name = item.op_type if isinstance(item, NodeProto) else item.name
    return "" if item.domain in STANDARD_DOMAINS else item.domain, name, item.overload


def _initializers(graph: GraphProto) -> dict[str, _Stored]:
    dense: dict[str, _Stored] = {tensor.name: tensor for tensor in graph.initializer}
    return dense | {tensor.values.name: tensor for tensor in graph.sparse_initializer}


def _graphs(node: NodeProto) -> list[GraphProto]:
    """Return the bodies of an If, a Loop or a Scan."""
    return [
        graph
        for item in node.attribute
        for graph in ([item.g] if item.HasField("g") else item.graphs)
    ]


def _with_arguments(
    node: NodeProto, arguments: dict[str, str], attributes: dict[str, AttributeProto]
) -> NodeProto:
    """Return a node of a function as one call sees it, with the attributes of the call."""
    bound = NodeProto()
    bound.CopyFrom(node)
    bound.input[:] = [name if arguments.get(name, name) else "" for name in node.input]
    del bound.attribute[:]
    for item in node.attribute:
        if item.ref_attr_name and item.ref_attr_name not in attributes:
            continue  # the operator has its own default
        given = bound.attribute.add()
        given.CopyFrom(attributes.get(item.ref_attr_name, item))
        given.name = item.name
    for graph in _graphs(bound):
        inner = [_with_arguments(inner, arguments, attributes) for inner in graph.node]
        del graph.node[:]
        graph.node.extend(inner)
    return bound


def _constant(node: NodeProto, folder: Path) -> np.ndarray:
    """Return the value of a Constant node, whichever attribute holds it."""
    (item,) = node.attribute
    value = helper.get_attribute_value(item)
    if isinstance(value, TensorProto | onnx.SparseTensorProto):
        return _array(value, folder)
    return np.asarray(value, np.float32 if item.type in _FLOATS else None)


def _array(tensor: _Stored, folder: Path) -> np.ndarray:
    """Return a stored tensor, without a copy if its bytes allow it.

    Raises:
        InputError: its bytes are missing, or are not as many as its shape says.
    """
    stored = tensor if isinstance(tensor, TensorProto) else tensor.values
    try:
        if isinstance(tensor, TensorProto):
            return to_array(tensor, str(folder))
        values, places = to_array(stored, str(folder)), to_array(tensor.indices, str(folder))
        dense = np.zeros(tuple(tensor.dims), values.dtype)
        by_axis = places.T if places.ndim == 2 else np.unravel_index(places, dense.shape)
        dense[tuple(by_axis)] = values
    except Exception as error:  # ONNX and NumPy raise classes without a common base
        reason = str(error).partition("\n")[0]
        raise InputError(
            f"The tensor {stored.name} cannot be read: {reason}. Export the model again, or copy "
            "the files of its external data beside it."
        ) from error
    return dense
