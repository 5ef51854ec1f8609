"""The README and docs/results.md against the code and the records that they quote."""

import json
import re
import tomllib
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch

import helpers
from helpers.inference import dense_cpu, sparse_cpu
from helpers.inference.sparse_cpu import SparseCpuRunner
from helpers.measurement.advice import advise
from helpers.measurement.calibration import CALIBRATION
from helpers.measurement.rates import Rates
from helpers.measurement.roofline import DATASHEETS, ESTIMATED_GPUS, MEASURED_GPUS
from helpers.metrics import Accuracy, Comparison, max_relative_error, paired_difference
from helpers.training.networks import create_on_meta
from helpers.tutorial.artifacts import NOTEBOOKS
from helpers.tutorial.settings import PRESETS, project_root
from helpers.tutorial.summary import describe_gain

ROOT = project_root()
README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs" / "results.md").read_text()
REFERENCE = ROOT / "data" / "reference"
TITLES = {
    "resnet50": "ResNet-50",
    "resnext101_32x8d": "ResNeXt-101 32x8d",
    "vit_b_16": "ViT-B/16",
}


def speed_up(low: float, value: float, high: float) -> str:
    return f"{value:.2f}x [{low:.2f}, {high:.2f}]"


def test_the_results_are_those_of_the_recorded_run():
    record = json.loads((REFERENCE / "quick_cpu.json").read_text())
    assert record["date"] in RESULTS
    for name, value in record["summary"].items():
        assert f"| {name} | {value} |" in RESULTS, name
    text = " ".join(RESULTS.split())
    table = pd.DataFrame(record["benchmark"]["rows"])
    assert describe_gain(table) in text
    again = table[table.network == "dense again"]
    contains_1 = (again.speedup_low <= 1) & (again.speedup_high >= 1)
    assert contains_1.all() == (
        "Every interval of the dense model against itself contains 1." in text
    ), list(again.batch[~contains_1])


def test_the_products_of_the_h100_are_the_recorded_ones_beside_the_advice():
    rows = json.loads((REFERENCE / "products_h100.json").read_text())["rows"]
    rates = Rates.calibrated("h100-sxm")
    section = RESULTS.partition("## On an H100")[2].partition("\n## ")[0]
    ratios: dict[str, dict[int, str]] = {}
    errors = []
    for row in rows:
        size, datatype = row["m"], row["datatype"]
        dense, sparse = (
            rates.product_ms(size, size, size, datatype, is_sparse) for is_sparse in (False, True)
        )
        ratios.setdefault(datatype, {})[size] = f"{row['ratio']:.2f} ({dense / sparse:.2f})"
        if datatype != "INT8":
            errors.append(abs(dense / sparse / row["ratio"] - 1))
    for datatype, by_size in ratios.items():
        assert (
            f"| {datatype} | {' | '.join(by_size[size] for size in sorted(by_size))} |" in section
        )
    largest = {row["datatype"]: row for row in rows if row["m"] == 8192}
    text = " ".join(section.split())
    assert f"{largest['INT8']['dense_tflops']:,.0f} TOPS at 8192" in text
    assert f"reaches {largest['FP8']['dense_tflops']:,.0f} TFLOP/s" in text
    fair = largest["FP8"]["dense_ms"] / largest["INT8"]["sparse_ms"]
    assert f"the sparse INT8 product is {fair:.2f}x as fast" in text
    best = max(row["ratio"] for row in rows if row["datatype"] != "INT8")
    assert f"gain up to {best:.2f}x" in text
    assert f"up to {largest['BF16']['ratio']:.2f}x as fast as dense ones in BF16" in README
    advice = " ".join((ROOT / "docs" / "advice.md").read_text().split())
    low, high, median = (100 * each for each in (min(errors), max(errors), np.median(errors)))
    assert f"within {low:.0f} to {high:.0f} %, with a median of {median:.0f} %" in advice


