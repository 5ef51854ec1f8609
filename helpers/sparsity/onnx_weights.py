"""The weights of an ONNX file as its nodes see them.

Whatever a file computes from constants alone (casts, transpositions, reshapes,
dequantisation) is computed first.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto, helper
from onnx.numpy_helper import to_array
from onnx.reference import ReferenceEvaluator

from helpers.errors import InputError
from helpers.files import shown

_RANDOM_OPS = ("Bernoulli", "Multinomial", "RandomNormalLike", "RandomUniformLike")


STANDARD_DOMAINS = ("", "ai.onnx")  # of the standard's own operators
_FLOATS = (AttributeProto.FLOAT, AttributeProto.FLOATS)


def load_onnx(path: Path) -> onnx.ModelProto:
    """Return an ONNX model; tensors in files of their own are checked and left there.

    Raises:
        InputError: the file is missing or is not an ONNX model.
    """
    try:
        model = onnx.load(path, load_external_data=False)
        # By its path: as an object it would be copied, and 2 GB were the limit.
        onnx.checker.check_model(str(path))
    except OSError as error:
        raise InputError(f"{shown(path)} cannot be read: {error.strerror}.") from error
    except Exception as error:  # protobuf and ONNX raise classes without a common base
        reason = str(error).partition("\n")[0]
        raise InputError(f"{shown(path)} is not a valid ONNX model: {reason}") from error
    return model


class _Untold(Exception):  # noqa: N818
    """Why the value of a constant cannot be told."""


@dataclass
class _Scope:
    """What is known of the names in a graph, in a body of one, or in one call of a function."""

    nodes: list[NodeProto]
    tensors: dict[str, TensorProto | onnx.SparseTensorProto]
    opsets: dict[str, int]
    folder: Path
    functions: dict[tuple, FunctionProto]
    outer: "_Scope | None" = None
    # Of a function: its inputs, by the names in the scope that calls it.
    arguments: dict[str, str] | None = None
    # Of a body: its inputs, which come at run time.
    inputs: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        self.producers = {name: node for node in self.nodes for name in node.output}
        self.bodies: list[list[_Scope]] = []  # of each node
        self.calls: dict[str, _Scope] = {}  # of each output of a call
        self.computed: set[str] = set()  # at run time
        # ONNX orders nodes so that each comes after those that it needs.
        for node in self.nodes:
            call = self._call(node)
            bodies = [call] if call else [self._body(graph) for graph in _graphs(node)]
            self.bodies.append(bodies)
            for index, name in enumerate(node.output):
                if call:
                    self.calls[name] = call
                    constant = call.is_constant(self.functions[_key(node)].output[index])
                else:
                    constant = not bodies and self._is_foldable(node)
                if not constant:
                    self.computed.add(name)

    def walk(self) -> Iterator[tuple[NodeProto, "_Scope"]]:
        """Yield every node, each before those in its body, with its scope."""
        for node, bodies in zip(self.nodes, self.bodies, strict=True):
            yield node, self
            for body in bodies:
                yield from body.walk()

    def is_constant(self, name: str) -> bool:
        """Return whether a tensor depends on nothing but what stands in the file."""
        if not name:  # an input left out
            return True
        if self.arguments is not None and name in self.arguments:
            return self.outer.is_constant(self.arguments[name])
        if name in self.inputs or name in self.computed:
            return False
        if name in self.tensors or name in self.producers:
            return True
        return self.outer is not None and self.outer.is_constant(name)

    def resolve(self, name: str) -> tuple[str, np.ndarray]:
        """Return a constant and the name under which it is stored.

        Raises:
            _Untold: it stands behind a node that cannot be evaluated here.
        """
        if self.arguments is not None and name in self.arguments:
            return self.outer.resolve(self.arguments[name])
        if name in self.tensors:
            return name, _array(self.tensors[name], self.folder)
        if name in self.calls:
            node = self.producers[name]
            output = self.functions[_key(node)].output[list(node.output).index(name)]
            return self.calls[name].resolve(output)
        if name in self.producers:
            return self._evaluate(self.producers[name], name)
        return self.outer.resolve(name)

    def _evaluate(self, node: NodeProto, name: str) -> tuple[str, np.ndarray]:
        if node.op_type == "Constant":
            return name, _constant(node, self.folder)
        found = {source: self.resolve(source) for source in node.input if source}
        feeds = {source: value for source, (_, value) in found.items()}
        inputs = [helper.make_value_info(source, onnx.TypeProto()) for source in feeds]
        outputs = [helper.make_value_info(name, onnx.TypeProto())]
        graph = helper.make_graph([node], "constant", inputs, outputs)
        try:
            (value,) = ReferenceEvaluator(graph, opsets=self.opsets).run([name], feeds)
        except Exception as error:  # whatever an operator of anybody's may raise
            raise _Untold(f"{node.op_type} before it cannot be evaluated") from error
        return found[node.input[0]][0], np.asarray(value)

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
            arguments=None,
            inputs=frozenset(item.name for item in graph.input),
        )

    def _call(self, node: NodeProto) -> "_Scope | None":
        function = self.functions.get(_key(node))
        if function is None:
            return None
        attributes = {item.name: item for item in (*function.attribute_proto, *node.attribute)}
        arguments = dict(zip_longest(function.input, node.input, fillvalue=""))
        return replace(
            self,
            nodes=[_with_arguments(inner, arguments, attributes) for inner in function.node],
            tensors={},
            opsets={item.domain: item.version for item in function.opset_import},
            outer=self,
            arguments=arguments,
            inputs=frozenset(),
        )


def _key(item: NodeProto | FunctionProto) -> tuple[str, str, str]:
    name = item.op_type if isinstance(item, NodeProto) else item.name
    return "" if item.domain in STANDARD_DOMAINS else item.domain, name, item.overload


def _initializers(graph: GraphProto) -> dict[str, TensorProto | onnx.SparseTensorProto]:
    dense = {tensor.name: tensor for tensor in graph.initializer}
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
            continue  # the operator's own default holds
        given = bound.attribute.add()
        given.CopyFrom(attributes.get(item.ref_attr_name, item))
        given.name = item.name
    for graph in _graphs(bound):
        inner = [_with_arguments(inner, arguments, attributes) for inner in graph.node]
        del graph.node[:]
        graph.node.extend(inner)
    return bound


def _constant(node: NodeProto, folder: Path) -> np.ndarray:
    """Return what a Constant node holds, in whichever attribute."""
    (item,) = node.attribute
    value = helper.get_attribute_value(item)
    if isinstance(value, TensorProto | onnx.SparseTensorProto):
        return _array(value, folder)
    return np.asarray(value, np.float32 if item.type in _FLOATS else None)


def _array(tensor: TensorProto | onnx.SparseTensorProto, folder: Path) -> np.ndarray:
    """Return a stored tensor, without a copy where its bytes allow it.

    Raises:
        InputError: its bytes are not there, or not as many as its shape says.
    """
    stored = tensor if isinstance(tensor, TensorProto) else tensor.values
    try:
        if stored is tensor:
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
