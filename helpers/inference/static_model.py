"""A model for inputs of one shape: straight-line code that writes into the same buffers again.

What a layer writes is read a few steps later and then never again. Its memory can then serve
another layer, so that a whole network fits into few buffers, which stay in the processor's
caches. Used in `06_infer_and_benchmark.ipynb`.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from helpers.inference.kernels import Call, CpuKernel, Kernel, staged
from helpers.inference.traced import called_module
from helpers.inference.tuned_layers import TunedLayer


def static_model(
    model: fx.GraphModule,
    images: Tensor,
    substitute: Callable[[Kernel], Kernel] = lambda kernel: kernel,
) -> Callable[[Tensor], Any]:
    """Return what a model computes as a function for inputs of one shape.

    The outputs of kernels that write into buffers are valid until the function's next call.

    Args:
        model: with layers from `tune_layers_`; it is run once, and each layer chooses.
        images: an example of the input.
        substitute: returns the kernel that is to run in place of the one that was chosen.
    """
    interpreter = fx.Interpreter(model, garbage_collect_values=False)
    interpreter.run(images.clone())  # a model may write into its input
    values = interpreter.env
    nodes = list(model.graph.nodes)
    kernels = {node: substitute(kernel) for node, kernel in _chosen(model, values)}
    writing = {
        node: kernel
        for node, kernel in kernels.items()
        if isinstance(kernel, CpuKernel) and kernel.by_channels
    }
    buffers = _assign_buffers(nodes, values, set(writing))
    graph = copy.deepcopy(model.graph)
    for node, own in zip(nodes, list(graph.nodes), strict=True):
        if node not in kernels:
            continue
        kernel, shape = kernels[node], _operands(values, node)[0].shape
        if node in writing:
            call = _with_buffers(kernel, node, values, buffers[node])
        elif isinstance(kernel, CpuKernel):
            call = kernel.for_shape(shape)
        else:
            call = _plain_call(kernel)
        with graph.inserting_before(own):
            replacement = graph.call_function(call, own.args)
        own.replace_all_uses_with(replacement)
        graph.erase_node(own)
    return fx.GraphModule(model, graph).forward


def _chosen(model: fx.GraphModule, values: dict[fx.Node, Any]) -> Iterator[tuple[fx.Node, Kernel]]:
    for node in model.graph.nodes:
        layer = called_module(model, node)
        operands = _operands(values, node)
        if isinstance(layer, TunedLayer) and operands:  # none if it is called with a keyword
            yield node, layer.kernels[layer.choice(*operands).kernel]


def _operands(values: dict[fx.Node, Any], node: fx.Node) -> list[Tensor]:
    """Return what a layer was called with: its input, and a residual if there is one."""
    return [values[argument] for argument in node.args if isinstance(argument, fx.Node)]


def _plain_call(kernel: Kernel) -> Call:
    def call(input: Tensor, residual: Tensor | None = None) -> Tensor:
        return kernel(input, residual)

    return call


# --- buffers ---


def new_buffer(size: int) -> Tensor:
    """Return memory for so many numbers."""
    return torch.empty(size)


class _Buffer:
    """Memory that steps share; it is as large as the largest of them needs."""

    def __init__(self) -> None:
        self.size = 0
        self.memory: Tensor | None = None

    def tensor(self, like: Tensor) -> Tensor:
        """Return the first part of it in the shape of a tensor."""
        if self.memory is None:
            self.memory = new_buffer(self.size)
        return self.memory[: like.numel()].view(like.shape)


class _Pool:
    """Buffers that are free; the one that was used last comes first, since it is in cache."""

    def __init__(self) -> None:
        self.free: list[_Buffer] = []

    def take(self, size: int) -> _Buffer:
        buffer = self.free.pop() if self.free else _Buffer()
        buffer.size = max(buffer.size, size)
        return buffer


class _StepBuffers:
    """Where a step writes, and where it has its operands copied to if they are not contiguous."""

    def __init__(self, out: _Buffer, staged: dict[int, _Buffer]) -> None:
        self.out, self.staged = out, staged


def _assign_buffers(
    nodes: list[fx.Node], values: dict[fx.Node, Any], writing: set[fx.Node]
) -> dict[fx.Node, _StepBuffers]:
    """Give each step that writes into a buffer one that nobody reads any more."""
    last = _last_use(nodes, values)
    pool = _Pool()
    held: dict[int, _Buffer] = {}  # by the memory that the step's output has in `values`
    assigned: dict[fx.Node, _StepBuffers] = {}
    for number, node in enumerate(nodes):
        if node in writing:
            output = values[node]
            operands = _operands(values, node)
            staged = {
                place: pool.take(operand.numel())
                for place, operand in enumerate(operands)
                if not operand.is_contiguous()
            }
            out = None
            if len(operands) == 2:
                # The sum may take the place of what is added, where nobody reads that again.
                input, residual = (_memory(operand) for operand in operands)
                whole = operands[1].is_contiguous() and not operands[1].storage_offset()
                if residual in held and last[residual] == number and whole and input != residual:
                    out = held.pop(residual)
            held[_memory(output)] = out or pool.take(output.numel())
            assigned[node] = _StepBuffers(held[_memory(output)], staged)
            pool.free += staged.values()
        for memory in [memory for memory in held if last[memory] == number]:
            pool.free.append(held.pop(memory))
    return assigned


def _last_use(nodes: list[fx.Node], values: dict[fx.Node, Any]) -> dict[int, int]:
    """Return by memory the last step that reads or returns a tensor in it."""
    last: dict[int, int] = {}
    for number, node in enumerate(nodes):
        for related in (node, *node.all_input_nodes):
            for tensor in _tensors(values.get(related)):
                last[_memory(tensor)] = number
    return last


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _with_buffers(
    kernel: Kernel, node: fx.Node, values: dict[fx.Node, Any], buffers: _StepBuffers
) -> Call:
    """Return a kernel's call with its operands made contiguous where they are not."""
    assert isinstance(kernel, CpuKernel)
    operands = _operands(values, node)
    call = kernel.for_shape(operands[0].shape, buffers.out.tensor(values[node]))
    stages = [
        buffers.staged[place].tensor(operand) if place in buffers.staged else None
        for place, operand in enumerate(operands)
    ]
    return staged(call, stages)
