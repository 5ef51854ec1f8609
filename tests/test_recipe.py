import dataclasses

import pytest

from helpers.errors import InputError
from helpers.training.recipe import Recipe, read_recipe, schedule, write_recipe

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


# --- the YAML file ---

FULL = dataclasses.replace(RECIPE, amp="bf16", ema_decay=0.99, step_epochs=2, compile=True)


@pytest.mark.parametrize("recipe", [RECIPE, FULL])
def test_a_recipe_that_was_written_is_read_again(tmp_path, recipe):
    write_recipe(recipe, tmp_path / "recipe.yaml")
    assert read_recipe(tmp_path / "recipe.yaml") == recipe


def test_values_of_the_command_line_replace_those_of_the_file(tmp_path):
    write_recipe(FULL, tmp_path / "recipe.yaml")
    changes = {"epochs": 7, "amp": "none", "ema_decay": "none", "step_epochs": "5"}
    read = read_recipe(tmp_path / "recipe.yaml", changes)
    expected = dataclasses.replace(FULL, epochs=7, amp=None, ema_decay=None, step_epochs=5)
    assert read == expected


def test_a_number_without_a_dot_is_a_number(tmp_path):
    """YAML 1.1 reads it as text."""
    text = "epochs: 1\nbatch_size: 2\nlearning_rate: 1\nweight_decay: 1e-4\n"
    (tmp_path / "recipe.yaml").write_text(text)
    assert read_recipe(tmp_path / "recipe.yaml") == Recipe(1, 2, 1.0, 1e-4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("learning_rte: 1", r"no value 'learning_rte'. Did you mean learning_rate\?"),
        ("colour: 1", r"no value 'colour'. It may have epochs, batch_size, .*compile\."),
        ("epochs: 1.5", r"epochs of a recipe must be a whole number, not 1\.5"),
        ("epochs: true", r"epochs of a recipe must be a whole number, not True"),
        ("epochs: null", r"epochs of a recipe must be a whole number, not None"),
        ("weight_decay: much", r"weight_decay of a recipe must be a number, not 'much'"),
        ("compile: 1", r"compile of a recipe must be true or false, not 1"),
        ("amp: fp8", r"amp of a recipe must be bf16, fp16 or None, not fp8"),
        ("ema_decay: 1.0", r"ema_decay of a recipe must be between 0 and 1"),
        ("epochs: [", r"is not YAML: "),
    ],
)
def test_a_wrong_line_is_told_in_one_sentence(tmp_path, line, message):
    write_recipe(RECIPE, tmp_path / "recipe.yaml")
    key = line.partition(":")[0]
    kept = [
        each
        for each in (tmp_path / "recipe.yaml").read_text().splitlines()
        if not each.startswith(f"{key}:")
    ]
    (tmp_path / "recipe.yaml").write_text("\n".join([*kept, line]))
    with pytest.raises(InputError, match=message) as caught:
        read_recipe(tmp_path / "recipe.yaml")
    assert str(tmp_path / "recipe.yaml") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("text", "message"), [("", "has no val"), ("epochs: 3", "lacks batch_")])
def test_an_incomplete_recipe_is_refused(tmp_path, text, message):
    (tmp_path / "recipe.yaml").write_text(text)
    with pytest.raises(InputError, match=message):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(InputError, match=r"The recipe .*absent\.yaml cannot be read"):
        read_recipe(tmp_path / "absent.yaml")


def test_only_what_changes_something_is_shown():
    assert repr(RECIPE) == (
        "Recipe(epochs=3, batch_size=32, learning_rate=0.1, weight_decay=0.0005, momentum=0.9, "
        "warmup=0.2, step_epochs=None)"
    )
    assert repr(dataclasses.replace(RECIPE, amp="bf16")).endswith("step_epochs=None, amp='bf16')")


def test_how_it_is_computed_is_no_part_of_the_procedure():
    other = dataclasses.replace(RECIPE, accumulation=4, compile=True, channels_last=False)
    assert other.procedure == RECIPE.procedure
    assert dataclasses.replace(RECIPE, amp="bf16").procedure != RECIPE.procedure
