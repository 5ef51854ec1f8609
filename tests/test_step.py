"""The options of a recipe, each with masks held."""

import copy
import dataclasses
import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers import sparsity
from helpers.errors import InputError, UnavailableError
from helpers.training.distributed import Processes
from helpers.training.loop import train
from helpers.training.recipe import Recipe
from helpers.training.step import Step

RECIPE = Recipe(epochs=2, batch_size=32, learning_rate=0.1, weight_decay=5e-4, warmup=0.2)
OPTIONS = {
    "bf16": {"amp": "bf16"},
    "fp16": {"amp": "fp16"},
    "contiguous": {"channels_last": False},
    "accumulation": {"accumulation": 4},
    "label smoothing": {"label_smoothing": 0.1},
    "averaged": {"ema_decay": 0.9},
    "distillation": {"distillation": 0.5, "temperature": 2.0},
    "compiled": {"compile": True},
    "all": {
        "amp": "bf16", "channels_last": False, "accumulation": 2, "label_smoothing": 0.1,
        "ema_decay": 0.9, "distillation": 0.5, "compile": True,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def quick_compiler(monkeypatch):
    """Trace as `torch.compile` does, but run what was traced as it is."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def steps(model: nn.Module, recipe: Recipe, teacher: nn.Module | None = None) -> Step:
    return Step(model.train(), recipe, 4, {}, Processes(), teacher)


def batch(splits) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    return next(iter(splits.train))


@pytest.mark.parametrize("option", OPTIONS)
def test_the_masks_are_held_and_a_resumed_training_ends_in_the_same_bits(
    tiny_net, tiny_splits, tmp_path, option
):
    recipe = dataclasses.replace(RECIPE, **OPTIONS[option])
    teacher = copy.deepcopy(tiny_net)
    masks = sparsity.prune_2to4_(tiny_net)
    start, resumed = copy.deepcopy(tiny_net), copy.deepcopy(tiny_net)
    history = train(tiny_net, tiny_splits, recipe, 1, masks, tmp_path / "one.pt", teacher)
    for name, mask in masks.items():
        weight = tiny_net.get_parameter(name)
        assert (weight[~mask] == 0).all()
        assert not torch.equal(weight, start.get_parameter(name)), "nothing was trained"
    assert sparsity.verify_model(tiny_net).query("eligible").is_2to4.all()

    def stop(epochs):
        if len(epochs) == 1 and not stopped:
            stopped.append(True)
            raise KeyboardInterrupt

    stopped: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        train(resumed, tiny_splits, recipe, 1, masks, tmp_path / "two.pt", teacher, stop)
    again = train(resumed, tiny_splits, recipe, 1, masks, tmp_path / "two.pt", teacher)
    assert [(e.loss, e.validation) for e in again] == [(e.loss, e.validation) for e in history]
    ends = [torch.load(tmp_path / f"{name}.pt")["state"]["model"] for name in ("one", "two")]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_the_parts_of_a_batch_give_the_gradient_of_the_whole(tiny_net, tiny_splits):
    """Batch norms are frozen here: they normalise each part by itself."""
    images, labels = batch(tiny_splits)
    nets = [copy.deepcopy(tiny_net) for _ in range(2)]
    for net, parts in zip(nets, (1, 3), strict=True):  # parts of 11, 11 and 10 images
        step = steps(net, dataclasses.replace(RECIPE, accumulation=parts))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        loss, right = step(images, labels, len(labels))
        assert float(loss) == pytest.approx(2.3, abs=0.5)
        assert 0 <= int(right) <= len(labels)
    for one, other in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_the_average_follows_the_weights(tiny_net, tiny_splits):
    step = steps(tiny_net, dataclasses.replace(RECIPE, ema_decay=0.75))
    images, labels = batch(tiny_splits)
    step(images, labels, 32)  # the average begins with these weights
    first = tiny_net[8].weight.detach().clone()
    step(images, labels, 32)
    expected = 0.75 * first + 0.25 * tiny_net[8].weight
    torch.testing.assert_close(step.evaluated[8].weight, expected)
    assert step.evaluated is not tiny_net


def test_the_loss_of_distillation_is_hintons(tiny_net, tiny_splits):
    images, labels = batch(tiny_splits)
    teacher = copy.deepcopy(tiny_net).eval()
    with torch.no_grad():
        teacher[8].weight *= 3
    logits, wanted = copy.deepcopy(tiny_net).train()(images), teacher(images)
    student, target = (torch.softmax(each / 4, 1) for each in (logits, wanted))
    distance = (target * (target.log() - student.log())).sum(1).mean()
    expected = 0.7 * F.cross_entropy(logits, labels) + 0.3 * 16 * distance
    recipe = dataclasses.replace(RECIPE, distillation=0.3, temperature=4.0)
    loss, _ = steps(tiny_net, recipe, teacher)(images, labels, 32)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize(("amp", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_mixed_precision_multiplies_in_the_short_type(tiny_net, tiny_splits, amp, dtype):
    seen = []
    tiny_net[8].register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    steps(tiny_net, dataclasses.replace(RECIPE, amp=amp))(*batch(tiny_splits), 32)
    assert seen == [dtype]
    assert tiny_net[8].weight.dtype == torch.float32


def test_a_step_with_infinite_gradients_is_left_out_in_fp16(tiny_net, tiny_splits):
    images, labels = batch(tiny_splits)
    step = steps(tiny_net, dataclasses.replace(RECIPE, amp="fp16"))
    step.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    before = copy.deepcopy(tiny_net.state_dict())
    step(images, labels, 32)
    assert torch.equal(tiny_net[8].weight, before["8.weight"])
    assert step.scaler.get_scale() == 2.0**125


def test_distilling_without_a_teacher_is_refused(tiny_net):
    with pytest.raises(InputError, match="there is no teacher"):
        steps(tiny_net, dataclasses.replace(RECIPE, distillation=0.5))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_synchronised_batch_norms_without_a_gpu_are_refused(tiny_net):
    with pytest.raises(UnavailableError, match="sync_batch_norm needs GPUs"):
        steps(tiny_net, dataclasses.replace(RECIPE, sync_batch_norm=True))
