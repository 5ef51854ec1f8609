"""Translation of generated sentences, with dates and numbers in words, from English to German.

A pair, with its tokens between spaces and the parts of a German number word apart:

    on monday the twenty third of may nineteen hundred eighty seven she sold four hundred six pens
    am montag dem drei und zwanzig sten mai neun zehn hundert sieben und acht zig verkaufte sie
    vier hundert sechs stifte

German says the ones before the tens, and the verb before the subject once the date comes first.
"""

import random
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from accuracy_tasks.task import Batch, Data, Scores, Task, adamw
from helpers.metrics import Accuracy
from helpers.training.recipe import Recipe

DAYS = {
    "monday": "montag", "tuesday": "dienstag", "wednesday": "mittwoch", "thursday": "donnerstag",
    "friday": "freitag", "saturday": "samstag", "sunday": "sonntag",
}  # fmt: skip
MONTHS = {
    "january": "januar", "february": "februar", "march": "märz", "april": "april", "may": "mai",
    "june": "juni", "july": "juli", "august": "august", "september": "september",
    "october": "oktober", "november": "november", "december": "dezember",
}  # fmt: skip
SUBJECTS = {"she": "sie", "he": "er", "the teacher": "der lehrer", "the doctor": "die ärztin"}
VERBS = {"sold": "verkaufte", "bought": "kaufte", "found": "fand", "counted": "zählte"}
THINGS = {
    "pens": "stifte", "apples": "äpfel", "books": "bücher", "letters": "briefe",
    "stars": "sterne", "houses": "häuser", "keys": "schlüssel", "birds": "vögel",
}  # fmt: skip

ENGLISH = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
ENGLISH_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
ENGLISH_ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth "
    "thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth"
).split()
GERMAN = (
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf "
    "drei_zehn vier_zehn fünf_zehn sech_zehn sieb_zehn acht_zehn neun_zehn"
).split()
GERMAN_TENS = "zwan_zig drei_ßig vier_zig fünf_zig sech_zig sieb_zig acht_zig neun_zig".split()
GERMAN_ORDINALS = {1: "ersten", 3: "dritten", 7: "siebten", 8: "achten"}

# --- pairs ---


