import dataclasses

import pytest

from helpers.errors import InputError
from helpers.training.recipe import Recipe, schedule

RECIPE = Recipe(epochs=3, batch_size=32, learning_rate=0.1, weight_decay=5e-4, warmup=0.2)


def test_the_schedule_warms_up_and_ends_at_zero_along_a_cosine():
    factor = schedule(dataclasses.replace(RECIPE, epochs=2, warmup=0.2), steps_per_epoch=10)
    assert [factor(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert factor(4) == 1
    assert factor(12) == pytest.approx(0.5)  # half of the remaining 16 steps
    assert factor(20) == pytest.approx(0)
    assert all(factor(step) > factor(step + 1) for step in range(4, 20))


def test_the_schedule_falls_by_ten_every_few_epochs():
    recipe = dataclasses.replace(RECIPE, epochs=90, warmup=0, step_epochs=30)
    factor = schedule(recipe, steps_per_epoch=4)
    assert [factor(4 * epoch) for epoch in (0, 29, 30, 60)] == pytest.approx([1, 1, 0.1, 0.01])
    assert factor(4 * 30 - 1) == 1


@pytest.mark.parametrize("warmup", [0.9, 1.0])
def test_a_warm_up_may_last_to_the_end(warmup):
    factor = schedule(Recipe(1, 1, 0.1, 0, warmup=warmup), steps_per_epoch=4)
    # PyTorch asks once more after the last step.
    assert [factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]


@pytest.mark.parametrize("warmup", [0, 0.4, 0.6, 1])
@pytest.mark.parametrize("step_epochs", [None, 1])
@pytest.mark.parametrize("epochs", [0, 1])
def test_a_training_of_one_step_or_none_has_a_rate(epochs, warmup, step_epochs):
    factor = schedule(Recipe(epochs, 1, 0.1, 0, warmup=warmup, step_epochs=step_epochs), 1)
    assert factor(0) == 1
    assert 0 <= factor(epochs) <= 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("epochs", -1), ("batch_size", 0), ("warmup", -0.1), ("warmup", 1.5), ("step_epochs", 0),
     ("warmup", float("nan"))],
)  # fmt: skip
def test_a_value_out_of_its_range_is_refused_by_name(name, value):
    with pytest.raises(InputError, match=rf"^{name} of a recipe must be .*, not {value}\.$"):
        dataclasses.replace(RECIPE, **{name: value})


def test_an_epoch_of_no_steps_is_refused():
    with pytest.raises(InputError, match="An epoch has 0 steps"):
        schedule(RECIPE, steps_per_epoch=0)
