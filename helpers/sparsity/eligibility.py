"""Which weights can run sparse, by the rules of TensorRT, ASP or cuSPARSELt, and which cannot.

Each one that cannot has its reason. Explained in `02_prune_2_4.ipynb`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from html import escape
from typing import TYPE_CHECKING

from torch import nn

from helpers.errors import InputError
from helpers.layers import (
    Example,
    LayerWeight,
    MacCount,
    count_macs,
    layer_weights,
    model_inputs,
    table_of,
)
from helpers.parameters import unwrapped, whole
from helpers.sparsity.masks import kept_magnitude_2to4

if TYPE_CHECKING:
    import pandas as pd

NOT_A_PRODUCT = "not a matrix product"

Selection = str | type[nn.Module] | Iterable[str | type[nn.Module]]


@dataclass(frozen=True)
class WeightShape:
    """What the rules ask of a weight, whether it is in a model or in a file."""

    output_channels: int  # of all groups together
    input_channels: int  # of each group
    kernel: tuple[int, ...] = ()  # of a convolution
    groups: int = 1
    transposed: bool = False
    element_size: int = 2  # bytes of one of its numbers


def _any(weight: WeightShape) -> str:
    """Allow every weight whose input channels come in fours."""
    return _why_not_in_fours(weight.input_channels, weight.groups)


def _why_not_in_fours(channels: int, groups: int) -> str:
    if channels % 4 == 0:
        return ""
    in_group = " in a group" if groups > 1 else ""
    plural = "s" if channels > 1 else ""
    return f"{channels} input channel{plural}{in_group}: not a multiple of 4"


def _tensorrt(weight: WeightShape) -> str:
    """Allow what TensorRT has sparse kernels for, by its documentation and maintainers."""
    return why_not_tensorrt(weight.input_channels, weight.groups, weight.transposed)


def why_not_tensorrt(channels: int, groups: int = 1, transposed: bool = False) -> str:
    """Return why TensorRT will not run a weight sparse; empty if it may.

    Args:
        channels: input channels, of each group.
        groups: of the convolution.
        transposed: whether it is a transposed one.
    """
    if transposed:
        return "transposed: TensorRT has no sparse kernel"
    if groups > 1:
        return "grouped: TensorRT has no sparse kernel"
    return _why_not_in_fours(channels, groups)


def _asp(weight: WeightShape) -> str:
    """Allow what NVIDIA's ASP prunes, so that results can be compared with published ones."""
    if weight.transposed:
        return "transposed: not among ASP's layers"
    if weight.output_channels % 8:
        return f"{weight.output_channels} output channels: not a multiple of 8"
    if weight.input_channels % 16:
        return f"{weight.input_channels} input channels: not a multiple of 16"
    return ""


def _cusparselt(weight: WeightShape) -> str:
    """Allow the matrix products that cuSPARSELt has, in the data type of the weight."""
    if weight.transposed or weight.groups > 1 or any(size > 1 for size in weight.kernel):
        return NOT_A_PRODUCT
    return why_not_cusparselt(weight.output_channels, weight.input_channels, weight.element_size)


def why_not_cusparselt(rows: int, columns: int, element_size: int = 2) -> str:
    """Return why cuSPARSELt will not multiply by a sparse matrix; empty if it may.

    Args:
        rows: of the weight, its outputs.
        columns: of the weight, its inputs.
        element_size: bytes of one of its numbers.
    """
    step = 32 if element_size == 1 else 16
    if rows % step or columns % step:
        return f"{rows} rows, {columns} columns: not multiples of {step}"
    return ""


RULES: dict[str, Callable[[WeightShape], str]] = {
    "tensorrt": _tensorrt,
    "asp": _asp,
    "cusparselt": _cusparselt,
    "any": _any,
}


def why_not_sparse(weight: LayerWeight, rules: str = "tensorrt") -> str:
    """Return why a weight cannot run sparse by some rules; empty if it can.

    Args:
        weight: as `helpers.layers.layer_weights` returns it.
        rules: `tensorrt`; `asp`, the layers that NVIDIA's ASP prunes; `cusparselt`, matrix
            products in PyTorch (FP32 weights are treated as FP16); `any`, every weight with
            its input channels in fours.

    Raises:
        InputError: there are no such rules.

    Source: TensorRT documentation, "Structured Sparsity" (groups of four input channels,
    FP16 or INT8), and NVIDIA/TensorRT#4054 (no sparse kernels for grouped convolutions);
    ASP in NVIDIA/apex, apex/contrib/sparsity; torch.sparse.semi_structured (cuSPARSELt).
    """
    shape = WeightShape(
        weight.output_channels,
        weight.input_channels,
        tuple(weight.shape[2:]),
        weight.groups,
        weight.transposed,
        weight.element_size,
    )
    why_not = why_not_shape(shape, rules)
    return weight.refusal or why_not


