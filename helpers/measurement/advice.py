"""What 2:4 will buy on a GPU, predicted before anybody retrains.

Explained in `07_sparse_tensor_cores.ipynb`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from numbers import Integral
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from helpers.errors import HelpersError
from helpers.layers import layer_kind
from helpers.measurement.rates import AdviceError, Rates
from helpers.measurement.roofline import DATATYPES, TWO_OF_FOUR, Datatype
from helpers.measurement.trace import _Inputs, _Kernel, _run, _tensors
from helpers.sparsity.eligibility import NOT_A_PRODUCT, why_not_cusparselt, why_not_sparse

# --- what to expect ---


LEAST_GAIN = 1.01  # a layer that gains less is told as one that does not


@dataclass(frozen=True, eq=False, repr=False)
class Advice:
    """What 2:4 is predicted to buy for one network, batch and datatype.

    `layers` has one row for each time that a layer runs: `layer` (its name), `kind`, the sizes
    `m`, `n`, `k` of its product (of each of `groups`), `dense_ms`, `sparse_ms` (NaN where it
    cannot be sparse), `gain` (how many times faster it becomes; 1 where the dense kernel
    stays), `bound` (what the dense kernel waits for: arithmetic, memory or launch) and `reason`
    (why it stays dense; empty where it does not). `rest_ms` is all that is no layer.
    `source`, `measured` and `checked` are those of `Rates`.
    """

    layers: pd.DataFrame
    rest_ms: float
    batch: int
    datatype: str
    source: str
    measured: bool
    checked: pd.DataFrame

    @property
    def dense_ms(self) -> float:
        """Predicted milliseconds of the dense network."""
        return float(self.layers.dense_ms.sum()) + self.rest_ms

    @property
    def sparse_ms(self) -> float:
        """Predicted milliseconds with each layer in the faster of its kernels."""
        return float(self.layers[["dense_ms", "sparse_ms"]].min(axis=1).sum()) + self.rest_ms

    @property
    def speedup(self) -> float:
        """How many times faster the whole network becomes; never below 1."""
        return self.dense_ms / self.sparse_ms

    @property
    def verdict(self) -> str:
        """The prediction, where it comes from and how far it can be trusted, in one line."""
        said = f"{self.speedup:.2f}x at batch {self.batch} in {self.datatype}"
        if not self.measured:
            return (
                f"{said} if dense and sparse kernels both reached the floors of {self.source}; "
                "not compared with any measurement"
            )
        said += f" from {self.source}"
        if self.checked.empty:
            return f"{said}; never compared with a measurement end to end"
        worst = 100 * (self.checked.predicted / self.checked.measured - 1).abs().max()
        count = len(self.checked)
        return (
            f"{said}; end to end such predictions were off by at most {worst:.0f} % "
            f"({count} measurement{'s' * (count > 1)})"
        )

    @property
    def _where(self) -> str:
        """Say how much of the time cannot become less, and why if nothing can."""
        if self.layers.empty:
            return (
                "No layer gains: whatever this network multiplies is in operations that are not "
                "counted as layers, and so cannot be pruned here."
            )
        stuck = self.layers[self.layers.gain < LEAST_GAIN]
        if len(stuck) == len(self.layers):
            reasons = stuck.reason.replace("", "its sparse kernel gains less").value_counts()
            listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
            return f"No layer gains 1 % or more: {listed}."
        idle = float(stuck.dense_ms.sum())
        text = (
            f"Of {self.dense_ms:.3g} ms dense, {100 * (idle + self.rest_ms) / self.dense_ms:.0f} % "
            f"is in work that gains less than 1 %: {idle:.3g} ms in {len(stuck)} of "
            f"{len(self.layers)} layers, {self.rest_ms:.3g} ms outside of layers."
        )
        if self.measured and (stuck.reason == NOT_A_PRODUCT).any():
            text += " Convolutions that are no matrix product count at the best dense rate."
        return text

    def _best(self) -> pd.DataFrame:
        """Return the layers that save the most time, as they are shown."""
        gaining = self.layers[self.layers.gain >= LEAST_GAIN]
        saved = (gaining.dense_ms - gaining.sparse_ms).sort_values(ascending=False, kind="stable")
        best = gaining.loc[saved.index[:5]]
        return pd.DataFrame(
            {
                "layers that gain most": best.layer,
                "m x n x k": [f"{m} x {n} x {k}" for m, n, k in best[["m", "n", "k"]].to_numpy()],
                "dense, ms": best.dense_ms.map("{:.3g}".format),
                "sparse, ms": best.sparse_ms.map("{:.3g}".format),
                "gain": best.gain.map("{:.2f}x".format),
                "bound": best.bound,
            }
        )

    def __repr__(self) -> str:
        table = self._best()
        lines = [self.verdict, self._where]
        return "\n".join(lines if table.empty else [*lines, "", table.to_string(index=False)])

    def _repr_html_(self) -> str:
        table = self._best()
        text = "".join(f"<p>{escape(line)}</p>" for line in (self.verdict, self._where))
        return text if table.empty else text + table.to_html(index=False)


def advise(
    model: nn.Module,
    rates: Rates,
    image_shape: tuple[int, int, int] | None = None,
    example: Tensor | tuple[Any, ...] | dict[str, Any] | None = None,
    batch: int = 1,
    datatype: str = "FP16",
) -> Advice:
    """Return how much faster 2:4 is predicted to make a network, before it is pruned.

    The network runs once on shapes alone, which takes no memory and leaves it as it was.
    The time of a batch is the sum over its kernels, one after the other.

    A layer is a linear layer, a projection of attention or a convolution. Those that are one
    product of matrices take the time that the rates give this product; if cuSPARSELt takes
    their weight, the faster of dense and sparse. All other convolutions stay dense, and are
    counted by the roofline: at the best dense rate that the GPU reached in this datatype, or
    the time to move their numbers, if that is longer. A layer's outputs count in the width of
    its inputs, since engines in FP8 and INT8 write them so; a measured product has its own
    width, `helpers.gemm.Datatype.output`. Batch norms right after a layer are folded into it
    and cost nothing; so does a ReLU right after a layer, a batch norm or an addition.

    The rest is counted by the roofline too, each operation as one kernel that reads and
    writes two bytes for each number: pooling, normalisation, activations, softmax, additions,
    copies, and attention, which is one kernel if the network calls
    `scaled_dot_product_attention`. A layer that computes its weight from other parameters
    at each call counts with the rest. Views, dropout and what depends on weights alone are
    free, and so is the way of the input to the GPU.

    Args:
        model: any network, on any device; pruned or not.
        rates: of the GPU.
        image_shape: channels, height and width of an input image.
        example: instead of an image, what to call the network with: a tensor, several in a
            tuple, or named ones in a dictionary; only their shapes count.
        batch: how many images; an example has a batch of its own.
        datatype: a name in `helpers.gemm.DATATYPES` whose pattern is 2:4.

    Raises:
        AdviceError: neither or both of `image_shape` and `example` are given, they are empty,
            the network does not run on them, or there are no rates in this datatype.

    Explained in `07_sparse_tensor_cores.ipynb`.
    """
    kind = _datatype(datatype)
    try:
        inputs = _inputs(model, image_shape, example, batch)
        kernels = _run(model, inputs)
    except HelpersError:
        raise
    except Exception as error:  # a network may raise anything
        first, *_ = str(error).splitlines() or [""]
        raise AdviceError(
            f"The network does not run on these shapes ({type(error).__name__}: {first}). Give "
            "it inputs that it takes. Since it runs on shapes alone, its steps must not depend "
            "on the numbers in them."
        ) from error
    if not any(kernel.read or kernel.written for kernel in kernels):
        raise AdviceError("The network neither multiplies nor moves anything; give it layers.")
    rows = [_row(kernel, rates, kind) for kernel in kernels if kernel.weight]
    rest = [
        max(rates.limits(each.operations, 2 * (each.read + each.written), datatype).values())
        for each in kernels
        if not each.weight
    ]
    columns = "layer kind m n k groups dense_ms sparse_ms gain bound reason".split()
    return Advice(
        pd.DataFrame(rows, columns=columns),
        float(sum(rest)),
        _batch(inputs),
        datatype,
        rates.source,
        rates.measured,
        rates.checked[rates.checked.datatype == datatype],
    )


def advise_batches(
    model: nn.Module,
    rates: Rates,
    image_shape: tuple[int, int, int],
    batches: Sequence[int],
    datatype: str = "FP16",
) -> pd.DataFrame:
    """Return what `advise` predicts for each batch size, in milliseconds.

    Returns:
        The columns `batch`, `dense_ms`, `sparse_ms` and `speedup`.

    Raises:
        AdviceError: as `advise` does.
    """
    columns = ["batch", "dense_ms", "sparse_ms", "speedup"]
    advices = [advise(model, rates, image_shape, batch=n, datatype=datatype) for n in batches]
    return pd.DataFrame(
        [[getattr(advice, name) for name in columns] for advice in advices], columns=columns
    )


def _datatype(name: str) -> Datatype:
    if name not in TWO_OF_FOUR:
        raise AdviceError(
            f"There is no 2:4 in {name!r}; take {', '.join(TWO_OF_FOUR)}. "
            "In TF32 the hardware wants one of every two."
        )
    return DATATYPES[name]


def _inputs(
    model: nn.Module,
    image_shape: tuple[int, int, int] | None,
    example: Any,
    batch: int,
) -> _Inputs:
    if (image_shape is None) == (example is None):
        raise AdviceError(
            "Give either `image_shape`, such as (3, 224, 224), or `example`, what the network "
            "is called with."
        )
    if image_shape is None:
        return _arguments(example)
    shape = tuple(image_shape) if isinstance(image_shape, Sequence) else (image_shape,)
    if not all(map(_is_count, (batch, *shape))):
        raise AdviceError(
            f"There are no images of shape {image_shape!r} in batches of {batch!r}: channels, "
            "height, width and batch are whole numbers of at least 1."
        )
    dtype = next((parameter.dtype for parameter in model.parameters()), torch.float32)
    return (torch.empty(batch, *shape, dtype=dtype, device="meta"),), {}


def _is_count(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value > 0


def _arguments(example: Any) -> _Inputs:
    match example:
        case dict():
            inputs = (), example
        case tuple() | list():
            inputs = tuple(example), {}
        case _:
            inputs = (example,), {}
    if not _batch(inputs):
        raise AdviceError(
            "`example` holds no tensor with a batch of at least 1. Give what the network is "
            "called with: a tensor, several in a tuple, or named ones in a dictionary."
        )
    return inputs


def _batch(inputs: _Inputs) -> int:
    """Return the length of the first tensor that has one; 0 if there is none."""
    return next((len(tensor) for tensor in _tensors(inputs) if tensor.ndim), 0)


def _row(kernel: _Kernel, rates: Rates, datatype: Datatype) -> dict[str, Any]:
    """Return what the table says of a layer."""
    weight, size = kernel.weight, (kernel.m, kernel.n, kernel.k, datatype.name)
    reason = why_not_sparse(weight, "cusparselt") or why_not_cusparselt(
        *weight.tensor.shape[:2], datatype.input_bytes
    )
    moved = datatype.input_bytes * (kernel.read + kernel.written)
    limits = rates.limits(kernel.operations, moved, datatype.name)
    dense = rates.product_ms(*size, sparse=False) if kernel.is_product else max(limits.values())
    sparse = math.nan if reason else rates.product_ms(*size, sparse=True)
    if sparse >= dense:
        reason = "its sparse kernel is not faster"
    return {
        "layer": weight.layer_name or weight.name,
        "kind": layer_kind(weight.layer),
        "m": kernel.m,
        "n": kernel.n,
        "k": kernel.k,
        "groups": weight.groups,
        "dense_ms": dense,
        "sparse_ms": sparse,
        "gain": 1.0 if reason else dense / sparse,
        "bound": max(limits, key=limits.get),
        "reason": reason,
    }
