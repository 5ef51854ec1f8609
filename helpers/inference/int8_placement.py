"""Where a file for TensorRT quantises and dequantises, and a check of that.

TensorRT takes a file as it is: it quantises where the file has a pair of QuantizeLinear and
DequantizeLinear (Q/DQ), and nowhere else. It fuses a convolution, an addition and a ReLU into one
INT8 kernel if the convolution's own result reaches the addition in floating point, the other
branch is quantised, and the result is quantised behind the ReLU. Explained in `08_int8.ipynb`.

Source: "Working with Quantized Types" in NVIDIA's documentation of TensorRT.
"""

from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, numpy_helper

from helpers.errors import InputError
from helpers.files import shown
from helpers.sparsity.onnx_constants import quantises
from helpers.sparsity.onnx_file import load_onnx

PRODUCTS = ("Conv", "Gemm", "MatMul")
_ACTIVATIONS = ("Relu", "Clip")


class _Graph:
    """The nodes of a model by the tensors that they write and read."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes: list[NodeProto] = list(model.graph.node)
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = {item.name for item in model.graph.output}
        self.writer = {name: node for node in self.nodes for name in node.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)

    def written_by(self, name: str) -> str:
        """Return the operator that writes a tensor; empty for inputs and constants."""
        return self.writer[name].op_type if name in self.writer else ""

    def depths(self) -> dict[str, int]:
        """Return for each tensor the number of nodes on the longest way to it."""
        depths: dict[str, int] = {}
        for node in self.nodes:
            depth = 1 + max((depths.get(name, 0) for name in node.input), default=0)
            depths |= dict.fromkeys(node.output, depth)
        return depths

    def branches(self, node: NodeProto, products: Collection[str]) -> tuple[str, str] | None:
        """Return the two branches that an addition joins: the one that stays float, the other.

        The first is the result of a product that nothing else reads; of two, the one with more
        nodes before it, which TensorRT runs later. None if the node joins no such branches.
        """
        first, second = node.input if node.op_type == "Add" else ("", "")
        if first == second or first in self.constants or second in self.constants:
            return None
        main = [name for name in (first, second) if self._is_result(name, products)]
        if not main:
            return None
        depths = self.depths() if len(main) == 2 else {}
        chosen = max(main, key=lambda name: depths.get(name, 0))
        return chosen, second if chosen == first else first

    def both_dequantised(self, node: NodeProto, products: Collection[str]) -> bool:
        """Return whether an addition reads two dequantised tensors, one of them a product's."""
        if [self.written_by(name) for name in node.input] != ["DequantizeLinear"] * 2:
            return False
        quantisers = [self.writer.get(self.writer[name].input[0]) for name in node.input]
        sources = [each.input[0] for each in quantisers if each is not None]
        return any(name in self.writer and self.writer[name].name in products for name in sources)

    def _is_result(self, name: str, products: Collection[str]) -> bool:
        writer = self.writer.get(name)
        alone = len(self.readers.get(name, [])) == 1 and name not in self.outputs
        return alone and writer is not None and writer.name in products

    def fused_activations(self, products: Collection[str]) -> Iterator[NodeProto]:
        """Yield each ReLU that follows a product, or an addition that joins one."""
        for node in self.nodes:
            if node.op_type not in _ACTIVATIONS or node.input[0] not in self.writer:
                continue
            before = self.writer[node.input[0]]
            is_join = self.branches(before, products) is not None
            if is_join or before.name in products:
                yield node


def tensors_to_quantise(model: onnx.ModelProto, products: Collection[str]) -> tuple[str, ...]:
    """Return the tensors that have to be quantised besides the inputs of the products.

    These are the second branch of each addition that joins two, and the result of each ReLU
    behind a product: without it the last product of a chain would write floating-point numbers,
    for which TensorRT has no sparse INT8 kernel.

    Args:
        model: not yet quantised.
        products: the names of the nodes that run in INT8.
    """
    graph = _Graph(model)
    joins = [graph.branches(node, products) for node in graph.nodes]
    found = [branches[1] for branches in joins if branches is not None]
    found += [node.output[0] for node in graph.fused_activations(products)]
    return tuple(name for name in dict.fromkeys(found) if name not in graph.outputs)


