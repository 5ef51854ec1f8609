"""Which weights of an ONNX file can run sparse, which are 2:4, and what that is worth at most.

`python -m helpers report` shows it (docs/cli.md).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnx import helper

from helpers.errors import InputError
from helpers.files import shown
from helpers.sparsity.eligibility import WeightShape, why_not_shape
from helpers.sparsity.masks import holds_2to4
from helpers.sparsity.onnx_constants import Scope
from helpers.sparsity.onnx_file import OnnxFile
from helpers.sparsity.onnx_inputs import Shape, complete_shapes, onnx_inputs
from helpers.sparsity.onnx_weights import NodeWeight, weights_with_scopes

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = [
    "weight", "node", "op", "shape", "input_channels", "groups", "is_2to4", "eligible", "reason",
    "macs", "share",
]  # fmt: skip


@dataclass(frozen=True)
class FileWeight:
    """A product of a file with its verdict: `reason` says why it stays dense; empty if it need not.

    `product` is without its value: those of a large file need not be in memory all at once.
    """

    product: NodeWeight
    scope: Scope
    shape: Shape  # output channels first; empty if it is not known
    is_2to4: bool
    reason: str


def select_file_weights(
    file: OnnxFile,
    rules: str = "tensorrt",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    shapes: Mapping[str, Shape] | None = None,
) -> list[FileWeight]:
    """Return every product of a file with its verdict, in the order of the nodes.

    Args:
        file: the file.
        rules: `tensorrt`, `asp`, `cusparselt` or `any`; see `why_not_sparse`.
        include: only weights that match one of these patterns, such as `layer4.*`, by their
            own name or their node's.
        exclude: no weights that match one of these patterns.
        shapes: of all inputs, to count MACs; they are not counted unless given.

    Raises:
        InputError: there are no such rules, a pattern matches no weight, or the file is damaged.
    """
    why_not_shape(WeightShape(8, 16), rules)  # a mistake shows in a file without weights too
    types = {tensor.name: tensor.data_type for tensor in file.model.graph.initializer}
    found = []
    for product, scope in weights_with_scopes(file, shapes, with_macs=shapes is not None):
        names = (product.weight, product.node)
        if any(_matches(pattern, names) for pattern in exclude):
            reason = "excluded"
        elif include and not any(_matches(pattern, names) for pattern in include):
            reason = "not included"
        else:
            reason, _ = product.verdict(rules, _element_size(product, types))
        value = product.value
        found.append(
            FileWeight(
                replace(product, value=None),
                scope,
                () if value is None else value.shape,
                product.in_fours and value is not None and holds_2to4(value != 0),
                reason,
            )
        )
    _require_matches((*include, *exclude), found, file.path)
    return found


def _require_matches(patterns: Sequence[str], found: Sequence[FileWeight], path: Path) -> None:
    """Refuse a pattern that matches no weight: it is a mistake."""
    names = [(each.product.weight, each.product.node) for each in found]
    for pattern in patterns:
        if not any(_matches(pattern, each) for each in names):
            first = ", ".join(weight for weight, _ in names[:5]) or "none"
            raise InputError(
                f"No weight or node of {shown(path)} matches {pattern!r}. Its weights are "
                f"{first}{', ...' if len(names) > 5 else ''}."
            )


def _matches(pattern: str, names: tuple[str, str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _element_size(product: NodeWeight, types: Mapping[str, int]) -> int:
    """Return the bytes of a number of a weight as it is stored, before it is dequantised."""
    if product.sources and product.sources[0] in types:
        return helper.tensor_dtype_to_np_dtype(types[product.sources[0]]).itemsize
    return 4 if product.value is None else product.value.dtype.itemsize


@dataclass(frozen=True, eq=False)
class OnnxReport:
    """The verdict on every product of a file, and the speed-up that 2:4 allows at most.

    `weights` has the columns `weight` and `node` (names in the file), `op`, `shape` (output
    channels first), `input_channels` (of each group), `groups`, `is_2to4`, `eligible`, `reason`
    (why it stays dense; empty for an eligible weight), `macs` for inputs of the shapes `shapes`,
    and `share` of all MACs in per cent. Both are missing where the shape of a product does not
    follow from those of the inputs; such products are no part of any share.
    """

    weights: "pd.DataFrame"
    shapes: Mapping[str, Shape]
    rules: str

    @property
    def macs(self) -> int:
        """The multiply-accumulates of all products whose shape is known."""
        return int(self.weights.macs.sum())

    @property
    def eligible_share(self) -> float:
        """MACs with eligible weights in per cent of all that are known; 0 if none are."""
        eligible = self.weights[self.weights.eligible]
        return 100 * float(eligible.macs.sum()) / self.macs if self.macs else 0.0

    @property
    def ceiling(self) -> float:
        """The speed-up if sparse products took half the time, and time were spent on MACs only."""
        return 1 / (1 - self.eligible_share / 100 / 2)

    @property
    def not_counted(self) -> dict[str, int]:
        """How many products have unknown MACs, by operator."""
        unknown = self.weights[self.weights.macs.isna()]
        return {str(op): int(count) for op, count in unknown.op.value_counts().items()}

    def facts(self) -> dict[str, Any]:
        """Return the totals by name."""
        eligible = self.weights[self.weights.eligible]
        return {
            "rules": self.rules,
            "shapes": dict(self.shapes),
            "products": len(self.weights),
            "eligible": len(eligible),
            "eligible_2to4": int(eligible.is_2to4.sum()),
            "macs": self.macs,
            "macs_share": self.eligible_share,
            "ceiling": self.ceiling,
            "not_counted": self.not_counted,
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return the table as a list of dictionaries, with None for what is not known."""
        table = self.weights.astype({"macs": object, "input_channels": object})
        return table.where(self.weights.notna(), None).to_dict("records")

    @property
    def summary(self) -> str:
        """The totals in a few sentences."""
        eligible = self.weights[self.weights.eligible]
        inputs = ", ".join(f"{name} {'x'.join(map(str, s))}" for name, s in self.shapes.items())
        text = (
            f"{len(eligible)} of {len(self.weights)} products can be sparse ({self.rules}), and "
            f"{int(eligible.is_2to4.sum())} of them are 2:4. They are {self.eligible_share:.2f} % "
            f"of {self.macs / 1e6:,.1f} million MACs for {inputs or 'no input'}: at most "
            f"{self.ceiling:.2f}x faster."
        )
        if self.not_counted:
            listed = ", ".join(f"{count} x {op}" for op, count in self.not_counted.items())
            text += (
                f" The arithmetic of {listed} is not known and not counted, so the ceiling is "
                "that of the rest."
            )
        return text

    def __repr__(self) -> str:
        import pandas as pd

        if self.weights.empty:
            return f"{self.summary}"
        known = self.weights.macs.notna()
        table = pd.DataFrame(
            {
                "weight": self.weights.weight,
                "op": self.weights.op,
                "shape": ["x".join(map(str, shape)) or "?" for shape in self.weights["shape"]],
                "inputs": self.weights.input_channels.astype(str).replace("<NA>", ""),
                "2:4": self.weights.is_2to4.map({True: "yes", False: "no"}),
                "verdict": self.weights.eligible.map({True: "sparse", False: "dense"}),
                "million MACs": (self.weights.macs / 1e6).map("{:,.1f}".format).where(known, "?"),
                "share, %": self.weights.share.map("{:.2f}".format).where(known, "?"),
                "reason": self.weights.reason,
            }
        )
        return f"{self.summary}\n\n{table.to_string(index=False)}"


