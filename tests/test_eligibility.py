import pytest
import torch
from torch import nn

from helpers import layers
from helpers.errors import HelpersError
from helpers.layers import layer_weights
from helpers.sparsity import (
    eligibility,
    eligible_weights,
    hold,
    hold_masks,
    is_2to4,
    masks_2to4,
    masks_of,
    permute_channels_,
    prune_2to4_,
    prune_sparsegpt_,
    save_compressed,
    sparsity_report,
    verify,
    verify_checkpoint,
    verify_model,
)
from helpers.sparsity.eligibility import select_weights, why_not_sparse
from helpers.training.networks import create_model


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
        "3 input channels: not a multiple of 4": 1,
    }
    assert (resnext101.eligible.reason == "").all()


def test_the_refused_layers_of_resnext101_are_the_stem_and_every_second_convolution(resnext101):
    refused = resnext101.layers[~resnext101.layers.eligible].weight
    assert refused.iloc[0] == "conv1.weight"
    assert refused.iloc[1:].str.fullmatch(r"layer\d\.\d+\.conv2\.weight").all()


def test_the_totals_go_into_the_sidecar(resnext101):
    assert resnext101.facts() == {
        "rules": "tensorrt",
        "layers": 105,
        "sparse_layers": 71,
        "parameters_share": resnext101.parameters_share,
        "macs_share": resnext101.macs_share,
        "ceiling": resnext101.ceiling,
    }


def test_101_layers_of_resnext101_are_in_asp_with_9822_of_macs():
    with torch.device("meta"):
        model = create_model("resnext101_32x8d", 1000)
    report = sparsity_report(model, (3, 224, 224), rules="asp")
    assert len(report.eligible) == len(eligible_weights(model, "asp")) == 101
    assert round(report.macs_share, 2) == 98.22
    assert round(report.parameters_share, 2) == 99.70


def test_a_report_reads_as_one_line_and_as_a_table(resnext101):
    line = (
        "71 of 105 layers can be sparse (tensorrt): 87.74 % of the parameters, 87.66 % of the "
        "MACs, at most 1.78x faster"
    )
    assert resnext101.summary == line
    first, empty, *table = repr(resnext101).splitlines()
    assert (first, empty) == (line, "")
    assert len(table) == 1 + 105
    assert len({len(row) for row in table}) == 1, "the columns are aligned"
    assert table[-1].split() == ["fc.weight", "1000x2048", "2,048,000", "2.0", "sparse"]
    html = resnext101._repr_html_()
    assert line in html
    assert "layer4.2.conv3.weight" in html


def test_a_report_tells_what_the_mask_would_keep_and_has_kept():
    model = nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -3.0, 2.0, 0.0]]))
    example = torch.zeros(1, 4)
    before = sparsity_report(model, example=example)
    assert before.layers.kept.tolist()[0] == pytest.approx(100 * 5 / 6)
    assert before.layers.kept.isna().tolist() == [False, True]
    assert "83.3" in repr(before)
    prune_2to4_(model)
    assert sparsity_report(model, example=example).layers.kept[0] == 100


def verdict(layer, rules="tensorrt"):
    """Return the reasons against the weights of one layer."""
    return [why_not_sparse(weight, rules) for weight in layer_weights(layer).values()]


