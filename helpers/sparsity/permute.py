"""Order the channels of a network so that pruning 2:4 cuts less, before it is pruned.

The network computes the same in any order of its inner channels, but which four of
them are neighbours decides which two weights of each four survive. Explained in
`02_prune_2_4.ipynb`.
"""

import copy
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils import _pytree
from tqdm.auto import tqdm

from helpers.errors import HelpersError, InputError
from helpers.layers import LayerWeight, layer_weights
from helpers.sparsity.eligibility import Selection, eligible_weights
from helpers.sparsity.graph import Symmetry, find_symmetry, gather_order, reorder_, source_of
from helpers.sparsity.search import kept_2to4, search_permutation

# In double precision an order that is right changes the outputs by rounding alone.
_TOLERANCE = 1e-6


@dataclass(frozen=True, repr=False)
class PermutationReport:
    """What an order of the channels changed for each weight.

    `weights` has a row for each eligible weight: `weight`, `before` and `after` (the
    share of its summed magnitude that 2:4 keeps, in per cent), `permuted`, and the
    `reason` where it is not. `error` is the largest difference of the outputs, in
    double precision, over the largest output.
    """

    weights: pd.DataFrame
    error: float

    @property
    def permuted(self) -> pd.DataFrame:
        """The rows of the weights whose input channels have a new order."""
        return self.weights[self.weights.permuted]

    def __repr__(self) -> str:
        gain = (self.permuted.after - self.permuted.before).mean() if len(self.permuted) else 0.0
        return (
            f"{len(self.permuted)} of {len(self.weights)} weights permuted, which keeps "
            f"{gain:.2f} points more of their magnitude on average; "
            f"outputs differ by {self.error:.1e}"
        )

    def __str__(self) -> str:
        return f"{self!r}\n{self.weights.round(2).to_string(index=False)}"

    def _repr_html_(self) -> str:
        return f"<p>{self!r}</p>" + self.weights.round(2).to_html(index=False)


def permute_channels_(
    model: nn.Module,
    example: Tensor | tuple[Tensor, ...],
    target: str = "tensorrt",
    include: Selection = (),
    exclude: Selection = (),
    escapes: int = 100,
) -> PermutationReport:
    """Order the channels of a dense network so that 2:4 pruning keeps more magnitude, in place.

    The network computes what it did: its outputs before and after are compared in
    double precision. Weights that share channels, in a residual stream for instance,
    are searched together; each group of a grouped convolution by itself.

    Args:
        model: a network that `torch.export` can trace.
        example: inputs of the shape that it takes; on the model's device.
        target: whose rules say which weights will be pruned, as in `eligible_weights`.
        include: names or types of layers, as in `eligible_weights`.
        exclude: likewise.
        escapes: how often each search may leave a local optimum.

    Returns:
        A report with a row for each eligible weight. If the network cannot be traced
        nothing is changed, and the rows say why.

    Raises:
        InputError: the outputs have changed; the network is as it was then.

    Source: Pool and Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021. A
    permutation for each group of a grouped convolution, and through it for the layer
    behind it, are additions of this project. Explained in `02_prune_2_4.ipynb`.
    """
    example = example if isinstance(example, tuple) else (example,)
    eligible = eligible_weights(model, target, include, exclude)
    weights = {name: weight for name, weight in layer_weights(model).items() if name in eligible}
    before = {name: _kept_share(weight) for name, weight in weights.items()}
    try:
        symmetry = find_symmetry(model, example)
    except HelpersError as error:
        return _report(before, before, dict.fromkeys(weights, str(error)), error=0.0)

    moves, reasons = _search_cells(symmetry, weights, escapes)
    error = _apply_or_restore_(model, example, symmetry, source_of(symmetry, moves))
    after = {name: _kept_share(weight) for name, weight in weights.items()}
    return _report(before, after, reasons, error)


def _report(
    before: dict[str, float], after: dict[str, float], reasons: dict[str, str], error: float
) -> PermutationReport:
    rows = [
        {
            "weight": name,
            "before": before[name],
            "after": after[name],
            "permuted": name not in reasons,
            "reason": reasons.get(name, ""),
        }
        for name in before
    ]
    columns = ["weight", "before", "after", "permuted", "reason"]
    return PermutationReport(pd.DataFrame(rows, columns=columns), error)


@dataclass(frozen=True)
class _Reader:
    """One group of a weight that reads a cell: its rows, and the atoms of its input channels."""

    name: str
    rows: np.ndarray  # (outputs and kernel positions, input channels)
    atoms: np.ndarray  # (input channels,)


def _search_cells(
    symmetry: Symmetry, weights: dict[str, LayerWeight], escapes: int
) -> tuple[list[tuple[np.ndarray, np.ndarray]], dict[str, str]]:
    """Return the moves that gain, and for each weight that none of them serves the reason."""
    readers: dict[int, list[_Reader]] = defaultdict(list)
    reasons: dict[str, str] = {}
    for name, weight in weights.items():
        atoms = symmetry.inputs_of(weight.tensor, weight.input_dim)
        if atoms is None:
            reasons[name] = "the graph shows no layer that it is the weight of"
            continue
        reasons[name] = symmetry.why_fixed(atoms.flat[0]) or "no other order keeps more"
        rows = _as_rows(weight).reshape(len(atoms), -1, atoms.shape[1])
        for group, line in enumerate(atoms):
            for cell in set(symmetry.cell[line].tolist()) - {-1}:
                readers[cell].append(_Reader(name, rows[group], line))

    moves = []
    for cell, found in tqdm(readers.items(), desc="permute", leave=False):
        try:
            moves.append(_search(symmetry, cell, found, escapes))
        except _NoMoveError as why:
            reasons |= {reader.name: str(why) for reader in found if reader.name in reasons}
        else:
            for reader in found:
                reasons.pop(reader.name, None)
    return moves, reasons


