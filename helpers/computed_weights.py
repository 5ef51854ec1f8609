"""Weights that a layer computes at each call, from a parameter that 2:4 may or may not survive.

A parametrization, a hook or the layer's own `forward` may stand between the parameter and the
product. Weight norm scales each output, so zeros remain; weight standardisation subtracts a
mean, so none does. `find_source` tells by running the layer alone on random numbers.

A module may also compute with the weight of a layer inside of it. Only a run of the model shows
that: `find_lost` tells.

Used by the table of layers (`01_load_pretrained.ipynb`).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from helpers.products import Product, watch_products

COMPUTED = "computed from other parameters"
ZEROS_ARE_LOST = "computed before each product: zeros do not stay zero"
OTHER_DIMENSION = "not summed over along its input channels"
LOST_OUTSIDE = "computed with outside of its layer: zeros do not stay zero"
UNKNOWN_OUTSIDE = "computed with outside of its layer: unknown whether zeros stay zero"

Shape = tuple[int, ...]


class Source(NamedTuple):
    """Where the numbers of a weight are.

    `path` is the parameter's path in the layer, `as_it_is` whether the layer multiplies by the
    parameter itself, and `reason` why 2:4 of the parameter is not 2:4 of the weight.
    """

    path: str
    as_it_is: bool
    reason: str = ""


def find_source(
    layer: nn.Module, attribute: str, inputs: Sequence[Shape], input_dim: int = 1
) -> Source:
    """Return which parameter a layer computes a weight from, and whether its zeros survive.

    The layer runs alone, with its parameters replaced by random numbers of which half are zero.
    Its hooks after the call do not run, and whatever the run changes is put back.

    Args:
        layer: any layer that holds a weight.
        attribute: the name by which the layer's `forward` takes the weight.
        inputs: the smallest shapes that the layer takes.
        input_dim: the weight's dimension of input channels.
    """
    held = layer._parameters.get(attribute)
    parameters = dict(layer.named_parameters())
    if not all(map(_is_plain, parameters.values())):
        return Source(attribute, held is not None, "" if held is not None else COMPUTED)
    shape = held.shape if held is not None else getattr(layer, attribute).shape
    generator = torch.Generator().manual_seed(0)
    numbers = {name: _random_like(each, shape, generator) for name, each in parameters.items()}
    removed = {name: each == 0 for name, each in numbers.items()}
    factors = _factors(layer, attribute, inputs, input_dim, numbers, shape)
    if factors is None:
        name = type(layer).__name__
        return Source(attribute, False, f"unknown: {name}.forward does not run on a tensor alone")
    usual = [attribute, f"{attribute}_orig", f"{attribute}_v"]
    names = sorted(
        {name for factor in factors for name in factor.names if numbers[name].shape == shape},
        key=lambda name: usual.index(name) if name in usual else len(usual),
    )
    if not names:
        return Source(attribute, False, COMPUTED)
    name = names[0]
    uses = [factor for factor in factors if name in factor.names]
    as_it_is = name == attribute and all(factor.as_it_is for factor in uses)
    if not all(_survive(factor, removed[name]) for factor in uses):
        return Source(name, as_it_is, OTHER_DIMENSION if as_it_is else ZEROS_ARE_LOST)
    return Source(name, as_it_is)


def used_weight(
    layer: nn.Module,
    attribute: str,
    inputs: Sequence[Shape],
    input_dim: int = 1,
    state: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Return the weight that a layer multiplies by, in the shape of its weight.

    If that cannot be seen, it is what the layer holds.

    Args:
        layer: as in `find_source`.
        attribute: as in `find_source`.
        inputs: as in `find_source`.
        input_dim: as in `find_source`.
        state: parameters and buffers to take instead of the layer's own, by their names in it.
    """
    held = layer._parameters.get(attribute)
    numbers = dict(state or {})
    parameters = {name: numbers.pop(name, each).detach() for name, each in layer.named_parameters()}
    has_numbers = all(_is_plain(each) and not each.is_meta for each in parameters.values())
    if has_numbers:
        shape = held.shape if held is not None else getattr(layer, attribute).shape
        found = _factors(layer, attribute, inputs, input_dim, parameters, shape, numbers)
        for factor in found or ():
            if factor.weight is not None:
                return factor.weight
    return held if held is not None else getattr(layer, attribute)


def find_lost(
    model: nn.Module,
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    weights: Mapping[str, tuple[Tensor, int]],
) -> dict[str, str]:
    """Return by name the weights whose zeros may not reach a product of the model, and why.

    The model runs once, in the mode that it is in, with the parameters replaced by random numbers
    of which half are zero. Whatever the run changes is put back, except numbers in buffers.

    Args:
        model: the model.
        inputs: its positional and its named arguments.
        weights: parameters of the model with their dimension of input channels, by any names.
    """
    lost: dict[str, str] = {}
    numbers: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    for name, (parameter, _) in weights.items():
        if _is_plain(parameter) and not parameter.is_meta:
            numbers[name] = _random_like(parameter, parameter.shape, generator)
        else:
            lost[name] = UNKNOWN_OUTSIDE
    if not numbers:
        return lost
    removed = {name: each == 0 for name, each in numbers.items()}

    def see(product: Product) -> None:
        for name in product.computed_from:
            weight = _in_shape(product, numbers[name].shape, weights[name][1])
            if weight is None or bool(weight[removed[name]].any()):
                lost[name] = LOST_OUTSIDE

    names = {id(weights[name][0]): name for name in numbers}
    given = {
        path: numbers[names[id(parameter)]]
        for path, parameter in model.named_parameters()
        if id(parameter) in names
    }
    args, kwargs = inputs
    with (
        attributes_restored(model),
        torch.no_grad(),
        torch.random.fork_rng(devices=[]),
        watch_products(numbers, see, model.buffers()),
    ):
        functional_call(model, given, args, kwargs)
    return lost