def why_not_shape(weight: WeightShape, rules: str = "tensorrt") -> str:
    """Return why a weight of this shape cannot run sparse by some rules; empty if it can.

    Raises:
        InputError: there are no such rules.
    """
    return _rules(rules)(weight)


def _rules(name: str) -> Callable[[WeightShape], str]:
    if name not in RULES:
        raise InputError(f"There are no rules {name!r}. Choose one of {', '.join(RULES)}.")
    return RULES[name]


@dataclass(frozen=True)
class Candidate(LayerWeight):
    """A weight with its verdict: `reason` says why it stays dense, and is empty if it need not."""

    reason: str = ""

    @classmethod
    def judged(cls, weight: LayerWeight, reason: str) -> "Candidate":
        """Return a weight with a verdict."""
        return cls(
            weight.name, weight.layer, weight.attribute, weight.path, weight.is_computed,
            weight.refusal, weight.tied_to, reason,
        )  # fmt: skip

    @property
    def eligible(self) -> bool:
        """Whether the weight can run sparse and was selected."""
        return not self.reason

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter that is pruned; an eligible weight always has one."""
        if self.stored is None:
            raise InputError(f"{self.name} is {self.reason}: no single parameter can be pruned.")
        return self.stored


def select_weights(
    model: nn.Module,
    rules: str = "tensorrt",
    include: Selection = (),
    exclude: Selection = (),
    example: Example | None = None,
) -> list[Candidate]:
    """Return every weight of a model with its verdict, in the order of the layers.

    The model is walked through once. Arguments and errors are those of `eligible_weights`.
    """
    _rules(rules)  # a mistake shows in a model without weights too
    weights = layer_weights(model)
    included, excluded = _items(include, weights), _items(exclude, weights)
    candidates = []
    for weight in weights.values():
        if any(_matches(item, weight) for item in excluded):
            reason = "excluded"
        elif included and not any(_matches(item, weight) for item in included):
            reason = "not included"
        else:
            reason = why_not_sparse(weight, rules)
        candidates.append(Candidate.judged(weight, reason))
    lost = lost_weights(model, example, {weight.name: weight for weight in candidates})
    return _without_lost(candidates, lost)


def lost_weights(
    model: nn.Module, example: Example | None, weights: Mapping[str, LayerWeight]
) -> Mapping[str, str]:
    """Return the weights whose zeros a run of the model loses, and why; none without an example.

    Args:
        model: the model; it runs in evaluation mode.
        example: what to call it with.
        weights: what `layer_weights(model)` returned.
    """
    if example is None:
        return {}
    return count_macs(model, model_inputs(model, example=example), weights).lost


def _without_lost(candidates: Sequence[Candidate], lost: Mapping[str, str]) -> list[Candidate]:
    return [
        replace(weight, reason=weight.reason or lost.get(weight.name, "")) for weight in candidates
    ]


def why_none_eligible(model: nn.Module, rules: str, candidates: Sequence[Candidate]) -> str:
    """Return why a model has no eligible weight, and what to do.

    Args:
        model: the model.
        rules: by which its weights were selected.
        candidates: what `select_weights` returned.
    """
    name = type(model).__name__
    if not candidates:
        return (
            f"{name} has no linear layer, convolution or attention layer. "
            "Give a model that has one."
        )
    first = candidates[0]
    return (
        f"no weight of {name} can be sparse by the rules {rules!r} ({first.name}: {first.reason}). "
        "Call sparsity_report for the reason of each weight; other `rules`, `include` or "
        "`exclude` may allow more."
    )


def _items(selection: Selection, weights: dict[str, LayerWeight]) -> list[str | type[nn.Module]]:
    """Return a selection as a list; a pattern that matches no weight is a mistake."""
    items = [selection] if isinstance(selection, str | type) else list(selection)
    for item in items:
        if isinstance(item, str) and not any(_matches(item, each) for each in weights.values()):
            first = ", ".join(list(weights)[:5]) or "none"
            raise InputError(
                f"No weight or layer matches {item!r}. The weights of the model are "
                f"{first}{', ...' if len(weights) > 5 else ''}."
            )
    return items


def _matches(item: str | type[nn.Module], weight: LayerWeight) -> bool:
    """Return whether a pattern or a type fits a weight or another one that it is tied to."""
    layers = [(weight.name, weight.layer_name, weight.layer)]
    layers += [(name, name.rpartition(".")[0], module) for name, module in weight.tied_to]
    if isinstance(item, type):
        return any(isinstance(layer, item) for *_, layer in layers)
    return any(fnmatchcase(name, item) for *names, _ in layers for name in names)


def eligible_weights(
    model: nn.Module,
    rules: str = "tensorrt",
    include: Selection = (),
    exclude: Selection = (),
    example: Example | None = None,
) -> dict[str, nn.Parameter]:
    """Return the weights that can run sparse, by the names of the parameters.

    Considered are linear layers, convolutions in one to three dimensions, transposed or not,
    and attention's projections, and their subclasses. A weight that layers share comes once.
    Where a layer computes its weight, this is the parameter that it computes it from.

    Args:
        model: any model.
        rules: `tensorrt`, `asp`, `cusparselt` or `any`; see `why_not_sparse`.
        include: only these of them: name patterns such as `layer4.*`, for a weight or a layer,
            and types of layers.
        exclude: not these, in the same form.
        example: what to call the model with. It shows which weights a module outside of their
            layer computes with, as a parent that standardises them does; those whose zeros it
            loses are not eligible. Without it every weight is taken to be used by its own layer.

    Raises:
        InputError: there are no such rules, a pattern fits no weight, or the example holds no
            tensor.
    """
    candidates = select_weights(model, rules, include, exclude, example)
    return {weight.name: weight.parameter for weight in candidates if weight.eligible}


@dataclass(frozen=True, repr=False)
class SparsityReport:
    """The verdict on every weight of a model, and the speed-up that it allows at most.

    `layers` is the table of `helpers.layers.layer_table` with the columns `sparse_macs` (those
    MACs that could skip the zeros of 2:4), `tied_to` (the other names of the weight), `eligible`,
    `reason` (empty for an eligible weight) and `kept`, the share of its magnitude, in per
    cent, that the 2:4 mask keeps of an eligible weight (100 if it is 2:4 already). Parameters
    outside of such layers that are multiplied by have rows of the kind "parameter".
    `parameters` counts all parameters of the model, batch norms and biases too; `macs` those of
    the whole network, and `macs_without_weight` the part that multiplies no parameter.
    """

    layers: "pd.DataFrame"
    parameters: int
    macs: int
    macs_without_weight: int
    rules: str = "tensorrt"

    @property
    def eligible(self) -> "pd.DataFrame":
        """The rows of the weights that can run sparse."""
        return self.layers[self.layers.eligible]

    @property
    def parameters_share(self) -> float:
        """Eligible weights in per cent of all parameters; 0 if there are none."""
        return _per_cent(self.eligible.parameters.sum(), self.parameters)

    @property
    def macs_share(self) -> float:
        """MACs that could be sparse in per cent of the whole network's; 0 if there are none."""
        return _per_cent(self.eligible.sparse_macs.sum(), self.macs)

    @property
    def ceiling(self) -> float:
        """The speed-up if sparse MACs took half the time, and time were spent on MACs only."""
        return 1 / (1 - self.macs_share / 100 / 2)

    def facts(self) -> dict[str, float | str]:
        """Return the totals by name, to be recorded."""
        return {
            "rules": self.rules,
            "layers": len(self.layers),
            "sparse_layers": len(self.eligible),
            "parameters_share": self.parameters_share,
            "macs_share": self.macs_share,
            "ceiling": self.ceiling,
        }

    @property
    def summary(self) -> str:
        """The totals in one line."""
        return (
            f"{len(self.eligible)} of {len(self.layers)} layers can be sparse ({self.rules}): "
            f"{self.parameters_share:.2f} % of the parameters, {self.macs_share:.2f} % of the "
            f"MACs, at most {self.ceiling:.2f}x faster"
        )

    @property
    def notes(self) -> list[str]:
        """What the totals do not show, in one line each."""
        notes = []
        if self.macs_without_weight:
            share = _per_cent(self.macs_without_weight, self.macs)
            notes.append(
                f"{share:.2f} % of the MACs multiply two activations, as the scores of attention "
                "are, and stay dense."
            )
        for weight, others in self.eligible[["weight", "tied_to"]].to_numpy():
            if others:
                notes.append(
                    f"{weight} is tied to {others}: pruning prunes both, and `exclude` keeps both "
                    "dense."
                )
        never = self.eligible.weight[self.eligible.macs == 0].tolist()
        if never:
            others = f" and {len(never) - 3} others" if len(never) > 3 else ""
            notes.append(f"This input is not multiplied by {', '.join(never[:3])}{others}.")
        return notes

    def _table(self) -> "pd.DataFrame":
        """Return the rows as they are shown."""
        import pandas as pd

        kept = self.layers.kept.map("{:.1f}".format).where(self.layers.kept.notna(), "")
        return pd.DataFrame(
            {
                "weight": self.layers.weight,
                "shape": self.layers["shape"],
                "parameters": self.layers.parameters.map("{:,}".format),
                "million MACs": (self.layers.macs / 1e6).map("{:,.1f}".format),
                "verdict": self.layers.eligible.map({True: "sparse", False: "dense"}),
                "kept, %": kept,
                "reason": self.layers.reason,
            }
        )

    def __repr__(self) -> str:
        lines = [self.summary, *self.notes]
        if not self.layers.empty:
            lines += ["", self._table().to_string(index=False)]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        lines = "".join(f"<p>{escape(line)}</p>" for line in (self.summary, *self.notes))
        return lines if self.layers.empty else lines + self._table().to_html(index=False)


