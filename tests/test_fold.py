import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from helpers import sparsity
from helpers.errors import HelpersError
from helpers.inference.fold import fold_batch_norm
from helpers.metrics import max_relative_error

SHAPE = (1, 28, 28)


def images(count: int) -> torch.Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(count))


def test_folding_batch_norm_keeps_outputs_and_zeros(pruned_resnext):
    folded = fold_batch_norm(pruned_resnext)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    torch.testing.assert_close(folded(images(4)), pruned_resnext(images(4)), rtol=1e-4, atol=1e-5)
    weights = sparsity.eligible_weights(pruned_resnext)
    assert len(weights) > 5
    for name, weight in weights.items():
        assert torch.equal(folded.get_parameter(name) != 0, weight != 0)


def test_folding_leaves_the_model_unchanged(tiny_net):
    before = copy.deepcopy(tiny_net.train().state_dict())
    folded = fold_batch_norm(tiny_net)
    assert tiny_net.training
    assert not folded.training
    assert all(torch.equal(before[key], value) for key, value in tiny_net.state_dict().items())
    assert isinstance(tiny_net[1], nn.BatchNorm2d)


def conv_and_norm() -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Return a convolution, and a batch norm that changes what it is given."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(8)
    for values in (norm.weight, norm.bias, norm.running_mean):
        nn.init.normal_(values)
    return nn.Conv2d(8, 8, 1), norm


def hooked(where: int) -> nn.Module:
    network = nn.Sequential(*conv_and_norm())
    network[where].register_forward_hook(lambda layer, args, output: 2 * output)
    return network


class Twice(nn.Module):
    """Uses its convolution a second time, in one of several ways."""

    def __init__(self, second) -> None:
        super().__init__()
        self.layer, self.norm = conv_and_norm()
        self.again, self.second = self.layer, second

    def forward(self, x):
        return self.second(self, self.norm(self.layer(x)))


@pytest.mark.parametrize(
    "network",
    [
        Twice(lambda own, x: own.layer(x)),
        Twice(lambda own, x: own.norm(own.layer(x))),
        Twice(lambda own, x: own.again(x)),
        Twice(lambda own, x: nn.functional.conv2d(x, own.layer.weight)),
        hooked(0),
        hooked(1),
        nn.Sequential(parametrizations.weight_norm(conv_and_norm()[0]), conv_and_norm()[1]),
    ],
    ids=["again", "block", "name", "weight", "hook of layer", "hook of norm", "weight norm"],
)
def test_a_batch_norm_stays_where_folding_would_change_the_model(network):
    x = torch.randn(2, 8, 3, 3)
    with torch.inference_mode():
        assert max_relative_error(fold_batch_norm(network)(x), network.eval()(x)) < 1e-6


def test_a_batch_norm_after_a_linear_layer_stays():
    """It may be over the channels or, of three dimensions, over the second one."""
    for channels, shape in ((8, (5, 4)), (3, (5, 3, 4))):
        network = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(channels))
        nn.init.normal_(network[1].running_mean)
        x = torch.randn(shape)
        with torch.inference_mode():
            assert max_relative_error(fold_batch_norm(network)(x), network.eval()(x)) < 1e-6


def test_a_network_that_cannot_be_traced_is_refused_in_one_sentence():
    class Asks(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(HelpersError, match=r"Asks cannot be traced by torch\.fx \(TraceError"):
        fold_batch_norm(Asks())
