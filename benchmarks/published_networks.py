"""Predict whole networks whose speed by 2:4 others published, and write how far it was off.

    python benchmarks/published_networks.py FOLDER

FOLDER holds `networks.csv`: gpu, dtype, network, batch, the times dense and sparse, their ratio and
the library. The table is not part of this repository; the result holds the predictions, their
errors and where each measurement was published. Writes
`benchmarks/results/published_networks.json` and a picture next to it.
"""

import argparse
import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from helpers.files import write_json
from helpers.layers import Example
from helpers.measurement.advice import Advice, advise
from helpers.measurement.rates import Rates
from helpers.training.networks import create_on_meta
from helpers.tutorial.plots import plot_published, save

RESULT = Path(__file__).parent / "results" / "published_networks.json"
# By the beginning of the table's names: our name of the GPU, and what the networks ran in.
GPUS = {"A100 (40GB)": "a100-sxm", "A100 80GB": "a100-sxm", "A100": "a100-sxm",
        "L4": "l4", "RTX A6000": "a6000"}  # fmt: skip
SOURCES = {
    "TensorRT 10.15": "NVIDIA/TensorRT@9973b2f4 demo/BERT/README.md",
    "TensorRT 10.0": "NVIDIA/TensorRT@d3107c88 demo/BERT/README.md",
    "TensorRT 8.0 tree": "NVIDIA/TensorRT@fd852d73 demo/BERT/README.md",
    "torch CUTLASS": "pytorch/tutorials@065c9d23 semi_structured_sparse.py",
    "TensorRT 8.4": "NVIDIA/TensorRT#2310",
    "TensorRT 8.0": "NVIDIA, case study of ResNeXt-101 32x8d (up to 1.20x)",
}


def encoder(layers: int, width: int, hidden: int, heads: int) -> nn.Module:
    """Return the encoder of a BERT on the device `meta`, where only shapes are kept."""
    with torch.device("meta"):
        layer = nn.TransformerEncoderLayer(
            width, heads, hidden, activation="gelu", batch_first=True
        )
        return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def predict(network: str, batch: int, gpu: str, datatype: str) -> Advice:
    """Return the advice for a network of the table.

    Raises:
        KeyError: there is no such network here.
    """
    rates = Rates.calibrated(gpu)
    kind, _, rest = network.partition(" seq ")
    if rest:
        model, width = BERTS[kind]
        example: Example = torch.zeros(batch, int(rest.split()[0]), width, device="meta")
        return advise(model(), rates, example=example, datatype=datatype)
    name, size = NETWORKS[network.partition(" (")[0]]
    # TensorRT has sparse kernels for 3x3 convolutions too.
    model_on_meta = create_on_meta(name, 1000)
    return advise(
        model_on_meta, rates, (3, size, size), batch=batch, datatype=datatype, rules="tensorrt"
    )


BERTS = {
    "BERT-large": (lambda: encoder(24, 1024, 4096, 16), 1024),
    "BERT-base SQuAD": (lambda: encoder(12, 768, 3072, 12), 768),
}
NETWORKS = {"Inception v3": ("inception_v3", 299), "ResNeXt-101 32x8d": ("resnext101_32x8d", 224)}


def rows_of(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return one row for each published measurement: the prediction and its error."""
    rows = []
    for entry in table.to_dict("records"):
        gpu = next((ours for name, ours in GPUS.items() if entry["gpu"].startswith(name)), None)
        # The largest gain of the case study was published without its batch size, and the
        # blog's files were timed on a GPU that is not named: both are taken for an A100.
        gpu = gpu or "a100-sxm"
        batch = int(entry["batch"] or 256)
        advice = predict(entry["network"], batch, gpu, entry["dtype"])
        low, high = advice.interval
        source = next(each for name, each in SOURCES.items() if entry["library"].startswith(name))
        rows.append(
            {
                "network": entry["network"],
                "gpu": gpu,
                "datatype": entry["dtype"],
                "batch": batch,
                "library": entry["library"].partition(" tree")[0],
                "source": source,
                "predicted": round(advice.speedup, 3),
                "low": round(low, 3),
                "high": round(high, 3),
                "error": round(advice.speedup - float(entry["ratio"]), 3),
            }
        )
    return rows


def newer_kernels(table: pd.DataFrame) -> float:
    """Return the gain in TensorRT 10.0 over that in TensorRT 8.0: the median at batch 8 and up.

    The products that the model is fitted to are as fast as those of TensorRT 8.0. TensorRT 10 has
    faster dense INT8 kernels and no faster sparse ones, so each gain shrank. TensorRT 10.15 is not
    used here: it serves to check.
    """
    table = table.assign(batch=pd.to_numeric(table.batch), ratio=pd.to_numeric(table.ratio))
    berts = table[table.network.str.startswith("BERT-large") & (table.batch >= 8)]
    by_size = berts.set_index(["network", "batch"])
    new, old = (
        by_size[by_size.library.str.startswith(f"TensorRT {version} ")].ratio
        for version in ("10.0", "8.0")
    )
    return float((new / old).median())


def with_newer_kernels(rows: list[dict[str, Any]], factor: float) -> list[dict[str, Any]]:
    """Return rows with `adjusted` and `adjusted_error` where a network ran in TensorRT 10.15."""
    return [
        row
        | {
            "adjusted": round(row["predicted"] * factor, 3),
            "adjusted_error": round(row["predicted"] * (factor - 1) + row["error"], 3),
        }
        if row["library"] == "TensorRT 10.15" and row["gpu"] == "a100-sxm"
        else row
        for row in rows
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Predict, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="holds networks.csv")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    table = pd.read_csv(options.folder / "networks.csv", keep_default_na=False)
    factor = newer_kernels(table)
    rows = with_newer_kernels(rows_of(table), factor)
    write_json(
        options.out,
        {
            "what": "published speed-ups by 2:4, predicted; error = predicted - published",
            "command": "python benchmarks/published_networks.py FOLDER",
            "date": datetime.date.today().isoformat(),
            "tensorrt_10_over_8": round(factor, 3),
            "rows": rows,
        },
    )
    found = pd.DataFrame(rows)
    save(plot_published(found), options.out.with_suffix(".png"))
    print(found.drop(columns="source").to_string(index=False))
    groups = found.groupby(["network", "gpu", "library"], sort=False).error
    print(groups.agg(["count", "mean", lambda each: each.abs().max()]).to_string())


if __name__ == "__main__":
    main()
