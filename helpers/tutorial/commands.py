"""The command line, `python -m helpers`: commands, options and their help.

The work is done elsewhere: `steps` has the steps of the case study, `own_models` the tools for
any model. A command imports them when it is called, so that `--help` need not wait for PyTorch.
"""

import os
import sys
from collections.abc import Callable, Collection
from contextlib import nullcontext, redirect_stdout
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from helpers.errors import HelpersError, InputError, UnavailableError, WriteError
from helpers.measurement.roofline import ESTIMATED_GPUS, MEASURED_GPUS, TWO_OF_FOUR
from helpers.tutorial import print_log
from helpers.tutorial.checks import CheckError, TutorialError
from helpers.tutorial.settings import Settings, relative

if TYPE_CHECKING:
    from helpers.tutorial.own_models import Result

STEPS = "The case study, step by step"
WHOLE = "The whole case study"
TOOLS = "Your own model"
RECORDS = "The recorded runs of this repository"

# Exit statuses; docs/cli.md lists them. 0 is success.
NEGATIVE = 1  # the answer is no: a weight that is not 2:4, a check that failed
BAD_INPUT = 2  # wrong arguments or files; typer's own status for a wrong command line
UNAVAILABLE = 3  # this machine cannot do it: no GPU, no engine builder
INTERRUPTED = 130  # by Ctrl-C; what shells return for it


def exit_status(error: HelpersError) -> int:
    """Return the exit status of an error."""
    if isinstance(error, UnavailableError):
        return UNAVAILABLE
    if isinstance(error, CheckError):
        return NEGATIVE
    is_input = isinstance(error, InputError | WriteError | TutorialError)
    return BAD_INPUT if is_input else NEGATIVE


class OneSentence(TyperGroup):
    """Shows the error of a command as one sentence; with `--debug`, the traceback."""

    def parse_args(self, context: Any, args: list[str]) -> list[str]:
        """Accept `--debug` after the command too, where it is added to a line that failed."""
        if "--debug" in args:
            args = ["--debug", *(each for each in args if each != "--debug")]
        return super().parse_args(context, args)

    def invoke(self, context: Any) -> Any:
        """Run the command that was named."""
        try:
            return super().invoke(context)
        except HelpersError as error:
            if context.params["debug"]:
                raise
            typer.echo(f"{_this_process()}{type(error).__name__}: {error}", err=True)
            raise typer.Exit(exit_status(error)) from None
        except KeyboardInterrupt as stop:
            if context.params["debug"]:
                raise
            typer.echo(f"{_this_process()}{str(stop) or 'Interrupted.'}", err=True)
            raise typer.Exit(INTERRUPTED) from None


def _this_process() -> str:
    """Return which of several processes this is, where torchrun has started them."""
    rank = os.environ.get("RANK")
    return "" if rank is None or os.environ.get("WORLD_SIZE") == "1" else f"[rank {rank}] "


app = typer.Typer(
    cls=OneSentence,
    help="2:4 sparsity: the steps of the notebooks without Jupyter, and tools for any model.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Declare the options of every command; `OneSentence` reads them."""


# --- options that several commands have ---

Json = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="replace the file to write if it exists")
]
Rules = Annotated[str, typer.Option(help="tensorrt, asp, cusparselt or any")]
Include = Annotated[
    list[str] | None,
    typer.Option(help="only weights whose name, or whose node's, matches, such as 'layer4.*'"),
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="no weights whose name, or whose node's, matches")
]
Shapes = Annotated[
    list[str] | None,
    typer.Option(
        "--shape",
        "--shapes",
        "--input-shapes",
        help="of an input that the file leaves open: images:1x3x224x224",
    ),
]
Network = Annotated[
    str | None,
    typer.Option("--model", help="the network of a checkpoint that does not name it"),
]
ImageSize = Annotated[
    int | None, typer.Option(help="height and width in pixels; else what the network expects")
]


_VALUES = "Values of the recipe, where they differ from its file"


class Sparsity(StrEnum):
    """Whether an engine may use sparse kernels; trtexec's words."""

    ENABLE = "enable"
    DISABLE = "disable"


