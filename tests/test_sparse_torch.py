import copy
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.resnet import Bottleneck, ResNet

from helpers import machine
from helpers.inference import cuda_graphs, sparse_torch
from helpers.inference.autotune import NOISE, Autotuner
from helpers.inference.cusparselt import SparseGemm, why_no_sparse_gemms
from helpers.inference.fold import fold_batch_norm
from helpers.inference.kernels import DenseGemm, DenseLayer, Kernel
from helpers.inference.runners import RunnerError, TorchRunner
from helpers.inference.sparse_torch import SparseTorchRunner, TunedLayer, use_gemms_
from helpers.measurement.benchmark import check_outputs
from helpers.metrics import max_relative_error
from helpers.sparsity import is_2to4, prune_2to4_
from helpers.training import networks

GAP = 1e-5  # FP32: the order of the sums differs

needs_cusparselt = pytest.mark.skipif(
    bool(why_no_sparse_gemms()), reason=why_no_sparse_gemms() or "it is here"
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quick_network() -> nn.Module:
    return networks.create_model("resnext14_8x4d", 10)


def bottlenecks() -> nn.Module:
    """ResNet-50's blocks; from the second stage on, downsamples have stride 2."""
    network = ResNet(Bottleneck, [2, 1, 1, 1], num_classes=16)
    network.maxpool = nn.Identity()
    return network


def linear_network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 32, bias=False), nn.ReLU(), nn.Linear(32, 16)
    )


def transformer() -> nn.Module:
    """Two blocks of a vision transformer; torchvision starts its head with zeros."""
    network = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128,
        num_classes=16,
    )  # fmt: skip
    nn.init.normal_(network.heads.head.weight)
    for parameter in network.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.1)
    return network


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "quick": (quick_network, (1, 28, 28)),
    "bottlenecks": (bottlenecks, (3, 32, 32)),
    "linear": (linear_network, (48,)),
    "transformer": (transformer, (3, 32, 32)),
}


def prepared(model: nn.Module, images: Tensor) -> nn.Module:
    """Return a network pruned 2:4, whose batch norms have statistics other than 0 and 1."""
    model(images)
    prune_2to4_(model)
    return model.eval()


@pytest.fixture(scope="module", params=NETWORKS)
def pruned(request) -> tuple[nn.Module, Tensor]:
    make, shape = NETWORKS[request.param]
    torch.manual_seed(0)
    return prepared(make(), random(8, *shape, seed=1)), random(3, *shape, seed=2)


class FakeCusparselt:
    """PyTorch's binding of cuSPARSELt, on the CPU and with its contract.

    It knows the dense matrix by its memory and by whether it is contiguous, and no strides.
    """

    algorithm = (5, 2, 1)

    def __init__(self) -> None:
        self.calls: list[dict[str, int]] = []

    def compress(self, weight: Tensor) -> Tensor:
        assert weight.is_contiguous()
        assert is_2to4(weight)
        assert all(size % 16 == 0 for size in weight.shape)
        return weight.clone()

    def sparse_mm(
        self,
        compressed: Tensor,
        dense: Tensor,
        bias: Tensor | None = None,
        transpose_result: bool = False,
        **algorithm: int,
    ) -> Tensor:
        self.calls.append(algorithm)
        k, n = dense.shape
        assert k % 8 == n % 8 == 0
        if dense.is_contiguous():
            seen = dense.as_strided((k, n), (n, 1))
        else:
            seen = dense.as_strided((n, k), (k, 1)).t()
        product = compressed @ seen
        if bias is not None:
            product += bias[:, None]
        return product.t().contiguous() if transpose_result else product

    def mm_search(
        self,
        compressed: Tensor,
        dense: Tensor,
        bias: Tensor | None,
        alpha: None,
        out_dtype: None,
        transpose_result: bool,
    ) -> tuple[int, int, int, int]:
        self.sparse_mm(compressed, dense, bias, transpose_result)
        return (*self.algorithm, 40)


@contextmanager
def fake_cusparselt() -> Iterator[FakeCusparselt]:
    fake = FakeCusparselt()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "_cslt_compress", fake.compress)
        patch.setattr(torch, "_cslt_sparse_mm", fake.sparse_mm)
        patch.setattr(torch._C, "_cusparselt", fake, raising=False)
        yield fake