def test_the_errors_of_advice_are_those_of_the_calibration():
    record = json.loads(CALIBRATION.read_text())
    names = {
        "a100": "A100 PCIe", "b200": "B200", "gb10": "GB10", "h100": "H100 PCIe",
        "rtx4090": "RTX 4090", "rtx5080": "RTX 5080",
    }  # fmt: skip
    models = [
        (names[gpu], datatype, fitted["errors"])
        for gpu, own in record["gpus"].items()
        for datatype, fitted in own["datatypes"].items()
    ]
    models += [("scaled from another card", *each) for each in record["transfer"].items()]
    page = (ROOT / "docs" / "advice.md").read_text()
    for name, datatype, errors in models:
        kinds = (errors[kind] for kind in ("time", "ratio", "block"))
        cells = [f"{100 * each['median']:.1f}, {100 * each['p90']:.0f}" for each in kinds]
        assert f"\n| {name} | {datatype} | {' | '.join(cells)} |\n" in page


def test_resnet_50_on_the_h100_is_the_recorded_one():
    record = json.loads((REFERENCE / "resnet50_h100.json").read_text())
    (times,) = record["network_times"]
    (error,) = record["max_relative_errors"]
    text = " ".join(RESULTS.split())
    dense, sparse = times["dense"], times["cusparselt"]
    assert f"takes {dense:.2f} ms with dense products and {sparse:.2f} ms with" in text
    assert f"{dense / sparse:.2f}x, where `advise` expects" in text
    assert f"by {100 * error['max_relative_error']:.1f} % of the largest" in text


def test_the_speed_of_int8_is_the_recorded_one():
    record = json.loads((ROOT / "benchmarks" / "results" / "int8_cpu.json").read_text())
    text = " ".join(RESULTS.split())
    latency = {name: own["latency"] for name, own in record["networks"].items()}
    for name, words in {
        "resnet50": "the INT8 file of ResNet-50 {gain} as fast",
        "resnext101_32x8d": "that of ResNeXt-101 32x8d {gain}, both",
    }.items():
        (row,) = latency[name]
        gain = speed_up(row["low"], row["int8_over_best_fp32"], row["high"])
        assert words.format(gain=gain) in text
    gains = {row["batch"]: row["int8_over_best_fp32"] for row in latency["resnext14_8x1d"]}
    first = f"gains {gains[1]:.2f}x at batch size 1, {gains[8]:.2f}x at 8, "
    assert first + f"{gains[32]:.2f}x at 32 and {gains[128]:.2f}x at 128." in text


def test_what_a_server_costs_is_what_was_recorded():
    record = json.loads((ROOT / "benchmarks" / "results" / "serving.json").read_text())
    text = " ".join(RESULTS.split())
    rows = [row for row in record["overhead"] if row["model"] == "dense"]
    rows += [row for row in record["larger"]["overhead"] if row["batch"] == 8]
    for row in rows:
        if row["protocol"] == "grpc":
            name = {"dense": "quick preset, dense", "resnet50": "ResNet-50"}[row["model"]]
            times = f"{row['bare_ms']:.2f} ms | {row['served_ms']:.2f} ms"
            assert f"| {name} | {row['batch']} | {times} | {row['added_ms']:+.2f} ms |" in text
    kept = {
        row["model"]: row
        for row in (*record["throughput"], *record["larger"]["throughput"])
        if (row["protocol"], row["clients"]) == ("grpc", 4)
    }
    share = {model: f"{100 * row['kept']['value']:.0f} %" for model, row in kept.items()}
    assert f"ResNet-50 keeps {share['resnet50']} of" in text
    assert f"keeps {share['dense']} (dense) and {share['sparse']} (sparse)" in text
    quick = [kept["dense"], kept["sparse"]]
    most = [f"{100 * row['kept_at_most']:.0f}" for row in quick]
    assert f"not keep more than {' and '.join(most)} %" in text
    used = [row["processor_ms"] for row in quick]
    shares = [f"{100 * (each['client'] + each['server']) / each['bare']:.0f}" for each in used]
    assert f"client and server need {' and '.join(shares)} % of the processor time" in text
    soak = record["soak"]
    refused = 1 - soak["answered"] / soak["requests"]
    assert soak["errors"].keys() == {"unavailable"}
    assert soak["rate"] == 2 * soak["sustained_requests_per_second"]
    assert f"got {soak['rate']:.0f} requests of {soak['batch']} images per second" in text
    answered = f"answered {soak['images_per_second']:,.0f} images/s"
    assert f"{answered}, refused {100 * refused:.0f} % of the requests" in text
    assert f"longer than {soak['longest_wait_ms'] / 1000:.1f} s" in text
    assert f"grew by {100 * soak['memory_growth']:.1f} %" in text
    assert soak["normal_after_seconds"] == 0
    assert f"answered again after {record['kill']['silent_seconds']:.1f} s" in text


