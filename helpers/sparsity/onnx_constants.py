"""What an ONNX file computes from constants alone, as the runtimes do when they load it.

A name in a graph is constant if it depends only on tensors that are stored in the file. Its value
is computed by the rules of ONNX: quantisation and dequantisation here, in every version of the
operator and in TensorRT's own, all other operators by ONNX's reference or, where that lacks a
version, by ONNX Runtime. Used in `04_export_onnx.ipynb`.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, helper
from onnx.reference import ReferenceEvaluator

from helpers.errors import InputError
from helpers.files import shown
from helpers.sparsity.onnx_file import STANDARD_DOMAINS, OnnxFile, Stored

MICROSOFT = "com.microsoft"  # the domain of ONNX Runtime's own operators
_RANDOM_OPS = (
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
    "RandomUniformLike",
)  # fmt: skip
_FLOATS = (AttributeProto.FLOAT, AttributeProto.FLOATS)
# Operators that hand on the numbers of their first input in another place, shape or type.
_MOVES = (
    "Cast", "CastLike", "Flatten", "Identity", "Reshape", "Slice", "Squeeze", "Transpose",
    "Unsqueeze",
)  # fmt: skip
# Operators that scale or cut their only input that is no constant, or add to it.
_SCALES = ("Add", "Div", "Expand", "Gather", "Mul", "Split", "Sub")


@dataclass(frozen=True)
class Constant:
    """A tensor that depends only on what is stored in the file.

    `sources` are the stored tensors that it is computed from, the largest first. `value` is None
    if the numbers are not known, and `why_unknown` says why. `is_shifted` says whether it was
    dequantised with a zero point that is not 0.
    """

    sources: tuple[str, ...]
    value: np.ndarray | None
    why_unknown: str = ""
    is_shifted: bool = False


# `onnx.inliner.inline_local_functions` is no replacement for the function calls below: it drops
# the default values of a function's attributes, and leaves a call as it is where the function is
# written for another opset. `onnxscript.optimizer.fold_constants` is none for `_evaluate`: its
# results lose the names under which the weights are stored.


@dataclass
class Scope:
    """The names in a graph, in the body of a node, or in one call of a function."""

    nodes: list[NodeProto]
    tensors: dict[str, Stored]
    opsets: dict[str, int]
    file: OnnxFile
    functions: dict[tuple[str, str, str], FunctionProto]
    shapes: dict[str, tuple[int | None, ...]]  # of the graph's tensors, where they are known
    outer: "Scope | None" = None  # of a body: the graph that its node is in
    # Of a call: for each input of the function, the scope that calls it and the name there.
    arguments: "dict[str, tuple[Scope, str]]" = field(default_factory=dict)
    inputs: frozenset[str] = frozenset()  # of a graph or a body: they come at run time
    calls: tuple[tuple[str, str, str], ...] = ()  # the functions that this scope is in

    def __post_init__(self) -> None:
        self.producers = {name: node for node in self.nodes for name in node.output if name}
        self.inner: list[list[Scope]] = []  # of each node: the function it calls, or its bodies
        self.returns: dict[str, tuple[Scope, str]] = {}  # of each output of a call
        self.choices: dict[str, list[tuple[Scope, str]]] = {}  # of each output of an If
        self.slices: dict[str, tuple[Scope, str]] = {}  # of a Scan's body: what they are cut from
        self.computed: set[str] = set()  # at run time
        # ONNX orders nodes so that each comes after those that it needs.
        for node in self.nodes:
            function = self.functions.get(_key(node))
            if function is not None:
                self._add_call(node, function)
                continue
            graphs = _graphs(node)
            bodies = [self._body(graph) for graph in graphs]
            self.inner.append(bodies)
            if bodies or not self._is_foldable(node):
                self.computed.update(node.output)
            if node.op_type == "Scan":
                self._feed_slices(node, bodies[0], graphs[0])
            if node.op_type == "If":
                for place, name in enumerate(node.output):
                    self.choices[name] = [
                        (body, graph.output[place].name)
                        for body, graph in zip(bodies, graphs, strict=True)
                    ]

    def _feed_slices(self, node: NodeProto, body: "Scope", graph: GraphProto) -> None:
        count = attributes_of(node)["num_scan_inputs"]
        for item, name in zip(graph.input[-count:], node.input[-count:], strict=True):
            body.slices[item.name] = self, name

    def walk(self) -> "Iterator[tuple[NodeProto, Scope]]":
        """Yield every node with its scope, each before those in its body.

        The call of a function is no node of its own: the nodes of the function stand for it.
        """
        for node, scopes in zip(self.nodes, self.inner, strict=True):
            if _key(node) not in self.functions:
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

    def require(self, name: str) -> None:
        """Raise an error for a tensor that no node computes and that is not stored either."""
        known = (self.arguments, self.inputs, self.tensors, self.producers)
        if any(name in names for names in known):
            return
        if self.outer is None:
            raise InputError(
                f"{shown(self.file.path)} is not a valid ONNX model: it uses the tensor {name!r}, "
                "which nothing in it computes. Export it again."
            )
        self.outer.require(name)

    def resolve(self, name: str) -> Constant:
        """Return a tensor for which `is_constant` holds."""
        known: dict[str, Constant] = {}
        waiting = [name]
        while waiting:  # no recursion: some files compute thousands of constants in a row
            current = waiting[-1]
            node = self.producers.get(current)
            if node is None or current in self.tensors or current in self.returns:
                known[current] = self._given(current)
            elif missing := [each for each in self._needed(node) if each not in known]:
                waiting += missing
                continue
            else:
                known[current] = self._evaluate(node, current, known)
            waiting.pop()
        return known[name]

    def _needed(self, node: NodeProto) -> list[str]:
        return [] if node.op_type in ("Shape", "Size") else [each for each in node.input if each]

    def _given(self, name: str) -> Constant:
        """Return a constant that no node of this scope computes."""
        if name in self.arguments:
            caller, argument = self.arguments[name]
            return caller.resolve(argument)
        if name in self.tensors:
            return Constant((name,), self.file.array(self.tensors[name]))
        if name in self.returns:
            function, output = self.returns[name]
            return function.resolve(output)
        assert self.outer is not None, name
        return self.outer.resolve(name)

    def _evaluate(self, node: NodeProto, name: str, known: dict[str, Constant]) -> Constant:
        if node.op_type == "Constant":
            return Constant((name,), _constant(node, self.file))
        if (static := self._static_shape(node)) is not None:
            of_node = math.prod(static) if node.op_type == "Size" else static
            return Constant((name,), np.asarray(of_node, np.int64))
        found = {source: known[source] for source in node.input if source}
        for constant in found.values():
            if constant.value is None:
                return constant
        by_size = sorted(found.values(), key=lambda one: np.asarray(one.value).size, reverse=True)
        sources = tuple(dict.fromkeys(each for one in by_size for each in one.sources))
        feeds = {source: np.asarray(constant.value) for source, constant in found.items()}
        try:
            value = _fold(node, name, feeds, self.opsets)
        except Exception:  # a custom operator may raise anything
            return Constant(sources, None, f"{node.op_type} before it cannot be evaluated")
        shifted = any(constant.is_shifted for constant in found.values())
        return Constant(sources, value, "", shifted or _shifts(node, feeds))

    def _is_foldable(self, node: NodeProto) -> bool:
        if node.op_type == "Constant" or self._static_shape(node) is not None:
            return True
        known = all(map(self.is_constant, node.input))
        return len(node.input) > 0 and known and node.op_type not in _RANDOM_OPS

    def _static_shape(self, node: NodeProto) -> tuple[int, ...] | None:
        """Return the shape that a Shape or Size node asks for, if the file fixes it."""
        if node.op_type not in ("Shape", "Size") or node.domain not in STANDARD_DOMAINS:
            return None
        fixed = self.full_shape(node.input[0])
        if fixed is None:
            return None
        attributes = attributes_of(node)
        return fixed[attributes.get("start", 0) : attributes.get("end", len(fixed))]

    def shape(self, name: str) -> tuple[int | None, ...] | None:
        """Return the shape of a tensor as far as the file tells it, without computing values."""
        if name in self.arguments:
            caller, argument = self.arguments[name]
            return caller.shape(argument)
        if name in self.tensors:
            return tuple(self.tensors[name].dims)
        if name in self.shapes:
            return self.shapes[name]
        if name in self.inputs or name in self.producers or self.outer is None:
            return None
        return self.outer.shape(name)

    def full_shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor if the file tells all of it."""
        shape = self.shape(name)
        if shape is None:
            return None
        fixed = tuple(size for size in shape if size is not None)
        return fixed if len(fixed) == len(shape) else None

    def origins(self, name: str) -> set[str]:
        """Return a tensor and those in this scope that it is moved from or scaled from."""
        found = {name}
        while (node := self.producers.get(name)) is not None:
            data = [each for each in node.input if each and not self.is_constant(each)]
            if node.op_type not in (*_MOVES, *_SCALES) or len(data) != 1:
                break
            name = data[0]
            found.add(name)
        return found

    @cached_property
    def products_at_run_time(self) -> list[tuple[NodeProto, set[str]]]:
        """The matrix products of two activations in this scope, with the left one's origins."""
        return [
            (node, self.origins(node.input[0]))
            for node in self.nodes
            if node.op_type == "MatMul" and not any(map(self.is_constant, node.input))
        ]

    def stored_behind(self, name: str) -> tuple[str, str] | None:
        """Return the stored matrix that a tensor is moved or chosen from at run time.

        The result is the matrix and the operator that makes it depend on the run, or None if the
        tensor is an activation.
        """
        operator = ""
        while not self.is_constant(name):
            if name in self.arguments:
                caller, argument = self.arguments[name]
                return caller.stored_behind(argument)
            if name in self.returns:
                function, output = self.returns[name]
                return function.stored_behind(output)
            if name in self.slices:
                scope, whole = self.slices[name]
                return (
                    (scope.resolve(whole).sources[0], "Scan") if scope.is_constant(whole) else None
                )
            if name in self.choices:
                for body, output in self.choices[name]:
                    if body.is_constant(output) and body.resolve(output).sources:
                        return body.resolve(output).sources[0], "If"
                return None
            node = self.producers.get(name)
            if node is None:
                inherited = self.outer is not None and name not in self.inputs
                return self.outer.stored_behind(name) if inherited and self.outer else None
            if node.op_type == "Where":
                data = next((each for each in node.input[1:] if self.is_constant(each)), "")
            elif node.op_type in _MOVES or _quantisation(node):
                data = node.input[0]
            else:
                return None
            if not data:
                return None
            operator, name = node.op_type, data
        constant = self.resolve(name)
        is_matrix = constant.value is None or constant.value.ndim > 1
        return (constant.sources[0], operator) if operator and is_matrix else None

    def _body(self, graph: GraphProto) -> "Scope":
        return replace(
            self,
            nodes=list(graph.node),
            tensors=initializers(graph),
            shapes={},
            outer=self,
            arguments={},
            inputs=frozenset(item.name for item in graph.input),
        )

    def _add_call(self, node: NodeProto, function: FunctionProto) -> None:
        if _key(node) in self.calls:
            raise InputError(
                f"{shown(self.file.path)} is not a valid ONNX model: its function "
                f"{function.name} calls itself. Export it again."
            )
        attributes = {item.name: item for item in (*function.attribute_proto, *node.attribute)}
        arguments = dict(zip_longest(function.input, node.input, fillvalue=""))
        scope = replace(
            self,
            nodes=[_with_arguments(inner, arguments, attributes) for inner in function.node],
            tensors={},
            shapes={},
            opsets={item.domain: item.version for item in function.opset_import},
            outer=None,
            arguments={name: (self, given) for name, given in arguments.items()},
            inputs=frozenset(),
            calls=(*self.calls, _key(node)),
        )
        self.inner.append([scope])
        for name, output in zip(node.output, function.output, strict=False):
            self.returns[name] = scope, output
            if not scope.is_constant(output):
                self.computed.add(name)