NO_KERNEL = "grouped: TensorRT has no sparse kernel"


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(8, 3), ""),
        (nn.Linear(6, 8), "6 input channels: not a multiple of 4"),
        (nn.Conv1d(4, 3, 3), ""),
        (nn.Conv2d(4, 3, 3), ""),
        (nn.Conv3d(4, 3, 3), ""),
        (nn.Conv2d(1, 8, 3), "1 input channel: not a multiple of 4"),
        (nn.Conv2d(8, 8, 3, groups=2), NO_KERNEL),
        (nn.Conv2d(8, 8, 3, groups=8), NO_KERNEL),
        (nn.ConvTranspose2d(8, 8, 3), "transposed: TensorRT has no sparse kernel"),
    ],
)
def test_tensorrt_gives_the_reason(layer, reason):
    assert verdict(layer) == [reason]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(16, 8), ""),
        (nn.Linear(16, 12), "12 output channels: not a multiple of 8"),
        (nn.Linear(24, 8), "24 input channels: not a multiple of 16"),
        (nn.Conv2d(32, 8, 3, groups=2), ""),
        (nn.Conv2d(32, 8, 3, groups=4), "8 input channels: not a multiple of 16"),
        (nn.ConvTranspose2d(16, 8, 3), "transposed: not among ASP's layers"),
    ],
)
def test_asp_gives_the_reason(layer, reason):
    assert verdict(layer, "asp") == [reason]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Linear(16, 32), ""),
        (nn.Linear(16, 16, dtype=torch.bfloat16), ""),
        (nn.Linear(16, 8), "8 rows, 16 columns: not multiples of 16"),
        (nn.Linear(24, 16), "16 rows, 24 columns: not multiples of 16"),
        (nn.Conv2d(16, 32, 1, stride=2), ""),
        (nn.Conv2d(16, 32, 3), "not a matrix product"),
        (nn.Conv2d(32, 32, 1, groups=2), "not a matrix product"),
        (nn.ConvTranspose2d(16, 16, 1), "not a matrix product"),
    ],
)
def test_cusparselt_gives_the_reason(layer, reason):
    assert verdict(layer, "cusparselt") == [reason]


def test_cusparselt_wants_more_of_eight_bit_types():
    layer = nn.Linear(16, 16)
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    assert verdict(layer, "cusparselt") == ["16 rows, 16 columns: not multiples of 32"]


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(32, 8, 3, groups=4), ""),
        (nn.Conv2d(12, 12, 3, groups=2), "6 input channels in a group: not a multiple of 4"),
        (nn.ConvTranspose2d(4, 3, 3), ""),
        (nn.ConvTranspose2d(4, 4, 3, groups=2), "2 input channels in a group: not a multiple of 4"),
    ],
)
def test_any_allows_every_weight_with_inputs_in_fours(layer, reason):
    assert verdict(layer, "any") == [reason]


@pytest.mark.parametrize("rules", ["tensorrt", "asp", "cusparselt", "any"])
def test_attention_is_eligible_by_all_rules(rules):
    assert verdict(nn.MultiheadAttention(16, 2), rules) == ["", ""]


@pytest.mark.parametrize("rules", ["tensorrt", "asp", "cusparselt", "any"])
def test_a_computed_weight_is_eligible_where_its_zeros_survive(rules):
    normalised = nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    orthogonal = nn.utils.parametrizations.orthogonal(nn.Linear(16, 16))
    assert verdict(normalised, rules) == [""]
    assert list(eligible_weights(normalised, rules)) == ["parametrizations.weight.original1"]
    assert verdict(orthogonal, rules) == ["computed from other parameters"]
    assert eligible_weights(orthogonal, rules) == {}


def test_an_unknown_rules_are_refused_with_the_known_ones():
    with pytest.raises(HelpersError, match=r"'tensort'.*tensorrt, asp, cusparselt, any"):
        eligible_weights(nn.Linear(4, 4), "tensort")


def test_eligible_weights_are_the_parameters_at_any_depth():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)))
    assert list(eligible_weights(model)) == ["1.0.weight"]
    assert eligible_weights(model)["1.0.weight"] is model[1][0].weight


def test_a_subclass_counts_as_its_kind_and_a_tied_weight_once():
    class Quiet(nn.Conv2d):
        pass

    model = nn.Sequential(Quiet(4, 4, 1), nn.Conv2d(4, 4, 1))
    model[1].weight = model[0].weight
    assert list(eligible_weights(model)) == ["0.weight"]


def blocks():
    return nn.ModuleDict(
        {
            "stem": nn.Conv2d(4, 8, 3),
            "body": nn.Sequential(nn.Conv2d(8, 8, 3), nn.Linear(8, 8)),
            "head": nn.Linear(8, 8),
        }
    )


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("body.*", (), ["body.0.weight", "body.1.weight"]),
        (["stem", "head"], (), ["stem.weight", "head.weight"]),
        ((), ["head.weight"], ["stem.weight", "body.0.weight", "body.1.weight"]),
        (nn.Linear, (), ["body.1.weight", "head.weight"]),
        (nn.Linear, "head", ["body.1.weight"]),
        ((), (nn.Conv2d, "body.1"), ["head.weight"]),
        ((), nn.Conv3d, ["stem.weight", "body.0.weight", "body.1.weight", "head.weight"]),
    ],
)
def test_weights_are_selected_by_pattern_and_type(include, exclude, expected):
    assert list(eligible_weights(blocks(), include=include, exclude=exclude)) == expected


