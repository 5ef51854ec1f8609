"""The weights that a model multiplies by, layer by layer, and what each costs.

Shown in `01_load_pretrained.ipynb`.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from helpers.computed_weights import Shape, find_lost, find_source, used_weight
from helpers.errors import InputError
from helpers.parameters import (
    checked_weight,
    gathered,
    named_layers,
    plain_name,
    require_numbers,
    require_runnable,
    unwrapped,
)
from helpers.products import Product, watch_products

if TYPE_CHECKING:
    import pandas as pd

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Layers with weights that are listed and counted, but never pruned.
RECURRENT = (nn.RNNBase, nn.RNNCellBase)
UNSUPPORTED = (*RECURRENT, nn.Bilinear)

# What a model is called with: one tensor, several, or named ones.
Example = Tensor | Sequence[Any] | Mapping[str, Any]
ModelInputs = tuple[tuple[Any, ...], dict[str, Any]]  # positional and named


@dataclass(frozen=True)
class LayerWeight:
    """A weight of a linear layer, a convolution, an attention layer or a recurrent one.

    `name` is the name in the model of the parameter that holds the numbers, as in `state_dict`;
    `attribute` is what the layer calls the weight. They differ where the layer computes the
    weight from the parameter: `path` is then the parameter's path in the layer. `refusal` says
    why no 2:4 of the parameter reaches a product; empty if it does. `tied_to` holds the other
    names of the same parameter, each with the module that it belongs to, which may be an
    embedding.
    """

    name: str
    layer: nn.Module
    attribute: str
    path: str = ""
    is_computed: bool = False
    refusal: str = ""
    tied_to: tuple[tuple[str, nn.Module], ...] = ()

    @property
    def tensor(self) -> Tensor:
        """The weight as it is multiplied by.

        Raises:
            InputError: it is no tensor of a known kind, or its shape is not known.
        """
        if not self.is_computed:
            return checked_weight(getattr(self.layer, self.attribute), self.name)
        return self.computed_from({})

    def computed_from(self, state: Mapping[str, Tensor]) -> Tensor:
        """Return the weight that the layer computes from the numbers of a checkpoint.

        Args:
            state: parameters and buffers by their names in the model; those that are missing
                are the layer's own.
        """
        inputs = smallest_inputs(self.layer, self.shape)
        prefix = f"{self.layer_name}." if self.layer_name else ""
        inside = {
            name.removeprefix(prefix): each
            for name, each in state.items()
            if name.startswith(prefix)
        }
        return used_weight(self.layer, self.attribute, inputs, self.input_dim, inside)

    @property
    def stored(self) -> nn.Parameter | None:
        """The parameter that holds the numbers; None if there is not one for each of them."""
        owner, _, name = (self.path or self.attribute).rpartition(".")
        return self.layer.get_submodule(owner)._parameters.get(name)

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        return self._like.shape

    @property
    def element_size(self) -> int:
        """The bytes of one of its numbers."""
        return self._like.element_size()

    @property
    def _like(self) -> Tensor:
        stored = self.stored
        held = getattr(self.layer, self.attribute) if stored is None else stored
        return checked_weight(held, self.name)

    @property
    def is_parameter(self) -> bool:
        """Whether the layer multiplies by the parameter itself."""
        return not self.is_computed and self.attribute in self.layer._parameters

    @property
    def layer_name(self) -> str:
        """The layer's name in the model; empty if the model is this one layer."""
        return self.name.removesuffix(self.path or self.attribute).removesuffix(".")

    @property
    def transposed(self) -> bool:
        """Whether this is the weight of a transposed convolution."""
        return isinstance(self.layer, TRANSPOSED)

    @property
    def input_dim(self) -> int:
        """The dimension of the input channels."""
        return 0 if isinstance(self.layer, (*TRANSPOSED, *_gpt2_linear())) else 1

    @property
    def groups(self) -> int:
        """Groups of a convolution; 1 for other layers."""
        return self.layer.groups if isinstance(self.layer, CONVOLUTIONS + TRANSPOSED) else 1

    @property
    def input_channels(self) -> int:
        """The input channels that one output channel sums over."""
        channels = self.shape[self.input_dim]
        return channels // self.groups if self.transposed else channels

    @property
    def output_channels(self) -> int:
        """The output channels, of all groups together."""
        channels = self.shape[1 - self.input_dim]
        return channels * self.groups if self.transposed else channels


def _gpt2_linear() -> tuple[type[nn.Module], ...]:
    """Return the linear layer of GPT-2, whose weight is (inputs, outputs), if it is loaded."""
    module = sys.modules.get("transformers.pytorch_utils")
    return () if module is None else (module.Conv1D,)


