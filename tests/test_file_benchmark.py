import math

import numpy as np
import pytest
import torch

from helpers.errors import InputError
from helpers.inference.file_runners import FileRunner
from helpers.measurement.benchmark import BenchmarkError
from helpers.measurement.file_benchmark import AGAIN, compare_files, describe_comparison


class FakeRunner(FileRunner):
    """Takes a time by the test's clock, and returns what the test says."""

    name = "a fake"

    def __init__(self, clock, milliseconds, outputs=None):
        self.clock, self.milliseconds, self.runs = clock, milliseconds, 0
        self.outputs = outputs or (lambda run: {"y": torch.ones(2)})

    def run(self):
        self.clock.now += self.milliseconds / 1000
        self.runs += 1

    def fetch(self):
        return self.outputs(self.runs)


def compare(clock, *milliseconds, outputs=None, **options):
    names = ["dense", AGAIN, "sparse"]
    runners = {
        name: FakeRunner(clock, each, outputs)
        for name, each in zip(names, milliseconds, strict=False)
    }
    return compare_files(runners, warmup=0, **{"seconds": 0.5, **options})


def test_files_are_compared_with_the_first(clock):
    table = compare(clock, 4, 4, 2).set_index("network")
    assert table.p50.tolist() == pytest.approx([4, 4, 2])
    assert table.runs_per_second.tolist() == pytest.approx([250, 250, 500])
    assert table.speedup.tolist() == pytest.approx([1, 1, 2])
    assert table.speedup_low["sparse"] == pytest.approx(2)
    assert "batch" not in table
    assert "images_per_second" not in table


@pytest.mark.parametrize(
    ("milliseconds", "sentence"),
    [
        (2, "sparse is faster than dense: 2.00x [2.00, 2.00]."),
        (8, "sparse is slower than dense: 0.50x [0.50, 0.50]."),
        (4, "No difference between sparse and dense is clear of chance: 1.00x [1.00, 1.00]."),
    ],
)
def test_a_difference_is_said_only_if_it_is_clear_of_chance(clock, milliseconds, sentence):
    assert describe_comparison(compare(clock, 4, 4, milliseconds), "sparse") == sentence


def test_a_gain_no_larger_than_that_of_the_control_is_chance(clock):
    table = compare(clock, 4, 3, 3)
    assert describe_comparison(table, "sparse").startswith("No difference")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_outputs_that_are_not_finite_are_not_timed(clock, value):
    outputs = {"y": torch.tensor([1.0, value])}
    with pytest.raises(BenchmarkError, match="the output y is not finite on these inputs"):
        compare(clock, 4, outputs=lambda run: outputs)


@pytest.mark.parametrize("later", [torch.full((2,), 1.1), torch.ones(3)])
def test_outputs_that_change_are_refused(clock, later):
    outputs = {True: {"y": torch.ones(2)}, False: {"y": later}}
    with pytest.raises(BenchmarkError, match="the output y of the same inputs changed"):
        compare(clock, 4, outputs=lambda run: outputs[run <= 1])


def test_outputs_of_any_type_are_compared(clock):
    outputs = {"i": torch.arange(3), "b": torch.tensor([True]), "e": torch.zeros(0, 4)}
    assert len(compare(clock, 4, outputs=lambda run: outputs)) == 1


@pytest.mark.parametrize("options", [{"rounds": 0}, {"seconds": -1}, {"seconds": np.inf}])
def test_nothing_to_measure_is_refused(clock, options):
    with pytest.raises(InputError, match="cannot be measured"):
        compare(clock, 4, **options)
