"""The exercises of notebook 09: what is right, and which mistake gets which hint."""

import numpy as np
import pytest

from helpers.tutorial.answers.notebook_09 import EXERCISES
from helpers.tutorial.exercises import UNTOUCHED

judge = EXERCISES["09-p99"]


def percentile(share, start="due", factor=1000, **options):
    def found(due, sent, answered):
        starts = {"due": due, "sent": sent}
        return factor * np.percentile(answered - starts[start], share, **options)

    return found


@pytest.mark.parametrize("method", ["linear", "inverted_cdf", "lower", "higher"])
def test_p99_counts_from_the_time_that_a_request_was_due(method):
    assert judge(percentile(99, method=method)) == ""
    assert judge(lambda due, sent, answered: sorted(answered - due)[-201] * 1000) == ""


@pytest.mark.parametrize(
    ("mistake", "hint"),
    [
        (percentile(99, "sent"), "Count from `due`"),
        (percentile(99, factor=1), "seconds"),
        (percentile(95), "p95"),
        (percentile(50), "median"),
        (percentile(0.99), "99, not 0.99"),
        (percentile(100), "slowest"),
        (lambda due, sent, answered: 1000 * (answered - due).mean(), "mean"),
        (lambda due, sent, answered: 7.0, "hint below"),
        (lambda due, sent, answered: None, UNTOUCHED),
    ],
)
def test_a_common_mistake_gets_its_hint(mistake, hint):
    assert hint in judge(mistake)
