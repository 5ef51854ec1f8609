import pytest
import torch
import torch.nn.utils.prune as torch_prune
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from helpers.computed_weights import (
    COMPUTED,
    OTHER_DIMENSION,
    ZEROS_ARE_LOST,
    attributes_restored,
    find_source,
    used_weight,
)
from helpers.layers import layer_weights
from helpers.sparsity import is_2to4, mask_2to4

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Standardised(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight - self.weight.mean(1, keepdim=True), self.bias)


class StandardisedInPlace(nn.Linear):
    def forward(self, x):
        weight = self.weight.clone()
        weight.sub_(weight.mean(1, keepdim=True)).div_(weight.std())
        return F.linear(x, weight, self.bias)


class Merged(nn.Linear):
    """A low-rank adapter that is added to the weight before the product."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.a, self.b = nn.Parameter(torch.randn(2, 16)), nn.Parameter(torch.zeros(16, 2))

    def forward(self, x):
        return F.linear(x, self.weight + self.b @ self.a, self.bias)


class Beside(Merged):
    """The same adapter with products of its own."""

    def forward(self, x):
        return F.linear(x, self.weight, self.bias) + x @ self.a.T @ self.b.T


class Masked(nn.Linear):
    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scores = nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        return F.linear(x, (self.scores > 0.75) * self.weight)


class Backwards(nn.Linear):
    def forward(self, x):
        return x @ self.weight


class Tokens(nn.Linear):
    def forward(self, x):
        batch, length, channels = x.shape
        return super().forward(x).view(batch, length, channels)


class Scaled(nn.Linear):
    def forward(self, x, scale):
        return scale * super().forward(x)


class LowRank(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, 16)), nn.Parameter(torch.zeros(16, 2))

    def forward(self, weight):
        return weight + self.b @ self.a


def adapted():
    layer = nn.Linear(16, 16)
    parametrize.register_parametrization(layer, "weight", LowRank())
    return layer


V = "parametrizations.weight.original1"


@pytest.mark.parametrize(
    ("make", "path", "as_it_is", "reason"),
    [
        (lambda: nn.Linear(16, 16), "weight", True, ""),
        (lambda: Beside(16, 16), "weight", True, ""),
        (lambda: Tokens(16, 16), "weight", True, ""),
        (lambda: Masked(16, 16), "weight", False, ""),
        (lambda: parametrizations.weight_norm(nn.Linear(16, 16)), V, False, ""),
        (lambda: parametrizations.weight_norm(nn.Linear(16, 16), dim=None), V, False, ""),
        (lambda: nn.utils.weight_norm(nn.Linear(16, 16)), "weight_v", False, ""),
        (
            lambda: parametrizations.spectral_norm(nn.Linear(16, 16)),
            "parametrizations.weight.original", False, "",
        ),
        (lambda: nn.utils.spectral_norm(nn.Linear(16, 16)), "weight_orig", False, ""),
        (
            lambda: torch_prune.l1_unstructured(nn.Linear(16, 16), "weight", 0.3),
            "weight_orig", False, "",
        ),
        (lambda: Standardised(16, 16), "weight", False, ZEROS_ARE_LOST),
        (lambda: StandardisedInPlace(16, 16), "weight", False, ZEROS_ARE_LOST),
        (lambda: Merged(16, 16), "weight", False, ZEROS_ARE_LOST),
        (adapted, "parametrizations.weight.original", False, ZEROS_ARE_LOST),
        (lambda: Backwards(16, 16), "weight", True, OTHER_DIMENSION),
        (lambda: parametrizations.orthogonal(nn.Linear(16, 16)), "weight", False, COMPUTED),
        (
            lambda: Scaled(16, 16), "weight", False,
            "unknown: Scaled.forward does not run on a tensor alone",
        ),
    ],
    ids=[
        "linear", "adapter beside", "tokens", "mask of scores", "weight norm", "norm of all",
        "old weight norm", "spectral norm", "old spectral norm", "pruned by torch",
        "standardised", "standardised in place", "adapter merged", "adapter as parametrization",
        "transposed", "orthogonal", "two inputs",
    ],
)  # fmt: skip
def test_the_parameter_that_is_multiplied_by_is_found_and_whether_its_zeros_survive(
    make, path, as_it_is, reason
):
    torch.manual_seed(0)
    assert find_source(make(), "weight", [(1, 16)]) == (path, as_it_is, reason)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: parametrizations.weight_norm(nn.Conv2d(16, 8, 3, dilation=2)),
        lambda: nn.utils.weight_norm(nn.Conv1d(16, 8, 5)),
        lambda: parametrizations.weight_norm(nn.ConvTranspose1d(16, 8, 4, stride=2), dim=1),
        lambda: nn.utils.spectral_norm(nn.Conv3d(16, 8, (1, 3, 3))),
        lambda: parametrizations.weight_norm(nn.MultiheadAttention(16, 2).out_proj),
    ],
)
def test_pruning_the_parameter_makes_the_weight_in_the_product_2to4(layer):
    torch.manual_seed(0)
    (weight,) = layer_weights(layer()).values()
    assert weight.is_computed and not weight.refusal
    assert not is_2to4(weight.tensor, weight.input_dim)
    with torch.no_grad():
        weight.stored.mul_(mask_2to4(weight.tensor, dim=weight.input_dim))
    assert is_2to4(weight.tensor, weight.input_dim)


@pytest.mark.parametrize("channels", [(1, 8), (8, 1), (1, 1), (2, 2)])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_norm_of_few_numbers_is_no_obstacle(channels, dim):
    layer = parametrizations.weight_norm(nn.Conv1d(*channels, 2), dim=dim)
    assert find_source(layer, "weight", [(1, channels[0], 2)]).reason == ""


def test_the_weight_that_is_used_is_the_one_that_was_computed():
    torch.manual_seed(0)
    layer = Standardised(16, 8)
    used = used_weight(layer, "weight", [(1, 16)])
    assert torch.equal(used, layer.weight - layer.weight.mean(1, keepdim=True))
    other = {"weight": torch.ones(8, 16)}
    assert used_weight(layer, "weight", [(1, 16)], state=other).count_nonzero() == 0


def test_looking_at_a_layer_changes_nothing():
    class Counting(Standardised):
        calls, last = 0, None

        def forward(self, x):
            self.calls, self.last = self.calls + 1, x
            self.seen.add_(1)
            return super().forward(x) + torch.rand(1)

    layer = Counting(16, 16)
    layer.register_buffer("seen", torch.zeros(()))
    layer.register_forward_hook(lambda *_: pytest.fail("a hook after the call ran"))
    layer.register_forward_pre_hook(lambda *_: pytest.fail("a hook of the user ran"))
    before, numbers = dict(vars(layer)), layer.weight.detach().clone()
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    find_source(layer, "weight", [(1, 16)])
    used_weight(layer, "weight", [(1, 16)])
    assert torch.equal(torch.rand(1), expected)
    assert vars(layer) == before
    assert layer.training and layer.seen == 0 and torch.equal(layer.weight, numbers)


def test_attributes_come_back_after_an_error():
    layer = nn.Linear(4, 4)
    with pytest.raises(KeyError), attributes_restored(layer):
        layer.made, layer.training = 1, False
        raise KeyError
    assert layer.training and not hasattr(layer, "made")