def tensorrt_int8_faults(path: Path, expected: Collection[str] = ()) -> list[str]:
    """Return what TensorRT would refuse or run slowly in a quantised file, a sentence for each.

    TensorRT refuses unsigned types, zero points that are not 0 and quantised biases. It cannot
    fuse where a product has a quantised weight only, where both or none of two branches that are
    added are quantised, or where a ReLU behind a product writes floating-point numbers. A product
    whose weight is in floating point runs so, whatever its input.

    Args:
        path: an ONNX file with Q/DQ, of this package or any other quantiser.
        expected: names of the products that should be in INT8.

    Raises:
        InputError: the file is missing or damaged.
    """
    model = load_onnx(path)
    onnx.load_external_data_for_model(model, str(Path(path).parent))
    graph = _Graph(model)
    faults = [
        fault for node in graph.nodes if quantises(node) for fault in _type_faults(node, graph)
    ]
    products = []
    for node in graph.nodes:
        if node.op_type not in PRODUCTS:
            continue
        quantised = [graph.written_by(name) == "DequantizeLinear" for name in node.input]
        if any(quantised[2:]):
            faults.append(f"The bias of {node.op_type} {node.name} is quantised.")
        if quantised[1]:
            products.append(node.name)
            if not quantised[0]:
                faults.append(f"The input of {node.op_type} {node.name} is not quantised.")
        elif node.name in expected:
            faults.append(f"The weight of {node.op_type} {node.name} is not quantised.")
    if not products:
        faults.append("No product has a quantised weight.")
    for node in graph.nodes:
        branches = graph.branches(node, products)
        if branches and graph.written_by(branches[1]) != "DequantizeLinear":
            faults.append(f"The branch {branches[1]} of Add {node.name} is not quantised.")
        if node.op_type == "Add" and graph.both_dequantised(node, products):
            faults.append(f"Both branches of Add {node.name} are quantised.")
    for node in graph.fused_activations(products):
        readers = {reader.op_type for reader in graph.readers.get(node.output[0], [])}
        if node.output[0] not in graph.outputs and readers != {"QuantizeLinear"}:
            faults.append(f"The result of {node.op_type} {node.name} is not quantised.")
    return faults


def _type_faults(node: NodeProto, graph: _Graph) -> Iterator[str]:
    """Yield what TensorRT would refuse of one QuantizeLinear or DequantizeLinear."""
    points = graph.constants.get(node.input[2]) if len(node.input) > 2 else None
    if points is None:
        yield f"{node.op_type} {node.name} has no zero point, which gives its type."
    elif points.data_type != TensorProto.INT8:
        kind = TensorProto.DataType.Name(points.data_type)
        yield f"{node.op_type} {node.name} is of type {kind} instead of INT8."
    elif np.any(numpy_helper.to_array(points)):
        yield f"The zero point of {node.op_type} {node.name} is not 0."
    scale = graph.constants.get(node.input[1])
    if scale is None:
        yield f"The scale of {node.op_type} {node.name} is not a constant."
    else:
        values = numpy_helper.to_array(scale)
        if not (np.isfinite(values).all() and (values > 0).all()):
            yield f"The scale of {node.op_type} {node.name} is not positive and finite."


def input_scales(path: Path) -> dict[str, float]:
    """Return the scale of each quantised layer's input, for `helpers.training.qat`.

    A layer is named as in the model that the file was exported from, so that `fc` is the layer
    whose weight is `fc.weight`. A layer that the file multiplies by several times has the largest
    of its scales.

    Args:
        path: a file of `quantize_for_tensorrt`, from a file of `export_onnx`.

    Raises:
        InputError: the file is missing or damaged, or no weight of it has such a name.
    """
    from onnxruntime.quantization.quant_utils import TENSOR_NAME_QUANT_SUFFIX

    graph = _Graph(load_onnx(path))
    scales: dict[str, float] = {}
    for node in graph.nodes:
        if node.op_type not in PRODUCTS:
            continue
        if any(graph.written_by(name) != "DequantizeLinear" for name in node.input[:2]):
            continue
        input, weight = (graph.writer[name] for name in node.input[:2])
        layer, dot, attribute = weight.input[0].rpartition(".")
        if dot and attribute == f"weight{TENSOR_NAME_QUANT_SUFFIX}":
            scale = float(numpy_helper.to_array(graph.constants[input.input[1]]))
            scales[layer] = max(scale, scales.get(layer, 0.0))
    if not scales:
        raise InputError(
            f"{shown(path)} has no quantised weight with a layer's name. Give a file of "
            "quantize_for_tensorrt that was made from a file of export_onnx."
        )
    return scales
