import copy
import dataclasses
import logging

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import sparsity
from helpers.errors import HelpersError, InputError
from helpers.metrics import Accuracy, Comparison
from helpers.training import loop
from helpers.training.loop import TrainingError, TrainingInterrupted, compare, evaluate, train
from helpers.training.recipe import Recipe

RECIPE = Recipe(epochs=3, batch_size=32, learning_rate=0.1, weight_decay=5e-4, warmup=0.2)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Two threads on networks this small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(model.state_dict())


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one) and one.keys() == other.keys()


def scripted(monkeypatch, shares: list[int]) -> list[dict]:
    """Let `evaluate` say these per cent, one after the other; return the weights it saw."""
    seen: list[dict] = []

    def fake(model: nn.Module, *_: object) -> Accuracy:
        seen.append(weights_of(model))
        return Accuracy(shares[len(seen) - 1], 100)

    monkeypatch.setattr(loop, "evaluate", fake)
    return seen


# --- evaluating -------------------------------------------------------------------------


def test_evaluate_sums_up_unequal_batches():
    labels = torch.tensor([0, 1, 2, 0, 1])
    logits = torch.eye(3)[torch.tensor([0, 1, 2, 1, 2])].reshape(5, 3, 1, 1)
    loader = DataLoader(TensorDataset(logits, labels), batch_size=3)
    assert evaluate(nn.Flatten(), loader) == Accuracy(3, 5)


class Says(nn.Module):
    """Answers with the column of its input that it was given."""

    def __init__(self, column: int) -> None:
        super().__init__()
        self.column = column

    def forward(self, images):
        return nn.functional.one_hot(images[:, self.column, 0, 0].long(), 3).float()


def test_two_networks_are_compared_by_the_images_on_which_they_differ():
    labels = torch.tensor([0, 1, 2, 0, 1])
    first = torch.tensor([0, 1, 1, 1, 2])  # right, right, wrong, wrong, wrong
    second = torch.tensor([0, 2, 2, 0, 2])  # right, wrong, right, right, wrong
    answers = torch.stack([first, second], dim=1)[..., None, None].float()
    loader = DataLoader(TensorDataset(answers, labels), batch_size=3)
    assert compare(Says(0), Says(1), loader) == Comparison(only_first=1, only_second=2, total=5)
    assert compare(Says(0), Says(0), loader).standard_error == 0


def test_evaluate_infers_in_evaluation_mode_and_gives_the_mode_back(tiny_net, tiny_splits):
    before = weights_of(tiny_net.train())
    frozen = next(layer for layer in tiny_net.modules() if isinstance(layer, nn.BatchNorm2d)).eval()
    evaluate(tiny_net, tiny_splits.test)
    assert tiny_net.training
    assert not frozen.training
    assert same(before, tiny_net.state_dict()), "batch norm's statistics moved"


def test_a_diverged_model_is_right_about_nothing(tiny_net, tiny_splits):
    with torch.no_grad():
        tiny_net[-1].bias.fill_(torch.nan)
    assert evaluate(tiny_net, tiny_splits.test).correct == 0


def test_evaluating_on_no_images_is_refused(tiny_net, tiny_splits):
    empty = DataLoader(torch.utils.data.Subset(tiny_splits.test.dataset, []), batch_size=8)
    with pytest.raises(InputError, match="no images to evaluate on"):
        evaluate(tiny_net, empty)


def test_a_network_can_be_trained_after_it_was_evaluated(tiny_splits):
    model = nn.Sequential(nn.Conv2d(1, 8, 26), nn.Conv2d(8, 10, 3), nn.Flatten())
    evaluate(model, tiny_splits.test)  # changes the layout of the weights
    images, labels = next(iter(tiny_splits.train))
    nn.functional.cross_entropy(model(images), labels).backward()
    assert all(weight.grad is not None for weight in model.parameters())
    assert not any(weight.is_inference() for weight in model.parameters())


# --- training ---------------------------------------------------------------------------


def test_the_loss_falls_and_the_accuracy_rises(tiny_net, tiny_splits):
    before = evaluate(tiny_net, tiny_splits.test)
    history = train(tiny_net, tiny_splits, dataclasses.replace(RECIPE, epochs=6), seed=1)
    assert [epoch.number for epoch in history] == [1, 2, 3, 4, 5, 6]
    assert history[-1].loss < 0.9 * history[0].loss
    assert evaluate(tiny_net, tiny_splits.test).top1 > before.top1


