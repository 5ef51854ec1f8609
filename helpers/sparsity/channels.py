"""Channels that may change places: the constraints on them, and moving them.

Explained in `02b_better_pruning.ipynb`. These are the terms:

channel
    One output channel of one layer, or one position along a dimension of a parameter that
    is used as a tensor. Channels are numbered throughout the model.
labels
    A tensor of the shape of an activation, which holds the channel of each element. A
    weight that is computed has two: one along its output channels, one along its inputs.
coupling
    Two channels that must move together: the operands of a residual addition, a channel
    and its scale in a batch norm.
coupled group
    Channels that are coupled to each other, directly or through others. They are ranked
    by their numbers.
membership
    A channel takes part in an operator as a certain operand, and within it in a certain
    group of a grouped convolution or head of an attention layer.
fixed
    A channel that must stay where it is: an input or an output of the model, and
    whatever passes through an operator that has no rule.
interchangeable set
    Coupled groups that may change places with each other: rank by rank, their channels
    have the same memberships and the same couplings. So each group of a grouped
    convolution has an interchangeable set of its own.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from helpers.parameters import no_grad_for

Numbers = NDArray[np.int64]

# A search moves whole groups of four, so along a shorter dimension nothing can be gained.
_FEWEST = 8

# What a signature counts: the first number of a key, so that keys of two kinds differ.
_MEMBERSHIP, _LEFT, _RIGHT = range(3)


@dataclass(eq=False)
class Placement:
    """Which channels lie along the dimensions of one parameter or buffer.

    `axes` maps a dimension to its channels: (size,), or (groups, size) for the input
    channels of a grouped convolution, where each group of output channels has its own.
    """

    tensor: Tensor
    axes: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ChannelGroups:
    """Which channels of a model may change places.

    Attributes:
        placements: where the channels lie, by the `id` of the parameter or buffer.
        coupled_group: (channels,) the number of each channel's coupled group.
        rank: (channels,) the channel's position in its coupled group.
        interchangeable_set: (channels,) the number of the set that each channel's coupled
            group is in, -1 where it must stay. All groups of a set are of the same size.
        reasons: why a coupled group must stay, by its number.
    """

    placements: dict[int, Placement]
    coupled_group: Numbers
    rank: Numbers
    interchangeable_set: Numbers
    reasons: dict[int, str]

    def inputs_of(self, weight: Tensor, dim: int = 1) -> Numbers | None:
        """Return the input channels of a weight, (groups, channels); None if unknown.

        Args:
            weight: a parameter of the model.
            dim: the dimension of its input channels.
        """
        placement = self.placements.get(id(weight))
        if placement is None or dim not in placement.axes:
            return None
        return np.atleast_2d(placement.axes[dim].numpy())

    def why_fixed(self, channel: int) -> str:
        """Return why a channel must stay; empty if it may move."""
        return self.reasons.get(int(self.coupled_group[channel]), "")


# --- moving channels ---


def gather_index(groups: ChannelGroups, moves: Iterable[tuple[Numbers, Numbers]]) -> Numbers:
    """Return for each channel the channel whose weights it gets.

    Args:
        groups: of the model.
        moves: pairs (to, origin) of coupled groups, equally long; in each pair `origin` is
            a permutation of `to`, and all are of one interchangeable set.
    """
    replaced = np.arange(int(groups.coupled_group.max(initial=-1)) + 1)
    for to, origin in moves:
        replaced[to] = origin
    order = np.lexsort((groups.rank, groups.coupled_group))
    start = np.searchsorted(groups.coupled_group[order], np.arange(len(replaced)))
    return order[start[replaced[groups.coupled_group]] + groups.rank]


def reorder_(groups: ChannelGroups, index: Numbers) -> None:
    """Move the channels of a model, in place: `channel` gets what `index[channel]` had.

    Args:
        groups: of the model.
        index: (channels,), from `gather_index`.
    """
    moved = index != np.arange(len(index))
    with no_grad_for([placement.tensor for placement in groups.placements.values()]):
        for placement in groups.placements.values():
            tensor = placement.tensor
            for dim, channels in placement.axes.items():
                by_group = np.atleast_2d(channels.numpy())
                parts = tensor.chunk(len(by_group))
                for part, along in zip(parts, by_group, strict=True):
                    _reorder_axis_(part, dim, along, index, moved)


def _reorder_axis_(
    tensor: Tensor, dim: int, channels: Numbers, index: Numbers, moved: NDArray[np.bool_]
) -> None:
    if moved[channels].any():
        positions = torch.from_numpy(gather_positions(channels, index)).to(tensor.device)
        tensor.copy_(tensor.index_select(dim, positions))


def gather_positions(channels: Numbers, index: Numbers) -> Numbers:
    """Return which positions to read from along a dimension that these channels lie along.

    A channel may occur several times, once for each pixel of a flattened image for
    instance: its first occurrence is read from the first of the other channel, and so on.

    Args:
        channels: (size,) along the dimension.
        index: from `gather_index`.
    """
    by_channel = np.argsort(channels, kind="stable")
    ordered = channels[by_channel]
    occurrence = np.arange(len(channels)) - np.searchsorted(ordered, ordered)
    positions = np.empty_like(by_channel)
    positions[by_channel] = by_channel[np.searchsorted(ordered, index[ordered]) + occurrence]
    return positions


# --- collecting constraints ---


class Channels:
    """Numbers the channels of a model, collects the constraints on them and solves these."""

    def __init__(self) -> None:
        self.placements: dict[int, Placement] = {}
        self._count = 0
        self._operator = 0
        self._couplings: list[tuple[int, Numbers, Numbers]] = []
        self._memberships: list[tuple[tuple[int, ...], Numbers]] = []
        self._fixed: list[tuple[Numbers, str]] = []
        self._why_fixed: dict[int, str] = {}

    def next_operator(self) -> None:
        """Count an operator: what follows is a constraint of this one."""
        self._operator += 1

    def new(self, *shape: int) -> Tensor:
        """Return labels of this shape, each a new channel."""
        labels = torch.arange(self._count, self._count + math.prod(shape)).view(shape)
        self._count += labels.numel()
        return labels

    def constant(self, shape: Iterable[int], reason: str) -> Tensor:
        """Return labels of one fixed channel, for values that do not move."""
        channel = self.new(1)
        self.fix(channel, reason)
        shape = tuple(shape)
        return channel.view((1,) * len(shape)).expand(shape)

    def fix(self, labels: Tensor, reason: str) -> None:
        """Make channels stay where they are."""
        channels = np.unique(_without_repeats(labels).numpy())
        self._fixed.append((channels, reason))
        for channel in channels.tolist():
            self._why_fixed.setdefault(channel, reason)

    def all_fixed(self, labels: Tensor) -> bool:
        """Return whether every channel is fixed by itself, couplings left aside."""
        channels = np.unique(_without_repeats(labels).numpy()).tolist()
        return all(channel in self._why_fixed for channel in channels)

    def why_fixed(self, labels: Tensor) -> str:
        """Return why the first of some channels that are all fixed must stay."""
        return self._why_fixed[int(labels.flatten()[0])]

    def join(self, labels: Tensor, *part: int) -> None:
        """Make channels members of the operator, as this operand and in this group of it."""
        channels = _without_repeats(labels).flatten().numpy()
        self._memberships.append(((self._operator, *part), channels))

    def couple(self, left: Tensor, right: Tensor) -> Tensor:
        """Couple the channels at each position; return the labels of the elementwise result.

        Where broadcasting brings one value together with several channels, the value has
        to be the same for each of them: its channel is fixed, and the result moves as the
        other operand does. If the values also differ along another dimension of these
        channels, the channels that meet one value have to move together.
        """
        dims = max(left.dim(), right.dim())
        left, right = (side.view((1,) * (dims - side.dim()) + side.shape) for side in (left, right))
        spread_left, spread_right = _spread_dims(left, right), _spread_dims(right, left)
        if spread_left or spread_right:
            result = torch.broadcast_tensors(left, right)[1 if spread_left else 0]
            if spread_left:
                self._couple_spread(left, right, spread_left)
            if spread_right:
                self._couple_spread(right, left, spread_right)
            return result
        left, right = torch.broadcast_tensors(left, right)
        for one, other in ((left, right), (right, left)):
            if one.numel() and self.all_fixed(one):
                self.fix(other, self.why_fixed(one))
                return one
        result = left
        for dim in range(dims):
            if left.stride(dim) == right.stride(dim) == 0:
                left, right = left.narrow(dim, 0, 1), right.narrow(dim, 0, 1)
        differ = left != right
        # Each pair as one number, which `unique` sorts five times faster than rows of two.
        pairs = (left[differ] * self._count + right[differ]).unique().numpy()
        if pairs.size:
            self._couplings.append((self._operator, *np.divmod(pairs, self._count)))
        return result

    def _couple_spread(self, one: Tensor, several: Tensor, dims: list[int]) -> None:
        """Couple values with the channels that each of them meets along some dimensions."""
        differ = [d for d in range(one.dim()) if one.shape[d] > 1 and varies(several, d)]
        if not differ:
            self.fix(one, "it meets several channels at once")
            return
        if self.all_fixed(one):  # constants, of each head for instance: channels of one may move
            rows = self.reduce_to(several, *differ, *dims)
            count = math.prod(one.shape[dim] for dim in differ)
            for number, row in enumerate(rows.reshape(count, -1)):
                self.join(row, -1, number)
            return
        for dim in dims:
            first = several.narrow(dim, 0, 1)
            self.couple(first.expand_as(several), several)
            several = first
        self.couple(one, several)

    def reduce_to(self, labels: Tensor, *dims: int) -> Tensor:
        """Return the channels along some dimensions, which must be the same along the others.

        Where they are not the same, they are coupled.
        """
        kept = [dim % labels.dim() for dim in dims]
        others = [dim for dim in range(labels.dim()) if dim not in kept]
        for dim in others:
            first = labels.narrow(dim, 0, 1)
            if varies(labels, dim):
                self.couple(first.expand_as(labels), labels)
            labels = first
        return labels.permute(*kept, *others).reshape([labels.shape[dim] for dim in kept])

    # --- parameters and buffers ---

    def place(self, tensor: Tensor, axes: dict[int, Tensor]) -> None:
        """Note which channels lie along the dimensions of a parameter.

        If the parameter was placed before, the channels are coupled to those of that use.
        """
        placement = self.placements.setdefault(id(tensor), Placement(tensor))
        for dim, along in axes.items():
            channels = along[0] if along.dim() == 2 and len(along) == 1 else along
            known = placement.axes.setdefault(dim, channels)
            if known.shape == channels.shape:
                self.couple(known, channels)
            else:
                self.fix(known, "a weight is used with different groups")
                self.fix(channels, "a weight is used with different groups")

    def output_channels(self, weight: Tensor, dim: int = 0) -> Tensor:
        """Return the output channels of a weight, new ones at its first use."""
        placement = self.placements.get(id(weight))
        if placement is not None and dim in placement.axes:
            return placement.axes[dim].flatten()
        return self.new(weight.shape[dim])

    def of_parameter(self, tensor: Tensor) -> list[Tensor]:
        """Return the labels of a parameter that is used as a tensor like any other.

        There are labels along each dimension, as if the others had no channels. New channels
        are members of operator 0, which stands for the parameter and counts before all others.
        """
        placement = self.placements.setdefault(id(tensor), Placement(tensor))
        labels = []
        for dim, size in enumerate(tensor.shape):
            if dim not in placement.axes:
                if size < _FEWEST:
                    continue
                placement.axes[dim] = self.new(size)
                members = placement.axes[dim].numpy()
                self._memberships.append(((0, len(self.placements), dim), members))
            channels = placement.axes[dim]
            if channels.dim() == 2:
                self.fix(channels, "a weight is used with different groups")
            else:
                shape = [1] * tensor.dim()
                shape[dim] = size
                labels.append(channels.view(shape).expand(tensor.shape))
        return labels or [self.constant(tensor.shape, "it has fewer than eight channels")]

    # --- from constraints to sets ---

    def solve(self) -> ChannelGroups:
        """Return the coupled groups and the interchangeable sets that the constraints leave."""
        group = _components(self._count, [(left, right) for _, left, right in self._couplings])
        order = np.argsort(group, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(self._count) - np.searchsorted(group[order], group[order])
        reasons: dict[int, str] = {}
        for channels, reason in self._fixed:
            for number in np.unique(group[channels]).tolist():
                reasons.setdefault(number, reason)

        # Channels with equal signatures have the same memberships and couplings; groups with
        # equal ones have, rank by rank, channels with equal signatures.
        of_channel = np.zeros(self._count, np.uint64)
        for part, channels in self._memberships:
            np.add.at(of_channel, channels, _mix(hash((_MEMBERSHIP, *part))))
        for number, left, right in self._couplings:
            np.add.at(of_channel, left, _mix(hash((_LEFT, number)) + rank[right]))
            np.add.at(of_channel, right, _mix(hash((_RIGHT, number)) + rank[left]))
        of_group = np.zeros(int(group.max(initial=-1)) + 1, np.uint64)
        np.add.at(of_group, group, _mix(of_channel + _mix(rank)))
        sets = np.unique(of_group, return_inverse=True)[1][group]
        sets[np.isin(group, list(reasons))] = -1
        return ChannelGroups(self.placements, group, rank, sets, reasons)


def varies(labels: Tensor, dim: int) -> bool:
    """Return whether labels differ along a dimension."""
    if labels.shape[dim] <= 1 or labels.stride(dim) == 0:
        return False
    labels = _without_repeats(labels)
    return bool((labels != labels.narrow(dim, 0, 1)).any())


def channel_dims(labels: Tensor) -> list[int]:
    """Return the dimensions that channels lie along: those along which most labels differ.

    They are two for channels by head. A class token before the other tokens has channels of its
    own, but channels do not lie along tokens for that.
    """
    dims = [dim for dim in range(labels.dim()) if varies(labels, dim)]
    if len(dims) < 2:
        return dims
    once = _without_repeats(labels)
    steps = [once.sort(dim).values.diff(dim=dim) != 0 for dim in dims]
    shares = [
        (1 + int(step.sum(dim).max())) / once.shape[dim]
        for dim, step in zip(dims, steps, strict=True)
    ]
    return [dim for dim, share in zip(dims, shares, strict=True) if share == max(shares)]


def compact(labels: Tensor) -> Tensor:
    """Return the same labels, stored once along each dimension along which they do not differ."""
    shape = labels.shape
    for dim in range(labels.dim()):
        if not varies(labels, dim):
            labels = labels.narrow(dim, 0, min(1, labels.shape[dim]))
    return labels.expand(shape)


def _without_repeats(labels: Tensor) -> Tensor:
    """Return labels with expanded dimensions narrowed to one element."""
    for dim, stride in enumerate(labels.stride()):
        if stride == 0 and labels.shape[dim] > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def _spread_dims(one: Tensor, other: Tensor) -> list[int]:
    """Return the dimensions along which broadcasting brings a channel of one to several others."""
    return [
        dim
        for dim in range(one.dim())
        if one.shape[dim] == 1 and other.shape[dim] > 1 and varies(other, dim)
    ]


def _components(count: int, edges: list[tuple[Numbers, Numbers]]) -> Numbers:
    """Return the number of each node's connected component.

    Over whole arrays, which is 20 times faster than `networkx.utils.UnionFind` edge by edge.
    """
    root = np.arange(count)
    if edges:
        left = np.concatenate([edge[0] for edge in edges])
        right = np.concatenate([edge[1] for edge in edges])
        while True:
            lowest = np.minimum(root[left], root[right])
            before = root.copy()
            np.minimum.at(root, root[left], lowest)
            np.minimum.at(root, root[right], lowest)
            root = root[root]
            if np.array_equal(root, before):
                break
    return np.unique(root, return_inverse=True)[1]


def _mix(value: int | NDArray) -> NDArray[np.uint64]:
    """Spread integers over 64 bits, so that sums of them identify sets (splitmix64)."""
    with np.errstate(over="ignore"):
        bits = np.asarray(value).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return bits ^ (bits >> np.uint64(31))