def test_every_algorithm_that_breaks_an_h100_is_one_of_fp16():
    record = json.loads((REFERENCE / "cusparselt_algorithms_h100.json").read_text())
    dead = [row["alg_id"] for row in record["rows"] if row["outcome"].startswith("dies")]
    right = [row["alg_id"] for row in record["rows"] if row["outcome"] == "right"]
    assert {row["datatype"] for row in record["rows"]} == {"FP16"}
    assert f"{len(dead)} of cuSPARSELt's {len(dead) + len(right)} algorithms" in RESULTS
    assert dead == list(range(len(right), len(right) + len(dead)))


def test_notebook_03_tells_where_the_control_is_ahead():
    card = ROOT / "data" / "pretrained" / "resnext14_8x1d_fashionmnist_retrained.json"
    best = [
        max(epoch["validation"] for epoch in json.loads(path.read_text())["history"])
        for path in (REFERENCE / "quick_dense_control.json", card)
    ]
    text = (ROOT / "notebooks" / "03_retrain.ipynb").read_text()
    assert f"control is ahead, {best[0]:.2f} to {best[1]:.2f} %" in text
    assert best[0] > best[1]


def test_what_helps_the_small_networks_is_what_was_recorded():
    folder = ROOT / "benchmarks" / "results"
    tried = pd.DataFrame(json.loads((folder / "remedies.json").read_text())["rows"])
    study = pd.DataFrame(json.loads((folder / "accuracy.json").read_text())["rows"])
    tried = tried[tried.metric != "loss"].merge(study[["network", "metric", "seed", "control"]])
    tried["gain"] = tried.score - tried.control
    gains = tried.pivot_table("gain", "network", "variant")
    variants = ["longer", "control, longer", "distilled", "permuted"]
    for network, gain in gains.iterrows():
        seeds = tried[tried.network == network].seed.nunique()
        cells = [f"{gain[name]:+.2f}" if gain.notna()[name] else "" for name in variants]
        row = "|".join(f" {cell} " if cell else " " for cell in [network, str(seeds), *cells])
        assert f"\n|{row}|\n" in RESULTS, row
    assert len(gains) == 7
    assert (gains.longer > 0).sum() == 5
    by_seed = tried.pivot_table("gain", ["network", "seed"], "variant")
    assert (by_seed["control, longer"] > by_seed.longer).all()  # notebook 10 says so too
    assert (gains[["distilled", "permuted"]].max() < 0).all()