@pytest.fixture
def cusparselt():
    with fake_cusparselt() as fake:
        yield fake


def the_fastest_is(name: str) -> Callable[[Sequence], list[float]]:
    """Return a timer that finds one kernel twice as fast as all others."""

    def timer(calls: Sequence) -> list[float]:
        return [0.5 if call.func.name == name else 1.0 for call in calls]

    return timer


# --- the network ---------------------------------------------------------------------------


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


def layout_of(images: Tensor) -> torch.memory_format:
    return torch.channels_last if images.dim() == 4 else torch.contiguous_format


def chosen(layer: TunedLayer) -> list:
    assert layer.choices
    return list(layer.choices.values())


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


def test_the_model_that_was_given_is_not_changed(pruned):
    model, images = pruned
    model = copy.deepcopy(model).train()
    before = copy.deepcopy(model.state_dict())
    kinds = [type(layer) for layer in model.modules()]
    runner = SparseTorchRunner(model, "dense", torch.float32)
    runner(images)
    assert model.training
    assert [type(layer) for layer in model.modules()] == kinds
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


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
def test_a_layer_that_is_no_product_of_matrices_stays_as_it_is(layer):
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
    assert not tuned.kernels["dense GEMM"].relu
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
    assert {layer.name: layer.kernels["dense GEMM"].relu for layer in layers} == {
        "alone": True,
        "forked": False,
        "twice": False,
        "both": False,
    }
    with torch.inference_mode():
        assert max_relative_error(folded(random(5, 16)), network(random(5, 16))) < GAP


def test_weights_that_are_not_2to4_get_no_sparse_kernel(cusparselt):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    prune_2to4_(network, exclude="0")
    dense, sparse = use_gemms_(fold_batch_norm(network), "cusparselt")
    assert list(dense.kernels) == ["dense layer", "dense GEMM"]
    assert list(sparse.kernels) == ["dense layer", "dense GEMM", "sparse GEMM"]


def test_a_network_without_any_layer_for_the_backend_is_refused(cusparselt):
    unpruned = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(RunnerError, match=r"No layer .* a sparse GEMM.*02_prune_2_4\.ipynb"):
        use_gemms_(fold_batch_norm(unpruned), "cusparselt")
    with pytest.raises(RunnerError, match=r"No layer .* a dense GEMM"):
        use_gemms_(fold_batch_norm(nn.Sequential(nn.Linear(10, 10))), "dense")
    with pytest.raises(RunnerError, match="no backend 'cutlass'; there are dense, cusparselt"):
        use_gemms_(fold_batch_norm(unpruned), "cutlass")


# --- one kernel ----------------------------------------------------------------------------


@given(
    kind=st.sampled_from([DenseGemm, SparseGemm]),
    batch=st.integers(1, 5),
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    channels=st.tuples(*[st.sampled_from([16, 32, 48])] * 2),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    bias=st.booleans(),
    relu=st.booleans(),
    layout=st.sampled_from(["channels first", "channels last", "some of the channels"]),
)
def test_a_gemm_is_the_convolution(kind, batch, size, channels, stride, bias, relu, layout):
    inputs, outputs = channels
    torch.manual_seed(0)
    layer = nn.Conv2d(inputs, outputs, 1, stride, bias=bias)
    prune_2to4_(layer)
    images = random(batch, inputs, *size)
    if layout != "channels first":
        images = images.contiguous(memory_format=torch.channels_last)
    if layout == "some of the channels":
        images = torch.cat([images, images], 1)[:, :inputs]
    with torch.inference_mode(), fake_cusparselt():
        expected = layer(images).relu() if relu else layer(images)
        output = kind(layer, relu)(images)
    assert output.shape == expected.shape
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [DenseGemm, SparseGemm])
@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16)])
def test_a_gemm_is_the_linear_layer_for_any_number_of_dimensions(cusparselt, kind, shape):
    torch.manual_seed(0)
    layer = nn.Linear(16, 32)
    prune_2to4_(layer)
    with torch.inference_mode():
        output, expected = kind(layer, relu=False)(random(*shape)), layer(random(*shape))
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(
    not torch.backends.cusparselt.is_available(), reason="PyTorch was built without cuSPARSELt"
)
def test_pytorch_has_the_search_that_is_used():
    taken, returned = torch._C._cusparselt.mm_search.__doc__.split("->")
    assert taken.count("arg") == 6
    assert "tuple[int, int, int, int]" in returned.lower()


