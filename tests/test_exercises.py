"""Exercises: what is said of a right, a wrong and an untouched answer."""

import ast
import re
import shutil
import sys
from types import ModuleType

import nbformat
import numpy as np
import onnx
import pandas as pd
import pytest
import torch

from helpers.sparsity import verify_onnx
from helpers.tutorial.artifacts import NOTEBOOKS
from helpers.tutorial.checks import TutorialError
from helpers.tutorial.exercises import (
    NO_HINT,
    UNTOUCHED,
    Function,
    Value,
    check_answer,
    exercises_of,
    judge_of,
)
from helpers.tutorial.settings import project_root


@pytest.fixture
def exercise(monkeypatch):
    """Let notebook 99 have one exercise, with this judge."""

    def make(judge):
        module = ModuleType("notebook_99")
        module.EXERCISES = {"99-made-up": judge}
        monkeypatch.setitem(sys.modules, "helpers.tutorial.answers.notebook_99", module)

    return make


def test_an_untouched_answer_is_asked_for(capsys):
    check_answer("02-bytes", ...)
    assert capsys.readouterr().out.startswith("Replace the ...")


@pytest.mark.parametrize(
    ("answer", "expected", "tolerance"),
    [
        (3, 3, 0),
        (1.78, 1.781, 0.01),
        ("grouped", "grouped", 0),
        ([3, 1], [1, 3], 0),
        ((3, 1), [1, 3], 0),
        ({1, 3}, [1, 3], 0),
        ([1.0, 3], [1, 3], 0),
        ([True, "a"], [1, "a"], 0),
        (list(np.array([3, 1])), [1, 3], 0),
        (np.array([3, 1]), [1, 3], 0),
        (np.float64(1.78), 1.781, 0.01),
        (torch.tensor(3), 3, 0),
        (torch.tensor([1, 3]), [1, 3], 0),
        ([torch.tensor(3), torch.tensor(1)], [1, 3], 0),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]], 0),
        ([1, 2], torch.tensor([1, 2]), 0),
        (pd.Series([3, 1]), [1, 3], 0),
        ({"a": 1}, {"a": 1}, 0),
    ],
)
def test_a_right_answer_is_confirmed(capsys, exercise, answer, expected, tolerance):
    exercise(Value(expected, tolerance))
    check_answer("99-made-up", answer)
    assert capsys.readouterr().out == f"[OK] {answer} is right.\n"


@pytest.mark.parametrize(
    ("answer", "expected", "tolerance"),
    [
        (4, 3, 0),
        (1.8, 1.781, 0.01),
        (float("nan"), 3, 1),
        ("dense", "grouped", 0),
        ([1, 2], [1, 3], 0),
        ([1], [1, 3], 0),
        (None, 3, 0),
        ("three", 3, 1),
    ],
)
def test_a_wrong_answer_stops_nothing(capsys, exercise, answer, expected, tolerance):
    exercise(Value(expected, tolerance))
    check_answer("99-made-up", answer)
    assert capsys.readouterr().out.startswith("Not yet:")


