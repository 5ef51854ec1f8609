"""The weights that a model multiplies by, layer by layer, and what each costs.

Shown in `01_load_pretrained.ipynb`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_leaves

from helpers.errors import InputError
from helpers.products import Product, watch_products

if TYPE_CHECKING:
    import pandas as pd

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# What a model is called with: one tensor, several, or named ones.
Example = Tensor | Sequence[Any] | Mapping[str, Any]
ModelInputs = tuple[tuple[Any, ...], dict[str, Any]]  # positional and named


@dataclass(frozen=True)
class LayerWeight:
    """A weight of a linear layer, a convolution or an attention layer.

    `name` is the parameter's name in the model, `attribute` its name in the layer.
    """

    name: str
    layer: nn.Module
    attribute: str

    @property
    def tensor(self) -> Tensor:
        """The weight as the layer sees it."""
        return getattr(self.layer, self.attribute)

    @property
    def is_parameter(self) -> bool:
        """Whether the layer holds the weight itself, and does not compute it from others."""
        return self.attribute in self.layer._parameters

    @property
    def layer_name(self) -> str:
        """The layer's name in the model; empty if the model is this one layer."""
        return self.name.rpartition(".")[0]

    @property
    def transposed(self) -> bool:
        """Whether this is the weight of a transposed convolution."""
        return isinstance(self.layer, TRANSPOSED)

    @property
    def input_dim(self) -> int:
        """The dimension of the input channels."""
        return 0 if self.transposed else 1

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 for other layers."""
        return getattr(self.layer, "groups", 1)

    @property
    def input_channels(self) -> int:
        """The input channels that one output channel sums over."""
        channels = self.tensor.shape[self.input_dim]
        return channels // self.groups if self.transposed else channels


def _attributes(layer: nn.Module) -> tuple[str, ...]:
    if isinstance(layer, nn.MultiheadAttention):
        packed = layer.in_proj_weight is not None
        return ("in_proj_weight",) if packed else tuple(f"{x}_proj_weight" for x in "qkv")
    return ("weight",) if isinstance(layer, (nn.Linear, *CONVOLUTIONS, *TRANSPOSED)) else ()


def _uses(model: nn.Module) -> Iterator[LayerWeight]:
    """Yield every weight of every layer; a tied one each time, by the name it had first."""
    first: dict[int, str] = {}
    for prefix, layer in model.named_modules():
        for attribute in _attributes(layer):
            name = f"{prefix}.{attribute}" if prefix else attribute
            parameter = layer._parameters.get(attribute)
            if parameter is not None:
                name = first.setdefault(id(parameter), name)
            yield LayerWeight(name, layer, attribute)


def layer_weights(model: nn.Module) -> dict[str, LayerWeight]:
    """Return the weights of a model's linear, convolution and attention layers, by name.

    A subclass of such a layer counts as one; a weight that several layers share comes once.
    """
    weights: dict[str, LayerWeight] = {}
    for use in _uses(model):
        weights.setdefault(use.name, use)
    return weights


def is_plain(layer: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Return whether a layer does what these kinds do, and nothing else: no hook, no subclass."""
    own = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) in kinds and not own


def layer_kind(layer: nn.Module) -> str:
    """Return what kind of layer this is, in words, such as "grouped 3x3 convolution"."""
    if isinstance(layer, nn.MultiheadAttention):
        return "attention"
    if isinstance(layer, nn.Linear):
        return "linear"
    if not isinstance(layer, CONVOLUTIONS + TRANSPOSED):
        raise InputError(
            f"A {type(layer).__name__} is not a linear layer, a convolution or an attention layer."
        )
    size = "x".join(map(str, layer.kernel_size))
    grouped = "grouped " if layer.groups > 1 else ""
    transposed = "transposed " if isinstance(layer, TRANSPOSED) else ""
    return f"{grouped}{transposed}{size} convolution"


# --- calling a model ---


def model_inputs(
    model: nn.Module,
    image_shape: tuple[int, int, int] | None = None,
    example: Example | None = None,
    batch: int = 1,
    device: torch.device | str | None = None,
) -> ModelInputs:
    """Return the positional and the named arguments to call a model with.

    Args:
        model: any model.
        image_shape: channels, height and width; images of zeros are made in the datatype of
            the model's first parameter.
        example: instead, what to call the model with: a tensor, several in a tuple or a list,
            or named ones in a dictionary.
        batch: how many images to make; an example has a batch of its own.
        device: where to make the images; by default where the first parameter is.

    Raises:
        InputError: neither or both of `image_shape` and `example` are given, a size is not a
            whole number of at least 1, or no tensor of the example has a batch.
    """
    if (image_shape is None) == (example is None):
        raise InputError(
            "Give either `image_shape`, such as (3, 224, 224), or `example`, what the model is "
            "called with."
        )
    if image_shape is not None:
        is_shape = isinstance(image_shape, Sequence) and all(map(_is_count, image_shape))
        if not is_shape or not _is_count(batch):
            raise InputError(
                f"There are no images of shape {image_shape!r} in batches of {batch!r}: channels, "
                "height, width and batch must be whole numbers of at least 1."
            )
        like = next(model.parameters(), torch.empty(0))
        return (
            torch.zeros(batch, *image_shape, dtype=like.dtype, device=device or like.device),
        ), {}
    inputs: ModelInputs
    if isinstance(example, Mapping):
        inputs = (), dict(example)
    elif isinstance(example, tuple | list):
        inputs = tuple(example), {}
    else:
        inputs = (example,), {}
    if not batch_of(inputs):
        raise InputError(
            "`example` holds no tensor with a batch of at least 1. Give what the model is "
            "called with: a tensor, several in a tuple, or named ones in a dictionary."
        )
    return inputs


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0