def _attributes(layer: nn.Module) -> tuple[str, ...]:
    if isinstance(layer, nn.MultiheadAttention):
        packed = layer.in_proj_weight is not None
        return ("in_proj_weight",) if packed else tuple(f"{x}_proj_weight" for x in "qkv")
    if isinstance(layer, nn.RNNBase):
        return tuple(name for name in layer._flat_weights_names if name.startswith("weight"))
    if isinstance(layer, nn.RNNCellBase):
        return ("weight_ih", "weight_hh")
    kinds = (nn.Linear, nn.Bilinear, *CONVOLUTIONS, *TRANSPOSED, *_gpt2_linear())
    return ("weight",) if isinstance(layer, kinds) else ()


_FORWARDS = {
    kind.forward for kind in (nn.Linear, nn.MultiheadAttention, *CONVOLUTIONS, *TRANSPOSED)
}
_CONVOLVES = {nn.Conv1d._conv_forward, nn.Conv2d._conv_forward, nn.Conv3d._conv_forward}


def _computes(layer: nn.Module, attribute: str) -> bool:
    """Return whether a layer may multiply by something else than the parameter itself."""
    parameter = layer._parameters.get(attribute)
    if parameter is None or getattr(layer, attribute) is not parameter:
        return True
    own = vars(layer)
    forwards = _FORWARDS | {kind.forward for kind in _gpt2_linear()}
    if type(layer).forward not in forwards or "_conv_forward" in own:
        return True
    if isinstance(layer, CONVOLUTIONS) and type(layer)._conv_forward not in _CONVOLVES:
        return True
    # Accelerate wraps the forward that a layer has, and keeps it under this name.
    kept = getattr(own.get("_old_forward"), "__func__", None)
    return "forward" in own and kept not in forwards


def smallest_inputs(layer: nn.Module, shape: torch.Size) -> list[Shape]:
    """Return the shapes of the smallest inputs that a layer with a weight of this shape takes."""
    if isinstance(layer, nn.MultiheadAttention):
        return [(1, layer.embed_dim), (1, layer.kdim), (1, layer.vdim)]
    if isinstance(layer, CONVOLUTIONS + TRANSPOSED):
        sizes = zip(layer.kernel_size, layer.dilation, strict=True)
        return [(1, layer.in_channels, *(step * (size - 1) + 1 for size, step in sizes))]
    return [(1, shape[0 if isinstance(layer, _gpt2_linear()) else -1])]


def _uses(model: nn.Module) -> Iterator[LayerWeight]:
    """Yield every weight of every layer; a tied one each time, by the name it had first."""
    first: dict[int, str] = {}
    for prefix, layer in named_layers(model):
        for attribute in _attributes(layer):
            use = _use(layer, attribute)
            if use is None:
                continue
            name = f"{prefix}.{use.name}" if prefix else use.name
            parameter = use.stored
            if parameter is not None:
                name = first.setdefault(id(parameter), name)
            yield replace(use, name=name)


def _use(layer: nn.Module, attribute: str) -> LayerWeight | None:
    """Return a weight of a layer, named as if the layer were the model."""
    if isinstance(layer, UNSUPPORTED):
        kind = "bilinear" if isinstance(layer, nn.Bilinear) else "recurrent"
        return LayerWeight(attribute, layer, attribute, refusal=f"{kind}: not supported")
    if not _computes(layer, attribute):
        return LayerWeight(attribute, layer, attribute)
    held = getattr(layer, attribute, None)
    if not isinstance(held, Tensor):  # this layer has another weight in its place
        return None
    unsaved = LayerWeight(attribute, layer, attribute)
    if is_lazy(held) or held.dim() < 2:  # an error only if the weight is asked for
        return unsaved
    inputs = smallest_inputs(layer, held.shape)
    path, as_it_is, refusal = find_source(layer, attribute, inputs, unsaved.input_dim)
    return LayerWeight(path, layer, attribute, path, not as_it_is, refusal)


def layer_weights(model: nn.Module) -> dict[str, LayerWeight]:
    """Return the weights of a model's layers by the names of the parameters.

    Layers are linear ones, convolutions, attention, recurrent and bilinear ones; a subclass
    counts as one. A weight that several layers share comes once. The names are those of the
    model without wrappers such as that of `torch.compile`.

    Raises:
        InputError: the weights of a layer cannot be reached, as in TorchScript.
    """
    weights: dict[str, LayerWeight] = {}
    for use in _uses(model):
        known = weights.setdefault(use.name, use)
        if use.refusal and not known.refusal:
            weights[use.name] = replace(known, refusal=use.refusal)
    for name, also in _tied(model, weights).items():
        weights[name] = replace(weights[name], tied_to=also)
    return weights