def english_number(number: int) -> list[str]:
    """Return a number from 1 to 999,999 in words."""
    if number >= 1000:
        rest = english_number(number % 1000) if number % 1000 else []
        return [*english_number(number // 1000), "thousand", *rest]
    words = [ENGLISH[number // 100], "hundred"] if number >= 100 else []
    number %= 100
    if number >= 20:
        words.append(ENGLISH_TENS[number // 10 - 2])
        number %= 10
    return [*words, ENGLISH[number]] if number else words


def german_number(number: int) -> list[str]:
    """Return a number from 1 to 999,999 as the parts of its word."""
    if number >= 1000:
        rest = german_number(number % 1000) if number % 1000 else []
        return [*_before_another(number // 1000), "tausend", *rest]
    parts = [*_before_another(number // 100), "hundert"] if number >= 100 else []
    number %= 100
    if number < 20:
        return [*parts, *GERMAN[number].split("_")] if number else parts
    ones = [*_before_another(number % 10), "und"] if number % 10 else []
    return [*parts, *ones, *GERMAN_TENS[number // 10 - 2].split("_")]


def _before_another(number: int) -> list[str]:
    """Return a number as it stands inside of a longer word, where `eins` is `ein`."""
    parts = german_number(number)
    return [*parts[:-1], "ein"] if parts[-1] == "eins" else parts


def english_ordinal(day: int) -> list[str]:
    """Return a day of the month in words."""
    if day < 20:
        return [ENGLISH_ORDINALS[day - 1]]
    tens = ENGLISH_TENS[day // 10 - 2]
    if day % 10:
        return [tens, ENGLISH_ORDINALS[day % 10 - 1]]
    return [tens[:-1] + "ieth"]


def german_ordinal(day: int) -> list[str]:
    """Return a day of the month, in the dative, as the parts of its word."""
    if day in GERMAN_ORDINALS:
        return [GERMAN_ORDINALS[day]]
    return [*german_number(day), "ten" if day < 20 else "sten"]


def pair(generator: random.Random) -> tuple[str, str]:
    """Return a sentence in English and in German, as tokens with spaces between them."""
    weekday, month, subject, verb, thing = (
        generator.choice(list(words)) for words in (DAYS, MONTHS, SUBJECTS, VERBS, THINGS)
    )
    day, century, year = (
        generator.randint(1, 31),
        generator.randint(11, 19),
        generator.randint(1, 99),
    )
    number = generator.randint(2, 10 ** generator.randint(1, 6) - 1)
    english = [
        "on", weekday, "the", *english_ordinal(day), "of", month,
        *english_number(century), "hundred", *english_number(year),
        subject, verb, *english_number(number), thing,
    ]  # fmt: skip
    german = [
        "am", DAYS[weekday], "dem", *german_ordinal(day), MONTHS[month],
        *german_number(century), "hundert", *german_number(year),
        VERBS[verb], SUBJECTS[subject], *german_number(number), THINGS[thing],
    ]  # fmt: skip
    return " ".join(english), " ".join(german)


# --- tokens ---

PADDING, START, END = 0, 1, 2
LENGTH = 40  # tokens of the longest sentence, its start and its end included


@cache
def vocabularies() -> tuple[dict[str, int], dict[str, int]]:
    """Return the number of each English and each German token, from 3."""
    generator = random.Random(0)
    pairs = [pair(generator) for _ in range(20_000)]  # enough for every token to occur
    english, german = (
        sorted({token for sentence in side for token in sentence.split()})
        for side in zip(*pairs, strict=True)
    )
    return (
        {token: number for number, token in enumerate(english, start=END + 1)},
        {token: number for number, token in enumerate(german, start=END + 1)},
    )


def encode(sentence: str, vocabulary: dict[str, int]) -> list[int]:
    """Return the numbers of a sentence's tokens, with start and end, padded to `LENGTH`."""
    numbers = [START, *(vocabulary[token] for token in sentence.split()), END]
    return numbers + [PADDING] * (LENGTH - len(numbers))


@cache
def pairs(train: int, test: int) -> Data:
    """Return sentences in English and in German (N, 40); no test sentence is trained on."""
    generator = random.Random(1)
    sentences = list(dict.fromkeys(pair(generator) for _ in range(train + test)))
    numbers = tuple(
        torch.tensor([encode(sentence, vocabulary) for sentence in side])
        for side, vocabulary in zip(zip(*sentences, strict=True), vocabularies(), strict=True)
    )
    return Data(tuple(x[test:] for x in numbers), tuple(x[:test] for x in numbers))


# --- the network ---


class Translator(nn.Module):
    """An encoder and a decoder of PyTorch's Transformer, and logits (N, T, tokens)."""

    def __init__(self, width: int = 24, layers: int = 2) -> None:
        super().__init__()
        english, german = vocabularies()
        self.english = nn.Embedding(END + 1 + len(english), width)
        self.german = nn.Embedding(END + 1 + len(german), width)
        self.places = nn.Embedding(LENGTH, width)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True),
            layers,
            enable_nested_tensor=False,
        )
        self.decoder = nn.TransformerDecoder(
            nn.TransformerDecoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True), layers
        )
        self.head = nn.Linear(width, END + 1 + len(german))

    def encode(self, english: Tensor) -> Tensor:
        """Return what the decoder looks at: activations (N, T, width)."""
        return self.encoder(
            self._placed(self.english(english)), src_key_padding_mask=english == PADDING
        )

    def decode(self, memory: Tensor, english: Tensor, german: Tensor) -> Tensor:
        """Return the logits of the token that follows each one of the German sentences so far."""
        causal = nn.Transformer.generate_square_subsequent_mask(german.shape[1], german.device)
        activations = self.decoder(
            self._placed(self.german(german)),
            memory,
            tgt_mask=causal,
            tgt_is_causal=True,
            memory_key_padding_mask=english == PADDING,
        )
        return self.head(activations)

    def forward(self, english: Tensor, german: Tensor) -> Tensor:
        """Return the logits of the token that follows each German one."""
        return self.decode(self.encode(english), english, german)

    def _placed(self, activations: Tensor) -> Tensor:
        return activations + self.places.weight[: activations.shape[1]]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy of each next token."""
    english, german = (trimmed(sentences) for sentences in batch)
    logits = model(english, german[:, :-1])
    return F.cross_entropy(logits.transpose(1, 2), german[:, 1:], ignore_index=PADDING)


def trimmed(sentences: Tensor) -> Tensor:
    """Return sentences without the padding after the longest of them."""
    return sentences[:, : int((sentences != PADDING).sum(1).max())]


def scores(model: Translator, test: Batch) -> Scores:
    """Return how many of a hundred sentences are translated without any error."""
    english, german = test
    right = (translate(model, english) == german).all(1)
    return {"exact match %": Accuracy(int(right.sum()), len(right)).top1}


def translate(model: Translator, english: Tensor) -> Tensor:
    """Return translations (N, 40): at each step the likeliest token."""
    english = trimmed(english)
    memory = model.encode(english)
    german = torch.full((len(english), 1), START, device=english.device)
    ended = torch.zeros(len(english), dtype=torch.bool, device=english.device)
    while german.shape[1] < LENGTH and not ended.all():
        token = model.decode(memory, english, german)[:, -1].argmax(1)
        german = torch.cat((german, token.masked_fill(ended, PADDING)[:, None]), 1)
        ended |= token == END
    return F.pad(german, (0, LENGTH - german.shape[1]), value=PADDING)


RECIPE = Recipe(epochs=4, batch_size=64, learning_rate=3e-3, weight_decay=0.01, warmup=0.1)
TASKS = (
    Task(
        network="small Transformer",
        mirrors="FairSeq Transformer",
        make_model=Translator,
        load_data=pairs,
        loss=loss,
        scores=scores,
        make_optimizer=adamw,
        recipe=RECIPE,
        training_examples=20_000,
        test_examples=1_000,
    ),
)