def test_pytorch_has_the_operators_with_the_arguments_that_are_used():
    arguments = torch.ops.aten._cslt_sparse_mm.default._schema.arguments
    used = ["bias", "transpose_result", "alg_id", "split_k", "split_k_mode"]
    assert [argument.name for argument in arguments[:2]] == ["compressed_A", "dense_B"]
    assert set(used) <= {argument.name for argument in arguments}
    assert len(torch.ops.aten._cslt_compress.default._schema.arguments) == 1


# --- choosing ------------------------------------------------------------------------------


class FakeTimer:
    """A timer that tells what it was told, and counts."""

    def __init__(self, *milliseconds: float) -> None:
        self.milliseconds, self.used = list(milliseconds), 0

    def __call__(self, calls: Sequence) -> list[float]:
        self.used += 1
        assert len(calls) == len(self.milliseconds)
        return self.milliseconds


def kernels_of(layer: nn.Module) -> list:
    return [DenseLayer(layer, relu=False), DenseGemm(layer, relu=False)]


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(16, 16)


@pytest.mark.parametrize(
    ("dense", "gemm", "fastest"),
    [(2.0, 1.0, "dense GEMM"), (1.0, 2.0, "dense layer"), (1.0, 0.99, "dense layer")],
    ids=["faster", "slower", "within noise"],
)
def test_a_gemm_is_chosen_only_where_it_is_faster_by_more_than_noise(layer, dense, gemm, fastest):
    choice = Autotuner(FakeTimer(dense, gemm)).choose("fc", kernels_of(layer), random(8, 16))
    assert choice.kernel == fastest
    assert choice.milliseconds == {"dense layer": dense, "dense GEMM": gemm}


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
    tuned.kernels = {name: lambda input, name=name: name for name in tuned.kernels}
    assert (folded(few), folded(many)) == ("dense layer", "dense GEMM")


def test_the_same_shape_is_measured_once_and_another_one_anew(layer):
    timer = FakeTimer(2.0, 1.0)
    autotuner = Autotuner(timer)
    for name in ("layer1", "layer2"):
        autotuner.choose(name, kernels_of(layer), random(8, 16))
    assert timer.used == 1
    autotuner.choose("more rows", kernels_of(layer), random(9, 16))
    autotuner.choose("more outputs", kernels_of(nn.Linear(16, 32)), random(8, 16))
    autotuner.choose("without bias", kernels_of(nn.Linear(16, 16, bias=False)), random(8, 16))
    double = copy.deepcopy(layer).double()
    autotuner.choose("another type", kernels_of(double), random(8, 16).double())
    assert timer.used == 5
    autotuner.choose("the first again", kernels_of(layer), random(8, 16))
    assert timer.used == 5


def test_choices_are_kept_on_disk_for_the_same_gpu_and_version(layer, tmp_path, monkeypatch):
    cache = tmp_path / "kernels.json"
    first = Autotuner(FakeTimer(2.0, 1.0), cache).choose("fc", kernels_of(layer), random(8, 16))
    again = FakeTimer(1.0, 2.0)
    assert Autotuner(again, cache).choose("fc", kernels_of(layer), random(8, 16)) == first
    assert again.used == 0

    monkeypatch.setattr(machine, "gpu", lambda: {"gpu": "another GPU"})
    elsewhere = Autotuner(again, cache).choose("fc", kernels_of(layer), random(8, 16))
    assert (elsewhere.kernel, again.used) == ("dense layer", 1)
    monkeypatch.setattr(torch, "__version__", "9.9")
    Autotuner(again, cache).choose("fc", kernels_of(layer), random(8, 16))
    assert again.used == 2
    assert len(json.loads(cache.read_text())) == 3


def test_two_runners_that_share_a_cache_keep_each_others_choices(layer, tmp_path):
    cache = tmp_path / "kernels.json"
    one, two = (Autotuner(FakeTimer(2.0, 1.0), cache) for _ in range(2))
    one.choose("fc", kernels_of(layer), random(1, 16))
    two.choose("fc", kernels_of(layer), random(2, 16))
    one.choose("fc", kernels_of(layer), random(3, 16))
    assert len(json.loads(cache.read_text())) == 3