def scope_of(file: OnnxFile, shapes: dict[str, tuple[int | None, ...]]) -> Scope:
    """Return the names of a file's graph.

    Args:
        file: the file.
        shapes: of the graph's tensors, where they are known.
    """
    model = file.model
    tensors = initializers(model.graph)
    return Scope(
        nodes=list(model.graph.node),
        tensors=tensors,
        opsets={item.domain: item.version for item in model.opset_import},
        file=file,
        functions={_key(function): function for function in model.functions},
        shapes=shapes,
        # An input with an initializer has a default value, which the runtimes take for its value.
        inputs=frozenset(item.name for item in model.graph.input if item.name not in tensors),
    )


def attributes_of(node: NodeProto) -> dict[str, Any]:
    """Return the attributes of a node by name."""
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def initializers(graph: GraphProto) -> dict[str, Stored]:
    """Return the stored tensors of a graph by name."""
    dense: dict[str, Stored] = {tensor.name: tensor for tensor in graph.initializer}
    return dense | {tensor.values.name: tensor for tensor in graph.sparse_initializer}


def _key(item: NodeProto | FunctionProto) -> tuple[str, str, str]:
    """Return what a call and its function have in common: domain, name, overload."""
    name = item.op_type if isinstance(item, NodeProto) else item.name
    return "" if item.domain in STANDARD_DOMAINS else item.domain, name, item.overload


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


