"""What each operator of a graph does to channels: one rule for each kind.

Explained in `02b_better_pruning.ipynb`, in the terms of `helpers.sparsity.channels`. A rule
returns the labels of the operator's outputs and notes the constraints that it leaves. An
operator that only moves elements (view, transpose, concatenate, ...) is run on the
labels themselves, so a channel shuffle or a split needs no rule of its own. A rule
returns None for a case that it does not cover; then, as for an operator without a
rule, every channel that goes in is fixed.

A tensor may have channels along several dimensions: a weight that is computed has them
along its outputs and along its inputs, keys times values along both. Each has labels of its
own, and a rule is applied to each in turn, as if there were no others. That is right,
because a model that stays the same when either is reordered also stays the same when both
are. Only rules for products see them all at once.
"""

import math
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.fx.node import Argument, map_aggregate, map_arg
from torch.utils import _pytree

from helpers.sparsity.channels import Channels, channel_dims, compact, varies


@dataclass(frozen=True)
class Op:
    """A node of a graph that `torch.export` made, with typed access to its arguments.

    `labels` has all labels of every node before it, and `parameters` the parameters and
    buffers, by the node that stands for each. A rule sees the labels in `chosen`, and of
    a node that is not in it the first labels.
    """

    node: fx.Node
    channels: Channels
    labels: dict[fx.Node, list[object]]
    parameters: dict[fx.Node, Tensor]
    chosen: Mapping[fx.Node, object] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The operator's name in ATen, without its overload: `conv2d`."""
        return getattr(self.node.target, "__name__", str(self.node.target)).partition(".")[0]

    @property
    def is_pointwise(self) -> bool:
        """Whether PyTorch tags the operator, or its variant that is not in place, as pointwise."""
        if not isinstance(self.node.target, OpOverload):
            return False
        packets = [getattr(torch.ops.aten, self.name.removesuffix("_"), None)]
        overloads = [getattr(each, name) for each in packets if each for name in each.overloads()]
        return any(torch.Tag.pointwise in each.tags for each in (self.node.target, *overloads))

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
        expected = self.node.target._schema.arguments
        return self.node.kwargs.get(expected[index].name) if index < len(expected) else None

    def integer(self, index: int, default: int) -> int:
        """Return an argument that is an integer."""
        value = self.argument(index)
        return value if isinstance(value, int) else default

    def integers(self, index: int) -> list[int] | None:
        """Return an argument that is an integer or a list of them; None if it is not one."""
        value = self.argument(index)
        if isinstance(value, int):
            return [value]
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
        return [self._labels_of(node)[0] for node in self._sources(index)]

    def all_labels(self, index: int) -> list[Tensor]:
        """Return all labels of an argument that is a tensor."""
        return self.all_tensors(self._source(index))

    def all_labels_of_list(self, index: int) -> list[list[Tensor]]:
        """Return all labels of each tensor in an argument that is a list."""
        return [self.all_tensors(node) for node in self._sources(index)]

    def parameter(self, index: int) -> Tensor | None:
        """Return the parameter or buffer that an argument is; None if it is computed."""
        argument = self.argument(index)
        return self.parameters.get(argument) if isinstance(argument, fx.Node) else None

    def operands(self) -> list[Tensor]:
        """Return the labels of every tensor among the arguments; each is there once."""
        return [labels for node in self.node.all_input_nodes for labels in self._labels_of(node)]

    def all_operands(self) -> list[list[Tensor]]:
        """Return all labels of every tensor among the arguments."""
        found = [self.all_tensors(node) for node in self.node.all_input_nodes]
        return [labels for labels in found if labels]

    def run_on_labels(self) -> object:
        """Return what the operator makes of the labels in the place of the values.

        None if an argument is computed but is not a tensor: a size that depends on data.
        """
        if not isinstance(self.node.target, OpOverload):
            return None
        if not all(self._labels_of(node) for node in self.node.all_input_nodes):
            return None
        args = map_arg(self.node.args, lambda node: self._labels_of(node)[0])
        outputs = self.node.target(*args, **self.node.kwargs)
        return _pytree.tree_map_only(Tensor, compact, outputs)

    def choices(self) -> "list[Op]":
        """Return the operator once for each labels of its operands, those that belong together.

        Labels of two operands belong together if they differ along the same dimension,
        counted from the last as in broadcasting. An operand without labels for a choice
        has constants in it.
        """
        nodes = [node for node in self.node.all_input_nodes if self._labels_of(node)]
        if all(len(self.all_labels_of(node)) == 1 for node in nodes):
            return [self]
        choices: list[dict[fx.Node, object]] = []
        dims: list[set[int]] = []
        for node in nodes:
            for labels in self.all_labels_of(node):
                along = _dims_of(labels)
                places = [i for i, choice in enumerate(choices) if node not in choice]
                place = next((i for i in places if dims[i] & along), None)
                if place is None and along:
                    place = len(choices)
                    choices.append({})
                    dims.append(set())
                if place is not None:
                    choices[place][node] = labels
                    dims[place] |= along
        for choice in choices:
            for node in nodes:
                if node not in choice:
                    first = self.all_labels_of(node)[0]
                    choice[node] = first if not _dims_of(first) else self._constants_like(first)
        return [
            Op(self.node, self.channels, self.labels, self.parameters, choice) for choice in choices
        ]

    def all_labels_of(self, node: fx.Node) -> list[object]:
        """Return all labels of a node, each in the structure of its tensors."""
        if node in self.parameters and node not in self.labels:
            return list(self.channels.of_parameter(self.parameters[node]))
        return self.labels.get(node, [])

    def all_tensors(self, node: fx.Node) -> list[Tensor]:
        """Return the tensors in all labels of a node."""
        return [_expanded(labels, node) for labels in _tensors_in(self.all_labels_of(node))]

    def broadcast_operands(self) -> list[Tensor]:
        """Return `operands`, but repeated values once, as broadcasting repeats them."""
        return [
            labels
            for node in self.node.all_input_nodes
            for labels in _tensors_in(self.chosen.get(node, self.all_labels_of(node)[:1]))
        ]

    def _constants_like(self, labels: object) -> object:
        reason = "it meets channels along another dimension"
        return _pytree.tree_map_only(
            Tensor, lambda each: self.channels.constant(each.shape, reason), labels
        )

    def _source(self, index: int) -> fx.Node:
        argument = self.argument(index)
        if not isinstance(argument, fx.Node):
            raise TypeError(f"Argument {index} of {self.node.format_node()} is not a tensor.")
        return argument

    def _sources(self, index: int) -> list[fx.Node]:
        value = self.argument(index)
        nodes = value if isinstance(value, Sequence) else []
        return [node for node in nodes if isinstance(node, fx.Node)]

    def _labels_of(self, node: fx.Node) -> list[Tensor]:
        """Return the labels of a node, which may stand for several tensors."""
        found = self.chosen[node] if node in self.chosen else self.all_labels_of(node)[:1]
        return [_expanded(labels, node) for labels in _tensors_in(found)]


