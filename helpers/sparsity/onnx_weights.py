"""Every product of an ONNX file with a constant, and the constant as its node sees it.

Whatever a file computes from constants alone (casts, transpositions, reshapes, dequantisation) is
computed first. Used in `04_export_onnx.ipynb`.

A weight is a constant that multiplies every row of the activations alike: the weight of a
convolution, or a matrix on either side of a product. Not every constant is one:

- If both factors are constants, so is their product, and no product is left when a runtime has
  loaded the file. Tables of relative positions that a small network transforms are of this kind.
- A right factor with a matrix for each head, position or expert is a batch of matrices, and so
  is not the one matrix for which TensorRT's documentation promises sparse kernels.
- A left factor with a dimension for the batch, even one of size 1, has the form of activations:
  learned queries, for instance.
- A right factor that attention multiplies its queries by, beside the keys that it computes, is a
  table of keys: relative positions, as in HaloNet and BoTNet.
- The data of a convolution whose kernel is computed at run time.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto

from helpers.errors import HelpersError, InputError, first_line
from helpers.files import shown
from helpers.sparsity.eligibility import WeightShape, why_not_shape
from helpers.sparsity.onnx_constants import (
    MICROSOFT,
    Scope,
    attributes_of,
    dequantize,
    quantises,
    scope_of,
)
from helpers.sparsity.onnx_file import STANDARD_DOMAINS, OnnxFile
from helpers.sparsity.onnx_macs import count_macs, infer_shapes

AT_RUN_TIME = "the weight is computed at run time"
BOTH_CONSTANT = "both factors are constants: computed once, when the file is loaded"


@dataclass(frozen=True)
class NodeWeight:
    """A constant that a node of an ONNX file multiplies by, or a product without one.

    With `in_fours` the operator may run sparse, and the value is shaped (out, in, ...), where
    `in` is the axis that is summed over. Without, `exempt` says why it never does, and the value
    has the shape in which it is stored. If the numbers are not known, `value` is None and
    `why_not_judged` says why; for a product that has no constant `value` is None as well.
    """

    node: str
    op: str
    weight: str  # the stored tensor, or if there is none the input of the node
    value: np.ndarray | None
    groups: int = 1
    in_fours: bool = False
    exempt: str = ""
    why_not_judged: str = ""
    sources: tuple[str, ...] = ()  # all stored tensors that it is computed from
    operand: str = ""  # the input of the node
    side: int = 0  # which input of the node it is
    input_axis: int | None = None  # the axis of the operand that is summed over
    macs: int | None = None  # for the shapes of the file or those that were given

    def verdict(self, rules: str = "tensorrt", element_size: int = 2) -> tuple[str, bool]:
        """Return why the weight stays dense, and whether that is certain.

        What is certain comes first: the operator, then the shape. The reason is empty if the
        weight can run sparse; a weight that is not judged may be one that can.

        Args:
            rules: `tensorrt`, `asp`, `cusparselt` or `any`; see `why_not_sparse`.
            element_size: bytes of one of its numbers, as they are stored.
        """
        certain = self.exempt or why_not_shape(self._shape(element_size), rules)
        return certain or self.why_not_judged, bool(certain) or not self.why_not_judged

    def _shape(self, element_size: int) -> WeightShape:
        if self.value is None or not self.in_fours:  # channels as every rule allows them
            return WeightShape(32, 32, groups=self.groups, element_size=element_size)
        outputs, inputs, *kernel = self.value.shape
        return WeightShape(outputs, inputs, tuple(kernel), self.groups, element_size=element_size)


def node_weights(
    path: Path, input_shapes: Mapping[str, Sequence[int]] | None = None, with_macs: bool = False
) -> Iterator[NodeWeight]:
    """Yield every product of a file in which a constant may take part.

    These are convolutions, matrix products, recurrent layers and the like, in ONNX's and ONNX
    Runtime's operators; also in the bodies of If, Loop and Scan and in local functions. An
    operator that is not known and that has a constant matrix is included as not judged. Products
    of two activations are included with their MACs, because they are part of a file's arithmetic.

    Args:
        path: an ONNX file, with its external data where it says.
        input_shapes: of the file's inputs, where it leaves them open; only for `macs`.
        with_macs: infer shapes to count the MACs of each product, by its node's output.

    Raises:
        InputError: the file is missing or damaged, or is not an ONNX model.
    """
    for weight, _ in weights_with_scopes(OnnxFile(path), input_shapes, with_macs):
        yield weight


def weights_with_scopes(
    file: OnnxFile,
    input_shapes: Mapping[str, Sequence[int]] | None = None,
    with_macs: bool = False,
) -> Iterator[tuple[NodeWeight, Scope]]:
    """Yield what `node_weights` yields, each with the names around its node."""
    try:
        asks = any(node.op_type in ("Shape", "Size") for node in file.model.graph.node)
        wanted = asks or with_macs
        scope = scope_of(file, infer_shapes(file, input_shapes or {}) if wanted else {})
        for node, inner in scope.walk():
            for weight in _weights_of(node, inner):
                macs = _macs(weight, node, inner) if with_macs else None
                yield replace(weight, macs=macs), inner
    except HelpersError:
        raise
    except RecursionError as error:
        raise InputError(
            f"The functions or bodies of {shown(file.path)} are nested too deeply. Simplify the "
            "model first, for example with onnxruntime's or polygraphy's constant folding."
        ) from error
    except Exception as error:  # names that are no text, attributes of the wrong kind and so on
        raise InputError(
            f"{shown(file.path)} is not a valid ONNX model: a node of it cannot be read "
            f"({type(error).__name__}: {first_line(error)}). Export it again."
        ) from error


def _macs(weight: NodeWeight, node: NodeProto, scope: Scope) -> int | None:
    product = _product_of(node)
    if product is None:
        return None
    if weight.exempt == BOTH_CONSTANT:
        return 0
    shape = None if weight.value is None else weight.value.shape
    is_matrix = product.form == "nbits" or (weight.in_fours and not weight.exempt)
    return count_macs(node, scope, product.form, weight.side, shape, is_matrix)


# --- which inputs of which operators are factors ---


@dataclass(frozen=True)
class _Factor:
    """An input of an operator that takes part in a product."""

    place: int
    scale: int | None = None  # the input that it is multiplied by to dequantise it
    zero_point: int | None = None


@dataclass(frozen=True)
class _Product:
    """How an operator multiplies: `form` says where its weight has the axis of the sum."""

    form: str  # conv, matmul, gemm, nbits or other
    factors: tuple[_Factor, ...]
    exempt: str = ""


def _no_sparse(op: str, *places: int) -> _Product:
    return _Product("other", tuple(map(_Factor, places)), f"TensorRT runs no {op} sparse")


_PLAIN = (_Factor(0), _Factor(1))
_INTEGER = (_Factor(0, None, 2), _Factor(1, None, 3))
_QLINEAR = (_Factor(0, 1, 2), _Factor(3, 4, 5))
_ONNX: dict[str, _Product] = {
    "Conv": _Product("conv", _PLAIN),
    "ConvInteger": _Product("conv", _INTEGER),
    "QLinearConv": _Product("conv", _QLINEAR),
    "MatMul": _Product("matmul", _PLAIN),
    "MatMulInteger": _Product("matmul", _INTEGER),
    "QLinearMatMul": _Product("matmul", _QLINEAR),
    "Gemm": _Product("gemm", _PLAIN),
    "Attention": _no_sparse("Attention", 0, 1, 2),
    "CausalConvWithState": _no_sparse("CausalConvWithState", 0, 1),
    "ConvTranspose": _no_sparse("ConvTranspose", 0, 1),
    "DeformConv": _no_sparse("DeformConv", 0, 1),
    "Einsum": _Product("einsum", (), "TensorRT runs no Einsum sparse"),
    "GRU": _no_sparse("GRU", 0, 1, 2),
    "LSTM": _no_sparse("LSTM", 0, 1, 2),
    "LinearAttention": _no_sparse("LinearAttention", 0, 1, 2),
    "RNN": _no_sparse("RNN", 0, 1, 2),
}
_ONNXRUNTIME: dict[str, _Product] = {
    "Attention": _Product("matmul", _PLAIN),
    "ConvTransposeWithDynamicPads": _no_sparse("ConvTranspose", 0, 1),
    "DynamicQuantizeLSTM": _no_sparse("LSTM", 0, 1, 2),
    "DynamicQuantizeMatMul": _Product("matmul", (_Factor(0), _Factor(1, 2, 3))),
    "FusedConv": _Product("conv", _PLAIN),
    "FusedGemm": _Product("gemm", _PLAIN),
    "FusedMatMul": _Product("matmul", _PLAIN),
    "FusedMatMulActivation": _Product("matmul", _PLAIN),
    "GemmFastGelu": _Product("matmul", _PLAIN),
    "GemmFloat8": _Product("gemm", _PLAIN),
    "MatMulInteger16": _Product("matmul", _PLAIN),
    "MatMulIntegerToFloat": _Product("matmul", (_Factor(0, 2, 4), _Factor(1, 3, 5))),
    "MatMulNBits": _Product("nbits", (_Factor(0), _Factor(1, 2, 3))),
    "QAttention": _Product("matmul", (_Factor(0, 3, 6), _Factor(1, 4, 7))),
    "QGemm": _Product("gemm", _QLINEAR),
    "QLinearConv": _Product("conv", _QLINEAR),
    "TransposeMatMul": _Product("matmul", _PLAIN),
}
# Operators outside of ONNX that take constant matrices and multiply by none: tables that they
# look up, angles, boxes, and element-wise operators.
_NO_PRODUCTS = frozenset(
    "BatchedNMS_TRT BiasAdd BiasGelu BiasSoftmax BiasSplitGelu CropAndResize DequantizeBFP "
    "DequantizeLinear DequantizeWithOrder EfficientNMS_ONNX_TRT EfficientNMS_TRT "
    "EmbedLayerNormalization ExpandDims FastGelu GatedAdd GatherBlockQuantized GatherND Gelu "
    "GemmaRotaryEmbedding GridSample GroupNorm GroupQueryAttention MRotaryEmbedding MulInteger "
    "NhwcMaxPool Pad QEmbedLayerNormalization QLinearAdd QLinearAveragePool QLinearConcat "
    "QLinearGlobalAveragePool QLinearLeakyRelu QLinearMul QLinearReduceMean QLinearSigmoid "
    "QLinearSoftmax QLinearWhere QOrderedGelu QOrderedLayerNormalization QuantizeBFP "
    "QuantizeLinear QuantizeWithOrder QuickGelu Range RelativePositionBias RemovePadding "
    "RestorePadding ROIAlign_TRT RotaryEmbedding SkipGroupNorm SkipLayerNormalization "
    "SkipSimplifiedLayerNormalization Tokenizer TorchEmbedding Trilu Unique".split()
)


# Operators whose weights are attributes: the linear models of classical machine learning.
_ML = "ai.onnx.ml"
_LINEAR_MODELS = ("LinearClassifier", "LinearRegressor", "SVMClassifier", "SVMRegressor")


def _product_of(node: NodeProto) -> _Product | None:
    table = _ONNX if node.domain in STANDARD_DOMAINS else _ONNXRUNTIME
    return table.get(node.op_type) if node.domain in (*STANDARD_DOMAINS, MICROSOFT) else None


def _is_known(node: NodeProto) -> bool:
    """Return whether it is known of an operator that it multiplies by no constant matrix."""
    if node.domain in STANDARD_DOMAINS and onnx.defs.has(node.op_type):
        return True
    return node.op_type in _NO_PRODUCTS or quantises(node)


# --- the weights of one node ---


def _weights_of(node: NodeProto, scope: Scope) -> Iterator[NodeWeight]:
    """Yield the weights of one node; most nodes have none."""
    product = _product_of(node)
    if product is None:
        yield from _of_other(node, scope)
        return
    factors = product.factors or tuple(map(_Factor, range(len(node.input))))  # of an Einsum
    used = [each for each in factors if each.place < len(node.input) and node.input[each.place]]
    for each in used:
        scope.require(node.input[each.place])
    constant = [each for each in used if scope.is_constant(node.input[each.place])]
    if len(used) > 1 and len(constant) == len(used):
        yield _row(node, used[-1], weight=node.input[used[-1].place], exempt=BOTH_CONSTANT)
        return
    for factor in constant:
        if len(used) > 1:
            yield _weight_at(node, scope, product, factor)
    if not constant and len(used) > 1:
        yield _without_constant(node, scope, product, used)


def node_name(node: NodeProto) -> str:
    """Return the name of a node, or if it has none the one that TensorRT gives it."""
    return node.name or f"node_of_{next(filter(None, node.output), '')}"


def _row(node: NodeProto, factor: _Factor, **values: Any) -> NodeWeight:
    name = node_name(node)
    operand = node.input[factor.place] if factor.place < len(node.input) else ""
    row = {"weight": operand, "value": None, "operand": operand, "side": factor.place}
    return NodeWeight(name, node.op_type, **{**row, **values})


def _of_other(node: NodeProto, scope: Scope) -> Iterator[NodeWeight]:
    """Yield the constant matrices of an operator of another kind; mostly there are none."""
    if node.domain == _ML and node.op_type in _LINEAR_MODELS:
        why = f"TensorRT runs no {node.op_type}"
        yield _row(node, _Factor(len(node.input)), weight="coefficients", exempt=why)
    if _is_known(node) or all(map(scope.is_constant, node.input)):
        return  # of constants alone it makes another constant
    domain = node.domain or "ONNX's domain"
    why = f"{node.op_type} of {domain} is not known here, and may multiply by it"
    for place, name in enumerate(node.input):
        if name and scope.is_constant(name):
            constant = scope.resolve(name)
            if constant.value is None or constant.value.ndim > 1:
                row = _row(node, _Factor(place), weight=constant.sources[0], why_not_judged=why)
                yield replace(row, sources=constant.sources)
    for item in node.attribute:
        if item.HasField("t") and len(item.t.dims) > 1:
            yield _row(node, _Factor(len(node.input)), weight=item.name, why_not_judged=why)


def _without_constant(
    node: NodeProto, scope: Scope, product: _Product, used: list[_Factor]
) -> NodeWeight:
    """Return the row of a product whose factors are all computed at run time."""
    places = used[1:] if product.form in ("conv", "nbits") else used[::-1]
    for factor in places:
        stored = scope.stored_behind(node.input[factor.place])
        if stored is not None:
            name, operator = stored
            why = f"{operator} makes it of {name} at run time"
            return _row(node, factor, weight=name, why_not_judged=why, sources=(name,))
    return _row(node, used[-1], exempt=AT_RUN_TIME)


def _weight_at(node: NodeProto, scope: Scope, product: _Product, factor: _Factor) -> NodeWeight:
    """Return the row of a constant factor; the others are computed at run time."""
    constant = scope.resolve(node.input[factor.place])
    row = _row(node, factor, weight=constant.sources[0], sources=constant.sources)
    attributes = attributes_of(node)
    groups = int(attributes.get("group", 1)) if product.form == "conv" else 1
    if constant.value is None:
        return replace(row, why_not_judged=constant.why_unknown, groups=groups)
    stored = replace(row, value=constant.value)
    first = factor is product.factors[0] if product.factors else False
    if product.exempt:
        return replace(stored, exempt=product.exempt)
    if first and product.form in ("conv", "nbits"):
        return replace(stored, exempt="data of a product whose weight is computed at run time")
    least = {"conv": 3, "matmul": 1}.get(product.form, 2)
    if constant.value.ndim < least or constant.value.size == 0:
        why = f"a weight cannot have the shape {constant.value.shape}"
        return replace(row, why_not_judged=why)
    if product.form == "nbits":
        return _unpacked(stored, node, scope, attributes)
    axis = _input_axis(product.form, constant.value.ndim, first, attributes)
    value, why = _dequantised(constant.value, node, scope, factor, product.form, axis)
    if constant.is_shifted:
        why = NOT_SYMMETRIC
    batch = constant.value.shape[:-2] if product.form == "matmul" else ()
    return replace(
        stored,
        value=value if product.form == "conv" else _output_channels_first(value, axis),
        groups=groups,
        in_fours=True,
        input_axis=axis,
        exempt=_why_no_weight(batch, first) or _why_keys(node, scope, product, first),
        why_not_judged=why,
    )


def _why_no_weight(batch: tuple[int, ...], left: bool) -> str:
    """Return why a factor with more than two dimensions is not one matrix; empty if it is."""
    if left and batch:
        return f"a left factor with {len(batch) + 2} dimensions: activations that are constant"
    if math.prod(batch) > 1:
        return f"a batch of {math.prod(batch)} matrices: TensorRT names no sparse kernel for it"
    return ""


def _why_keys(node: NodeProto, scope: Scope, product: _Product, left: bool) -> str:
    """Return why a right factor takes the place of keys in attention; empty if it does not.

    Attention is the softmax of scores, which are products of queries and keys. Constant keys are
    multiplied by the same queries, and their product is part of the argument of the same softmax.
    """
    if left or product.form != "matmul":
        return ""
    queries = scope.origins(node.input[0])
    for score, origins in scope.products_at_run_time:
        if origins & queries and _softmaxes(node, scope) & _softmaxes(score, scope):
            return "a table that attention multiplies its queries by: keys that are constant"
    return ""


def _softmaxes(node: NodeProto, scope: Scope) -> set[str]:
    """Return the outputs of all Softmax nodes that a node reaches without another product."""
    found: set[str] = set()
    reached = set(node.output)
    for other in scope.nodes:  # each comes after those that it needs
        if reached.isdisjoint(other.input) or _product_of(other) is not None:
            continue
        if other.op_type == "Softmax":
            found.add(other.output[0])
        else:
            reached.update(other.output)
    return found


def _input_axis(form: str, dimensions: int, left: bool, attributes: dict[str, Any]) -> int:
    """Return the axis of a factor that its product sums over."""
    if form == "conv":
        return 1
    if dimensions == 1:
        return 0
    transposed = bool(attributes.get("transA" if left else "transB", 0))
    # The sum is over the last axis of the left factor and the last but one of the right.
    return dimensions - 1 if left != transposed else dimensions - 2


def _output_channels_first(matrices: np.ndarray, axis: int) -> np.ndarray:
    """Return matrices as one, (out, in), where `in` is the axis that is summed over."""
    rows = np.moveaxis(matrices, axis, -1)
    return rows.reshape(-1, rows.shape[-1])


# --- quantised factors ---

NOT_SYMMETRIC = (
    "its zero point is not 0, and TensorRT takes no such weight: quantise it symmetrically"
)


def _dequantised(
    value: np.ndarray, node: NodeProto, scope: Scope, factor: _Factor, form: str, axis: int
) -> tuple[np.ndarray, str]:
    """Return a factor without its scale and zero point, and why it cannot be judged, if so."""
    names = [_input(node, factor.scale), _input(node, factor.zero_point)]
    scale, zero_point = _values(scope, names)
    if not all(map(scope.is_constant, names)):
        return value, "its scale or zero point is computed at run time"
    if scale is None and zero_point is None:
        return value, ""
    # One scale for each output channel: of a matrix that is the axis that is not summed over.
    outputs = 0 if form == "conv" else 2 * value.ndim - 3 - axis
    one = np.ones((), np.float32)
    result = dequantize(value, one if scale is None else scale, zero_point, outputs)
    return result, NOT_SYMMETRIC if zero_point is not None and np.any(zero_point) else ""


def _input(node: NodeProto, place: int | None) -> str:
    """Return the name of an input of a node; empty if it is left out."""
    return node.input[place] if place is not None and place < len(node.input) else ""


def _values(scope: Scope, names: Sequence[str]) -> list[np.ndarray | None]:
    """Return the values of inputs; None for those that are left out or not known."""
    return [
        scope.resolve(name).value if name and scope.is_constant(name) else None for name in names
    ]


def _unpacked(
    row: NodeWeight, node: NodeProto, scope: Scope, attributes: dict[str, Any]
) -> NodeWeight:
    """Return the row of MatMulNBits, whose weight is packed in blocks along its inputs.

    Source: ONNX Runtime, docs/ContribOperators.md, com.microsoft.MatMulNBits.
    """
    bits, size = attributes.get("bits", 4), attributes["block_size"]
    rows, columns = attributes["N"], attributes["K"]
    names = [_input(node, place) for place in (2, 3, 4)]
    scale, zero_point, _ = _values(scope, names)
    if scale is None or names[2] or not all(map(scope.is_constant, names)):
        why = "its scales are computed at run time or are in an order of their own"
        return replace(row, value=None, why_not_judged=why)
    blocks = -(-columns // size)
    numbers = _from_bits(row.value, bits).reshape(rows, -1)[:, : blocks * size]
    neutral = 1 << (bits - 1)
    if zero_point is None:
        shift = np.full((rows, blocks), neutral, np.float32)
    elif zero_point.dtype == np.uint8:
        shift = _from_bits(zero_point.reshape(rows, -1), bits)[:, :blocks].astype(np.float32)
    else:
        shift = zero_point.reshape(rows, blocks).astype(np.float32)
    value = dequantize(numbers, scale.reshape(rows, blocks), shift, axis=1, block_size=size)
    why = "" if (shift == neutral).all() else NOT_SYMMETRIC
    return replace(
        row, value=value[:, :columns], in_fours=True, input_axis=None, why_not_judged=why
    )


def _from_bits(packed: np.ndarray | None, bits: int) -> np.ndarray:
    """Return the numbers of a few bits that are packed in bytes, the lowest bits first."""
    octets = np.asarray(packed, np.uint8)
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    numbers = (octets[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return numbers.reshape(*octets.shape[:-1], -1)
