"""The weights that a network multiplies by, layer by layer, and what each costs.

Shown in `01_load_pretrained.ipynb`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from helpers.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class LayerWeight:
    """A weight of a linear layer, a convolution or an attention layer.

    `name` is the parameter's name in the network, `attribute` its name in the layer.
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
        """The layer's name in the network; empty if the network is this one layer."""
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
    """Return the weights of a network's linear, convolution and attention layers, by name.

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
    """Return what kind of layer this is, in the tutorial's words."""
    if isinstance(layer, nn.MultiheadAttention):
        return "attention"
    if isinstance(layer, nn.Linear):
        return "linear"
    size = "x".join(map(str, layer.kernel_size))
    grouped = "grouped " if layer.groups > 1 else ""
    transposed = "transposed " if isinstance(layer, TRANSPOSED) else ""
    return f"{grouped}{transposed}{size} convolution"


def layer_table(
    model: nn.Module,
    image_shape: tuple[int, int, int] | None = None,
    example: Tensor | tuple[Tensor, ...] | None = None,
    weights: Mapping[str, LayerWeight] | None = None,
) -> "pd.DataFrame":
    """Return one row for each weight of `layer_weights`, in order of execution.

    The columns are `weight` (its name), `kind` (of the layer), `shape` (such as
    64x32x1x1), `groups`, `parameters` and `macs`, the multiply-accumulates with this
    weight for the input. Weights that the input does not reach come last, with no MACs.

    Args:
        model: any network.
        image_shape: channels, height and width of an input image; one is passed through.
        example: instead of an image, what to call the network with.
        weights: what `layer_weights` returned for the model, if it is known already.

    Raises:
        InputError: neither or both of `image_shape` and `example` are given.
    """
    import pandas as pd

    weights = layer_weights(model) if weights is None else weights
    macs = _count_macs(model, _inputs(model, image_shape, example), weights)
    rows = [
        {
            "weight": name,
            "kind": layer_kind(weights[name].layer),
            "shape": "x".join(map(str, weights[name].tensor.shape)),
            "groups": weights[name].groups,
            "parameters": weights[name].tensor.numel(),
            "macs": macs[name],
        }
        for name in sorted(weights, key=[*macs, *weights].index)
    ]
    columns = ["weight", "kind", "shape", "groups", "parameters", "macs"]
    return pd.DataFrame(rows, columns=columns)


def _inputs(
    model: nn.Module,
    image_shape: tuple[int, int, int] | None,
    example: Tensor | tuple[Tensor, ...] | None,
) -> tuple[Tensor, ...]:
    if (image_shape is None) == (example is None):
        raise InputError(
            "Counting MACs takes one input: give either `image_shape`, such as (3, 224, 224), "
            "or `example`, what the network is called with."
        )
    if image_shape is None:
        return (example,) if isinstance(example, Tensor) else tuple(example)
    weight = next(model.parameters())
    return (torch.zeros(1, *image_shape, dtype=weight.dtype, device=weight.device),)


def _count_macs(
    model: nn.Module, inputs: tuple[Tensor, ...], weights: Mapping[str, LayerWeight]
) -> Counter[str]:
    """Return the MACs with each weight while the network runs once, in order of execution."""
    macs: Counter[str] = Counter()
    names = {(use.layer, use.attribute): use.name for use in _uses(model)}
    lent = _LentWeights(weights, macs)

    def enter(layer: nn.Module, *_: object) -> None:
        lent.running.append(layer)

    def record(layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        lent.running.pop()
        if isinstance(layer, nn.MultiheadAttention):
            for *use, count in _attention_macs(layer, args, kwargs):
                macs[names[tuple(use)]] += count
            return
        # Each number of the output is one dot product of the length of a filter; each number
        # that goes into a transposed convolution is multiplied by a whole filter.
        numbers = (args or tuple(kwargs.values()))[0] if isinstance(layer, TRANSPOSED) else output
        macs[names[layer, "weight"]] += layer.weight[0].numel() * numbers.numel()

    layers = dict.fromkeys(layer for layer, _ in names)
    hooks = [layer.register_forward_pre_hook(enter) for layer in layers]
    hooks += [layer.register_forward_hook(record, with_kwargs=True) for layer in layers]
    try:
        with torch.inference_mode(), in_mode(model, training=False), attention_shown(), lent:
            model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return macs


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Put a network into training or evaluation mode, and then each layer back into its own.

    Frozen batch norms stay frozen: theirs is not the mode of the network around them.
    """
    modes = [(layer, layer.training) for layer in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode


@contextmanager
def attention_shown() -> Iterator[None]:
    """Keep attention from its fast path, which calls no layer inside, and so no hook."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _LentWeights(TorchFunctionMode):
    """Counts the MACs with weights that are used while their layer is not called.

    Swin's attention does so: it takes the weights of its projections, and calls no layer.
    """

    PRODUCTS = (F.linear, F.conv1d, F.conv2d, F.conv3d)

    def __init__(self, weights: Mapping[str, LayerWeight], macs: Counter[str]) -> None:
        super().__init__()
        self.names = {id(use.tensor): name for name, use in weights.items() if use.is_parameter}
        self.macs = macs
        self.running: list[nn.Module] = []  # the layers that are being called

    def __torch_function__(
        self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func in self.PRODUCTS and not self.running:
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            if name := self.names.get(id(weight)):
                self.macs[name] += weight[0].numel() * output.numel()
        return output


def _attention_macs(
    layer: nn.MultiheadAttention, args: tuple, kwargs: dict
) -> Iterator[tuple[nn.Module, str, int]]:
    """Yield layer, attribute and MACs of the projections, `out_proj` too: it is never called."""
    given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
    tokens = {x: given[x].numel() // given[x].shape[-1] for x in ("query", "key", "value")}
    if layer.in_proj_weight is not None:
        yield layer, "in_proj_weight", layer.embed_dim**2 * sum(tokens.values())
    else:
        for x, count in tokens.items():
            attribute = f"{x[0]}_proj_weight"
            yield layer, attribute, getattr(layer, attribute).numel() * count
    yield layer.out_proj, "weight", layer.out_proj.weight.numel() * tokens["query"]


def shares_by_kind(table: "pd.DataFrame") -> "pd.DataFrame":
    """Return layers, and per cent of parameters and MACs, for each kind of layer."""
    grouped = table.groupby("kind")[["parameters", "macs"]].sum()
    shares = 100 * grouped / grouped.sum()
    shares.insert(0, "layers", table.groupby("kind").size())
    shares.columns = ["layers", "parameters, %", "MACs, %"]
    return shares.sort_values("MACs, %", ascending=False).round(2)