def _constant(node: NodeProto, file: OnnxFile) -> np.ndarray:
    """Return the value of a Constant node, whichever attribute holds it."""
    (item,) = node.attribute
    value = helper.get_attribute_value(item)
    if isinstance(value, Stored):
        return file.array(value)
    return np.asarray(value, np.float32 if item.type in _FLOATS else None)


# --- values ---


def _fold(
    node: NodeProto, name: str, feeds: dict[str, np.ndarray], opsets: dict[str, int]
) -> np.ndarray:
    """Return an output of a node for constant inputs."""
    inputs = [feeds.get(each) for each in node.input]
    quantise = _quantisation(node)
    if quantise is not None:
        outputs = quantise(inputs, attributes_of(node), opsets.get("", 1))
        return outputs[list(node.output).index(name)]
    if node.domain in STANDARD_DOMAINS and inputs[0] is not None:
        if node.op_type == "Transpose":  # a view
            return inputs[0].transpose(attributes_of(node).get("perm"))
        if node.op_type == "Identity":
            return inputs[0]
    try:
        return _by_reference(node, name, feeds, opsets)
    except Exception:  # it lacks many old versions of operators
        return _by_onnxruntime(node, name, feeds, opsets)


def _by_reference(
    node: NodeProto, name: str, feeds: dict[str, np.ndarray], opsets: dict[str, int]
) -> np.ndarray:
    inputs = [helper.make_value_info(source, onnx.TypeProto()) for source in feeds]
    outputs = [helper.make_value_info(name, onnx.TypeProto())]
    graph = helper.make_graph([node], "constant", inputs, outputs)
    (value,) = ReferenceEvaluator(graph, opsets=opsets).run([name], dict(feeds))
    return np.asarray(value)