def test_what_matters_in_retraining_is_what_was_recorded():
    """Notebook 10 says in words which intervals miss zero, and docs/results.md has some of them."""
    record = json.loads((ROOT / "benchmarks" / "results" / "retraining.json").read_text())
    clear = {}
    for network, rows in pd.DataFrame(record["rows"]).groupby("network", sort=False):
        scores = rows.pivot_table("score", ["question", "variant"], "seed")
        assert scores.shape == (21, 3)
        plain = list(scores.loc[("plain", "plain")])
        found = {name: paired_difference(plain, list(own)) for name, own in scores.iterrows()}
        clear[network] = {name for name, each in found.items() if each.low > 0 or each.high < 0}
        assert all(found[name].mean < 0 for name in clear[network])
        shorter = [found["how long", f"{percent} % of the steps"] for percent in (0, 5, 10, 25, 50)]
        assert -35 < shorter[0].mean < -25, "about thirty points"
        assert shorter[1].mean > shorter[0].mean / 2, "most of them"
        cells = [f"{each.mean:+.2f} [{each.low:+.2f}, {each.high:+.2f}]" for each in shorter[1:]]
        assert f"\n| {network} | {' | '.join(cells)} |\n" in RESULTS
    everywhere = {("how long", f"{percent} % of the steps") for percent in (5, 10, 25, 50)}
    everywhere |= {("learning rate", "a hundredth")}
    assert set.intersection(*clear.values()) == everywhere
    nothing = ("how long", "0 % of the steps")
    shared = {("one pattern, permuted", f"for {outputs} outputs") for outputs in (4, 8, 16)}
    assert {name: own - everywhere - {nothing} for name, own in clear.items()} == {
        "small ResNet": set(),
        "small ResNeXt": set(),
        "small ViT": {("learning rate", "a tenth"), *shared},
    }


def test_the_speed_on_a_cpu_is_the_recorded_one():
    record = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())
    shown = 0
    for row in record["ratios"]:
        if row["contender"] == "sparse" and row["network"] in TITLES:
            what = f"| {TITLES[row['network']]} | {row['batch']} | {row['threads']} |"
            line = re.search(rf"{re.escape(what)}.*\| (.*) \|", RESULTS)
            assert line is not None, row
            assert line[1] == speed_up(row["low"], row["ratio"], row["high"])
            case = {key: row[key] for key in ("network", "batch", "threads")}
            for contender in (row["best_dense"], "sparse"):
                (timed,) = (
                    each["p50_ms"]
                    for each in record["rows"]
                    if each.items() >= (case | {"contender": contender}).items()
                )
                assert f" {timed:.0f} ms |" in line[0], contender
            shown += 1
    assert shown >= 4


def test_the_quick_preset_is_told_where_the_benchmark_found_less():
    record = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())
    case = {"network": "resnext14_8x1d", "batch": 8, "threads": 2, "contender": "sparse"}
    (found,) = (row["ratio"] for row in record["ratios"] if row.items() >= case.items())
    text = " ".join(RESULTS.split())
    told = re.search(r"gains (\S+)x in this one, and (\S+)x in that of notebook 06", text)
    assert told[1] == f"{found:.2f}"
    assert f"Sparse is faster than dense: {told[2]}x at batch 8" in text


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_trainings_ended_with_the_same_weights(processes):
    path = ROOT / "benchmarks" / "results" / f"kill_training_{processes}.json"
    record = json.loads(path.read_text())
    assert (record["processes"], len(record["kills"])) == (processes, 20)
    assert record["same_weights"]


