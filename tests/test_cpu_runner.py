"""Whole models on the CPU against FP64, in every kernel, with buffers that hold NaN before."""

import copy
import threading
from collections.abc import Callable, Sequence

import pytest
import torch
import torchvision
from inference_cases import prepared, random, transformer
from torch import Tensor, fx, nn

from helpers.errors import InputError, WriteError
from helpers.inference import static_model as static
from helpers.inference.attention import SelfAttention
from helpers.inference.cpu_runner import CpuRunner
from helpers.inference.traced import module_calls
from helpers.measurement.benchmark import check_outputs
from helpers.metrics import max_relative_error
from helpers.sparsity import prune_2to4_
from helpers.training.networks import create_model

GAP = 1e-5
NAN = float("nan")


def first(calls: Sequence) -> list[float]:
    """Find PyTorch's own layer the fastest."""
    return [0.5] + [1.0] * (len(calls) - 1)


def last(calls: Sequence) -> list[float]:
    """Find the sparse kernel the fastest, or where a layer has none, oneDNN."""
    return [1.0] * (len(calls) - 1) + [0.5]


class Alternating:
    """Finds each kernel the fastest in turn; two measurements of a layer agree."""

    def __init__(self, start: int) -> None:
        self.number = start

    def __call__(self, calls: Sequence) -> list[float]:
        self.number += 1
        times = [1.0] * len(calls)
        times[self.number // 2 % len(calls)] = 0.5
        return times


@pytest.fixture(autouse=True)
def buffers_of_nan(monkeypatch):
    """Let every buffer hold NaN before the first step writes to it."""
    monkeypatch.setattr(static, "new_buffer", lambda size: torch.full((size,), NAN))


def vision(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.get_model(name, weights=None, **options)


def sparse(model: nn.Module, size: int = 64, channels: int = 3) -> nn.Module:
    """Return the model pruned wherever its channels come in fours, with moved statistics."""
    model.train()(random(4, channels, size, size, seed=9))
    prune_2to4_(model, rules="any")
    return model.eval()


def assert_exact(runner: CpuRunner, model: nn.Module, images: Tensor) -> None:
    with torch.inference_mode():
        expected = copy.deepcopy(model).double()(images.double())
    before = images.clone()
    runner.load(images)
    assert torch.equal(images, before)
    runner.run()
    for _ in range(2):
        runner.invalidate_output()
        runner.run()
        assert max_relative_error(runner.fetch(), expected.float()) < GAP


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("resnet18", 64, {}),
        ("resnet50", 64, {}),
        ("resnext50_32x4d", 64, {}),
        ("densenet121", 64, {}),
        ("googlenet", 64, {"aux_logits": False, "init_weights": False}),
        ("mobilenet_v2", 64, {}),
        ("mobilenet_v3_small", 64, {}),
        ("squeezenet1_1", 64, {}),
        ("convnext_tiny", 64, {}),
    ],
)
def test_networks_are_exact_in_the_sparse_kernels(name, size, options):
    model = sparse(vision(name, **options), size)
    runner = CpuRunner(model, timer=last)
    for batch in (2, 1, 3, 2):
        assert_exact(runner, model, random(batch, 3, size, size, seed=batch))
    assert "2:4 kernel" in set(runner.kernel_choices().kernel)


@pytest.mark.parametrize("kernels", ["sparse", "twin", "dense"])
@pytest.mark.parametrize("timer", [first, last, Alternating(1), Alternating(3)])
def test_every_mixture_of_kernels_is_exact(kernels, timer):
    model = sparse(create_model("resnext14_8x1d", 10), 28, 1)
    assert_exact(CpuRunner(model, kernels, timer=timer), model, random(3, 1, 28, 28))


@pytest.mark.parametrize("timer", [first, last, Alternating(1)])
def test_attention_is_exact_with_what_is_added_to_it(timer):
    model = prepared(transformer(), random(2, 3, 32, 32))
    runner = CpuRunner(model, timer=timer)
    assert_exact(runner, model, random(3, 3, 32, 32))
    added = [layer.name for layer in runner.layers if layer.epilogue.add]
    assert len(added) == 4  # the attention and the feed-forward part of two blocks
    assert not any(isinstance(part, SelfAttention) for part in called(runner.model))


def called(model: fx.GraphModule) -> list[nn.Module]:
    """Return the modules that a graph calls."""
    return [model.get_submodule(name) for name in module_calls(model)]


