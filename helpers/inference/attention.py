"""Self-attention written with linear layers. Used in `06_infer_and_benchmark.ipynb`.

`nn.MultiheadAttention` multiplies by its weights itself and calls no layer for it. As two
linear layers around the attention, its projections can be replaced like any other layer.
"""

import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, fx, nn

from helpers.inference.traced import is_read, module_calls
from helpers.layers import is_plain

ARGUMENTS = tuple(inspect.signature(nn.MultiheadAttention.forward).parameters)[1:]


class SelfAttention(nn.Module):
    """Multi-head self-attention as two linear layers around the attention itself.

    It computes what `attention` does in evaluation mode, and shares its weights.

    Args:
        attention: a layer that `is_self_attention` accepts.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        assert attention.in_proj_weight is not None
        self.heads = attention.num_heads
        self.qkv = _linear_of(attention.in_proj_weight, attention.in_proj_bias)
        self.out = _linear_of(attention.out_proj.get_parameter("weight"), attention.out_proj.bias)

    def forward(self, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        return self.out(attend(self.qkv(query), self.heads)), None


def attend(projected: Tensor, heads: int) -> Tensor:
    """Return what attention mixes of queries, keys and values (..., token, 3 * width)."""
    split = projected.unflatten(-1, (3, heads, -1))  # ..., token, 3, head, width
    q, k, v = split.movedim(-3, 0).transpose(-3, -2)
    mixed = F.scaled_dot_product_attention(q, k, v)
    return mixed.transpose(-3, -2).flatten(-2)


def split_self_attention_(model: fx.GraphModule) -> None:
    """Replace attention by `SelfAttention` wherever that computes the same, in place."""
    for name, calls in module_calls(model).items():
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.MultiheadAttention) or is_read(model, name):
            continue
        if is_self_attention(layer, calls):
            model.set_submodule(name, SelfAttention(layer))


def inline_self_attention_(model: fx.GraphModule) -> None:
    """Write each `SelfAttention` into the graph as the calls that it makes, in place."""
    for name, calls in module_calls(model).items():
        layer = model.get_submodule(name)
        if not isinstance(layer, SelfAttention):
            continue
        for call in calls:
            given = dict(zip(ARGUMENTS, call.args, strict=False)) | call.kwargs
            with model.graph.inserting_before(call):
                projected = model.graph.call_module(f"{name}.qkv", (given["query"],))
                mixed = model.graph.call_function(attend, (projected, layer.heads))
                output = model.graph.call_module(f"{name}.out", (mixed,))
            for user in list(call.users):
                if user.target is operator.getitem and user.args[1] == 0:
                    user.replace_all_uses_with(output)
                if not user.users:  # nor does anyone read the weights of the attention
                    model.graph.erase_node(user)
            if not call.users:
                model.graph.erase_node(call)
    model.recompile()


def is_self_attention(layer: nn.MultiheadAttention, calls: Sequence[fx.Node]) -> bool:
    """Return whether attention is always that of one batch of sequences to itself, unmasked."""
    if not is_plain(layer, nn.MultiheadAttention):
        return False
    if not layer.batch_first or layer.in_proj_weight is None:
        return False
    if layer.bias_k is not None or layer.add_zero_attn:
        return False
    for call in calls:
        given = dict(zip(ARGUMENTS, call.args, strict=False)) | call.kwargs
        own = {given.get(name) for name in ("query", "key", "value")}
        masked = any(given.get(name) is not None for name in ("key_padding_mask", "attn_mask"))
        if len(own) > 1 or masked or given.get("need_weights", True):
            return False
    return True


def _linear_of(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """Return a linear layer that holds these parameters."""
    outputs, inputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias=bias is not None, device="meta")
    layer.weight = weight
    layer.register_parameter("bias", bias)
    return layer
