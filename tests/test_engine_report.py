import pytest

from helpers.inference.engine_report import EngineReport
from helpers.inference.errors import EngineError


def report(**changes: object) -> EngineReport:
    values = {
        "builder": "TensorRT", "version": "11.4", "built_for": "A100", "sparse_flag": True,
        "optimization_level": 3, "megabytes": 1.5, "seconds": 2.0, "eligible_count": 3,
        "chosen_count": 1, "eligible": ("a", "b", "c"), "chosen": ("c",),
        "reasons": {"a": "slower", "b": "small"}, "tactics": None, "log": (),
    }  # fmt: skip
    return EngineReport(**(values | changes))


def test_the_report_lists_each_eligible_layer_and_why_it_does_not_run_sparse():
    table = report(tactics={"a": "sm80_fprop", "c + relu": "sm80_SpGemm"}).layers()
    assert table.to_dict("list") == {
        "layer": ["a", "b", "c"],
        "sparse kernel": [False, False, True],
        "tactic": ["sm80_fprop", "", "sm80_SpGemm"],
        "reason": ["slower", "small", ""],
    }


def test_the_report_in_one_line():
    line = "TensorRT 11.4 for A100: 1.50 MB in 2.0 s, 1 of 3 eligible layers sparse"
    assert repr(report()) == line
    tactics = {"a": "sm80_fprop", "c": "sm80_sparse_gemm"}
    assert repr(report(tactics=tactics)) == f"{line}, 1 sparse by the engine's tactic names"
    assert "0 of 3 eligible layers sparse" in repr(report(chosen=None, chosen_count=None))


def test_log_and_engine_are_compared():
    tactics = {"a": "sm80_sparse_gemm", "b": "sm80_fprop", "c": "sm80_fprop"}
    assert report(tactics=tactics).disagreements() == ("a", "c")
    assert report(tactics={"b": "sm80_fprop", "c": "spmma"}).disagreements() == ()
    # A copy has no kernel of its own, whatever it is fused with.
    copied = {"a + relu": "", "a + add": "sm80_sparse_gemm"}
    assert report(tactics=copied).disagreements() == ("a",)
    assert report(tactics=None).disagreements() == ()


def test_a_builder_without_a_sparsity_report_has_no_table():
    silent = report(eligible_count=None, chosen_count=None, eligible=None, chosen=None)
    with pytest.raises(EngineError, match=r"TensorRT 11\.4 prints no sparsity report"):
        silent.layers()


def test_a_builder_that_only_counts_has_no_table_but_its_tactics():
    counted = report(eligible_count=39, eligible=None, tactics={"a": "x_sparse_y", "b": "x"})
    with pytest.raises(EngineError, match=r"\(39\) .* does not name each"):
        counted.layers()
    assert counted.sparse_tactics == {"a": "x_sparse_y"}
    assert "1 of 39 eligible layers sparse" in repr(counted)
