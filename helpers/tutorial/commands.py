"""The command line, `python -m helpers`: commands, options and their help.

The work is done elsewhere: `steps` has the steps of the case study, `own_models` the tools for
any model. A command imports them when it is called, so that `--help` need not wait for PyTorch.
"""

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from helpers.errors import HelpersError
from helpers.measurement.roofline import DATASHEETS, TWO_OF_FOUR
from helpers.tutorial import print_log
from helpers.tutorial.settings import Settings, relative

STEPS = "The case study, step by step"
WHOLE = "The whole case study"
TOOLS = "Your own model"
RECORDS = "The recorded runs of this repository"


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
            typer.echo(f"{type(error).__name__}: {error}", err=True)
            raise typer.Exit(1) from None


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
    rules: Annotated[
        str, typer.Option(help="prune what these allow: tensorrt, asp, cusparselt or any")
    ] = "tensorrt",
) -> None:
    """Prune the dense network 2:4 by magnitude (notebook 02)."""
    from helpers.tutorial import steps

    steps.prune(Settings.load(), rules)


@app.command(rich_help_panel=STEPS)
def retrain() -> None:
    """Repeat the original training with the zeros held; resumable (notebook 03)."""
    from helpers.tutorial import steps

    steps.retrain(Settings.load())


@app.command(rich_help_panel=STEPS)
def export() -> None:
    """Export dense and sparse networks to ONNX, FP32 and FP16 (notebook 04)."""
    from helpers.tutorial import steps

    steps.export(Settings.load())


@app.command(rich_help_panel=STEPS)
def build(
    compute_capability: Annotated[
        str | None, typer.Option(help="of the GPU to build for, such as 8.6; TensorRT-RTX only")
    ] = None,
) -> None:
    """Build an engine from the dense and from the sparse ONNX file (notebook 05)."""
    from helpers.tutorial import steps

    steps.build(Settings.load(), compute_capability)


@app.command(rich_help_panel=STEPS)
def benchmark() -> None:
    """Measure dense and sparse side by side over batch sizes (notebook 06)."""
    from helpers.tutorial import steps

    steps.benchmark(Settings.load())


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


@app.command(rich_help_panel=WHOLE)
def summary() -> None:
    """Print the figures of the last run and where its files are."""
    from helpers.tutorial.summary import print_summary

    print_summary(Settings.load())


@app.command(rich_help_panel=TOOLS)
def verify(
    path: Annotated[Path, typer.Argument(help="an .onnx or a .safetensors file")],
    model: Annotated[
        str | None, typer.Option(help="the network of a checkpoint that does not name it")
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="a node or weight that may stay dense, * for any characters; repeatable"),
    ] = None,
    allow_unjudged: Annotated[
        bool, typer.Option("--allow-unjudged", help="accept what cannot be judged")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Check that every eligible weight of an ONNX file or checkpoint is 2:4.

    The exit status is 0 if they are and nothing was left unjudged, and 1 if not.
    """
    from helpers.tutorial import own_models

    if not own_models.verify(path, model, exclude or (), allow_unjudged, as_json):
        raise typer.Exit(1)


@app.command(rich_help_panel=TOOLS)
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
        list[int] | None, typer.Option(help="batch size; give it several times; else 1, 32, 256")
    ] = None,
    datatype: Annotated[str, typer.Option(help=", ".join(TWO_OF_FOUR))] = "FP16",
    image_size: Annotated[
        int | None, typer.Option(help="height and width in pixels; else what the network expects")
    ] = None,
) -> None:
    """Predict how much faster 2:4 makes a network on a GPU, before retraining (notebook 07)."""
    from helpers.tutorial import own_models

    own_models.advise(model, gpu, rates, batch or [1, 32, 256], datatype.upper(), image_size)


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
    """Keep the figures of the last run as the recorded reference in data/reference/."""
    from helpers.tutorial import summary

    print(relative(summary.save_reference(Settings.load())))


def main() -> None:
    """Run the command line, and print what the library logs."""
    print_log()
    app()
