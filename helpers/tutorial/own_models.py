"""Commands for your own models: is one 2:4, and how much faster would 2:4 make it?

These are `python -m helpers verify` and `python -m helpers advise`.
"""

import json
from collections.abc import Sequence
from pathlib import Path

from torch import nn
from torchvision.models import get_model_weights

from helpers.files import shown
from helpers.measurement.advice import advise as advise_one
from helpers.measurement.advice import advise_batches
from helpers.measurement.rates import Rates
from helpers.measurement.roofline import DATASHEETS
from helpers.sparsity.compressed import read_checkpoint
from helpers.sparsity.verify import verify_file
from helpers.training import networks
from helpers.tutorial.checks import TutorialError


def verify(
    path: Path,
    name: str | None,
    exclude: Sequence[str] = (),
    allow_unjudged: bool = False,
    as_json: bool = False,
) -> bool:
    """Print whether each weight is 2:4; return whether all eligible ones are, for certain.

    Args:
        path: an ONNX file or a safetensors checkpoint.
        name: the network of a checkpoint that does not name it.
        exclude: name patterns of nodes, layers and weights that are meant to stay dense.
        allow_unjudged: accept products of which it is not known whether they could be sparse.
        as_json: print JSON instead of the table.

    Raises:
        TutorialError: no weight of the file is eligible, or a network is named for a file that
            is not a checkpoint.
    """
    model = None
    if path.suffix == ".safetensors":
        model = networks.checkpoint_model(path, name)
    elif name is not None:
        raise TutorialError(
            f"{shown(path)} is not a .safetensors checkpoint, and only those need --model: "
            "leave it out."
        )
    table = verify_file(path, model, exclude)
    eligible = table[table.eligible]
    unjudged = int((~table.judged).sum())
    passed = bool(eligible.is_2to4.all()) and (unjudged == 0 or allow_unjudged)
    if eligible.empty and (unjudged == 0 or allow_unjudged):
        raise TutorialError(f"{shown(path)} has no weight that could be 2:4.")
    if as_json:
        verdict = {
            "file": str(path),
            "passed": passed,
            "eligible": len(eligible),
            "eligible_2to4": int(eligible.is_2to4.sum()),
            "not_judged": unjudged,
            "rows": json.loads(table.to_json(orient="records")),
        }
        print(json.dumps(verdict, indent=2))
        return passed
    print(table.to_string(index=False))
    if unjudged:
        products = "product was" if unjudged == 1 else "products were"
        print(
            f"{unjudged} {products} not judged, for the reason given: accept with "
            "--allow-unjudged, or leave out by name with --exclude"
        )
    print(f"{eligible.is_2to4.sum()} of {len(eligible)} eligible weights are 2:4")
    return passed


def advise(
    name: str,
    gpu: str | None,
    record: Path | None,
    batch_sizes: Sequence[int],
    datatype: str,
    image_size: int | None,
) -> None:
    """Print how much faster 2:4 is predicted to make a model, by batch size and by layer.

    Args:
        name: of a network, or of a safetensors checkpoint.
        gpu: the name of a datasheet.
        record: what `benchmarks/gpu.py` measured, instead of a datasheet.
        batch_sizes: images at a time; the layers are shown for the largest.
        datatype: of weights and activations.
        image_size: height and width in pixels, unless the network's own.
    """
    model, channels, size = _load(name)
    rates = _rates(gpu, record)
    if image_size is not None:
        size = image_size
    shape = (channels, size, size)
    sizes = sorted(set(batch_sizes))
    table = advise_batches(model, rates, shape, sizes, datatype)
    print(f"{name} at {size}x{size} in {datatype}, from {rates.source}")
    if not rates.measured:
        print("Floors, not measurements: at the published peaks, all operands from GPU memory.")
    print(table.to_string(index=False, float_format="{:.3g}".format), end="\n\n")
    print(advise_one(model, rates, shape, batch=sizes[-1], datatype=datatype))


def _load(name: str) -> tuple[nn.Module, int, int]:
    """Return a model by its network or its checkpoint, and the channels and size of its images."""
    if suffix := Path(name).suffix:
        if suffix != ".safetensors":
            raise TutorialError(
                f"{name} is not a checkpoint: those end in .safetensors. Write one with "
                "helpers.training.networks.save_checkpoint, or name a network."
            )
        stored = read_checkpoint(Path(name)).network
        if stored is None:
            raise TutorialError(
                f"{name} does not name its network in the header. Write it with "
                "helpers.training.networks.save_checkpoint, or name a network."
            )
        model, name = networks.load_checkpoint(Path(name)), stored
    else:
        classes = 10 if name == "resnext14_8x4d" else 1000
        model = networks.create_on_meta(name, classes)  # only its shapes matter
    if isinstance(model, networks.SmallResNeXt):
        return model, 1, 28
    return model, 3, _image_size(name)


def _image_size(name: str) -> int:
    """Return the size of images that torchvision's network is made for.

    It is the smallest among those of its weights: some of them were trained on larger images.
    """
    weights = get_model_weights(name)
    return min(each.transforms().crop_size[0] for each in weights)


def _rates(gpu: str | None, record: Path | None) -> Rates:
    if gpu is not None and record is not None:
        raise TutorialError("Give either --gpu, a datasheet, or --rates, a measurement.")
    if record is not None:
        return Rates.from_record(record)
    sheet = "a100" if gpu is None else gpu.lower()
    if sheet not in DATASHEETS:
        raise TutorialError(f"There is no datasheet {gpu!r}; there are {', '.join(DATASHEETS)}.")
    return Rates.from_datasheet(DATASHEETS[sheet])