def test_the_masks_are_held_through_the_training(tiny_net, tiny_splits):
    masks = sparsity.prune_2to4_(tiny_net)
    before = weights_of(tiny_net)
    train(tiny_net, tiny_splits, RECIPE, seed=1, masks=masks)
    assert set(masks) == {"3.weight", "8.weight"}
    for name, mask in masks.items():
        weight = tiny_net.get_parameter(name)
        assert (weight[~mask] == 0).all()
        assert not torch.equal(weight, before[name]), "nothing was trained"


def test_without_masks_the_zeros_are_lost(tiny_net, tiny_splits):
    sparsity.prune_2to4_(tiny_net)
    train(tiny_net, tiny_splits, RECIPE, seed=1)
    assert not sparsity.is_2to4(tiny_net[3].weight)


@pytest.mark.parametrize(("shares", "best"), [([50, 90, 70], 2), ([50, 90, 90], 2), ([0, 0, 0], 1)])
def test_the_best_epochs_weights_are_left_and_of_equal_ones_the_earlier(
    monkeypatch, tiny_net, tiny_splits, shares, best
):
    seen = scripted(monkeypatch, shares)
    history = train(tiny_net, tiny_splits, RECIPE, seed=1)
    assert [epoch.validation for epoch in history] == shares
    assert same(tiny_net.state_dict(), seen[best - 1])
    assert not same(tiny_net.state_dict(), seen[-1])
    assert not tiny_net.training


def test_the_seed_decides_the_result(tiny_net, tiny_splits):
    nets = [copy.deepcopy(tiny_net) for _ in range(3)]
    for net, seed in zip(nets, (1, 1, 2), strict=True):
        train(net, tiny_splits, RECIPE, seed)
    assert same(nets[0].state_dict(), nets[1].state_dict())
    assert not same(nets[0].state_dict(), nets[2].state_dict())


def test_a_loss_that_is_no_number_stops_the_training_in_one_sentence(tiny_net, tiny_splits):
    before = weights_of(tiny_net)
    with pytest.raises(TrainingError, match=r"The loss became nan in epoch 1.*learning_rate") as e:
        train(tiny_net, tiny_splits, dataclasses.replace(RECIPE, learning_rate=1e30), seed=1)
    assert isinstance(e.value, RuntimeError)
    assert isinstance(e.value, HelpersError)
    assert same(tiny_net.state_dict(), before)


@pytest.mark.parametrize("warmup", [0.9, 1.0])
def test_a_warm_up_may_fill_the_whole_training(tiny_net, tiny_splits, warmup):
    recipe = dataclasses.replace(RECIPE, epochs=1, warmup=warmup)
    assert len(train(tiny_net, tiny_splits, recipe, seed=1)) == 1


def test_a_training_of_no_epochs_changes_nothing(tiny_net, tiny_splits, tmp_path):
    before = weights_of(tiny_net.train())
    recipe = dataclasses.replace(RECIPE, epochs=0)
    assert train(tiny_net, tiny_splits, recipe, seed=1, progress_file=tmp_path / "p.pt") == []
    assert same(tiny_net.state_dict(), before)
    assert not tiny_net.training


def test_a_training_without_a_whole_batch_is_refused(tiny_net, tiny_splits):
    empty = DataLoader(tiny_splits.train.dataset, batch_size=10**6, drop_last=True)
    splits = dataclasses.replace(tiny_splits, train=empty)
    with pytest.raises(InputError, match="no whole batch of training images"):
        train(tiny_net, splits, RECIPE, seed=1)


def test_frozen_batch_norms_stay_frozen(tiny_net, tiny_splits):
    """Those in evaluation mode inside a model in training mode."""
    norms = [layer for layer in tiny_net.train().modules() if isinstance(layer, nn.BatchNorm2d)]
    frozen, free = norms[0].eval(), norms[1]
    before = [norm.running_mean.clone() for norm in (frozen, free)]
    train(tiny_net, tiny_splits, RECIPE, seed=1)
    assert torch.equal(frozen.running_mean, before[0])
    assert not torch.equal(free.running_mean, before[1])


