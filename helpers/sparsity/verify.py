"""Is every eligible weight of an ONNX file 2:4? Used in `04_export_onnx.ipynb`."""

from pathlib import Path

import numpy as np
import onnx
import pandas as pd
from onnx import numpy_helper

from helpers.checks import TutorialError
from helpers.settings import relative

# Operators that leave each group of four where it is, or only move it: the weight
# is looked for behind them.
_TRANSPARENT = ("Cast", "DequantizeLinear", "Identity", "QuantizeLinear", "Transpose")


def load_onnx(path: Path) -> onnx.ModelProto:
    """Return an ONNX model, with its external data.

    Raises:
        TutorialError: the file is missing or is not an ONNX model.
    """
    try:
        model = onnx.load(path)
        onnx.checker.check_model(model)
    except OSError as error:
        raise TutorialError(f"{relative(path)} cannot be read: {error.strerror}.") from error
    except Exception as error:  # protobuf and ONNX raise classes without a common base
        reason = str(error).partition("\n")[0]
        raise TutorialError(f"{relative(path)} is not a valid ONNX model: {reason}") from error
    return model


def verify_onnx(path: Path) -> pd.DataFrame:
    """Return one row for each weight of the convolutions and matrix products in a file.

    The columns are `node`, `op`, `weight` (its name), `shape` (output channels first),
    `groups`, `eligible` (by TensorRT's rules), `is_2to4` and `zeros`, the
    share of zero weights in per cent.

    Args:
        path: an ONNX file. Weights are found behind Cast, Transpose, Identity and
            Q/DQ nodes, in initialisers and in Constant nodes.

    Raises:
        TutorialError: the file is missing or is not an ONNX model.
    """
    graph = load_onnx(path).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    producers = {name: node for node in graph.node for name in node.output}
    rows = []
    for node in graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        for side in (1,) if node.op_type == "Conv" else (0, 1):
            found = _constant(node.input[side], tensors, producers)
            if found is not None:
                rows.append(_describe(node, side, *found))
    columns = ["node", "op", "weight", "shape", "groups", "eligible", "is_2to4", "zeros"]
    return pd.DataFrame(rows, columns=columns)


def _constant(
    name: str, tensors: dict[str, onnx.TensorProto], producers: dict[str, onnx.NodeProto]
) -> tuple[str, np.ndarray] | None:
    """Return the constant that feeds an input, as the node sees it; None if computed."""
    if name in tensors:
        return name, numpy_helper.to_array(tensors[name])
    node = producers.get(name)
    if node is None:
        return None
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    if node.op_type == "Constant" and "value" in attributes:
        return name, numpy_helper.to_array(attributes["value"])
    if node.op_type not in _TRANSPARENT:
        return None
    found = _constant(node.input[0], tensors, producers)
    if found is None:
        return None
    source, weight = found
    if node.op_type == "Transpose":
        weight = weight.transpose(attributes.get("perm"))
    if node.op_type == "DequantizeLinear" and np.issubdtype(weight.dtype, np.integer):
        weight = _centred(weight, node, attributes.get("axis", 1), tensors, producers)
    return source, weight


def _centred(
    weight: np.ndarray,
    node: onnx.NodeProto,
    axis: int,
    tensors: dict[str, onnx.TensorProto],
    producers: dict[str, onnx.NodeProto],
) -> np.ndarray:
    """Return stored integers less their zero point, so that what means zero is zero."""
    if len(node.input) < 3 or not node.input[2]:
        return weight
    found = _constant(node.input[2], tensors, producers)
    if found is None:
        raise TutorialError(
            f"The zero point of {node.input[0]} is computed at run time, so its zeros cannot be "
            "told beforehand. Quantise weights with a constant zero point."
        )
    zero_point = found[1].astype(np.int32)
    if zero_point.ndim == 1 and zero_point.size > 1:
        shape = [1] * weight.ndim
        shape[axis] = -1
        zero_point = zero_point.reshape(shape)
    elif zero_point.ndim == weight.ndim:  # one for each block of an axis
        length = weight.shape[axis]
        blocks = -(-length // zero_point.shape[axis])
        zero_point = zero_point.repeat(blocks, axis).take(range(length), axis)
    return weight.astype(np.int32) - zero_point


def _describe(node: onnx.NodeProto, side: int, name: str, weight: np.ndarray) -> dict:
    """Return the row of a weight: laid out as (out, in, ...) and looked at in fours."""
    attributes = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
    groups = attributes.get("group", 1)
    if node.op_type == "Gemm":
        transposed = attributes.get("transB" if side else "transA", 0)
        weight = weight if bool(transposed) == bool(side) else weight.T
    elif node.op_type == "MatMul":
        # The sum runs over the last axis of the left factor, the last but one of the right.
        weight = weight.swapaxes(-1, -2) if side and weight.ndim > 1 else weight
        weight = weight.reshape(-1, weight.shape[-1])
    eligible = groups == 1 and weight.shape[1] % 4 == 0
    kept = weight != 0
    in_fours = kept.reshape(len(kept), -1, 4, *kept.shape[2:]) if eligible else None
    return {
        "node": node.name,
        "op": node.op_type,
        "weight": name,
        "shape": weight.shape,
        "groups": groups,
        "eligible": eligible,
        "is_2to4": bool(eligible and (in_fours.sum(axis=2) <= 2).all()),
        "zeros": round(100 * (1 - kept.mean()), 2),
    }