@pytest.mark.parametrize("selection", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_a_mistake(selection):
    with pytest.raises(HelpersError, match=r"matches 'haed'.*stem\.weight"):
        eligible_weights(blocks(), **{selection: "haed"})


def test_what_was_not_selected_says_so_in_the_report():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    report = sparsity_report(model, example=torch.zeros(1, 4), include=["0", "1"], exclude="1")
    assert report.layers.reason.tolist() == ["", "excluded", "not included"]


def test_a_report_counts_a_transformer_by_an_example():
    model = nn.TransformerEncoderLayer(16, 2, 30, batch_first=True)
    report = sparsity_report(model, example=torch.zeros(1, 5, 16))
    assert report.layers.eligible.tolist() == [True, True, True, False]
    attention = 2 * 5  # 5 scores for each token, and as many values; in MACs over 16 channels
    total = 48 + 16 + 30 + 30 + attention
    assert report.macs_share == pytest.approx(100 * (48 + 16 + 30) / total)
    assert report.notes == [
        f"{100 * attention / total:.2f} % of the MACs multiply two activations, as the scores of "
        "attention are, and stay dense."
    ]
    prune_2to4_(model)
    assert all(map(is_2to4, eligible_weights(model).values()))


def test_shares_and_ceiling_are_those_counted_by_hand():
    model = nn.Sequential(
        nn.Conv2d(1, 4, 1, bias=False), nn.Conv2d(4, 2, 1, bias=False), nn.BatchNorm2d(2)
    )
    report = sparsity_report(model, (1, 3, 3))
    assert report.parameters == 4 + 8 + 4
    assert report.parameters_share == 50
    assert report.macs_share == pytest.approx(100 * 8 / 12)
    assert report.ceiling == pytest.approx(1.5)  # a third stays, two thirds take half the time


def test_a_network_without_eligible_weights_gets_no_faster():
    report = sparsity_report(nn.Sequential(nn.Conv2d(1, 4, 1)), (1, 3, 3))
    assert (report.parameters_share, report.macs_share, report.ceiling) == (0, 0, 1)


@pytest.mark.parametrize(
    ("model", "example", "layers"),
    [
        (nn.Sequential(nn.ReLU()), torch.zeros(1, 4), 0),
        (nn.Sequential(nn.BatchNorm1d(4)), torch.zeros(1, 4), 0),
        (nn.ModuleDict({"unused": nn.Linear(4, 4)}), None, 1),
    ],
    ids=["no parameters", "no layer that counts", "no MACs"],
)
def test_a_model_with_nothing_to_prune_has_a_report(model, example, layers):
    if example is None:
        model.forward = lambda x: x
        example = torch.zeros(1, 4)
    report = sparsity_report(model, example=example)
    assert len(report.layers) == layers
    assert report.macs_share == 0
    assert report.ceiling == 1
    assert report.facts()["sparse_layers"] == layers
    assert f"{layers} of {layers} layers can be sparse" in report.summary
    assert report.summary in repr(report)
    assert report.summary in report._repr_html_()
    assert list(report.layers.columns[-3:]) == ["reason", "eligible", "kept"]


def test_no_parameters_have_no_share_of_sparse_ones():
    assert sparsity_report(nn.Sequential(nn.ReLU()), example=torch.zeros(1)).parameters_share == 0


# One pass.


def test_a_candidate_carries_its_weight_and_its_reason():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 4))
    first, second, third = select_weights(model, exclude="0")
    assert [c.name for c in (first, second, third)] == ["0.weight", "1.weight", "2.weight"]
    assert (first.reason, first.eligible) == ("excluded", False)
    assert (second.reason, second.eligible) == ("", True)
    assert second.parameter is second.tensor is model[1].weight
    assert third.reason == "3 input channels: not a multiple of 4"


def test_rules_are_checked_in_a_model_without_weights_too():
    with pytest.raises(HelpersError, match="no rules 'tensort'"):
        select_weights(nn.ReLU(), "tensort")


@pytest.fixture
def walks(monkeypatch):
    """Count how often the weights of a model are collected."""
    models = []

    def counted(model):
        models.append(model)
        return layer_weights(model)

    for module in (layers, eligibility, hold, verify):
        monkeypatch.setattr(module, "layer_weights", counted)
    return models


