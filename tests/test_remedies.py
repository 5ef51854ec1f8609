"""`benchmarks/remedies.py`: which networks it tries to help, how, and its table."""

import copy
from unittest.mock import Mock

import pytest
import torch
from accuracy_cases import TINY, U_NET
from typer.testing import CliRunner

import accuracy
import remedies
from accuracy_tasks.record import Record
from accuracy_tasks.task import ARMS
from helpers.sparsity import eligible_weights, is_2to4


@pytest.mark.parametrize("task", TINY.values(), ids=list(TINY))
def test_every_remedy_of_a_network_leaves_it_2to4(task):
    torch.manual_seed(0)
    data = task.data()
    for name, variant in remedies.variants(task).items():
        model, kept = variant(task, task.make_model(), data, 0)
        sparse = [is_2to4(weight.detach()) for weight in eligible_weights(model).values()]
        assert all(sparse) != (name == remedies.CONTROL_LONGER)
        assert 50 < kept <= 100


def test_a_student_that_answers_as_its_teacher_learns_nothing_from_it():
    """With the teacher's own answers, only the half of the labels is left of the loss."""
    for task in TINY.values():
        variant = remedies.variants(task).get("distilled")
        if variant is None:
            continue
        torch.manual_seed(0)
        model = task.make_model().eval()
        batch = task.data().train
        torch.manual_seed(1)
        of_labels = task.loss(model, batch)
        with pytest.MonkeyPatch.context() as patch:
            train = Mock()
            patch.setattr("retraining.train", train)
            variant(task, copy.deepcopy(model), task.data(), 0)
        torch.manual_seed(1)
        distilling = train.call_args.args[0]
        found = distilling.loss(model, batch).item()
        assert found == pytest.approx(of_labels.item() / 2), task.network


def study_of(path, retrained: float) -> Record:
    """Write a record in which the retrained U-Net reaches so much, and its control 50."""
    record = Record(path, accuracy.ABOUT)
    for seed in range(3):
        scores = dict.fromkeys(ARMS, 50.0 + 0.1 * seed)
        scores |= {"retrained": retrained + 0.11 * seed, "half_inputs": 10.0}
        record.add(
            U_NET, [{"network": U_NET.network, "metric": "mean IoU %", "seed": seed, **scores}]
        )
    return record


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Runs the script on a made-up study, and returns its exit code and what it printed."""
    monkeypatch.setattr(remedies, "TASKS", (U_NET,))
    app = remedies.typer.Typer()
    app.command()(remedies.main)

    def invoke(*arguments) -> tuple[int, str]:
        files = ["--study", str(tmp_path / "study.json"), "--out", str(tmp_path / "remedies.json")]
        result = CliRunner().invoke(app, [*files, *map(str, arguments)], env={"COLUMNS": "200"})
        return result.exit_code, result.output

    return invoke


def test_a_network_that_is_worse_is_tried_and_compared_with_its_control(script, tmp_path):
    study = study_of(tmp_path / "study.json", retrained=45.0)
    code, output = script("--seeds", 2)
    assert code == 0, output
    record = Record.open(tmp_path / "remedies.json", {})
    assert {row["seed"] for row in record.rows} == {0, 1}
    table = remedies.summary(record.rows, study.rows).set_index("variant")
    assert list(table.index) == ["longer", "control, longer", "distilled"]
    scores = [row["score"] for row in record.rows if row["variant"] == "longer"]
    expected = sum(scores) / 2 - 50.05
    assert table.loc["longer", "variant - control"].mean == pytest.approx(expected)
    assert table.loc["control, longer", "variant - control, longer"].mean == 0


def test_a_network_that_is_not_worse_is_left_alone(script, tmp_path):
    study_of(tmp_path / "study.json", retrained=50.0)
    code, output = script()
    assert (code, "Worse by study.json: none" in output) == (0, True)
    assert not (tmp_path / "remedies.json").exists()


def test_without_a_study_there_is_nothing_to_help(script):
    code, output = script()
    assert (code, "accuracy.py first" in " ".join(output.split())) == (2, True)
