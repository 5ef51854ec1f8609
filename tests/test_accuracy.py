"""`benchmarks/accuracy.py`: a tiny version of each row, and what the rows are made with."""

import copy
import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from accuracy_cases import TINY, U_NET
from torch import nn
from typer.testing import CliRunner

import accuracy
from accuracy_tasks import TASKS, canvases, detection, language, segmentation, translation
from accuracy_tasks.task import ARMS, StudyError, run, same_inputs_masks, train
from helpers.files import write_json
from helpers.metrics import PairedDifference
from helpers.sparsity import is_2to4, masks_2to4


@pytest.mark.parametrize("task", TINY.values(), ids=list(TINY))
def test_every_network_goes_through_the_study(task):
    rows = run(task, seed=0)
    assert {row["network"] for row in rows} == {task.network}
    assert {row["seed"] for row in rows} == {0}
    for row in rows:
        assert all(math.isfinite(row[arm]) for arm in ARMS), row


def test_a_seed_gives_the_same_rows_again_and_another_seed_gives_others():
    def scores(seed: int) -> list[float]:
        (row,) = run(U_NET, seed)
        return [row[arm] for arm in ARMS]

    assert scores(1) == scores(1)
    assert scores(1) != scores(2)


def test_retraining_and_control_differ_in_the_masks_alone():
    torch.manual_seed(0)
    model = U_NET.make_model()
    everything = {name: torch.ones_like(m) for name, m in masks_2to4(model).items()}
    data = U_NET.data()
    held = train(U_NET, copy.deepcopy(model), data, seed=0, phase=1, masks=everything)
    free = train(U_NET, copy.deepcopy(model), data, seed=0, phase=1)
    for name, weight in free.state_dict().items():
        assert torch.equal(weight, held.state_dict()[name]), name


def test_a_training_that_diverges_is_not_recorded():
    recipe = replace(U_NET.recipe, learning_rate=1e30)
    with pytest.raises(StudyError, match="Lower the learning rate"):
        run(replace(U_NET, recipe=recipe, make_optimizer=TINY["small ResNet"].make_optimizer), 0)


def test_the_failing_control_removes_the_same_inputs_for_all_outputs():
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Flatten(), nn.Linear(16, 4))
    with torch.no_grad():
        model[0].weight[:, (1, 2, 4, 7)] += 10
    masks = same_inputs_masks(model)
    assert list(masks) == ["0.weight", "2.weight"]
    assert masks["0.weight"][:, (1, 2, 4, 7)].all()
    for mask in masks.values():
        assert mask.float().mean() == 0.5
        assert is_2to4(mask)
        assert (mask == mask[:1]).all()


# --- the record and the table ---


def row(network="small ResNet", metric="top-1 %", seed=0, **scores) -> dict:
    plain = dict.fromkeys(ARMS, 90.0)
    return {"network": network, "metric": metric, "seed": seed, **plain, **scores}