def _by_onnxruntime(
    node: NodeProto, name: str, feeds: dict[str, np.ndarray], opsets: dict[str, int]
) -> np.ndarray:
    import onnxruntime

    inputs = [
        helper.make_tensor_value_info(
            source, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape
        )
        for source, value in feeds.items()
    ]
    outputs = [helper.make_value_info(name, onnx.TypeProto())]
    graph = helper.make_graph([node], "constant", inputs, outputs)
    imports = [helper.make_opsetid(domain, version) for domain, version in opsets.items()]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(
        model.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"],
        enable_fallback=0,  # it would print the error and try the same again
    )
    (value,) = session.run([name], dict(feeds))
    return np.asarray(value)


# --- quantisation ---


def quantises(node: NodeProto) -> bool:
    """Return whether a node quantises or dequantises, in any form that is known here."""
    return _quantisation(node) is not None


_Inputs = list[np.ndarray | None]
_Quantisation = Callable[[_Inputs, dict[str, Any], int], tuple[np.ndarray, ...]]
# TensorRT's own operators: TRT_FP8QuantizeLinear, TRT_INT4DequantizeLinear and so on.
_TENSORRT_OP = re.compile(
    r"TRT_(?P<type>INT8|INT4|FP8|FP4|MXFP8)(?P<what>QuantizeLinear|DequantizeLinear|DynamicQuantize)"
)
_TENSORRT_TYPES = {
    "INT8": np.dtype(np.int8),
    "INT4": np.dtype(ml_dtypes.int4),
    "FP8": np.dtype(ml_dtypes.float8_e4m3fn),
    "MXFP8": np.dtype(ml_dtypes.float8_e4m3fn),
    "FP4": np.dtype(ml_dtypes.float4_e2m1fn),
}


