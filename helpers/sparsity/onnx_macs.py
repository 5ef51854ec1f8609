"""The shapes of an ONNX file's tensors, and the MACs of its products.

Used in `04_export_onnx.ipynb`.
"""

import logging
import math
from collections.abc import Mapping, Sequence

import onnx
from onnx import NodeProto

from helpers.errors import InputError, first_line
from helpers.files import shown
from helpers.sparsity.onnx_constants import Scope, attributes_of
from helpers.sparsity.onnx_file import OnnxFile

_logger = logging.getLogger(__name__)


def infer_shapes(
    file: OnnxFile, input_shapes: Mapping[str, Sequence[int]]
) -> dict[str, tuple[int | None, ...]]:
    """Return the shapes of the tensors of a graph; None is a size that is open.

    Without shapes given, none are known of a graph that ONNX cannot make sense of.

    Args:
        file: the file.
        input_shapes: of its inputs, where they shall be others than those that it names.

    Raises:
        InputError: the file has no such input.
    """
    model = onnx.ModelProto()
    model.CopyFrom(file.model)
    inputs = {item.name: item.type.tensor_type for item in model.graph.input}
    for name in input_shapes:
        if name not in inputs:
            raise InputError(
                f"{shown(file.path)} has no input {name!r}. It has {', '.join(inputs) or 'none'}."
            )
    if input_shapes:
        del model.graph.value_info[:]  # they belong to the shapes that the file names
        for item in model.graph.output:
            item.type.tensor_type.ClearField("shape")
    for name, shape in input_shapes.items():
        inputs[name].ClearField("shape")
        for size in shape:
            inputs[name].shape.dim.add(dim_value=size)
    known = {item.domain for item in model.opset_import}
    for domain in sorted({node.domain for node in model.graph.node} - known):
        model.opset_import.add(
            domain=domain, version=1
        )  # plugins, which TensorRT loads as they are
    try:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    except Exception as error:  # ONNX raises classes without a common base
        _logger.info("No shapes are known in %s: %s", shown(file.path), first_line(error))
        return {}
    return {
        item.name: tuple(map(_size, item.type.tensor_type.shape.dim))
        for item in (*graph.value_info, *graph.output, *graph.input)
        if item.type.tensor_type.HasField("shape")
    }


def _size(dim: onnx.TensorShapeProto.Dimension) -> int | None:
    return dim.dim_value if dim.dim_value > 0 else None


def count_macs(
    node: NodeProto,
    scope: Scope,
    form: str,
    side: int,
    shape: tuple[int, ...] | None,
    is_matrix: bool,
) -> int | None:
    """Return the MACs of a product; None if they do not follow from known shapes.

    Args:
        node: the node that multiplies.
        scope: the names around it.
        form: of the product, as `onnx_weights` names it.
        side: which input of the node the weight is.
        shape: of the weight, (out, in, ...) if it is one; None if it comes at run time.
        is_matrix: whether the weight is one matrix that multiplies every row.
    """
    if form == "einsum":
        return _einsum(node, scope)
    data, output = scope.full_shape(node.input[0]), scope.full_shape(node.output[0])
    weight = scope.full_shape(node.input[side]) if shape is None else shape
    if data is None or weight is None:
        return None
    if node.op_type in ("LSTM", "GRU", "RNN"):
        return data[0] * data[1] * math.prod(weight)
    if node.op_type == "ConvTranspose":
        return math.prod(data) * math.prod(weight[1:])
    if form == "conv" or node.op_type == "DeformConv":
        return None if output is None else math.prod(output) * math.prod(weight[1:])
    if form == "other":
        return None
    if is_matrix:
        rows = data if side else scope.full_shape(node.input[1])
        if rows is None or weight[-1] not in rows:  # shapes that do not fit together
            return None
        return math.prod(rows) // weight[-1] * math.prod(weight)
    summed = data[-2 if attributes_of(node).get("transA") else -1]
    return None if output is None else math.prod(output) * summed


def _einsum(node: NodeProto, scope: Scope) -> int | None:
    """Return the number of all combinations of an equation's indices."""
    equation = attributes_of(node)["equation"].decode().replace(" ", "")
    sizes: dict[str, int] = {}
    for term, name in zip(equation.partition("->")[0].split(","), node.input, strict=True):
        shape = scope.full_shape(name)
        if shape is None or len(shape) != len(term):
            return None
        sizes |= dict(zip(term, shape, strict=True))
    return math.prod(sizes.values())
