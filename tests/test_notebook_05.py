"""The exercises of notebook 05: what is right, and which mistake gets which hint."""

import re

import pytest

from helpers.tutorial.answers.notebook_05 import EXERCISES
from helpers.tutorial.exercises import UNTOUCHED

judge = EXERCISES["05-count-layers"]


def names(line: str) -> str:
    return line.rpartition("math:" if "math:" in line else "layers:")[2]


def test_counting_names_between_commas_is_right():
    assert judge(lambda line: len([name for name in names(line).split(",") if name.strip()])) == ""
    assert judge(lambda line: len(re.findall(r"[^,\s][^,]*", names(line)))) == ""


@pytest.mark.parametrize(
    ("mistake", "hint"),
    [
        (lambda line: len(names(line).split(",")), "one layer in an empty list"),
        (lambda line: len(line.split(":")[-1].split(",")), "one layer in an empty list"),
        (lambda line: line.count(",") + 1, "one layer in an empty list"),
        (lambda line: line.count(","), "one layer more than commas"),
        (lambda line: len(re.findall(r"\w+_\d+", names(line))), "is one layer"),
        (lambda line: len(re.split(r"[,+]", names(line))), "is one layer"),
        (lambda line: 3, "hint below"),
    ],
)
def test_a_common_mistake_gets_its_hint(mistake, hint):
    assert hint in judge(mistake)


def test_an_untouched_function_is_told_from_a_wrong_one():
    assert judge(lambda line: None) == UNTOUCHED
