"""How much faster 2:4 is predicted to make a model on a GPU, before it is retrained.

Explained in `07_sparse_tensor_cores.ipynb`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from helpers.errors import HelpersError, first_line
from helpers.layers import Example, ModelInputs, batch_of, layer_kind, model_inputs
from helpers.measurement.calibration import Errors
from helpers.measurement.rates import AdviceError, Rates
from helpers.measurement.roofline import DATATYPES, TWO_OF_FOUR, Datatype
from helpers.measurement.trace import TracedKernel, TracedLayer, trace_kernels
from helpers.sparsity.eligibility import NOT_A_PRODUCT, why_not_cusparselt, why_not_sparse

LAYER_COLUMNS = [
    "layer", "kind", "m", "n", "k", "groups", "dense_ms", "sparse_ms", "gain", "bound", "reason",
]  # fmt: skip
LEAST_GAIN = 1.01  # a layer that gains less is reported as no gain


@dataclass(frozen=True, eq=False, repr=False)
class Advice:
    """The predicted effect of 2:4 for one model, batch size and datatype.

    `layers` has one row for each time that a layer runs: `layer` (its name), `kind`, the sizes
    `m`, `n`, `k` of its product (of each of `groups`), `dense_ms`, `sparse_ms` (NaN where it
    cannot be sparse), `gain` (how many times faster it becomes; 1 where it stays dense),
    `bound` (what limits the dense kernel: arithmetic, memory or launch) and `reason` (why it
    stays dense; empty where it becomes sparse). `rest_ms` is the time of everything outside
    of layers. `source`, `measured` and `checked` are those of `Rates`; `errors` are those of its
    calibration, or None.
    """

    layers: pd.DataFrame
    rest_ms: float
    batch: int
    datatype: str
    source: str
    measured: bool
    checked: pd.DataFrame
    errors: Errors | None = None

    @property
    def dense_ms(self) -> float:
        """Predicted milliseconds of the dense model."""
        return float(self.layers.dense_ms.sum()) + self.rest_ms

    @property
    def sparse_ms(self) -> float:
        """Predicted milliseconds with each layer in the faster of its kernels."""
        return float(self.layers[["dense_ms", "sparse_ms"]].min(axis=1).sum()) + self.rest_ms

    @property
    def speedup(self) -> float:
        """How many times faster the whole model becomes; never below 1."""
        return self.dense_ms / self.sparse_ms

    @property
    def interval(self) -> tuple[float, float]:
        """The speed-ups that this one should lie between, in 8 of 10 cases.

        They follow from the errors of the calibration, where it predicted products that it had
        not seen; without a calibration they are NaN. What an engine does otherwise, such as
        fusing operations or leaving a sparse kernel unused, is not part of them.
        """
        if self.errors is None:
            return math.nan, math.nan
        able = self.layers[self.layers.sparse_ms.notna()]
        if able.empty:
            return 1.0, 1.0
        parts = able.groupby(["m", "n", "k"]).dense_ms.sum()
        error = self.errors.sum_of((parts / parts.sum()).to_numpy())
        rest = self.dense_ms - float(able.dense_ms.sum())

        def speedup(factor: float) -> float:
            faster = np.minimum(able.dense_ms, factor * able.sparse_ms).sum()
            return self.dense_ms / (rest + float(faster))

        return speedup(math.exp(error)), speedup(math.exp(-error))

    @property
    def dense_interval(self) -> tuple[float, float]:
        """The milliseconds that the dense time should lie between, in 8 of 10 cases."""
        if self.errors is None:
            return math.nan, math.nan
        error = math.exp(self.errors.time["p80"])
        return self.dense_ms / error, self.dense_ms * error

    @property
    def _stay_dense(self) -> str:
        """Which of the layers that could be sparse stay dense, in words."""
        able = self.layers[self.layers.sparse_ms.notna()]
        if able.empty:
            return "no layer can be sparse"
        gains = able.gain >= LEAST_GAIN
        if not gains.any():
            return "no layer gains"
        if gains.all():
            return "every layer that can be sparse gains"
        channels = able[["n", "k"]].min(axis=1)
        least = channels[gains].min()
        if (channels[~gains] < least).all():
            return f"layers below {least} channels stay dense"
        return f"{gains.sum()} of {len(able)} layers that can be sparse gain"

    @property
    def verdict(self) -> str:
        """The prediction, its source and how far it can be trusted, in one line."""
        if self.errors is not None:
            low, high = self.interval
            return (
                f"{low:.2f}x to {high:.2f}x at batch {self.batch} in {self.datatype}; "
                f"{self._stay_dense}. Expected {self.speedup:.2f}x, by {self.source}; 8 of 10 "
                "such predictions of products lay within the interval"
            )
        prediction = f"{self.speedup:.2f}x at batch {self.batch} in {self.datatype}"
        if not self.measured:
            return (
                f"{prediction} if dense and sparse kernels both reached the floors of "
                f"{self.source}; not compared with any measurement"
            )
        prediction += f" from {self.source}"
        if self.checked.empty:
            return f"{prediction}; never compared with a measurement end to end"
        worst = 100 * (self.checked.predicted / self.checked.measured - 1).abs().max()
        count = len(self.checked)
        measurements = "measurement" if count == 1 else "measurements"
        return (
            f"{prediction}; end to end such predictions were off by at most {worst:.0f} % "
            f"({count} {measurements})"
        )

    @property
    def _where(self) -> str:
        """How much of the time does not change, and why if none of it does."""
        if self.layers.empty:
            return (
                "No layer gains: whatever this model multiplies is in operations that are not "
                "counted as layers, and so cannot be pruned here."
            )
        stuck = self.layers[self.layers.gain < LEAST_GAIN]
        if len(stuck) == len(self.layers):
            reasons = stuck.reason.replace("", "its sparse kernel gains less").value_counts()
            listed = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
            return f"No layer gains 1 % or more: {listed}."
        stuck_ms = float(stuck.dense_ms.sum())
        share = 100 * (stuck_ms + self.rest_ms) / self.dense_ms
        text = (
            f"Of {self.dense_ms:.3g} ms dense, {share:.0f} % "
            f"is in work that gains less than 1 %: {stuck_ms:.3g} ms in {len(stuck)} of "
            f"{len(self.layers)} layers, {self.rest_ms:.3g} ms outside of layers."
        )
        if self.measured and (stuck.reason == NOT_A_PRODUCT).any() and self.errors is None:
            text += " Convolutions that are not a matrix product count at the best dense rate."
        return text

    def _largest_savings(self) -> pd.DataFrame:
        """Return the layers that save the most time, formatted to be shown."""
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
        table = self._largest_savings()
        lines = [self.verdict, self._where]
        return "\n".join(lines if table.empty else [*lines, "", table.to_string(index=False)])

    def _repr_html_(self) -> str:
        table = self._largest_savings()
        text = "".join(f"<p>{escape(line)}</p>" for line in (self.verdict, self._where))
        return text if table.empty else text + table.to_html(index=False)


def advise(
    model: nn.Module,
    rates: Rates,
    image_shape: tuple[int, int, int] | None = None,
    example: Example | None = None,
    batch: int = 1,
    datatype: str = "FP16",
    rules: str = "cusparselt",
) -> Advice:
    """Return how much faster 2:4 is predicted to make a model, before it is pruned.

    The model runs once on shapes alone, which takes no memory and leaves it unchanged. The
    time of a batch is the sum over its kernels, one after the other.

    Layers are linear layers, projections of attention and convolutions. One that is a matrix
    product takes the time that the rates give for it, of dense or sparse the faster if the
    rules take its weight. Calibrated rates treat any other convolution without groups as the
    product of its windows and its weight, which reads each pixel once. By other rates such
    convolutions stay dense, at the best dense rate or the time to move their numbers, whichever
    is longer; so do those in groups. Outputs of a layer count in the width of
    its inputs, as engines in FP8 and INT8 write them. Batch norms right after a layer are
    folded and free, as is a ReLU right after a layer, a batch norm or an addition.

    Any other operation is one kernel that reads and writes two bytes for each number;
    `scaled_dot_product_attention` is one, and so is a layer that computes its weight at each
    call. Views, dropout, whatever depends on weights alone and the copy of the input to the
    GPU are free.

    Args:
        model: any model, on any device; pruned or not.
        rates: of the GPU.
        image_shape: channels, height and width of an input image.
        example: instead of an image, what to call the model with: a tensor, several in a
            tuple, or named ones in a dictionary; only their shapes count.
        batch: number of images; an example has its own.
        datatype: a name in `helpers.measurement.roofline.DATATYPES` whose pattern is 2:4.
        rules: `cusparselt`, the products of PyTorch, or `tensorrt`, whose sparse kernels take
            3x3 convolutions too.

    Raises:
        InputError: neither or both of `image_shape` and `example` are given, they are empty, or
            there are no such rules.
        AdviceError: the model does not run on them, or there are no rates in this datatype.
    """
    kind = datatype_2to4(datatype)
    inputs, kernels = _trace(model, image_shape, example, batch)
    layers, rest_ms = [], 0.0
    for kernel in kernels:
        if isinstance(kernel, TracedLayer):
            layers.append(_layer_row(kernel, rates, kind, rules))
        else:
            moved = 2 * (kernel.read + kernel.written)
            rest_ms += max(rates.limits(kernel.operations, moved, datatype).values())
    return Advice(
        layers=pd.DataFrame(layers, columns=LAYER_COLUMNS),
        rest_ms=rest_ms,
        batch=batch_of(inputs),
        datatype=datatype,
        source=rates.source,
        measured=rates.measured,
        checked=rates.checked[rates.checked.datatype == datatype],
        errors=rates.errors(datatype),
    )


def advise_batches(
    model: nn.Module,
    rates: Rates,
    image_shape: tuple[int, int, int],
    batch_sizes: Sequence[int],
    datatype: str = "FP16",
    rules: str = "cusparselt",
) -> pd.DataFrame:
    """Return what `advise` predicts for each batch size, in milliseconds.

    Returns:
        The columns of `batch_table`.

    Raises:
        AdviceError: as `advise` does.
    """
    return batch_table(
        [
            advise(model, rates, image_shape, batch=batch, datatype=datatype, rules=rules)
            for batch in batch_sizes
        ]
    )


def batch_table(advices: Sequence[Advice]) -> pd.DataFrame:
    """Return advices as a table.

    Returns:
        The columns `batch`, `dense_ms`, `sparse_ms` and `speedup`; from calibrated rates also
        `low` and `high`, the ends of the interval of the speed-up.
    """
    columns = ["batch", "dense_ms", "sparse_ms", "speedup"]
    rows = [[each.batch, each.dense_ms, each.sparse_ms, each.speedup] for each in advices]
    if all(each.errors is not None for each in advices):
        columns += ["low", "high"]
        rows = [row + list(each.interval) for row, each in zip(rows, advices, strict=True)]
    return pd.DataFrame(rows, columns=columns)


def datatype_2to4(name: str) -> Datatype:
    """Return a datatype whose pattern is 2:4 by its name.

    Raises:
        AdviceError: there is none of that name.
    """
    if name not in TWO_OF_FOUR:
        raise AdviceError(
            f"There is no 2:4 in {name!r}; choose one of {', '.join(TWO_OF_FOUR)}. "
            "In TF32 the hardware keeps one of every two."
        )
    return DATATYPES[name]


def _trace(
    model: nn.Module,
    image_shape: tuple[int, int, int] | None,
    example: Example | None,
    batch: int,
) -> tuple[ModelInputs, list[TracedKernel]]:
    """Return a model's inputs, and the kernels that it runs for them; there is at least one."""
    try:
        inputs = model_inputs(model, image_shape, example, batch, device="meta")
        kernels = trace_kernels(model, inputs)
    except HelpersError:
        raise
    except Exception as error:  # a model may raise anything
        raise AdviceError(
            f"The model does not run on these shapes ({type(error).__name__}: "
            f"{first_line(error)}). Give it "
            "inputs that it takes. Since it runs on shapes alone, its steps must not depend on "
            "the numbers in them."
        ) from error
    if not any(kernel.read or kernel.written for kernel in kernels):
        raise AdviceError("The model neither multiplies nor moves anything; give it layers.")
    return inputs, kernels


