"""The kernels of a network and what each of them multiplies, reads and writes.

Used in `07_sparse_tensor_cores.ipynb`.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from helpers.layers import LayerWeight, attention_shown, in_mode, layer_weights

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