def _tied(
    model: nn.Module, weights: Mapping[str, LayerWeight]
) -> dict[str, tuple[tuple[str, nn.Module], ...]]:
    """Return the other names of the weights that have some, with the modules they belong to."""
    by_parameter = {id(weight.stored): name for name, weight in weights.items()}
    others: dict[str, list[tuple[str, nn.Module]]] = {}
    for prefix, module in named_layers(model, remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            weight = by_parameter.get(id(parameter)) if parameter is not None else None
            name = f"{prefix}.{attribute}" if prefix else attribute
            if weight is not None and name != weight:
                others.setdefault(weight, []).append((name, module))
    return {name: tuple(also) for name, also in others.items()}


def is_plain(layer: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Return whether a layer does what these kinds do, and nothing else: no hook, no subclass."""
    own = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) in kinds and not own


def layer_kind(layer: nn.Module) -> str:
    """Return what kind of layer this is, in words, such as "grouped 3x3 convolution"."""
    if isinstance(layer, nn.MultiheadAttention):
        return "attention"
    if isinstance(layer, (nn.Linear, *_gpt2_linear())):
        return "linear"
    if isinstance(layer, UNSUPPORTED):
        return "bilinear" if isinstance(layer, nn.Bilinear) else "recurrent"
    if not isinstance(layer, CONVOLUTIONS + TRANSPOSED):
        raise InputError(
            f"A {type(layer).__name__} is not a linear layer, a convolution, an attention layer "
            "or a recurrent one."
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


@dataclass(frozen=True)
class MacCount:
    """The multiply-accumulates of every product of a model, while it runs once.

    `layers` counts those with the weights of `layer_weights`, by name and in order of execution;
    `sparse` those of them that sum over the weight's input channels, and so could skip its
    zeros. `parameters` counts products with other parameters of the model, such as the experts
    of a mixture, and `without_weight` the products of two activations, such as the scores of
    attention, and of whatever else the model computes. `lost` says of weights that a module
    outside of their layer computes with, by name, why their zeros may not reach a product.
    """

    layers: Counter[str]
    sparse: Counter[str]
    parameters: Counter[str]
    without_weight: int
    lost: Mapping[str, str] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """The multiply-accumulates of the whole network."""
        return self.layers.total() + self.parameters.total() + self.without_weight


def count_macs(
    model: nn.Module, inputs: ModelInputs, weights: Mapping[str, LayerWeight]
) -> MacCount:
    """Count the multiply-accumulates of a model for some inputs.

    Args:
        model: any model; it runs in evaluation mode, and gets its mode back. It runs twice if a
            module computes with the weight of a layer inside of it.
        inputs: what `model_inputs` returned.
        weights: what `layer_weights(model)` returned.
    """
    model = unwrapped(model)
    count = MacCount(Counter(), Counter(), Counter(), 0)
    watched: dict[str, Tensor] = {}
    outside: dict[str, tuple[Tensor, int]] = {}
    lost: dict[str, str] = {}
    without_weight = 0

    def add(product: Product) -> None:
        nonlocal without_weight
        names = (product.weight,) if product.weight else product.computed_from
        name = next((name for name in names if name in weights), "")
        if name:
            weight = weights[name]
            count.layers[name] += product.macs
            if product.sums_over(watched[name], weight.input_dim):
                count.sparse[name] += product.macs
            if not product.weight and not weight.is_computed:
                outside[name] = watched[name], weight.input_dim
        elif names:
            count.parameters[names[0]] += product.macs
        else:
            without_weight += product.macs

    args, kwargs = inputs
    with torch.no_grad(), in_mode(model, training=False), gathered(model):
        known = {id(weight.stored): name for name, weight in weights.items()}
        for name, parameter in model.named_parameters():
            watched[known.get(id(parameter), plain_name(name))] = parameter
        require_runnable(watched, (x for x in tree_leaves(inputs) if isinstance(x, Tensor)))
        for name in weights:
            if name in watched and not watched[name].is_meta:
                require_numbers(watched[name], name)
        with watch_products(watched, add, model.buffers()):
            model(*args, **kwargs)
        if outside:
            lost = find_lost(model, inputs, outside)
    for name in lost:
        del count.sparse[name]
    return replace(count, without_weight=without_weight, lost=lost)


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
    inputs = model_inputs(model, image_shape, example)
    weights = layer_weights(model) if weights is None else weights
    return table_of(weights, count_macs(model, inputs, weights))


def table_of(weights: Mapping[str, LayerWeight], count: MacCount) -> pd.DataFrame:
    """Return the table of `layer_table` for MACs that were counted before."""
    import pandas as pd

    rows = [
        {
            "weight": name,
            "kind": layer_kind(weights[name].layer),
            "shape": "x".join(map(str, weights[name].shape)),
            "groups": weights[name].groups,
            "parameters": weights[name].shape.numel(),
            "macs": count.layers[name],
        }
        for name in {**count.layers, **weights}
    ]
    columns = ["weight", "kind", "shape", "groups", "parameters", "macs"]
    return pd.DataFrame(rows, columns=columns)


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