@pytest.mark.parametrize(
    "call",
    [
        select_weights,
        eligible_weights,
        masks_2to4,
        prune_2to4_,
        lambda model: sparsity_report(model, example=torch.zeros(1, 4)),
        verify_model,
        lambda model: permute_channels_(model, torch.zeros(1, 4)),
        lambda model: prune_sparsegpt_(model, [torch.randn(8, 4)]),
    ],
    ids=[
        "select_weights", "eligible_weights", "masks_2to4", "prune_2to4_", "sparsity_report",
        "verify_model", "permute_channels_", "prune_sparsegpt_",
    ],
)  # fmt: skip
def test_the_weights_are_collected_once_in_a_call(call, walks):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    call(model)
    assert walks == [model]


def test_the_weights_are_collected_once_to_verify_a_checkpoint(walks, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    save_compressed(model, tmp_path / "net.safetensors")
    verify_checkpoint(tmp_path / "net.safetensors", model)
    assert walks == [model]


def test_the_weights_are_collected_once_to_read_and_to_hold_masks(walks):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    masks = prune_2to4_(model)
    walks.clear()
    masks_of(model)
    assert walks == [model]
    walks.clear()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    hold_masks(optimizer, model, masks, check_every=1)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    assert walks == [model]


def test_the_weights_that_a_pattern_could_have_matched_are_named():
    with pytest.raises(HelpersError, match=r"matches 'fc'. The weights of the model are none\.$"):
        eligible_weights(nn.Sequential(nn.ReLU()), include="fc")
    with pytest.raises(HelpersError, match=r"The weights of the model are weight\.$"):
        eligible_weights(nn.Linear(4, 4), exclude="fc")


# The whole network.


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(16, 32, 3, padding=1)
        self.lstm = nn.LSTM(32, 256, batch_first=True)
        self.head = nn.Linear(256, 8)

    def forward(self, x):
        return self.head(self.lstm(self.conv(x).transpose(1, 2))[0])


def test_shares_are_those_of_the_whole_network():
    report = sparsity_report(Recurrent(), example=torch.randn(2, 16, 20))
    convolution, lstm, head = 16 * 32 * 3, 4 * 256 * (32 + 256), 256 * 8
    assert report.macs == report.layers.macs.sum() == 40 * (convolution + lstm + head)
    share = (convolution + head) / (convolution + lstm + head)
    assert report.macs_share == pytest.approx(100 * share)
    assert report.ceiling == pytest.approx(1 / (1 - share / 2))
    reasons = report.layers.set_index("weight").reason
    assert (
        reasons["lstm.weight_ih_l0"] == reasons["lstm.weight_hh_l0"] == "recurrent: not supported"
    )


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 16, 8))
        self.head = nn.Linear(8, 8)

    def forward(self, x):
        return self.head(torch.einsum("ni,eio->eno", x, self.weight))


def test_a_parameter_outside_of_layers_has_a_row():
    report = sparsity_report(nn.Sequential(Experts()), example=torch.zeros(2, 16))
    row = report.layers.iloc[-1].to_dict()
    assert (row["weight"], row["kind"], row["shape"]) == ("0.weight", "parameter", "4x16x8")
    assert (row["macs"], row["eligible"]) == (2 * 4 * 16 * 8, False)
    assert row["reason"] == "a parameter of Experts, which is no supported layer"
    assert report.macs_share == pytest.approx(100 * 8 / (8 + 16))
    assert "1 of 2 layers can be sparse" in report.summary


def test_only_products_along_the_input_channels_can_be_sparse():
    class Autoencoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encode = nn.Linear(16, 8)

        def forward(self, x):
            return torch.relu(self.encode(x)) @ self.encode.weight

    report = sparsity_report(Autoencoder(), example=torch.zeros(2, 16))
    assert report.layers.macs.tolist() == [2 * 2 * 16 * 8]
    assert (report.macs_share, report.ceiling) == (50, pytest.approx(4 / 3))


def language_model():
    model = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 16), nn.Linear(16, 32, bias=False))
    model[2].weight = model[0].weight
    return model


