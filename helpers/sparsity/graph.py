"""Which channels of a network may change places without changing what it computes.

Every channel that a layer makes is an *atom*. The network is exported to its graph
of ATen operators, and beside each tensor goes a tensor of labels, of the same shape,
that says which atom each element belongs to. An operator that only moves elements
(view, transpose, concatenate, ...) is run on the labels as it is on the values, so a
channel shuffle or a split needs no rule of its own. What computes leaves constraints:

    bond        these two atoms move together (a residual addition, a batch norm's scale)
    membership  this atom takes part in that operator, in that group of it
    fixed       this atom stays where it is (the network's input and output, and whatever
                an operator without a rule touches)

Bonded atoms form a *neuron*. Two neurons may change places if their atoms have the
same memberships; neurons that may all change places with each other are a *cell*.
So a grouped convolution gets one cell for each group by itself, and what no rule
covers stays where it is. Explained in `02_prune_2_4.ipynb`.
"""

import logging
import math
import operator
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx, nn

from helpers.errors import InputError
from helpers.layers import in_mode

# A larger tensor used otherwise than as a layer's weight stays where it is.
_MOST_ELEMENTS = 1_000_000


@dataclass(eq=False)
class Placement:
    """Which atoms lie along the dimensions of one parameter or buffer.

    `axes` maps a dimension to its atoms: (size,), or (groups, size) for the input
    channels of a grouped convolution, where each group of rows has its own. A tensor
    that is added or multiplied as it is has `elements` instead: an atom each.
    """

    tensor: Tensor
    axes: dict[int, Tensor] = field(default_factory=dict)
    elements: Tensor | None = None


@dataclass(frozen=True)
class Symmetry:
    """What `find_symmetry` found: `cell[atom]` is -1 where an atom must stay.

    `neuron` and `rank` say which neuron an atom belongs to and as which of its
    atoms; all neurons of a cell have as many. `reasons` says why a neuron stays.
    """

    placements: dict[int, Placement]
    neuron: np.ndarray
    rank: np.ndarray
    cell: np.ndarray
    reasons: dict[int, str]

    def inputs_of(self, weight: Tensor, dim: int = 1) -> np.ndarray | None:
        """Return the atoms of a weight's input channels, (groups, channels); None if unknown.

        Args:
            weight: a parameter of the network.
            dim: where its input channels are.
        """
        placement = self.placements.get(id(weight))
        if placement is None or dim not in placement.axes:
            return None
        return np.atleast_2d(placement.axes[dim].numpy())

    def why_fixed(self, atom: int) -> str:
        """Return why an atom must stay; empty if it may move."""
        return self.reasons.get(int(self.neuron[atom]), "")


def find_symmetry(model: nn.Module, example: tuple[Tensor, ...]) -> Symmetry:
    """Return which channels of a network may change places.

    Args:
        model: a network that `torch.export` can trace; it is traced in evaluation mode,
            and if that leaves parameters unused in training mode too.
        example: its positional inputs, batch first.

    Raises:
        InputError: the network cannot be traced.
    """
    labels = _Labels(model)
    labels.walk(_trace(model, example, training=False))
    if labels.unseen():  # auxiliary heads, for instance, whose inputs are channels too
        pairs = tuple(torch.cat([value, value]) for value in example)  # one has no variance
        labels.walk(_trace(model, pairs, training=True))
    return labels.symmetry()


