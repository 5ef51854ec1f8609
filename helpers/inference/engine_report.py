"""What an engine build made, and what it said about sparsity.

Explained in `05_build_engine.ipynb`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from helpers.inference.engine_log import is_sparse_tactic, onnx_nodes
from helpers.inference.errors import EngineError

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class EngineReport:
    """What the builder made, and what it said about sparsity."""

    builder: str
    version: str
    built_for: str  # the GPU's name, or "compute capability 8.6"
    sparse_flag: bool
    optimization_level: int
    megabytes: float
    seconds: float
    # By the builder's log; None where it does not say. Some versions count but do not name.
    eligible_count: int | None
    chosen_count: int | None
    eligible: tuple[str, ...] | None
    chosen: tuple[str, ...] | None
    # Why an eligible layer was not chosen, as far as its log and shape tell.
    reasons: dict[str, str]
    # The kernel of each layer in the finished engine; None where it is chosen at run time.
    tactics: dict[str, str] | None
    log: tuple[str, ...]

    def __repr__(self) -> str:
        sparse = "no sparsity report"
        if self.eligible_count is not None:
            sparse = f"{self.chosen_count or 0} of {self.eligible_count} eligible layers sparse"
        if self.tactics is not None:
            sparse += f", {len(self.sparse_tactics)} sparse by the engine's tactic names"
        return (
            f"{self.builder} {self.version} for {self.built_for}: {self.megabytes:.2f} MB "
            f"in {self.seconds:.1f} s, {sparse}"
        )

    def facts(self) -> dict[str, Any]:
        """Return what the engine's sidecar records."""
        return {key: value for key, value in vars(self).items() if key != "log"}

    @property
    def sparse_tactics(self) -> dict[str, str]:
        """The layers of the finished engine whose kernel is sparse by its name."""
        return {
            layer: name for layer, name in (self.tactics or {}).items() if is_sparse_tactic(name)
        }

    def layers(self) -> "pd.DataFrame":
        """Return one row for each eligible layer: is its kernel sparse, and if not, why?

        The columns are `layer`, `sparse kernel` (by the builder's log), `tactic` (the kernel's
        name in the finished engine; empty where it is not known) and `reason`.

        Raises:
            EngineError: the builder printed nothing about sparsity, or no names.
        """
        if self.eligible_count is None:
            raise EngineError(f"{self.builder} {self.version} prints no sparsity report.")
        if self.eligible is None or self.chosen is None:
            raise EngineError(
                f"{self.builder} {self.version} counts eligible layers ({self.eligible_count}) "
                f"and chosen ones ({self.chosen_count}), but does not name each. "
                "See `sparse_tactics` for the layers that run sparse."
            )
        import pandas as pd

        return pd.DataFrame(
            {
                "layer": self.eligible,
                "sparse kernel": [name in self.chosen for name in self.eligible],
                "tactic": [self._tactic(name) for name in self.eligible],
                "reason": [self.reasons.get(name, "") for name in self.eligible],
            }
        )

    def disagreements(self) -> tuple[str, ...]:
        """Return the eligible layers on which the log and the finished engine disagree.

        The log tells which layers were given a sparse kernel; the names of the engine's
        tactics must confirm it. A layer whose tactic is not known counts as confirmed.

        Raises:
            EngineError: as `layers`.
        """
        table = self.layers()
        differs = (table.tactic != "") & (
            table.tactic.map(is_sparse_tactic) != table["sparse kernel"]
        )
        return tuple(table.layer[differs])

    def _tactic(self, layer: str) -> str:
        """Return a layer's kernel; log and engine may differ on what is fused into the layer."""
        tactics = {name: tactic for name, tactic in (self.tactics or {}).items() if tactic}
        if layer in tactics:
            return tactics[layer]
        nodes = onnx_nodes(layer)
        return next((tactics[name] for name in tactics if nodes & onnx_nodes(name)), "")