def _is_plain(parameter: Tensor) -> bool:
    """Return whether a parameter is an ordinary tensor of floating-point numbers."""
    is_tensor = type(parameter) in (nn.Parameter, Tensor)
    return is_tensor and parameter.is_floating_point() and parameter.numel() > 0


def _random_like(parameter: Tensor, shape: torch.Size, generator: torch.Generator) -> Tensor:
    numbers = torch.rand(parameter.shape, generator=generator) + 0.5
    if parameter.shape == shape:
        removed = torch.rand(shape, generator=generator) < 0.5
        removed[0] = removed[:, 0] = False  # a norm of zeros alone would make them NaN
        numbers.masked_fill_(removed, 0)
    return numbers.to(_device(parameter), parameter.dtype)


def _device(tensor: Tensor) -> torch.device:
    return torch.device("cpu") if tensor.is_meta else tensor.device


# --- running a layer alone ---


class _Factor(NamedTuple):
    """What a layer multiplied its input by.

    `names` are the parameters that it comes from. `weight` is what it is in the shape of the
    weight; None if it is a part of it, or summed over along another dimension.
    """

    names: tuple[str, ...]
    as_it_is: bool
    weight: Tensor | None


def _survive(factor: _Factor, removed: Tensor) -> bool:
    if factor.weight is None:  # a part of the parameter itself has its zeros
        return factor.as_it_is
    return not factor.weight[removed].any()


def _factors(
    layer: nn.Module,
    attribute: str,
    inputs: Sequence[Shape],
    input_dim: int,
    parameters: Mapping[str, Tensor],
    shape: torch.Size,
    state: Mapping[str, Tensor] | None = None,
) -> list[_Factor] | None:
    """Return what a layer multiplies its input by; None if it does not run alone.

    Buffers are taken from `state`, else they are copies of the layer's own.
    """
    found: list[_Factor] = []

    def see(product: Product) -> None:
        names = (product.weight,) if product.weight else product.computed_from
        if names and not product.of_constants:
            weight = _in_shape(product, shape, input_dim)
            found.append(_Factor(names, bool(product.weight), weight))

    buffers = {}
    for name, each in layer.named_buffers():
        given = (state or {}).get(name, each)
        buffers[name] = torch.ones_like(given, device="cpu") if given.is_meta else given.clone()
    inside = {f"layer.{name}": each for name, each in {**parameters, **buffers}.items()}
    like = next(iter(parameters.values()))
    ones = {size: like.new_ones(size, device=_device(like)) for size in inputs}
    alone = _Alone(layer, attribute)
    for in_front in range(3):  # a layer may require dimensions in front of the channels
        found.clear()
        shaped = {size: each[(None,) * in_front] for size, each in ones.items()}
        example = tuple(shaped[size] for size in inputs)  # attention may see that two are one
        try:
            with attributes_restored(layer), torch.no_grad(), torch.random.fork_rng(devices=[]):
                for module in layer.modules():
                    module.training = False
                with watch_products(parameters, see, buffers.values()):
                    functional_call(alone, inside, example)
        except Exception:
            continue  # a layer may raise anything for inputs that it does not take
        return found
    return None


def _in_shape(product: Product, shape: torch.Size, input_dim: int) -> Tensor | None:
    """Return a factor as the weight of a layer, if the product sums over its input channels."""
    factor = product.factor
    if factor.numel() != shape.numel():
        return None
    if product.is_convolution:
        return factor.reshape(shape) if product.sums_over(factor, input_dim) else None
    if factor.dim() != 2:
        return None
    rows_first = factor if product.factor_first else factor.mT  # its columns are summed over
    return (rows_first if input_dim == 1 else rows_first.mT).reshape(shape)


class _Alone(nn.Module):
    """A layer without its hooks, except those that compute its weight before the call."""

    def __init__(self, layer: nn.Module, attribute: str) -> None:
        super().__init__()
        self.layer = layer
        held = attribute in layer._parameters or parametrize.is_parametrized(layer, attribute)
        self.prepare = [] if held else list(layer._forward_pre_hooks.values())

    def forward(self, *inputs: Tensor) -> object:
        for hook in self.prepare:
            hook(self.layer, inputs)
        return self.layer.forward(*inputs)


@contextmanager
def attributes_restored(model: nn.Module) -> Iterator[None]:
    """Give all modules of a model their attributes back, as hooks that compute weights set them.

    Their mode is one too; numbers that are written into a tensor are not put back.
    """
    before = [(module, dict(vars(module))) for module in model.modules()]
    try:
        yield
    finally:
        for module, attributes in before:
            vars(module).clear()
            vars(module).update(attributes)
