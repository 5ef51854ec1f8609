from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F
from inference_cases import GAP, prepared, quick_network, random, the_fastest_is
from torch import Tensor, nn

from helpers.inference.autotune import Autotuner
from helpers.inference.fold import fold_batch_norm
from helpers.inference.kernels import DenseGemm, Kernel, ProductLayer
from helpers.inference.onednn import OneDnn
from helpers.inference.sparse_torch import use_gemms_
from helpers.inference.tuned_layers import TunedLayer, tune_layers_
from helpers.metrics import max_relative_error
from helpers.sparsity import is_2to4, prune_2to4_


def layout_of(images: Tensor) -> torch.memory_format:
    return torch.channels_last if images.dim() == 4 else torch.contiguous_format


def chosen(layer: TunedLayer) -> list:
    assert layer.choices
    return list(layer.choices.values())


def test_the_network_of_gemms_gives_the_outputs_of_the_folded_network(pruned):
    model, images = pruned
    folded = fold_batch_norm(model)
    with torch.inference_mode():
        expected = folded(images)
        layers = use_gemms_(folded, "dense")
        for batch in (images, images[:1], images.contiguous(memory_format=layout_of(images))):
            output = folded(batch)
            assert max_relative_error(output, expected[: len(batch)]) < GAP
    assert layers
    assert all(choice.kernel == "dense GEMM" for layer in layers for choice in chosen(layer))


def test_the_network_of_sparse_gemms_gives_the_outputs_of_the_folded_network(pruned, cusparselt):
    model, images = pruned
    folded = fold_batch_norm(model)
    with torch.inference_mode():
        expected = folded(images)
        layers = use_gemms_(folded, "cusparselt", Autotuner(the_fastest_is("sparse GEMM")))
        folded(images)  # chooses
        cusparselt.calls.clear()
        assert max_relative_error(folded(images), expected) < GAP
    algorithm = {"alg_id": 5, "split_k": 2, "split_k_mode": 1}
    for layer in layers:
        (choice,) = chosen(layer)
        assert (choice.kernel, choice.algorithm) == ("sparse GEMM", algorithm)
    assert cusparselt.calls == [algorithm] * len(layers)


def test_the_weights_of_the_gemms_are_the_folded_ones_and_2to4(pruned, cusparselt):
    model, _ = pruned
    folded = fold_batch_norm(model)
    before = {name: value.clone() for name, value in folded.named_parameters()}
    for layer in use_gemms_(folded, "cusparselt"):
        for kernel in ("dense GEMM", "sparse GEMM"):
            weight = layer.kernels[kernel].weight
            name = f"{layer.name}.weight".replace("qkv.weight", "in_proj_weight")
            assert torch.equal(weight, before[name.replace("n.out.", "n.out_proj.")].flatten(1))
            assert is_2to4(weight)


def test_exactly_the_eligible_layers_become_gemms():
    folded = fold_batch_norm(prepared(quick_network(), random(4, 1, 28, 28)))
    others = {
        name: layer
        for name, layer in folded.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
        and (getattr(layer, "kernel_size", (1, 1)) != (1, 1) or len(layer.weight) % 16)
    }
    layers = use_gemms_(folded, "dense")
    assert {"conv1", "layer1.0.conv2", "fc"} <= set(others)  # 3x3, grouped, ten outputs
    assert all(folded.get_submodule(name) is layer for name, layer in others.items())
    expected = {f"layer{i}.0.{conv}" for i in range(1, 5) for conv in ("conv1", "conv3")}
    expected |= {f"layer{i}.0.downsample.0" for i in range(2, 5)}
    assert {layer.name for layer in layers} == expected


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(32, 32, 1, padding=1),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.Conv2d(32, 32, 1, groups=2),
        nn.Conv2d(32, 24, 1),
        nn.ConvTranspose2d(32, 32, 1),
    ],
    ids=["padded", "3x3", "grouped", "24 channels", "transposed"],
)
def test_a_layer_that_is_not_a_matrix_product_stays_as_it_is(layer):
    network = nn.Sequential(layer, nn.Conv2d(len(layer(random(1, 32, 4, 4))[0]), 16, 2))
    network.insert(0, nn.Conv2d(16, 32, 1))
    folded = fold_batch_norm(network)
    stays = folded.get_submodule("1")
    assert [tuned.name for tuned in use_gemms_(folded, "dense")] == ["0"]
    assert folded.get_submodule("1") is stays
    with torch.inference_mode():
        assert max_relative_error(folded(random(2, 16, 4, 4)), network(random(2, 16, 4, 4))) < GAP


def test_a_subclass_of_a_layer_stays_as_it_is():
    special = nn.modules.linear.NonDynamicallyQuantizableLinear(16, 16)
    folded = fold_batch_norm(nn.Sequential(special, nn.Linear(16, 16)))
    assert [tuned.name for tuned in use_gemms_(folded, "dense")] == ["1"]


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_layer_with_a_hook_stays_as_it_is(register):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU()).eval()
    for layer in (network[0], network[3]):
        getattr(layer, register)(lambda layer, args, *output: 2 * (*output, *args)[0])
    folded = fold_batch_norm(network)
    (tuned,) = use_gemms_(folded, "dense")
    assert tuned.name == "2"
    assert not tuned.epilogue.activation
    with torch.inference_mode():
        assert max_relative_error(folded(random(5, 16)), network(random(5, 16))) < GAP


