"""Which layers can run on Sparse Tensor Cores, and why not the others.

The rules are TensorRT's. Explained in `02_prune_2_4.ipynb`.
"""

from dataclasses import dataclass

import pandas as pd
from torch import nn

from helpers.models import layer_table


def why_not_sparse(layer: nn.Module) -> str:
    """Return why TensorRT will not run a layer sparse; empty if it may.

    Args:
        layer: an `nn.Conv2d` or `nn.Linear`.

    Source: TensorRT developer guide, "Structured Sparsity" (groups of four input
    channels); NVIDIA/TensorRT#4054 (no sparse kernels for grouped convolutions).
    """
    if getattr(layer, "groups", 1) > 1:
        return "grouped: TensorRT has no sparse kernel"
    if layer.weight.shape[1] % 4:
        return f"{layer.weight.shape[1]} input channels: no multiple of 4"
    return ""


def eligible_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the convolutions and linear layers that TensorRT may run sparse, by name."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Conv2d | nn.Linear) and not why_not_sparse(layer)
    }


@dataclass(frozen=True, repr=False)
class SparsityReport:
    """TensorRT's verdict on every layer of a network, and what it allows at the most.

    `layers` is the table of `helpers.models.layer_table` with the columns `eligible`
    and `reason` (empty for an eligible layer); `parameters` counts all parameters of
    the network, batch norms and biases too.
    """

    layers: pd.DataFrame
    parameters: int

    @property
    def eligible(self) -> pd.DataFrame:
        """The rows of the layers that TensorRT may run sparse."""
        return self.layers[self.layers.eligible]

    @property
    def parameters_share(self) -> float:
        """Eligible weights in per cent of all parameters."""
        return 100 * float(self.eligible.parameters.sum()) / self.parameters

    @property
    def macs_share(self) -> float:
        """MACs of the eligible layers in per cent of all MACs."""
        return 100 * float(self.eligible.macs.sum() / self.layers.macs.sum())

    @property
    def ceiling(self) -> float:
        """The speed-up if sparse layers took half the time and only MACs cost any."""
        return 1 / (1 - self.macs_share / 100 / 2)

    def facts(self) -> dict[str, float]:
        """Return the totals, as an artifact's sidecar records them."""
        return {
            "layers": len(self.layers),
            "sparse_layers": len(self.eligible),
            "parameters_share": self.parameters_share,
            "macs_share": self.macs_share,
            "ceiling": self.ceiling,
        }

    def __repr__(self) -> str:
        return (
            f"{len(self.eligible)} of {len(self.layers)} layers can be sparse: "
            f"{self.parameters_share:.2f} % of the parameters, {self.macs_share:.2f} % of the "
            f"MACs, at most {self.ceiling:.2f}x faster"
        )

    def _repr_html_(self) -> str:
        return f"<p>{self}</p>" + self.layers.to_html(index=False)


def sparsity_report(model: nn.Module, image_shape: tuple[int, int, int]) -> SparsityReport:
    """Return which layers of a network TensorRT may run sparse, and why not the others.

    Args:
        model: any network.
        image_shape: channels, height and width of an input image.
    """
    table = layer_table(model, image_shape)
    layers = dict(model.named_modules())
    reasons = [why_not_sparse(layers[name]) for name in table["layer"]]
    table["eligible"] = [not reason for reason in reasons]
    table["reason"] = reasons
    return SparsityReport(table, sum(parameter.numel() for parameter in model.parameters()))