def test_a_model_in_evaluation_mode_is_trained_as_a_whole(tiny_net, tiny_splits):
    """As `load_checkpoint` returns it."""
    norms = [layer for layer in tiny_net.eval().modules() if isinstance(layer, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms]
    train(tiny_net, tiny_splits, RECIPE, seed=1)
    assert not any(map(torch.equal, before, (norm.running_mean for norm in norms)))


def test_the_images_come_in_the_order_of_the_recorded_trainings(monkeypatch, tiny_net, tiny_splits):
    """The accuracies that the notebooks show depend on what was drawn before the first batch."""
    states = []
    real = loop._train_epoch

    def spy(*args: object) -> object:
        states.append(torch.get_rng_state())
        return real(*args)

    monkeypatch.setattr(loop, "_train_epoch", spy)
    train(tiny_net, tiny_splits, dataclasses.replace(RECIPE, epochs=2), seed=5)
    for number, state in enumerate(states, 1):
        torch.manual_seed(5 + number)
        torch.empty((), dtype=torch.int64).random_()
        assert torch.equal(state, torch.get_rng_state())


def test_each_epoch_is_logged(monkeypatch, tiny_net, tiny_splits, caplog, capsys):
    caplog.set_level(logging.INFO, "helpers")
    scripted(monkeypatch, [50, 90, 70])
    history = train(tiny_net, tiny_splits, RECIPE, seed=1)
    assert [record.getMessage() for record in caplog.records] == [
        f"epoch {e.number}/3: loss {e.loss:.4f}, validation {e.validation:.2f} %, {e.seconds:.0f} s"
        for e in history
    ]
    assert capsys.readouterr().out == ""


def test_what_a_run_shows_is_given_after_each_epoch(tiny_net, tiny_splits, tmp_path):
    given: list[list[loop.Epoch]] = []
    file = tmp_path / "p.pt"
    history = train(tiny_net, tiny_splits, RECIPE, 1, progress_file=file, on_epoch=given.append)
    assert given == [history[:1], history[:2], history]
    for epoch in history:
        assert 0 <= epoch.training <= 100
        assert epoch.images_per_second > 0
        assert 0 <= epoch.waited < 1
    assert history[-1].learning_rate == pytest.approx(0)
    train(tiny_net, tiny_splits, RECIPE, 1, progress_file=file, on_epoch=given.append)
    assert given[3:] == [history]


# --- resuming ---------------------------------------------------------------------------


def interrupt(monkeypatch, where: str, epoch: int) -> None:
    """Let the training stop in the middle of an epoch, after its weights have moved."""
    real, calls = getattr(loop, where), []

    def stopping(*args: object) -> object:
        result = real(*args)
        calls.append(where)
        if len(calls) == epoch:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(loop, where, stopping)


@pytest.mark.parametrize("where", ["_train_epoch", "evaluate"])
@pytest.mark.parametrize("finished", [0, 1, 2])
def test_an_interrupted_training_ends_in_the_same_bits(
    monkeypatch, tiny_net, tiny_splits, tmp_path, where, finished
):
    masks = sparsity.prune_2to4_(tiny_net)
    straight, stopped, resumed = (copy.deepcopy(tiny_net) for _ in range(3))
    one = train(straight, tiny_splits, RECIPE, 1, masks, tmp_path / "straight.pt")

    with monkeypatch.context() as patch:
        interrupt(patch, where, finished + 1)
        with pytest.raises(TrainingInterrupted) as stop:
            train(stopped, tiny_splits, RECIPE, 1, masks, tmp_path / "stopped.pt")
    assert (tmp_path / "stopped.pt").exists() == (finished > 0)
    kept = f"epoch {finished} of {RECIPE.epochs} is" if finished else "none of 3 epochs is"
    assert str(stop.value).startswith(f"Interrupted; {kept} kept. Run it again ")
    two = train(resumed, tiny_splits, RECIPE, 1, masks, tmp_path / "stopped.pt")

    assert same(straight.state_dict(), resumed.state_dict())
    assert [(e.loss, e.validation) for e in one] == [(e.loss, e.validation) for e in two]
    # The best epoch may be an early one, so compare where both training runs ended, too.
    ends = [torch.load(tmp_path / f"{name}.pt") for name in ("straight", "stopped")]
    assert same(ends[0]["state"]["model"], ends[1]["state"]["model"])
    optimizers = [end["state"]["optimizer"]["state"].values() for end in ends]
    momenta = [[state["momentum_buffer"] for state in states] for states in optimizers]
    assert all(map(torch.equal, *momenta))


def test_an_interrupted_training_goes_on_with_the_very_same_network(
    monkeypatch, tiny_net, tiny_splits, tmp_path, caplog
):
    """As in a notebook whose cell is interrupted and run again."""
    before, straight = weights_of(tiny_net), copy.deepcopy(tiny_net)
    caplog.set_level(logging.INFO, "helpers")
    train(straight, tiny_splits, RECIPE, seed=1)
    with monkeypatch.context() as patch:
        interrupt(patch, "_train_epoch", 2)
        with pytest.raises(KeyboardInterrupt) as interruption:
            train(tiny_net, tiny_splits, RECIPE, seed=1, progress_file=tmp_path / "p.pt")
    assert str(interruption.value) == "Interrupted; epoch 1 of 3 is kept. Run it again to go on."
    assert same(tiny_net.state_dict(), before)
    train(tiny_net, tiny_splits, RECIPE, seed=1, progress_file=tmp_path / "p.pt")
    assert "continuing after epoch 1" in caplog.text
    assert same(straight.state_dict(), tiny_net.state_dict())


def test_of_an_interrupted_training_without_a_progress_file_nothing_is_kept(
    monkeypatch, tiny_net, tiny_splits
):
    interrupt(monkeypatch, "_train_epoch", 2)
    with pytest.raises(TrainingInterrupted, match=r"^Interrupted; none of 3 epochs is kept"):
        train(tiny_net, tiny_splits, RECIPE, seed=1)


@pytest.mark.parametrize("asked_by", ["a fresh network", "the trained one"])
def test_a_finished_training_is_loaded_and_not_repeated(
    monkeypatch, tiny_net, tiny_splits, tmp_path, caplog, asked_by
):
    caplog.set_level(logging.INFO, "helpers")
    fresh = copy.deepcopy(tiny_net)
    file = tmp_path / "progress.pt"
    history = train(tiny_net, tiny_splits, RECIPE, seed=1, progress_file=file)
    again = fresh if asked_by == "a fresh network" else copy.deepcopy(tiny_net)
    monkeypatch.setattr(loop, "_train_epoch", lambda *_: pytest.fail("it was repeated"))
    assert train(again, tiny_splits, RECIPE, seed=1, progress_file=file) == history
    assert same(again.state_dict(), tiny_net.state_dict())
    assert not again.training
    assert "progress.pt has all epochs (3)" in caplog.text


@pytest.mark.parametrize("changed", ["recipe", "seed", "weights", "masks"])
def test_the_progress_of_another_training_is_not_taken(
    tiny_net, tiny_splits, tmp_path, caplog, changed
):
    file = tmp_path / "progress.pt"
    fresh = copy.deepcopy(tiny_net)
    train(tiny_net, tiny_splits, RECIPE, seed=1, progress_file=file)
    recipe, seed, masks = RECIPE, 1, None
    if changed == "recipe":
        recipe = dataclasses.replace(RECIPE, learning_rate=0.05)
    elif changed == "seed":
        seed = 2
    elif changed == "weights":
        with torch.no_grad():
            fresh[8].bias += 1
    else:
        masks = {"3.weight": sparsity.mask_2to4(fresh[3].weight)}
    alone = copy.deepcopy(fresh)

    train(fresh, tiny_splits, recipe, seed, masks, file)
    assert "progress.pt belongs to another training" in caplog.text
    assert len(torch.load(tmp_path / "progress.old.pt")["history"]) == RECIPE.epochs
    train(alone, tiny_splits, recipe, seed, masks)
    assert same(fresh.state_dict(), alone.state_dict())


def test_a_training_goes_on_with_another_way_to_compute_it(tiny_net, tiny_splits, tmp_path, caplog):
    caplog.set_level(logging.INFO, "helpers")
    train(tiny_net, tiny_splits, RECIPE, seed=1, progress_file=tmp_path / "p.pt")
    other = dataclasses.replace(RECIPE, accumulation=2, channels_last=False)
    train(tiny_net, tiny_splits, other, seed=1, progress_file=tmp_path / "p.pt")
    assert "p.pt has all epochs (3)" in caplog.text


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_damaged_progress_file_is_refused_in_one_sentence(
    tiny_net, tiny_splits, tmp_path, content
):
    file = tmp_path / "progress.pt"
    if content is None:  # a good file that was cut off
        train(tiny_net, tiny_splits, RECIPE, seed=1, progress_file=file)
        content = file.read_bytes()[:2000]
    file.write_bytes(content)
    with pytest.raises(HelpersError, match=r"progress\.pt is damaged .*Delete it"):
        train(tiny_net, tiny_splits, RECIPE, seed=1, progress_file=file)
