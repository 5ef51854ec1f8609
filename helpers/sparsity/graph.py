"""Which channels of a model may change places without changing what it computes.

Explained in `02b_better_pruning.ipynb`. The model is exported to its graph of ATen operators.
Beside each tensor of the graph goes a tensor of labels, of the same shape, which says
to which channel each element belongs. Each operator has a rule (`graph_rules`) that
labels its outputs and notes which channels must move together and which must stay;
`channels` solves these constraints and defines the terms.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree

from helpers.errors import InputError
from helpers.layers import in_mode
from helpers.parameters import no_grad_for
from helpers.sparsity.channels import ChannelGroups, Channels
from helpers.sparsity.graph_rules import Op, label_outputs


def find_channel_groups(model: nn.Module, example: tuple[Any, ...]) -> ChannelGroups:
    """Return which channels of a model may change places.

    Args:
        model: a model that `torch.export` can trace; it is traced in evaluation mode, and
            in training mode too if that leaves parameters unused.
        example: its positional inputs; the first dimension of a tensor is the batch.

    Raises:
        InputError: the model cannot be traced.
    """
    channels = Channels()
    _label_graph(channels, model, _trace(model, example, training=False))
    if any(id(parameter) not in channels.placements for parameter in model.parameters()):
        # Auxiliary heads, for instance, whose inputs are channels too. Two samples, because
        # one has no variance.
        pairs = tuple(
            torch.cat([value, value]) if isinstance(value, Tensor) else value for value in example
        )
        _label_graph(channels, model, _trace(model, pairs, training=True))
    return channels.solve()


def _trace(
    model: nn.Module, example: tuple[Any, ...], training: bool
) -> torch.export.ExportedProgram:
    """Return the graph of a model in one of its two modes; the model keeps its own."""
    try:
        with _quiet_torch(), no_grad_for(model.parameters()), in_mode(model, training):
            return torch.export.export(model, example)
    except Exception as error:  # torch.export raises classes without a common base
        mode = "training" if training else "evaluation"
        line = next((line for line in str(error).splitlines() if line.strip()), "")
        raise InputError(
            f"{type(model).__name__} cannot be traced in {mode} mode by torch.export "
            f"({type(error).__name__}: {line[:200]}), so its channels stay where they are."
        ) from error


@contextmanager
def _quiet_torch() -> Iterator[None]:
    """Silence PyTorch's warnings and loggers: the error that `_trace` raises says what failed.

    Loggers without a level of their own take that of a parent, in the end that of `torch`.
    """
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict]
    levels = {
        logger: logger.level
        for logger in loggers
        if f"{logger.name}.".startswith("torch.") and logger.level != logging.NOTSET
    }
    levels.setdefault(logging.getLogger("torch"), logging.NOTSET)
    for logger in levels:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _label_graph(
    channels: Channels, model: nn.Module, program: torch.export.ExportedProgram
) -> None:
    """Label every tensor of a graph and collect the constraints."""
    tensors: dict[str, Tensor] = {}
    tensors.update(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    names = dict(program.graph_signature.inputs_to_parameters)
    names |= program.graph_signature.inputs_to_buffers
    labels: dict[fx.Node, list[object]] = {}
    parameters: dict[fx.Node, Tensor] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        if node.name in names:
            parameters[node] = tensors[names[node.name]]
        else:
            labels[node] = _constants(channels, node, "it comes from outside")
    for output in _label_nodes(channels, program.graph_module, labels, parameters):
        for each in output:
            channels.fix(each, "it leaves the network")


def _label_nodes(
    channels: Channels,
    module: fx.GraphModule,
    labels: dict[fx.Node, list[object]],
    parameters: dict[fx.Node, Tensor],
) -> list[list[Tensor]]:
    """Label the nodes of a graph after its inputs; return all labels of each output."""
    for node in module.graph.nodes:
        op = Op(node, channels, labels, parameters)
        if node.op == "get_attr":
            labels[node] = _constants(channels, node, "it is a constant")
        elif node.op == "call_function" and op.name in _CALLS:
            labels[node] = _label_call(channels, module, op)
        elif node.op == "call_function":
            labels[node] = label_outputs(channels, op)
        elif node.op == "output":
            outputs = _pytree.tree_leaves(node.args[0])
            return [op.all_tensors(each) for each in outputs if isinstance(each, fx.Node)]
    return []


def _constants(channels: Channels, node: fx.Node, reason: str) -> list[object]:
    value = node.meta.get("val")
    return [channels.constant(value.shape, reason)] if isinstance(value, Tensor) else []


# Operators that run a graph of their own, and which of their arguments that graph is.
_CALLS = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}


def _label_call(channels: Channels, module: fx.GraphModule, op: Op) -> list[object]:
    """Label the graph that an operator runs, and return all labels of its outputs."""
    position = _CALLS[op.name]
    name, inputs = op.node.args[position], op.node.args[position + 1 :]
    called = getattr(module, str(name.target if isinstance(name, fx.Node) else name))
    labels: dict[fx.Node, list[object]] = {}
    parameters: dict[fx.Node, Tensor] = {}
    for node, given in zip(called.graph.find_nodes(op="placeholder"), inputs, strict=True):
        if isinstance(given, fx.Node) and given in op.parameters:
            parameters[node] = op.parameters[given]
        elif isinstance(given, fx.Node):
            labels[node] = op.all_labels_of(given)
    outputs = _label_nodes(channels, called, labels, parameters)
    reason = "it has no channels along another dimension"
    return [
        [
            of_one[number] if number < len(of_one) else channels.constant(of_one[0].shape, reason)
            for of_one in outputs
        ]
        for number in range(max(len(of_one) for of_one in outputs))
    ]