SparsityFlag = Annotated[
    Sparsity, typer.Option(help="whether the builder may choose sparse kernels")
]
Level = Annotated[
    int,
    typer.Option(
        "--builder-optimization-level",
        "--builderOptimizationLevel",
        min=0,
        max=5,
        help="0 builds fast, 5 tries the most kernels",
    ),
]


def _print_result(as_json: bool, work: Callable[..., "Result"], *arguments: Any) -> None:
    """Do some work and print its result; exit with 1 if its answer is no.

    With JSON, standard output has nothing else: what the work prints goes to standard error.
    """
    with redirect_stdout(sys.stderr) if as_json else nullcontext():
        result = work(*arguments)
    typer.echo(result.json() if as_json else result.text)
    if not result.passed:
        raise typer.Exit(NEGATIVE)


_OF_BOTH = {"rules", "compute_capability"}  # options that the steps of the case study take too


def _only_for_files(context: typer.Context, allowed: Collection[str] = _OF_BOTH) -> None:
    """Refuse options that act on a file of the user's where none was named."""
    for name in context.params:
        source = context.get_parameter_source(name)
        if name in allowed or source is None or source.name == "DEFAULT":
            continue
        (option, *_) = next(each for each in context.command.params if each.name == name).opts
        raise InputError(f"{option} is for a file of your own: name the file first.")


@app.command(rich_help_panel=STEPS)
def setup() -> None:
    """Check this machine: versions, GPU, engine builder, backends (notebook 00)."""
    from helpers.tutorial.setup import check_setup

    check_setup(Settings.load())


@app.command(rich_help_panel=STEPS)
def evaluate() -> None:
    """Take the pretrained dense network and measure its accuracy (notebook 01)."""
    from helpers.tutorial import steps

    steps.evaluate(Settings.load())