@pytest.mark.parametrize("content", ["", "[1]", '{"key": 1}', '{"key": {"kernel": "dense"}}'])
def test_a_damaged_cache_is_refused(layer, tmp_path, content):
    cache = tmp_path / "kernels.json"
    cache.write_text(content)
    with pytest.raises(RunnerError, match=r"^kernels\.json does not hold choices .*Delete it"):
        Autotuner(FakeTimer(2.0, 1.0), cache).choose("fc", kernels_of(layer), random(8, 16))


@pytest.mark.parametrize("wrong", [0.1, float("nan")])
def test_a_kernel_with_wrong_numbers_is_refused_before_it_is_timed(layer, wrong):
    kernels = kernels_of(layer)
    kernels[1].weight = kernels[1].weight + wrong
    timer = FakeTimer(2.0, 1.0)
    with pytest.raises(RunnerError, match=r"^layer1\.fc: the dense GEMM does not give the numbers"):
        Autotuner(timer).choose("layer1.fc", kernels, random(8, 16))
    assert timer.used == 0


def failing_with(error: Exception, layer: nn.Linear, monkeypatch) -> list[Kernel]:
    """Return the kernels of a layer, of which the second fails."""

    def fail(*_: object, **__: object) -> Tensor:
        raise error

    kernels = kernels_of(layer)
    monkeypatch.setattr(kernels[1], "multiply", fail)
    return kernels


def test_a_kernel_that_does_not_run_is_left_out_with_its_reason(layer, monkeypatch, tmp_path):
    kernels = failing_with(RuntimeError("operation not supported"), layer, monkeypatch)
    for _ in range(2):  # the second time from the cache
        autotuner = Autotuner(FakeTimer(2.0), tmp_path / "kernels.json")
        choice = autotuner.choose("layer1.fc", kernels, random(8, 16))
        assert choice.kernel == "dense layer"
        assert choice.milliseconds == {"dense layer": 2.0}
        assert choice.refused == {"dense GEMM": "operation not supported"}


def test_short_memory_is_no_reason_to_leave_a_kernel_out_for_good(layer, monkeypatch):
    kernels = failing_with(torch.OutOfMemoryError("out of memory"), layer, monkeypatch)
    with pytest.raises(RunnerError, match=r"^layer1\.fc: memory is short .*\(8, 16\); use a small"):
        Autotuner(FakeTimer(2.0, 1.0)).choose("layer1.fc", kernels, random(8, 16))


def test_a_layer_whose_outputs_are_all_zero_is_no_error(layer):
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    Autotuner(FakeTimer(2.0, 1.0)).choose("fc", kernels_of(layer), random(8, 16))


# --- the runner ----------------------------------------------------------------------------


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_loading_running_and_fetching_are_three_steps(no_gpu, pruned):
    model, images = pruned
    with torch.inference_mode():
        expected = model(images)
    runner = SparseTorchRunner(model, "dense")
    runner.load(images)
    runner.run()
    first = runner.fetch()
    runner.load(images[:1])
    assert torch.equal(runner.fetch(), first), "loading alone changes no result"
    runner.run()
    assert max_relative_error(first, expected) < GAP
    assert max_relative_error(runner.fetch(), expected[:1]) < GAP
    assert (first.dtype, first.device.type) == (torch.float32, "cpu")


def test_the_table_tells_the_kernel_of_every_layer_and_shape(no_gpu):
    runner = SparseTorchRunner(linear_network(), "dense")
    assert runner.kernel_choices().empty
    runner(random(3, 48))
    runner(random(2, 48))
    table = runner.kernel_choices()
    assert list(table.layer) == ["0", "0", "2", "2", "4", "4"]
    assert list(table.input) == ["3x48", "2x48", "3x64", "2x64", "3x32", "2x32"]
    assert set(table.kernel) == {"dense GEMM"}


def test_without_a_gpu_cusparselt_is_refused_in_one_sentence(no_gpu):
    with pytest.raises(RunnerError, match=r"No NVIDIA GPU was found.*backend='dense'"):
        SparseTorchRunner(linear_network())
    assert why_no_sparse_gemms().count(".") == 1


