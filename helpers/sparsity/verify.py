"""Is every eligible weight of a file or a model 2:4? Used in `04_export_onnx.ipynb`.

A weight of an ONNX file is checked as its node sees it: `helpers.sparsity.onnx_weights` first
computes whatever the file computes from constants alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from helpers.errors import InputError
from helpers.files import shown
from helpers.layers import Example, LayerWeight, layer_weights
from helpers.parameters import plain_name, require_numbers, unwrapped, whole
from helpers.sparsity.compressed import read_checkpoint
from helpers.sparsity.eligibility import lost_weights, why_not_sparse, why_not_tensorrt
from helpers.sparsity.masks import holds_2to4

if TYPE_CHECKING:
    import pandas as pd

    from helpers.sparsity.onnx_weights import NodeWeight

_PICKLES = (".bin", ".ckpt", ".pkl", ".pt", ".pth")


def verify_file(
    path: Path, model: nn.Module | None = None, exclude: Sequence[str] = ()
) -> "pd.DataFrame":
    """Return the table of `verify_checkpoint` for a safetensors file, else of `verify_onnx`.

    Args:
        path: an ONNX file or a safetensors checkpoint.
        model: the model that a checkpoint belongs to.
        exclude: name patterns such as `*pos_embed*`, for nodes, layers and weights that are
            meant to stay dense; their rows are kept, as not eligible.

    Raises:
        InputError: the file is missing, damaged, or of a kind that is not read, `model` does
            not belong to it, or a pattern fits nothing.
    """
    path = Path(path)
    if path.suffix in _PICKLES:
        raise InputError(
            f"{shown(path)} may be a pickle, and reading one can run any program in it. "
            "Save the state_dict with helpers.sparsity.save_compressed, or as safetensors."
        )
    if path.suffix == ".safetensors":
        return _without(exclude, verify_checkpoint(path, model))
    if model is not None:
        raise InputError(
            f"{shown(path)} is not a safetensors checkpoint, and other files are verified "
            "without a model. Leave it out."
        )
    return _without(exclude, verify_onnx(path))


def verify_model(model: nn.Module, example: Example | None = None) -> "pd.DataFrame":
    """Return one row for each weight of a model's layers, judged as it is multiplied by.

    A weight that a layer computes at each call, by weight norm for instance, is judged as it is
    after that; its name is that of the parameter that it is computed from.

    The columns are `layer`, `type` (its class), `weight` (the parameter's name), `shape`,
    `groups`, `eligible` (by TensorRT's rules), `is_2to4` along the input channels,
    `zeros` (share of zero weights in per cent) and `reason` (why a weight is not
    eligible). A tied weight has one row.

    Args:
        model: any model, on any device but `meta`.
        example: what to call the model with, as `eligible_weights` takes it: without it, a weight
            that a module outside of its layer standardises is judged as it is stored.

    Raises:
        InputError: a weight has no numbers of its own, for example on the device `meta`, or the
            weights of a layer cannot be reached.
    """
    weights = layer_weights(model)
    tensors = {name: weight.tensor for name, weight in weights.items()}
    for name, tensor in tensors.items():
        require_numbers(tensor, name)
    lost = lost_weights(model, example, weights)
    return _table_of(weights, {name: whole(tensor) for name, tensor in tensors.items()}, lost)


def verify_checkpoint(path: Path, model: nn.Module | None = None) -> "pd.DataFrame":
    """Return the table of `verify_model` for a safetensors file, compressed or not.

    Which weights are eligible depends on the layers that they belong to, and these are the
    model's. Without a model every tensor counts whose dimension 1 is a multiple of four: the
    file alone does not say which of them are grouped convolutions or embeddings.

    Args:
        path: a file of `save_checkpoint`, of `save_compressed`, or any other one.
        model: the model whose weights the file holds, with any weights of its own, also on the
            device `meta`; its last layer may have another number of outputs. It can be left out
            only if the file does not name its network.

    Raises:
        InputError: the file is missing or damaged, holds the weights of another model, or names
            a network while no model is given.
    """
    checkpoint = read_checkpoint(path)
    state, network = checkpoint.state, checkpoint.network
    if model is None and network is not None:
        raise InputError(
            f"{shown(path)} is a checkpoint of {network}, whose layers decide which weights are "
            f"eligible: give the model, for example create_model({network!r}, num_classes=1000) "
            "of helpers.training.networks."
        )
    if model is None:
        rows = [
            {
                "weight": name,
                **asdict(_judged(_nonzero(tensor), 1, why_not_tensorrt(tensor.shape[1]))),
            }
            for name, tensor in state.items()
            if tensor.dim() >= 2
        ]
        return _table(["weight"], rows)
    model = unwrapped(model)
    state = {plain_name(name): tensor for name, tensor in state.items()}
    weights = layer_weights(model)
    if difference := _difference(state, model, weights):
        raise InputError(
            f"{shown(path)} does not hold the weights of this {type(model).__name__}: "
            f"{difference}. Give the model that it was saved from."
        )
    tensors = {}
    for name, weight in weights.items():
        names = [name, *(other for other, _ in weight.tied_to)]
        stored = next((each for each in names if each in state), None)
        if stored is not None:
            tensors[name] = weight.computed_from(state) if weight.is_computed else state[stored]
    return _table_of(weights, tensors)


def verify_onnx(path: Path) -> "pd.DataFrame":
    """Return one row for each product of an ONNX file in which a constant may take part.

    The columns are `node`, `op`, `weight` (the name of the stored tensor), `shape` (output
    channels first), `groups`, `eligible` (by TensorRT's rules), `is_2to4` along the axis that is
    summed over, `zeros` (share of zero weights in per cent), `reason` (why a weight is not
    eligible) and `judged`. A weight that is stored quantised is judged by its values after
    dequantisation. The bodies of If, Loop and Scan and the calls of local functions are included.

    Weights of convolutions and matrix products can be eligible, in ONNX's operators and in ONNX
    Runtime's fused and quantised ones. `judged` is false if it is not known whether a weight can
    run sparse: its numbers come from an operator that cannot be evaluated here or that depends on
    the run, an unknown operator takes a matrix, or a weight has a zero point that is not 0. A file
    is 2:4 for certain only if every row is judged and every eligible one 2:4.

    The other rows are judged, and not eligible: weights of operators that never run sparse
    (ConvTranspose, Einsum, LSTM and the like), in the shape in which they are stored; constants
    that are no weights, as `helpers.sparsity.onnx_weights` tells them apart; and products of two
    activations.

    Args:
        path: an ONNX file, with its external data where it says.

    Raises:
        InputError: the file is missing or damaged, or is not an ONNX model.
    """
    from helpers.sparsity.onnx_weights import node_weights  # here: onnx takes a while to import

    rows = [
        {"node": each.node, "op": each.op, "weight": each.weight, **asdict(_judged_node(each))}
        for each in node_weights(path)
    ]
    return _table(["node", "op", "weight"], rows)


def _without(exclude: Sequence[str], table: "pd.DataFrame") -> "pd.DataFrame":
    """Return a table whose excluded rows are not eligible."""
    names = [column for column in ("node", "layer", "weight") if column in table]
    for pattern in exclude:
        matches = table[names].map(lambda name: fnmatchcase(name, pattern)).any(axis=1)  # noqa: B023
        if not matches.any():
            raise InputError(
                f"Nothing in the file matches {pattern!r}. Give the name of a node or a weight, "
                "with * for any characters."
            )
        table.loc[matches, "eligible"] = False
        table.loc[matches, "judged"] = True
        table.loc[matches, "reason"] = "excluded"
    return table


# --- verdicts ---


@dataclass(frozen=True)
class _Verdict:
    """The columns that all tables have; `judged` is false if eligibility or numbers are unknown."""

    shape: tuple[int, ...]
    groups: int
    eligible: bool
    is_2to4: bool
    zeros: float
    reason: str
    judged: bool = True


def _judged(nonzero: np.ndarray, groups: int, reason: str) -> _Verdict:
    """Return the verdict on a weight (out, in, ...), given where it is not zero."""
    zeros = 100 * (1 - np.count_nonzero(nonzero) / nonzero.size) if nonzero.size else float("nan")
    is_2to4 = holds_2to4(nonzero)
    return _Verdict(nonzero.shape, groups, not reason, is_2to4, round(zeros, 2), reason)


def _unknown(reason: str) -> _Verdict:
    """Return the verdict on a weight whose numbers are not known."""
    return _Verdict((), 1, False, False, float("nan"), reason)


def _judged_node(weight: "NodeWeight") -> _Verdict:
    reason, judged = weight.verdict()
    if weight.value is None:
        verdict = _unknown(reason)
    else:
        verdict = _judged(weight.value != 0, weight.groups, reason)
    is_2to4 = weight.in_fours and verdict.is_2to4
    return replace(verdict, is_2to4=is_2to4, judged=judged)


def _table(names: list[str], rows: list[dict[str, Any]]) -> "pd.DataFrame":
    import pandas as pd  # here: it takes a while to import

    return pd.DataFrame(rows, columns=[*names, *(field.name for field in fields(_Verdict))])


# --- models and checkpoints ---


def _table_of(
    weights: Mapping[str, LayerWeight],
    tensors: Mapping[str, Tensor],
    lost: Mapping[str, str] | None = None,
) -> "pd.DataFrame":
    """Return a row for each weight of a model, with the numbers in `tensors`."""
    rows = []
    for name, weight in weights.items():
        reason = why_not_sparse(weight) or (lost or {}).get(name, "")
        if name in tensors:
            nonzero = _nonzero(tensors[name]).swapaxes(1, weight.input_dim)
            verdict = _judged(nonzero, weight.groups, reason)
        else:  # the model computes it from what the checkpoint holds
            verdict = replace(_unknown(reason), judged=False)
        row = {"layer": weight.layer_name, "type": type(weight.layer).__name__, "weight": name}
        rows.append(row | asdict(verdict))
    return _table(["layer", "type", "weight"], rows)


def _nonzero(weight: Tensor) -> np.ndarray:
    return (weight.detach() != 0).cpu().numpy()


def _difference(
    state: Mapping[str, Tensor], model: nn.Module, weights: Mapping[str, LayerWeight]
) -> str:
    """Return the first way in which a checkpoint's weights are not the model's; empty if none."""
    last = list(weights.values())[-1:]
    # The number of classes may differ: it changes no other layer, and no verdict.
    any_rows = {id(parameter) for weight in last for parameter in weight.layer.parameters()}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain_name(name))
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            return f"{plain_name(name)} has no shape in the model yet, because its layer is lazy"
        # A file may hold a tied weight by any of its names.
        stored = next((state[each] for each in names[id(parameter)] if each in state), None)
        if stored is None:
            return f"{plain_name(name)} is missing in the file"
        found, wanted = list(stored.shape), list(parameter.shape)
        if id(parameter) in any_rows and found:
            found[0] = wanted[0]
        if found != wanted:
            shapes = ["x".join(map(str, shape)) for shape in (stored.shape, parameter.shape)]
            return f"{plain_name(name)} is {shapes[0]} in the file and {shapes[1]} in the model"
    # A weight that the model does not have would not be verified.
    known = set(map(plain_name, model.state_dict()))
    for name, tensor in state.items():
        if tensor.dim() > 1 and name not in known:
            return f"{name} is not in the model"
    return ""