def _per_cent(part: float, whole: float) -> float:
    return 100 * float(part) / float(whole) if whole else 0.0


def sparsity_report(
    model: nn.Module,
    image_shape: tuple[int, int, int] | None = None,
    example: Example | None = None,
    rules: str = "tensorrt",
    include: Selection = (),
    exclude: Selection = (),
) -> SparsityReport:
    """Return which weights of a model can run sparse, and why the others cannot.

    Shares and the speed-up are those of the whole network: every product of matrices and every
    convolution counts, whether or not a layer is known that computes it.

    Args:
        model: any model; on the device `meta` too, where magnitudes are left out.
        image_shape: channels, height and width of an input image.
        example: instead of an image, what to call the model with to count its MACs.
        rules: `tensorrt`, `asp`, `cusparselt` or `any`; see `why_not_sparse`.
        include: as `eligible_weights` takes it.
        exclude: as `eligible_weights` takes it.

    Raises:
        InputError: there are no such rules, a pattern fits no weight, an eligible weight
            has NaN or infinite values, or neither or both inputs are given.
    """
    import pandas as pd

    model = unwrapped(model)
    candidates = {c.name: c for c in select_weights(model, rules, include, exclude)}
    count = count_macs(model, model_inputs(model, image_shape, example), candidates)
    candidates = {c.name: c for c in _without_lost([*candidates.values()], count.lost)}
    table = table_of(candidates, count)
    in_order = [candidates[name] for name in table.weight]
    table["sparse_macs"] = [count.sparse[weight.name] for weight in in_order]
    table["tied_to"] = [", ".join(map(_use_in_words, weight.tied_to)) for weight in in_order]
    table["reason"] = [weight.reason for weight in in_order]
    table["eligible"] = [weight.eligible for weight in in_order]
    table["kept"] = [_kept(weight) for weight in in_order]
    others = _other_parameters(model, count)
    if others:
        others_table = pd.DataFrame(others, columns=table.columns)
        table = others_table if table.empty else pd.concat([table, others_table], ignore_index=True)
    if table.empty:  # pandas takes a column of nothing for one of objects
        numbers = dict.fromkeys(("parameters", "macs", "sparse_macs"), int)
        table = table.astype({**numbers, "eligible": bool, "kept": float})
    parameters = sum(p.numel() for p in model.parameters())
    return SparsityReport(table, parameters, count.total, count.without_weight, rules)


def _use_in_words(use: tuple[str, nn.Module]) -> str:
    name, module = use
    return f"{name} ({type(module).__name__})"


def _other_parameters(model: nn.Module, count: MacCount) -> list[dict[str, object]]:
    """Return a row for each parameter that is multiplied by and belongs to no supported layer."""
    rows = []
    for name, macs in count.parameters.items():
        module = model.get_submodule(name.rpartition(".")[0])
        parameter = model.get_parameter(name)
        rows.append(
            {
                "weight": name,
                "kind": "parameter",
                "shape": "x".join(map(str, parameter.shape)),
                "groups": 1,
                "parameters": parameter.numel(),
                "macs": macs,
                "sparse_macs": 0,
                "tied_to": "",
                "reason": f"a parameter of {type(module).__name__}, which is no supported layer",
                "eligible": False,
                "kept": float("nan"),
            }
        )
    return rows


def _kept(weight: Candidate) -> float:
    if not weight.eligible:
        return float("nan")
    tensor = weight.tensor
    if tensor.is_meta:
        return float("nan")
    return kept_magnitude_2to4(whole(tensor), weight.name, weight.input_dim)
