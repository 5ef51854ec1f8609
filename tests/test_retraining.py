"""`benchmarks/retraining.py`: every variant on a tiny training, and its table."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import retraining
from accuracy_tasks import TASKS
from helpers.sparsity import eligible_weights, is_2to4

(RESNET,) = (
    replace(
        task,
        training_examples=64,
        test_examples=16,
        recipe=replace(task.recipe, epochs=2, batch_size=8),
    )
    for task in TASKS
    if task.network == "small ResNet"
)


@pytest.fixture(scope="module")
def dense() -> nn.Module:
    torch.manual_seed(0)
    return RESNET.make_model()


@pytest.mark.parametrize(("question", "name", "variant"), retraining.variants())
def test_every_variant_leaves_the_weights_2to4_that_it_prunes(dense, question, name, variant):
    model = copy.deepcopy(dense)
    trained, kept = variant(RESNET, model, RESNET.data(), 0)
    rules = "asp" if name == "rules of ASP" else "tensorrt"
    weights = eligible_weights(trained, rules)
    assert weights
    assert all(is_2to4(weight.detach()) for weight in weights.values())
    assert trained.state_dict().keys() == dense.state_dict().keys()
    assert 50 < kept < 100
    stayed = torch.equal(trained.get_parameter("6.2.bias"), dense.get_parameter("6.2.bias"))
    assert stayed == (name == "0 % of the steps")


def test_a_pattern_of_a_block_is_the_same_for_its_outputs():
    model = nn.Linear(8, 10)
    masks = retraining.in_blocks(4)(model, RESNET.data())
    for block in masks["weight"].split(4):
        assert (block == block[:1]).all()
    assert is_2to4(masks["weight"])
    assert not (masks["weight"] == masks["weight"][:1]).all()


def test_fewer_outputs_to_a_pattern_keep_more(dense):
    data = RESNET.data()
    kept = [
        retraining.total_kept(dense, mask(dense, data))
        for mask in (retraining.magnitude, *map(retraining.in_blocks, (4, 8, 16)))
    ]
    assert kept == sorted(kept, reverse=True)


def test_sr_ste_lets_the_gradient_reach_weights_that_it_does_not_use():
    weight = torch.tensor([[4.0, 3.0, 2.0, 1.0]], requires_grad=True)
    used = retraining._KeepTwoOfFour.apply(weight)
    assert used.tolist() == [[4, 3, 0, 0]]
    used.sum().backward()
    decay = retraining.DECAY
    assert weight.grad.tolist()[0] == pytest.approx([1, 1, 1 + 2 * decay, 1 + decay])


def test_the_script_records_every_variant_and_compares_it_with_the_plain_one(tmp_path, monkeypatch):
    monkeypatch.setattr(retraining, "TASKS", (RESNET,))
    monkeypatch.setattr(
        retraining,
        "VARIANTS",
        {
            "plain": {"plain": retraining.retrained()},
            "how long": {"0 % of the steps": retraining.retrained(share=0)},
        },
    )
    app = retraining.typer.Typer()
    app.command()(retraining.main)
    out = tmp_path / "retraining.json"
    result = CliRunner().invoke(app, ["--out", str(out), "--seeds", "2"])
    assert result.exit_code == 0, result.output
    record = retraining.Record.open(out, {})
    assert len(record.rows) == 4
    table = retraining.summary(record.rows).set_index("variant")
    assert table.loc["plain", "variant - plain"].mean == 0
    assert math.isfinite(table.loc["0 % of the steps", "variant - plain"].low)
    result = CliRunner().invoke(app, ["--out", str(out), "--only", "small BERT"])
    assert result.exit_code == 2
