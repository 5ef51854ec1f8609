"""Find additions in a traced model that a layer before them can do while it writes.

In a residual block the output of a layer is added to the block's input. A kernel that adds
while it writes saves reading and writing the whole tensor once more.
Used in `06_infer_and_benchmark.ipynb`.
"""

import operator
from collections.abc import Sequence

import torch
from torch import fx, nn

from helpers.inference.traced import called_module, first_input
from helpers.layers import is_plain

ADDITIONS = (operator.add, operator.iadd, torch.add)
IN_PLACE_OPERATORS = (
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv,
    operator.imod, operator.ipow, operator.iand, operator.ior, operator.ixor, operator.ilshift,
    operator.irshift, operator.imatmul, operator.setitem,
)  # fmt: skip


def remove_identities_(model: fx.GraphModule) -> None:
    """Take modules that return their input in evaluation mode out of the graph, in place."""
    for node in list(model.graph.nodes):
        module, input = called_module(model, node), first_input(node)
        if input is None or module is None or not is_plain(module, nn.Dropout, nn.Identity):
            continue
        if not module.training:
            node.replace_all_uses_with(input)
            model.graph.erase_node(node)


def absorb_additions_(model: fx.GraphModule, calls: Sequence[fx.Node]) -> bool:
    """Take the addition after each call of a layer into the call, as its second argument.

    Returns:
        Whether that was done; it is done for all calls of the layer or for none.
    """
    found = [_addition_after(model, call) for call in calls]
    pairs = [pair for pair in found if pair is not None]
    if not pairs or len(pairs) < len(calls):
        return False
    for call, (addition, residual) in zip(calls, pairs, strict=True):
        call.args = (first_input(call), residual)
        addition.replace_all_uses_with(call)
        model.graph.erase_node(addition)
    return True


def _addition_after(model: fx.GraphModule, call: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the addition that is the only reader of a layer's output, and what it adds."""
    if len(call.users) != 1 or first_input(call) is None or len(call.args) > 1 or call.kwargs:
        return None
    (addition,) = call.users
    if not _is_addition(addition):
        return None
    first, second = addition.args
    if not (isinstance(first, fx.Node) and isinstance(second, fx.Node)) or first is second:
        return None
    residual = second if first is call else first
    # What is added must be there when the layer runs, and must still be the same then.
    order = {node: number for number, node in enumerate(model.graph.nodes)}
    if order[residual] > order[call]:
        return None
    between = list(model.graph.nodes)[order[call] + 1 : order[addition]]
    if any(writes_into_input(model, node) for node in between):
        return None
    if writes_into_input(model, addition) and first is residual and not _is_own(model, residual):
        return None  # the sum also changes a tensor that others may read
    return addition, residual


def _is_addition(node: fx.Node) -> bool:
    if len(node.args) != 2 or node.kwargs:
        return False
    if node.op == "call_method":
        return node.target in ("add", "add_")
    return node.op == "call_function" and node.target in ADDITIONS


def _is_own(model: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a node makes a new tensor, which only one other node reads."""
    made = called_module(model, node)
    return len(node.users) == 1 and made is not None and is_plain(made, nn.Linear, nn.Conv2d)


def writes_into_input(model: fx.GraphModule, node: fx.Node) -> bool:
    """Return whether a node may change a tensor that it is given."""
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace"):
        return True
    module = called_module(model, node)
    if module is not None:
        return any(getattr(part, "inplace", False) for part in module.modules())
    if node.op == "call_method":
        return str(node.target).endswith("_") or node.target == "__setitem__"
    if node.op != "call_function":
        return False
    if node.target in IN_PLACE_OPERATORS or getattr(node.target, "__name__", "").endswith("_"):
        return True
    return any(argument is True for argument in node.args)  # perhaps `inplace`, by position
