"""Order the channels of a model before it is pruned, so that 2:4 removes less.

Explained in `02b_better_pruning.ipynb`. A model computes the same with its inner channels in any
order, but the order decides which four weights form a group, and so which weights survive.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from helpers.errors import InputError
from helpers.layers import LayerWeight
from helpers.parameters import no_grad_for, require_unsharded, unwrapped
from helpers.progress_bar import progress_bar
from helpers.sparsity.channels import (
    ChannelGroups,
    Numbers,
    gather_index,
    gather_positions,
    reorder_,
)
from helpers.sparsity.eligibility import Selection, select_weights
from helpers.sparsity.graph import find_channel_groups
from helpers.sparsity.masks import kept_magnitude_2to4
from helpers.sparsity.search import kept_2to4, search_permutation
from helpers.sparsity.unchanged import Outputs, outputs_of, zeros_filled

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class PermutationReport:
    """What a permutation of the channels changed for each weight.

    Attributes:
        weights: a row for each eligible weight: `weight`, `before` and `after` (the share of
            its summed magnitude that 2:4 keeps, in per cent), `permuted`, and the `reason`
            where it is not.
        max_relative_error: the largest difference of the outputs relative to the largest
            output; NaN if nothing was moved and so nothing compared.
        precision: the datatype in which the outputs were compared: `float64`, or a lower one
            for a model that does not run in double precision; empty if nothing was compared.
    """

    weights: "pd.DataFrame"
    max_relative_error: float
    precision: str

    @property
    def permuted(self) -> "pd.DataFrame":
        """The rows of the weights whose input channels have a new order."""
        return self.weights[self.weights.permuted]

    def __repr__(self) -> str:
        gain = (self.permuted.after - self.permuted.before).mean() if len(self.permuted) else 0.0
        compared = f"outputs differ by {self.max_relative_error:.1e}"
        if not self.precision:
            compared = "no outputs were compared"
        elif self.precision != "float64":
            compared += f" in {self.precision}"
        return (
            f"{len(self.permuted)} of {len(self.weights)} weights permuted, which keeps "
            f"{gain:.2f} points more of their magnitude on average; {compared}"
        )

    def __str__(self) -> str:
        return f"{self!r}\n{self.weights.round(2).to_string(index=False)}"

    def _repr_html_(self) -> str:
        return f"<p>{self!r}</p>" + self.weights.round(2).to_html(index=False)


def permute_channels_(
    model: nn.Module,
    example: Tensor | tuple[Any, ...],
    rules: str = "tensorrt",
    include: Selection = (),
    exclude: Selection = (),
    escapes: int = 100,
) -> PermutationReport:
    """Order the channels of a dense model so that 2:4 pruning keeps more magnitude, in place.

    What the model computes stays the same: its outputs before and after are compared in
    double precision, and may differ by no more than rounding explains. Weights that share
    channels, in a residual stream for instance, are searched together; each group of a
    grouped convolution is searched by itself. What the model returns keeps its order: if hidden
    states are among its outputs, permute a module around it that returns the others only.

    Args:
        model: a model that `torch.export` can trace.
        example: its positional inputs, tensors on the model's device and other values.
        rules: the rules that decide which weights will be pruned, as in `eligible_weights`.
        include: names or types of layers, as in `eligible_weights`.
        exclude: as `include`.
        escapes: how often each search may leave a local optimum.

    Returns:
        A report with a row for each eligible weight. If the model cannot be traced,
        nothing is changed and the rows say why.

    Raises:
        InputError: the outputs would change, or cannot be compared; the model is unchanged.

    Source: Pool and Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021. A
    permutation for each group of a grouped convolution, and for the layer behind it, are
    additions of this project.
    """
    example = example if isinstance(example, tuple) else (example,)
    model = unwrapped(model)
    candidates = select_weights(model, rules, include, exclude)
    weights = {weight.name: weight for weight in candidates if weight.eligible}
    for name, weight in weights.items():
        require_unsharded(weight.tensor, name)
    before = _kept_magnitudes(weights)
    try:
        groups = find_channel_groups(model, example)
    except InputError as why:
        return _report(before, before, dict.fromkeys(weights, str(why)))
    readers, reasons = _readers_by_set(groups, weights)
    if not readers:
        return _report(before, before, reasons)

    with zeros_filled(model):
        outputs = outputs_of(model, example)  # before the search, so that an error comes early
        moves, reasons = _search_sets(groups, readers, reasons, escapes)
        error = _apply_or_restore_(model, groups, gather_index(groups, moves), outputs)
    return _report(before, _kept_magnitudes(weights), reasons, error, outputs.precision)


def _kept_magnitudes(weights: Mapping[str, LayerWeight]) -> dict[str, float]:
    return {
        name: kept_magnitude_2to4(weight.tensor, name, weight.input_dim)
        for name, weight in weights.items()
    }


def _report(
    before: dict[str, float],
    after: dict[str, float],
    reasons: dict[str, str],
    error: float = math.nan,
    precision: str = "",
) -> PermutationReport:
    import pandas as pd  # here, because it is slow to import

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
    return PermutationReport(pd.DataFrame(rows, columns=columns), error, precision)


# --- the search ---


@dataclass(frozen=True)
class _Reader:
    """One group of a weight that reads an interchangeable set."""

    name: str
    rows: np.ndarray  # magnitudes: (outputs and kernel positions, input channels)
    channels: Numbers  # (input channels,)


Move = tuple[Numbers, Numbers]


def _readers_by_set(
    groups: ChannelGroups, weights: Mapping[str, LayerWeight]
) -> tuple[dict[int, list[_Reader]], dict[str, str]]:
    """Return what reads each interchangeable set, and why each weight stays if no search gains."""
    readers: dict[int, list[_Reader]] = defaultdict(list)
    reasons: dict[str, str] = {}
    for name, weight in weights.items():
        channels = groups.inputs_of(weight.tensor, weight.input_dim)
        if channels is None:
            reasons[name] = "the graph shows no layer that it is the weight of"
            continue
        reasons[name] = groups.why_fixed(int(channels.flat[0])) or "no other order keeps more"
        rows = _as_rows(weight).reshape(len(channels), -1, channels.shape[1])
        for of_group, along in zip(rows, channels, strict=True):
            for part_rows, part in _parts(groups, of_group, along):
                for number in set(groups.interchangeable_set[part].tolist()) - {-1}:
                    readers[number].append(_Reader(name, part_rows, part))
    return readers, reasons


def _parts(
    groups: ChannelGroups, rows: np.ndarray, channels: Numbers
) -> list[tuple[np.ndarray, Numbers]]:
    """Split the inputs of a weight where a coupled group is read again.

    Heads that share their values read them once each, and each time in the same fours.
    """
    cuts: list[int] = []
    seen: set[int] = set()
    for position, number in enumerate(groups.coupled_group[channels].tolist()):
        if number in seen:
            cuts.append(position)
            seen.clear()
        seen.add(number)
    if any(cut % 4 for cut in cuts):
        return [(rows, channels)]
    parts = np.split(np.arange(len(channels)), cuts)
    return [(rows[:, part], channels[part]) for part in parts]


def _as_rows(weight: LayerWeight) -> np.ndarray:
    """Return magnitudes as (outputs and kernel positions, input channels)."""
    magnitude = weight.tensor.detach().abs().float().cpu().movedim(weight.input_dim, -1)
    return magnitude.reshape(-1, magnitude.shape[-1]).numpy()


def _search_sets(
    groups: ChannelGroups,
    readers: dict[int, list[_Reader]],
    reasons: dict[str, str],
    escapes: int,
) -> tuple[list[Move], dict[str, str]]:
    """Return the moves that gain, and why each weight that none of them reorders stays."""
    moves: list[Move] = []
    permuted: set[str] = set()
    reasons = dict(reasons)
    for number, found in progress_bar(readers.items(), desc="permute"):
        names = {reader.name for reader in found}
        move, why_none = _search(groups, number, found, escapes)
        if move is None:
            reasons |= dict.fromkeys(names, why_none)
        else:
            moves.append(move)
            permuted |= names
    return moves, {name: reason for name, reason in reasons.items() if name not in permuted}


def _search(
    groups: ChannelGroups, number: int, readers: list[_Reader], escapes: int
) -> tuple[Move | None, str]:
    """Return the move of one set that keeps the most magnitude over all its readers.

    Readers that see the same coupled groups in the same groups of four are searched
    together. The others, which a concatenation may shift for instance, only decide whether
    the move costs them more than it gains.

    Returns:
        The move and an empty string, or None and why there is no move.
    """
    alike: dict[bytes, list[_Reader]] = defaultdict(list)
    for reader in readers:
        alike[_fours(groups, number, reader.channels).tobytes()].append(reader)
    key = max(alike, key=lambda fours: (len(fours) > 0, sum(r.rows.size for r in alike[fours])))
    to = np.frombuffer(key, dtype=groups.coupled_group.dtype)
    if len(to) < 8:
        return None, "fewer than eight channels, in whole groups of four, may change places"
    together = np.concatenate([_columns_of(groups, to, reader) for reader in alike[key]])
    order = search_permutation(together, escapes=escapes)
    gain = kept_2to4(together[:, order]) - kept_2to4(together)
    move = (to, to[order])
    index = gather_index(groups, [move])
    for fours, others in alike.items():
        if fours != key:
            for reader in others:
                moved = reader.rows[:, gather_positions(reader.channels, index)]
                gain += kept_2to4(moved) - kept_2to4(reader.rows)
    if gain <= 0:
        return None, "no other order keeps more"
    return move, ""


def _fours(groups: ChannelGroups, number: int, channels: Numbers) -> Numbers:
    """Return the fours of coupled groups that lie entirely in a set, (fours, 4).

    They are sorted within a four, and the fours among themselves, so that equal groupings
    are equal arrays. Empty if a coupled group is read twice, after a flattening for
    instance: such a reader takes no part in a search.
    """
    read, in_set = groups.coupled_group[channels], groups.interchangeable_set[channels] == number
    fours = np.sort(read.reshape(-1, 4)[in_set.reshape(-1, 4).all(axis=1)], axis=1)
    if len(np.unique(read[in_set])) < in_set.sum():
        return fours[:0]
    return fours[np.argsort(fours[:, 0])]


def _columns_of(groups: ChannelGroups, to: Numbers, reader: _Reader) -> np.ndarray:
    """Return the magnitudes that a reader has for these coupled groups, (rows, groups)."""
    read = groups.coupled_group[reader.channels]
    by_group = np.argsort(read, kind="stable")
    return reader.rows[:, by_group[np.searchsorted(read[by_group], to)]]


# --- the outputs before and after ---


def _apply_or_restore_(
    model: nn.Module, groups: ChannelGroups, index: Numbers, before: Outputs
) -> float:
    """Reorder the model if its outputs stay the same; return their largest relative error."""
    placed = [placement.tensor for placement in groups.placements.values()]
    backup = [tensor.detach().clone() for tensor in placed]
    try:
        reorder_(groups, index)
        return before.check(model)
    except BaseException:  # an interruption too
        with no_grad_for(placed):
            torch._foreach_copy_(placed, backup)
        raise
