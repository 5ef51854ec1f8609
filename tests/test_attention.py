from collections.abc import Callable

import pytest
import torch
from inference_cases import GAP, prepared, random, transformer
from torch import Tensor, nn

from helpers.inference.fold import fold_batch_norm
from helpers.inference.sparse_torch import use_gemms_
from helpers.metrics import max_relative_error


class Attends(nn.Module):
    """Attention in one of its many forms."""

    def __init__(self, how: dict, of: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.attention, self.of = nn.MultiheadAttention(64, 4, **how), of
        self.head = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.of(self.attention, x))


@pytest.fixture
def pruned_transformer() -> nn.Module:
    torch.manual_seed(0)
    return prepared(transformer(), random(2, 3, 32, 32))


def test_the_projections_of_self_attention_become_gemms(pruned_transformer):
    layers = use_gemms_(fold_batch_norm(pruned_transformer), "dense")
    block = "encoder.layers.encoder_layer_{}."
    parts = ("self_attention.qkv", "self_attention.out", "mlp.0", "mlp.3")
    expected = [block.format(number) + part for number in (0, 1) for part in parts]
    assert [layer.name for layer in layers] == [*expected, "heads.head"]


def test_self_attention_of_a_single_sequence_is_the_same():
    torch.manual_seed(0)
    model = Attends({"batch_first": True}, lambda own, x: own(x, x, x, need_weights=False)[0])
    folded = fold_batch_norm(model)
    assert len(use_gemms_(folded, "dense")) == 3
    with torch.inference_mode():
        for x in (random(6, 64), random(5, 6, 64)):
            assert max_relative_error(folded(x), model.eval()(x)) < GAP


@pytest.mark.parametrize(
    ("how", "of"),
    [
        ({}, lambda own, x: own(x, x, x, need_weights=False)[0]),  # tokens come first
        ({"batch_first": True}, lambda own, x: own(x, x.relu(), x, need_weights=False)[0]),
        ({"batch_first": True}, lambda own, x: own(x, x, x)[0]),  # wants the weights
        (
            {"batch_first": True},
            lambda own, x: own(x, x, x, need_weights=False, attn_mask=torch.eye(6).bool())[0],
        ),
        ({"batch_first": True, "kdim": 64, "vdim": 64, "add_bias_kv": True},
         lambda own, x: own(x, x, x, need_weights=False)[0]),
        ({"batch_first": True, "add_zero_attn": True},
         lambda own, x: own(x, x, x, need_weights=False)[0]),
    ],
)  # fmt: skip
def test_other_attention_is_unchanged(how, of):
    torch.manual_seed(0)
    model = Attends(how, of).eval()
    folded = fold_batch_norm(model)
    (layer,) = use_gemms_(folded, "dense")
    assert layer.name == "head"
    x = random(5, 6, 64)
    with torch.inference_mode():
        assert max_relative_error(folded(x), model(x)) < GAP


def test_attention_with_a_shared_weight_is_unchanged():
    class ReadsAttention(Attends):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (self.attention.in_proj_weight**2).mean()

    torch.manual_seed(0)
    how = {"batch_first": True}
    model = ReadsAttention(how, lambda own, x: own(x, x, x, need_weights=False)[0]).eval()
    folded = fold_batch_norm(model)
    (layer,) = use_gemms_(folded, "dense")
    assert layer.name == "head"
    x = random(5, 6, 64)
    with torch.inference_mode():
        assert max_relative_error(folded(x), model(x)) < GAP
