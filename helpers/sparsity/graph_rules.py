"""What each operator of a graph does to channels: one rule for each kind.

Explained in `02_prune_2_4.ipynb`, in the terms of `helpers.sparsity.channels`. A rule
returns the labels of the operator's outputs and notes the constraints that it leaves. An
operator that only moves elements (view, transpose, concatenate, ...) is run on the
labels themselves, so a channel shuffle or a split needs no rule of its own. A rule
returns None for a case that it does not cover; then, as for an operator without a
rule, every channel that goes in is fixed.
"""

import math
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import Argument, map_aggregate, map_arg

from helpers.sparsity.channels import Channels, varies


@dataclass(frozen=True)
class Op:
    """A node of a graph that `torch.export` made, with typed access to its arguments.

    `labels` has the labels of every node before it, and `parameters` the parameters and
    buffers, by the name of the node that stands for each.
    """

    node: fx.Node
    channels: Channels
    labels: dict[fx.Node, object]
    parameters: dict[str, Tensor]

    @property
    def name(self) -> str:
        """The operator's name in ATen, without its overload: `conv2d`."""
        return getattr(self.node.target, "__name__", str(self.node.target)).partition(".")[0]

    @property
    def is_pointwise(self) -> bool:
        """Whether PyTorch tags the operator as pointwise."""
        target = self.node.target
        return isinstance(target, OpOverload) and torch.Tag.pointwise in target.tags

    @property
    def shape(self) -> torch.Size:
        """The shape of the output."""
        return self.node.meta["val"].shape

    def map_outputs(self, function: Callable[[Tensor], Tensor]) -> object:
        """Return a function of each output tensor, in the structure of the outputs."""
        return map_aggregate(
            self.node.meta.get("val"),
            lambda value: function(value) if isinstance(value, Tensor) else value,
        )

    def argument(self, index: int) -> Argument:
        """Return an argument, given by position or by name; None if it is not given."""
        if index < len(self.node.args):
            return self.node.args[index]
        if not isinstance(self.node.target, OpOverload):
            return None
        return self.node.kwargs.get(self.node.target._schema.arguments[index].name)

    def integer(self, index: int, default: int) -> int:
        """Return an argument that is an integer."""
        value = self.argument(index)
        return value if isinstance(value, int) else default

    def integers(self, index: int) -> list[int] | None:
        """Return an argument that is a list of integers; None if it is not one."""
        value = self.argument(index)
        if not isinstance(value, Sequence):
            return None
        numbers = [number for number in value if isinstance(number, int)]
        return numbers if len(numbers) == len(value) else None

    def text(self, index: int, default: str) -> str:
        """Return an argument that is a string."""
        value = self.argument(index)
        return value if isinstance(value, str) else default

    def is_tensor(self, index: int) -> bool:
        """Return whether an argument is a tensor."""
        return isinstance(self.argument(index), fx.Node)

    def tensor(self, index: int) -> Tensor:
        """Return the labels of an argument that is a tensor."""
        return self._labels_of(self._source(index))[0]

    def tensor_shape(self, index: int) -> torch.Size:
        """Return the shape of an argument that is a tensor."""
        return self._source(index).meta["val"].shape

    def tensors(self, index: int) -> list[Tensor]:
        """Return the labels of an argument that is a list of tensors."""
        value = self.argument(index)
        nodes = value if isinstance(value, Sequence) else []
        return [self._labels_of(node)[0] for node in nodes if isinstance(node, fx.Node)]

    def parameter(self, index: int) -> Tensor | None:
        """Return the parameter or buffer that an argument is; None if it is computed."""
        argument = self.argument(index)
        return self.parameters.get(argument.name) if isinstance(argument, fx.Node) else None

    def uses_parameter(self) -> bool:
        """Return whether any argument is a parameter or buffer."""
        return any(node.name in self.parameters for node in self.node.all_input_nodes)

    def operands(self) -> list[Tensor]:
        """Return the labels of every tensor among the arguments; each is there once."""
        return [labels for node in self.node.all_input_nodes for labels in self._labels_of(node)]

    def run_on_labels(self) -> object:
        """Return what the operator makes of the labels in the place of the values.

        None if an argument is computed but is not a tensor: a size that depends on data.
        """
        if not isinstance(self.node.target, OpOverload):
            return None
        if not all(self._labels_of(node) for node in self.node.all_input_nodes):
            return None
        args = map_arg(self.node.args, lambda node: self._labels_of(node)[0])
        return self.node.target(*args, **self.node.kwargs)

    def _source(self, index: int) -> fx.Node:
        argument = self.argument(index)
        if not isinstance(argument, fx.Node):
            raise TypeError(f"Argument {index} of {self.node.format_node()} is not a tensor.")
        return argument

    def _labels_of(self, node: fx.Node) -> list[Tensor]:
        """Return the labels of a node, which may stand for several tensors."""
        if node.name in self.parameters:
            return [self.channels.elements(self.parameters[node.name])]
        found = self.labels.get(node)
        items = found if isinstance(found, list | tuple) else [found]
        return [item for item in items if isinstance(item, Tensor)]