class _NoMoveError(Exception):
    """A cell stays as it is, for the reason in the message."""


def _search(
    symmetry: Symmetry, cell: int, readers: list[_Reader], escapes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the move of one cell that keeps the most magnitude over all its readers.

    Readers that see the same neurons in the same groups of four are searched together.
    The others, a concatenation may shift them for instance, are only asked whether the
    move costs them more than it gains.
    """
    alike: dict[bytes, list[_Reader]] = defaultdict(list)
    for reader in readers:
        alike[_stripes(symmetry, cell, reader.atoms).tobytes()].append(reader)
    key = max(
        alike, key=lambda stripes: (len(stripes) > 0, sum(r.rows.size for r in alike[stripes]))
    )
    to = np.frombuffer(key, dtype=symmetry.neuron.dtype)
    if len(to) < 8:
        raise _NoMoveError("fewer than eight channels, in whole groups of four, may change places")
    columns = [_columns_of(symmetry, to, reader) for reader in alike[key]]
    together = np.concatenate(columns)
    order = search_permutation(together, escapes=escapes)
    gain = kept_2to4(together[:, order]) - kept_2to4(together)
    move = (to, to[order])
    source = source_of(symmetry, [move])
    for reader in readers:
        if not any(reader is other for other in alike[key]):
            moved = gather_order(reader.atoms, source)
            gain += kept_2to4(reader.rows[:, moved]) - kept_2to4(reader.rows)
    if gain <= 0:
        raise _NoMoveError("no other order keeps more")
    return move


def _stripes(symmetry: Symmetry, cell: int, atoms: np.ndarray) -> np.ndarray:
    """Return the neurons of the groups of four that lie wholly in a cell, (groups, 4).

    Neurons are sorted within a group and groups among themselves, so that equal
    groupings are equal arrays. Empty if a neuron is read twice, after a flattening
    for instance: such a reader takes no part in a search.
    """
    inside = (symmetry.cell[atoms] == cell).reshape(-1, 4).all(axis=1)
    neurons = np.sort(symmetry.neuron[atoms].reshape(-1, 4)[inside], axis=1)
    once = np.unique(symmetry.neuron[atoms[symmetry.cell[atoms] == cell]], return_counts=True)[1]
    return neurons[np.argsort(neurons[:, 0])] if (once == 1).all() else neurons[:0]


def _columns_of(symmetry: Symmetry, neurons: np.ndarray, reader: _Reader) -> np.ndarray:
    """Return the weights that read these neurons, (rows, neurons)."""
    read = symmetry.neuron[reader.atoms]
    by_neuron = np.argsort(read, kind="stable")
    return reader.rows[:, by_neuron[np.searchsorted(read[by_neuron], neurons)]]


def _as_rows(weight: LayerWeight) -> np.ndarray:
    """Return magnitudes as (outputs and kernel positions, input channels)."""
    magnitude = weight.tensor.detach().abs().float().cpu().movedim(weight.input_dim, -1)
    return magnitude.reshape(-1, magnitude.shape[-1]).numpy()


def _kept_share(weight: LayerWeight) -> float:
    rows = _as_rows(weight)
    total = float(rows.sum(dtype=np.float64))
    return 100 * kept_2to4(rows) / total if total else 100.0


def _apply_or_restore_(
    model: nn.Module, example: tuple[Tensor, ...], symmetry: Symmetry, source: np.ndarray
) -> float:
    """Reorder the network if its outputs stay the same, and return by how much they differ."""
    placed = [placement.tensor for placement in symmetry.placements.values()]
    backup = [tensor.detach().clone() for tensor in placed]
    inputs = _random_like(example)
    before = _outputs(model, inputs)
    reorder_(symmetry, source)
    after = _outputs(model, inputs)
    scale = max((float(value.abs().max()) for value in before), default=0.0) or 1.0
    error = max(
        (float((a - b).abs().max()) / scale for a, b in zip(after, before, strict=True)),
        default=0.0,
    )
    if not error <= _TOLERANCE:  # NaN too
        with torch.no_grad():
            torch._foreach_copy_(placed, backup)
        raise InputError(
            f"After permuting its channels {type(model).__name__} computes something else: its "
            f"outputs differ by {error:.1e} of the largest. The network has been restored. Exclude "
            "the layers that treat single channels differently from the rest, with `exclude=`."
        )
    return error


def _random_like(example: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return random inputs in double precision; indices and masks as they are."""
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)
        if value.is_floating_point()
        else value
        for value in example
    )


def _outputs(model: nn.Module, inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return the floating-point outputs of a copy of the network in double precision."""
    with torch.no_grad():
        outputs = copy.deepcopy(model).double().eval()(*inputs)
    leaves = _pytree.tree_leaves(outputs)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
