"""Is every eligible weight of a file or a network 2:4? Used in `04_export_onnx.ipynb`.

A weight of an ONNX file is looked at as its node sees it: whatever the file computes
from constants alone (casts, transpositions, reshapes, dequantisation) is computed first.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import torch
from onnx import AttributeProto, FunctionProto, GraphProto, NodeProto, TensorProto, helper
from onnx.numpy_helper import to_array
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from helpers.checks import TutorialError
from helpers.layers import layer_weights
from helpers.models import create_model
from helpers.settings import relative
from helpers.sparsity.compressed import read_checkpoint
from helpers.sparsity.eligibility import why_not_sparse, why_not_tensorrt

_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


def verify_file(path: Path, model: str | None = None) -> pd.DataFrame:
    """Return the table of `verify_checkpoint` for a safetensors file, else of `verify_onnx`.

    Args:
        path: an ONNX file or a safetensors checkpoint.
        model: the network's name, for a checkpoint that does not tell it.

    Raises:
        TutorialError: the file is missing, damaged, or of a kind that is not read.
    """
    path = Path(path)
    if path.suffix in _PICKLES:
        raise TutorialError(
            f"{relative(path)} may be a pickle, and reading one can run any program in it. "
            "Save the state_dict with helpers.sparsity.save_compressed, or as safetensors."
        )
    return verify_checkpoint(path, model) if path.suffix == ".safetensors" else verify_onnx(path)


# --- networks and checkpoints ---


def verify_model(model: nn.Module) -> pd.DataFrame:
    """Return one row for each weight of a network's linear, convolution and attention layers.

    The columns are `layer`, `type` (its class), `weight` (the parameter's name), `shape`,
    `groups`, `eligible` (by TensorRT's rules), `is_2to4` along the input channels,
    `zeros` (share of zero weights in per cent) and `reason` (why a weight is not
    eligible). A tied weight has one row.

    Args:
        model: any network, on any device.

    Explained in `02_prune_2_4.ipynb`.
    """
    return _table_of(model, dict(model.named_parameters()))


def verify_checkpoint(path: Path, model: str | None = None) -> pd.DataFrame:
    """Return the table of `verify_model` for a safetensors file, compressed or not.

    The network's name, in the file's header or given, tells what is eligible. Without
    it every tensor counts whose dimension 1 is a multiple of four: a checkpoint does
    not say which of its tensors belong to grouped convolutions or embeddings.

    Args:
        path: a file of `save_checkpoint`, of `save_compressed`, or any other one.
        model: a name that `helpers.models.create_model` knows.

    Raises:
        TutorialError: the file is missing or damaged, or lacks a weight of the network.
    """
    state, name = read_checkpoint(path)
    name = model or name
    if name is None:
        rows = [
            {"weight": key, **_verdict(_kept(tensor), 1, why_not_tensorrt(tensor.shape[1]))}
            for key, tensor in state.items()
            if tensor.dim() >= 2
        ]
        return pd.DataFrame(rows, columns=["weight", *_VERDICT])
    with torch.device("meta"):
        network = create_model(name, num_classes=1)
    missing = [key for key, _ in network.named_parameters() if key not in state]
    if missing:
        raise TutorialError(
            f"{relative(path)} does not hold the weights of {name}: {missing[0]} is missing. "
            "Give the name of the network that it was saved from."
        )
    return _table_of(network, state)


def _table_of(model: nn.Module, state: dict[str, Tensor]) -> pd.DataFrame:
    """Return a row for each weight of `model`, with the numbers in `state`."""
    rows = []
    for name, weight in layer_weights(model).items():
        kept = _kept(state[name]).swapaxes(1, weight.input_dim)
        row = {"layer": weight.layer_name, "type": type(weight.layer).__name__, "weight": name}
        rows.append(row | _verdict(kept, weight.groups, why_not_sparse(weight)))
    return pd.DataFrame(rows, columns=["layer", "type", "weight", *_VERDICT])


def _kept(weight: Tensor) -> np.ndarray:
    return (weight.detach() != 0).cpu().numpy()


# --- ONNX files ---

# The operators that TensorRT runs sparse, and their inputs that can be weights.
_SPARSE_OPS = {"Conv": (1,), "Gemm": (0, 1), "MatMul": (0, 1)}
# Other operators that multiply by weights; they have rows too, but are not eligible.
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
_RUN_TIME = "the weight is computed at run time"
STANDARD_DOMAINS = ("", "ai.onnx")  # of the standard's own operators
_FLOATS = (AttributeProto.FLOAT, AttributeProto.FLOATS)


def load_onnx(path: Path) -> onnx.ModelProto:
    """Return an ONNX model; tensors in files of their own are checked and left there.

    Raises:
        TutorialError: the file is missing or is not an ONNX model.
    """
    try:
        model = onnx.load(path, load_external_data=False)
        # By its path: as an object it would be copied, and 2 GB were the limit.
        onnx.checker.check_model(str(path))
    except OSError as error:
        raise TutorialError(f"{relative(path)} cannot be read: {error.strerror}.") from error
    except Exception as error:  # protobuf and ONNX raise classes without a common base
        reason = str(error).partition("\n")[0]
        raise TutorialError(f"{relative(path)} is not a valid ONNX model: {reason}") from error
    return model


def verify_onnx(path: Path) -> pd.DataFrame:
    """Return one row for each weight of the convolutions and matrix products in a file.

    The columns are `node`, `op`, `weight` (its name), `shape` (output channels first),
    `groups`, `eligible` (by TensorRT's rules), `is_2to4` along the axis that is summed
    over, `zeros` (share of zero weights in per cent) and `reason` (why a weight is not
    eligible). A node whose weight is computed at run time has a row that says so. Bodies
    of If, Loop and Scan and local functions are looked into.

    Conv, Gemm and MatMul can be eligible. Weights of other operators that multiply
    (ConvTranspose, Einsum, LSTM, QLinearConv and their kin) are listed as not eligible,
    in the shape in which they are stored, and not looked at in fours.

    Args:
        path: an ONNX file; its external data lies beside it.

    Raises:
        TutorialError: the file is missing or damaged, or is not an ONNX model.
    """
    model = load_onnx(path)
    top = _Scope(
        nodes=list(model.graph.node),
        tensors=_initializers(model.graph),
        opsets={item.domain: item.version for item in model.opset_import},
        folder=Path(path).parent,
        functions={_key(function): function for function in model.functions},
    )
    try:
        rows = [row for node, scope in top.walk() for row in _rows(node, scope)]
    except RecursionError as error:
        raise TutorialError(
            f"The constants or functions of {relative(path)} are nested too deeply. Simplify the "
            "model first, for example with onnxruntime's or polygraphy's constant folding."
        ) from error
    return pd.DataFrame(rows, columns=["node", "op", "weight", *_VERDICT])


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
        TutorialError: its bytes are not there, or not as many as its shape says.
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
        raise TutorialError(
            f"The tensor {stored.name} cannot be read: {reason}. Export the model again, or copy "
            "the files of its external data beside it."
        ) from error
    return dense


# --- rows ---

_VERDICT = ["shape", "groups", "eligible", "is_2to4", "zeros", "reason"]


def _rows(node: NodeProto, scope: _Scope) -> list[dict]:
    """Return a row for each weight of a node; none if the node has no business with any."""
    if node.domain not in STANDARD_DOMAINS:
        return []
    sides = _SPARSE_OPS.get(node.op_type) or _DENSE_OPS.get(node.op_type, ())
    weights = [side for side in sides if side < len(node.input) and node.input[side]]
    constant = [side for side in weights if scope.is_constant(node.input[side])]
    rows = [_row(node, scope, side) for side in constant]
    if not rows and node.op_type in _SPARSE_OPS:
        return [_start(node, node.input[weights[-1]]) | _untold(_RUN_TIME)]
    return rows


def _row(node: NodeProto, scope: _Scope, side: int) -> dict:
    try:
        source, weight = scope.resolve(node.input[side])
    except _Untold as error:
        return _start(node, node.input[side]) | _untold(str(error))
    start = _start(node, source)
    if weight.size == 0 or weight.ndim < (1 if node.op_type == "MatMul" else 2):
        return start | _untold(f"the shape {weight.shape} is no weight's")
    if node.op_type in _DENSE_OPS:
        reason = f"TensorRT runs no {node.op_type} sparse"
        return start | _verdict(weight != 0, 1, reason) | {"is_2to4": False}
    attributes = {item.name: helper.get_attribute_value(item) for item in node.attribute}
    weight = _output_channels_first(weight, node.op_type, side, attributes)
    groups = attributes.get("group", 1)
    return start | _verdict(weight != 0, groups, why_not_tensorrt(weight.shape[1], groups))


def _output_channels_first(weight: np.ndarray, op: str, side: int, attributes: dict) -> np.ndarray:
    """Return a weight as (out, in, ...), where `in` is the axis that is summed over."""
    if op == "Gemm":
        transposed = attributes.get("transB" if side else "transA", 0)
        return weight if bool(transposed) == bool(side) else weight.T
    if op == "MatMul":
        # The sum runs over the last axis of the left factor, the last but one of the right.
        weight = weight.swapaxes(-1, -2) if side and weight.ndim > 1 else weight
        return weight.reshape(-1, weight.shape[-1])
    return weight


def _start(node: NodeProto, weight: str) -> dict:
    return {"node": node.name, "op": node.op_type, "weight": weight}


def _untold(reason: str) -> dict:
    values = ((), 1, False, False, float("nan"), reason)
    return dict(zip(_VERDICT, values, strict=True))


def _verdict(kept: np.ndarray, groups: int, reason: str) -> dict:
    """Return the verdict on a weight (out, in, ...), given where it is not zero."""
    zeros = 100 * (1 - np.count_nonzero(kept) / kept.size) if kept.size else float("nan")
    values = (kept.shape, groups, not reason, _is_2to4(kept), round(zeros, 2), reason)
    return dict(zip(_VERDICT, values, strict=True))


def _is_2to4(kept: np.ndarray) -> bool:
    """Return what `masks.is_2to4` does, of a NumPy mask: twice as fast on a whole network."""
    if kept.shape[1] % 4:
        return False
    a, b, c, d = (kept[:, lane::4] for lane in range(4))
    return not ((a & b & (c | d)) | (c & d & (a | b))).any()
