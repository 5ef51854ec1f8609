"""What each of several processes does; `test_distributed.py` starts them."""

import json
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from helpers import sparsity
from helpers.errors import InputError
from helpers.training import loop
from helpers.training.data import InMemoryImages, Splits, evaluation_share, training_share
from helpers.training.distributed import Processes, processes
from helpers.training.loop import evaluate_together, train
from helpers.training.recipe import Recipe

RECIPE = Recipe(epochs=3, batch_size=32, learning_rate=0.1, weight_decay=5e-4, warmup=0.2)
OPTIONS = replace(RECIPE, label_smoothing=0.1, ema_decay=0.9, accumulation=2, distillation=0.5)


def network(norm: bool = False) -> nn.Module:
    torch.manual_seed(3)
    layers = [nn.Conv2d(1, 8, 3, stride=4), nn.BatchNorm2d(8) if norm else nn.Identity()]
    layers += [nn.ReLU(), nn.Conv2d(8, 16, 1), nn.ReLU(), nn.AvgPool2d(3), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def splits(validation: int = 61) -> Splits:
    generator = torch.Generator().manual_seed(1)

    def loader(count: int, shuffle: bool = False) -> DataLoader:
        images = torch.randn(count, 1, 28, 28, generator=generator)
        data = InMemoryImages(images, torch.arange(count) % 10, flip=shuffle)
        return DataLoader(
            data,
            batch_size=32 if shuffle else 16,
            shuffle=shuffle,
            drop_last=shuffle,
            collate_fn=tuple,
        )

    return Splits(loader(100, shuffle=True), loader(validation), loader(40), [*"0123456789"])


def trained(
    recipe: Recipe, progress: Path | None = None, norm: bool = False
) -> dict[str, torch.Tensor]:
    """Return the weights after a training with masks held."""
    model, teacher = network(norm), network(norm)
    masks = sparsity.prune_2to4_(model)
    train(model, splits(), recipe, 1, masks, progress, teacher)
    assert sparsity.verify_model(model).query("eligible").is_2to4.all()
    return model.state_dict()


class Seen(nn.Module):
    """Answers 0 and remembers the number in the first pixel of each image."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[int] = []

    def forward(self, images):
        self.numbers += images[:, 0, 0, 0].int().tolist()
        return nn.functional.one_hot(torch.zeros(len(images), dtype=torch.int64), 10).float()


def numbered(count: int) -> DataLoader:
    images = torch.arange(count).float().reshape(-1, 1, 1, 1)
    return DataLoader(TensorDataset(images, torch.arange(count) % 3), batch_size=4)


def every_image_is_counted_once(folder: Path) -> None:
    together = processes()
    for count in (1, 2, 7, 12):
        seen = Seen()
        accuracy = evaluate_together(seen, numbered(count))
        assert accuracy.total == count
        assert accuracy.correct == len(range(0, count, 3))
        everybody: list = [None] * together.count
        dist.all_gather_object(everybody, seen.numbers)
        assert sorted(chain.from_iterable(everybody)) == list(range(count))


def weights_are_those_of_one_process(folder: Path) -> None:
    for name, recipe in (("plain", RECIPE), ("options", OPTIONS)):
        state = trained(recipe)
        for key, one in torch.load(folder / f"{name}.pt").items():
            torch.testing.assert_close(state[key], one, rtol=1e-4, atol=1e-5, msg=name + key)


def a_training_goes_on_with_another_number(folder: Path) -> None:
    state = trained(RECIPE, folder / f"begun_{processes().count}.pt")
    for key, one in torch.load(folder / "plain.pt").items():
        torch.testing.assert_close(state[key], one, rtol=1e-4, atol=1e-5)


def processes_end_with_the_same_weights_and_statistics(folder: Path) -> None:
    state = trained(replace(RECIPE, ema_decay=0.9), norm=True)
    everybody: list = [None] * processes().count
    dist.all_gather_object(everybody, state)
    assert all(torch.equal(each[key], state[key]) for each in everybody for key in state)


def too_small_a_batch_is_refused(folder: Path) -> None:
    for recipe in (replace(RECIPE, accumulation=32), RECIPE):
        loaders = splits()
        if recipe is RECIPE:
            whole = DataLoader(loaders.train.dataset, batch_size=32, collate_fn=tuple)
            loaders = replace(loaders, train=whole)
        try:
            train(network(), loaders, recipe, 1)
        except InputError as error:
            message = str(error)
        assert ("cannot be shared by" if recipe is not RECIPE else "drop_last=True") in message


def what_differs_is_told_on_every_process(folder: Path) -> None:
    together = processes()
    together.require_same("the same", "words")
    try:
        together.require_same(f"of {together.rank}", "words")
    except InputError as error:
        assert "do not have the same words" in str(error)
    else:
        raise AssertionError("nothing was told")


def what_the_first_process_has_is_shared(folder: Path) -> None:
    together = processes()
    for content in (None, b"", b"abc", bytes(100_000)):
        assert together.share(content if together.is_first else b"not this") == content
    assert together.sum(1, together.rank) == [together.count, sum(range(together.count))]


CASES = (
    every_image_is_counted_once,
    weights_are_those_of_one_process,
    a_training_goes_on_with_another_number,
    processes_end_with_the_same_weights_and_statistics,
    too_small_a_batch_is_refused,
    what_differs_is_told_on_every_process,
    what_the_first_process_has_is_shared,
)


def check_all(rank: int, count: int, folder: str) -> None:
    """Run every case as one of several ranks, and begin a training that one process ends."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store_{count}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=count)
    try:
        for case in CASES:
            case(Path(folder))
        if count == 2:
            begin(Path(folder) / "begun_1.pt")
    finally:
        dist.destroy_process_group()


def begin(path: Path) -> None:
    """Train for one of three epochs."""
    real, calls = loop._train_epoch, []

    def once(*args: object) -> object:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    model = network()
    masks = sparsity.prune_2to4_(model)
    with patch.object(loop, "_train_epoch", once), suppress(KeyboardInterrupt):
        train(model, splits(), RECIPE, 1, masks, path, network())


def batches_of(count: int, loader: DataLoader) -> str:
    """Return the batches that so many processes see together, as text."""
    shares = []
    for rank in range(count):
        torch.manual_seed(9)
        shares.append(list(training_share(loader, Processes(rank, count))))
    batches = []
    for parts in zip(*shares, strict=True):
        whole = torch.empty(sum(len(part[1]) for part in parts), *parts[0][0].shape[1:])
        for rank, part in enumerate(parts):
            whole[rank::count] = part[0]
        batches.append(whole.tolist())
    return json.dumps(batches)


def validation_of(count: int, loader: DataLoader) -> list[int]:
    """Return the labels of all shares of an evaluation, one process after the other."""
    return [
        label
        for rank in range(count)
        for _, labels in evaluation_share(loader, Processes(rank, count))
        for label in labels.tolist()
    ]
