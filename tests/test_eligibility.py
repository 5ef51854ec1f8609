import pytest
import torch
from torch import nn

from helpers.models import create_model
from helpers.sparsity import eligible_layers, sparsity_report
from helpers.sparsity.eligibility import why_not_sparse


@pytest.fixture(scope="module")
def resnext101():
    """The report on the real network, counted without allocating its weights."""
    with torch.device("meta"):
        model = create_model("resnext101_32x8d", 1000)
    return sparsity_report(model, (3, 224, 224))


def test_71_of_105_layers_of_resnext101_can_be_sparse(resnext101):
    assert len(resnext101.layers) == 105
    assert len(resnext101.eligible) == 71


def test_resnext101_has_8774_of_parameters_and_8766_of_macs_in_them(resnext101):
    assert round(resnext101.parameters_share, 2) == 87.74
    assert round(resnext101.macs_share, 2) == 87.66


def test_resnext101_gets_at_most_1_78_times_faster(resnext101):
    assert round(resnext101.ceiling, 2) == 1.78


def test_every_refused_layer_of_resnext101_has_its_reason(resnext101):
    reasons = resnext101.layers[~resnext101.layers.eligible].reason.value_counts().to_dict()
    assert reasons == {
        "grouped: TensorRT has no sparse kernel": 33,
        "3 input channels: no multiple of 4": 1,
    }
    assert (resnext101.eligible.reason == "").all()


def test_the_refused_layers_of_resnext101_are_the_stem_and_every_second_convolution(resnext101):
    refused = resnext101.layers[~resnext101.layers.eligible].layer
    assert refused.iloc[0] == "conv1"
    assert refused.iloc[1:].str.fullmatch(r"layer\d\.\d+\.conv2").all()


def test_the_totals_go_into_the_sidecar(resnext101):
    assert resnext101.facts() == {
        "layers": 105,
        "sparse_layers": 71,
        "parameters_share": resnext101.parameters_share,
        "macs_share": resnext101.macs_share,
        "ceiling": resnext101.ceiling,
    }


def test_a_report_reads_as_one_line_and_as_a_table(resnext101):
    line = (
        "71 of 105 layers can be sparse: 87.74 % of the parameters, 87.66 % of the MACs, "
        "at most 1.78x faster"
    )
    assert repr(resnext101) == line
    html = resnext101._repr_html_()
    assert line in html
    assert "layer4.2.conv3" in html


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(8, 3), ""),
        (nn.Linear(6, 8), "6 input channels: no multiple of 4"),
        (nn.Conv2d(4, 3, 3), ""),
        (nn.Conv2d(1, 8, 3), "1 input channels: no multiple of 4"),
        (nn.Conv2d(8, 8, 3, groups=2), "grouped: TensorRT has no sparse kernel"),
        (nn.Conv2d(8, 8, 3, groups=8), "grouped: TensorRT has no sparse kernel"),
    ],
)
def test_why_not_sparse_gives_the_reason(layer, reason):
    assert why_not_sparse(layer) == reason


def test_eligible_layers_are_found_by_name_at_any_depth():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)))
    assert list(eligible_layers(model)) == ["1.0"]
    assert eligible_layers(model)["1.0"] is model[1][0]


def test_shares_and_ceiling_are_those_counted_by_hand():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(4, 2, 1, bias=False), nn.BatchNorm2d(2)
    )
    report = sparsity_report(model, (1, 3, 3))
    assert report.parameters == 4 + 8 + 4
    assert report.parameters_share == 50
    assert report.macs_share == pytest.approx(100 * 8 / 12)
    assert report.ceiling == pytest.approx(1.5)  # a third stays, two thirds take half the time


def test_a_network_without_eligible_layers_gets_no_faster():
    report = sparsity_report(nn.Sequential(nn.Conv2d(1, 4, 1)), (1, 3, 3))
    assert (report.parameters_share, report.macs_share, report.ceiling) == (0, 0, 1)
