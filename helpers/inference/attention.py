"""Self-attention written with linear layers. Used in `06_infer_and_benchmark.ipynb`.

`nn.MultiheadAttention` multiplies by its weights itself and calls no layer for it. As two
linear layers around the attention, its projections can be replaced like any other layer.
"""

import inspect
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
        split = self.qkv(query).unflatten(-1, (3, self.heads, -1))  # ..., token, 3, head, width
        q, k, v = split.movedim(-3, 0).transpose(-3, -2)
        mixed = F.scaled_dot_product_attention(q, k, v)
        return self.out(mixed.transpose(-3, -2).flatten(-2)), None


def split_self_attention_(model: fx.GraphModule) -> None:
    """Replace attention by `SelfAttention` wherever that computes the same, in place."""
    for name, calls in module_calls(model).items():
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.MultiheadAttention) or is_read(model, name):
            continue
        if is_self_attention(layer, calls):
            model.set_submodule(name, SelfAttention(layer))


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