@app.command(rich_help_panel=STEPS)
def prune(
    context: typer.Context,
    source: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="an .onnx or .safetensors file of your own"),
    ] = None,
    target: Annotated[
        Path | None, typer.Argument(metavar="COPY", help="the pruned copy to write")
    ] = None,
    rules: Rules = "tensorrt",
    include: Include = None,
    exclude: Exclude = None,
    model: Network = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Prune the dense network 2:4 by magnitude (notebook 02), or write a pruned copy of a file."""
    if source is None:
        from helpers.tutorial import steps

        _only_for_files(context)
        steps.prune(Settings.load(), rules)
        return
    if target is None:
        raise InputError("Name the pruned copy to write after the file.")
    from helpers.tutorial import own_models

    _print_result(
        as_json,
        own_models.prune,
        source,
        target,
        rules,
        include or [],
        exclude or [],
        model,
        overwrite,
    )


@app.command(rich_help_panel=STEPS)
def retrain(
    context: typer.Context,
    source: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="a pruned .safetensors file of your own"),
    ] = None,
    target: Annotated[
        Path | None, typer.Argument(metavar="COPY", help="the retrained copy to write")
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="a folder with train/ and val/, and in each a folder for every class"),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="a YAML file; else that of the preset, or of `full`")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="passes over the training images", rich_help_panel=_VALUES)
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="images of one step, over all processes", rich_help_panel=_VALUES),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="at its highest", rich_help_panel=_VALUES)
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="of SGD", rich_help_panel=_VALUES)
    ] = None,
    momentum: Annotated[float | None, typer.Option(help="of SGD", rich_help_panel=_VALUES)] = None,
    warmup: Annotated[
        float | None,
        typer.Option(
            help="share of all steps in which the learning rate rises", rich_help_panel=_VALUES
        ),
    ] = None,
    step_epochs: Annotated[
        str | None,
        typer.Option(
            metavar="INTEGER|none",
            help="epochs between falls of the learning rate by ten; none: a cosine",
            rich_help_panel=_VALUES,
        ),
    ] = None,
    label_smoothing: Annotated[
        float | None,
        typer.Option(help="share of each label that goes to all classes", rich_help_panel=_VALUES),
    ] = None,
    ema_decay: Annotated[
        str | None,
        typer.Option(
            metavar="FLOAT|none",
            help="average the weights over the steps, such as 0.999",
            rich_help_panel=_VALUES,
        ),
    ] = None,
    distillation: Annotated[
        float | None,
        typer.Option(
            help="share of the loss that compares with the --teacher", rich_help_panel=_VALUES
        ),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="of the distillation", rich_help_panel=_VALUES)
    ] = None,
    amp: Annotated[
        str | None,
        typer.Option(metavar="bf16|fp16|none", help="mixed precision", rich_help_panel=_VALUES),
    ] = None,
    sync_batch_norm: Annotated[
        bool | None,
        typer.Option(help="statistics over all processes, on GPUs", rich_help_panel=_VALUES),
    ] = None,
    accumulation: Annotated[
        int | None,
        typer.Option(
            help="parts of a batch that are computed one after the other", rich_help_panel=_VALUES
        ),
    ] = None,
    channels_last: Annotated[
        bool | None, typer.Option(help="layout of images and weights", rich_help_panel=_VALUES)
    ] = None,
    compile_: Annotated[
        bool | None,
        typer.Option("--compile/--no-compile", help="use torch.compile", rich_help_panel=_VALUES),
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option(help="the dense checkpoint, for --distillation")
    ] = None,
    model: Network = None,
    rules: Rules = "tensorrt",
    include: Include = None,
    exclude: Exclude = None,
    validation_images: Annotated[
        int | None, typer.Option(help="held out of train/; else one in twenty")
    ] = None,
    image_size: Annotated[int, typer.Option(help="height and width in pixels")] = 224,
    workers: Annotated[int, typer.Option(help="processes that load images, for each GPU")] = 4,
    seed: Annotated[int, typer.Option(help="of the order and the augmentation")] = 2024,
    run: Annotated[
        Path | None, typer.Option(help="folder for progress, metrics and curves; else COPY's")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Repeat the original training with the zeros held; resumable (notebook 03), or on your files.

    Start it with `torchrun -m helpers retrain` for several GPUs or nodes; docs/retraining.md has
    examples.
    """
    from helpers.tutorial import retrain as retraining

    given = {
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "warmup": warmup,
        "step_epochs": step_epochs,
        "label_smoothing": label_smoothing,
        "ema_decay": ema_decay,
        "distillation": distillation,
        "temperature": temperature,
        "amp": amp,
        "sync_batch_norm": sync_batch_norm,
        "accumulation": accumulation,
        "channels_last": channels_last,
        "compile": compile_,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    settings = Settings.load()
    if source is None:
        _only_for_files(context, {*given, "compile_", "recipe"})
        chosen = retraining.choose_recipe(settings.recipe, recipe, changes)
        retraining.retrain_preset(settings, chosen)
        return
    if target is None or images is None:
        raise InputError("Name the retrained copy to write after the file, and the --images.")
    chosen = retraining.choose_recipe(Settings.load("full").recipe, recipe, changes)
    retraining.retrain_file(
        source,
        target,
        retraining.OwnImages(images, validation_images, image_size, workers),
        chosen,
        seed,
        retraining.Pruning(rules, include or [], exclude or []),
        model,
        teacher,
        run,
        overwrite,
    )


@app.command(rich_help_panel=STEPS)
def export() -> None:
    """Export dense and sparse networks to ONNX, FP32 and FP16 (notebook 04)."""
    from helpers.tutorial import steps

    steps.export(Settings.load())


@app.command(rich_help_panel=STEPS)
def quantize(
    context: typer.Context,
    source: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="an .onnx file of your own")
    ] = None,
    target: Annotated[
        Path | None, typer.Argument(metavar="COPY", help="the copy in INT8 to write")
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(help="a folder of pictures, or an .npz with an array for each input"),
    ] = None,
    runs_on: Annotated[str, typer.Option("--for", help="tensorrt or cpu")] = "tensorrt",
    count: Annotated[int, typer.Option(min=1, help="how many images to take at most")] = 512,
    percentile: Annotated[
        float | None,
        typer.Option(help="of the numbers that a range has to contain, such as 99.99; else all"),
    ] = None,
    image_size: ImageSize = None,
    mean: Annotated[
        str, typer.Option(help="of each channel of the pictures; else ImageNet's")
    ] = "",
    std: Annotated[str, typer.Option(help="of each channel of the pictures; else ImageNet's")] = "",
    exclude: Exclude = None,
    first: Annotated[
        bool, typer.Option("--first/--no-first", help="quantise the first product too")
    ] = True,
    last: Annotated[
        bool, typer.Option("--last/--no-last", help="quantise the last product too")
    ] = True,
    expect_sparse: Annotated[
        bool, typer.Option("--expect-sparse", help="refuse a file that is not 2:4")
    ] = False,
    reduce_range: Annotated[
        bool,
        typer.Option("--reduce-range", help="weights of 7 bits, for processors without VNNI"),
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Quantise the exported ONNX files to INT8 (notebook 08), or write a copy of yours in INT8."""
    if source is None:
        from helpers.tutorial import steps

        _only_for_files(context)
        steps.quantize(Settings.load())
        return
    if target is None or calibration is None:
        raise InputError("Name the copy to write after the file, and --calibration.")
    from helpers.tutorial import own_models

    _print_result(
        as_json,
        own_models.quantize,
        source,
        target,
        own_models.Calibration(calibration, count, percentile, image_size, mean, std),
        own_models.QuantizeOptions(
            runs_on, exclude or [], first, last, expect_sparse, reduce_range
        ),
        overwrite,
    )


@app.command(rich_help_panel=STEPS)
def build(
    context: typer.Context,
    source: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="an .onnx file of your own")
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(
            "--save-engine",
            "--saveEngine",
            "--output",
            "-o",
            help="the engine to write; else beside the file, ending in .engine",
        ),
    ] = None,
    shape: Shapes = None,
    min_shape: Annotated[
        list[str] | None,
        typer.Option("--min-shape", "--min-shapes", "--minShapes", help="the smallest shape"),
    ] = None,
    opt_shape: Annotated[
        list[str] | None,
        typer.Option("--opt-shape", "--opt-shapes", "--optShapes", help="the one to tune for"),
    ] = None,
    max_shape: Annotated[
        list[str] | None,
        typer.Option("--max-shape", "--max-shapes", "--maxShapes", help="the largest shape"),
    ] = None,
    sparsity: SparsityFlag = Sparsity.ENABLE,
    compute_capability: Annotated[
        str | None, typer.Option(help="of the GPU to build for, such as 8.6; TensorRT-RTX only")
    ] = None,
    level: Level = 3,
    timing_cache: Annotated[
        Path | None,
        typer.Option(
            "--timing-cache",
            "--timingCacheFile",
            help="kernel times of earlier builds, read and written; TensorRT only",
        ),
    ] = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Build an engine from the dense and from the sparse ONNX file (notebook 05), or from yours."""
    if source is None:
        from helpers.tutorial import steps

        _only_for_files(context)
        steps.build(Settings.load(), compute_capability)
        return
    from helpers.tutorial import own_models

    shapes = own_models.ProfileTexts(shape or [], min_shape or [], opt_shape or [], max_shape or [])
    options = own_models.EngineOptions(
        sparsity == Sparsity.ENABLE, compute_capability, level, timing_cache
    )
    _print_result(as_json, own_models.build, source, target, shapes, options, overwrite)


@app.command(rich_help_panel=STEPS)
def benchmark(
    context: typer.Context,
    dense: Annotated[
        Path | None, typer.Argument(metavar="DENSE", help="an .onnx file of your own")
    ] = None,
    sparse: Annotated[
        Path | None,
        typer.Argument(metavar="SPARSE", help="its sparse version; else a pruned copy of it"),
    ] = None,
    shape: Shapes = None,
    load_inputs: Annotated[
        Path | None,
        typer.Option(
            "--load-inputs",
            "--loadInputs",
            help=".npz with an array for each input; else random numbers",
        ),
    ] = None,
    backend: Annotated[
        str | None,
        typer.Option(help="engine or cpu; else the engine where one can run"),
    ] = None,
    duration: Annotated[float, typer.Option(help="seconds to measure each file, at least")] = 3,
    warm_up: Annotated[
        float, typer.Option("--warm-up", "--warmUp", help="milliseconds to run before measuring")
    ] = 200,
    cuda_graph: Annotated[
        bool,
        typer.Option("--cuda-graph/--no-cuda-graph", " /--noCudaGraph", help="for engines"),
    ] = True,
    level: Level = 3,
    as_json: Json = False,
) -> None:
    """Measure dense and sparse side by side over batch sizes (notebook 06), or files of yours."""
    if dense is None:
        from helpers.tutorial import steps

        _only_for_files(context)
        steps.benchmark(Settings.load())
        return
    from helpers.tutorial import own_models

    timing = own_models.Timing(backend, duration, warm_up / 1000, cuda_graph, level)
    _print_result(as_json, own_models.benchmark, dense, sparse, shape or [], load_inputs, timing)


@app.command(rich_help_panel=WHOLE)
def tutorial(
    save: Annotated[bool, typer.Option("--save", help="write the outputs into notebooks/")] = False,
) -> None:
    """Run all notebooks in order and print what came out."""
    from helpers.tutorial.notebooks import run_notebooks
    from helpers.tutorial.summary import print_summary

    settings = Settings.load()
    run_notebooks(settings, save)
    print_summary(settings)


@app.command(
    rich_help_panel=WHOLE,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def learn(
    context: typer.Context,
    lab: Annotated[bool, typer.Option("--lab/--no-lab", help="open JupyterLab")] = True,
) -> None:
    """Make copies of the notebooks to work in, build/learn/, and open them in JupyterLab.

    Other options are those of `jupyter lab`, such as --no-browser.
    """
    from helpers.tutorial import learner_copies

    learner_copies.make_copies()
    if lab:
        learner_copies.open_lab(context.args)


@app.command(rich_help_panel=WHOLE)
def catch_up(
    notebook: Annotated[str, typer.Argument(help="the number to start at, such as 04")],
) -> None:
    """Make what the notebooks before this one would have left, for the copies of `learn`."""
    from helpers.tutorial import catch_up, learner_copies

    settings = Settings.load()
    folder = learner_copies.artifacts_folder() / settings.preset
    catch_up.catch_up(replace(settings, artifacts_dir=folder.resolve()), notebook)


@app.command(rich_help_panel=WHOLE)
def summary() -> None:
    """Print the figures of the last run and where its files are."""
    from helpers.tutorial.summary import print_summary

    print_summary(Settings.load())


@app.command(rich_help_panel=TOOLS)
def report(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="an .onnx or .safetensors file, or a network of torchvision"
        ),
    ],
    rules: Rules = "tensorrt",
    include: Include = None,
    exclude: Exclude = None,
    shape: Shapes = None,
    image_size: ImageSize = None,
    as_json: Json = False,
) -> None:
    """List every weight: can it be sparse, is it 2:4, how much of the arithmetic is it?"""
    from helpers.tutorial import own_models

    _print_result(
        as_json,
        own_models.report,
        model,
        rules,
        include or [],
        exclude or [],
        shape or [],
        image_size,
    )