def test_the_short_table_has_the_same_figures():
    """The README quotes five rows of docs/results.md, and the range of the others."""
    quick = json.loads((REFERENCE / "quick_cpu.json").read_text())
    control = json.loads((REFERENCE / "quick_dense_control.json").read_text())
    dense = Accuracy(**control["test"]).top1
    sparse = quick["summary"]["retrained, test top-1"].partition(" top-1")[0].partition(" ±")[0]
    difference = str(Comparison(**control["retrained_against_it"])).partition(" (")[0]
    assert f"both trained as long | {dense:.2f} % | {sparse} | {difference} |" in README
    rows = pd.DataFrame(quick["benchmark"]["rows"]).set_index(["network", "batch"])
    fast = rows.loc["sparse", 32]
    times = f"| {rows.loc['dense', 32].p50:.2f} ms | {fast.p50:.2f} ms | "
    gain = speed_up(fast.speedup_low, fast.speedup, fast.speedup_high)
    assert f"quick preset, batch 32, two cores {times}{gain} |" in README
    single = rows.loc["sparse", 1]
    assert single.speedup_low < 1 < single.speedup_high

    record = json.loads((ROOT / "benchmarks" / "results" / "cpu.json").read_text())
    every = pd.DataFrame(record["ratios"])
    every = every[every.contender == "sparse"]
    small = every[(every.network == "resnext14_8x1d") & (every.batch == 8) & (every.threads == 2)]
    text = " ".join(README.split())
    assert (
        "The quick preset gains nothing at batch size 1; at 8, one measurement found "
        f"{rows.loc['sparse', 8].speedup:.2f}x and another {small.ratio.item():.2f}x."
    ) in text
    gains = every[every.network.isin(TITLES)]
    assert f"lies between {gains.ratio.min():.2f}x and {gains.ratio.max():.2f}x" in text
    cores = {"one": 1, "two": 2}
    quoted = re.findall(r"^\| (.*), batch (\d+), (\w+) cores? \| (.*) \|$", README, re.M)
    assert len(quoted) == 4
    for title, batch, count, figures in quoted:
        if title in TITLES.values():
            row = f"| {title} | {batch} | {cores[count]} |"
            (full,) = re.findall(rf"^{re.escape(row)} (.*) \|$", RESULTS, re.M)
            assert re.sub(r"ONNX Runtime |PyTorch ", "", full) == figures


def test_the_control_is_the_recorded_one():
    record = json.loads((REFERENCE / "quick_dense_control.json").read_text())
    text = " ".join(RESULTS.split())
    assert str(Accuracy(**record["test"])) in text
    comparison = Comparison(**record["retrained_against_it"])
    assert str(comparison) in text
    assert abs(comparison.difference) < 2 * comparison.standard_error, "as notebook 03 says"


def test_the_real_networks_figures_are_the_recorded_ones():
    path = ROOT / "benchmarks" / "results" / "real_network_cpu.json"
    record = json.loads(path.read_text())
    report, seconds = record["report"], record["seconds"]
    assert record["all_eligible_2to4"]
    assert f"{report['sparse_layers']} of {report['layers']} layers" in RESULTS
    assert f"{report['macs_share']:.2f} % of the MACs" in RESULTS
    for step, value in seconds.items():
        assert f"{step} {value:.2f} s" in RESULTS, step


def test_the_figures_of_int8_are_the_recorded_ones():
    path = ROOT / "benchmarks" / "results" / "int8_cpu.json"
    networks = json.loads(path.read_text())["networks"]
    text = " ".join(RESULTS.split())
    (said,) = re.findall(r"## INT8 on top of 2:4 .*?Notebook 08", text)
    quick = networks["resnext14_8x1d"]
    for kind in ("fp32", "tensorrt", "cpu"):
        assert f"{quick['accuracy'][kind]['accuracy']['correct'] / 100:.2f} %" in said, kind
    for kind in ("tensorrt", "cpu"):
        row = quick["accuracy"][kind]
        assert f"({row['points']:+.2f} ± {row['standard_error']:.2f}" in said, kind
    assert f"{quick['sizes']['compressed_share']:.3f} of the dense FP16 file" in said
    large = networks["resnext101_32x8d"]["sizes"]["compressed_share"]
    assert f"{large:.3f} for ResNeXt-101 32x8d" in said


def test_the_accuracies_of_small_networks_are_the_recorded_ones():
    record = json.loads((ROOT / "benchmarks" / "results" / "accuracy.json").read_text())
    rows = pd.DataFrame(record["rows"])
    lost = 0
    for (network, metric), own in rows[rows.metric != "loss"].groupby(["network", "metric"]):
        assert len(own) == 5
        found = paired_difference(own.control.tolist(), own.retrained.tolist())
        lost += found.high < 0
        means = " | ".join(f"{own[arm].mean():.2f}" for arm in ("pruned", "control", "retrained"))
        interval = f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
        assert f"| {network} | {metric} | {means} | {interval} |" in RESULTS
        assert own.retrained.mean() > own.dense.mean()
    assert lost == 7
    assert "Seven of these networks" in RESULTS


