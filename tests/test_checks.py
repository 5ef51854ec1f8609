import pytest

from helpers import tutorial
from helpers.errors import HelpersError
from helpers.training.data import DataError
from helpers.training.networks import CheckpointError
from helpers.tutorial.artifacts import ArtifactError
from helpers.tutorial.checks import CheckError, check


def test_check_prints_what_holds(capsys):
    check([1], "a list is not empty")
    assert capsys.readouterr().out == "[OK] a list is not empty\n"


def test_check_stops_with_what_does_not_hold(capsys):
    with pytest.raises(CheckError, match=r"^\[FAIL\] a list is not empty$"):
        check([], "a list is not empty")
    assert capsys.readouterr().out == ""


@pytest.fixture
def sentences():
    """Let errors be shown as one sentence, as in a notebook, while the test runs."""
    tutorial.show_sentences()
    yield
    tutorial.show_tracebacks()


@pytest.mark.parametrize(
    "kind", [HelpersError, CheckError, ArtifactError, DataError, CheckpointError]
)
def test_a_notebook_shows_an_error_as_one_line(sentences, kind):
    lines = kind("The file is missing.")._render_traceback_()
    assert lines == [f"{kind.__name__}: The file is missing."]


def test_errors_outside_of_notebooks_keep_their_traceback():
    assert not hasattr(HelpersError, "_render_traceback_")


def test_asking_for_tracebacks_twice_is_harmless():
    tutorial.show_tracebacks()
    assert not hasattr(HelpersError, "_render_traceback_")


def test_ipython_shows_no_traceback(sentences, capsys):
    interactiveshell = pytest.importorskip("IPython.core.interactiveshell")
    shell = interactiveshell.InteractiveShell()
    shell.run_cell("from helpers.errors import HelpersError\nraise HelpersError('Do this.')")
    output = capsys.readouterr()
    assert "HelpersError: Do this." in output.out + output.err
    assert "Traceback" not in output.out + output.err