def batch_of(inputs: ModelInputs) -> int:
    """Return the length of the first tensor that has one; 0 if there is none."""
    tensors = (leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
    return next((len(tensor) for tensor in tensors if tensor.ndim), 0)


# --- what each weight costs ---


def layer_table(
    model: nn.Module,
    image_shape: tuple[int, int, int] | None = None,
    example: Example | None = None,
    weights: Mapping[str, LayerWeight] | None = None,
) -> pd.DataFrame:
    """Return one row for each weight of `layer_weights`, in order of execution.

    The columns are `weight` (its name), `kind` (of the layer), `shape` (such as
    64x32x1x1), `groups`, `parameters` and `macs`, the multiply-accumulates with this
    weight for the input. Weights that the input does not reach come last, with no MACs.

    Args:
        model: any model; it runs once, in evaluation mode, and gets its mode back.
        image_shape: channels, height and width of an input image; one is passed through.
        example: instead of an image, what to call the model with: a tensor, several in a
            tuple, or named ones in a dictionary.
        weights: what `layer_weights(model)` returned, if the caller has it already.

    Raises:
        InputError: neither or both of `image_shape` and `example` are given, or there is no
            such image, or no tensor in the example.
    """
    import pandas as pd

    args, kwargs = model_inputs(model, image_shape, example)
    weights = layer_weights(model) if weights is None else weights
    # Cached, a weight that a parametrization computes is one tensor throughout the run.
    with torch.no_grad(), in_mode(model, training=False), parametrize.cached():
        tensors = {name: weight.tensor for name, weight in weights.items()}
        macs = _macs_by_weight(model, tensors, args, kwargs)
    rows = [
        {
            "weight": name,
            "kind": layer_kind(weights[name].layer),
            "shape": "x".join(map(str, tensors[name].shape)),
            "groups": weights[name].groups,
            "parameters": tensors[name].numel(),
            "macs": macs[name],
        }
        for name in {**macs, **weights}
    ]
    columns = ["weight", "kind", "shape", "groups", "parameters", "macs"]
    return pd.DataFrame(rows, columns=columns)


def _macs_by_weight(
    model: nn.Module, weights: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Counter[str]:
    """Return the MACs with each weight while the model runs once, in order of execution."""
    macs: Counter[str] = Counter()
    uses: dict[nn.Module, list[LayerWeight]] = {}
    for use in _uses(model):
        if use.name in weights:
            uses.setdefault(use.layer, []).append(use)
    running: list[nn.Module | None] = []  # the innermost last; None while its hooks prepare it

    def count(product: Product) -> None:
        name, layer = product.weight, running[-1] if running else None
        if running and layer is None:
            return
        if not name and layer is not None:
            # Some layers compute a factor of their weight's shape at each call: those that
            # standardise or quantise it, and those of `torch.nn.utils.weight_norm`.
            shapes = (product.factor.shape, product.factor.shape[::-1])  # or its transpose
            computed = (use.name for use in uses[layer] if weights[use.name].shape in shapes)
            name = next(computed, "")
        if name:
            macs[name] += product.macs

    def prepare(*_: object) -> None:
        running.append(None)

    def enter(layer: nn.Module, _: object) -> None:
        running[-1] = layer

    def leave(*_: object) -> None:
        running.pop()

    hooks = [layer.register_forward_pre_hook(prepare, prepend=True) for layer in uses]
    hooks += [layer.register_forward_pre_hook(enter) for layer in uses]
    hooks += [layer.register_forward_hook(leave, always_call=True) for layer in uses]
    try:
        with watch_products(weights, count):
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return macs


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put a model into training or evaluation mode, and then each layer back into its own.

    Frozen batch norms stay frozen: their mode is not that of the model around them.
    """
    modes = [(layer, layer.training) for layer in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode


def shares_by_kind(table: pd.DataFrame) -> pd.DataFrame:
    """Return layers, and percentages of parameters and MACs, for each kind of layer."""
    grouped = table.groupby("kind")[["parameters", "macs"]].sum()
    shares = 100 * grouped / grouped.sum()
    shares.insert(0, "layers", table.groupby("kind").size())
    shares.columns = ["layers", "parameters, %", "MACs, %"]
    return shares.sort_values("MACs, %", ascending=False).round(2)