def test_the_published_figures_are_labelled_and_those_of_the_record():
    record = json.loads((REFERENCE / "case_study.json").read_text())
    text = " ".join(RESULTS.split())
    for page in (text, " ".join(README.split())):
        sentence = re.search(r"NVIDIA \*published\*[^.]*\.[^(]*\(", page)[0]
        assert f"{record['largest_speedup']:.2f}x" in sentence
        assert f"{record['largest_performance_per_watt']:.2f}x" in sentence
    assert record["url"] in README
    (reader,) = record["others"]
    told = [
        f"{ms['dense']:.3g} ms dense against {ms['sparse']:.3g} ms sparse at batch size {size}"
        for size, ms in reader["milliseconds"].items()
    ]
    notebook = (ROOT / "notebooks" / NOTEBOOKS["06"]).read_text()
    for page in (text, notebook):
        assert f"InceptionV3 on an {reader['gpu']}" in page
        assert all(figures in page for figures in told)


def test_the_prediction_is_the_one_that_advise_makes_today():
    text = " ".join((README + RESULTS).split())
    expected = re.findall(
        r"`advise` expects (\S+)x for ResNeXt-101 .*? within (\S+)x to (\S+)x, .*?"
        r"By the datasheet alone it would be (\S+)x",
        text,
    )
    rates = [Rates.calibrated("a100"), Rates.from_datasheet(DATASHEETS["a100"])]
    network = create_on_meta("resnext101_32x8d", 1000)
    fitted, floors = (advise(network, each, (3, 224, 224), batch=256) for each in rates)
    found = (fitted.speedup, *fitted.interval, floors.speedup)
    assert expected == [tuple(f"{each:.2f}" for each in found)]
    (quoted,) = re.findall(r"--gpu a100 --batch 256 ``` answers `([^`]*)`", text)
    said, layers = quoted.split("; ")
    verdict = fitted.verdict
    assert verdict.startswith(f"{said} at batch 256 in FP16; {layers}. Expected {found[0]:.2f}x")
    single = advise(network, rates[0], (3, 224, 224), batch=1)
    assert single.speedup < 1.05


def test_the_gpus_and_products_behind_a_prediction_are_those_of_the_calibration():
    words = "zero one two three four five six seven eight nine ten".split()
    count, measured, names, estimated, examples = re.search(
        r"fitted to ([\d,]+) published products of (\w+) GPUs \(([^)]*)\); (\w+) more, "
        r"such as ([^,]*), are estimated",
        " ".join(README.split()),
    ).groups()
    assert count == f"{json.loads(CALIBRATION.read_text())['products']:,}"
    assert re.findall(r"`(\w+)`", names) == list(MEASURED_GPUS)
    assert [words.index(each) for each in (measured, estimated)] == [
        len(MEASURED_GPUS), len(ESTIMATED_GPUS),
    ]  # fmt: skip
    assert set(re.findall(r"`(\w+)`", examples)) <= set(ESTIMATED_GPUS)
    record = json.loads((REFERENCE / "case_study.json").read_text())
    assert f"NVIDIA published up to {record['largest_speedup']:.2f}x. The" in README


def test_the_card_of_the_dense_model_agrees_with_its_record():
    folder = ROOT / "data" / "pretrained"
    facts = json.loads((folder / "resnext14_8x1d_fashionmnist.json").read_text())
    card = (folder / "README.md").read_text().split("# Model card: ")[1]
    accuracy = Accuracy(**facts["test"])
    assert f"{accuracy.top1:.2f} % top-1" in card
    assert f"{accuracy.standard_error:.2f} points" in card
    assert f"{facts['minutes']} minutes" in card
    assert f"seed {facts['seed']}" in card


