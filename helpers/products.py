"""Which weight multiplies what while a model runs.

Linear layers, convolutions, attention and recurrent layers all end in a few operators of
PyTorch, whether a layer is called or only lends its weight; a `TorchDispatchMode` sees every
call of one of these, and takes composite operators apart itself, because in inference mode they
arrive whole. A weight is recognised by its memory, so that views, parts and transposes of it
count, and so do copies of it, such as those that autocast makes. What is computed from a weight
number by number, such as its standardised or normalised form, is known as that.

PyTorch's `FlopCounterMode` works in the same way, but counts by module and not by weight, leaves
out products with a vector, recurrent layers and attention on the CPU, and loads Triton.

Used by the table of layers (`01_load_pretrained.ipynb`), SparseGPT (`02b_better_pruning.ipynb`)
and the advice (`07_sparse_tensor_cores.ipynb`).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

_COPIES = (aten.clone, aten._to_copy)


@dataclass(frozen=True, eq=False)
class Product:
    """One product of matrices or one convolution; some operators compute several.

    `weight` is the name of the weight among the two factors; empty if neither is one. `factor`
    is then what the operator takes of the weight, such as its transpose or a part, and `input`
    what that is multiplied with. `computed_from` names the weights that `factor` was computed
    from instead, number by number; at most one of the two is there. Without either, they are
    the second factor and the first. `factor_first` says whether `factor` is the first of the two,
    and `of_constants` whether neither depends on what the model is called with.
    """

    operator: torch._ops.OpOverloadPacket
    arguments: tuple[Any, ...]
    weight: str
    computed_from: tuple[str, ...]
    input: Tensor
    factor: Tensor
    factor_first: bool
    output: Tensor
    macs: int
    of_constants: bool

    @property
    def is_convolution(self) -> bool:
        """Whether it is a convolution, transposed or not, forward or backward."""
        return self.operator in (aten.convolution, aten.convolution_backward)

    def sums_over(self, weight: Tensor, dim: int) -> bool:
        """Return whether the product sums over a dimension of the weight that `factor` is.

        2:4 along another dimension does not help this product.
        """
        if self.operator is aten.convolution:
            return dim == (0 if self.arguments[6] else 1)
        if self.operator is aten.convolution_backward:
            return dim == (1 if self.arguments[7] else 0)
        if self.operator not in _MATRIX_PRODUCTS or not self.factor.dim():
            return False
        last = self.factor.dim() - 1
        summed = last if self.factor_first else max(0, last - 1)
        return self.factor.stride(summed) == weight.stride(dim)


@contextmanager
def watch_products(
    weights: Mapping[str, Tensor], see: Callable[[Product], None], constants: Iterable[Tensor] = ()
) -> Iterator[None]:
    """Call `see` with every product right after it is computed, in order of execution.

    Works in every grad mode and on every device, `meta` too. An error that `see` raises comes
    out of the model. A product of constants alone, of two weights for instance, is shown when
    its result meets something else, or at the end; if a weight is computed with it, never.

    Args:
        weights: the weights to look for among the factors, by name.
        see: called with each product.
        constants: other tensors that do not depend on what the model is called with, such as
            its buffers.
    """
    # Attention's fast path computes all its products in one operator. Copies of weights that
    # autocast has kept would not be recognised, and are out of date if a weight was changed.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    torch.clear_autocast_cache()
    mode = _ProductMode(weights, see, constants)
    try:
        with mode:
            yield
        mode.show_the_rest()
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


# --- the operators ---


class _Factors(NamedTuple):
    left: Tensor
    right: Tensor
    macs: int


_Parts = Iterator[_Factors]  # the products that one call of an operator computes

# At which argument the two matrices begin.
_MATRIX_PRODUCTS: dict[Any, int] = {
    aten.mm: 0,
    aten.mv: 0,
    aten.dot: 0,
    aten.vdot: 0,
    aten.bmm: 0,
    aten._int_mm: 0,
    aten._scaled_mm: 0,
    aten._grouped_mm: 0,
    aten._scaled_grouped_mm: 0,
    aten._euclidean_dist: 0,
    aten.addmm: 1,
    aten.addmm_: 1,
    aten._addmm_activation: 1,
    aten._sparse_addmm: 1,
    aten.addmv: 1,
    aten.addmv_: 1,
    aten.addbmm: 1,
    aten.addbmm_: 1,
    aten.baddbmm: 1,
    aten.baddbmm_: 1,
}
_SUMS_OF_PRODUCTS = (aten.addbmm, aten.addbmm_)


def _matrix_product(operator: Any, args: tuple[Any, ...], output: Tensor) -> _Parts:
    first = _MATRIX_PRODUCTS[operator]
    left, right = args[first : first + 2]
    if left.layout is not torch.strided:  # only what is stored of a sparse matrix is multiplied
        yield _Factors(left, right, left._nnz() * output.shape[-1])
        return
    macs = output.numel() * left.shape[-1]
    yield _Factors(left, right, macs * len(left) if operator in _SUMS_OF_PRODUCTS else macs)


def _convolution(_: Any, args: tuple[Any, ...], output: Tensor) -> _Parts:
    # Each number of the output is one dot product of the length of a filter; each number
    # that goes into a transposed convolution is multiplied by a whole filter.
    inputs, weight, is_transposed = args[0], args[1], args[6]
    yield _Factors(inputs, weight, (inputs if is_transposed else output).numel() * _filter(weight))


def _convolution_backward(_: Any, args: tuple[Any, ...], __: object) -> _Parts:
    gradient, inputs, weight, is_transposed, wanted = *args[:3], args[7], args[10]
    macs = (inputs if is_transposed else gradient).numel() * _filter(weight)
    if wanted[0]:
        yield _Factors(gradient, weight, macs)
    if wanted[1]:
        yield _Factors(inputs, gradient, macs)


def _deformable_convolution(_: Any, args: tuple[Any, ...], output: Tensor) -> _Parts:
    yield _Factors(args[0], args[1], output.numel() * _filter(args[1]))


def _filter(weight: Tensor) -> int:
    return weight.numel() // len(weight) if len(weight) else 0


def _attention(_: Any, args: tuple[Any, ...], __: object) -> _Parts:
    query, key, value = args[:3]
    scores = query.numel() // query.shape[-1] * key.shape[-2]
    yield _Factors(query, key, scores * query.shape[-1])
    yield _Factors(key, value, scores * value.shape[-1])


def _attention_backward(_: Any, args: tuple[Any, ...], __: object) -> _Parts:
    gradient, query, key, value = args[:4]
    scores = query.numel() // query.shape[-1] * key.shape[-2]
    # The scores once more, and what comes back to query and key; then to scores and value.
    yield _Factors(query, key, 3 * scores * query.shape[-1])
    yield _Factors(gradient, value, 2 * scores * value.shape[-1])


def _recurrent(_: Any, args: tuple[Any, ...], __: object) -> _Parts:
    inputs = args[0]
    weights = args[1] if isinstance(args[1], list | tuple) else args[1:3]
    steps = inputs.numel() // inputs.shape[-1]
    for weight in weights:
        if weight.dim() == 2:  # the others are biases
            yield _Factors(inputs, weight, steps * weight.numel())


def _bilinear(_: Any, args: tuple[Any, ...], output: Tensor) -> _Parts:
    left, weight, right = args[:3]
    yield _Factors(left, weight, left.shape[0] * weight.numel())
    yield _Factors(left, right, output.numel() * right.shape[-1])


_OPERATORS: dict[Any, Callable[[Any, tuple[Any, ...], Any], _Parts]] = {
    **dict.fromkeys(_MATRIX_PRODUCTS, _matrix_product),
    aten.convolution: _convolution,
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_efficient_attention: _attention,
    aten._scaled_dot_product_cudnn_attention: _attention,
    aten._scaled_dot_product_fused_attention_overrideable: _attention,
    aten._scaled_dot_product_flash_attention_backward: _attention_backward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._scaled_dot_product_efficient_attention_backward: _attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward: _attention_backward,
    aten.mkldnn_rnn_layer: _recurrent,
    aten._cudnn_rnn: _recurrent,
    aten.miopen_rnn: _recurrent,
    aten._trilinear: _bilinear,
}
_BY_NAME = {"torchvision::deform_conv2d": _deformable_convolution}  # only where it is installed


# --- watching ---


@dataclass
class _Constant:
    """A tensor that does not depend on what the model is called with.

    `names` are the weights that it is or was computed from, number by number, and `as_it_is`
    tells which of both. `products` went into it and have not been shown.
    """

    tensor: Tensor  # keeping it keeps its memory from being given to another one
    names: tuple[str, ...]
    as_it_is: bool
    given: bool = False
    products: tuple[Product, ...] = ()


class _ProductMode(TorchDispatchMode):
    supports_higher_order_operators = True  # such as torch.cond; they run, but are not watched

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        see: Callable[[Product], None],
        constants: Iterable[Tensor],
    ) -> None:
        super().__init__()
        self.see = see
        self.waiting: dict[Product, None] = {}
        # The constants in each storage: several weights may be parts of one.
        self.known: dict[int, list[_Constant]] = {}
        for name, weight in weights.items():
            self._remember(_Constant(weight, (name,), as_it_is=True, given=True))
        for tensor in constants:
            if not self._constant(tensor):
                self._remember(_Constant(tensor, (), as_it_is=True, given=True))

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
        parts = _OPERATORS.get(operator) or _BY_NAME.get(func._schema.name)
        if parts is None and func is not torch.ops.prim.device.default:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        inputs = list(_tensors((*args, *kwargs.values())))
        constants = [self._constant(tensor) for tensor in inputs]
        random = torch.Tag.nondeterministic_seeded in func.tags
        of_constants = not random and all(constant is not None for constant in constants)
        output = func(*args, **kwargs)
        products = []
        if parts is not None:
            first = next(_tensors([output]))
            products = [
                self._product(operator, args, factors, first, of_constants)
                for factors in parts(operator, args, first)
            ]
        known = [(tensor, each) for tensor, each in zip(inputs, constants, strict=True) if each]
        if of_constants:
            self._note_constants(func, (args, kwargs), known, output, products)
        else:
            self._show([constant for _, constant in known], products)
            for tensor in _written(func, args, kwargs):
                self.known.pop(storage_of(tensor), None)
        return output

    def show_the_rest(self) -> None:
        """Show the products of constants whose results met nothing else."""
        self._settle(tuple(self.waiting), show=True)

    def _product(
        self,
        operator: torch._ops.OpOverloadPacket,
        args: tuple[Any, ...],
        factors: _Factors,
        output: Tensor,
        of_constants: bool,
    ) -> Product:
        left, right, macs = factors
        constant, is_first = self._constant(right), False
        if not (constant and constant.names):
            constant = self._constant(left)
            is_first = bool(constant and constant.names)
        names = constant.names if constant else ()
        factor, other = (left, right) if is_first else (right, left)
        return Product(
            operator=operator,
            arguments=args,
            weight=names[0] if constant and names and constant.as_it_is else "",
            computed_from=names if constant and not constant.as_it_is else (),
            input=other,
            factor=_once(factor) if names else factor,
            factor_first=is_first,
            output=output,
            macs=macs,
            of_constants=of_constants,
        )

    def _show(self, constants: list[_Constant], products: list[Product]) -> None:
        """Show the products of an operator, after those that went into its constants.

        What a weight was computed with is no part of the model's own arithmetic.
        """
        for product in products:
            if product.computed_from and (weight := self._constant(product.factor)):
                self._settle(weight.products, show=False)
        for constant in constants:
            self._settle(constant.products, show=True)
        for product in products:
            self.see(product)

    def _settle(self, products: tuple[Product, ...], show: bool) -> None:
        for product in products:
            if product in self.waiting:
                del self.waiting[product]
                if show:
                    self.see(product)

    def _note_constants(
        self,
        func: torch._ops.OpOverload,
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        inputs: list[tuple[Tensor, _Constant]],
        output: Any,
        products: list[Product],
    ) -> None:
        """Note what an operator makes of constants alone."""
        self.waiting |= dict.fromkeys(products)
        before = [product for _, constant in inputs for product in constant.products]
        waiting = tuple(dict.fromkeys([*before, *products]))
        written = {storage_of(tensor) for tensor in _written(func, *arguments)}
        is_copy = func.overloadpacket in _COPIES and all(each.as_it_is for _, each in inputs)
        for made in _tensors([output]):
            names = [
                name
                for tensor, constant in inputs
                # A product mixes the numbers of a weight, and so does a sum over them.
                if not products and tensor.numel() == made.numel()
                for name in constant.names
            ]
            new = _Constant(made, tuple(dict.fromkeys(names)), is_copy, products=waiting)
            old = self._constant(made)
            if old is None:
                self._remember(new)
            elif storage_of(made) in written and not old.given:
                old.names, old.as_it_is, old.products = new.names, False, waiting

    def _remember(self, constant: _Constant) -> None:
        if constant.tensor.layout is torch.strided:
            self.known.setdefault(storage_of(constant.tensor), []).append(constant)

    def _constant(self, tensor: Tensor) -> _Constant | None:
        """Return the constant whose memory a tensor lies in."""
        if tensor.layout is not torch.strided:  # a sparse matrix has no such memory
            return None
        start = tensor.storage_offset() * tensor.element_size()
        for constant in self.known.get(storage_of(tensor), ()):
            whole = constant.tensor
            first = whole.storage_offset() * whole.element_size()
            if first <= start < first + _extent(whole):
                return constant
        return None


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _written(
    func: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[Tensor]:
    """Yield the tensors that an operator writes to."""
    if not func._schema.is_mutable:
        return
    arguments = func._schema.arguments
    given = dict(zip((each.name for each in arguments), args, strict=False)) | kwargs
    for argument in arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors([given.get(argument.name)])


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