Rule = Callable[[Channels, Op], object]

_RULES: dict[str, Rule] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators of ATen, by their names without overloads."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(operators, function))
        return function

    return register


def label_outputs(channels: Channels, op: Op) -> object:
    """Return the labels of an operator's outputs, by the operator's rule.

    Without a rule all that goes in and comes out is fixed.
    """
    apply = _RULES.get(op.name, pointwise if op.is_pointwise else None)
    labels = apply(channels, op) if apply else None
    if labels is not None:
        return labels
    for operand in op.operands():
        channels.fix(operand, f"it goes through {op.node.target}")
    reason = f"it comes from {op.node.target}"
    return op.map_outputs(lambda output: channels.constant(output.shape, reason))


# --- operators that move elements ---


@rule(
    "alias", "clone", "contiguous", "detach", "dropout", "dropout_", "feature_dropout",
    "alpha_dropout", "lift_fresh_copy", "to", "_to_copy", "_assert_tensor_metadata",
)  # fmt: skip
def same(channels: Channels, op: Op) -> Tensor:
    """Values stay where they are."""
    return op.tensor(0)


@rule("view", "reshape", "flatten", "unflatten", "_unsafe_view", "squeeze", "unsqueeze")
def reshape(channels: Channels, op: Op) -> Tensor:
    """Values stay in the same order."""
    return op.tensor(0).reshape(op.shape)


@rule("expand", "expand_as")
def expand(channels: Channels, op: Op) -> Tensor:
    """Values are repeated."""
    return op.tensor(0).expand(op.shape)


@rule(
    "permute", "transpose", "swapaxes", "movedim", "t", "cat", "concat", "stack", "roll", "flip",
    "repeat", "repeat_interleave", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
)  # fmt: skip
def move(channels: Channels, op: Op) -> object:
    """Labels move as the values do."""
    return op.run_on_labels()


@rule(
    "slice", "select", "narrow", "chunk", "split", "split_with_sizes", "tensor_split", "unbind",
)  # fmt: skip
def part(channels: Channels, op: Op) -> object:
    """Labels move as the values do; each part is a group, for what follows may treat it alone.

    A shift of some channels along the image, for instance, leaves no other constraint.
    """
    outputs = op.run_on_labels()
    parts = outputs if isinstance(outputs, list | tuple) else [outputs]
    for number, labels in enumerate(parts):
        if isinstance(labels, Tensor):
            channels.join(labels, number)
    return outputs


@rule("getitem")
def getitem(channels: Channels, op: Op) -> object:
    """One of several outputs."""
    source, index = op.node.args
    outputs = op.labels[source] if isinstance(source, fx.Node) else None
    return outputs[index] if isinstance(outputs, Sequence) and isinstance(index, int) else None


