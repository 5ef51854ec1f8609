"""The package itself: its names, and what it costs to import."""

import subprocess
import sys

import pytest

from helpers import sparsity

# What takes long to import, and is needed by some functions only.
HEAVY = [
    "IPython", "helpers.training", "matplotlib", "numba", "onnx", "onnxruntime", "pandas",
    "torchvision",
]  # fmt: skip


def loaded_after(code):
    """Return which of the heavy modules a fresh interpreter has loaded after `code`."""
    code += f"\nimport sys\nprint(*(name for name in {HEAVY} if name in sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return run.stdout.split()


@pytest.mark.parametrize(
    "code",
    [
        "import helpers.sparsity",
        "from helpers.sparsity import prune_2to4_, hold_masks, sparsity_report, is_2to4",
        "from helpers.sparsity import masks, eligibility, prune, compressed",
    ],
)
def test_importing_the_common_names_loads_nothing_heavy(code):
    assert loaded_after(code) == []


def test_pruning_loads_only_the_compiler_of_its_loops():
    code = (
        "import torch\nfrom helpers.sparsity import prune_2to4_\nprune_2to4_(torch.nn.Linear(4, 4))"
    )
    assert loaded_after(code) == ["numba"]


def test_every_public_name_exists_and_is_listed():
    for name in sparsity.__all__:
        assert getattr(sparsity, name).__module__.startswith("helpers.sparsity.")
        assert name in dir(sparsity)
    assert set(sparsity._LOADED_ON_USE) <= set(sparsity.__all__)
    assert len(set(sparsity.__all__)) == len(sparsity.__all__)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"helpers\.sparsity.*'prune_3to4_'"):
        sparsity.prune_3to4_  # noqa: B018


def test_a_star_import_brings_every_public_name():
    names: dict[str, object] = {}
    exec("from helpers.sparsity import *", names)
    assert set(sparsity.__all__) <= names.keys()