class Odd:
    """An object that can neither be compared nor shown."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    def __repr__(self) -> str:
        raise RuntimeError("no text")

    __hash__ = None


@pytest.mark.parametrize("expected", [3, 1.5, "grouped", [1, 2]])
@pytest.mark.parametrize(
    "answer",
    [
        [..., ...],
        ["two", 1],
        [None, 1],
        torch.tensor([1, 5]),
        torch.zeros(2, 3),
        torch.zeros(0),
        [torch.zeros(2), torch.zeros(3)],
        np.zeros((2, 2)),
        [np.zeros(2), 1],
        np.array([]),
        pd.DataFrame({"a": [1, 2]}),
        [pd.DataFrame({"a": [1, 2]}), 1],
        pd.Series([1, 5]),
        {"a": torch.zeros(2)},
        {"a", "b"},
        torch.nn.Linear(2, 2),
        10**400,
        1j,
        Odd(),
        [Odd(), Odd()],
        check_answer,
    ],
    ids=lambda answer: type(answer).__name__,
)
def test_an_answer_of_any_type_stops_nothing(capsys, exercise, answer, expected):
    exercise(Value(expected, tolerance=0.1))
    check_answer("99-made-up", answer)
    assert capsys.readouterr().out.startswith("Not yet:")


def test_a_common_mistake_gets_the_hint_that_fits(capsys, exercise):
    exercise(Value(6, mistakes={4: "That counts one survivor."}))
    check_answer("99-made-up", 4)
    check_answer("99-made-up", 5)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "Not yet: 4 is not the answer. That counts one survivor."
    assert second == f"Not yet: 5 is not the answer. {NO_HINT}"


def test_an_expected_value_may_be_computed_when_it_is_asked_for(capsys, exercise):
    exercise(Value(lambda: 3))
    check_answer("99-made-up", 3)
    assert capsys.readouterr().out == "[OK] 3 is right.\n"


def double(number):
    return 2 * number


def untouched(number): ...


def broken(number):
    raise ValueError("no such axis")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (double, "[OK] double is right.\n"),
        (untouched, f"{UNTOUCHED}\n"),
        (abs, "Not yet: abs is not the answer. Twice as much.\n"),
        (
            broken,
            "Not yet: broken is not the answer. It stopped with ValueError: no such axis\n",
        ),
    ],
)
def test_an_answer_may_be_code(capsys, exercise, answer, said):
    def judge(function):
        result = function(4)
        if result is None:
            return UNTOUCHED
        return "" if result == 8 else "Twice as much."

    exercise(judge)
    check_answer("99-made-up", answer)
    assert capsys.readouterr().out == said


def add(one, other):
    return one + other


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda one, other: one + other, "[OK]"),
        (lambda one, other: [*one, *other], "[OK]"),
        (lambda one, other: None, UNTOUCHED),
        (lambda one, other: other + one, "The second comes after the first."),
        (lambda one, other: one, NO_HINT),
        (lambda one, other: one.clear(), UNTOUCHED),
        (lambda one, other: [*one, 0], NO_HINT),
    ],
)
def test_a_function_is_judged_by_what_it_returns_in_order(capsys, exercise, answer, said):
    mistakes = {lambda one, other: other + one: "The second comes after the first."}
    exercise(Function(add, [([1, 2], [3]), ([], [4])], mistakes))
    check_answer("99-made-up", answer)
    assert said in capsys.readouterr().out


def test_a_function_may_change_its_arguments(capsys, exercise):
    inputs = [([3, 1, 2],)]
    exercise(Function(sorted, inputs))
    check_answer("99-made-up", lambda numbers: numbers.sort() or numbers)
    assert capsys.readouterr().out.startswith("[OK]")
    assert inputs == [([3, 1, 2],)]


def test_numbers_of_a_function_may_differ_by_the_tolerance(capsys, exercise):
    exercise(Function(lambda x: torch.tensor([x, 2 * x]), [(1.0,)], tolerance=0.1))
    check_answer("99-made-up", lambda x: [x + 0.05, 2 * x])
    check_answer("99-made-up", lambda x: [2 * x, x])
    right, wrong = capsys.readouterr().out.splitlines()
    assert right.startswith("[OK]")
    assert wrong.startswith("Not yet")


@pytest.mark.parametrize("name", ["02-no-such", "98-none", "bytes", ""])
def test_an_exercise_that_does_not_exist_is_named(name):
    with pytest.raises(TutorialError, match=rf"^There is no exercise '{name}'\."):
        judge_of(name)


# --- the exercises of the notebooks ---------------------------------------------------------

EXERCISES = {name: judge for number in NOTEBOOKS for name, judge in exercises_of(number).items()}
# Their answers are computed from the files of a run; the browser's tests solve these.
NEED_A_RUN = {name for name, judge in EXERCISES.items() if callable(getattr(judge, "expected", 0))}
NEED_A_RUN |= {"08-int8-bytes"}  # its solution goes on from a cell above it


def solutions() -> list[tuple[str, str, str]]:
    """Return name, solution and the notebook's imports for each exercise that has a solution."""
    found = []
    for file in NOTEBOOKS.values():
        cells = nbformat.read(project_root() / "notebooks" / file, as_version=4).cells
        code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
        imports = [
            node for node in ast.parse(code).body if isinstance(node, ast.Import | ast.ImportFrom)
        ]
        setting = "\n".join(map(ast.unparse, imports))
        for cell in cells:
            if "<summary>Solution</summary>" in cell.source:
                for solution in re.findall(r"^```python\n(.*?)\n```$", cell.source, re.M | re.S):
                    (name,) = re.findall(r'^check_answer\("([\w-]+)"', solution, re.M)
                    found.append((name, solution, setting))
    return found


