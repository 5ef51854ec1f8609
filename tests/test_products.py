import pytest
import torch
import torchvision
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


def macs_by_weight(run, weights, mode=torch.no_grad):
    macs = {}
    for product in products_of(run, weights=weights, mode=mode):
        macs[product.weight] = macs.get(product.weight, 0) + product.macs
    return macs


def names(module):
    return {name: each for name, each in module.named_parameters() if each.dim() > 1}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_multiply_at_every_step(kind, device, mode):
    layer = kind(8, 6, num_layers=2, bidirectional=True, batch_first=True, device=device)
    x = torch.randn(3, 5, 8, device=device)
    seen = macs_by_weight(lambda: layer(x), names(layer), mode)
    assert seen == {name: 3 * 5 * weight.numel() for name, weight in names(layer).items()}


@pytest.mark.parametrize("mode", MODES)
def test_sequences_of_different_lengths_multiply_as_often_as_they_are_long(mode):
    layer = nn.LSTM(8, 6)
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 8), [5, 3])
    seen = macs_by_weight(lambda: layer(packed), names(layer), mode)
    assert seen == {name: 8 * weight.numel() for name, weight in names(layer).items()}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_multiplies_twice_without_a_weight(device, mode):
    q, k, v = (torch.randn(2, 4, n, 16, device=device) for n in (5, 7, 7))
    seen = products_of(F.scaled_dot_product_attention, q, k, v, mode=mode)
    assert [(product.weight, product.macs) for product in seen] == [("", 2 * 4 * 5 * 7 * 16)] * 2


@pytest.mark.parametrize("mode", MODES)
def test_bilinear_layers_multiply_twice(mode):
    layer = nn.Bilinear(8, 6, 4)
    left, right = torch.randn(3, 8), torch.randn(3, 6)
    seen = macs_by_weight(lambda: layer(left, right), {"w": layer.weight}, mode)
    assert seen == {"w": 3 * 4 * 8 * 6, "": 3 * 4 * 6}


EXPERTS = torch.randn(4, 8, 16)


@pytest.mark.parametrize(
    ("run", "macs"),
    [
        (lambda x: torch.bmm(x, EXPERTS), 4 * 5 * 8 * 16),
        (lambda x: torch.einsum("gni,gio->gno", x, EXPERTS), 4 * 5 * 8 * 16),
        (lambda x: x[0] @ EXPERTS[2], 5 * 8 * 16),
        (lambda x: torch.addbmm(torch.zeros(5, 16), x, EXPERTS), 4 * 5 * 8 * 16),
        (lambda x: torch.zeros(5, 16).addmm_(x[0], EXPERTS[1]), 5 * 8 * 16),
        (lambda x: torch.dot(x[0, 0], EXPERTS[0, :, 0]), 8),
        (lambda x: torch.tensordot(x, EXPERTS, dims=([2], [1])), 4 * 5 * 8 * 4 * 16),
    ],
    ids=["bmm", "einsum", "one expert", "addbmm", "in place", "dot", "tensordot"],
)
@pytest.mark.parametrize("mode", MODES)
def test_experts_of_three_dimensions_are_weights(run, macs, mode):
    x = torch.randn(4, 5, 8)
    assert macs_by_weight(lambda: run(x), {"experts": EXPERTS}, mode) == {"experts": macs}


def test_a_deformable_convolution_is_a_product():
    layer = torchvision.ops.DeformConv2d(4, 6, 3, padding=1)
    images, offsets = torch.randn(1, 4, 8, 8), torch.zeros(1, 18, 8, 8)
    seen = macs_by_weight(lambda: layer(images, offsets), {"w": layer.weight})
    assert seen == {"w": 64 * layer.weight.numel()}