def _tensors_in(structure: object) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(structure) if isinstance(leaf, Tensor)]


def _expanded(labels: Tensor, node: fx.Node) -> Tensor:
    """Return labels in the shape of what they belong to, where that is one tensor."""
    value = node.meta.get("val")
    return labels.expand(value.shape) if isinstance(value, Tensor) else labels


def _dims_of(labels: object) -> set[int]:
    """Return the dimensions that channels lie along, counted from the last: -1, -2, ..."""
    return {dim - tensor.dim() for tensor in _tensors_in(labels) for dim in channel_dims(tensor)}


Rule = Callable[[Channels, Op], object]
Product = Callable[[Channels, Op], Sequence[object] | None]

_RULES: dict[str, Rule] = {}
_PRODUCTS: dict[str, Product] = {}


def rule(*operators: str) -> Callable[[Rule], Rule]:
    """Register a rule for operators of ATen, by their names without overloads."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(operators, function))
        return function

    return register


def product(*operators: str) -> Callable[[Product], Product]:
    """Register a rule that sees all labels of its operands and returns those of its output."""

    def register(function: Product) -> Product:
        _PRODUCTS.update(dict.fromkeys(operators, function))
        return function

    return register


def label_outputs(channels: Channels, op: Op) -> list[object]:
    """Return all labels of an operator's outputs, by the operator's rule.

    Without a rule all that goes in and comes out is fixed.
    """
    channels.next_operator()
    if op.name in _PRODUCTS:
        labels = _PRODUCTS[op.name](channels, op)
        if labels is None:
            return [_fixed(channels, op, op.all_operands())]
        reason = "it is a product of two activations"
        found: list[object] = [*labels] or [channels.constant(op.shape, reason)]
    else:
        found = []
        apply = _RULES.get(op.name, pointwise if op.is_pointwise else None)
        for choice in op.choices():
            channels.next_operator()
            outputs = apply(channels, choice) if apply else None
            if outputs is None:
                outputs = _fixed(channels, choice, [choice.operands()])
            found.append(outputs)
    movable = [
        labels
        for labels in found
        if not all(channels.all_fixed(tensor) for tensor in _tensors_in(labels))
    ]
    return movable or found[:1]


def _fixed(channels: Channels, op: Op, operands: list[list[Tensor]]) -> object:
    """Fix what goes in, and return labels that say so for what comes out."""
    for operand in operands:
        for labels in operand:
            channels.fix(labels, f"it goes through {op.node.target}")
    reason = f"it comes from {op.node.target}"
    return op.map_outputs(lambda output: channels.constant(output.shape, reason))


# --- operators that move elements ---


@rule(
    "alias", "clone", "contiguous", "detach", "detach_", "dropout", "dropout_", "feature_dropout",
    "alpha_dropout", "feature_alpha_dropout", "lift_fresh_copy", "to", "type_as", "_to_copy",
    "_assert_tensor_metadata",
)  # fmt: skip
def same(channels: Channels, op: Op) -> Tensor:
    """Values stay where they are."""
    return op.tensor(0)


@rule(
    "view", "view_as", "reshape", "reshape_as", "flatten", "unflatten", "_unsafe_view", "squeeze",
    "unsqueeze",
)  # fmt: skip
def reshape(channels: Channels, op: Op) -> Tensor:
    """Values stay in the same order."""
    return compact(op.tensor(0).reshape(op.shape))


@rule("expand", "expand_as")
def expand(channels: Channels, op: Op) -> Tensor:
    """Values are repeated: the labels stay as they are, so that this can be seen later."""
    labels = op.tensor(0)
    return labels.view((1,) * (len(op.shape) - labels.dim()) + labels.shape)


@rule(
    "permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "t", "numpy_T",
    "adjoint", "cat", "concat", "concatenate", "stack", "hstack", "vstack", "roll", "flip", "rot90",
    "repeat", "tile", "repeat_interleave", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
)  # fmt: skip
def move(channels: Channels, op: Op) -> object:
    """Labels move as the values do."""
    if op.name == "repeat_interleave" and (op.is_tensor(1) or not op.argument(1)):
        return None
    return op.run_on_labels()


@rule(
    "slice", "select", "narrow", "chunk", "split", "split_with_sizes", "tensor_split", "unbind",
    "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "unfold", "diagonal",
)  # fmt: skip
def part(channels: Channels, op: Op) -> object:
    """Labels move as the values do; each part is a group, for what follows may treat it alone.

    A shift of some channels along the image, for instance, leaves no other constraint.
    """
    outputs = op.run_on_labels()
    for number, labels in enumerate(_tensors_in(outputs)):
        channels.join(labels, number)
    return outputs


@rule("getitem")
def getitem(channels: Channels, op: Op) -> object:
    """One of several outputs."""
    source, index = op.node.args
    if not isinstance(source, fx.Node) or not isinstance(index, int):
        return None
    outputs = op.chosen.get(source, op.labels[source][0])
    return outputs[index] if isinstance(outputs, Sequence) else None


@rule("index", "index_select", "gather", "take_along_dim")
def index(channels: Channels, op: Op) -> object:
    """Elements are picked along dimensions without channels, alike for all channels."""
    labels = op.tensor(0)
    for other in op.operands()[1:]:
        channels.fix(other, "it is an index")
    if op.name == "index":
        return _picked_by_tensors(channels, op, labels)
    numbers = op.integers(2 if op.name == "take_along_dim" else 1)
    picked = [dim % labels.dim() for dim in numbers or []]
    if not picked or any(varies(labels, dim) for dim in picked):
        return None
    channels.join(labels)
    for dim in range(labels.dim()):
        if dim in picked:
            labels = labels.narrow(dim, 0, 1)
        elif labels.shape[dim] != op.shape[dim]:  # `gather` may leave some out
            labels = labels.narrow(dim, 0, op.shape[dim])
    return labels.expand(op.shape)


def _picked_by_tensors(channels: Channels, op: Op, labels: Tensor) -> Tensor | None:
    """Label `x[:, index]`: any index picks the same labels where these do not differ."""
    given = op.argument(1)
    firsts: list[Tensor | None] = []
    for dim, each in enumerate(given if isinstance(given, Sequence) else []):
        if not isinstance(each, fx.Node):
            firsts.append(None)
            continue
        value = each.meta["val"]
        if varies(labels, dim) or not isinstance(value, Tensor) or value.dtype == torch.bool:
            return None
        firsts.append(torch.zeros(value.shape, dtype=torch.long))
    channels.join(labels)
    return compact(torch.ops.aten.index(labels, firsts))


@rule("pad", "constant_pad_nd")
def pad(channels: Channels, op: Op) -> Tensor | None:
    """Constants beside the values, or along spatial dimensions the values themselves."""
    labels, widths = op.tensor(0), op.integers(1)
    if widths is None:
        return None
    padded = {labels.dim() - 1 - i // 2 for i, width in enumerate(widths) if width}
    if any(varies(labels, dim) for dim in padded):
        if op.name == "pad" and op.text(2, "constant") != "constant":
            return None
        border = channels.constant((), "it is padded along the channels")
        return F.pad(labels, widths, value=int(border))
    for dim in padded:
        labels = labels.narrow(dim, 0, 1)
    return labels.expand(op.shape)


@rule("im2col")
def patches(channels: Channels, op: Op) -> Tensor:
    """The pixels of each patch become channels beside each other."""
    labels = op.tensor(0)
    inputs = channels.reduce_to(labels, -3)
    channels.join(inputs)
    return _along(inputs.repeat_interleave(op.shape[-2] // len(inputs)), op.shape, labels.dim() - 3)


@rule("col2im")
def sum_of_patches(channels: Channels, op: Op) -> Tensor:
    """Channels beside each other become the pixels of a patch, added where patches overlap."""
    rows = channels.reduce_to(op.tensor(0), -2)
    outputs = channels.reduce_to(rows.view(op.shape[-3], -1), 0)
    channels.join(outputs)
    return _along(outputs, op.shape, len(op.shape) - 3)


@rule("view_as_complex")
def view_as_complex(channels: Channels, op: Op) -> Tensor:
    """Two values become one complex number."""
    labels = op.tensor(0)
    return channels.reduce_to(labels, *range(labels.dim() - 1))


@rule("view_as_real")
def view_as_real(channels: Channels, op: Op) -> Tensor:
    """One complex number becomes two values."""
    labels = op.tensor(0).unsqueeze(-1)
    channels.join(labels)
    return labels.expand(op.shape)


@rule("empty_like", "rand_like", "randn_like", "new_empty")
def new_tensor(channels: Channels, op: Op) -> Tensor:
    """Only the shape of the operand matters, not its values."""
    return channels.constant(op.shape, f"it comes from {op.node.target}")


@rule(
    "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones",
    "new_full",
)  # fmt: skip
def one_value(channels: Channels, op: Op) -> Tensor:
    """The same value at each position: like a number, it meets channels in any order."""
    return channels.constant([1] * len(op.shape), f"it comes from {op.node.target}")


# --- operators that treat all channels alike ---


@rule(
    "hardswish", "hardswish_", "hardtanh_", "mish", "log_sigmoid", "multiply", "divide", "subtract",
    "true_divide", "floor_divide", "negative", "absolute", "square", "fix", "arctan", "arcsin",
    "arccos", "greater", "greater_equal", "less", "less_equal", "not_equal", "relu6", "relu6_",
    "selu", "selu_", "__and__", "__or__", "__xor__", "__iand__", "__ior__", "copy_", "conj",
    "_conj", "complex", "polar", "real", "imag",
)  # fmt: skip
def pointwise(channels: Channels, op: Op) -> object:
    """Operands are coupled at each position; any operator tagged as pointwise does so.

    These are the ones that PyTorch does not tag.
    """
    operands = op.broadcast_operands()
    if not operands:
        return None
    result = operands[0]
    channels.join(result, 0)
    for slot, labels in enumerate(operands[1:], start=1):
        channels.join(labels, slot)
        result = channels.couple(result, labels)
    return op.map_outputs(lambda output: result.expand(output.shape))


@rule("glu")
def glu(channels: Channels, op: Op) -> Tensor:
    """One half of the channels is scaled by the other."""
    first, second = op.tensor(0).chunk(2, op.integer(1, -1))
    channels.join(first, 0)
    channels.join(second, 1)
    return channels.couple(first, second)


@rule(
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "max_pool2d_with_indices", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d", "upsample_nearest1d",
    "upsample_nearest2d", "upsample_nearest3d", "_upsample_nearest_exact1d",
    "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "upsample_linear1d",
    "upsample_bilinear2d", "_upsample_bilinear2d_aa", "upsample_bicubic2d",
    "_upsample_bicubic2d_aa", "upsample_trilinear3d",
)  # fmt: skip
def spatial(channels: Channels, op: Op) -> object:
    """Positions of an image are combined, in each channel by itself."""
    labels = op.tensor(0)
    dims = int(re.findall(r"(\d)d", op.name)[-1])  # max_pool2d: the last two
    kept = channels.reduce_to(labels, *range(labels.dim() - dims))
    channels.join(kept)
    return op.map_outputs(
        lambda output: kept.view(*kept.shape, *[1] * dims).expand(output.shape),
    )


@rule("grid_sampler", "grid_sampler_2d", "grid_sampler_3d")
def sampled(channels: Channels, op: Op) -> Tensor:
    """Positions of an image are combined as a grid says, in each channel by itself."""
    channels.fix(op.tensor(1), "it says where an image is sampled")
    labels = op.tensor(0)
    kept = channels.reduce_to(labels, 0, 1)
    channels.join(kept)
    return kept.view(*kept.shape, *[1] * (labels.dim() - 2)).expand(op.shape)


@rule(
    "mean", "sum", "nansum", "amax", "amin", "var", "std", "var_mean", "std_mean", "logsumexp",
    "linalg_vector_norm", "norm", "frobenius_norm",
)  # fmt: skip
def reduction(channels: Channels, op: Op) -> object:
    """Over other dimensions than the channels', or over the channels in any order."""
    after = {"linalg_vector_norm": 2, "norm": 2}.get(op.name, 1)  # the order of the norm is first
    labels, dims = op.tensor(0), op.integers(after)
    if dims is None and op.argument(after) is not None:
        return None
    reduced = [dim % labels.dim() for dim in dims or range(labels.dim())]
    result = _join_over(channels, labels, reduced)
    if result is None:
        reason = f"it is a {op.name} over channels"
        return op.map_outputs(lambda output: channels.constant(output.shape, reason))
    for dim in reduced:
        result = result.narrow(dim, 0, 1)
    return op.map_outputs(lambda output: result.reshape(output.shape))