@rule("pad")
def pad(channels: Channels, op: Op) -> Tensor | None:
    """Constants beside the values, or along spatial dimensions the values themselves."""
    labels, widths = op.tensor(0), op.integers(1)
    if widths is None:
        return None
    padded = {labels.dim() - 1 - i // 2 for i, width in enumerate(widths) if width}
    if any(varies(labels, dim) for dim in padded):
        if op.text(2, "constant") != "constant":
            return None
        border = channels.constant((), "it is padded along the channels")
        return F.pad(labels, widths, value=int(border))
    for dim in padded:
        labels = labels.narrow(dim, 0, 1)
    return labels.expand(op.shape)


@rule(
    "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like",
    "new_zeros", "new_ones", "new_full", "new_empty",
)  # fmt: skip
def new_tensor(channels: Channels, op: Op) -> Tensor:
    """Only the shape of the operand matters, not its values."""
    return channels.constant(op.shape, f"it comes from {op.node.target}")


# --- operators that treat all channels alike ---


@rule("hardswish_", "hardtanh_")  # which not every version of PyTorch tags as pointwise
def pointwise(channels: Channels, op: Op) -> Tensor | None:
    """Operands are coupled at each position; any operator tagged as pointwise does so."""
    operands = op.operands()
    if not operands:
        return None
    result = operands[0]
    channels.join(result, 0)
    for slot, labels in enumerate(operands[1:], start=1):
        channels.join(labels, slot)
        result = channels.couple(result, labels)
    return result.expand(op.shape)


@rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d",
    "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d", "upsample_nearest2d",
    "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d",
)  # fmt: skip
def spatial(channels: Channels, op: Op) -> object:
    """Positions of an image are combined, in each channel by itself."""
    labels = op.tensor(0)
    dims = int(op.name[-2])  # max_pool2d: the last two
    kept = channels.reduce_to(labels, *range(labels.dim() - dims))
    channels.join(kept)
    return op.map_outputs(
        lambda output: kept.view(*kept.shape, *[1] * dims).expand(output.shape),
    )


@rule("mean", "sum")
def reduction(channels: Channels, op: Op) -> Tensor | None:
    """Over other dimensions than the channels', or over the channels alone in any order."""
    labels, dims = op.tensor(0), op.integers(1)
    if dims is None:
        return None
    reduced = {dim % labels.dim() for dim in dims}
    kept = [dim for dim in range(labels.dim()) if dim not in reduced]
    over_channels = any(varies(labels, dim) for dim in reduced)
    if over_channels and not any(varies(labels, dim) for dim in kept):
        channels.join(channels.reduce_to(labels, *sorted(reduced)))
        return channels.constant(op.shape, "it is a mean over channels")
    result = channels.reduce_to(labels, *kept)
    channels.join(result)
    return result.reshape(op.shape)


# --- layers ---