def test_a_gradient_within_a_model_is_made_of_products():
    layer, images = nn.Conv2d(4, 6, 3), torch.randn(1, 4, 8, 8)

    def forward():
        with torch.enable_grad():
            x = images.requires_grad_()
            return torch.autograd.grad(layer(x).sum(), x)

    forwards, backwards = products_of(forward, weights={"w": layer.weight})
    assert forwards.macs == backwards.macs == 36 * layer.weight.numel()
    assert forwards.weight == backwards.weight == "w"
    assert forwards.sums_over(layer.weight, 1) and not backwards.sums_over(layer.weight, 1)


def test_only_what_a_sparse_matrix_stores_is_multiplied():
    adjacency, x = torch.eye(5).to_sparse(), torch.randn(5, 8)
    (product,) = products_of(lambda: adjacency @ x)
    assert product.macs == 5 * 8


# Computed weights.


@pytest.mark.parametrize(
    "compute",
    [
        lambda w: w - w.mean(1, keepdim=True),
        lambda w: w * torch.ones(8, 1),
        lambda w: F.batch_norm(w.view(1, 8, -1), None, None, training=True).view_as(w),
        lambda w: w.clone().mul_(2),
        lambda w: torch.empty_like(w).copy_(w),
        lambda w: w / torch.dot(torch.ones(8), torch.mv(w, torch.ones(8))),
        lambda w: w + torch.ones(8, 2) @ torch.ones(2, 8),
    ],
    ids=["centred", "scaled", "standardised", "in place", "copied", "normalised", "adapted"],
)
@pytest.mark.parametrize("mode", MODES)
def test_a_factor_is_known_by_the_weight_it_was_computed_from(compute, mode):
    weight, x = torch.randn(8, 8), torch.randn(2, 8)
    (product,) = products_of(lambda: F.linear(x, compute(weight)), weights={"w": weight}, mode=mode)
    assert (product.weight, product.computed_from, product.macs) == ("", ("w",), 2 * 64)


def test_a_factor_that_depends_on_the_input_is_no_computed_weight():
    weight, x = torch.randn(8, 8), torch.randn(2, 8)
    (product,) = products_of(lambda: F.linear(x, weight * x[:1]), weights={"w": weight})
    assert (product.weight, product.computed_from) == ("", ())


def test_a_product_of_two_weights_is_one_of_the_network_unless_a_weight_is_made_of_it():
    a, b, x = torch.randn(8, 8), torch.randn(8, 8), torch.randn(2, 8)
    weights = {"a": a, "b": b}
    in_order = products_of(lambda: x @ (a @ b), weights=weights)
    assert [(p.weight, p.of_constants, p.macs) for p in in_order] == [
        ("b", True, 8**3), ("", False, 2 * 64)
    ]  # fmt: skip
    alone = products_of(lambda: a @ b, weights=weights)
    assert [product.weight for product in alone] == ["b"]
    adapted = products_of(lambda: x @ (a + a @ b), weights=weights)
    assert [product.computed_from for product in adapted] == [("a",)]


def test_a_buffer_that_the_input_is_written_to_is_constant_no_more():
    cache, weight = torch.zeros(2, 8), torch.randn(8, 8)

    def forward(x):
        cache.copy_(x)
        return F.linear(cache, weight)

    seen = []
    with watch_products({"w": weight}, seen.append, [cache]):
        forward(torch.randn(2, 8))
    assert [(product.weight, product.of_constants) for product in seen] == [("w", False)]


@pytest.mark.parametrize(
    ("use", "dim"),
    [
        (lambda x, w: F.linear(x, w), 1),
        (lambda x, w: x @ w, 0),
        (lambda x, w: w @ x.T, 1),
        (lambda x, w: F.linear(x, w.bfloat16().float()), 1),
        (lambda x, w: F.conv1d(x[..., None], w[..., None]), 1),
        (lambda x, w: F.conv_transpose1d(x[..., None], w[..., None]), 0),
    ],
)
def test_a_product_sums_over_one_dimension_of_its_weight(use, dim):
    weight, x = torch.randn(8, 8), torch.randn(2, 8)
    (product,) = products_of(lambda: use(x, weight), weights={"w": weight})
    assert product.sums_over(weight, dim) and not product.sums_over(weight, 1 - dim)
