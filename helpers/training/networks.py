"""The models of the case study: create, load and save them.

Checkpoints are safetensors files with the network's name in their header; nothing
is ever unpickled. Explained in `01_load_pretrained.ipynb`.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torchvision.models import ResNeXt101_32X8D_Weights
from torchvision.models.resnet import Bottleneck, ResNet

from helpers.errors import InputError
from helpers.files import atomic_write, shown
from helpers.sparsity.compressed import Checkpoint, read_checkpoint


class CheckpointError(InputError):
    """A checkpoint is missing, damaged or of another model."""


# The channels of each stage in torchvision, before its blocks expand them, and in our network.
_PLANES = {64: 16, 128: 64, 256: 256, 512: 384}


class SmallResNeXt(ResNet):
    """A ResNeXt for 28x28 grey images, built from torchvision's blocks.

    The stem is a 3x3 convolution and there is no pooling before the first stage. The first
    stages are narrower than torchvision's, the later ones about as wide: as in ResNeXt-101 32x8d
    most of the arithmetic is in 1x1 convolutions of many channels.
    """

    def __init__(self, blocks: list[int], groups: int, width: int, num_classes: int) -> None:
        # torchvision's width is counted per 64 channels of a stage; our first one has 16.
        super().__init__(Bottleneck, blocks, groups=groups, width_per_group=4 * width)
        self.conv1 = nn.Conv2d(1, 64, 3, stride=2, padding=1, bias=False)
        self.maxpool = nn.Identity()
        self.fc = nn.Linear(Bottleneck.expansion * _PLANES[512], num_classes)

    def _make_layer(self, block: type[Bottleneck], planes: int, *args, **kwargs) -> nn.Sequential:
        return super()._make_layer(block, _PLANES[planes], *args, **kwargs)


def resnext14_8x1d(num_classes: int = 10) -> SmallResNeXt:
    """Return the network of the quick preset: 14 weighted layers, 2.61 M parameters."""
    return SmallResNeXt([1, 1, 1, 1], groups=8, width=1, num_classes=num_classes)


def create_model(name: str, num_classes: int) -> nn.Module:
    """Return a model with random weights.

    Args:
        name: `resnext14_8x1d`, or any classification network of torchvision.
        num_classes: outputs of the last layer.

    Raises:
        InputError: no network has that name.
    """
    if name == "resnext14_8x1d":
        return resnext14_8x1d(num_classes)
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise InputError(
            f"There is no classification network {name!r}: it is neither resnext14_8x1d nor one "
            "of torchvision's."
        )
    return torchvision.models.get_model(name, num_classes=num_classes)


def create_on_meta(name: str, num_classes: int) -> nn.Module:
    """Return a model on the device `meta`: its layers and shapes, without numbers.

    Arguments and errors are those of `create_model`. A model of any size takes almost no memory
    and little time.
    """

    def parameter_to_meta(_: nn.Module, __: str, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    def buffer_to_meta(_: nn.Module, __: str, buffer: Tensor | None) -> Tensor | None:
        return None if buffer is None else buffer.to("meta")

    # Not `with torch.device("meta")`: RegNets compute their widths with tensors and need the
    # numbers. Only what becomes part of a module goes to `meta`.
    hooks = (
        # torch's annotation leaves out that a hook may return a replacement.
        register_module_parameter_registration_hook(parameter_to_meta),  # type: ignore[arg-type]
        register_module_buffer_registration_hook(buffer_to_meta),  # type: ignore[arg-type]
    )
    try:
        return create_model(name, num_classes)
    finally:
        for hook in hooks:
            hook.remove()


def imagenette_indices() -> list[int]:
    """Return the ImageNet class numbers of Imagenette's ten classes, in its order."""
    categories = ResNeXt101_32X8D_Weights.IMAGENET1K_V1.meta["categories"]
    names = [names[0] for names in torchvision.datasets.Imagenette._WNID_TO_CLASS.values()]
    return [categories.index(name) for name in names]