@rule("conv1d", "conv2d", "conv3d")
def convolution(channels: Channels, op: Op) -> Tensor | None:
    """New channels from those of each group; depthwise, each channel goes on by itself."""
    weight = op.parameter(1)
    if weight is None:
        return None
    labels = op.tensor(0)
    dim = labels.dim() - (weight.dim() - 1)
    inputs, outputs = channels.reduce_to(labels, dim), channels.output_channels(weight)
    groups = len(inputs) // weight.shape[1]
    if weight.shape[1] == 1 and groups > 1:
        channels.place(weight, {0: outputs})
        channels.couple(inputs.repeat_interleave(len(outputs) // groups), outputs)
        channels.join(inputs, 0)
        channels.join(outputs, 1)
    else:
        inputs = inputs.view(groups, -1)
        channels.place(weight, {0: outputs, 1: inputs})
        for group in range(groups):
            channels.join(inputs[group], 0, group)
            channels.join(outputs.view(groups, -1)[group], 1, group)
    _vector(channels, op, 2, outputs)
    return _along(outputs, op.shape, dim)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(channels: Channels, op: Op) -> Tensor | None:
    """New channels from all of them; a grouped one is not covered."""
    weight = op.parameter(1)
    if weight is None or op.integer(6, 1) != 1:
        return None
    labels = op.tensor(0)
    dim = labels.dim() - (weight.dim() - 1)
    inputs, outputs = channels.reduce_to(labels, dim), channels.output_channels(weight, dim=1)
    channels.place(weight, {0: inputs, 1: outputs})
    channels.join(inputs, 0)
    channels.join(outputs, 1)
    _vector(channels, op, 2, outputs)
    return _along(outputs, op.shape, dim)


@rule("linear")
def linear(channels: Channels, op: Op) -> Tensor | None:
    """New channels from all of them, in the last dimension."""
    weight = op.parameter(1)
    if weight is None:
        return None
    inputs = channels.reduce_to(op.tensor(0), -1)
    outputs = channels.output_channels(weight)
    channels.place(weight, {0: outputs, 1: inputs.view(1, -1)})
    channels.join(inputs, 0)
    channels.join(outputs, 1)
    _vector(channels, op, 2, outputs)
    return outputs.expand(op.shape)


@rule("embedding")
def embedding(channels: Channels, op: Op) -> Tensor | None:
    """New channels, the columns of the table."""
    weight = op.parameter(0)
    if weight is None:
        return None
    columns = channels.output_channels(weight, dim=1)
    channels.place(weight, {1: columns.view(1, -1) if columns.dim() == 1 else columns})
    channels.join(columns)
    return columns.view(-1).expand(op.shape)


@rule("batch_norm", "instance_norm")
def batch_norm(channels: Channels, op: Op) -> Tensor:
    """Each channel by itself; scale, shift and running statistics move with it."""
    labels = op.tensor(0)
    normalised = channels.reduce_to(labels, 1)
    channels.join(normalised)
    for index in (1, 2, 3, 4):
        _vector(channels, op, index, normalised)
    return _along(normalised, labels.shape, 1)


@rule("group_norm")
def group_norm(channels: Channels, op: Op) -> Tensor:
    """Channels move within their group; scale and shift move with them."""
    labels = op.tensor(0)
    normalised = channels.reduce_to(labels, 1)
    for group, members in enumerate(normalised.view(op.integer(1, 1), -1)):
        channels.join(members, group)
    for index in (2, 3):
        _vector(channels, op, index, normalised)
    return _along(normalised, labels.shape, 1)


@rule("layer_norm", "rms_norm")
def layer_norm(channels: Channels, op: Op) -> Tensor | None:
    """All channels together, in any order; scale and shift move with them."""
    labels, shape = op.tensor(0), op.integers(1)
    if shape is None:
        return None
    normalised = channels.reduce_to(labels, *range(labels.dim() - len(shape), labels.dim()))
    channels.join(normalised)
    for index in (2, 3):
        if op.is_tensor(index):
            channels.couple(normalised, op.tensor(index))
    return normalised.expand(labels.shape)


@rule("prelu")
def prelu(channels: Channels, op: Op) -> Tensor:
    """Each channel by itself, with a slope of its own or one for all."""
    labels = op.tensor(0)
    inputs = channels.reduce_to(labels, 1)
    channels.join(inputs)
    if op.tensor_shape(1).numel() > 1:
        _vector(channels, op, 1, inputs)
    return _along(inputs, labels.shape, 1)


# --- products of activations ---


@rule("scaled_dot_product_attention")
def attention(channels: Channels, op: Op) -> Tensor | None:
    """Queries and keys are coupled, values go on; channels move within their head."""
    query, key, value = op.tensor(0), op.tensor(1), op.tensor(2)
    if query.shape[:-2] != key.shape[:-2]:  # fewer keys than queries: heads share them
        return None
    if op.is_tensor(3):
        channels.fix(op.tensor(3), "it masks attention")
    heads = (*range(query.dim() - 2), query.dim() - 1)
    query, key, value = (channels.reduce_to(labels, *heads) for labels in (query, key, value))
    channels.couple(query, key)
    for operand, labels in enumerate((query, key, value)):
        for head, members in enumerate(labels.reshape(-1, labels.shape[-1])):
            channels.join(members, operand, head)
    return value.unsqueeze(-2).expand(op.shape)


@rule("matmul")
def matmul(channels: Channels, op: Op) -> Tensor | None:
    """A batch of matrix products, without broadcasting."""
    left, right = op.tensor_shape(0), op.tensor_shape(1)
    if op.uses_parameter() or len(left) < 2 or len(left) != len(right) or left[:-2] != right[:-2]:
        return None
    batch = string.ascii_lowercase[: len(left) - 2]
    operands = (op.tensor(0), batch + "XY"), (op.tensor(1), batch + "YZ")
    return _contract(channels, *operands, batch + "XZ", op.shape)


@rule("einsum")
def einsum(channels: Channels, op: Op) -> Tensor | None:
    """A product of two tensors, written with its output and without repeated letters."""
    inputs, arrow, output = op.text(0, "").replace(" ", "").partition("->")
    letters = inputs.split(",")
    repeated = any(len(set(part)) < len(part) for part in (*letters, output))
    if op.uses_parameter() or repeated or "." in inputs or not arrow or len(letters) != 2:
        return None
    left, right = zip(op.tensors(1), letters, strict=True)
    return _contract(channels, left, right, output, op.shape)


Operand = tuple[Tensor, str]  # labels, and a letter for each of their dimensions


def _contract(
    channels: Channels, left: Operand, right: Operand, output: str, shape: torch.Size
) -> Tensor:
    """Label a product that is summed over the letters that the output lacks."""
    for (labels, letters), other in ((right, left), (left, right)):
        if channels.all_fixed(other[0]):  # attention weights times values: the channels go on
            kept = [letter for letter in output if letter in letters]
            result = channels.reduce_to(labels, *(letters.index(letter) for letter in kept))
            _join_each(channels, result, [letter in other[1] for letter in kept])
            for dim, letter in enumerate(output):
                if letter not in letters:
                    result = result.unsqueeze(dim)
            return result.expand(shape)
    shared = [letter for letter in left[1] if letter in right[1]]
    ours, theirs = (
        channels.reduce_to(labels, *(letters.index(letter) for letter in shared))
        for labels, letters in (left, right)
    )
    channels.couple(ours, theirs)
    _join_each(channels, ours, [letter in output for letter in shared])
    return channels.constant(shape, "it is a product of two activations")


def _join_each(channels: Channels, labels: Tensor, is_batch: list[bool]) -> None:
    """Make channels members by their position in the batch dimensions: by head, for instance."""
    order = sorted(range(labels.dim()), key=lambda dim: not is_batch[dim])
    rows = math.prod(labels.shape[dim] for dim in range(labels.dim()) if is_batch[dim])
    for number, row in enumerate(labels.permute(order).reshape(rows, -1)):
        channels.join(row, number)


# --- parts of rules ---


def _vector(channels: Channels, op: Op, index: int, along: Tensor) -> None:
    """Let an argument with a value for each channel, a bias for instance, move with them."""
    vector = op.parameter(index)
    if vector is not None:
        known = channels.placements.get(id(vector))
        if known is None or known.elements is None:
            channels.place(vector, {0: along})
            return
    if op.is_tensor(index):
        channels.couple(op.tensor(index), along)


def _along(labels: Tensor, shape: Iterable[int], dim: int) -> Tensor:
    """Return labels along one dimension of a shape, repeated along the others."""
    shape = tuple(shape)
    return labels.view(*[1] * dim, -1, *[1] * (len(shape) - dim - 1)).expand(shape)