class Reads(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.called = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.called(F.linear(self.read(x), self.read.weight))


def test_a_layer_whose_weight_is_read_by_others_stays_as_it_is():
    network = Reads()
    folded = fold_batch_norm(network)
    assert [tuned.name for tuned in use_gemms_(folded, "dense")] == ["called"]
    with torch.inference_mode():
        assert max_relative_error(folded(random(5, 16)), network(random(5, 16))) < GAP


class Branches(nn.Module):
    """A ReLU that may be taken into its layer, and four that may not."""

    def __init__(self) -> None:
        super().__init__()
        self.alone, self.forked, self.twice, self.both = (nn.Linear(16, 16) for _ in range(4))
        self.relu = nn.ReLU(inplace=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.alone(x))
        fork = self.forked(x)
        x = self.relu(fork) + fork
        both = self.both(x)
        first, second = F.relu(both), F.relu(both)
        x = first.mul_(2) + second
        return self.relu(self.twice(x)) - self.twice(-x)


def test_a_relu_is_taken_in_only_if_nothing_else_sees_what_it_cuts_off():
    torch.manual_seed(0)
    network = Branches()
    folded = fold_batch_norm(network)
    layers = use_gemms_(folded, "dense")
    assert {layer.name: layer.epilogue.activation for layer in layers} == {
        "alone": "ReLU",
        "forked": "",
        "twice": "",
        "both": "",
    }
    with torch.inference_mode():
        assert max_relative_error(folded(random(5, 16)), network(random(5, 16))) < GAP


class Activations(nn.Module):
    """Activations of every kind, as modules and as functions, and a layer with two kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(9))
        self.relu6, self.hard_swish = nn.ReLU6(inplace=True), nn.Hardswish()
        self.clamp = nn.Hardtanh(0, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu6(self.layers[0](5 * x))
        x = F.relu6(self.layers[1](5 * x))
        x = self.hard_swish(self.layers[2](x))
        x = F.hardswish(self.layers[3](5 * x), inplace=True)
        x = torch.relu(self.layers[4](x))
        x = self.clamp(self.layers[5](x))
        x = F.silu(self.layers[6](x))
        x = F.relu(self.layers[7](x)) + F.relu6(self.layers[7](2 * x))
        return F.hardswish(self.layers[8](x) + x)


@pytest.mark.parametrize("residuals", [False, True])
def test_each_activation_is_taken_into_its_layer(residuals):
    torch.manual_seed(0)
    network = Activations()
    folded = fold_batch_norm(network)
    kernel = OneDnn if residuals else DenseGemm
    layers = tune_layers_(folded, (kernel,), residuals=residuals)
    assert [layer.epilogue.activation for layer in layers] == [
        "ReLU6", "ReLU6", "hard-swish", "hard-swish", "ReLU", "", "", "", ""
    ]  # fmt: skip
    assert [layer.epilogue.add for layer in layers] == [False] * 8 + [residuals]
    with torch.inference_mode():
        assert max_relative_error(folded(random(5, 16)), network(random(5, 16))) < GAP


def test_weights_that_are_not_2to4_get_no_sparse_kernel(cusparselt):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    prune_2to4_(network, exclude="0")
    dense, sparse = use_gemms_(fold_batch_norm(network), "cusparselt")
    assert list(dense.kernels) == ["dense layer", "dense GEMM"]
    assert list(sparse.kernels) == ["dense layer", "dense GEMM", "sparse GEMM"]


def test_a_network_runs_the_kernel_that_was_chosen_for_each_shape():
    torch.manual_seed(0)
    folded = fold_batch_norm(nn.Sequential(nn.Linear(16, 16)))

    def timer(calls: Sequence) -> list[float]:
        rows = len(calls[0].args[0])
        return [1.0, 0.5] if rows > 4 else [0.5, 1.0]

    (tuned,) = use_gemms_(folded, "dense", Autotuner(timer))
    few, many = random(2, 16), random(8, 16)
    for rows in (few, many):
        folded(rows)  # chooses
    tuned.kernels = {name: lambda *_, name=name: name for name in tuned.kernels}
    assert (folded(few), folded(many)) == ("dense layer", "dense GEMM")


class Convolution3x3(Kernel):
    """A kernel for layers that are not matrix products."""

    name = "3x3"

    @classmethod
    def takes(cls, layer: ProductLayer) -> bool:
        return isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)

    def __call__(self, input: Tensor, residual: Tensor | None = None, **algorithm: int) -> Tensor:
        return self.epilogue.apply_(self.layer(input))


def test_any_kernels_can_be_tuned_for_the_layers_that_they_take():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 5)
    )
    folded = fold_batch_norm(network)
    layers = tune_layers_(folded, [DenseGemm, Convolution3x3])
    assert [(layer.name, list(layer.kernels)) for layer in layers] == [
        ("0", ["dense layer", "3x3"]),
        ("2", ["dense layer", "dense GEMM"]),
    ]
    x = random(2, 3, 9, 9)
    with torch.inference_mode():
        assert max_relative_error(folded(x), network(x)) < GAP


def test_layers_that_may_not_be_replaced_stay_as_they_are():
    folded = fold_batch_norm(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 32)))
    (layer,) = tune_layers_(folded, [DenseGemm], lambda weight: len(weight.tensor) == 32)
    assert layer.name == "1"
