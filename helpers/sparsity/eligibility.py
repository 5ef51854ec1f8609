"""Which weights a target can run sparse, and why not the others.

Explained in `02_prune_2_4.ipynb`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import pandas as pd
from torch import Tensor, nn

from helpers.errors import InputError
from helpers.layers import LayerWeight, layer_table, layer_weights
from helpers.sparsity.masks import kept_magnitude, mask_2to4

Selection = str | type[nn.Module] | Iterable[str | type[nn.Module]]


def _any(weight: LayerWeight) -> str:
    """Take whatever the pattern itself fits."""
    return _why_not_in_fours(weight.input_channels, weight.groups)


def _why_not_in_fours(channels: int, groups: int) -> str:
    if channels % 4 == 0:
        return ""
    in_group = " in a group" if groups > 1 else ""
    plural = "s" if channels > 1 else ""
    return f"{channels} input channel{plural}{in_group}: no multiple of 4"


def _tensorrt(weight: LayerWeight) -> str:
    """Take what TensorRT's documentation and maintainers say it has sparse kernels for."""
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


def _asp(weight: LayerWeight) -> str:
    """Take what NVIDIA's ASP takes, so that results can be compared with published ones."""
    if weight.transposed:
        return "transposed: not among ASP's layers"
    outputs, inputs = weight.tensor.shape[:2]
    if outputs % 8:
        return f"{outputs} output channels: no multiple of 8"
    if inputs % 16:
        return f"{inputs} input channels: no multiple of 16"
    return ""


def _cusparselt(weight: LayerWeight) -> str:
    """Take the matrix products that cuSPARSELt takes, in the type that the weight has."""
    rows, columns, *kernel = weight.tensor.shape
    if weight.transposed or weight.groups > 1 or any(size > 1 for size in kernel):
        return "no matrix product"
    return why_not_cusparselt(rows, columns, weight.tensor.element_size())


def why_not_cusparselt(rows: int, columns: int, element_size: int = 2) -> str:
    """Return why cuSPARSELt will not multiply by a sparse matrix; empty if it may.

    Args:
        rows: of the weight, its outputs.
        columns: of the weight, its inputs.
        element_size: bytes of one of its numbers.
    """
    step = 32 if element_size == 1 else 16
    if rows % step or columns % step:
        return f"{rows} rows, {columns} columns: no multiples of {step}"
    return ""


_TARGETS: dict[str, Callable[[LayerWeight], str]] = {
    "tensorrt": _tensorrt,
    "asp": _asp,
    "cusparselt": _cusparselt,
    "any": _any,
}


def why_not_sparse(weight: LayerWeight, target: str = "tensorrt") -> str:
    """Return why a target will not run a weight sparse; empty if it may.

    Args:
        weight: as `helpers.layers.layer_weights` returns it.
        target: `tensorrt`; `asp`, the layers that NVIDIA's ASP prunes; `cusparselt`, matrix
            products in PyTorch (FP32 weights are taken for FP16 ones); `any`, whatever has its
            input channels in fours.

    Raises:
        InputError: there is no such target.

    Source: TensorRT documentation, "Structured Sparsity" (groups of four input channels,
    FP16 or INT8), and NVIDIA/TensorRT#4054 (no sparse kernels for grouped convolutions);
    ASP in NVIDIA/apex, apex/contrib/sparsity; torch.sparse.semi_structured (cuSPARSELt).
    Explained in `02_prune_2_4.ipynb`.
    """
    if target not in _TARGETS:
        raise InputError(f"There is no target {target!r}; there are {', '.join(_TARGETS)}.")
    if not weight.is_parameter:
        return "computed from other parameters"
    return _TARGETS[target](weight)


def why_not_each(
    model: nn.Module, target: str = "tensorrt", include: Selection = (), exclude: Selection = ()
) -> dict[str, str]:
    """Return why each weight stays dense, by its name; empty where it can be sparse.

    Arguments and errors are those of `eligible_weights`.
    """
    weights = layer_weights(model)
    include, exclude = _items(include, weights), _items(exclude, weights)
    reasons = {}
    for name, weight in weights.items():
        reason = why_not_sparse(weight, target)
        if any(_matches(item, weight) for item in exclude):
            reason = "excluded"
        elif include and not any(_matches(item, weight) for item in include):
            reason = "not included"
        reasons[name] = reason
    return reasons


def _items(selection: Selection, weights: dict[str, LayerWeight]) -> list[str | type[nn.Module]]:
    """Return a selection as a list; a pattern that fits no weight is a mistake."""
    items = [selection] if isinstance(selection, str | type) else list(selection)
    for item in items:
        if isinstance(item, str) and not any(_matches(item, each) for each in weights.values()):
            raise InputError(
                f"No weight and no layer is called {item!r}. "
                f"The network has {', '.join(list(weights)[:5])}, ..."
            )
    return items


