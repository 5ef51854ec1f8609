"""The products of an ONNX file, and how much faster 2:4 is predicted to make it on a GPU.

`python -m helpers advise FILE.onnx` shows it (docs/cli.md); `helpers.measurement.advice` does
the same for a model in PyTorch and explains the rules.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from onnx import NodeProto

from helpers.errors import InputError
from helpers.files import shown
from helpers.measurement.advice import LAYER_COLUMNS, Advice, datatype_2to4, timed_layer
from helpers.measurement.rates import Rates
from helpers.measurement.roofline import Datatype
from helpers.sparsity.eligibility import why_not_cusparselt
from helpers.sparsity.onnx_constants import Scope
from helpers.sparsity.onnx_file import OnnxFile
from helpers.sparsity.onnx_inputs import Shape, complete_shapes, onnx_inputs
from helpers.sparsity.onnx_report import FileWeight, select_file_weights
from helpers.sparsity.onnx_weights import node_name

_logger = logging.getLogger(__name__)

# Operators that return a view of their input or only look at its shape, or that a runtime
# fuses with the product before them.
_FREE = frozenset(
    "BatchNormalization Cast Clip Constant ConstantOfShape DequantizeLinear Dropout Flatten "
    "Identity QuantizeLinear Relu Reshape Shape Size Squeeze Unsqueeze".split()
)


@dataclass(frozen=True)
class OnnxProduct:
    """A multiplication in a file: in each of `groups`, activations (m, k) and a weight (n, k).

    Without a known weight `m`, `n` and `k` are None, and `macs` tells the arithmetic alone.
    `is_matrix` says whether it is one product of matrices, which a 3x3 convolution is not.
    """

    node: str
    op: str
    weight: str
    macs: int
    m: int | None
    n: int | None
    k: int | None
    groups: int
    is_matrix: bool
    is_2to4: bool
    reason: str  # why TensorRT runs it dense; empty if it can be sparse


def onnx_products(path: Path, shapes: Mapping[str, Shape], batch: int = 1) -> list[OnnxProduct]:
    """Return every product of an ONNX file with its sizes, in the order of the nodes.

    Args:
        path: an ONNX file, with its external data where it says.
        shapes: of inputs that the file leaves open, as `parse_shapes` returns them.
        batch: the size of an open first dimension.

    Raises:
        InputError: the file cannot be read, a shape does not fit it, or the shape of a product
            does not follow from those of the inputs.
    """
    return [product for product, _ in _products(OnnxFile(path), shapes, batch)]


def _products(
    file: OnnxFile, shapes: Mapping[str, Shape], batch: int
) -> Iterator[tuple[OnnxProduct, FileWeight]]:
    complete = complete_shapes(onnx_inputs(file.model, file.path), shapes, file.path, batch)
    for weight in select_file_weights(file, shapes=complete):
        macs = weight.product.macs
        if macs is None:
            raise InputError(
                f"The sizes of {weight.product.op} {weight.product.node} of {shown(file.path)} do "
                "not follow from the shapes of its inputs, so its time cannot be predicted."
            )
        yield _product(weight, macs), weight


def _product(weight: FileWeight, macs: int) -> OnnxProduct:
    product = weight.product
    m = n = k = None
    if product.in_fours and weight.shape and macs:
        n, k = weight.shape[0] // product.groups, math.prod(weight.shape[1:])
        m = macs // (n * k * product.groups)
    one_pixel = math.prod(weight.shape[2:]) == 1
    return OnnxProduct(
        product.node,
        product.op,
        product.weight,
        macs,
        m,
        n,
        k,
        product.groups,
        m is not None and one_pixel and product.groups == 1,
        weight.is_2to4,
        weight.reason,
    )


def advise_onnx(
    path: Path,
    rates: Rates,
    shapes: Mapping[str, Shape] | None = None,
    batch: int = 1,
    datatype: str = "FP16",
) -> Advice:
    """Return how much faster 2:4 is predicted to make an ONNX file, whether it is pruned or not.

    Products are timed as `helpers.measurement.advice.advise` does it. Every other operator is
    one kernel that reads and writes two bytes for each number, unless it returns a view or is
    fused with the product before it. Operators whose shapes are not known, such as those in the
    bodies of loops, are logged and take no time.

    Args:
        path: an ONNX file, with its external data where it says.
        rates: of the GPU.
        shapes: of inputs that the file leaves open, as `parse_shapes` returns them.
        batch: the size of an open first dimension.
        datatype: a name in `helpers.measurement.roofline.DATATYPES` whose pattern is 2:4.

    Raises:
        InputError: as `onnx_products`.
        AdviceError: there are no rates in this datatype.
    """
    kind = datatype_2to4(datatype)
    file = OnnxFile(path)
    nodes = {node_name(node): node for node in file.model.graph.node}
    layers: list[dict[str, Any]] = []
    scope: Scope | None = None
    for product, weight in _products(file, shapes or {}, batch):
        scope = scope or (weight.scope if weight.scope.outer is None else None)
        node = nodes.pop(product.node, None)
        moved = 0 if node is None else _moved(node, weight.scope)
        layers.append(_row(product, moved or 0, rates, kind))
    rest_ms, unknown = 0.0, 0
    for node in nodes.values():
        if scope is None or node.op_type in _FREE or all(map(scope.is_constant, node.input)):
            continue
        moved = _moved(node, scope)
        unknown += moved is None
        rest_ms += max(rates.limits(0, 2 * (moved or 0), datatype).values())
    if unknown:
        _logger.info("%d operators of unknown shape are predicted to take no time", unknown)
    return Advice(
        layers=pd.DataFrame(layers, columns=LAYER_COLUMNS),
        rest_ms=rest_ms,
        batch=batch,
        datatype=datatype,
        source=rates.source,
        measured=rates.measured,
        checked=rates.checked[rates.checked.datatype == datatype],
        errors=rates.errors(datatype),
    )


def _moved(node: NodeProto, scope: Scope) -> int | None:
    """Return how many numbers a node reads and writes; None if a shape is not known."""
    total = 0
    for name in filter(None, (*node.input, *node.output)):
        shape = scope.shape(name)
        if shape is None or None in shape:
            return None
        total += math.prod(size for size in shape if size is not None)
    return total


def _row(product: OnnxProduct, moved: int, rates: Rates, datatype: Datatype) -> dict[str, Any]:
    """Return a product as a row of the table, in the order of `LAYER_COLUMNS`."""
    m, n, k = product.m, product.n, product.k
    known = m is not None and n is not None and k is not None
    reason = product.reason
    if known and product.is_matrix:
        reason = reason or why_not_cusparselt(n or 0, k or 0, datatype.input_bytes)
    sizes = (m or 1, n or 1, k or 1)
    row = timed_layer(
        rates,
        datatype,
        name=product.node,
        kind=product.op,
        sizes=sizes,
        groups=product.groups,
        is_product=known and product.is_matrix,
        implicit=known and product.groups == 1 and product.op == "Conv",
        operations=2 * product.macs,
        numbers=moved,
        read=_read(sizes, moved) if known and not product.is_matrix else 1.0,
        reason=reason,
    )
    return row | {"m": m, "n": n, "k": k}


def _read(sizes: tuple[int, int, int], moved: int) -> float:
    """Return the numbers of a convolution's input over those of all its windows."""
    m, n, k = sizes
    return min(max(moved - m * n - n * k, 1) / (m * k), 1.0)