def fake_gpu(monkeypatch, capability: tuple[int, int], built: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a fake GPU")
    monkeypatch.setattr(torch.backends, "cusparselt", SimpleNamespace(is_available=lambda: built))


def test_a_gpu_without_sparse_tensor_cores_or_cusparselt_is_refused(monkeypatch):
    fake_gpu(monkeypatch, (7, 5), built=True)
    with pytest.raises(RunnerError, match="a fake GPU has no Sparse Tensor Cores"):
        SparseTorchRunner(linear_network())
    fake_gpu(monkeypatch, (8, 0), built=False)
    with pytest.raises(RunnerError, match="built without cuSPARSELt"):
        SparseTorchRunner(linear_network())
    fake_gpu(monkeypatch, (8, 0), built=True)
    with pytest.raises(RunnerError, match=r"torch\.float32 .*use torch\.float16"):
        SparseTorchRunner(linear_network(), dtype=torch.float32)


def test_it_is_right_on_fresh_images_with_its_results_poisoned(no_gpu, pruned):
    model, images = pruned
    assert check_outputs(SparseTorchRunner(model, "dense"), model, images.shape[1:], 4) < GAP


def on_a_fake_gpu(model: nn.Module, backend: str = "dense") -> SparseTorchRunner:
    """Return a runner that prepares and replays graphs, though on the CPU."""
    runner = SparseTorchRunner(model, backend)
    runner.on_gpu = True
    runner.start = runner.end = MagicMock()
    return runner


def test_each_shape_is_captured_once_and_replayed_on_the_images_that_are_loaded(
    no_gpu, captured, gpu_clock, pruned
):
    model, images = pruned
    runner = on_a_fake_gpu(model)
    with torch.inference_mode():
        expected = model(images)
    for part in (slice(0, 1), slice(1, 2), slice(0, 3), slice(2, 3)):
        own = images[part].clone()
        runner.load(own)
        own.fill_(float("nan"))  # the runner has a copy
        runner.run()
        assert max_relative_error(runner.fetch(), expected[part]) < GAP
    assert len(captured) == 2 * 2  # for each shape the layers and the products
    before = runner.fetch()
    runner.load(images)
    assert torch.equal(runner.fetch(), before), "loading alone changes no result"


def test_a_run_writes_all_that_was_poisoned(no_gpu, captured, gpu_clock, pruned):
    model, images = pruned
    runner = on_a_fake_gpu(model)
    expected = runner(images)
    runner.invalidate_output()
    assert runner.fetch().isnan().all()
    runner.run()
    assert torch.equal(runner.fetch(), expected)


def test_cudnn_looks_for_its_fastest_kernel_whenever_a_layer_meets_a_shape(
    no_gpu, captured, gpu_clock, pruned
):
    model, images = pruned
    runner, seen = on_a_fake_gpu(model), []
    for network in runner.networks.values():
        network.register_forward_hook(lambda *_: seen.append(torch.backends.cudnn.benchmark))
    before = torch.backends.cudnn.benchmark
    runner.load(images)
    assert len(seen) > 3
    assert all(seen)
    assert torch.backends.cudnn.benchmark == before


@pytest.mark.parametrize("fastest", ["layers", "dense", "cusparselt"])
def test_the_fastest_of_the_whole_networks_runs(
    no_gpu, captured, gpu_clock, cusparselt, monkeypatch, fastest
):
    """What wins layer by layer can lose as a network."""
    monkeypatch.setattr(sparse_torch, "_require_cusparselt", lambda _: None)
    model = prepared(linear_network(), random(4, 48))
    runner = on_a_fake_gpu(model, "cusparselt")
    assert list(runner.networks) == ["layers", "dense", "cusparselt"]
    for name, network in runner.networks.items():
        milliseconds = 1.0 if name == fastest else 2.0
        network.register_forward_hook(
            lambda *_, own=milliseconds: gpu_clock.__setitem__(0, gpu_clock[0] + own)
        )
    images = random(3, 48)
    with torch.inference_mode():
        assert max_relative_error(runner(images), model(images)) < GAP
    (row,) = runner.network_times().to_dict("records")
    times = dict.fromkeys(runner.networks, 2.0) | {fastest: 1.0}
    assert row == {"input": "3x48", **times, "runs": fastest}
    gpu_clock[0] = 0.0
    runner.run()
    assert gpu_clock[0] == 1.0


def test_a_network_that_cannot_be_captured_is_told_in_one_sentence(
    no_gpu, captured, gpu_clock, monkeypatch
):
    def out_of_memory(*_: object) -> None:
        raise RuntimeError("CUDA out of memory")

    runner = on_a_fake_gpu(prepared(linear_network(), random(4, 48)))
    monkeypatch.setattr(cuda_graphs, "capture", out_of_memory)
    with pytest.raises(RunnerError, match=r"cannot be prepared for 3 images of shape \(48,\)"):
        runner.load(random(3, 48))


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_network_computes_the_same(no_gpu):
    model = prepared(linear_network(), random(4, 48))
    with torch.inference_mode():
        for runner in (
            TorchRunner(model, compile=True), SparseTorchRunner(model, "dense", compile=True),
        ):  # fmt: skip
            assert "compiled" in runner.name
            for images in (random(3, 48), random(5, 48, seed=1)):
                assert max_relative_error(runner(images), model(images)) < GAP


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


@pytest.fixture
def pruned_transformer() -> nn.Module:
    torch.manual_seed(0)
    return prepared(transformer(), random(2, 3, 32, 32))


class Attends(nn.Module):
    """Attention in one of its many forms."""

    def __init__(self, how: dict, of: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.attention, self.of = nn.MultiheadAttention(64, 4, **how), of
        self.head = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.of(self.attention, x))


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
def test_other_attention_stays_as_it_is(how, of):
    torch.manual_seed(0)
    model = Attends(how, of).eval()
    folded = fold_batch_norm(model)
    (layer,) = use_gemms_(folded, "dense")
    assert layer.name == "head"
    x = random(5, 6, 64)
    with torch.inference_mode():
        assert max_relative_error(folded(x), model(x)) < GAP


# --- on a GPU ------------------------------------------------------------------------------


def invalidate_output() -> None:
    """Fill the memory that PyTorch will hand out next with NaN."""
    blocks = [torch.full((2**size,), float("nan"), device="cuda") for size in range(8, 27)]
    torch.cuda.synchronize()
    del blocks


@pytest.mark.gpu
@needs_cusparselt
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_runner_gives_the_outputs_of_the_masked_network_on_the_gpu(pruned, dtype, tmp_path):
    model, images = pruned
    runner = SparseTorchRunner(model, dtype=dtype, cache=tmp_path / "kernels.json")
    tolerance = 1e-2 if dtype == torch.float16 else 5e-2  # BF16 has three bits fewer
    for seed in range(3):
        fresh = random(*images.shape, seed=10 + seed)
        poison()
        with torch.inference_mode():
            expected = model(fresh)
        assert max_relative_error(runner(fresh), expected) < tolerance
    assert len(json.loads((tmp_path / "kernels.json").read_text())) > 1


@pytest.mark.gpu
@needs_cusparselt
@pytest.mark.parametrize("rows", [1, 8, 13])
def test_a_sparse_gemm_is_the_dense_one_on_the_gpu(rows):
    torch.manual_seed(0)
    layer = nn.Linear(64, 128)
    prune_2to4_(layer)
    layer = layer.to("cuda", torch.float16)
    kernel = SparseGemm(layer, relu=True)
    x = random(rows, 64).to("cuda", torch.float16)
    poison()
    with torch.inference_mode():
        for algorithm in ({}, kernel.search(x)):
            assert max_relative_error(kernel(x, **algorithm), layer(x).relu()) < 1e-2


@pytest.mark.gpu
@needs_cusparselt
def test_every_layer_keeps_the_kernel_that_was_measured_to_be_the_fastest(pruned):
    model, images = pruned
    runner = SparseTorchRunner(model)
    runner(images)
    for row in runner.kernel_choices().to_dict("records"):
        times = [row[kernel] for kernel in ("dense layer", "dense GEMM", "sparse GEMM")]
        assert row[row["kernel"]] <= min(times) / (1 - NOISE)
