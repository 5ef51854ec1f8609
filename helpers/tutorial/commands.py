"""The case study from the command line: the steps of the notebooks, without Jupyter.

python -m helpers load    # then prune, retrain, export, build, benchmark, one at a time
"""

import json
import time
from pathlib import Path
from typing import Annotated

import torch
import torchvision
import typer
from safetensors import safe_open

from helpers import machine, metrics
from helpers.errors import HelpersError
from helpers.files import atomic_write, sha256, write_json
from helpers.inference import engine
from helpers.inference.export import export_onnx
from helpers.inference.runners import OnnxRunner
from helpers.measurement import advice, rates
from helpers.measurement import benchmark as bench
from helpers.measurement.roofline import DATASHEETS
from helpers.sparsity import masks_of, prune_2to4_, sparsity_report, verify_file, verify_onnx
from helpers.training import data, loop, networks
from helpers.training.networks import SmallResNeXt
from helpers.tutorial import backends, inputs, notebooks
from helpers.tutorial import setup as setup_check
from helpers.tutorial import summary as results
from helpers.tutorial.artifacts import NETWORKS, Artifacts
from helpers.tutorial.checks import TutorialError, check
from helpers.tutorial.settings import Settings, relative

app = typer.Typer(help=__doc__, add_completion=False, no_args_is_help=True)


@app.command()
def setup() -> None:
    """Check this machine: versions, GPU, engine builder, runner (notebook 00)."""
    setup_check.check_setup(Settings.load())


@app.command()
def pretrain() -> None:
    """Train the dense checkpoint of the quick preset anew into data/pretrained/."""
    settings = Settings.load("quick")
    splits = inputs.load_splits(settings)
    torch.manual_seed(settings.seed)
    model = networks.create_model(settings.model, settings.num_classes)
    start = time.perf_counter()
    history = loop.train(model, splits, settings.recipe, settings.seed)
    minutes = (time.perf_counter() - start) / 60
    accuracy = loop.evaluate(model, splits.test)
    path = inputs.pretrained_path(settings)
    with atomic_write(path) as part:
        networks.save_checkpoint(model, part, settings.model)
    card = {
        "command": "python -m helpers pretrain",
        "sha256": sha256(path),
        "seed": settings.seed,
        "minutes": round(minutes, 1),
        "test": accuracy,
        "recipe": settings.recipe,
        "history": history,
        **machine.provenance(),
    }
    write_json(path.with_suffix(".json"), card)
    print(f"{relative(path)}: {accuracy}, trained in {minutes:.1f} minutes")


@app.command()
def control() -> None:
    """Train the dense network on for as long as the sparse one is retrained, and record it.

    The fair control of notebook 03: whatever further training gives the dense network
    is no merit of the 2:4 pattern. Takes the retrained network of that notebook.
    """
    settings = Settings.load("quick")
    retrained = networks.load_checkpoint(Artifacts(settings).require("03_retrained.safetensors"))
    splits = inputs.load_splits(settings)
    model = inputs.load_pretrained(settings)
    history = loop.train(model, splits, settings.recipe, settings.seed)
    accuracy = loop.evaluate(model, splits.test)
    comparison = loop.compare(model, retrained, splits.test)
    record = {
        "command": "python -m helpers control",
        "test": accuracy,
        "retrained_against_it": comparison,
        "history": history,
        **machine.provenance(),
    }
    write_json(settings.data_dir / "reference" / "quick_dense_control.json", record)
    print(f"dense, trained on: {accuracy}")
    print(f"the sparse network against it: {comparison}")


@app.command()
def load() -> None:
    """Take the pretrained dense network and measure its accuracy (notebook 01)."""
    settings = Settings.load()
    splits = inputs.load_splits(settings)
    dense = inputs.load_pretrained(settings)
    accuracy = loop.evaluate(dense, splits.test)
    with Artifacts(settings).writing("01_dense.safetensors", facts={"test": accuracy}) as path:
        networks.save_checkpoint(dense, path, settings.model)
    print(f"dense: {accuracy}")


