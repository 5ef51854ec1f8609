"""One-shot pruning that makes up for what it removes: SparseGPT.

Explained in `02_prune_2_4.ipynb`.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from helpers.checks import TutorialError
from helpers.sparsity.eligibility import why_not_sparse
from helpers.sparsity.masks import mask_2to4

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
Layer = nn.Linear | Convolution

# So many numbers of a layer's input are unfolded at a time: 128 MiB in double precision.
_CHUNK = 2**24


def prune_sparsegpt_(
    model: nn.Module,
    batches: Iterable,
    target: str = "tensorrt",
    include: Iterable[str] = (),
    exclude: Iterable[str] = (),
    dampening: float = 0.01,
    block_size: int = 128,
) -> dict[str, Tensor]:
    """Prune 2:4 in place, and change the kept weights so that each layer's outputs stay close.

    One layer after another, in the order of execution, loses the weights that matter
    least for its outputs on the calibration images, as the layers already pruned hand
    them on. No gradient is computed, and nothing else in the network changes.

    Memory: a copy of the eligible weights on the CPU, to restore the network from; on
    the model's device what one layer needs, above all its Hessian of (columns, columns)
    float64 for each group of the layer.

    Args:
        model: any network; it runs in evaluation mode and gets its mode back.
        batches: tensors of images, or tuples whose first item is one. They are read
            once for every layer and moved to the model's device: a list, or a loader
            that yields the same images every time.
        target: what the layers are to be eligible for, as in `prune_2to4_`.
        include: as in `prune_2to4_`.
        exclude: as in `prune_2to4_`.
        dampening: what is added to the Hessian's diagonal, as a share of its mean.
        block_size: so many columns are pruned before the others are updated, a
            multiple of four; it changes the speed, and nothing else but the rounding.

    Returns:
        The mask of each pruned weight, by the parameter's name.

    Raises:
        TutorialError: a weight or an input of a layer is NaN or infinite, a layer is
            not called or neither convolution nor linear, `batches` cannot be read, or a
            Hessian is singular. After this or any other error the network is as it was.

    Source: Frantar and Alistarh, "SparseGPT", arXiv 2301.00774. Explained in
    `02_prune_2_4.ipynb`.
    """
    if iter(batches) is batches:
        raise TutorialError(
            "`batches` is an iterator, which is exhausted after one pass, and the calibration "
            "images are read once for every layer. Pass a list or a DataLoader."
        )
    weights = _eligible_weights(model, target, include, exclude)
    layers = {name: _layers_with(model, name, weight) for name, weight in weights.items()}
    masks = {}
    with torch.no_grad(), _evaluation_mode(model), _all_or_nothing(weights):
        calls = _count_calls(model, layers, batches)
        for name in tqdm(calls, desc="SparseGPT", leave=False):
            hessian = _hessian(model, name, layers[name], calls[name], batches)
            masks[name] = _prune_weight_(weights[name], hessian, dampening, block_size, name)
    return {name: masks[name] for name in weights}


def sparsegpt(
    weight: Tensor,
    hessian: Tensor,
    dampening: float = 0.01,
    block_size: int = 128,
    name: str = "the weight",
) -> tuple[Tensor, Tensor]:
    """Prune a matrix 2:4, and change the kept weights to keep its products close.

    The columns are visited from left to right. At every fourth, each row gives up the
    two weights of the group whose loss costs least; for the error of each, the columns
    to its right make up as well as they can.

    Args:
        weight: (*, rows, columns); every four columns form a group.
        hessian: (*, columns, columns), the sum of x xᵀ over all inputs x, in float64.
        dampening: what is added to the Hessian's diagonal, as a share of its mean.
        block_size: so many columns are pruned before the others are updated.
        name: what to call the weight in an error.

    Returns:
        The pruned matrix in float64, and its mask; true where a weight is kept.

    Raises:
        TutorialError: the Hessian is singular, or `dampening` or `block_size` is no
            sensible number.

    Source: Frantar and Alistarh, "SparseGPT", arXiv 2301.00774, algorithm 1. Explained
    in `02_prune_2_4.ipynb`.
    """
    if block_size < 4 or block_size % 4:
        raise TutorialError(f"block_size is {block_size}; it must be a multiple of four.")
    factor = _inverse_factor(hessian, dampening, name)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    pruned = weight.detach().to(torch.float64, copy=True)
    mask = torch.ones_like(pruned, dtype=torch.bool)
    columns = weight.shape[-1]
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        errors = torch.zeros_like(pruned[..., start:stop])
        for column in range(start, stop):
            if column % 4 == 0:
                group = slice(column, column + 4)
                # The square of this is what the outputs lose when the weight goes.
                loss = pruned[..., group] / pivots[..., None, group]
                mask[..., group] = mask_2to4(loss.reshape(-1, 4), name).view_as(loss)
            removed = pruned[..., column].masked_fill(mask[..., column], 0)
            error = (removed / pivots[..., None, column]).unsqueeze(-1)
            pruned[..., column:stop] -= error * factor[..., column, None, column:stop]
            errors[..., column - start] = error.squeeze(-1)
        pruned[..., stop:] -= errors @ factor[..., start:stop, stop:]
    return pruned.masked_fill_(~mask, 0), mask


def _inverse_factor(hessian: Tensor, dampening: float, name: str) -> Tensor:
    """Return the upper triangular U with UᵀU = inverse of the dampened Hessian.

    Row j of U, divided by its pivot, says how the columns right of j make up for a change
    of column j when those to its left stay fixed.
    """
    if not 0 <= dampening < math.inf:
        raise TutorialError(f"dampening is {dampening}; it must be a number from zero on.")
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1, keepdim=True)
    # A layer whose inputs were all zero may lose any weights; with 1 it is the smallest.
    damping = dampening * torch.where(mean > 0, mean, 1)
    dampened = hessian + torch.diag_embed(damping.expand_as(diagonal))
    # Factored from the last column to the first, H = V Vᵀ has an upper triangular V, and U
    # is its inverse: no inverse of H itself is formed.
    factor, failed = torch.linalg.cholesky_ex(dampened.flip(-1, -2))
    pivots = factor.diagonal(dim1=-2, dim2=-1).square().amin(-1)
    rounding = hessian.shape[-1] * torch.finfo(hessian.dtype).eps * diagonal.amax(-1)
    if failed.any() or not (pivots > rounding).all():
        raise TutorialError(
            f"The Hessian of {name} is singular: some of its inputs are always zero or follow "
            f"from the others. Use more calibration images or a dampening above {dampening}."
        )
    identity = torch.eye(hessian.shape[-1], dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.solve_triangular(factor.flip(-1, -2), identity, upper=True)


def _prune_weight_(
    weight: Tensor, hessian: Tensor, dampening: float, block_size: int, name: str
) -> Tensor:
    """Prune a layer's weight in place and return its mask."""
    # (groups, rows, kernel positions * input channels): four columns in a row are four
    # input channels at one position, which is the pattern that the hardware reads.
    groups, channels = len(hessian), weight.shape[1]
    split = weight.detach().reshape(groups, len(weight) // groups, channels, -1)
    matrix = split.transpose(2, 3).flatten(2)
    pruned, mask = (
        result.unflatten(2, (-1, channels)).transpose(2, 3).reshape(weight.shape)
        for result in sparsegpt(matrix, hessian, dampening, block_size, name)
    )
    weight.copy_(pruned)
    if not weight.isfinite().all():
        raise TutorialError(
            f"{name} has become too large for {weight.dtype}. Use more calibration images or a "
            f"dampening above {dampening}."
        )
    return mask


# The inputs of a layer.


def _hessian(
    model: nn.Module, name: str, layers: list[Layer], calls: int, batches: Iterable
) -> Tensor:
    """Return the sum of x xᵀ over what a weight is multiplied with, (groups, columns, columns).

    Thousands of terms of one sign are added and a matrix with a condition in the
    thousands is then inverted, so this is done in float64.
    """
    weight, columns = layers[0].weight, layers[0].weight[0].numel()
    shape = getattr(layers[0], "groups", 1), columns, columns
    hessian = torch.zeros(shape, dtype=torch.float64, device=weight.device)
    left = 0

    def add(layer: Layer, inputs: Tensor) -> None:
        nonlocal left
        for rows in _unfold(layer, inputs):
            hessian.baddbmm_(rows.mT, rows)
        left -= 1
        if left == 0:
            raise _InputsSeen

    with _watch(layers, add):
        for images in _images(model, batches):
            left = calls
            with suppress(_InputsSeen):
                model(images)
    if not hessian.isfinite().all():
        raise TutorialError(
            f"The inputs of {name} have NaN or infinite values. Look for them in the calibration "
            "images and in the layers before it."
        )
    return hessian


def _unfold(layer: Layer, inputs: Tensor) -> Iterator[Tensor]:
    """Yield what a layer multiplies its weight with, as (groups, rows, columns) in float64.

    The columns are ordered as in `_prune_weight_`: position by position of the kernel, all
    channels of a group together.
    """
    windows = (
        inputs.reshape(-1, layer.in_features)
        if isinstance(layer, nn.Linear)
        else _windows(layer, inputs)
    )
    groups, (channels, *kernel) = getattr(layer, "groups", 1), layer.weight.shape[1:]
    for part in windows.split(max(1, _CHUNK // windows[0].numel())):
        part = part.reshape(len(part), groups, channels, -1, math.prod(kernel))
        yield part.permute(1, 0, 3, 4, 2).flatten(3).flatten(1, 2).double()


def _windows(layer: Convolution, inputs: Tensor) -> Tensor:
    """Return what a kernel sees at each place, (images, channels, *output, *kernel), a view."""
    kernel = layer.kernel_size
    if inputs.dim() == len(kernel) + 1:  # a single image
        inputs = inputs.unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    windows = F.pad(inputs, _padding(layer), mode)
    for axis, size in enumerate(kernel):
        step, dilation = layer.stride[axis], layer.dilation[axis]
        reach = dilation * (size - 1) + 1
        windows = windows.unfold(axis + 2, reach, step)[..., ::dilation]
    return windows


def _padding(layer: Convolution) -> list[int]:
    """Return a convolution's padding as `F.pad` takes it: before and after, last axis first."""
    if layer.padding == "valid":
        return [0, 0] * len(layer.kernel_size)
    if layer.padding == "same":  # an odd number goes after
        totals = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [(padding, padding) for padding in layer.padding]
    return [number for pair in reversed(pairs) for number in pair]


# The network around it.


class _InputsSeen(Exception):  # noqa: N818 - it ends a forward pass, and is no error
    """The rest of the network need not be computed."""


def _count_calls(
    model: nn.Module, layers: dict[str, list[Layer]], batches: Iterable
) -> Counter[str]:
    """Return how often the first batch meets each weight, in the order of execution."""
    names = {layer: name for name, users in layers.items() for layer in users}
    calls: Counter[str] = Counter()
    with _watch(names, lambda layer, _: calls.update([names[layer]])):
        model(next(_images(model, batches)))
    for name in layers:
        if name not in calls:
            raise TutorialError(
                f"{name} was not used on the first calibration batch: the network does not call "
                "its layer, or only reads the weight. Leave it dense with `exclude`."
            )
    return calls


@contextmanager
def _watch(layers: Iterable[Layer], see: Callable[[Layer, Tensor], None]) -> Iterator[None]:
    """Call `see` with a layer and its input before each call of one of these layers."""

    def hook(layer: Layer, args: tuple, kwargs: dict) -> None:
        see(layer, args[0] if args else kwargs["input"])

    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _images(model: nn.Module, batches: Iterable) -> Iterator[Tensor]:
    """Yield the images of each batch on the model's device."""
    device = next(model.parameters()).device
    count = 0
    for batch in batches:
        images = batch[0] if isinstance(batch, tuple | list) else batch
        if not isinstance(images, Tensor):
            raise TutorialError(
                f"A calibration batch is a {type(images).__name__}. Pass tensors of images, or "
                "tuples whose first item is one."
            )
        count += 1
        yield images.to(device)
    if count == 0:
        raise TutorialError("There are no calibration images: `batches` is empty.")


def _eligible_weights(
    model: nn.Module, target: str, include: Iterable[str], exclude: Iterable[str]
) -> dict[str, nn.Parameter]:
    """Return the weights to prune, each once, by name."""
    rules = {
        "tensorrt": lambda layer: not why_not_sparse(layer),
        "asp": lambda layer: layer.weight.shape[0] % 8 == 0 and layer.weight.shape[1] % 16 == 0,
    }
    layers = {
        f"{name}.weight".removeprefix("."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, Layer) and rules[target](layer)
    }
    include, exclude = tuple(include) or ("*",), tuple(exclude)
    weights: dict[str, nn.Parameter] = {}
    for name, layer in layers.items():
        chosen = any(fnmatch(name, pattern) for pattern in include)
        dropped = any(fnmatch(name, pattern) for pattern in exclude)
        if chosen and not dropped and all(layer.weight is not w for w in weights.values()):
            weights[name] = layer.weight
    return weights


def _layers_with(model: nn.Module, name: str, weight: nn.Parameter) -> list[Layer]:
    """Return the layers that use a weight: several, if it is shared."""
    if not weight.isfinite().all():
        raise TutorialError(
            f"{name} has NaN or infinite values. Go back to a checkpoint from before the "
            "training diverged."
        )
    layers = [m for m in model.modules() if isinstance(m, Layer) and m.weight is weight]
    if not layers:
        raise TutorialError(
            f"{name} is the weight of no convolution or linear layer, and its inputs cannot be "
            "seen. Leave it dense with `exclude`."
        )
    return layers


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode, and each of its modules back into its own."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _all_or_nothing(weights: dict[str, nn.Parameter]) -> Iterator[None]:
    """Restore the weights if anything goes wrong, an interruption too."""
    before = {name: weight.detach().to("cpu", copy=True) for name, weight in weights.items()}
    try:
        yield
    except BaseException:
        for name, weight in weights.items():
            weight.copy_(before[name])
        raise
