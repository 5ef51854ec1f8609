"""Start in the middle of the course: make what the earlier notebooks would have left.

`catch_up` runs the steps of the command line, which take seconds, but for two things that the
repository has of the quick preset: its retrained network, which takes minutes to make, and the
accuracies of its dense and its pruned network. `keep_retrained` puts them there. Explained in
docs/welcome.md.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from helpers import machine
from helpers.files import atomic_write, sha256, write_json
from helpers.inference import engine
from helpers.metrics import Accuracy
from helpers.sparsity import save_compressed
from helpers.training import networks
from helpers.tutorial import inputs, setup, steps
from helpers.tutorial.artifacts import BARE, LEAVES, Artifacts
from helpers.tutorial.checks import TutorialError
from helpers.tutorial.settings import Settings, relative

# The notebooks whose files each notebook reads.
READS: Mapping[str, tuple[str, ...]] = {
    "00": (),
    "01": ("00",),
    "02": ("01",),
    "02b": ("01",),
    "03": ("01", "02"),
    "04": ("01", "02", "03"),
    "05": ("04",),
    "06": ("01", "02", "03", "04", "05"),
    "07": (),
    "08": ("03", "04"),
    "09": ("04",),
    "10": (),
}

_DENSE = "01_dense.safetensors"
_PRUNED = "02_pruned.safetensors"
_RETRAINED = "03_retrained.safetensors"


def catch_up(settings: Settings, number: str) -> list[str]:
    """Make the files that a notebook and those after it read, and say which were there already.

    A file that is there and sound is kept, whoever made it.

    Args:
        settings: the preset; its artifacts folder receives the files.
        number: of the notebook to start at, such as `04`.

    Returns:
        The numbers of the notebooks whose files were made.

    Raises:
        TutorialError: there is no such notebook, a file is damaged or out of date, or the
            retrained network is needed and does not ship for this preset or was not made from
            the pruned one that is here.
    """
    if number not in READS:
        raise TutorialError(f"There is no notebook {number!r}. There are {', '.join(READS)}.")
    artifacts = Artifacts(settings)
    made = []
    for earlier in _needed_before(number):
        names = [name for name in LEAVES[earlier] if name not in BARE]
        missing = [name for name in names if not artifacts.path(name).exists()]
        if missing:
            print(f"--- {earlier}: {', '.join(missing)}")
            _MAKE[earlier](settings)
            made.append(earlier)
        else:
            for name in names:
                artifacts.require(name)
            print(f"--- {earlier}: {', '.join(names)} kept")
    print(f"Ready for notebook {number}.")
    return made


def _needed_before(number: str) -> list[str]:
    """Return the notebooks before this one whose files it or a later one reads, in order."""
    needed = {source for reader in READS if reader >= number for source in READS[reader]}
    while more := {source for reader in needed for source in READS[reader]} - needed:
        needed |= more
    return sorted(earlier for earlier in needed if earlier < number)


def _dense(settings: Settings) -> None:
    known = None
    if settings.preset == "quick":
        known = Accuracy(**inputs.pretrained_card(settings)["test"])
    steps.evaluate(settings, known)


def _prune(settings: Settings) -> None:
    known = None
    if settings.preset == "quick":
        card = inputs.retrained_card(settings)
        if Artifacts(settings).describe(_DENSE)["sha256"] == card["dense_sha256"]:
            known = Accuracy(**card["pruned_test"])
    steps.prune(settings, "tensorrt", known)


def _take_retrained(settings: Settings) -> None:
    """Copy the retrained network of the repository to the artifacts."""
    if settings.preset != "quick":
        raise TutorialError(
            f"No retrained network of the preset {settings.preset} is part of this repository, "
            "only that of quick. Retrain it with notebook 03."
        )
    artifacts = Artifacts(settings)
    source, card = inputs.retrained_path(settings), inputs.retrained_card(settings)
    if artifacts.describe(_PRUNED)["sha256"] != card["parents"][_PRUNED]:
        raise TutorialError(
            f"{_PRUNED} is not the one that the retrained network of this repository was made "
            "from. Delete it and catch up again, or retrain yours with notebook 03."
        )
    facts = {name: card[name] for name in ("test", "recipe", "history")}
    facts["taken_from"] = source.name
    with artifacts.writing(_RETRAINED, [_PRUNED], facts) as path:
        networks.save_checkpoint(networks.load_checkpoint(source), path, settings.model)
    print(f"retrained: {Accuracy(**card['test'])}; taken from {relative(source)}")


def _build(settings: Settings) -> None:
    """Build the engines, where that is possible: notebook 06 needs none to go on."""
    if reason := engine.why_no_builder():
        print(f"No engines: {reason}")
    else:
        steps.build(settings, None)


_MAKE: dict[str, Callable[[Settings], None]] = {
    "00": setup.check_setup,
    "01": _dense,
    "02": _prune,
    "03": _take_retrained,
    "04": steps.export,
    "05": _build,
}


def keep_retrained(settings: Settings) -> Path:
    """Put the retrained network of the last run into `data/pretrained/`, with its card.

    It is stored in the compressed form, at 55 per cent of its size.

    Returns:
        The path of the file.

    Raises:
        ArtifactError: notebook 03 has not been run.
    """
    artifacts = Artifacts(settings)
    record = artifacts.describe(_RETRAINED)
    path = inputs.retrained_path(settings)
    with atomic_write(path) as part:
        model = networks.load_checkpoint(artifacts.path(_RETRAINED))
        save_compressed(model, part, settings.model)
    card = {
        "command": "python -m helpers retrain, then python -m helpers save-reference",
        "sha256": sha256(path),
        "seed": record["seed"],
        "parents": record["parents"],
        "dense_sha256": artifacts.describe(_DENSE)["sha256"],
        "pruned_test": artifacts.facts(_PRUNED)["test"],
        **record["facts"],
        **machine.provenance(),
        "date": record["made_at"].partition("T")[0],
        "versions": record["versions"],
    }
    write_json(path.with_suffix(".json"), card)
    return path