@app.command()
def prune(
    target: Annotated[
        str, typer.Option(help="prune what this can run sparse: tensorrt, asp, cusparselt or any")
    ] = "tensorrt",
) -> None:
    """Prune the dense network 2:4 by magnitude (notebook 02)."""
    settings = Settings.load()
    artifacts = Artifacts(settings)
    model = networks.load_checkpoint(artifacts.require("01_dense.safetensors"))
    masks = prune_2to4_(model, target)
    accuracy = loop.evaluate(model, inputs.load_splits(settings).test)
    facts = {
        "test": accuracy,
        **sparsity_report(model, settings.image_shape, rules=target).facts(),
    }
    with artifacts.writing("02_pruned.safetensors", ["01_dense.safetensors"], facts) as path:
        networks.save_checkpoint(model, path, settings.model)
    print(f"pruned, {len(masks)} layers: {accuracy}")


@app.command()
def retrain() -> None:
    """Repeat the original training with the zeros held; resumable (notebook 03)."""
    settings = Settings.load()
    artifacts = Artifacts(settings)
    model = networks.load_checkpoint(artifacts.require("02_pruned.safetensors"))
    target = artifacts.facts("02_pruned.safetensors")["rules"]
    splits = inputs.load_splits(settings)
    history = loop.train(
        model,
        splits,
        settings.recipe,
        settings.seed,
        masks=masks_of(model, target),
        progress_file=artifacts.path("03_progress.pt"),
    )
    accuracy = loop.evaluate(model, splits.test)
    facts = {"test": accuracy, "recipe": settings.recipe, "history": history}
    with artifacts.writing("03_retrained.safetensors", ["02_pruned.safetensors"], facts) as path:
        networks.save_checkpoint(model, path, settings.model)
    print(f"retrained: {accuracy}")


@app.command()
def export() -> None:
    """Export dense and sparse networks to ONNX, FP32 and FP16 (notebook 04)."""
    settings = Settings.load()
    artifacts = Artifacts(settings)
    images, _ = data.first_images(inputs.load_splits(settings).test, 500)
    for name, parent in NETWORKS.items():
        model = networks.load_checkpoint(artifacts.require(parent))
        with torch.inference_mode():
            reference = model(images)
        for precision in ("fp32", "fp16"):
            facts: dict[str, float] = {}
            file = f"04_{name}_{precision}.onnx"
            with artifacts.writing(file, [parent], facts) as path:
                export_onnx(model, path, settings.image_shape, precision == "fp16")
                logits = OnnxRunner(path)(images)
                facts["gap"] = metrics.max_relative_error(logits, reference)
            print(f"{file}: relative gap to PyTorch {facts['gap']:.1e}")
    table = verify_onnx(artifacts.path("04_sparse_fp16.onnx"))
    wanted = table[table.eligible]
    check(wanted.is_2to4.all(), f"all {len(wanted)} eligible weights of the ONNX file are 2:4")


@app.command()
def build(
    target: Annotated[
        str | None, typer.Option(help="compute capability, such as 8.6; TensorRT-RTX only")
    ] = None,
) -> None:
    """Build an engine from the dense and from the sparse ONNX file (notebook 05)."""
    settings = Settings.load()
    artifacts = Artifacts(settings)
    batches = (min(settings.batches), settings.best_batch, max(settings.batches))
    for name in NETWORKS:
        facts: dict[str, object] = {}
        parent = f"04_{name}_fp16.onnx"
        with artifacts.writing(f"05_{name}.engine", [parent], facts) as path:
            report = engine.build_engine(
                artifacts.path(parent),
                path,
                settings.image_shape,
                batches,
                compute_capability=target,
            )
            facts.update(report.facts())
        print(f"{name}: {report}")


@app.command()
def benchmark() -> None:
    """Measure dense and sparse side by side over batch sizes (notebook 06)."""
    from helpers.tutorial import plots  # here, since no other command draws

    settings = Settings.load()
    artifacts = Artifacts(settings)
    measured = backends.find_runners(artifacts)
    # The dense network against itself shows how much of any ratio is chance.
    measured["dense again"] = backends.find_runners(artifacts)["dense"]
    table = bench.sweep(
        measured, settings.image_shape, settings.batches, settings.seconds_per_batch
    )
    path = results.save_benchmark(artifacts, measured, table)
    plots.save(
        plots.plot_sweep(table, measured["sparse"].name), artifacts.figures / "06_benchmark.png"
    )
    figure = plots.plot_case_study(json.loads(path.read_text()))
    plots.save(figure, artifacts.figures / "06_case_study.png")
    print(table.round(2).to_string(index=False))


@app.command(name="tutorial")
def run_tutorial(
    save: Annotated[bool, typer.Option(help="write the outputs into notebooks/")] = False,
) -> None:
    """Run all notebooks in order and print what came out."""
    notebooks.run_notebooks(Settings.load(), save)
    results.print_summary(Settings.load())