def restrict_head_(model: ResNet, classes: list[int]) -> None:
    """Keep only these rows of the last layer, in place, to classify fewer classes."""
    head = nn.Linear(model.fc.in_features, len(classes))
    with torch.no_grad():
        head.weight.copy_(model.fc.weight[classes])
        head.bias.copy_(model.fc.bias[classes])
    model.fc = head


def save_checkpoint(model: nn.Module, path: Path, name: str) -> None:
    """Write a model's weights as safetensors, with the network's name in the header.

    The same weights give the same bytes: the header has one entry, since the order of several
    would be random.

    Args:
        model: on any device.
        path: file to write, in one piece or not at all.
        name: as `create_model` takes it; `load_checkpoint` creates that model.

    Raises:
        CheckpointError: a weight is NaN or infinite; nothing is written.
        WriteError: the disk is full or the folder cannot be written to.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    _require_finite(state, "the model")
    with atomic_write(path) as part:
        save_file(state, part, metadata={"model": name})


def load_checkpoint(path: Path, name: str | None = None) -> nn.Module:
    """Return the model that a checkpoint holds, in evaluation mode on the CPU.

    Args:
        path: a file of `save_checkpoint`, or of `save_compressed` with the network's name.
        name: of the network; else the header's.

    Raises:
        InputError: no network has that name.
        CheckpointError: the file is missing or damaged, names no network, holds the weights of
            another one, or has NaN or infinite weights.
    """
    checkpoint = _read(path)
    state, name = checkpoint.state, name or checkpoint.network
    if name is None:
        raise CheckpointError(
            f"{shown(path)} does not name its network in the header. Write checkpoints with "
            "helpers.training.networks.save_checkpoint."
        )
    model = create_model(name, _number_of_classes(path, name, state))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise _of_another(path, name, _first_detail(error)) from error
    _require_finite(state, shown(path))
    return model.eval()


def checkpoint_model(path: Path, name: str | None = None) -> nn.Module | None:
    """Return the model that a checkpoint belongs to, on the device `meta`.

    Args:
        path: a safetensors file, compressed or not.
        name: of the network; else the header's.

    Returns:
        The model, with the number of classes that the file has weights for. None if neither
        the header nor `name` says which it is.

    Raises:
        InputError: no network has that name.
        CheckpointError: the file is missing or damaged, or of another network.
    """
    checkpoint = _read(path)
    name = name or checkpoint.network
    if name is None:
        return None
    return create_on_meta(name, _number_of_classes(path, name, checkpoint.state))


def _read(path: Path) -> Checkpoint:
    try:
        return read_checkpoint(path)
    except InputError as error:
        raise CheckpointError(str(error)) from error


def _number_of_classes(path: Path, name: str, state: Mapping[str, Tensor]) -> int:
    """Return the number of classes that a checkpoint's last layer has.

    That layer is the one whose shape changes with the number of classes, whatever its name.
    """
    two, three = (dict(create_on_meta(name, classes).named_parameters()) for classes in (2, 3))
    changed = [key for key in two if two[key].dim() > 1 and two[key].shape != three[key].shape]
    head = changed[-1]  # GoogLeNet and Inception have more of them, in the middle
    if head not in state or state[head].dim() != two[head].dim():
        raise _of_another(path, name, f"{head} is missing or of another shape.")
    return len(state[head])


def _of_another(path: Path, name: str, detail: str) -> CheckpointError:
    return CheckpointError(f"{shown(path)} does not hold the weights of {name}: {detail}")


def _first_detail(error: RuntimeError) -> str:
    """Return the first thing that `load_state_dict` found wrong."""
    lines = str(error).splitlines()
    return lines[1].strip() if len(lines) > 1 else lines[0]


def _require_finite(state: Mapping[str, Tensor], where: str) -> None:
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(
                f"{key} of {where} has NaN or infinite values: the training that produced it has "
                "diverged. Lower the learning rate, or go back to an earlier checkpoint."
            )
