"""A masked language model of Python, trained on Python's own standard library.

Every tenth file is held out for the test. Results depend on the version of Python, which the
record states.
"""

import re
import sysconfig
from collections import Counter
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accuracy_tasks.task import Batch, Data, Scores, Task, adamw
from helpers.errors import InputError
from helpers.metrics import accuracy
from helpers.training.recipe import Recipe

# Folders that not every installation has.
LEFT_OUT = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages"}
TOKEN = re.compile(r"\w+|\n *|[^\w\s]")  # a word, a new line with its indentation, or a sign
VOCABULARY = 1000  # tokens: the most frequent ones, and the two below
UNKNOWN, MASK = 0, 1
WINDOW = 16  # tokens
MASKED = 0.15  # of the tokens of a window


def library_files() -> list[Path]:
    """Return the source files of the standard library, sorted by their paths."""
    folder = Path(sysconfig.get_path("stdlib"))
    paths = (path.relative_to(folder) for path in folder.rglob("*.py"))
    files = sorted(path.as_posix() for path in paths if not LEFT_OUT.intersection(path.parts))
    if not files:
        raise InputError(
            f"There is no source of Python's standard library in {folder}. Install Python with it."
        )
    return [folder / name for name in files]


@cache
def windows(train: int, test: int) -> Data:
    """Return windows of 16 tokens (N, 16) from files to train on and from held-out files."""
    texts = [path.read_text("utf-8", errors="replace") for path in library_files()]
    tokens = [TOKEN.findall(text) for text in texts]
    counts = Counter(token for place, file in enumerate(tokens) if place % 10 for token in file)
    frequent = [token for token, _ in counts.most_common(VOCABULARY - 2)]
    numbers = {token: number for number, token in enumerate(frequent, start=2)}

    def some(held_out: bool, count: int) -> Batch:
        files = [file for place, file in enumerate(tokens) if (place % 10 == 0) == held_out]
        flat = torch.tensor([numbers.get(token, UNKNOWN) for file in files for token in file])
        cut = flat[: len(flat) // WINDOW * WINDOW].view(-1, WINDOW)
        order = torch.randperm(len(cut), generator=torch.Generator().manual_seed(0))
        return (cut[order[:count]],)

    return Data(some(False, train), some(True, test))


class LanguageModel(nn.Module):
    """An encoder of PyTorch's Transformer, and logits (M, tokens) of the places asked for."""

    def __init__(self, width: int = 48, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.places = nn.Embedding(WINDOW, width)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True),
            layers,
            enable_nested_tensor=False,
        )
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor, asked: Tensor) -> Tensor:
        """Return the logits of the tokens at the places where `asked` (N, 16) is true."""
        return self.head(self.encoder(self.tokens(tokens) + self.places.weight)[asked])


def hidden(tokens: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return which tokens to mask, at random; unknown ones never are."""
    chance = torch.rand(tokens.shape, generator=generator).to(tokens.device)
    return (chance < MASKED) & (tokens != UNKNOWN)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of the masked tokens."""
    (tokens,) = batch
    asked = hidden(tokens)
    return F.cross_entropy(model(tokens.masked_fill(asked, MASK), asked), tokens[asked])


def scores(model: nn.Module, test: Batch) -> Scores:
    """Return accuracy and loss on masked tokens, the same ones for every model."""
    (tokens,) = test
    asked = hidden(tokens, torch.Generator().manual_seed(0))
    masked = tokens.masked_fill(asked, MASK)
    parts = zip(masked.split(250), asked.split(250), strict=True)
    logits = torch.cat([model(*part) for part in parts])
    right = tokens[asked]
    return {
        "masked tokens %": accuracy(logits, right).top1,
        "loss": float(F.cross_entropy(logits, right)),
    }


RECIPE = Recipe(epochs=3, batch_size=64, learning_rate=3e-3, weight_decay=0.01, warmup=0.1)
TASKS = (
    Task(
        network="small BERT",
        mirrors="BERT-Large",
        make_model=LanguageModel,
        load_data=windows,
        loss=loss,
        scores=scores,
        make_optimizer=adamw,
        recipe=RECIPE,
        training_examples=60_000,
        test_examples=8_000,
    ),
)