@app.command()
def summary() -> None:
    """Print the figures of the last run and where its files are."""
    results.print_summary(Settings.load())


@app.command()
def record() -> None:
    """Keep the figures of the last run as the recorded reference in data/reference/."""
    print(relative(results.record(Settings.load())))


@app.command()
def verify(
    path: Path,
    model: Annotated[
        str | None, typer.Option(help="the network of a checkpoint that does not name it")
    ] = None,
) -> None:
    """Check that every eligible weight of an ONNX file or checkpoint is 2:4; exit 1 if not."""
    checkpoint = path.suffix == ".safetensors"
    table = verify_file(path, networks.checkpoint_model(path, model) if checkpoint else None)
    print(table.to_string(index=False))
    wanted = table[table.eligible]
    if wanted.empty:
        raise TutorialError(f"{relative(path)} has no weight that could be 2:4.")
    print(f"{wanted.is_2to4.sum()} of {len(wanted)} eligible weights are 2:4")
    if not wanted.is_2to4.all():
        raise typer.Exit(1)


@app.command()
def advise(
    model: Annotated[
        str, typer.Argument(help="a network of torchvision, resnext14_8x4d, or a .safetensors file")
    ],
    gpu: Annotated[
        str | None, typer.Option(help=f"a datasheet: {', '.join(DATASHEETS)}; else a100")
    ] = None,
    rates: Annotated[
        Path | None, typer.Option(help="what benchmarks/gpu.py measured, instead of a datasheet")
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="give it several times; 1, 32, 256")
    ] = None,
    datatype: Annotated[str, typer.Option(help=", ".join(rates.TWO_OF_FOUR))] = "FP16",
    image_size: Annotated[
        int | None, typer.Option(help="height and width in pixels; else what the network expects")
    ] = None,
) -> None:
    """Predict what 2:4 will buy a network on a GPU, before it is retrained (notebook 07)."""
    network, (channels, size) = _network(model)
    found = _rates(gpu, rates)
    size = size if image_size is None else image_size
    shape, datatype = (channels, size, size), datatype.upper()
    batches = sorted({*(batch or (1, 32, 256))})
    table = advice.advise_batches(network, found, shape, batches, datatype)
    print(f"{model} at {shape[1]}x{shape[2]} in {datatype}, from {found.source}")
    if not found.measured:
        print("Floors, not measurements: at the published peaks, all operands from GPU memory.")
    print(table.to_string(index=False, float_format="{:.3g}".format), end="\n\n")
    print(advice.advise(network, found, shape, batch=batches[-1], datatype=datatype))


def _network(name: str) -> tuple[torch.nn.Module, tuple[int, int]]:
    """Return a network, with channels and size of its images."""
    if suffix := Path(name).suffix:
        if suffix != ".safetensors":
            raise TutorialError(
                f"{name} is no checkpoint: these end in .safetensors. Write one with "
                "helpers.models.save_checkpoint, or name a network."
            )
        network = networks.load_checkpoint(Path(name))
        with safe_open(name, framework="pt") as file:
            name = file.metadata()["model"]
    else:
        classes = 10 if name == "resnext14_8x4d" else 1000
        network = networks.create_on_meta(name, classes)  # only its shapes matter
    return network, (1, 28) if isinstance(network, SmallResNeXt) else (3, _image_size(name))


def _image_size(name: str) -> int:
    """Return what torchvision's network takes as it is made; some weights want larger images."""
    weights = torchvision.models.get_model_weights(name)
    return min(each.transforms().crop_size[0] for each in weights)


def _rates(gpu: str | None, record: Path | None) -> rates.Rates:
    if gpu is not None and record is not None:
        raise TutorialError("Give either --gpu, a datasheet, or --rates, a measurement.")
    if record is not None:
        return rates.Rates.from_record(record)
    sheet = "a100" if gpu is None else gpu.lower()
    if sheet not in DATASHEETS:
        raise TutorialError(f"There is no datasheet {gpu!r}; there are {', '.join(DATASHEETS)}.")
    return rates.Rates.from_datasheet(DATASHEETS[sheet])


def main() -> None:
    """Run the command line; a mistake of the reader's ends in one sentence, not a traceback."""
    try:
        app()
    except HelpersError as error:
        typer.echo(f"{type(error).__name__}: {error}", err=True)
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