@rule("softmax", "_softmax", "log_softmax", "_log_softmax")
def softmax(channels: Channels, op: Op) -> Tensor:
    """Normalised over other dimensions than the channels', or over the channels in any order."""
    labels = op.tensor(0)
    _join_over(channels, labels, [op.integer(1, -1) % labels.dim()])
    return labels


@rule(
    "cumsum", "cumsum_", "cumprod", "logcumsumexp", "sort", "argsort", "topk", "max", "min",
    "argmax", "argmin", "kthvalue", "median", "any", "all", "prod",
)  # fmt: skip
def along_one(channels: Channels, op: Op) -> object:
    """Along another dimension than the channels', in each channel by itself."""
    labels = op.tensor(0)
    dim = op.integer(2 if op.name in ("topk", "kthvalue") else 1, -1) % max(labels.dim(), 1)
    if op.is_tensor(1):
        return pointwise(channels, op)  # the larger of two tensors
    if op.argument(1) is None and op.name in ("max", "min", "any", "all", "prod"):
        _join_over(channels, labels, list(range(labels.dim())))
        return channels.constant(op.shape, f"it is a {op.name} over channels")
    if op.argument(1) is None or varies(labels, dim):
        return None
    channels.join(labels)
    first = labels.narrow(dim, 0, 1)

    def of_output(output: Tensor) -> Tensor:
        same_dims = output.dim() == labels.dim()
        return (first if same_dims else first.squeeze(dim)).expand(output.shape)

    return op.map_outputs(of_output)