def _layer_row(kernel: TracedLayer, rates: Rates, datatype: Datatype, rules: str) -> dict[str, Any]:
    """Return a layer as a row of the table, in the order of `LAYER_COLUMNS`."""
    weight = kernel.weight
    reason = why_not_sparse(weight, rules)
    if rules == "cusparselt" and not reason:  # the weight may be in another datatype now
        outputs, inputs = weight.tensor.shape[:2]
        reason = why_not_cusparselt(outputs, inputs, datatype.input_bytes)
    windows = (kernel.read - kernel.n * kernel.k) / (kernel.m * kernel.k)
    return timed_layer(
        rates,
        datatype,
        name=weight.layer_name or weight.name,
        kind=layer_kind(weight.layer),
        sizes=(kernel.m, kernel.n, kernel.k),
        groups=weight.groups,
        is_product=kernel.is_product,
        implicit=weight.groups == 1 and not weight.transposed,
        operations=kernel.operations,
        numbers=kernel.read + kernel.written,
        read=1.0 if kernel.is_product else min(windows, 1.0),
        reason=reason,
    )


def timed_layer(
    rates: Rates,
    datatype: Datatype,
    *,
    name: str,
    kind: str,
    sizes: tuple[int, int, int],
    groups: int,
    is_product: bool,
    implicit: bool,
    operations: int,
    numbers: int,
    read: float,
    reason: str,
) -> dict[str, Any]:
    """Return a layer with its times as a row of the table, in the order of `LAYER_COLUMNS`.

    Args:
        rates: of the GPU.
        datatype: of weights and activations.
        name: of the layer.
        kind: of the layer, in words.
        sizes: m, n and k of its product, in each group.
        groups: of the layer.
        is_product: whether it is one product of matrices.
        implicit: whether it is at least the product of its windows and its weight.
        operations: two for each multiply-accumulate.
        numbers: that it reads and writes.
        read: numbers of the activations over m k.
        reason: why it cannot be sparse; empty if it can.
    """
    m, n, k = sizes
    limits = rates.limits(operations, datatype.input_bytes * numbers, datatype.name)
    dense_ms, sparse_ms = max(limits.values()), math.nan
    timed = is_product or (implicit and rates.calibration is not None)
    if timed:
        dense_ms = rates.product_ms(m, n, k, datatype.name, sparse=False, read=read)
    elif not reason:
        reason = NOT_A_PRODUCT
    if not reason:
        sparse_ms = rates.product_ms(m, n, k, datatype.name, sparse=True, read=read)
        if sparse_ms >= dense_ms:
            reason = "its sparse kernel is not faster"
    return {
        "layer": name,
        "kind": kind,
        "m": m,
        "n": n,
        "k": k,
        "groups": groups,
        "dense_ms": dense_ms,
        "sparse_ms": sparse_ms,
        "gain": 1.0 if reason else dense_ms / sparse_ms,
        "bound": max(limits, key=limits.__getitem__),
        "reason": reason,
    }