@app.command(rich_help_panel=TOOLS)
def verify(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="an .onnx or a .safetensors file")],
    model: Network = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="a node or weight that may stay dense, * for any characters; repeatable"),
    ] = None,
    allow_unjudged: Annotated[
        bool, typer.Option("--allow-unjudged", help="accept what cannot be judged")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check that every eligible weight of an ONNX file or checkpoint is 2:4.

    The exit status is 0 if they are and nothing was left unjudged, and 1 if not.
    """
    from helpers.tutorial import own_models

    _print_result(as_json, own_models.verify, path, model, exclude or [], allow_unjudged)


@app.command(rich_help_panel=TOOLS)
def advise(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL", help="an .onnx or .safetensors file, or a network of torchvision"
        ),
    ],
    gpu: Annotated[
        str | None,
        typer.Option(
            help=f"measured: {', '.join(MEASURED_GPUS)}; estimated: {', '.join(ESTIMATED_GPUS)}; "
            "else a100"
        ),
    ] = None,
    rates: Annotated[
        Path | None, typer.Option(help="what benchmarks/gpu.py measured on your GPU, instead")
    ] = None,
    datasheet: Annotated[
        bool,
        typer.Option("--datasheet", help="take the peaks of the datasheet, which none reaches"),
    ] = False,
    batch: Annotated[
        list[int] | None, typer.Option(help="batch size; give it several times; else 1, 32, 256")
    ] = None,
    datatype: Annotated[str, typer.Option(help=", ".join(TWO_OF_FOUR))] = "FP16",
    image_size: ImageSize = None,
    shape: Shapes = None,
    as_json: Json = False,
) -> None:
    """Predict how much faster 2:4 makes a network on a GPU, before retraining (notebook 07)."""
    from helpers.tutorial import own_models

    _print_result(
        as_json,
        own_models.advise,
        model,
        own_models.find_rates(gpu, rates, datasheet),
        batch or [],
        datatype.upper(),
        image_size,
        shape or [],
    )


@app.command(rich_help_panel=STEPS)
def repository(
    folder: Annotated[
        Path | None, typer.Argument(help="to write; else 09_repository among the artifacts")
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            help="python, which runs everywhere; onnxruntime or tensorrt, for NVIDIA's container"
        ),
    ] = "python",
) -> None:
    """Write both models as a model repository, which Triton serves (notebook 09)."""
    from helpers.tutorial import deployment

    deployment.write(Settings.load(), folder, backend)


@app.command(rich_help_panel=STEPS)
def serve(
    http_port: Annotated[int, typer.Option(min=1, max=65535, help="of HTTP")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=1, max=65535, help="of gRPC")] = 8001,
    metrics_port: Annotated[int, typer.Option(min=1, max=65535, help="of the metrics")] = 8002,
    log: Annotated[Path | None, typer.Option(help="file for what the server prints")] = None,
) -> None:
    """Serve both models with Triton for programs on this machine, until Ctrl-C (notebook 09)."""
    from helpers.tutorial import deployment

    deployment.serve(Settings.load(), (http_port, grpc_port, metrics_port), log)


@app.command(rich_help_panel=TOOLS)
def load_test(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="[MODEL]...", help="names on the server; else dense and sparse"),
    ] = None,
    url: Annotated[
        str | None, typer.Option(help="host and port of the server; else Triton's own, here")
    ] = None,
    protocol: Annotated[str, typer.Option(help="grpc or http")] = "grpc",
    batch: Annotated[int, typer.Option(min=1, help="images in each request")] = 8,
    concurrency: Annotated[
        list[int] | None,
        typer.Option(help="clients that wait for each answer; repeatable; else 1, 2, 4, 8, 16"),
    ] = None,
    rate: Annotated[
        list[float] | None,
        typer.Option(help="requests/s that arrive at random, waiting for none; repeatable"),
    ] = None,
    seconds: Annotated[float, typer.Option(help="for each load of each model")] = 5,
    timeout: Annotated[float, typer.Option(help="seconds that a request may take")] = 10,
    seed: Annotated[int, typer.Option(help="of inputs and arrivals")] = 0,
    tolerance: Annotated[
        float, typer.Option(help="the largest relative error of an answer that is still right")
    ] = 1e-3,
    picture: Annotated[
        Path | None, typer.Option(help="draw latency against throughput into this PNG file")
    ] = None,
    as_json: Json = False,
) -> None:
    """Load a running server: latency, throughput and errors of its models (notebook 09).

    Inputs are random. Each answer under load must be what the server answers when it is idle.
    """
    from helpers.tutorial import load_report

    _print_result(
        as_json,
        load_report.load_test,
        load_report.Endpoints(models or ["dense", "sparse"], protocol, url or ""),
        load_report.Loads(batch, concurrency or [], rate or [], seconds, timeout, seed),
        tolerance,
        picture,
    )


@app.command(rich_help_panel=RECORDS)
def pretrain() -> None:
    """Train the dense checkpoint of the quick preset again, into data/pretrained/."""
    from helpers.tutorial import steps

    steps.pretrain(Settings.load("quick"))


@app.command(rich_help_panel=RECORDS)
def dense_control() -> None:
    """Train the dense network for as long again as the sparse one was retrained, and record it.

    This is the fair control of notebook 03: a gain that further training brings to the dense
    network too is not due to 2:4. Retrain the sparse network first.
    """
    from helpers.tutorial import steps

    steps.dense_control(Settings.load("quick"))


@app.command(rich_help_panel=RECORDS)
def save_reference() -> None:
    """Keep the figures of the last run in data/reference/, its network in data/pretrained/."""
    from helpers.tutorial import catch_up, summary

    settings = Settings.load()
    print(relative(summary.save_reference(settings)))
    if settings.preset == "quick":
        print(relative(catch_up.keep_retrained(settings)))


def main() -> None:
    """Run the command line, and print what the library logs."""
    print_log()
    app()
