"""Which channels of a model may change places without changing what it computes.

Explained in `02_prune_2_4.ipynb`. The model is exported to its graph of ATen operators.
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
    parameters = {node: tensors[name] for node, name in names.items()}
    labels: dict[fx.Node, object] = {}
    for node in program.graph.nodes:
        channels.next_operator()
        op = Op(node, channels, labels, parameters)
        if node.op == "placeholder" and node.name not in parameters:
            labels[node] = op.map_outputs(
                lambda value: channels.constant(value.shape, "it comes from outside")
            )
        elif node.op == "call_function":
            labels[node] = label_outputs(channels, op)
        elif node.op == "output":
            for operand in op.operands():
                channels.fix(operand, "it leaves the network")