def test_pruning_an_embedding_by_way_of_the_head_is_said():
    report = sparsity_report(language_model(), example=torch.zeros(1, 4, dtype=torch.long))
    note = "2.weight is tied to 0.weight (Embedding): pruning prunes both, and `exclude` keeps both"
    assert any(line.startswith(note) for line in report.notes)
    assert note in repr(report) and note in report._repr_html_()
    assert report.layers.tied_to.tolist() == ["", "0.weight (Embedding)"]


@pytest.mark.parametrize("exclude", ["0", "0.weight", "2", "2.weight", nn.Embedding])
def test_a_tied_weight_is_excluded_by_any_of_its_names_or_types(exclude):
    model = language_model()
    assert list(prune_2to4_(model, exclude=exclude)) == ["1.weight"]
    assert (model[0].weight != 0).all()


def test_what_is_never_reached_is_said():
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "abcde"})
    model.forward = lambda x: x
    report = sparsity_report(model, example=torch.zeros(1, 4))
    assert report.notes == [
        "This input is not multiplied by a.weight, b.weight, c.weight and 2 others."
    ]


class Standardised(nn.Conv2d):
    def forward(self, x):
        return nn.functional.conv2d(x, self.weight - self.weight.mean(1, keepdim=True))


def test_a_standardised_weight_is_refused_and_still_counted():
    model = nn.Sequential(Standardised(16, 16, 1), nn.Conv2d(16, 16, 1))
    report = sparsity_report(model, (16, 4, 4))
    assert report.layers.reason.tolist() == [
        "computed before each product: zeros do not stay zero", ""
    ]  # fmt: skip
    assert report.macs_share == 50
    assert list(masks_2to4(model)) == ["1.weight"]
    assert verify_model(model).eligible.tolist() == [False, True]


class Outer(nn.Module):
    """Multiplies by what it computes from the weight of a layer inside of it."""

    def __init__(self, compute):
        super().__init__()
        self.inner, self.last, self.compute = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), compute

    def forward(self, x):
        return self.last(nn.functional.conv2d(x, self.compute(self.inner.weight)))


def standardised(weight):
    return weight - weight.mean(1, keepdim=True)


X = torch.ones(2, 16, 4, 4)


def test_a_weight_that_is_standardised_outside_of_its_layer_is_refused_where_a_run_shows_it():
    model = Outer(standardised)
    before = {name: each.clone() for name, each in model.state_dict().items()}
    report = sparsity_report(model, example=X)
    assert report.layers.reason.tolist() == [
        "computed with outside of its layer: zeros do not stay zero", ""
    ]  # fmt: skip
    assert report.macs_share == 50
    assert model.training and all(map(torch.equal, before.values(), model.state_dict().values()))
    assert list(eligible_weights(model, example=X)) == ["last.weight"]
    assert list(masks_2to4(model, example=X)) == ["last.weight"]
    assert list(prune_2to4_(model, example=X)) == ["last.weight"]
    assert list(masks_of(model, example=X)) == ["last.weight"]
    table = verify_model(model, example=X)
    assert table.eligible.tolist() == [False, True]
    assert table.reason.tolist() == report.layers.reason.tolist()
    # No run, no sign of it.
    assert list(masks_2to4(model)) == ["inner.weight", "last.weight"]


@pytest.mark.parametrize(
    "compute", [lambda weight: 2 * weight, lambda weight: weight * weight.norm(dim=1, keepdim=True)]
)
def test_a_weight_that_is_scaled_outside_of_its_layer_is_eligible(compute):
    model = Outer(compute)
    assert sparsity_report(model, example=X).macs_share == 100
    assert len(prune_2to4_(model, example=X)) == 2
    assert verify_model(model, example=X).is_2to4.all()


def test_without_numbers_it_is_unknown_what_is_computed_outside_of_a_layer():
    report = sparsity_report(Outer(standardised).to("meta"), example=X.to("meta"))
    assert report.layers.reason.tolist() == [
        "computed with outside of its layer: unknown whether zeros stay zero", ""
    ]  # fmt: skip
    assert report.macs_share == 50


@pytest.mark.parametrize(
    "example", [{"x": torch.zeros(2, 4), "mask": None}, (torch.zeros(2, 4), None)]
)
def test_inputs_may_be_named_or_none(example):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x, mask):
            return self.inner(x), mask

    assert sparsity_report(Masked(), example=example).macs_share == 100
