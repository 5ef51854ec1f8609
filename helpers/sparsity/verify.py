"""Is every eligible weight of a file or a network 2:4? Used in `04_export_onnx.ipynb`.

A weight of an ONNX file is looked at as its node sees it: whatever the file computes
from constants alone (casts, transpositions, reshapes, dequantisation) is computed first.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import torch
from onnx import NodeProto, helper
from torch import Tensor, nn

from helpers.errors import InputError
from helpers.files import shown
from helpers.layers import layer_weights
from helpers.sparsity.compressed import read_checkpoint
from helpers.sparsity.eligibility import why_not_sparse, why_not_tensorrt
from helpers.sparsity.onnx_weights import (
    STANDARD_DOMAINS,
    _initializers,
    _key,
    _Scope,
    _Untold,
    load_onnx,
)
from helpers.training.networks import create_model

_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


def verify_file(path: Path, model: str | None = None) -> pd.DataFrame:
    """Return the table of `verify_checkpoint` for a safetensors file, else of `verify_onnx`.

    Args:
        path: an ONNX file or a safetensors checkpoint.
        model: the network's name, for a checkpoint that does not tell it.

    Raises:
        InputError: the file is missing, damaged, or of a kind that is not read.
    """
    path = Path(path)
    if path.suffix in _PICKLES:
        raise InputError(
            f"{shown(path)} may be a pickle, and reading one can run any program in it. "
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
        InputError: the file is missing or damaged, or lacks a weight of the network.
    """
    checkpoint = read_checkpoint(path)
    state, name = checkpoint.state, model or checkpoint.model
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
        raise InputError(
            f"{shown(path)} does not hold the weights of {name}: {missing[0]} is missing. "
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


_RUN_TIME = "the weight is computed at run time"


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
        InputError: the file is missing or damaged, or is not an ONNX model.
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
        raise InputError(
            f"The constants or functions of {shown(path)} are nested too deeply. Simplify the "
            "model first, for example with onnxruntime's or polygraphy's constant folding."
        ) from error
    return pd.DataFrame(rows, columns=["node", "op", "weight", *_VERDICT])


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
