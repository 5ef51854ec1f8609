import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helpers.products import watch_products

MODES = [torch.enable_grad, torch.no_grad, torch.inference_mode]


def products_of(run, *inputs, weights=None, mode=torch.no_grad):
    seen = []
    with mode(), watch_products(weights or {}, seen.append):
        run(*inputs)
    return seen


LAYERS = {
    "linear": (nn.Linear(8, 4), (5, 8)),
    "linear without bias": (nn.Linear(8, 4, bias=False), (5, 8)),
    "one vector": (nn.Linear(8, 4, bias=False), (8,)),
    "one vector with bias": (nn.Linear(8, 4), (8,)),
    "a batch of matrices": (nn.Linear(8, 4, bias=False), (2, 5, 8)),
    "conv1d": (nn.Conv1d(4, 6, 3), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, groups=2, padding="same"), (2, 4, 9, 9)),
    "same, even": (nn.Conv2d(4, 6, 2, padding="same"), (2, 4, 9, 9)),
    "one image": (nn.Conv3d(4, 6, 2), (4, 5, 5, 5)),
    "transposed": (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 5)),
}


def macs_of(layer, inputs, output):
    if isinstance(layer, nn.ConvTranspose2d):
        return inputs.numel() * layer.weight[0].numel()
    return output.numel() * layer.weight[0].numel()


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("layer", "shape"), LAYERS.values(), ids=LAYERS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_each_layer_is_one_product_in_every_grad_mode(layer, shape, mode, device):
    with torch.device(device):
        inputs = torch.zeros(shape)
    weight = layer.weight.to(device)
    (product,) = products_of(
        lambda x: torch.func.functional_call(layer, {"weight": weight, **_bias(layer, device)}, x),
        inputs,
        weights={"a": torch.zeros(3, device=device), "weight": weight},
        mode=mode,
    )
    assert product.weight == "weight"
    assert product.factor.numel() == weight.numel()
    assert product.macs == macs_of(layer, inputs, layer(torch.zeros(shape)))


def _bias(layer, device):
    return {} if layer.bias is None else {"bias": layer.bias.to(device)}


@pytest.mark.parametrize("mode", MODES)
def test_operations_are_those_of_pytorchs_counter(mode):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(2),
        nn.TransformerEncoderLayer(64, 4, 32, batch_first=True), nn.Linear(64, 2),
    ).eval()  # fmt: skip
    images = torch.zeros(2, 3, 15, 15)
    # PyTorch's counter does not know the operator of attention on a CPU.
    apart = sdpa_kernel(SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), apart:
        torch.backends.mha.set_fastpath_enabled(False)
        model(images)
        torch.backends.mha.set_fastpath_enabled(True)
    seen = products_of(model, images, mode=mode)
    assert 2 * sum(product.macs for product in seen) == counter.get_total_flops() > 0


def test_products_are_shown_in_the_order_in_which_they_are_computed_with_their_tensors():
    torch.manual_seed(0)
    first, second = nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False)
    inputs = torch.randn(3, 4)
    one, two = products_of(
        lambda x: second(first(x)),
        inputs,
        weights={"second": second.weight, "first": first.weight},
    )
    assert (one.weight, two.weight) == ("first", "second")
    assert torch.equal(one.input, inputs) and torch.equal(one.factor, first.weight.T)
    assert torch.equal(two.input, one.output)
    assert torch.equal(two.output, second(first(inputs)))


@pytest.mark.parametrize(
    "use",
    [
        lambda x, weight: F.linear(x, weight),
        lambda x, weight: x @ weight.T,
        lambda x, weight: weight.T @ x.T,
        lambda x, weight: torch.einsum("bi,oi->bo", x, weight),
        lambda x, weight: F.linear(x, weight[2:5]),
        lambda x, weight: F.linear(x.bfloat16(), weight.bfloat16()),
        lambda x, weight: F.linear(x.double(), weight.double()[1:]),
        lambda x, weight: F.linear(x, weight.clone().contiguous()),
        lambda x, weight: torch.baddbmm(x[None], x[None], weight.expand(1, 8, 8)),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_a_weight_is_known_in_any_view_part_or_copy(use, mode):
    weight = nn.Parameter(torch.randn(8, 8))
    (product,) = products_of(
        lambda: use(torch.randn(8, 8), weight), weights={"w": weight}, mode=mode
    )
    assert product.weight == "w"


def test_a_factor_that_is_computed_differently_is_not_a_weight():
    weight = torch.randn(8, 8)
    (product,) = products_of(lambda: torch.randn(8, 8) @ (2 * weight), weights={"w": weight})
    assert product.weight == ""
    assert product.macs == 8**3


def test_the_factor_says_on_which_side_it_was():
    weight, x = torch.randn(8, 8), torch.randn(8, 8)
    (left,) = products_of(lambda: weight @ x, weights={"w": weight})
    (right,) = products_of(lambda: x @ weight, weights={"w": weight})
    assert (left.factor_first, right.factor_first) == (True, False)
    assert all(p.input is x and p.factor is weight for p in (left, right))


def test_weights_that_lie_in_one_storage_are_distinguished():
    memory = torch.randn(3 * 16)
    weights = {name: memory[16 * i : 16 * (i + 1)].view(4, 4) for i, name in enumerate("abc")}
    for name, weight in weights.items():
        (product,) = products_of(F.linear, torch.randn(2, 4), weight, weights=weights)
        assert product.weight == name


def test_attention_shows_its_projections_even_where_it_has_a_fast_path():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    weights = dict(encoder.named_parameters())
    seen = products_of(encoder, torch.zeros(2, 5, 8), weights=weights)
    assert [product.weight for product in seen if product.weight] == [
        "self_attn.in_proj_weight", "self_attn.out_proj.weight", "linear1.weight", "linear2.weight"
    ]  # fmt: skip
    assert torch.backends.mha.get_fastpath_enabled()


def test_copies_that_autocast_keeps_are_made_again():
    layer, x = nn.Linear(8, 8), torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            (product,) = products_of(layer, x, weights={"w": layer.weight})
            assert product.weight == "w"
            assert torch.equal(product.factor.T, layer.weight.bfloat16())
            with torch.no_grad():
                layer.weight.mul_(2)


def test_an_error_of_the_callback_is_raised_and_leaves_nothing_behind():
    def refuse(_):
        raise KeyError("enough")

    with pytest.raises(KeyError, match="enough"), watch_products({}, refuse):
        nn.Linear(4, 4)(torch.zeros(1, 4))
    assert torch.backends.mha.get_fastpath_enabled()
    nn.Linear(4, 4)(torch.zeros(1, 4))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_watching_changes_no_number(mode):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4))
    model.eval()
    images, watched = torch.randn(4, 3, 8, 8), []
    with mode():
        with watch_products({}, lambda _: None):
            watched.append(model(images))
        assert torch.equal(watched[0], model(images))


def test_a_sparse_matrix_is_a_factor_without_a_name():
    adjacency, layer = torch.eye(5).to_sparse(), nn.Linear(8, 4)
    seen = products_of(
        lambda x: adjacency @ layer(x), torch.zeros(5, 8), weights={"w": layer.weight}
    )
    assert seen[0].weight == "w"
    assert not any(product.weight for product in seen[1:])
