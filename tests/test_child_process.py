import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from child_process import Ending, begin, run_child


@pytest.fixture
def log(tmp_path) -> Path:
    return tmp_path / "log"


def run(log: Path, code: str, limit: float = 60, **options) -> Ending:
    return run_child([sys.executable, "-S", "-c", code], log, limit, **options)


def test_a_child_that_does_its_work_ends_well(log, tmp_path):
    code = "import os; print(os.environ['GREETING'], os.getcwd())"
    ending = run(log, code, environment={"GREETING": "hello"}, folder=tmp_path)
    assert ending.fine
    assert str(ending).startswith("ended well after")
    assert ending.last_line == f"hello {tmp_path}"


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGKILL", "SIGABRT"])
def test_a_child_that_is_killed_is_told_with_its_last_step(log, name):
    code = (
        "import os, signal\n"
        "print('begun: the first product', flush=True)\n"
        "print('begun: the second product', flush=True)\n"
        "print('something', flush=True)\n"
        f"os.kill(os.getpid(), signal.{name})"
    )
    ending = run(log, code)
    assert not ending.fine
    assert ending.code == -signal.Signals[name]
    assert (ending.during, ending.last_line) == ("the second product", "something")
    assert f"was killed by {name}" in str(ending)
    assert str(ending).endswith("s, during the second product")


def impatient(monkeypatch, log: Path, step: str) -> None:
    """Let the limit of a child be over as soon as it has begun a step, whatever the clock says."""
    wait, given_up = subprocess.Popen.wait, []

    def wait_for_step(child: subprocess.Popen, limit: float | None = None) -> int:
        while child.poll() is None and child not in given_up:
            if f"begun: {step}\n" in log.read_text().rpartition("\n$ ")[2]:
                given_up.append(child)
                raise subprocess.TimeoutExpired(child.args, limit)
            time.sleep(0.01)
        return wait(child, limit)

    monkeypatch.setattr(subprocess.Popen, "wait", wait_for_step)


def test_a_child_that_hangs_is_killed_with_what_it_started(log, monkeypatch):
    impatient(monkeypatch, log, "waiting")
    code = (
        "import subprocess, time\n"
        "other = subprocess.Popen(['sleep', '600'])\n"
        "print(other.pid, flush=True)\n"
        "print('begun: waiting', flush=True)\n"
        "time.sleep(600)"
    )
    ending = run(log, code, limit=1)
    assert ending.code is None
    assert "did not end within 1 s and was killed, during waiting" in str(ending)
    other = Path("/proc") / ending.last_line
    if other.parent.exists() and other.exists():  # dead, and perhaps not collected yet
        assert ") Z " in (other / "stat").read_text()


def test_an_exit_status_is_told_with_what_was_printed_last(log):
    ending = run(log, "import sys; sys.exit('no GPU today')")
    assert ending.code == 1
    assert str(ending).startswith("ended with exit status 1 after")
    assert ending.last_line == "no GPU today"


def test_the_log_keeps_what_every_child_printed(log):
    first, second = (run(log, f"print({number})") for number in (1, 2))
    assert (first.last_line, second.last_line) == ("1", "2")
    printed = [line for line in log.read_text().splitlines() if line and line[0] != "$"]
    assert printed == ["1", "2"]


def test_a_child_says_what_it_begins_in_the_words_that_the_parent_reads(log, capfd):
    begin("a step")
    said = capfd.readouterr().out
    code = f"print({said!r}, flush=True); import os; os.abort()"
    assert run(log, code).during == "a step"


def test_an_interrupted_parent_leaves_no_child_behind(log, monkeypatch):
    killed = []
    monkeypatch.setattr(os, "killpg", lambda pid, number: killed.append(pid))

    class Child:
        pid = 12345

        def wait(self, limit: float) -> None:
            if not killed:
                raise KeyboardInterrupt

    monkeypatch.setattr("child_process.subprocess.Popen", lambda *_, **__: Child())
    with pytest.raises(KeyboardInterrupt):
        run(log, "")
    assert killed == [12345]