def _trace(
    model: nn.Module, example: tuple[Tensor, ...], training: bool
) -> torch.export.ExportedProgram:
    """Return the graph of a network in one of its two modes; the network keeps its own."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)  # what fails is said once, by the error below
    try:
        with warnings.catch_warnings(), torch.no_grad(), in_mode(model, training):
            warnings.simplefilter("ignore")
            return torch.export.export(model, example)
    except Exception as error:  # torch.export raises classes without a common base
        mode = "training" if training else "evaluation"
        line = next((line for line in str(error).splitlines() if line.strip()), "")
        raise InputError(
            f"{type(model).__name__} cannot be traced in {mode} mode by torch.export "
            f"({type(error).__name__}: {line[:200]}), so its channels stay where they are."
        ) from error
    finally:
        logging.disable(disabled)


def reorder_(symmetry: Symmetry, source: np.ndarray) -> None:
    """Move the channels of a network, in place: atom `a` gets what atom `source[a]` had.

    Args:
        symmetry: of the network.
        source: (atoms,); as `source_of` returns it.
    """
    moved = source != np.arange(len(source))
    with torch.no_grad():
        for placement in symmetry.placements.values():
            tensor = placement.tensor
            if placement.elements is not None:
                flat = tensor.flatten()
                _reorder_axis_(flat, 0, placement.elements.flatten().numpy(), source, moved)
                tensor.copy_(flat.view_as(tensor))
            for dim, atoms in placement.axes.items():
                groups = np.atleast_2d(atoms.numpy())
                for part, line in zip(tensor.chunk(len(groups)), groups, strict=True):
                    _reorder_axis_(part, dim, line, source, moved)


def _reorder_axis_(
    tensor: Tensor, dim: int, atoms: np.ndarray, source: np.ndarray, moved: np.ndarray
) -> None:
    if moved[atoms].any():
        order = torch.from_numpy(gather_order(atoms, source)).to(tensor.device)
        tensor.copy_(tensor.index_select(dim, order))


def gather_order(atoms: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Return the positions to read from where these atoms lie along a dimension.

    An atom may stand at several positions, one for each pixel of a flattened image
    for instance: its first goes to the first of the other, and so on.
    """
    by_atom = np.argsort(atoms, kind="stable")
    ordered = atoms[by_atom]
    occurrence = np.arange(len(atoms)) - np.searchsorted(ordered, ordered)
    order = np.empty_like(by_atom)
    order[by_atom] = by_atom[np.searchsorted(ordered, source[ordered]) + occurrence]
    return order


