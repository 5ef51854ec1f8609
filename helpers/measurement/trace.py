"""The kernels of a model and what each of them multiplies, reads and writes.

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

from helpers.computed_weights import UNKNOWN_OUTSIDE, attributes_restored
from helpers.layers import UNSUPPORTED, LayerWeight, ModelInputs, in_mode, layer_weights
from helpers.parameters import require_unsharded, unwrapped
from helpers.products import Product, storage_of, watch_products

RELUS = ("relu", "relu6", "hardtanh")
DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout")  # nothing in evaluation mode
LOOKUPS = ("embedding", "index", "index_select", "gather")  # read no more than they return


@dataclass(frozen=True)
class TracedKernel:
    """What one kernel computes, reads and writes."""

    operations: int
    read: int  # numbers, each tensor once
    written: int


@dataclass(frozen=True)
class TracedLayer(TracedKernel):
    """A kernel that multiplies by the weight of a layer.

    It stands for the product of activations (m, k) and a weight (n, k), one in each group.
    """

    weight: LayerWeight
    m: int
    n: int
    k: int

    @property
    def is_product(self) -> bool:
        """Whether the layer is one product of matrices: linear, or a 1x1 convolution."""
        weight = self.weight
        if weight.transposed or weight.groups > 1:
            return False
        return math.prod(weight.shape[2:]) == 1


def trace_kernels(model: nn.Module, inputs: ModelInputs) -> list[TracedKernel]:
    """Return the kernels of a model for some inputs, as `model_inputs` returns them.

    The model runs on the device `meta`, so nothing is computed or changed; only the shapes of
    the inputs count.
    """
    model = unwrapped(model)
    with torch.inference_mode():
        weights = {
            name: weight
            for name, weight in layer_weights(model).items()
            if weight.stored is not None and not isinstance(weight.layer, UNSUPPORTED)
        }
        for name, weight in weights.items():
            require_unsharded(weight.tensor, name)
        state = dict(model.named_parameters()) | dict(model.named_buffers())
        meta = {id(x): torch.empty_like(x, device="meta") for x in state.values()}
        given = {id(x): torch.empty_like(x, device="meta") for x in _tensors(inputs)}
        args, kwargs = tree_map_only(Tensor, lambda x: given[id(x)], inputs)
        recorder = _Recorder(weights, list(given.values()))
        on_meta = {name: meta[id(weight.stored)] for name, weight in weights.items()}
        watching = watch_products(on_meta, recorder.see, meta.values())
        with in_mode(model, training=False), attributes_restored(model), watching, recorder:
            functional_call(model, {name: meta[id(x)] for name, x in state.items()}, args, kwargs)
    return recorder.kernels


class _Recorder(TorchDispatchMode):
    """Notes the kernels of a model while it runs on the device `meta`.

    In inference mode it sees each operation whole, by PyTorch's name. `watch_products` takes the
    operation apart while it runs, and shows what it multiplies.
    """

    def __init__(self, weights: dict[str, LayerWeight], inputs: list[Tensor]) -> None:
        super().__init__()
        self.weights = weights
        self.products: list[Product] = []  # of the operation that is running
        self.kernels: list[TracedKernel] = []
        # What wrote each tensor that depends on the input, by its storage. Keeping the tensor
        # keeps its storage from being given to another one.
        self.made = {storage_of(x): ("input", x) for x in inputs}
        # The stand-ins of tensors on other devices, which a model may make and write into.
        self.twins: dict[tuple, tuple[Tensor, Tensor]] = {}

    def see(self, product: Product) -> None:
        """Note a product that is part of the running operation."""
        if not product.of_constants:  # such a one is computed once, beforehand
            self.products.append(product)

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = tree_map_only(Tensor, self._on_meta, (args, kwargs or {}))
        self.products.clear()
        result = func(*given[0], **given[1])
        inputs, outputs = _tensors(given), _tensors(result)
        # What comes from weights alone is computed once, beforehand.
        if outputs and any(storage_of(tensor) in self.made for tensor in inputs):
            self._note(func, inputs, outputs[0])
            for other in outputs[1:]:
                self.made.setdefault(storage_of(other), (func.overloadpacket.__name__, other))
        return result

    def _on_meta(self, tensor: Tensor) -> Tensor:
        if tensor.is_meta:
            return tensor
        key = (storage_of(tensor), tensor.storage_offset(), tensor.shape, tensor.stride())
        return self.twins.setdefault(key, (tensor, tensor.to("meta")))[1]

    def _note(self, func: torch._ops.OpOverload, inputs: list[Tensor], output: Tensor) -> None:
        """Note one operation on the model's input or on what came from it."""
        name = func.overloadpacket.__name__.rstrip("_")
        before, _ = self.made.get(storage_of(inputs[0]), ("", None))
        if _moves_nothing(func, name, inputs, output):
            return
        if name in DROPOUTS or (name == "batch_norm" and before == "layer"):
            after = before
        elif name in RELUS and before in ("layer", "sum"):
            after = "relu"
        else:
            self.kernels.append(self._kernel(name, inputs, output))
            is_sum = name in ("add", "batch_norm")
            is_layer = isinstance(self.kernels[-1], TracedLayer)
            after = "layer" if is_layer else "sum" if is_sum else name
        self.made[storage_of(output)] = (after, output)

    def _kernel(self, name: str, inputs: list[Tensor], output: Tensor) -> TracedKernel:
        different = {(storage_of(x), x.storage_offset(), x.shape): x for x in inputs}.values()
        read = output.numel() if name in LOOKUPS else sum(map(_stored, different))
        macs = sum(product.macs for product in self.products)
        of_weights = ((name, product) for product in self.products for name in _names(product))
        name, product = next(of_weights, ("", None))
        if product is None:
            return TracedKernel(2 * macs, read, output.numel())
        weight = self.weights[name]
        if not product.weight and not weight.is_computed:
            weight = replace(weight, refusal=UNKNOWN_OUTSIDE)
        used = product.factor.numel()  # attention may use a part of its weight at a time
        pixels = 1 if weight.transposed else math.prod(weight.shape[2:])
        k = pixels * weight.input_channels
        n = used // k // weight.groups
        m = macs // used
        kernel = TracedLayer(2 * macs, read, output.numel(), weight, m, n, k)
        # A strided 1x1 convolution reads only the pixels that its stride does not skip.
        return replace(kernel, read=(m + n) * k, written=m * n) if kernel.is_product else kernel


def _names(product: Product) -> tuple[str, ...]:
    """Return the weights that a product multiplies by, as they are or computed from them."""
    return (product.weight,) if product.weight else product.computed_from


def _moves_nothing(
    func: torch._ops.OpOverload, name: str, inputs: list[Tensor], output: Tensor
) -> bool:
    """Return whether an operation returns a view, or uses only the shape of its input."""
    if name.startswith("new_") or name.endswith("_like"):
        return True
    if func._schema.is_mutable:
        return torch.Tag.inplace_view in func.tags
    return storage_of(output) in map(storage_of, inputs)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _stored(tensor: Tensor) -> int:
    """Return how many numbers a tensor holds in memory: an expanded one repeats some."""
    return min(tensor.numel(), tensor.untyped_storage().nbytes() // tensor.element_size())