def _quantisation(node: NodeProto) -> _Quantisation | None:
    """Return what a node does if it quantises or dequantises, whatever domain it is from."""
    if node.op_type == "QuantizeLinear":
        return _quantize_linear
    if node.op_type == "DequantizeLinear":
        return _dequantize_linear
    match = _TENSORRT_OP.fullmatch(node.op_type)
    if match is None:
        return None
    kind, what = match["type"], match["what"]
    dtype = _TENSORRT_TYPES[kind]
    if what == "DequantizeLinear":
        return lambda inputs, attributes, opset: _dequantize_linear(
            [_stored_as(inputs[0], dtype), *inputs[1:]], attributes, opset
        )
    if what == "QuantizeLinear":
        return lambda inputs, attributes, _: (
            quantize(inputs[0], inputs[1], None, dtype, **_blocks(attributes)),
        )
    if kind == "FP4":
        return _quantize_to_fp4
    return _quantize_to_mxfp8


def _shifts(node: NodeProto, feeds: dict[str, np.ndarray]) -> bool:
    """Return whether a node dequantises with a zero point that is not 0."""
    if node.op_type != "DequantizeLinear" or len(node.input) < 3 or not node.input[2]:
        return False
    return bool(np.any(feeds[node.input[2]]))


def _stored_as(values: np.ndarray | None, dtype: np.dtype) -> np.ndarray | None:
    """Return numbers that a file holds as plain bytes in the type that their operator has."""
    if values is not None and values.dtype == np.uint8 and dtype.itemsize == 1:
        return values.view(dtype)
    return values


def _blocks(attributes: dict[str, Any]) -> dict[str, int]:
    return {"axis": attributes.get("axis", 1), "block_size": attributes.get("block_size", 0)}


def _dequantize_linear(
    inputs: _Inputs, attributes: dict[str, Any], _: int
) -> tuple[np.ndarray, ...]:
    values, scale, zero_point = (*inputs, None)[:3]
    return (dequantize(values, scale, zero_point, **_blocks(attributes)),)


def _quantize_linear(inputs: _Inputs, attributes: dict[str, Any], _: int) -> tuple[np.ndarray, ...]:
    values, scale, zero_point = (*inputs, None)[:3]
    dtype = np.dtype(np.uint8) if zero_point is None else zero_point.dtype
    if attributes.get("output_dtype"):
        dtype = helper.tensor_dtype_to_np_dtype(attributes["output_dtype"])
    return (quantize(values, scale, zero_point, dtype, **_blocks(attributes)),)


def dequantize(
    values: np.ndarray | None,
    scale: np.ndarray | None,
    zero_point: np.ndarray | None = None,
    axis: int = 1,
    block_size: int = 0,
) -> np.ndarray:
    """Return (values - zero point) * scale by the rules of ONNX, in the type of the scale.

    Args:
        values: of any integer or 8-bit or 4-bit floating-point type.
        scale: one number, one for each index of `axis`, or one for each block along it.
        zero_point: in the shape of `scale`; 0 if left out.
        axis: of `values`.
        block_size: how many numbers along `axis` share a scale.
    """
    values, scale = np.asarray(values), np.asarray(scale)
    result = values.astype(np.float32)
    if zero_point is not None and np.any(zero_point):
        result -= _spread(zero_point.astype(np.float32), values.shape, axis, block_size)
    result *= _spread(_as_scale(scale), values.shape, axis, block_size)
    narrow = scale.dtype.itemsize == 1  # of an FP8 scale itself, the result is FP32
    return result if narrow else result.astype(scale.dtype, copy=False)


