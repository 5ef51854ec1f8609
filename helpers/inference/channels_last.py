"""Write 1x1 convolutions of an ONNX file as channels-last matrix products.

Exporting is explained in `04_export_onnx.ipynb`.

The graph is edited by hand: onnxscript's rewriter matches patterns of neighbouring nodes, but
the layout of a tensor depends on all nodes before it, and names have to stay as they are.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

from helpers.errors import InputError
from helpers.files import atomic_write, shown
from helpers.inference.onnx_session import onnx_max_relative_error
from helpers.sparsity.eligibility import why_not_tensorrt
from helpers.sparsity.onnx_file import STANDARD_DOMAINS, load_onnx


def rewrite_1x1_as_matmul(
    path_in: Path, path_out: Path, image_shape: tuple[int, int, int]
) -> tuple[str, ...]:
    """Write a copy of an ONNX file with 1x1 convolutions as matrix products; return their names.

    A 1x1 convolution multiplies the channels of each pixel by one matrix. Written as a product,
    it can use the builder's sparse GEMM kernels, of which there are more than sparse
    convolutions. The convolutions that TensorRT may run sparse are rewritten: those without
    groups or padding, with input channels in fours and the weight stored in the file. A 2:4
    weight is still 2:4 afterwards, and a dense model is rewritten in the same way, as a fair
    control.

    The products run on channels-last tensors, and so do the pointwise operators between
    them; a tensor is transposed where an operator needs the other layout. A product keeps
    the name of its convolution. Both files are run on random images before the new one is
    written.

    Args:
        path_in: a file of `export_onnx`, or any with one input of images.
        path_out: file to write; at most 2 GB.
        image_shape: channels, height and width of an input image.

    Raises:
        InputError: the file is missing or damaged, older than opset 10, or has no such
            convolution; or the new model computes something else.
    """
    model = load_onnx(path_in)
    onnx.load_external_data_for_model(model, str(Path(path_in).parent))
    opset = next(item.version for item in model.opset_import if item.domain in STANDARD_DOMAINS)
    if opset < 10:
        raise InputError(
            f"{shown(path_in)} has opset {opset}. Export it again, with opset 10 or newer."
        )
    rewriter = _ChannelsLast(model.graph)
    rewriter.rewrite_()
    if not rewriter.products:
        raise InputError(
            f"{shown(path_in)} has no 1x1 convolution that could run sparse as a matrix "
            "product; verify_onnx shows which of its layers can be sparse. Build it as it is."
        )
    with atomic_write(path_out) as part:
        onnx.save(model, part)
        images = torch.randn(2, *image_shape, generator=torch.Generator().manual_seed(0))
        error = onnx_max_relative_error(part, path_in, images)
        limit = max(_LIMITS[rewriter.constants[name].data_type] for name in rewriter.matrices)
        if not error <= limit:  # a NaN is not below it either
            raise InputError(
                f"{shown(path_in)} computes something else after the rewrite: its outputs "
                f"differ by {error:.1e} of the largest. Build it as it is, and please report it."
            )
    return tuple(rewriter.products)


# The maximum relative error that another order of the same sums may cause.
_LIMITS = {TensorProto.FLOAT: 1e-4, TensorProto.FLOAT16: 1e-2}
_TO_LAST, _TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
# Operators that work on each element by itself, in any layout.
_POINTWISE = (
    "Abs Add Cast Clip Div Elu Erf Exp Gelu HardSigmoid HardSwish Identity LeakyRelu Max Min Mish "
    "Mul Neg Pow Relu Selu Sigmoid Softplus Sqrt Sub Tanh"
).split()


class _ChannelsLast:
    """Rewrites a graph, from its inputs to its outputs, and keeps track of each tensor's layouts.

    A channels-first tensor keeps its name from the file. `last` holds the channels-last names;
    a tensor in `only_last` does not exist under its own name (yet).
    """

    def __init__(self, graph: GraphProto) -> None:
        self.graph = graph
        inputs = {item.name for item in graph.input}  # a caller may replace their values
        self.constants = {t.name: t for t in graph.initializer if t.name not in inputs}
        self.taken = {*inputs, *self.constants, *_input_names(graph.node)}
        self.taken |= {name for node in graph.node for name in node.output}
        self.nodes: list[NodeProto] = []
        self.last: dict[str, str] = {}
        self.only_last: set[str] = set()
        self.matrices: dict[str, str] = {}  # by the weight that each was made from
        self.products: list[str] = []

    def rewrite_(self) -> None:
        """Replace the graph's nodes by the new ones, and store the weights that they need."""
        for node in self.graph.node:
            if self._is_product(node):
                self._add_product(node)
            elif self._is_pointwise(node):
                self._add_pointwise(node)
            else:
                self._add_unchanged(node)
        for item in self.graph.output:
            self._need_first(item.name)
        self._replace_nodes_()

    def _is_product(self, node: NodeProto) -> bool:
        """Return whether a node is a 1x1 convolution that TensorRT may run sparse."""
        if node.op_type != "Conv" or node.domain not in STANDARD_DOMAINS:
            return False
        weight = self.constants.get(node.input[1])
        if weight is None or weight.data_type not in _LIMITS or list(weight.dims[2:]) != [1, 1]:
            return False
        attributes = _node_attributes(node)
        reason = why_not_tensorrt(weight.dims[1], attributes.get("group", 1))
        return not reason and not any(attributes.get("pads", ()))

    def _add_product(self, node: NodeProto) -> None:
        """Add the product of pixels and matrix, after the strides and before the bias."""
        name = node.name or node.output[0]
        pixels = self._need_last(node.input[0])
        strides = _node_attributes(node).get("strides", [1, 1])
        if max(strides) > 1:
            pixels = self._add_slice(name, pixels, strides)
        result = self._new(f"{node.output[0]}_channels_last")
        bias = [item for item in node.input[2:] if item]
        product = self._new(f"{node.output[0]}_product") if bias else result
        self._add("MatMul", [pixels, self._matrix(node.input[1])], product, name)
        if bias:
            self._add("Add", [product, *bias], result, f"{name}_bias")
        self._set_last(node.output[0], result)
        self.products.append(name)

    def _add_slice(self, name: str, pixels: str, strides: list[int]) -> str:
        """Add a node that keeps the pixels that a strided convolution reads."""
        result = self._new(f"{name}_strided")
        ends = [np.iinfo(np.int64).max] * 2
        arguments = {"starts": [0, 0], "ends": ends, "axes": [1, 2], "steps": strides}
        inputs = [
            self._store(np.array(value, dtype=np.int64), f"{result}_{argument}")
            for argument, value in arguments.items()
        ]
        self._add("Slice", [pixels, *inputs], result, f"{name}_stride")
        return result

    def _matrix(self, weight: str) -> str:
        """Return the name of a convolution's weight (K, C, 1, 1) as a matrix (C, K)."""
        if weight not in self.matrices:
            matrix = numpy_helper.to_array(self.constants[weight])[:, :, 0, 0].T
            self.matrices[weight] = self._store(matrix, f"{weight}_matrix")
        return self.matrices[weight]

    def _is_pointwise(self, node: NodeProto) -> bool:
        """Return whether a node should run on channels-last tensors.

        It can if all its inputs but single numbers exist channels-last, and should if one of
        them exists in no other layout.
        """
        if node.op_type not in _POINTWISE or node.domain not in STANDARD_DOMAINS:
            return False
        tensors = [name for name in node.input if name and not self._is_number(name)]
        can = all(name in self.last for name in tensors)
        return can and any(name in self.only_last for name in tensors)

    def _is_number(self, name: str) -> bool:
        return name in self.constants and np.prod(self.constants[name].dims) == 1

    def _add_pointwise(self, node: NodeProto) -> None:
        result = self._new(f"{node.output[0]}_channels_last")
        moved = NodeProto()
        moved.CopyFrom(node)
        moved.input[:] = [self.last.get(name, name) for name in node.input]
        moved.output[:] = [result]
        self.nodes.append(moved)
        self._set_last(node.output[0], result)

    def _add_unchanged(self, node: NodeProto) -> None:
        for name in _input_names([node]):
            self._need_first(name)
        self.nodes.append(node)

    def _need_last(self, name: str) -> str:
        """Return the channels-last name of a tensor, transposed if necessary."""
        if name not in self.last:
            last = self.last[name] = self._new(f"{name}_channels_last")
            self._add("Transpose", [name], last, f"{last}_transpose", perm=_TO_LAST)
        return self.last[name]

    def _need_first(self, name: str) -> None:
        """Ensure that a tensor exists channels-first, under its own name."""
        if name in self.only_last:
            self.only_last.remove(name)
            self._add("Transpose", [self.last[name]], name, f"{name}_transpose", perm=_TO_FIRST)

    def _set_last(self, name: str, channels_last: str) -> None:
        self.last[name] = channels_last
        self.only_last.add(name)

    def _add(self, op: str, inputs: list[str], result: str, name: str, **attributes: Any) -> None:
        self.nodes.append(helper.make_node(op, inputs, [result], name, **attributes))

    def _store(self, value: np.ndarray, name: str) -> str:
        """Add a constant to the graph and return its name."""
        name = self._new(name)
        self.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def _new(self, name: str) -> str:
        """Return a name that no tensor has yet."""
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name

    def _replace_nodes_(self) -> None:
        """Put the new nodes in place of the old ones, and drop what is no longer used."""
        used = {*_input_names(self.nodes), *(item.name for item in self.graph.output)}
        weights = [t for t in self.graph.initializer if t.name in used]
        made = {name for node in self.nodes for name in node.output}
        shapes = [item for item in self.graph.value_info if item.name in made]
        for field, items in (
            (self.graph.node, self.nodes),
            (self.graph.initializer, weights),
            (self.graph.value_info, shapes),
        ):
            del field[:]
            field.extend(items)


def _node_attributes(node: NodeProto) -> dict:
    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _input_names(nodes: Iterable[NodeProto]) -> Iterator[str]:
    """Yield the names of the tensors that nodes and their bodies take."""
    for node in nodes:
        yield from node.input
        for item in node.attribute:
            for body in (item.g, *item.graphs):
                yield from _input_names(body.node)
                yield from (output.name for output in body.output)