def _matches(item: str | type[nn.Module], weight: LayerWeight) -> bool:
    if isinstance(item, type):
        return isinstance(weight.layer, item)
    return fnmatchcase(weight.name, item) or fnmatchcase(weight.layer_name, item)


def eligible_weights(
    model: nn.Module, target: str = "tensorrt", include: Selection = (), exclude: Selection = ()
) -> dict[str, nn.Parameter]:
    """Return the weights that a target may run sparse, by the names of the parameters.

    Looked at are linear layers, convolutions in one to three dimensions, transposed or not,
    and attention's projections, of subclasses too. A weight that layers share comes once.

    Args:
        model: any network.
        target: `tensorrt`, `asp`, `cusparselt` or `any`; see `why_not_sparse`.
        include: only these of them: name patterns such as `layer4.*`, for a weight or a layer,
            and types of layers.
        exclude: not these, in the same form.

    Raises:
        InputError: there is no such target, or a pattern fits no weight.

    Explained in `02_prune_2_4.ipynb`.
    """
    reasons = why_not_each(model, target, include, exclude)
    return {
        name: weight.tensor for name, weight in layer_weights(model).items() if not reasons[name]
    }


@dataclass(frozen=True, repr=False)
class SparsityReport:
    """A target's verdict on every weight of a network, and what it allows at the most.

    `layers` is the table of `helpers.layers.layer_table` with the columns `eligible`,
    `reason` (empty for an eligible weight) and `kept`, how much of its magnitude in per cent
    the 2:4 mask keeps of an eligible weight (100 if it is 2:4 already); `parameters` counts
    all parameters of the network, batch norms and biases too.
    """

    layers: pd.DataFrame
    parameters: int
    target: str = "tensorrt"

    @property
    def eligible(self) -> pd.DataFrame:
        """The rows of the weights that the target may run sparse."""
        return self.layers[self.layers.eligible]

    @property
    def parameters_share(self) -> float:
        """Eligible weights in per cent of all parameters."""
        return 100 * float(self.eligible.parameters.sum()) / self.parameters

    @property
    def macs_share(self) -> float:
        """MACs with eligible weights in per cent of all MACs."""
        return 100 * float(self.eligible.macs.sum() / self.layers.macs.sum())

    @property
    def ceiling(self) -> float:
        """The speed-up if sparse layers took half the time and only MACs cost any."""
        return 1 / (1 - self.macs_share / 100 / 2)

    def facts(self) -> dict[str, float | str]:
        """Return the totals, as an artifact's sidecar records them."""
        return {
            "target": self.target,
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
            f"{len(self.eligible)} of {len(self.layers)} layers can be sparse ({self.target}): "
            f"{self.parameters_share:.2f} % of the parameters, {self.macs_share:.2f} % of the "
            f"MACs, at most {self.ceiling:.2f}x faster"
        )

    def _table(self) -> pd.DataFrame:
        """Return the rows as they are shown."""
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
        return f"{self.summary}\n\n{self._table().to_string(index=False)}"

    def _repr_html_(self) -> str:
        return f"<p>{self.summary}</p>" + self._table().to_html(index=False)


def sparsity_report(
    model: nn.Module,
    image_shape: tuple[int, int, int] | None = None,
    example: Tensor | tuple[Tensor, ...] | None = None,
    target: str = "tensorrt",
    include: Selection = (),
    exclude: Selection = (),
) -> SparsityReport:
    """Return which weights of a network a target may run sparse, and why not the others.

    Args:
        model: any network; on the device `meta` too, where magnitudes are left out.
        image_shape: channels, height and width of an input image.
        example: instead of an image, what to call the network with to count its MACs.
        target: `tensorrt`, `asp`, `cusparselt` or `any`; see `why_not_sparse`.
        include: as `eligible_weights` takes it.
        exclude: as `eligible_weights` takes it.

    Raises:
        InputError: there is no such target, a pattern fits no weight, an eligible weight
            has NaN or infinite values, or neither or both inputs are given.

    Explained in `02_prune_2_4.ipynb`.
    """
    reasons = why_not_each(model, target, include, exclude)
    weights = layer_weights(model)
    table = layer_table(model, image_shape, example)
    table["reason"] = [reasons[name] for name in table.weight]
    table["eligible"] = table.reason == ""
    table["kept"] = [
        _kept(weights[name]) if eligible else float("nan")
        for name, eligible in zip(table.weight, table.eligible, strict=True)
    ]
    return SparsityReport(table, sum(p.numel() for p in model.parameters()), target)


def _kept(weight: LayerWeight) -> float:
    if weight.tensor.is_meta:
        return float("nan")
    tensor = weight.tensor.detach()
    return kept_magnitude(tensor, mask_2to4(tensor, weight.name, weight.input_dim))