def onnx_report(
    path: Path,
    rules: str = "tensorrt",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    shapes: Mapping[str, Shape] | None = None,
    batch: int = 1,
) -> OnnxReport:
    """Return which weights of an ONNX file can run sparse, and why the others cannot.

    Args:
        path: an ONNX file, with its external data where it says.
        rules: as `select_file_weights` takes them.
        include: as `select_file_weights` takes it.
        exclude: as `select_file_weights` takes it.
        shapes: of inputs that the file leaves open, as `parse_shapes` returns them.
        batch: the size of an open first dimension.

    Raises:
        InputError: the file cannot be read, or an argument does not fit it.
    """
    import pandas as pd

    file = OnnxFile(path)
    complete = complete_shapes(onnx_inputs(file.model, path), shapes or {}, path, batch)
    rows = [
        {
            "weight": each.product.weight,
            "node": each.product.node,
            "op": each.product.op,
            "shape": each.shape,
            "input_channels": each.shape[1] if len(each.shape) > 1 else None,
            "groups": each.product.groups,
            "is_2to4": each.is_2to4,
            "eligible": not each.reason,
            "reason": each.reason,
            "macs": each.product.macs,
        }
        for each in select_file_weights(file, rules, include, exclude, complete)
    ]
    table = pd.DataFrame(rows, columns=COLUMNS[:-1])
    # "Int64" has a place for what is not known.
    table = table.astype({"macs": "Int64", "input_channels": "Int64"})
    total = table.macs.sum()
    table["share"] = 100 * table.macs.astype(float) / float(total) if total else float("nan")
    table = table.astype({"is_2to4": bool, "eligible": bool})
    return OnnxReport(table[COLUMNS], complete, rules)
