"""Which case study to run: the presets, and where its files are.

`Settings.load()` reads the environment once; everything else takes what it needs
from the frozen result, so the same code serves a laptop and a GPU server. To
change an experiment, change `PRESETS`, or the recipe of its training in `recipes/`.
Explained in `00_check_your_setup.ipynb`.
"""

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from helpers.training.recipe import Recipe, read_recipe
from helpers.tutorial.checks import TutorialError

RECIPES = Path(__file__).with_name("recipes")  # how each preset trains


@dataclass(frozen=True, repr=False)
class Settings:
    """One preset, with the folders that this run reads and writes."""

    preset: str
    model: str
    dataset: str
    num_classes: int
    image_shape: tuple[int, int, int]  # channels, height, width
    validation_images: int  # held out of the training images
    recipe: Recipe
    batch_sizes: tuple[int, ...]  # of the benchmark
    best_batch_size: int  # the engine is tuned for this one
    seconds_per_batch_size: float  # how long the benchmark measures each
    workers: int
    seed: int = 2024
    data_dir: Path = Path("data")
    artifacts_dir: Path = Path("artifacts")

    @classmethod
    def load(cls, preset: str | None = None) -> "Settings":
        """Return the settings of this run.

        `TUTORIAL_PRESET` names the preset (default quick), `TUTORIAL_DATA` the data
        folder (default `data/`), `TUTORIAL_ARTIFACTS` the folder for everything that
        is written (default `artifacts/`; each preset has a folder of its own in it).

        Raises:
            TutorialError: no preset has that name.
        """
        preset = preset or os.environ.get("TUTORIAL_PRESET") or "quick"
        if preset not in PRESETS:
            renamed = " It is called imagenette now." if preset == "workshop" else ""
            raise TutorialError(
                f"There is no preset {preset!r}.{renamed} Set TUTORIAL_PRESET to one of: "
                + ", ".join(PRESETS)
            )
        root = project_root()
        data = Path(os.environ.get("TUTORIAL_DATA") or root / "data")
        artifacts = Path(os.environ.get("TUTORIAL_ARTIFACTS") or root / "artifacts")
        return replace(
            PRESETS[preset],
            data_dir=data.resolve(),
            artifacts_dir=artifacts.resolve() / preset,
        )

    def _shown(self) -> dict[str, Any]:
        """Return the fields as the reader sees them: folders by short paths."""
        return asdict(self) | {
            "recipe": self.recipe,
            "data_dir": relative(self.data_dir),
            "artifacts_dir": relative(self.artifacts_dir),
        }

    def __repr__(self) -> str:
        return f"Settings({', '.join(f'{key}={value!r}' for key, value in self._shown().items())})"

    def _repr_html_(self) -> str:
        # The rest of the recipe means nothing to a reader before notebook 03.
        epochs = f"{self.recipe.epochs} epochs in batches of {self.recipe.batch_size} images"
        cells = "".join(
            f"<tr><th style='text-align:left'>{key}</th>"
            f"<td style='text-align:left'>{value}</td></tr>"
            for key, value in (self._shown() | {"recipe": epochs}).items()
        )
        return f"<table>{cells}</table>"


def project_root() -> Path:
    """Return the folder of the project, or the working folder outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "notebooks").is_dir() else Path.cwd()


def relative(path: Path) -> str:
    """Return `path` as seen from the project's folder; outside of it, the name alone.

    Notebooks are stored with their outputs, and these must show no folder of one machine.
    """
    path = Path(path).resolve()
    root = project_root()
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name


# The published result. The recipe is that of the pretrained weights: torchvision's
# reference training, with a learning rate of 0.1 for each 256 images of a batch.
_FULL = Settings(
    preset="full",
    model="resnext101_32x8d",
    dataset="ImageNet",
    num_classes=1000,
    image_shape=(3, 224, 224),
    validation_images=25_000,
    recipe=read_recipe(RECIPES / "full.yaml"),
    batch_sizes=(1, 8, 32, 64, 128, 256),
    best_batch_size=256,
    seconds_per_batch_size=3.0,
    workers=8,
)

PRESETS = {
    # A laptop without a GPU: the whole case study in minutes.
    "quick": Settings(
        preset="quick",
        model="resnext14_8x1d",
        dataset="FashionMNIST",
        num_classes=10,
        image_shape=(1, 28, 28),
        validation_images=5_000,
        recipe=read_recipe(RECIPES / "quick.yaml"),
        batch_sizes=(1, 8, 32, 128),
        best_batch_size=128,
        seconds_per_batch_size=1.0,
        workers=0,
    ),
    # One GPU and one lesson: the network of the case study, ten of its thousand classes.
    "imagenette": replace(
        _FULL,
        preset="imagenette",
        dataset="Imagenette",
        num_classes=10,
        validation_images=1_000,
        recipe=read_recipe(RECIPES / "imagenette.yaml"),
    ),
    "full": _FULL,
}