# --- layers ---


@product("conv1d", "conv2d", "conv3d")
def convolution(channels: Channels, op: Op) -> list[Tensor] | None:
    """New channels from those of each group; depthwise, each channel goes on by itself."""
    weight_shape = op.tensor_shape(1)
    dim = len(op.shape) - (len(weight_shape) - 1)
    for labels in _others_along(op, dim):
        channels.fix(labels, "it lies along an image")
    inputs = _channels_along(channels, op, 0, dim)
    outputs, weight_inputs = _channels_of_weight(channels, op, 0, 1)
    groups = len(inputs) // weight_shape[1]
    if weight_shape[1] == 1 and groups > 1:
        channels.couple(inputs.repeat_interleave(len(outputs) // groups), outputs)
        channels.join(inputs, 0)
        channels.join(outputs, 1)
    else:
        inputs = inputs.view(groups, -1)
        weight = op.parameter(1)
        if weight is not None:
            channels.place(weight, {1: inputs})
        elif weight_inputs is not None:
            channels.couple(weight_inputs.expand_as(inputs), inputs)
        else:
            channels.fix(inputs, "the weight of its layer is computed")
        for group in range(groups):
            channels.join(inputs[group], 0, group)
            channels.join(outputs.view(groups, -1)[group], 1, group)
    _vector(channels, op, 2, outputs)
    return [_along(outputs, op.shape, dim)]


@product("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed_convolution(channels: Channels, op: Op) -> list[Tensor] | None:
    """New channels from all of them; a grouped one is not covered."""
    if op.integer(6, 1) != 1:
        return None
    dim = len(op.shape) - (len(op.tensor_shape(1)) - 1)
    for labels in _others_along(op, dim):
        channels.fix(labels, "it lies along an image")
    inputs = _channels_along(channels, op, 0, dim)
    outputs, weight_inputs = _channels_of_weight(channels, op, 1, 0)
    weight = op.parameter(1)
    if weight is not None:
        channels.place(weight, {0: inputs})
    elif weight_inputs is not None:
        channels.couple(weight_inputs, inputs)
    else:
        channels.fix(inputs, "the weight of its layer is computed")
    channels.join(inputs, 0)
    channels.join(outputs, 1)
    _vector(channels, op, 2, outputs)
    return [_along(outputs, op.shape, dim)]


@product("linear")
def linear(channels: Channels, op: Op) -> list[Tensor] | None:
    """New channels from all of them, in the last dimension; others go on."""
    shape = op.tensor_shape(0)
    if len(op.tensor_shape(1)) != 2:
        return None
    batch = string.ascii_lowercase[: len(shape) - 1]
    left, right = (op.all_labels(0), batch + "X"), (op.all_labels(1), "YX")
    found = _contract(channels, left, right, batch + "Y", op.shape)
    if op.is_tensor(2):
        return _add(channels, found, op.all_labels(2), op.shape)
    return found


@product("embedding")
def embedding(channels: Channels, op: Op) -> list[object] | None:
    """New channels, the columns of the table."""
    weight = op.parameter(0)
    if weight is None:
        return None
    for labels in op.all_labels(1):
        channels.fix(labels, "it is an index")
    columns = channels.output_channels(weight, dim=1)
    channels.place(weight, {1: columns})
    channels.join(columns)
    return [columns.expand(op.shape)]


@product("batch_norm", "instance_norm")
def batch_norm(channels: Channels, op: Op) -> list[object]:
    """Each channel by itself; scale, shift and running statistics move with it."""
    found: list[object] = []
    of_images = op.name == "instance_norm" or bool(op.argument(5))
    for labels in _others_along(op, 1):
        if of_images:  # the values of each channel, in any order
            _join_over(channels, labels, [dim for dim in range(labels.dim()) if dim != 1])
        found.append(labels)
    normalised = _channels_along(channels, op, 0, 1)
    channels.join(normalised)
    for index in (1, 2, 3, 4):
        _vector(channels, op, index, normalised)
    return [*found, _along(normalised, op.tensor_shape(0), 1)]


@product("group_norm")
def group_norm(channels: Channels, op: Op) -> list[object]:
    """Channels move within their group; scale and shift move with them."""
    for labels in _others_along(op, 1):
        channels.fix(labels, "it lies along an image")
    normalised = _channels_along(channels, op, 0, 1)
    for group, members in enumerate(normalised.view(op.integer(1, 1), -1)):
        channels.join(members, group)
    for index in (2, 3):
        _vector(channels, op, index, normalised)
    return [_along(normalised, op.tensor_shape(0), 1)]


@rule("layer_norm", "rms_norm")
def layer_norm(channels: Channels, op: Op) -> Tensor | None:
    """All channels together, in any order; scale and shift move with them."""
    labels, shape = op.tensor(0), op.integers(1)
    if shape is None:
        return None
    dims = list(range(labels.dim() - len(shape), labels.dim()))
    if any(varies(labels, dim) for dim in dims):
        labels = channels.reduce_to(labels, *dims).expand(labels.shape)
    channels.join(labels)
    for index in (2, 3):
        if op.is_tensor(index):
            labels = channels.couple(labels, op.tensor(index))
    return labels


@product("prelu")
def prelu(channels: Channels, op: Op) -> list[object]:
    """Each channel by itself, with a slope of its own or one for all."""
    others = _others_along(op, 1)
    for labels in others:
        channels.join(labels)
    inputs = _channels_along(channels, op, 0, 1)
    channels.join(inputs)
    if op.tensor_shape(1).numel() > 1:
        _vector(channels, op, 1, inputs)
    return [*others, _along(inputs, op.tensor_shape(0), 1)]


@rule("_weight_norm")
def weight_norm(channels: Channels, op: Op) -> Tensor:
    """A weight is scaled to a length for each index of one dimension."""
    labels, dim = op.tensor(0), op.integer(2, 0)
    _join_over(channels, labels, [other for other in range(labels.dim()) if other != dim])
    return channels.couple(labels, op.tensor(1))


_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@product(*_GATES)
def recurrent(channels: Channels, op: Op) -> list[object] | None:
    """Each layer has new channels, which its gates and its state share."""
    parameters = op.argument(2)
    states = op.argument(1)
    if not isinstance(parameters, Sequence):  # a packed sequence
        return None
    nodes = states if isinstance(states, Sequence) else [states]
    has_bias, layers, both_ways = op.argument(3), op.integer(4, 1), bool(op.argument(7))
    directions = 2 if both_ways else 1
    given = [node for node in parameters if isinstance(node, fx.Node)]
    weights = [op.parameters[node] for node in given if node in op.parameters]
    each = 4 if has_bias else 2
    if len(weights) != each * layers * directions or len(given) > len(weights):
        return None  # projected, or computed
    for labels in _others_along(op, -1):
        channels.fix(labels, "it lies along time")
    inputs = _channels_along(channels, op, 0, -1)
    from_zero = all(isinstance(n, fx.Node) and "zeros" in str(n.target) for n in nodes)
    hidden_of = []
    for layer in range(layers):
        outputs = []
        for direction in range(directions):
            number = layer * directions + direction
            w_ih, w_hh, *biases = weights[each * number : each * (number + 1)]
            hidden = channels.new(w_hh.shape[1])
            known = channels.placements.get(id(w_hh))
            if known is not None and 1 in known.axes:
                hidden = known.axes[1].flatten()
            gates = hidden.repeat(_GATES[op.name])
            channels.place(w_ih, {0: gates, 1: inputs})
            channels.place(w_hh, {0: gates, 1: hidden})
            for bias in biases:
                channels.place(bias, {0: gates})
            channels.join(inputs, 2 * number)
            channels.join(hidden, 2 * number + 1)
            if not from_zero:
                channels.fix(hidden, "its first state comes from outside")
            outputs.append(hidden)
        inputs = torch.cat(outputs)
        hidden_of += outputs
    state = torch.stack(hidden_of).unsqueeze(1)
    sequence, *last = op.node.meta["val"]
    return [[inputs.expand(sequence.shape), *(state.expand(value.shape) for value in last)]]


# --- products of activations ---


@product("scaled_dot_product_attention")
def attention(channels: Channels, op: Op) -> list[Tensor] | None:
    """Queries and keys are coupled, values go on; channels move within their head."""
    query, key, value = (op.all_labels(index) for index in range(3))
    repeats = op.tensor_shape(0)[-3] // op.tensor_shape(1)[-3] if len(op.shape) > 2 else 1
    if repeats > 1:  # fewer heads of keys than of queries
        key, value = (
            [compact(each.repeat_interleave(repeats, -3)) for each in labels]
            for labels in (key, value)
        )
    batch = string.ascii_lowercase[: len(op.shape) - 2]
    scores_shape = (*op.shape[:-1], op.tensor_shape(1)[-2])
    scores = _contract(
        channels, (query, batch + "QX"), (key, batch + "KX"), batch + "QK", scores_shape
    )
    if op.is_tensor(3):
        for labels in (*op.all_labels(3), *scores):
            channels.fix(labels, "it masks attention")
    for labels in scores:
        _join_over(channels, labels, [len(scores_shape) - 1])
    channels.next_operator()
    return _contract(
        channels, (scores, batch + "QK"), (value, batch + "KY"), batch + "QY", op.shape
    )


# PyTorch's product of experts, and that of Hugging Face where PyTorch's does not run.
_GROUPED = ("_grouped_mm", "grouped_mm_fallback")


@product("matmul", "mm", "bmm", "mv", "dot", "addmm", "baddbmm", *_GROUPED)
def matmul(channels: Channels, op: Op) -> list[Tensor] | None:
    """A matrix product, of batches or to which something is added."""
    first = 1 if op.name in ("addmm", "baddbmm") else 0
    shapes = op.tensor_shape(first), op.tensor_shape(first + 1)
    if op.name in _GROUPED:  # rows of one matrix, each times the matrix of its group
        if len(shapes[0]) != 2 or len(shapes[1]) != 3:
            return None
        left, right, output = "XY", "aYZ", "XZ"
        for labels in op.all_labels(2) if op.is_tensor(2) else []:
            channels.fix(labels, "it says which rows belong to a group")
    else:
        batch = string.ascii_lowercase[: max(len(shape) for shape in shapes)]
        of_left, of_right = (batch[len(batch) - max(len(shape) - 2, 0) :] for shape in shapes)
        row, column = "X" if len(shapes[0]) > 1 else "", "Z" if len(shapes[1]) > 1 else ""
        left, right = of_left + row + "Y", of_right + "Y" + column
        output = max(of_left, of_right, key=len) + row + column
    operands = (op.all_labels(first), left), (op.all_labels(first + 1), right)
    found = _contract(channels, *operands, output, op.shape)
    return _add(channels, found, op.all_labels(0), op.shape) if first else found


@product("einsum")
def einsum(channels: Channels, op: Op) -> list[Tensor] | None:
    """A product of two tensors, written with its output and without repeated letters."""
    inputs, arrow, output = op.text(0, "").replace(" ", "").partition("->")
    letters = inputs.split(",")
    repeated = any(len(set(part)) < len(part) for part in (*letters, output))
    if repeated or "." in inputs or not arrow or len(letters) != 2:
        return None
    left, right = zip(op.all_labels_of_list(1), letters, strict=True)
    return _contract(channels, left, right, output, op.shape)


Operand = tuple[list[Tensor], str]  # all labels, and a letter for each dimension


def _contract(
    channels: Channels, left: Operand, right: Operand, output: str, shape: Iterable[int]
) -> list[Tensor]:
    """Label a product that is summed over the letters that the output lacks.

    Channels along a letter that only one operand and the output have go on. Those along
    letters of both are coupled; if they are summed over, the output has them no more.
    """
    found: list[Tensor] = []
    shared: tuple[list[tuple[Tensor, set[str]]], ...] = [], []
    for side, (all_labels, letters), others in ((0, left, right[1]), (1, right, left[1])):
        for labels in all_labels:
            along = {letters[dim] for dim in channel_dims(labels)}
            if along & (set(output) - set(others)):
                kept = [letter for letter in output if letter in letters]
                result = channels.reduce_to(labels, *(letters.index(letter) for letter in kept))
                _join_each(channels, result, [letter in others for letter in kept], side)
                found.append(_in_output(result, kept, output, shape))
            elif along & set(others):
                shared[side].append((labels, along))
            elif along:
                channels.fix(labels, "it is summed in a product")
    both = [letter for letter in left[1] if letter in right[1]]
    for labels, along in shared[0]:
        partner = next((each for each in shared[1] if each[1] & along), None)
        if partner is None:
            channels.fix(labels, _why_it_stays(channels, right[0]))
            continue
        shared[1].remove(partner)
        ours = channels.reduce_to(labels, *(left[1].index(letter) for letter in both))
        theirs = channels.reduce_to(partner[0], *(right[1].index(letter) for letter in both))
        ours = channels.couple(ours, theirs)
        _join_each(channels, ours, [letter in output for letter in both], 2)
        summed = [dim for dim, letter in enumerate(both) if letter not in output]
        if not any(varies(ours, dim) for dim in summed):
            kept = [letter for letter in both if letter in output]
            ours = channels.reduce_to(ours, *(both.index(letter) for letter in kept))
            found.append(_in_output(ours, kept, output, shape))
    for labels, _ in shared[1]:
        channels.fix(labels, _why_it_stays(channels, left[0]))
    return found


def _why_it_stays(channels: Channels, others: list[Tensor]) -> str:
    """Return why channels stay that meet these operands, which have none along a dimension."""
    fixed = [labels for labels in others if channels.all_fixed(labels)]
    return channels.why_fixed(fixed[0]) if fixed else "it is multiplied by values that stay"


def _in_output(labels: Tensor, letters: list[str], output: str, shape: Iterable[int]) -> Tensor:
    """Return labels, whose dimensions are in the order of the output, in its shape."""
    for dim, letter in enumerate(output):
        if letter not in letters:
            labels = labels.unsqueeze(dim)
    return labels.expand(tuple(shape))


def _join_each(channels: Channels, labels: Tensor, is_batch: list[bool], operand: int) -> None:
    """Make channels members by their position in the batch dimensions: by head, for instance."""
    order = sorted(range(labels.dim()), key=lambda dim: not is_batch[dim])
    rows = math.prod(labels.shape[dim] for dim in range(labels.dim()) if is_batch[dim])
    for number, row in enumerate(labels.permute(order).reshape(rows, -1)):
        channels.join(row, operand, number)


# --- parts of rules ---


def _join_over(channels: Channels, labels: Tensor, dims: list[int]) -> Tensor | None:
    """Note that values are combined along some dimensions, in any order.

    Returns the labels, or None if channels lie along these dimensions. Then each row of
    them is a group of the operator.
    """
    over = [dim for dim in dims if varies(labels, dim)]
    if not over:
        channels.join(labels)
        return labels
    others = [dim for dim in range(labels.dim()) if varies(labels, dim) and dim not in over]
    rows = channels.reduce_to(labels, *others, *over)
    for number, row in enumerate(rows.reshape(math.prod(rows.shape[: len(others)]), -1)):
        channels.join(row, number)
    return None


def _channels_along(channels: Channels, op: Op, index: int, dim: int) -> Tensor:
    """Return the channels along one dimension of an operand, constants if there are none."""
    for labels in op.all_labels(index):
        if varies(labels, dim):
            return channels.reduce_to(labels, dim)
    first = op.all_labels(index)[0]
    if channels.all_fixed(first):
        return channels.reduce_to(first, dim)
    return channels.constant((first.shape[dim],), "its channels lie along another dimension")


def _others_along(op: Op, dim: int) -> list[Tensor]:
    """Return those labels of the first operand that differ, but not along one dimension."""
    return [labels for labels in op.all_labels(0) if _dims_of(labels) and not varies(labels, dim)]


def _channels_of_weight(
    channels: Channels, op: Op, out_dim: int, in_dim: int
) -> tuple[Tensor, Tensor | None]:
    """Return the output channels of a weight, and its input channels where it is computed."""
    weight = op.parameter(1)
    if weight is not None:
        outputs = channels.output_channels(weight, out_dim)
        channels.place(weight, {out_dim: outputs})
        return outputs, None
    outputs = channels.constant(op.tensor_shape(1)[out_dim : out_dim + 1], "its weight is computed")
    inputs = None
    for labels in op.all_labels(1):
        if varies(labels, out_dim):
            outputs = channels.reduce_to(labels, out_dim)
        elif varies(labels, in_dim):
            inputs = channels.reduce_to(labels, in_dim)
        else:
            channels.fix(labels, "it lies along a kernel")
    return outputs, inputs


def _add(
    channels: Channels, found: list[Tensor], others: list[Tensor], shape: Iterable[int]
) -> list[Tensor]:
    """Label a sum, of labels in its shape and all labels of what is added."""
    added = others[0].shape if others else ()
    sums = []
    for labels in found:
        along = _dims_of(labels)
        partner = next((other for other in others if _dims_of(other) & along), None)
        if partner is None:
            partner = channels.constant(added, "it is added")
        sums.append(channels.couple(labels, partner).expand(tuple(shape)))
        others = [other for other in others if other is not partner]
    for other in others:
        channels.fix(other, "it is added to values that stay")
    return sums


def _vector(channels: Channels, op: Op, index: int, along: Tensor) -> None:
    """Let an argument with a value for each channel, a bias for instance, move with them."""
    vector = op.parameter(index)
    if vector is not None:
        channels.place(vector, {0: along})
    elif op.is_tensor(index):
        channels.couple(op.tensor(index), along)


def _along(labels: Tensor, shape: Iterable[int], dim: int) -> Tensor:
    """Return labels along one dimension of a shape, repeated along the others."""
    shape = tuple(shape)
    return labels.view(*[1] * dim, -1, *[1] * (len(shape) - dim - 1)).expand(shape)