def source_of(symmetry: Symmetry, moves: Iterable[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Return for each atom the one whose weights it gets.

    Args:
        symmetry: of the network.
        moves: pairs of neurons (to, from) of equal length, each a permutation within a cell.
    """
    replaced = np.arange(int(symmetry.neuron.max(initial=-1)) + 1)
    for to, origin in moves:
        replaced[to] = origin
    order = np.lexsort((symmetry.rank, symmetry.neuron))
    start = np.searchsorted(symmetry.neuron[order], np.arange(len(replaced)))
    return order[start[replaced[symmetry.neuron]] + symmetry.rank]


class _Labels:
    """Walks the graph once, labels every tensor and collects the constraints."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        self.bonds: list[tuple[int, np.ndarray, np.ndarray]] = []
        self.members: list[tuple[tuple[int, ...], np.ndarray]] = []
        self.fixed: list[tuple[np.ndarray, str]] = []
        self.is_fixed: set[int] = set()
        self.placements: dict[int, Placement] = {}
        self.labels: dict[fx.Node, object] = {}
        self.operator = 0  # the running number of the node at hand
        self.tensors = dict(model.named_parameters(remove_duplicate=False))
        self.tensors |= dict(model.named_buffers(remove_duplicate=False))
        self.stored: dict[str, Tensor] = {}  # by the name of the node that stands for it

    def walk(self, program: torch.export.ExportedProgram) -> None:
        """Label every tensor of a graph; of a second one, over the same parameters."""
        names = dict(program.graph_signature.inputs_to_parameters)
        names |= program.graph_signature.inputs_to_buffers
        self.stored = {node: self.tensors[name] for node, name in names.items()}
        for node in program.graph.nodes:
            self.operator += 1
            self._visit(node)

    def unseen(self) -> list[str]:
        """Return the parameters that no graph has used so far."""
        return [
            name
            for name, tensor in self.tensors.items()
            if isinstance(tensor, nn.Parameter) and id(tensor) not in self.placements
        ]

    # --- atoms and constraints ---

    def fresh(self, *shape: int) -> Tensor:
        """Return new atoms."""
        atoms = torch.arange(self.count, self.count + math.prod(shape)).view(shape)
        self.count += atoms.numel()
        return atoms

    def still(self, shape: Iterable[int], reason: str) -> Tensor:
        """Return labels for values that never move, whatever changes places elsewhere."""
        atom = self.fresh(1)
        self.fix(atom, reason)
        return atom.view((1,) * len(tuple(shape))).expand(tuple(shape))

    def fix(self, labels: Tensor, reason: str) -> None:
        """Let atoms stay where they are."""
        atoms = np.unique(_compact(labels).numpy())
        self.fixed.append((atoms, reason))
        self.is_fixed.update(atoms.tolist())

    def all_fixed(self, labels: Tensor) -> bool:
        """Return whether every atom is known to stay."""
        return self.is_fixed.issuperset(np.unique(_compact(labels).numpy()).tolist())

    def join(self, labels: Tensor, *part: int) -> None:
        """Note that atoms take part in this operator: in which operand, in which group."""
        self.members.append(((self.operator, *part), _compact(labels).flatten().numpy()))

    def bond(self, left: Tensor, right: Tensor) -> Tensor:
        """Let atoms at the same position move together; return the labels of the result.

        A value that meets several channels at once has to be the same for each of
        them, and stays; the result then moves as the channels do.
        """
        dims = max(left.dim(), right.dim())
        left, right = (side.view((1,) * (dims - side.dim()) + side.shape) for side in (left, right))
        spread = [_meets_several(left, right), _meets_several(right, left)]
        for side, is_spread in zip((left, right), spread, strict=True):
            if is_spread:
                self.fix(side, "it meets several channels at once")
        left, right = torch.broadcast_tensors(left, right)
        if any(spread):
            return right if spread[0] else left
        result = left
        for dim in range(dims):
            if left.stride(dim) == right.stride(dim) == 0:
                left, right = left.narrow(dim, 0, 1), right.narrow(dim, 0, 1)
        pairs = torch.stack([left.flatten(), right.flatten()])
        pairs = pairs[:, pairs[0] != pairs[1]].unique(dim=1).numpy()
        if pairs.size:
            self.bonds.append((self.operator, pairs[0], pairs[1]))
        return result

    def settle(self, labels: Tensor, *keep: int) -> Tensor:
        """Return the atoms along some dimensions, the same at all places of the others.

        Where they are not the same, they are bonded.
        """
        keep = tuple(dim % labels.dim() for dim in keep)
        for dim in set(range(labels.dim())) - set(keep):
            first = labels.narrow(dim, 0, 1)
            if _varies(labels, dim):
                self.bond(first.expand_as(labels), labels)
            labels = first
        return labels.permute(*keep, *sorted(set(range(labels.dim())) - set(keep))).reshape(
            [labels.shape[dim] for dim in keep]
        )

    # --- parameters and buffers ---

    def place(self, tensor: Tensor, axes: dict[int, Tensor]) -> None:
        """Say which atoms lie along the dimensions of a parameter; a second time, bond them."""
        placement = self.placements.setdefault(id(tensor), Placement(tensor))
        if placement.elements is not None:
            self.fix(placement.elements, "a parameter is used in two ways")
            for atoms in axes.values():
                self.fix(atoms, "a parameter is used in two ways")
        for dim, atoms in axes.items():
            known = placement.axes.setdefault(dim, atoms)
            if known.shape == atoms.shape:
                self.bond(known, atoms)
            else:
                self.fix(known, "a weight is used with different groups")
                self.fix(atoms, "a weight is used with different groups")

    def rows(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """Return the atoms of a weight's output channels, new ones at its first use."""
        placement = self.placements.get(id(tensor))
        if placement is not None and dim in placement.axes:
            return placement.axes[dim]
        return self.fresh(tensor.shape[dim])

    def elements(self, tensor: Tensor) -> Tensor:
        """Return labels for a parameter that is used as a tensor like any other."""
        placement = self.placements.setdefault(id(tensor), Placement(tensor))
        if tensor.dim() == 1 and 0 in placement.axes:
            return placement.axes[0]
        if placement.elements is None:
            if placement.axes or tensor.numel() > _MOST_ELEMENTS:
                reason = "its weight is used outside of a layer"
                for atoms in placement.axes.values():
                    self.fix(atoms, reason)
                placement.elements = self.still(tensor.shape, reason)
            else:
                placement.elements = self.fresh(*tensor.shape)
                atoms = placement.elements.flatten().numpy()
                self.members.append(((-1, len(self.placements)), atoms))
        return placement.elements

    # --- the walk ---

    def _visit(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            if node.name not in self.stored and _is_tensor(node):
                self.labels[node] = self.still(node.meta["val"].shape, "it comes from outside")
        elif node.op == "output":
            for source in node.all_input_nodes:
                for labels in self._tensors(source):
                    self.fix(labels, "it leaves the network")
        elif node.op == "call_function":
            self.labels[node] = self._call(node)

    def _call(self, node: fx.Node) -> object:
        if node.target is operator.getitem:
            return self.labels[node.args[0]][node.args[1]]
        name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
        rule = _RULES.get(name)
        if rule is None and torch.Tag.pointwise in getattr(node.target, "tags", ()):
            rule = _Labels._pointwise
        labels = rule(self, node) if rule else None
        return self._unknown(node) if labels is None else labels

    def _unknown(self, node: fx.Node) -> object:
        """Fix all that goes into an operator without a rule."""
        for source in node.all_input_nodes:
            for labels in self._tensors(source):
                self.fix(labels, f"it goes through {node.target}")
        return fx.node.map_aggregate(
            node.meta.get("val"),
            lambda value: (
                self.still(value.shape, f"it comes from {node.target}")
                if isinstance(value, Tensor)
                else value
            ),
        )

    def _tensors(self, node: fx.Node) -> list[Tensor]:
        """Return the labels of a node, which may stand for several tensors."""
        if node.name in self.stored:
            return [self.elements(self.stored[node.name])]
        found = self.labels.get(node)
        items = found if isinstance(found, list | tuple) else [found]
        return [item for item in items if isinstance(item, Tensor)]

    def _of(self, value: object) -> object:
        """Return an operator's argument with labels in the place of tensors."""
        return fx.node.map_arg(value, lambda node: self._tensors(node)[0])

    def _stored(self, node: fx.Node, index: int) -> Tensor | None:
        """Return the parameter or buffer that is an operator's argument, if it is one."""
        argument = _argument(node, index)
        return self.stored.get(argument.name) if isinstance(argument, fx.Node) else None

    # --- rules ---

    def _same(self, node: fx.Node) -> Tensor:
        return self._tensors(node.args[0])[0]

    def _reshape(self, node: fx.Node) -> Tensor:
        return self._tensors(node.args[0])[0].reshape(node.meta["val"].shape)

    def _expand(self, node: fx.Node) -> Tensor:
        return self._tensors(node.args[0])[0].expand(node.meta["val"].shape)

    def _move(self, node: fx.Node) -> object:
        return node.target(*self._of(node.args), **node.kwargs)

    def _constant(self, node: fx.Node) -> Tensor:
        return self.still(node.meta["val"].shape, f"it comes from {node.target}")

    def _pointwise(self, node: fx.Node) -> Tensor:
        result, *others = (self._tensors(source)[0] for source in node.all_input_nodes)
        self.join(result, 0)
        for slot, labels in enumerate(others, start=1):
            self.join(labels, slot)
            result = self.bond(result, labels)
        return result.expand(node.meta["val"].shape)

    def _spatial(self, node: fx.Node) -> object:
        labels = self._tensors(node.args[0])[0]
        outputs = node.meta["val"]
        dims = int(node.target.__name__.split(".")[0][-2])  # ..._pool2d
        kept = self.settle(labels, *range(labels.dim() - dims))
        self.join(kept)

        def spread(value: Tensor) -> Tensor:
            return kept.view(*kept.shape, *(1,) * dims).expand(value.shape)

        return fx.node.map_aggregate(outputs, spread)

    def _reduce(self, node: fx.Node) -> Tensor | None:
        labels = self._tensors(node.args[0])[0]
        dims = node.args[1] if len(node.args) > 1 else None
        if not isinstance(dims, list | tuple):
            return None
        reduced = {dim % labels.dim() for dim in dims}
        kept = [dim for dim in range(labels.dim()) if dim not in reduced]
        if any(_varies(labels, dim) for dim in reduced) and not any(
            _varies(labels, dim) for dim in kept
        ):
            # Over the channels themselves: any order gives the same.
            self.join(self.settle(labels, *sorted(reduced)))
            return self.still(node.meta["val"].shape, "it is a mean over channels")
        self.join(settled := self.settle(labels, *kept))
        return settled.reshape(node.meta["val"].shape)

    def _pad(self, node: fx.Node) -> Tensor | None:
        labels, pads = self._tensors(node.args[0])[0], node.args[1]
        padded = {labels.dim() - 1 - i // 2 for i, width in enumerate(pads) if width}
        mode = _argument(node, 2, "constant")
        if any(_varies(labels, dim) for dim in padded):
            if mode != "constant":
                return None
            border = self.still((), "it is padded along the channels")
            return torch.nn.functional.pad(labels, pads, value=int(border))
        for dim in padded:
            labels = labels.narrow(dim, 0, 1)
        return labels.expand(node.meta["val"].shape)

    def _convolution(self, node: fx.Node) -> Tensor | None:
        weight = self._stored(node, 1)
        if weight is None:
            return None
        labels = self._tensors(node.args[0])[0]
        channel = labels.dim() - (weight.dim() - 1)
        inputs, rows = self.settle(labels, channel), self.rows(weight)
        groups = len(inputs) // weight.shape[1]
        if weight.shape[1] == 1 and groups > 1:  # depthwise: each channel goes on by itself
            self.place(weight, {0: rows})
            self.bond(inputs.repeat_interleave(len(rows) // groups), rows)
            self.join(inputs, 0)
            self.join(rows, 1)
        else:
            inputs = inputs.view(groups, -1)
            self.place(weight, {0: rows, 1: inputs})
            for group in range(groups):
                self.join(inputs[group], 0, group)
                self.join(rows.view(groups, -1)[group], 1, group)
        self._vector(node, 2, rows)
        return self._along(rows, node.meta["val"].shape, channel)

    def _transposed(self, node: fx.Node) -> Tensor | None:
        weight = self._stored(node, 1)
        labels = self._tensors(node.args[0])[0]
        if weight is None or _argument(node, 6, 1) != 1:
            return None
        channel = labels.dim() - (weight.dim() - 1)
        inputs, rows = self.settle(labels, channel), self.rows(weight, dim=1)
        self.place(weight, {0: inputs, 1: rows})
        self.join(inputs, 0)
        self.join(rows, 1)
        self._vector(node, 2, rows)
        return self._along(rows, node.meta["val"].shape, channel)

    def _linear(self, node: fx.Node) -> Tensor | None:
        weight = self._stored(node, 1)
        if weight is None:
            return None
        inputs = self.settle(self._tensors(node.args[0])[0], -1)
        rows = self.rows(weight)
        self.place(weight, {0: rows, 1: inputs.view(1, -1)})
        self.join(inputs, 0)
        self.join(rows, 1)
        self._vector(node, 2, rows)
        return rows.expand(node.meta["val"].shape)

    def _embedding(self, node: fx.Node) -> Tensor | None:
        weight = self._stored(node, 0)
        if weight is None:
            return None
        columns = self.rows(weight, dim=1)
        self.place(weight, {1: columns.view(1, -1) if columns.dim() == 1 else columns})
        self.join(columns)
        return columns.view(-1).expand(node.meta["val"].shape)

    def _batch_norm(self, node: fx.Node) -> Tensor | None:
        labels = self._tensors(node.args[0])[0]
        channels = self.settle(labels, 1)
        self.join(channels)
        for index in (1, 2, 3, 4):
            self._vector(node, index, channels)
        return self._along(channels, labels.shape, 1)

    def _group_norm(self, node: fx.Node) -> Tensor | None:
        labels = self._tensors(node.args[0])[0]
        channels = self.settle(labels, 1)
        for group, atoms in enumerate(channels.view(node.args[1], -1)):
            self.join(atoms, group)
        for index in (2, 3):
            self._vector(node, index, channels)
        return self._along(channels, labels.shape, 1)

    def _layer_norm(self, node: fx.Node) -> Tensor | None:
        labels, shape = self._tensors(node.args[0])[0], node.args[1]
        kept = self.settle(labels, *range(labels.dim() - len(shape), labels.dim()))
        self.join(kept)
        for index in (2, 3):
            if _argument(node, index) is not None:
                self.bond(kept, self._tensors(_argument(node, index))[0])
        return kept.expand(labels.shape)

    def _prelu(self, node: fx.Node) -> Tensor | None:
        labels = self._tensors(node.args[0])[0]
        channels = self.settle(labels, 1)
        self.join(channels)
        if node.args[1].meta["val"].numel() > 1:
            self._vector(node, 1, channels)
        return self._along(channels, labels.shape, 1)

    def _attention(self, node: fx.Node) -> Tensor | None:
        query, key, value = (self._tensors(source)[0] for source in node.args[:3])
        if query.shape[:-2] != key.shape[:-2]:  # fewer keys than queries: heads share them
            return None
        if isinstance(mask := _argument(node, 3), fx.Node):
            self.fix(self._tensors(mask)[0], "it masks attention")
        heads = (*range(query.dim() - 2), query.dim() - 1)
        query, key, value = (self.settle(labels, *heads) for labels in (query, key, value))
        self.bond(query, key)
        for operand, labels in enumerate((query, key, value)):
            for head, atoms in enumerate(labels.reshape(-1, labels.shape[-1])):
                self.join(atoms, operand, head)
        return value.unsqueeze(-2).expand(node.meta["val"].shape)

    def _matmul(self, node: fx.Node) -> Tensor | None:
        left, right = node.args[0].meta["val"], node.args[1].meta["val"]
        if left.dim() != right.dim() or left.shape[:-2] != right.shape[:-2] or left.dim() < 2:
            return None
        batch = "abcdefghijklm"[: left.dim() - 2]
        return self._contract(node, node.args, (batch + "xy", batch + "yz"), batch + "xz")

    def _einsum(self, node: fx.Node) -> Tensor | None:
        inputs, arrow, output = node.args[0].replace(" ", "").partition("->")
        letters = inputs.split(",")
        plain = (
            all(len(set(part)) == len(part) for part in (*letters, output)) and "." not in inputs
        )
        if not plain or not arrow or len(letters) != 2:
            return None
        return self._contract(node, node.args[1], letters, output)

    def _contract(
        self, node: fx.Node, sources: Iterable[fx.Node], inputs: Iterable[str], output: str
    ) -> Tensor | None:
        """Label a product that is summed over the letters that the output lacks."""
        if any(source.name in self.stored for source in sources):
            return None
        (left, ours), (right, theirs) = zip(
            (self._tensors(source)[0] for source in sources), inputs, strict=True
        )
        shape = node.meta["val"].shape
        for labels, letters, other in ((right, theirs, left), (left, ours, right)):
            if self.all_fixed(other):  # attention weights times values: the values' channels go on
                kept = [letter for letter in output if letter in letters]
                atoms = self.settle(labels, *(letters.index(letter) for letter in kept))
                shared = [letter in ours and letter in theirs for letter in kept]
                self._join_each(atoms, shared)
                for dim, letter in enumerate(output):
                    if letter not in letters:
                        atoms = atoms.unsqueeze(dim)
                return atoms.expand(shape)
        kept = [letter for letter in ours if letter in theirs]
        left = self.settle(left, *(ours.index(letter) for letter in kept))
        right = self.settle(right, *(theirs.index(letter) for letter in kept))
        self.bond(left, right)
        self._join_each(left, [letter in output for letter in kept])
        return self.still(shape, "it is a product of two activations")

    def _join_each(self, atoms: Tensor, batch: list[bool]) -> None:
        """Note a part of its own for each position in the batch dimensions: a head, say."""
        order = sorted(range(atoms.dim()), key=lambda dim: not batch[dim])
        rows = math.prod(atoms.shape[dim] for dim in range(atoms.dim()) if batch[dim])
        for number, row in enumerate(atoms.permute(order).reshape(rows, -1)):
            self.join(row, number)

    def _vector(self, node: fx.Node, index: int, atoms: Tensor) -> None:
        """Let an operand that goes along the channels, if there is one, move with them."""
        vector = self._stored(node, index)
        known = self.placements.get(id(vector))
        if vector is not None and (known is None or known.elements is None):
            self.place(vector, {0: atoms})
        elif _argument(node, index) is not None:
            self.bond(self._tensors(_argument(node, index))[0], atoms)

    @staticmethod
    def _along(atoms: Tensor, shape: Iterable[int], dim: int) -> Tensor:
        shape = tuple(shape)
        return atoms.view(*(1,) * dim, -1, *(1,) * (len(shape) - dim - 1)).expand(shape)

    # --- from constraints to cells ---

    def symmetry(self) -> Symmetry:
        """Return neurons and cells."""
        neuron = _components(self.count, [(a, b) for _, a, b in self.bonds])
        order = np.argsort(neuron, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(self.count) - np.searchsorted(neuron[order], neuron[order])
        reasons: dict[int, str] = {}
        for atoms, reason in self.fixed:
            for number in np.unique(neuron[atoms]).tolist():
                reasons.setdefault(number, reason)

        # Equal signatures: the same memberships and bonds, rank by rank.
        signature = np.zeros(self.count, np.uint64)
        for part, atoms in self.members:
            np.add.at(signature, atoms, _mix(hash(part)))
        for number, left, right in self.bonds:
            np.add.at(signature, left, _mix(hash((number, -1)) + rank[right]))
            np.add.at(signature, right, _mix(hash((number, -2)) + rank[left]))
        total = np.zeros(int(neuron.max(initial=-1)) + 1, np.uint64)
        np.add.at(total, neuron, _mix(signature + _mix(rank)))
        cell = np.unique(total, return_inverse=True)[1][neuron]
        cell[np.isin(neuron, list(reasons))] = -1
        return Symmetry(self.placements, neuron, rank, cell, reasons)


# The rule for each operator, by its name in ATen. What is not here and not pointwise
# fixes all that goes through it.
_RULES: dict[str, Callable[[_Labels, fx.Node], object]] = {
    name: rule
    for rule, names in {
        _Labels._same: "alias clone contiguous detach dropout dropout_ feature_dropout "
        "alpha_dropout lift_fresh_copy to _to_copy _assert_tensor_metadata",
        _Labels._reshape: "view reshape flatten unflatten _unsafe_view squeeze unsqueeze",
        _Labels._expand: "expand expand_as",
        _Labels._move: "permute transpose swapaxes movedim t chunk split split_with_sizes "
        "tensor_split unbind slice select narrow cat concat stack roll flip repeat "
        "repeat_interleave pixel_shuffle pixel_unshuffle channel_shuffle",
        _Labels._pointwise: "hardswish_ hardtanh_",  # not every version of PyTorch tags them
        _Labels._spatial: "max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d "
        "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d "
        "adaptive_max_pool2d adaptive_max_pool3d upsample_nearest1d upsample_nearest2d "
        "upsample_nearest3d upsample_linear1d upsample_bilinear2d upsample_bicubic2d",
        _Labels._reduce: "mean sum",
        _Labels._pad: "pad",
        _Labels._convolution: "conv1d conv2d conv3d",
        _Labels._transposed: "conv_transpose1d conv_transpose2d conv_transpose3d",
        _Labels._linear: "linear",
        _Labels._embedding: "embedding",
        _Labels._batch_norm: "batch_norm instance_norm",
        _Labels._group_norm: "group_norm",
        _Labels._layer_norm: "layer_norm rms_norm",
        _Labels._prelu: "prelu",
        _Labels._attention: "scaled_dot_product_attention",
        _Labels._matmul: "matmul",
        _Labels._einsum: "einsum",
        # Of these only the shape goes in.
        _Labels._constant: "zeros_like ones_like full_like empty_like rand_like randn_like "
        "new_zeros new_ones new_full new_empty",
    }.items()
    for name in names.split()
}


def _argument(node: fx.Node, index: int, default: object = None) -> object:
    """Return an operator's argument, given by position or by name."""
    if index < len(node.args):
        return node.args[index]
    name = node.target._schema.arguments[index].name
    return node.kwargs.get(name, default)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _compact(labels: Tensor) -> Tensor:
    """Return labels without their repetition along expanded dimensions."""
    for dim, stride in enumerate(labels.stride()):
        if stride == 0 and labels.shape[dim] > 1:
            labels = labels.narrow(dim, 0, 1)
    return labels


def _meets_several(one: Tensor, other: Tensor) -> bool:
    """Return whether broadcasting brings one atom together with different ones."""
    return any(
        one.shape[dim] == 1 and other.shape[dim] > 1 and _varies(other, dim)
        for dim in range(one.dim())
    )


def _varies(labels: Tensor, dim: int) -> bool:
    """Return whether labels differ along a dimension."""
    if labels.shape[dim] == 1 or labels.stride(dim) == 0:
        return False
    labels = _compact(labels)
    return bool((labels != labels.narrow(dim, 0, 1)).any())


def _components(count: int, edges: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Number the connected components of a graph; each node gets that of its component."""
    root = np.arange(count)
    if edges:
        left, right = (np.concatenate(side) for side in zip(*edges, strict=True))
        while True:
            lowest = np.minimum(root[left], root[right])
            before = root.copy()
            np.minimum.at(root, root[left], lowest)
            np.minimum.at(root, root[right], lowest)
            root = root[root]
            if np.array_equal(root, before):
                break
    return np.unique(root, return_inverse=True)[1]


def _mix(value: object) -> np.ndarray:
    """Spread integers over 64 bits, so that sums of them tell sets apart (splitmix64)."""
    with np.errstate(over="ignore"):
        bits = np.asarray(value).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return bits ^ (bits >> np.uint64(31))
