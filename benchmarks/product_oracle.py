"""What is really multiplied, found without the library: in PyTorch and in an ONNX file.

In PyTorch a `TorchDispatchMode` follows every tensor from the parameters and the inputs on. At
each product it looks at the numbers of the factor that depends on parameters and on no input,
and tests them for the pattern along the axis that is summed over.

In an ONNX file a factor is constant if no input of the graph reaches it. ONNX Runtime
computes its numbers. A constant that another product has computed is an activation that does
not depend on the input, and no weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


# --- PyTorch ---


@dataclass(frozen=True)
class Origin:
    """What a tensor was computed from."""

    parameters: frozenset[int] = frozenset()  # their ids
    inputs: bool = False
    stored: bool = False  # the numbers of parameters themselves, at most moved and copied
    product: bool = False  # through a product

    @property
    def is_weight(self) -> bool:
        return bool(self.parameters) and not self.inputs


@dataclass(frozen=True)
class UsedWeight:
    """A product, and the weight in it: `weight` is empty if it multiplies activations."""

    macs: int
    weight: Origin
    is_2to4: bool  # along the axis that is summed over
    channels: int  # that an output sums over, without the positions of a kernel
    plain: bool  # neither a grouped nor a transposed convolution


def is_2to4_along(weight: Tensor, dim: int) -> bool:
    """Return whether at most two of every four along a dimension are not zero."""
    if weight.shape[dim] % 4:
        return False
    fours = weight.detach().movedim(dim, -1).ne(0).unflatten(-1, (-1, 4))
    return bool((fours.sum(-1) <= 2).all())


# The operators, where the two factors are, and the dimension of each that is summed over.
_PRODUCTS: dict[Any, tuple[int, int, int]] = {
    aten.mm: (0, -1, 0),
    aten.mv: (0, -1, 0),
    aten.dot: (0, 0, 0),
    aten.bmm: (0, -1, 1),
    aten.addmm: (1, -1, 0),
    aten.addmv: (1, -1, 0),
    aten.baddbmm: (1, -1, 1),
    aten._grouped_mm: (0, -1, -2),
}
_MOVES = (
    aten.clone, aten._to_copy, aten.cat, aten.stack, aten.index, aten.index_select,
    aten.constant_pad_nd, aten.flip, aten.roll, aten.copy_, aten.lift_fresh,
)  # fmt: skip


class Watch(TorchDispatchMode):
    """Collects the products of everything that runs inside it, in order."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.products: list[UsedWeight] = []
        # By storage, since views share it; the weak references keep the numbers of freed
        # storages from being given to new ones.
        self.origins: dict[int, tuple[StorageWeakRef, Origin]] = {}
        for parameter in model.parameters():
            known = self._of(parameter)
            ids = known.parameters | {id(parameter)}
            self._set(parameter, Origin(ids, stored=True))
        for leaf in tree_leaves(inputs):
            if isinstance(leaf, Tensor):
                self._set(leaf, Origin(inputs=True))

    def _set(self, tensor: Tensor, origin: Origin) -> None:
        storage = tensor.untyped_storage()
        self.origins[storage._cdata] = StorageWeakRef(storage), origin

    def _of(self, tensor: Tensor) -> Origin:
        _, origin = self.origins.get(tensor.untyped_storage()._cdata, (None, Origin()))
        return origin

    def __torch_dispatch__(
        self, func: Any, types: object, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        is_operator = isinstance(func, torch._ops.OpOverload)
        operator = func.overloadpacket if is_operator else None
        if operator in _PRODUCTS:
            self.products.append(self._matrix_product(operator, args, output))
        elif operator is aten.convolution:
            self.products.append(self._convolution(args, output))
        if is_operator and func.is_view:
            return output  # in the same storage
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        if is_operator and func._schema.is_mutable:
            written += [
                argument
                for argument, declared in zip(args, func._schema.arguments, strict=False)
                if isinstance(argument, Tensor) and declared.alias_info is not None
            ]
        origins = [self._of(tensor) for tensor in given]
        origin = Origin(
            frozenset().union(*(each.parameters for each in origins)),
            any(each.inputs for each in origins),
            operator in _MOVES and any(each.stored for each in origins),
            operator in _PRODUCTS
            or operator is aten.convolution
            or any(each.product for each in origins),
        )
        if origin.parameters or origin.inputs:
            for tensor in written:
                self._set(tensor, origin)
        return output

    def _matrix_product(self, operator: Any, args: tuple[Any, ...], output: Tensor) -> UsedWeight:
        first, left_dim, right_dim = _PRODUCTS[operator]
        left, right = args[first : first + 2]
        macs = output.numel() * left.shape[left_dim]
        factor, dim = self._weight_of((left, left_dim), (right, right_dim))
        if factor is None:
            return UsedWeight(macs, Origin(), False, 0, True)
        is_2to4 = is_2to4_along(factor, dim)
        return UsedWeight(macs, self._of(factor), is_2to4, factor.shape[dim], True)

    def _convolution(self, args: tuple[Any, ...], output: Tensor) -> UsedWeight:
        image, weight, transposed, groups = args[0], args[1], args[6], args[8]
        macs = (image if transposed else output).numel() * weight[0].numel()
        factor, dim = self._weight_of((image, 1), (weight, 0 if transposed else 1))
        if factor is None:
            return UsedWeight(macs, Origin(), False, 0, True)
        plain = factor is weight and not transposed and groups == 1
        channels = factor.shape[dim] // (groups if transposed else 1)
        is_2to4 = is_2to4_along(factor, dim)
        return UsedWeight(macs, self._of(factor), is_2to4, channels, plain)

    def _weight_of(self, *factors: tuple[Tensor, int]) -> tuple[Tensor | None, int]:
        """Return the factor that is a weight; of two, the one whose numbers are stored."""
        weights = [(factor, dim) for factor, dim in factors if self._of(factor).is_weight]
        weights.sort(key=lambda item: self._of(item[0]).stored)
        return weights[-1] if weights else (None, 0)


def watch(model: nn.Module, inputs: Sequence[Any]) -> list[UsedWeight]:
    """Return the products of a model in evaluation mode."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    modes = [(layer, layer.training) for layer in model.modules()]
    model.eval()
    # oneDNN has recurrent layers as one operator, but without it convolutions are slow.
    recurrent = any(isinstance(layer, nn.RNNBase) for layer in model.modules())
    try:
        # Attention and recurrent layers in single products, as the fused operators hide them.
        with (
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.mkldnn.flags(enabled=not recurrent),
            Watch(model, inputs) as mode,
        ):
            model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for layer, training in modes:
            layer.training = training
    return mode.products


# --- ONNX ---

_SUMMED = {"Conv", "Gemm", "MatMul", "FusedConv"}
_MULTIPLIES = {
    *_SUMMED, "ConvTranspose", "Einsum", "LSTM", "GRU", "RNN", "Attention", "MatMulInteger",
    "ConvInteger", "QLinearConv", "QLinearMatMul", "DeformConv",
}  # fmt: skip


@dataclass(frozen=True)
class FileWeight:
    """A constant factor of a Conv, Gemm or MatMul; the other factor depends on an input."""

    node: str
    side: int
    is_2to4: bool
    eligible: bool  # an ungrouped product whose channels come in fours
    computed: bool  # by another product, or keys of attention: an activation, not a weight


def file_weights(path: Path, inputs: Mapping[str, np.ndarray]) -> list[FileWeight]:
    """Return the constant factors in the main graph of a file whose functions are inlined."""
    model = onnx.load(path)
    graph = model.graph
    stored = {tensor.name for tensor in graph.initializer}
    reached = {item.name for item in graph.input} - stored
    from_product: set[str] = set()
    constant: list[tuple[onnx.NodeProto, int]] = []
    for node in graph.node:
        given = [name for name in node.input if name]
        if any(attribute.HasField("g") for attribute in node.attribute):
            given += [
                name for item in node.attribute for inner in item.g.node for name in inner.input
            ]
        varies = bool(reached & set(given))
        if node.op_type in _SUMMED:
            sides = (1,) if "Conv" in node.op_type else (0, 1)
            if reached & set(node.input[:2]):
                constant += [(node, side) for side in sides if node.input[side] not in reached]
        if varies:
            reached.update(node.output)
        elif node.op_type in _MULTIPLIES or from_product & set(given):
            from_product.update(node.output)
    names = sorted({node.input[side] for node, side in constant})
    values = _evaluate(model, names, stored, inputs)
    keys = _constant_keys(graph, constant)
    return [_file_weight(node, side, values, from_product | keys) for node, side in constant]


def _constant_keys(
    graph: onnx.GraphProto, constant: Sequence[tuple[onnx.NodeProto, int]]
) -> set[str]:
    """Return the constants that take the place of keys: the positions of relative attention.

    The scores of a softmax are a sum; one of its terms is a product of the same queries with
    other activations, and none lies between these products and the softmax.
    """
    below: dict[str, set[str]] = {}  # the softmaxes that a tensor reaches without a product
    above: dict[str, set[str]] = {}  # the products that a tensor comes from without another one
    for node in graph.node:
        summed = node.op_type in _SUMMED
        found = {node.output[0]} if summed else set()
        for name in () if summed else node.input:
            found |= above.get(name, set())
        above.update(dict.fromkeys(node.output, found))
    for node in reversed(graph.node):
        found = {node.output[0]} if node.op_type == "Softmax" else set()
        for name in () if found else node.output:
            found = found | below.get(name, set())
        if node.op_type not in _SUMMED:
            for name in node.input:
                below[name] = below.get(name, set()) | found
    fixed = {id(node) for node, _ in constant}
    scores = [node for node in graph.node if node.op_type == "MatMul" and id(node) not in fixed]
    return {
        node.input[1]
        for node, side in constant
        if side == 1
        for score in scores
        if above.get(node.input[0], set()) & above.get(score.input[0], set())
        and below.get(node.output[0], set()) & below.get(score.output[0], set())
    }


def _evaluate(
    model: onnx.ModelProto, names: Sequence[str], stored: set[str], inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    graph = model.graph
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    values = {name: arrays[name] for name in names if name in stored}
    outputs = {item.name for item in graph.output}
    wanted = [name for name in names if name not in stored]
    if not wanted:
        return values
    graph.output.extend(
        onnx.helper.make_empty_tensor_value_info(name) for name in wanted if name not in outputs
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return values | dict(zip(wanted, session.run(wanted, dict(inputs)), strict=True))


def _file_weight(
    node: onnx.NodeProto, side: int, values: Mapping[str, np.ndarray], from_product: set[str]
) -> FileWeight:
    name = node.input[side]
    weight = torch.from_numpy(np.array(values[name]))
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    grouped = attributes.get("group", 1) > 1
    match node.op_type, side:
        case "MatMul", 0:
            dim = -1
        case "MatMul", _:
            dim = max(-2, -weight.dim())
        case "Gemm", _:
            dim = 1 - side if not attributes.get("transB" if side else "transA", 0) else side
        case _:
            dim = 1
    # A batch of matrices is a constant activation, or weights of experts; neither has a kernel.
    batched = node.op_type == "MatMul" and weight.shape[:-2].numel() > 1
    eligible = not grouped and not batched and weight.dim() > 0 and weight.shape[dim] % 4 == 0
    is_2to4 = eligible and is_2to4_along(weight, dim)
    return FileWeight(node.name, side, is_2to4, eligible, name in from_product)