def several(**scores) -> list[dict]:
    """Return rows of five seeds; each score differs a little from seed to seed, around its mean."""
    return [
        row(seed=seed, **{arm: value + 0.01 * (seed * 7 % 5 - 2) for arm, value in scores.items()})
        for seed in range(5)
    ]


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Runs the script with one tiny network, and returns its exit code and what it printed."""
    monkeypatch.setattr(accuracy, "TASKS", (U_NET,))
    app = accuracy.typer.Typer()
    app.command()(accuracy.main)

    def invoke(*arguments) -> tuple[int, str]:
        out = ["--out", str(tmp_path / "accuracy.json")]
        result = CliRunner().invoke(app, [*out, *map(str, arguments)], env={"COLUMNS": "200"})
        return result.exit_code, result.output

    return invoke


def test_a_run_continues_where_an_earlier_one_stopped(study, tmp_path):
    path = tmp_path / "accuracy.json"
    code, output = study("--seeds", 2, "--processes", 2)
    assert code == 0, output
    record = json.loads(path.read_text())
    assert {"what", "command", "date", "machine", "versions", "settings"} <= set(record)
    assert [row["seed"] for row in record["rows"]] == [0, 1]
    assert "Published, not measured here" in output

    record["rows"][0]["dense"] = 12.34  # a finished row is not run again
    write_json(path, record)
    assert study("--seeds", 2)[0] == 0
    assert json.loads(path.read_text())["rows"] == record["rows"]


def test_rows_of_other_settings_or_versions_are_refused(study, tmp_path):
    path = tmp_path / "accuracy.json"
    record = accuracy.Record(path, accuracy.ABOUT)
    record.add(U_NET, [row(U_NET.network)])
    earlier = json.loads(path.read_text())

    write_json(path, earlier | {"versions": {"python": "2.7"}})
    code, output = study("--seeds", 1)
    assert (code, "other versions" in output) == (2, True)
    assert study("--table")[0] == 0

    earlier["settings"][U_NET.network]["parameters"] += 1
    write_json(path, earlier)
    code, output = study("--seeds", 1)
    assert (code, "other settings" in output) == (2, True)

    path.write_text("{}")
    code, output = study("--table")
    assert (code, "does not hold a record" in " ".join(output.split())) == (2, True)


def test_a_pattern_that_fits_no_network_is_refused(study):
    code, output = study("--only", "large*")
    assert (code, "There are small U-Net" in " ".join(output.split())) == (2, True)


@pytest.mark.parametrize(
    ("retrained", "half", "verdict"),
    [
        (90.0, 88.0, "no difference found"),
        (89.0, 88.0, "2:4 is worse"),
        (91.0, 88.0, "2:4 is better"),
        (89.0, 90.0, "cannot tell"),
    ],
)
def test_the_verdict_follows_the_intervals(retrained, half, verdict):
    rows = several(retrained=retrained, half_inputs=half)
    (line,) = accuracy.summary(rows).to_dict("records")
    assert (line["seeds"], line["verdict"]) == (5, verdict)
    assert line["retrained - control"].mean == pytest.approx(retrained - 90)
    assert verdict in accuracy.shown(accuracy.summary(rows))


def test_a_loss_is_worse_when_it_is_larger():
    larger = PairedDifference(0.3, 0.2, 0.4, 5)
    assert accuracy.verdict(larger, larger, lower_is_better=True) == "2:4 is worse"
    assert accuracy.verdict(larger, larger, lower_is_better=False) == "cannot tell"


def test_one_seed_can_tell_nothing():
    (line,) = accuracy.summary([row(half_inputs=10.0)]).to_dict("records")
    assert line["verdict"] == "cannot tell"


def test_the_published_rows_are_those_of_the_case_study():
    record = json.loads(accuracy.PUBLISHED.read_text())
    table = accuracy.published().set_index("network")
    assert len(table) == 7
    assert set(table.columns) == {"metric", "dense FP16", "sparse FP16"}
    (own,) = table.index[table.index.str.startswith("ResNeXt-101 32x8d")]
    for precision, top1 in record["top1"].items():
        assert table.loc[own, precision] == top1
    mirrored = {task.mirrors for task in TASKS} - {"none"}
    assert mirrored == set(table.index)


# --- the metrics ---


def found(*detections: tuple) -> detection.Items:
    boxes, labels, scores = zip(*detections, strict=True)
    return {
        "boxes": torch.tensor(boxes, dtype=torch.float32),
        "labels": torch.tensor(labels),
        "scores": torch.tensor(scores),
    }


ONE, OTHER, FAR = (0, 0, 10, 10), (20, 20, 30, 30), (40, 40, 48, 48)
TRUTH = [{"boxes": torch.tensor([ONE, OTHER], dtype=torch.float32), "labels": torch.tensor([1, 1])}]


@pytest.mark.parametrize(
    ("detections", "expected"),
    [
        ([(ONE, 1, 0.9), (OTHER, 1, 0.8)], 1.0),
        ([(ONE, 1, 0.9)], 51 / 101),  # recalls 0 to 0.5
        ([(FAR, 1, 0.9), (ONE, 1, 0.8)], 51 / 101 / 2),
        ([(ONE, 1, 0.9), (ONE, 1, 0.8), (OTHER, 1, 0.7)], (51 + 50 * 2 / 3) / 101),  # found twice
        ([(ONE, 2, 0.9)], 0.0),  # another class
        ([((0, 0, 10, 4), 1, 0.9)], 0.0),  # IoU 0.4
    ],
)
def test_average_precision_by_hand(detections, expected):
    precision = detection.mean_average_precision([found(*detections)], TRUTH)
    assert precision == pytest.approx(expected)


def test_average_precision_is_that_of_coco():
    metric = pytest.importorskip("torchmetrics.detection")
    pytest.importorskip("pycocotools")
    _, boxes, labels, _ = canvases.canvases(8, 64).test
    truth = detection.items(boxes, labels)
    generator = torch.Generator().manual_seed(0)
    guesses = []
    for each in truth:
        boxes = each["boxes"] + 4 * torch.randn(each["boxes"].shape, generator=generator)
        ends = boxes[:, :2], boxes[:, 2:]
        moved = torch.cat((torch.minimum(*ends), torch.maximum(*ends)), 1)
        wrong = torch.rand(len(moved), generator=generator) < 0.3
        labels = torch.where(wrong, each["labels"] % 10 + 1, each["labels"])
        scores = torch.rand(len(moved), generator=generator)
        guesses.append({"boxes": moved, "labels": labels, "scores": scores})
    recalls = np.linspace(0, 1, 101).tolist()  # COCO's; the default here has them in FP32
    reference = metric.MeanAveragePrecision(iou_thresholds=[0.5], rec_thresholds=recalls)
    reference.update(guesses, truth)
    expected = float(reference.compute()["map"])
    assert detection.mean_average_precision(guesses, truth) == pytest.approx(expected, abs=1e-6)


def test_the_mean_iou_by_hand():
    truth = torch.tensor([[0, 0, 1, 1]])
    answers = torch.tensor([[0, 1, 1, 1]])
    assert segmentation.mean_iou(answers, truth, classes=5) == pytest.approx((1 / 2 + 2 / 3) / 2)


# --- the data ---


def test_a_box_goes_tightly_around_its_item():
    images, boxes, labels, classes = canvases.canvases(8, 64).train
    assert images.shape == (8, 1, 48, 48)
    for own_boxes, own_labels, pixels in zip(boxes, labels, classes, strict=True):
        there = own_labels != canvases.NOTHING
        assert there.any()
        for (x1, y1, x2, y2), label in zip(
            own_boxes[there].int().tolist(), own_labels[there].tolist(), strict=True
        ):
            item = pixels[y1:y2, x1:x2] == label + 1
            assert all(edge.any() for edge in (item[0], item[-1], item[:, 0], item[:, -1]))
        inside = {*(own_labels[there] + 1).tolist()}
        assert set(pixels.unique().tolist()) == {0, *inside}


@pytest.mark.parametrize(
    ("number", "english", "german"),
    [
        (1, "one", "eins"),
        (17, "seventeen", "siebzehn"),
        (21, "twenty one", "einundzwanzig"),
        (30, "thirty", "dreißig"),
        (101, "one hundred one", "einhunderteins"),
        (1966, "one thousand nine hundred sixty six", "eintausendneunhundertsechsundsechzig"),
        (121_000, "one hundred twenty one thousand", "einhunderteinundzwanzigtausend"),
    ],
)
def test_numbers_in_words(number, english, german):
    assert " ".join(translation.english_number(number)) == english
    assert "".join(translation.german_number(number)) == german


@pytest.mark.parametrize(
    ("day", "english", "german"),
    [(1, "first", "ersten"), (12, "twelfth", "zwölften"), (20, "twentieth", "zwanzigsten"),
     (31, "thirty first", "einunddreißigsten"), (7, "seventh", "siebten")],
)  # fmt: skip
def test_days_in_words(day, english, german):
    assert " ".join(translation.english_ordinal(day)) == english
    assert "".join(translation.german_ordinal(day)) == german


def test_no_sentence_is_both_trained_and_tested_on():
    data = translation.pairs(300, 100)
    assert len(data.test[0]) == 100
    train, test = (
        {tuple(english.tolist()) for english in part[0]} for part in (data.train, data.test)
    )
    assert not train & test


def test_a_translation_ends_where_the_model_says_so():
    class Echo(nn.Module):
        """Says the English tokens again."""

        def encode(self, english):
            return english

        def decode(self, memory, english, german):
            english = nn.functional.pad(english, (0, 1))
            return nn.functional.one_hot(english[:, 1 : german.shape[1] + 1], 100).float()

    (english, _) = translation.pairs(300, 100).test
    assert torch.equal(translation.translate(Echo(), english), english)


def test_tokens_that_are_not_in_the_vocabulary_are_never_asked_for():
    (tokens,) = language.windows(32, 16).train
    assert tokens.shape == (32, language.WINDOW)
    asked = language.hidden(tokens, torch.Generator().manual_seed(0))
    assert 0.05 < asked.float().mean() < 0.2
    assert not (tokens[asked] == language.UNKNOWN).any()


def test_the_held_out_files_are_not_trained_on(tmp_path, monkeypatch):
    files = [tmp_path / f"{number:02}.py" for number in range(20)]
    for number, file in enumerate(files):
        file.write_text(f"name{number} = name{number}\n" * 64)
    monkeypatch.setattr(language, "library_files", lambda: files)
    language.windows.cache_clear()
    data = language.windows(10_000, 10_000)
    language.windows.cache_clear()
    counted = pd.Series(data.test[0].flatten().tolist()).value_counts()
    assert counted[language.UNKNOWN] == 2 * 2 * 64  # the names of files 0 and 10
    assert not (data.train[0] == language.UNKNOWN).any()
