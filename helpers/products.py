"""Which weight multiplies what while a model runs.

Linear layers, convolutions and attention all end in a few operators of PyTorch, whether a
layer is called or only lends its weight; a `TorchDispatchMode` sees every call of one of
these, and takes composite operators apart itself, because in inference mode they arrive
whole. A weight is recognised by its memory, so that views, parts and transposes of it count,
and so do copies of it, such as those that autocast makes.

PyTorch's `FlopCounterMode` works in the same way, but counts by module and not by weight, leaves
out products with a vector, and loads Triton.

Used by the table of layers (`01_load_pretrained.ipynb`), SparseGPT (`02_prune_2_4.ipynb`) and
the advice (`07_sparse_tensor_cores.ipynb`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# The operators, and at which argument the two factors begin.
_PRODUCTS: dict[Any, int] = {
    aten.mm: 0,
    aten.mv: 0,
    aten.bmm: 0,
    aten._scaled_mm: 0,
    aten.addmm: 1,
    aten.addmv: 1,
    aten.baddbmm: 1,
    aten.convolution: 0,
}
_COPIES = (aten.clone, aten._to_copy)


@dataclass(frozen=True, eq=False)
class Product:
    """One call of an operator that multiplies matrices or convolves.

    `weight` is the name of the weight among the two factors; empty if neither is one. `factor`
    is then what the operator takes of the weight, such as its transpose or a part, and `input`
    what that is multiplied with. Without a weight they are the second factor and the first.
    `factor_first` says whether `factor` is the first of the two.
    """

    operator: torch._ops.OpOverloadPacket
    arguments: tuple[Any, ...]
    weight: str
    input: Tensor
    factor: Tensor
    factor_first: bool
    output: Tensor
    macs: int


@contextmanager
def watch_products(weights: Mapping[str, Tensor], see: Callable[[Product], None]) -> Iterator[None]:
    """Call `see` with every product right after it is computed, in order of execution.

    Works in every grad mode and on every device, `meta` too. An error that `see` raises comes
    out of the model.

    Args:
        weights: the weights to look for among the factors, by name.
        see: called with each product.
    """
    # Attention's fast path computes all its products in one operator. Copies of weights that
    # autocast has kept would not be recognised, and are out of date if a weight was changed.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.clear_autocast_cache()
    try:
        with _ProductMode(weights, see):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


class _ProductMode(TorchDispatchMode):
    supports_higher_order_operators = True  # such as torch.cond; they run, but are not watched

    def __init__(self, weights: Mapping[str, Tensor], see: Callable[[Product], None]) -> None:
        super().__init__()
        self.see = see
        # The tensors in each storage: several weights may be parts of one.
        self.known: dict[int, list[tuple[str, Tensor]]] = {}
        for name, weight in weights.items():
            self._remember(name, weight)

    def __torch_dispatch__(
        self,
        func: Any,  # an operator
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return func(*args, **kwargs)
        operator = func.overloadpacket
        if operator in _PRODUCTS:
            output = func(*args, **kwargs)
            self.see(self._product(operator, args, output))
            return output
        if func is not torch.ops.prim.device.default:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        output = func(*args, **kwargs)
        if operator in _COPIES and (name := self._name(args[0])):
            self._remember(name, output)
        return output

    def _product(
        self, operator: torch._ops.OpOverloadPacket, args: tuple[Any, ...], output: Tensor
    ) -> Product:
        first = _PRODUCTS[operator]
        left, right = args[first : first + 2]
        macs = _count_macs(operator, args, left, right, output)
        name = self._name(right)
        if not name and (name := self._name(left)):
            return Product(operator, args, name, right, _once(left), True, output, macs)
        factor = _once(right) if name else right
        return Product(operator, args, name, left, factor, False, output, macs)

    def _remember(self, name: str, weight: Tensor) -> None:
        # Keeping the tensor keeps its memory from being given to another one.
        self.known.setdefault(storage_of(weight), []).append((name, weight))

    def _name(self, tensor: Tensor) -> str:
        """Return the name of the weight whose memory a tensor lies in; empty if in none."""
        if tensor.layout is not torch.strided:  # a sparse matrix has no such memory
            return ""
        start = tensor.storage_offset() * tensor.element_size()
        for name, weight in self.known.get(storage_of(tensor), ()):
            first = weight.storage_offset() * weight.element_size()
            if first <= start < first + _extent(weight):
                return name
        return ""


def _count_macs(
    operator: torch._ops.OpOverloadPacket,
    args: tuple[Any, ...],
    left: Tensor,
    right: Tensor,
    output: Tensor,
) -> int:
    if operator is not aten.convolution:
        return output.numel() * left.shape[-1]
    # Each number of the output is one dot product of the length of a filter; each number
    # that goes into a transposed convolution is multiplied by a whole filter.
    is_transposed = args[6]
    return (left if is_transposed else output).numel() * right[0].numel()


def storage_of(tensor: Tensor) -> int:
    """Return what identifies a tensor's memory, on the device `meta` too, while it lives."""
    return tensor.untyped_storage()._cdata


def _extent(tensor: Tensor) -> int:
    """Return how many bytes lie between the first and the last number of a tensor."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (1 + sum((size - 1) * stride for size, stride in steps)) * tensor.element_size()


def _once(factor: Tensor) -> Tensor:
    """Return one matrix of a factor that is the same for all matrices of a batch."""
    same = factor.dim() == 3 and (len(factor) == 1 or factor.stride(0) == 0)
    return factor[0] if same else factor
