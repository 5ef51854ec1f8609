from dataclasses import FrozenInstanceError, replace

import pytest

from helpers.tutorial.checks import TutorialError
from helpers.tutorial.settings import PRESETS, Settings, project_root, relative


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("TUTORIAL_PRESET", "TUTORIAL_DATA", "TUTORIAL_ARTIFACTS"):
        monkeypatch.delenv(name, raising=False)


def test_quick_is_the_default_preset():
    assert Settings.load().preset == "quick"


def test_an_empty_environment_variable_counts_as_unset(monkeypatch):
    for name in ("TUTORIAL_PRESET", "TUTORIAL_DATA", "TUTORIAL_ARTIFACTS"):
        monkeypatch.setenv(name, "")
    settings = Settings.load()
    assert settings.preset == "quick"
    assert settings.data_dir == project_root() / "data"
    assert settings.artifacts_dir == project_root() / "artifacts" / "quick"


def test_the_environment_names_the_preset(monkeypatch):
    monkeypatch.setenv("TUTORIAL_PRESET", "imagenette")
    assert Settings.load().preset == "imagenette"


def test_an_argument_wins_over_the_environment(monkeypatch):
    monkeypatch.setenv("TUTORIAL_PRESET", "imagenette")
    assert Settings.load("full").preset == "full"


def test_the_environment_names_the_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("TUTORIAL_DATA", str(tmp_path / "images"))
    monkeypatch.setenv("TUTORIAL_ARTIFACTS", str(tmp_path / "out"))
    settings = Settings.load()
    assert settings.data_dir == (tmp_path / "images").resolve()
    assert settings.artifacts_dir == (tmp_path / "out").resolve() / "quick"


def test_relative_folders_start_at_the_working_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUTORIAL_ARTIFACTS", "out")
    assert Settings.load().artifacts_dir == tmp_path.resolve() / "out" / "quick"


def test_every_preset_writes_to_a_folder_of_its_own():
    folders = {Settings.load(preset).artifacts_dir for preset in PRESETS}
    assert len(folders) == len(PRESETS)


@pytest.mark.parametrize("preset", ["Quick", "large"])
def test_an_unknown_preset_lists_the_known_ones(monkeypatch, preset):
    monkeypatch.setenv("TUTORIAL_PRESET", preset)
    with pytest.raises(TutorialError) as error:
        Settings.load()
    message = str(error.value)
    assert repr(preset) in message
    assert "TUTORIAL_PRESET" in message
    assert all(name in message for name in PRESETS)
    assert "\n" not in message


def test_the_old_name_of_a_preset_leads_to_the_new_one():
    with pytest.raises(TutorialError, match="It is called imagenette now"):
        Settings.load("workshop")


def test_settings_cannot_be_changed():
    settings = Settings.load()
    with pytest.raises(FrozenInstanceError):
        settings.seed = 1
    with pytest.raises(FrozenInstanceError):
        settings.recipe.epochs = 1


def test_imagenette_is_full_with_other_images_and_a_short_recipe():
    imagenette, full = PRESETS["imagenette"], PRESETS["full"]
    own = ("preset", "dataset", "num_classes", "validation_images", "recipe")
    assert imagenette == replace(full, **{name: getattr(imagenette, name) for name in own})
    assert (imagenette.num_classes, full.num_classes) == (10, 1000)
    assert (imagenette.recipe.epochs, full.recipe.epochs) == (5, 100)
    assert (imagenette.recipe.step_epochs, full.recipe.step_epochs) == (None, 30)


def test_the_preset_is_keyed_by_its_own_name():
    assert all(name == preset.preset for name, preset in PRESETS.items())


def test_the_tuned_batch_is_one_that_is_measured():
    assert all(preset.best_batch_size in preset.batch_sizes for preset in PRESETS.values())


def test_html_shows_no_absolute_path(monkeypatch, tmp_path):
    monkeypatch.setenv("TUTORIAL_ARTIFACTS", str(tmp_path))
    html = Settings.load()._repr_html_()
    assert str(tmp_path.resolve()) not in html
    assert str(project_root()) not in html
    assert "quick" in html
    assert "<td style='text-align:left'>data</td>" in html


def test_relative_paths_are_as_typed_from_the_project():
    assert relative(project_root() / "data" / "pretrained") == "data/pretrained"


def test_relative_keeps_only_the_name_outside_the_project(tmp_path):
    assert relative(tmp_path / "somewhere" / "model.onnx") == "model.onnx"