@pytest.mark.parametrize(("name", "solution", "imports"), solutions(), ids=lambda text: text[:20])
def test_the_solution_in_the_notebook_is_right(capsys, name, solution, imports):
    if name in NEED_A_RUN:
        pytest.skip("it depends on the files of a run")
    exec(compile(f"{imports}\n{solution}", name, "exec"), {})
    assert capsys.readouterr().out.splitlines()[0].startswith("[OK]")


@pytest.mark.parametrize(
    ("judge", "mistake", "hint"),
    [
        (judge, mistake, hint)
        for judge in EXERCISES.values()
        if isinstance(judge, Function)
        for mistake, hint in judge.mistakes.items()
    ],
    ids=lambda part: getattr(part, "__name__", "").strip("_"),
)
def test_a_common_mistake_is_told_from_every_other_and_from_what_is_right(judge, mistake, hint):
    assert judge(mistake) == hint


@pytest.mark.parametrize("name", EXERCISES)
def test_an_exercise_that_asks_for_code_knows_one_that_was_not_begun(name):
    judge = EXERCISES[name]
    if isinstance(judge, Value):
        pytest.skip("it asks for a value")
    assert judge(lambda *_: None) == UNTOUCHED


@pytest.mark.parametrize(
    ("order", "said"),
    [
        (lambda row: row.abs().argsort(), "four largest weights into one group"),
        (lambda row: row.abs().argsort().tolist()[::-1], "four largest weights into one group"),
        (lambda row: row.topk(8).values, "each of the numbers 0 to 7 once"),
        (lambda row: [0, 1, 2, 3], "each of the numbers 0 to 7 once"),
        (lambda row: range(8), "four largest weights into one group"),
        (lambda row: [0, 4, 1, 5, 6, 2, 7, 3], NO_HINT),
    ],
)
def test_an_order_of_channels_is_judged_by_the_magnitude_that_it_keeps(order, said):
    assert said in EXERCISES["02b-order"](order)


def rewrite(change, where=None):
    """Return an answer to `04-damage` that changes the weights of a file."""

    def damage(source, target):
        model = onnx.load(source)
        for tensor in model.graph.initializer:
            if where is None or where in tensor.name:
                values = onnx.numpy_helper.to_array(tensor).copy()
                change(values)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
        onnx.save(model, target)
        return target

    return damage


def fill_one_zero(values):
    zeros = np.flatnonzero(values == 0)
    values.flat[zeros[:1]] = 1


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (rewrite(fill_one_zero, "damaged"), ""),
        (rewrite(fill_one_zero), "more than one zero"),
        (rewrite(lambda values: values.fill(1), "pruned"), "more than one zero"),
        (rewrite(lambda values: None), "as many zeros as the source"),
        (rewrite(lambda values: values.__imul__(2)), "as many zeros as the source"),
        (lambda source, target: shutil.copy(source, target), "as many zeros as the source"),
        (lambda source, target: target, "no file under the target's name"),
        (lambda source, target: rewrite(fill_one_zero, "damaged")(source, source), "the source"),
        (lambda source, target: rewrite(lambda v: v.fill(0), "grouped")(source, target), "dense"),
    ],
)
def test_damage_to_a_file_is_judged_by_the_weights_that_changed(damage, said):
    result = EXERCISES["04-damage"](damage)
    assert (said in result) if said else result == ""


@pytest.mark.parametrize(
    ("keep", "said"),
    [
        (lambda table: table.eligible & ~table.is_2to4, ""),
        (lambda table: ~table.is_2to4, "stay dense on purpose"),
        (lambda table: table.eligible & table.is_2to4, "Those that are not are wanted"),
        (lambda table: table.eligible & (table.zeros < 0), NO_HINT),
    ],
)
def test_damage_that_was_found_is_judged_by_its_names(keep, said):
    def find(path):
        table = verify_onnx(path)
        return table[keep(table)].weight.tolist()

    result = EXERCISES["04-find-damage"](find)
    assert (said in result) if said else result == ""