class Block(nn.Module):
    """A network with one way of joining two convolutions."""

    def __init__(self, join: Callable[["Block", Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
        self.small = nn.Conv2d(8, 1, 1)
        self.relu, self.join = nn.ReLU(inplace=True), join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(self, x)


def _in_place_between(net: Block, x: Tensor) -> Tensor:
    y = x * 2
    z = net.one(x)
    y.mul_(3)
    return z + y


def _operand_used_later(net: Block, x: Tensor) -> Tensor:
    y = net.one(x)
    return (net.two(y) + y) * y


def _view_used_later(net: Block, x: Tensor) -> Tensor:
    y = net.one(x)
    seen = y.flatten(1)[:, 5:]
    z = net.two(net.two(y))
    return z.flatten(1)[:, 5:] + seen


def _sum_in_the_operand(net: Block, x: Tensor) -> Tensor:
    y = net.two(x)
    z = y.add_(net.one(x))
    return net.relu(z * 2) + y


JOINS = {
    "residual second": (lambda net, x: torch.relu(net.one(x) + x), True),
    "residual first": (lambda net, x: torch.relu(x + net.one(x)), True),
    "two layers": (lambda net, x: net.relu(net.one(x) + net.two(x)), True),
    "torch.add": (lambda net, x: torch.add(net.one(x), x), True),
    "method": (lambda net, x: net.one(x).add_(x), True),
    "scaled": (lambda net, x: torch.add(net.one(x), x, alpha=2), False),
    "to itself": (lambda net, x: (lambda y: y + y)(net.one(x)), False),
    "a number": (lambda net, x: net.one(x) + 1, False),
    "broadcast": (lambda net, x: net.one(x) + net.small(x), None),
    "layer broadcast": (lambda net, x: net.small(x) + x, None),
    "operand later": (lambda net, x: net.one(x) + net.relu(x * 2), False),
    "in place between": (_in_place_between, False),
    "operand used later": (_operand_used_later, True),
    "view used later": (_view_used_later, False),
    "sum in the operand": (_sum_in_the_operand, False),
    "called twice": (lambda net, x: net.one(net.one(x) + x) + x, True),
    "called twice, added once": (lambda net, x: net.one(net.one(x) + x), False),
    "first in place": (lambda net, x: net.relu(net.one(net.relu(x)) + x), True),
}


@pytest.mark.parametrize("name", JOINS)
@pytest.mark.parametrize("timer", [first, last, Alternating(1), Alternating(3)])
def test_sums_are_exact_however_they_are_written(name, timer):
    join, absorbed = JOINS[name]
    model = Block(join)
    prune_2to4_(model, rules="any")
    model.eval()
    runner = CpuRunner(model, timer=timer)
    if absorbed is not None:
        assert any(layer.epilogue.add for layer in runner.layers) == absorbed
    assert_exact(runner, model, random(2, 8, 8, 8))
    assert_exact(runner, model, random(1, 8, 5, 6))


def test_a_sum_takes_the_place_of_an_operand_that_is_not_read_again():
    model = nn.Sequential(*[Block(JOINS["two layers"][0]) for _ in range(6)])
    prune_2to4_(model, rules="any")
    made: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(static, "new_buffer", lambda n: (made.append(n), torch.full((n,), NAN))[1])
        assert_exact(CpuRunner(model.eval(), timer=last), model, random(1, 8, 8, 8))
    # Of 12 layers, in each of two models: one is read while the other is written.
    assert len(made) == 2 * 2


def test_nothing_is_allocated_for_sparse_layers_in_a_run(monkeypatch):
    model = sparse(vision("resnet18"), 32)
    runner = CpuRunner(model, timer=last)
    runner.load(random(1, 3, 32, 32))
    runner.run()

    def refuse(*_: object) -> None:
        raise AssertionError("memory was allocated")

    monkeypatch.setattr(torch, "empty", refuse)
    runner.run()


def test_the_outputs_do_not_depend_on_the_number_of_threads():
    model = sparse(vision("resnet18"), 32)
    images, before = random(2, 3, 32, 32), torch.get_num_threads()
    runner, outputs = CpuRunner(model, timer=last), []
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            outputs.append(runner(images))
            assert runner.threads == threads
    finally:
        torch.set_num_threads(before)
    assert max_relative_error(outputs[1], outputs[0]) < GAP
    assert torch.equal(outputs[2], outputs[0])


def test_two_runners_compute_at_once_in_two_threads():
    model = sparse(vision("resnet18"), 32)
    images = [random(2, 3, 32, 32, seed=seed) for seed in range(2)]
    runners = [CpuRunner(model, timer=last) for _ in images]
    expected = [runner(own) for runner, own in zip(runners, images, strict=True)]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(20):
            runners[number].run()
            if not torch.equal(runners[number].fetch(), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_the_model_that_was_given_is_not_changed():
    model = sparse(vision("resnet18"), 32).train()
    before = copy.deepcopy(model.state_dict())
    CpuRunner(model, timer=last)(random(2, 3, 32, 32))
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_it_runs_on_the_cpu_of_a_machine_with_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = sparse(vision("resnet18"), 32)
    assert CpuRunner(model, timer=last)(random(1, 3, 32, 32)).device.type == "cpu"


def test_loading_running_and_fetching_are_three_steps():
    model = sparse(vision("resnet18"), 32)
    runner = CpuRunner(model, timer=last)
    runner.load(random(2, 3, 32, 32))
    runner.run()
    logits = runner.fetch()
    runner.load(random(1, 3, 32, 32, seed=1))
    assert torch.equal(runner.fetch(), logits), "loading alone changes no result"
    assert check_outputs(runner, model, (3, 32, 32), 2) < GAP


def test_an_empty_batch_and_channels_last_images_are_taken():
    model = sparse(vision("resnet18"), 32)
    runner = CpuRunner(model, timer=last)
    assert runner(torch.empty(0, 3, 32, 32)).shape == (0, 1000)
    images = random(2, 3, 32, 32)
    expected = runner(images)
    assert torch.equal(runner(images.to(memory_format=torch.channels_last)), expected)


def test_choices_are_remembered_with_what_they_depend_on(tmp_path):
    model = sparse(vision("resnet18"), 32)
    cache = tmp_path / "kernels.json"
    CpuRunner(model, cache=cache, timer=last)(random(1, 3, 32, 32))
    text = cache.read_text()
    for part in (
        "threads",
        "kernel 3x3, padding 1x1",
        "stride 2x2",
        "residual, ReLU",
        "2:4 kernel",
    ):
        assert part in text

    def refuse(_: Sequence) -> list[float]:
        raise AssertionError("measured again")

    again = CpuRunner(model, cache=cache, timer=refuse)
    assert_exact(again, model, random(1, 3, 32, 32))
    assert "2:4 kernel" in set(again.kernel_choices().kernel)


def test_a_model_without_zeros_is_refused_in_one_sentence():
    dense = vision("resnet18")
    for kernels in ("sparse", "twin"):
        with pytest.raises(InputError, match=r"No layer .* 2:4 weight.*prune_2to4_") as raised:
            CpuRunner(dense, kernels)
        assert "\n" not in str(raised.value)
    CpuRunner(dense, "dense", timer=last)(random(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: model.half(), r"conv1\.weight is torch\.float16.*model\.float\(\)"),
        (lambda model: model.fc.weight.data.fill_(NAN), r"fc\.weight holds NaN.*checkpoint"),
        (lambda model: model.bn1.running_var.fill_(NAN), r"bn1\.running_var holds NaN"),
    ],
)
def test_a_bad_model_is_refused_in_one_sentence(change, message):
    model = sparse(vision("resnet18"), 32)
    change(model)
    with pytest.raises(InputError, match=message):
        CpuRunner(model)


def test_a_model_that_cannot_be_traced_is_refused_in_one_sentence():
    with pytest.raises(InputError, match="Block cannot be traced"):
        CpuRunner(Block(lambda net, x: net.one(x) if x.sum() > 0 else x))


def test_bad_arguments_are_refused_in_one_sentence():
    model = sparse(vision("resnet18"), 32)
    with pytest.raises(InputError, match="no kernels 'fast'; choose from sparse, twin, dense"):
        CpuRunner(model, "fast")
    with pytest.raises(InputError, match=r"images are torch\.float16.*images\.float\(\)"):
        CpuRunner(model, timer=last).load(random(1, 3, 32, 32).half())
    with pytest.raises(InputError, match="returns a tuple"):
        pair = nn.Sequential(model, Block(lambda _, x: (x, x)))
        CpuRunner(pair, timer=last).load(random(1, 3, 32, 32))


def test_a_cache_that_cannot_be_written_is_refused_in_one_sentence(tmp_path):
    folder = tmp_path / "a file"
    folder.write_text("")
    model = sparse(vision("resnet18"), 32)
    with pytest.raises(WriteError, match="could not be written"):
        CpuRunner(model, cache=folder / "kernels.json", timer=last).load(random(1, 3, 32, 32))
