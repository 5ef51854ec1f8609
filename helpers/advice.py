"""What 2:4 will buy on a GPU, predicted before anybody retrains.

Explained in `07_sparse_tensor_cores.ipynb`.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from helpers.checks import TutorialError
from helpers.gemm import DATATYPES, Datasheet, Datatype, floor_ms
from helpers.layers import LayerWeight, attention_shown, in_mode, layer_kind, layer_weights
from helpers.settings import relative
from helpers.sparsity.eligibility import why_not_cusparselt, why_not_sparse


class AdviceError(TutorialError):
    """Nothing can be predicted: the rates, the network or the input do not allow it."""


# --- what a GPU reaches ---

TWO_OF_FOUR = [name for name, datatype in DATATYPES.items() if datatype.pattern == (2, 4)]


def _number(value: Any) -> float:
    # No GPU is outside of this range, and nothing that is computed within it overflows.
    if type(value) not in (int, float) or not 1e-9 <= value <= 1e9:
        raise ValueError(f"{value!r:.40} is no number from 1e-9 to 1e9")
    return float(value)


def _whole(value: Any) -> int:
    if _number(value) % 1:
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r:.40} is no text")
    return value


def _known_datatype(value: Any) -> str:
    if _text(value) not in DATATYPES:
        raise ValueError(f"{value!r:.40} is none of {', '.join(DATATYPES)}")
    return value


# The columns of a record's tables, and what reads their values.
SIZE = {"m": _whole, "n": _whole, "k": _whole}
TIMES = {"dense_ms": _number, "sparse_ms": _number}
PRODUCT = {"datatype": _known_datatype, **SIZE, **TIMES}
CHECKED = {
    "network": _text,
    "datatype": _known_datatype,
    "batch": _whole,
    "predicted": _number,
    "measured": _number,
}


def _table(rows: list[dict[str, Any]], columns: dict[str, Callable[[Any], Any]]) -> pd.DataFrame:
    read = [{name: reader(row[name]) for name, reader in columns.items()} for row in rows]
    return pd.DataFrame(read, columns=list(columns))


@dataclass(frozen=True, eq=False)
class Rates:
    """How fast a GPU multiplies and moves, as it was measured or by its datasheet.

    `best` holds the highest rates in TFLOP/s, dense and sparse, by datatype; `bandwidth` is in
    GB/s; `launch_ms` is the least time of any kernel, 0 by a datasheet. `products` are the
    measured ones, in the columns of `helpers.gemm.measure_gemms`, or None. `checked` are
    speed-ups of whole networks that were predicted from them and then measured on this GPU:
    `network`, `datatype`, `batch`, `predicted`, `measured`.
    """

    source: str
    best: dict[str, tuple[float, float]]
    bandwidth: float
    launch_ms: float = 0.0
    products: pd.DataFrame | None = field(default=None, repr=False)
    checked: pd.DataFrame = field(default_factory=lambda: _table([], CHECKED), repr=False)

    @classmethod
    def from_datasheet(cls, sheet: Datasheet) -> "Rates":
        """Return a GPU's published peaks, which give the floors of its kernels' times.

        Args:
            sheet: one of `helpers.gemm.DATASHEETS`.
        """
        return cls(f"the {sheet.gpu}'s datasheet", sheet.tflops, sheet.bandwidth)

    @classmethod
    def from_record(cls, path: Path) -> "Rates":
        """Return what was measured on a GPU, from the record that `benchmarks/gpu.py` writes.

        Args:
            path: JSON with `machine` (its `gpu`), `bandwidth_gbps`, `rows` as
                `helpers.gemm.measure_gemms` returns them, and perhaps `checked`.

        Raises:
            AdviceError: the file is missing or not such a record.
        """
        path = Path(path)
        record = _read(path)
        try:
            gpu, bandwidth = _text(record["machine"]["gpu"]), _number(record["bandwidth_gbps"])
            ran = [row for row in record["rows"] if None not in [row[name] for name in TIMES]]
            products, checked = _table(ran, PRODUCT), _table(record.get("checked", []), CHECKED)
        except (KeyError, TypeError, ValueError) as error:
            raise AdviceError(
                f"{relative(path)} is no record of a GPU ({type(error).__name__}: {error}). It "
                f"needs machine.gpu, bandwidth_gbps and rows with {', '.join(PRODUCT)}; record "
                "it again with benchmarks/gpu.py."
            ) from error
        if products.empty:
            raise AdviceError(
                f"{relative(path)} holds no product that ran both dense and sparse. Record it "
                "again with benchmarks/gpu.py, on a GPU with Sparse Tensor Cores."
            )
        times = products[[*TIMES]]
        rates = times.rdiv(2e-9 * products[[*SIZE]].astype(float).prod(axis=1), axis=0)
        best = rates.groupby(products.datatype).max()
        return cls(
            f"products measured on {gpu}",
            {name: tuple(own) for name, own in zip(best.index, best.values.tolist(), strict=True)},
            bandwidth,
            float(times.min(axis=None)),
            products,
            checked,
        )

    @property
    def measured(self) -> bool:
        """Whether the rates were measured; else they are published."""
        return self.products is not None

    def product_ms(self, m: int, n: int, k: int, datatype: str, sparse: bool) -> float:
        """Return the time in milliseconds of a product of activations (m, k) and a weight (n, k).

        Measured: at the rate of the product that is nearest in the logarithms of m, n and k,
        but not less than its bytes or any kernel take. By a datasheet: `floor_ms`. The outputs
        are counted in the width of the inputs, in which the next layer takes them.

        Raises:
            AdviceError: there are no rates in this datatype.
        """
        peak, width = self._best(datatype)[sparse], DATATYPES[datatype].input_bytes
        floor = floor_ms(m, n, k, datatype, peak, self.bandwidth, sparse, output_bytes=width)
        if self.products is None:
            return floor
        own = self.products[self.products.datatype == datatype]
        sizes = own[[*SIZE]].to_numpy(float)
        nearest = (np.log(sizes / [m, n, k]) ** 2).sum(axis=1).argmin()
        times = own["sparse_ms" if sparse else "dense_ms"].to_numpy()
        scaled = times[nearest] * (m * n * k / sizes[nearest].prod())
        return max(scaled, floor, self.launch_ms)

    def limits(self, operations: float, moved: float, datatype: str) -> dict[str, float]:
        """Return the least milliseconds that each of three things allows a dense kernel.

        Args:
            operations: two for each multiply-accumulate, at the best dense rate.
            moved: bytes read and written.
            datatype: of the operations.

        Raises:
            AdviceError: there are no rates in this datatype.
        """
        return {
            "arithmetic": operations / self._best(datatype)[0] / 1e9,
            "memory": moved / self.bandwidth / 1e6,
            "launch": self.launch_ms,
        }

    def _best(self, datatype: str) -> tuple[float, float]:
        if datatype not in self.best:
            raise AdviceError(
                f"There are no rates in {datatype} from {self.source}; for 2:4 it has "
                f"{', '.join(filter(self.best.get, TWO_OF_FOUR)) or 'none'}. Take one of these, "
                "or another source of rates."
            )
        return self.best[datatype]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise AdviceError(
            f"{relative(path)} cannot be read ({error.strerror}). Record a GPU with "
            "benchmarks/gpu.py, or take the rates of a datasheet."
        ) from error
    except (ValueError, RecursionError) as error:  # no JSON, no text, or nested without end
        raise AdviceError(
            f"{relative(path)} is not JSON ({error}). Record it again with benchmarks/gpu.py."
        ) from error


# --- what a network does ---

RELUS = ("relu", "relu6", "hardtanh")
DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout")  # nothing in evaluation mode
LOOKUPS = ("embedding", "index", "index_select", "gather")  # read no more than they return

_Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # positional and named


@dataclass(frozen=True)
class _Kernel:
    """What one kernel multiplies, reads and writes, and the weight of its layer if it has one.

    With a weight it stands for the product of activations (m, k) and a weight (n, k), one in
    each group.
    """

    operations: int
    read: int  # numbers, each tensor once
    written: int
    weight: LayerWeight | None = None
    m: int = 0
    n: int = 0
    k: int = 0

    @property
    def is_product(self) -> bool:
        """Whether the layer is one product of matrices: linear, or a 1x1 convolution."""
        weight = self.weight
        if weight is None or weight.transposed or weight.groups > 1:
            return False
        return math.prod(weight.tensor.shape[2:]) == 1


class _Recorder(TorchDispatchMode):
    """Notes the kernels of a network while it runs on the device `meta`.

    In inference mode it sees each operation as PyTorch names it, before that is taken apart.
    """

    def __init__(self, weights: dict[int, LayerWeight], flops: FlopCounterMode) -> None:
        super().__init__()
        self.weights, self.flops = weights, flops  # weights by their storage
        self.kernels: list[_Kernel] = []
        # What wrote each tensor that depends on the input, by its storage. Keeping the tensor
        # keeps its storage from being given to another one.
        self.made: dict[int, tuple[str, Tensor]] = {}
        # The stand-ins of tensors on other devices, which a network may make and write into.
        self.twins: dict[tuple, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = tree_map_only(Tensor, self._on_meta, (args, kwargs or {}))
        before = self.flops.get_total_flops()
        result = func(*given[0], **given[1])
        inputs, outputs = _tensors(given), _tensors(result)
        # What comes from weights alone is computed once, beforehand.
        if outputs and any(_storage(tensor) in self.made for tensor in inputs):
            self._note(func, inputs, outputs[0], self.flops.get_total_flops() - before)
            for other in outputs[1:]:
                self.made.setdefault(_storage(other), (func.overloadpacket.__name__, other))
        return result

    def _on_meta(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return tensor
        key = (_storage(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
        return self.twins.setdefault(key, (tensor, tensor.to("meta")))[1]

    def _note(
        self, func: torch._ops.OpOverload, inputs: list[Tensor], output: Tensor, operations: int
    ) -> None:
        """Note one operation on the network's input or on what came from it."""
        name = func.overloadpacket.__name__.rstrip("_")
        before, _ = self.made.get(_storage(inputs[0]), ("", None))
        if _moves_nothing(func, name, inputs, output):
            return
        if name in DROPOUTS or (name == "batch_norm" and before == "layer"):
            after = before
        elif name in RELUS and before in ("layer", "sum"):
            after = "relu"
        else:
            self.kernels.append(self._kernel(name, inputs, output, operations))
            is_sum = name in ("add", "batch_norm")
            after = "layer" if self.kernels[-1].weight else "sum" if is_sum else name
        self.made[_storage(output)] = (after, output)

    def _kernel(self, name: str, inputs: list[Tensor], output: Tensor, operations: int) -> _Kernel:
        different = {(_storage(x), x.storage_offset(), x.shape): x for x in inputs}.values()
        read = output.numel() if name in LOOKUPS else sum(map(_stored, different))
        kernel = _Kernel(operations, read, output.numel())
        part = next((x for x in inputs if _storage(x) in self.weights), None)
        if part is None or not operations:
            return kernel
        weight = self.weights[_storage(part)]  # of which attention may use a part at a time
        pixels = 1 if weight.transposed else math.prod(weight.tensor.shape[2:])
        k = pixels * weight.input_channels
        n = part.numel() // k // weight.groups
        m = operations // 2 // part.numel()
        kernel = replace(kernel, weight=weight, m=m, n=n, k=k)
        # A strided 1x1 convolution reads only the pixels that it looks at.
        return replace(kernel, read=(m + n) * k, written=m * n) if kernel.is_product else kernel