def quantize(
    values: np.ndarray | None,
    scale: np.ndarray | None,
    zero_point: np.ndarray | None,
    dtype: np.dtype,
    axis: int = 1,
    block_size: int = 0,
) -> np.ndarray:
    """Return values / scale + zero point, rounded and saturated to a type, by ONNX's rules.

    Args:
        values: floating-point numbers.
        scale: as `dequantize` takes it.
        zero_point: as `dequantize` takes it.
        dtype: of the result.
        axis: of `values`.
        block_size: how many numbers along `axis` share a scale.
    """
    values, scale = np.asarray(values), np.asarray(scale)
    result = values.astype(np.float32) / _spread(_as_scale(scale), values.shape, axis, block_size)
    if "float" in dtype.name:
        largest = float(ml_dtypes.finfo(dtype).max)
        return np.clip(result, -largest, largest, out=result).astype(dtype)
    np.rint(result, out=result)
    if zero_point is not None and np.any(zero_point):
        result += _spread(zero_point.astype(np.float32), values.shape, axis, block_size)
    limits = ml_dtypes.iinfo(dtype)
    return np.clip(result, float(limits.min), float(limits.max), out=result).astype(dtype)


def _as_scale(scale: np.ndarray) -> np.ndarray:
    """Return scales as FP32; one byte that is an exponent (MX formats) is a power of two."""
    if scale.dtype == np.uint8:
        return np.exp2(scale.astype(np.float32) - 127)
    return scale.astype(np.float32)


def _spread(values: np.ndarray, shape: tuple[int, ...], axis: int, block_size: int) -> np.ndarray:
    """Return scales or zero points so that they broadcast against a tensor of that shape."""
    if values.size == 1:
        return values.reshape(())
    if values.ndim == 1 and not block_size:
        by_axis = [1] * len(shape)
        by_axis[axis] = len(values)
        return values.reshape(by_axis)
    if not block_size:
        if values.ndim != len(shape):
            raise ValueError("scales do not fit")
        return values  # one for each index, in a tensor of the same rank
    spread = values.repeat(block_size, axis)
    return spread[tuple(slice(size) for size in shape)]


def _quantize_to_fp4(inputs: _Inputs, attributes: dict[str, Any], _: int) -> tuple[np.ndarray, ...]:
    """Return FP4 numbers and the FP8 scales of their blocks, relative to one FP32 scale.

    Source: NVIDIA/TensorRT, documentation of IDynamicQuantizeLayer.
    """
    values, scale = np.asarray(inputs[0], np.float32), np.asarray(inputs[1], np.float32)
    axis, size = attributes.get("axis", -1), attributes.get("block_size", 16)
    largest = _largest_of_blocks(values, axis, size)
    relative = quantize(largest / 6, scale, None, _TENSORRT_TYPES["FP8"])
    blocks = relative.astype(np.float32) * scale
    blocks[blocks == 0] = 1  # a block of zeros
    return quantize(values, blocks, None, _TENSORRT_TYPES["FP4"], axis, size), relative


def _quantize_to_mxfp8(
    inputs: _Inputs, attributes: dict[str, Any], _: int
) -> tuple[np.ndarray, ...]:
    """Return FP8 numbers and the scales of their blocks, powers of two.

    Source: OCP Microscaling Formats (MX) specification 1.0, section 6.3.
    """
    values = np.asarray(inputs[0], np.float32)
    axis, size = attributes.get("axis", -1), attributes.get("block_size", 32)
    largest = _largest_of_blocks(values, axis, size) / 448
    with np.errstate(divide="ignore"):
        exponents = np.clip(np.ceil(np.log2(largest)) + 127, 0, 254).astype(np.uint8)
    return quantize(values, exponents, None, _TENSORRT_TYPES["MXFP8"], axis, size), exponents


def _largest_of_blocks(values: np.ndarray, axis: int, size: int) -> np.ndarray:
    starts = np.arange(0, values.shape[axis], size)
    return np.maximum.reduceat(np.abs(values), starts, axis)