def test_every_notebook_and_preset_is_in_the_tables():
    for name in NOTEBOOKS.values():
        assert f"(notebooks/{name})" in README
    for preset in PRESETS:
        assert f"| `{preset}`" in README


def test_the_versions_in_troubleshooting_are_the_locked_ones():
    lock = (ROOT / "requirements.lock").read_text()
    pair = re.search(r"pip install (torch==\S+) (torchvision==\S+)`", README)
    for package in pair.groups():
        assert re.search(rf"^{re.escape(package)}\b", lock, re.M), package


def test_the_examples_run(capsys, monkeypatch, tmp_path):
    """On smaller images, and with given times: choosing among kernels takes a minute else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dense_cpu, "has_compiler", lambda: False)

    def the_last_is_fastest(calls):
        return [1.0] * (len(calls) - 1) + [0.5]

    quick = partial(SparseCpuRunner, timer=the_last_is_fastest, network_timer=the_last_is_fastest)
    monkeypatch.setattr(sparse_cpu, "SparseCpuRunner", quick)
    examples = "".join(re.findall(r"```python\n(.*?)```", README, re.S))  # one goes on from another
    assert "(8, 3, 224, 224)" in examples
    code = examples.replace("(8, 3, 224, 224)", "(2, 3, 32, 32)")
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    said = capsys.readouterr().out
    assert "2 of 2 layers can be sparse" in said
    assert "at batch 32 in FP16" in said
    assert re.search(r"2x3x32x32 .* 1\.0 .* 0\.5 +2:4 kernels", said)
    with torch.inference_mode():
        images = names["runner"].images
        assert max_relative_error(names["logits"], names["network"](images)) < 1e-5
    assert (tmp_path / "kernels.json").exists()


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "data/README.md",
        "benchmarks/README.md",
        *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
    ],
)
def test_links_lead_somewhere(page):
    path = ROOT / page
    for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
        if not target.startswith("https://"):
            assert (path.parent / target).exists(), target


def test_the_version_is_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert f"version: {project['version']}" in (ROOT / "CITATION.cff").read_text()
    assert helpers.__version__ == project["version"]


def test_the_peers_figures_are_the_recorded_ones():
    results = ROOT / "benchmarks" / "results"
    masks, verify, permutation = (
        json.loads((results / f"{name}_cpu.json").read_text())
        for name in ("masks", "verify", "permutation")
    )
    for ways, peer in ((masks["masks"], "nvidia-modelopt"), (masks["holding"], "ASP's way")):
        ours, theirs = ways["ways"]["helpers.sparsity"], ways["ways"][peer]
        row = rf"\| {ours['ms']:.0f} ms \| [^|]* {theirs['ms']:.0f} ms \| "
        assert re.search(row + f"{ours['times_faster']:.1f}x", RESULTS), peer
    assert f"| {verify['verify']['seconds']:.2f} s | polygraphy" in RESULTS
    assert f"polygraphy {verify['polygraphy']['seconds']:.1f} s | {verify['ratio']:.0f}x" in RESULTS
    compressed = verify["compressed"]
    assert f"{compressed['seconds']['compress']:.2f} s | PyTorch" in RESULTS
    assert f"{compressed['seconds']['torch_compress']:.2f} s" in RESULTS
    whole = permutation["resnext101_32x8d"]
    assert f"all {whole['permuted']} layers | {whole['seconds']:.0f} s" in RESULTS


def test_the_ways_to_prune_are_the_recorded_ones():
    record = json.loads((ROOT / "benchmarks" / "results" / "one_shot_quick.json").read_text())
    rows = [row for row in record["rows"] if "dampening" not in row]
    top1 = {row["method"]: row["top1"] for row in rows if row["images"] == record["images"]}
    assert f"the dense model has {record['dense']:.2f} %" in RESULTS
    for way, retrained in record["retrained"].items():
        fresh = top1[f"{way}, batch norm re-estimated"]
        assert f"| {way} | {top1[way]:.2f} % | {fresh:.2f} % | {retrained:.2f} % |" in RESULTS