def _moves_nothing(
    func: torch._ops.OpOverload, name: str, inputs: list[Tensor], output: Tensor
) -> bool:
    """Return whether an operation gives another view, or takes no more than a shape."""
    if name.startswith("new_") or name.endswith("_like"):
        return True
    if func._schema.is_mutable:
        return torch.Tag.inplace_view in func.tags
    return _storage(output) in map(_storage, inputs)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _stored(tensor: Tensor) -> int:
    """Return how many numbers a tensor holds in memory: an expanded one repeats some."""
    return min(tensor.numel(), tensor.untyped_storage().nbytes() // tensor.element_size())


def _run(model: nn.Module, inputs: _Inputs) -> list[_Kernel]:
    """Return the kernels of a network for some inputs; nothing is computed or changed."""
    with torch.inference_mode(), FlopCounterMode(display=False) as flops:
        state = dict(model.named_parameters()) | dict(model.named_buffers())
        meta = {id(x): torch.empty_like(x, device="meta") for x in state.values()}
        weights = {
            _storage(meta[id(weight.tensor)]): weight
            for weight in layer_weights(model).values()
            if weight.is_parameter
        }
        recorder = _Recorder(weights, flops)
        given = {id(x): torch.empty_like(x, device="meta") for x in _tensors(inputs)}
        inputs = tree_map_only(Tensor, lambda x: given[id(x)], inputs)
        recorder.made = {_storage(x): ("input", x) for x in _tensors(inputs)}
        with in_mode(model, training=False), attention_shown(), recorder:
            functional_call(model, {name: meta[id(x)] for name, x in state.items()}, *inputs)
    return recorder.kernels


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
        if self.measured and (stuck.reason == "no matrix product").any():
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
    except TutorialError:
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
