"""Keep the pruned weights of a model at zero while it trains. Explained in `03_retrain.ipynb`."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import wraps
from types import MethodType
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from helpers.errors import InputError
from helpers.layers import layer_weights
from helpers.parameters import (
    fully_sharded,
    local_part,
    no_grad_for,
    require_lasting,
    require_whole_groups,
    reshard_,
    shard_like,
    unwrapped,
)
from helpers.sparsity.masks import is_2to4
from helpers.sparsity.prune import Masks, masked_parameters, not_2to4, writable_parameters

_logger = logging.getLogger(__name__)


class _Handle(Protocol):
    def remove(self) -> None: ...


@dataclass(frozen=True)
class HeldMasks:
    """Handle returned by `hold_masks`; `remove()`, or the end of a `with` block, releases them."""

    handles: tuple[_Handle, ...]

    def remove(self) -> None:
        """Let the optimizer change every weight again."""
        for handle in self.handles:
            handle.remove()

    def __enter__(self) -> "HeldMasks":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def hold_masks(
    optimizer: Optimizer, model: nn.Module, masks: Masks, check_every: int = 0
) -> HeldMasks:
    """Set the pruned weights to zero again after every step of the optimizer.

    Gradients, momentum and weight decay may move a pruned weight; PyTorch calls this
    hook at the end of `optimizer.step()`, which sets it to zero again before anything
    reads it. NaN and infinite weights are left unchanged, for the training loop to notice.

    Args:
        optimizer: any optimizer over the model's parameters; with several, hold the masks in
            each. If it wraps another one, as those of Accelerate and Lookahead do, the zeros
            are put back after the steps of both.
        model: the model, also wrapped by `torch.compile`, DataParallel or
            DistributedDataParallel, or sharded by `fully_shard`. Its weights are looked up by
            name at every step, so it may change device or data type.
        masks: as `prune_2to4_` or `masks_of` returned them. If there are none, a warning is
            logged and nothing is held.
        check_every: before the first step and then before every so many, require that the
            weights are 2:4. The check finds what else has written to them since: another
            optimizer, a dense checkpoint. 0: never.

    Returns:
        A handle; `handle.remove()` stops the holding.

    Raises:
        InputError: a mask has no weight of its name and shape in the model, a weight has no
            lasting numbers of its own, `optimizer` is none, steps none of the weights or holds
            another mask for one of them, or `check_every` is negative; later, in a checked
            step, a weight is not 2:4.
    """
    if check_every < 0:
        raise InputError(f"check_every is {check_every}; give a number of steps, or 0 for never.")
    optimizers = _with_wrapped(optimizer)
    holding = _Holding(model, masks, check_every)
    if not masks:
        _logger.warning("No masks are held, since there are none: the training will be dense.")
        return HeldMasks(())
    _require_stepped(holding, optimizers)
    innermost = optimizers[-1]
    held = _held.setdefault(innermost, OrderedDict())
    _require_one_mask_each(holding, held.values())
    handles: list[_Handle] = []
    for each in optimizers:
        before = holding.check if check_every and each is innermost else None
        handles += _around_steps(each, before, holding.put_zeros_back)
    mark = RemovableHandle(held)
    held[mark.id] = holding
    return HeldMasks((*handles, mark))


# By optimizer, as long as it lives: what is held after its steps.
_held: WeakKeyDictionary[Any, OrderedDict[int, "_Holding"]] = WeakKeyDictionary()


class _Holding:
    """The masks of a model, as factors that its weights are multiplied by after a step."""

    def __init__(self, model: nn.Module, masks: Masks, check_every: int) -> None:
        self.model = unwrapped(model)
        self.sharded = fully_sharded(self.model)
        weights = writable_parameters(self.model, masks)
        self.masks = dict(masks)
        self.weights = dict(zip(masks, weights, strict=True))  # when the holding began
        self.factors: dict[str, Tensor] = {}
        self.check_every = check_every
        self.steps = 0
        self.input_dims: dict[str, int] = {}
        if check_every:
            layers = layer_weights(self.model)
            self.input_dims = {n: layers[n].input_dim if n in layers else 1 for n in masks}
        for name, weight in self.weights.items():
            require_lasting(weight, name)
            if check_every:
                require_whole_groups(weight, name, self.input_dims[name])
            self._factor(name, weight)

    def _factor(self, name: str, weight: Tensor) -> Tensor:
        """Return the mask of a weight in its own type and strides.

        Only then is it one multiplication.
        """
        local = local_part(weight)
        factor = self.factors.get(name)
        if factor is None or not _alike(factor, local):
            factor = torch.empty_like(local, requires_grad=False)
            self.factors[name] = factor.copy_(shard_like(self.masks[name], weight))
        return factor

    def put_zeros_back(self) -> None:
        """Set to zero what the masks do not keep."""
        reshard_(self.sharded)
        weights = masked_parameters(self.model, self.masks)
        factors = [
            self._factor(name, weight) for name, weight in zip(self.masks, weights, strict=True)
        ]
        local = [local_part(weight) for weight in weights]
        with no_grad_for(local):
            torch._foreach_mul_(local, factors)

    def check(self) -> None:
        """Raise an error if a weight is not 2:4, in the steps that are checked."""
        if self.steps % self.check_every == 0:
            reshard_(self.sharded)
            weights = masked_parameters(self.model, self.masks)
            for name, weight in zip(self.masks, weights, strict=True):
                if not is_2to4(local_part(weight), self.input_dims[name]):
                    remedy = "Something besides this optimizer wrote to it, or training diverged."
                    raise not_2to4(name, remedy)
        self.steps += 1


def _alike(factor: Tensor, weight: Tensor) -> bool:
    return (
        factor.dtype == weight.dtype
        and factor.device == weight.device
        and factor.stride() == weight.stride()
    )


# --- optimizers ---


def _with_wrapped(optimizer: object) -> list[Any]:
    """Return an optimizer and those that it wraps, whatever it calls them, the innermost last."""
    if not _is_optimizer(optimizer):
        raise InputError(
            f"An object of type {type(optimizer).__name__} is no optimizer: it has no `step` or "
            "no `param_groups`. Give the optimizer whose steps train the model."
        )
    found = [optimizer]
    for each in found:  # grows while it is read
        for value in getattr(each, "__dict__", {}).values():
            parts = list(value.values()) if isinstance(value, Mapping) else value
            for part in parts if isinstance(parts, list | tuple) else [parts]:
                if _is_optimizer(part) and not any(part is known for known in found):
                    found.append(part)
    return found


def _is_optimizer(value: object) -> bool:
    return callable(getattr(value, "step", None)) and hasattr(value, "param_groups")


def _require_stepped(holding: _Holding, optimizers: list[Any]) -> None:
    """Raise an error if no weight of the masks is among the parameters of the optimizers."""
    stepped = {
        id(parameter)
        for optimizer in optimizers
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    if not any(id(weight) in stepped for weight in holding.weights.values()):
        raise InputError(
            f"{type(optimizers[0]).__name__} steps none of the weights that the masks belong to. "
            "Make it from the parameters of this model, after fully_shard or anything else that "
            "replaces them; an optimizer that steps copies of them, as DeepSpeed's does, cannot "
            "hold masks."
        )


def _require_one_mask_each(holding: _Holding, others: Iterable["_Holding"]) -> None:
    """Raise an error if another mask is held for one of the weights already."""
    for other in others:
        masks = {id(weight): other.masks[name] for name, weight in other.weights.items()}
        for name, weight in holding.weights.items():
            if id(weight) in masks and not _equal(holding.masks[name], masks[id(weight)], weight):
                raise InputError(
                    f"The optimizer holds another mask for {name} already, and with both only "
                    "what both keep would remain. Call remove() on the handle that hold_masks "
                    "returned then."
                )


def _equal(one: Tensor, other: Tensor, weight: Tensor) -> bool:
    device = local_part(weight).device
    return torch.equal(shard_like(one, weight).to(device), shard_like(other, weight).to(device))


def _around_steps(
    optimizer: Any, before: Callable[[], None] | None, after: Callable[[], None]
) -> list[_Handle]:
    """Call functions before and after every step of an optimizer."""
    # A wrapper that is an Optimizer by type may not have been set up as one. PyTorch marks the
    # `step` of a class whose instances run the hooks; others take them without ever running one.
    if getattr(type(optimizer).step, "hooked", False) and isinstance(optimizer, Optimizer):
        handles: list[_Handle] = [optimizer.register_step_post_hook(lambda *_: after())]
        if before is not None:
            handles.append(optimizer.register_step_pre_hook(lambda *_: before()))
        return handles
    return [_StepHook(optimizer, before, after)]


class _StepHook:
    """Calls functions around the steps of an optimizer that has no hooks."""

    def __init__(
        self, optimizer: Any, before: Callable[[], None] | None, after: Callable[[], None]
    ) -> None:
        self.optimizer = optimizer
        self.step = optimizer.step
        self.active = True

        @wraps(self.step)
        def step(_: object, *args: Any, **kwargs: Any) -> Any:
            if self.active and before is not None:
                before()
            result = self.step(*args, **kwargs)
            if self.active:
                after()
            return result

        # A method, because schedulers of the learning rate wrap it in turn, as one.
        optimizer.step = MethodType(step, optimizer)

    def remove(self) -> None:
        """Call them no more."""
        self.active = False
