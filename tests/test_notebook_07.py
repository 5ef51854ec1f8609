"""The exercises of notebook 07: what is right, and which mistake gets which hint."""

from functools import partial

import pytest

from helpers.measurement import roofline
from helpers.tutorial.answers import notebook_07
from helpers.tutorial.exercises import UNTOUCHED

judge = notebook_07.EXERCISES["07-side"]
SHEET = roofline.DATASHEETS["a100"]


def side(rows, outputs, inputs, sparse):
    peak = SHEET.tflops["FP16"][sparse]
    arithmetic = 2 * rows * outputs * inputs / (peak * 1e12)
    floor = roofline.floor_ms(rows, outputs, inputs, "FP16", peak, SHEET.bandwidth, sparse)
    return "memory" if floor > 1001 * arithmetic else "arithmetic"


def test_the_longer_of_the_two_times_decides():
    assert judge(side) == ""


def test_both_sides_are_asked_for_and_some_layers_change_theirs():
    found = {case: side(*case) for case in notebook_07._CASES}
    assert set(found.values()) == {"memory", "arithmetic"}
    assert any(found[*case[:3], False] != found[*case[:3], True] for case in found)


@pytest.mark.parametrize(("hint", "mistake"), notebook_07._MISTAKES.items())
def test_a_common_mistake_gets_its_hint(hint, mistake):
    assert judge(partial(notebook_07._side, **mistake)) == hint


@pytest.mark.parametrize(
    ("mistake", "hint"),
    [
        (lambda *_: "bandwidth", "one of the two words"),
        (lambda *_: "memory", "hint below"),
        (lambda *_: None, UNTOUCHED),
    ],
)
def test_other_answers_are_told_apart(mistake, hint):
    assert hint in judge(mistake)


@pytest.mark.parametrize(("answer", "hint"), [(1.62, ""), (2, "arithmetic"), (1.27, "memory")])
def test_the_gain_of_a_layer_that_changes_its_side(answer, hint):
    said = notebook_07.EXERCISES["07-vit-gain"](answer)
    assert hint in said
    assert bool(said) == bool(hint)
