"""`benchmarks/verify_fuzz.py` on a few hundred graphs; the script itself compares thousands."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings

from verify_fuzz import Case, cases, is_2to4, verdict_of, verdicts

SEEN: set[str] = set()


@settings(max_examples=250, suppress_health_check=[HealthCheck.too_slow])
@given(cases())
def test_the_verifier_says_what_a_runtime_shows(case: Case):
    with tempfile.TemporaryDirectory() as folder:
        expected, found = verdicts(case, Path(folder))
    assert found == expected
    SEEN.update(verdict_of(row) for row in found)


def test_the_graphs_have_every_verdict():
    assert {"2:4", "dense", "not eligible", "not judged"} <= SEEN


def test_the_reference_looks_for_the_pattern_one_by_one():
    sparse = np.tile([True, True, False, False], (3, 2))
    assert is_2to4(sparse)
    sparse[2, 7] = True
    assert not is_2to4(sparse[:, :4][:, ::-1] | sparse[:, 4:])
    assert not is_2to4(np.zeros((2, 6), bool))
