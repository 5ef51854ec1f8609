"""The networks of the case study: make, load, save.

Checkpoints are safetensors files with the network's name in their header; nothing
is ever unpickled. Explained in `01_load_pretrained.ipynb`.
"""

from pathlib import Path

import torch
import torchvision
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision.models import ResNeXt101_32X8D_Weights
from torchvision.models.resnet import Bottleneck, ResNet

from helpers.errors import InputError
from helpers.files import shown


class CheckpointError(InputError):
    """A checkpoint is missing, damaged or of another network."""


class SmallResNeXt(ResNet):
    """A ResNeXt for 28x28 grey images, made of torchvision's own blocks.

    Every stage is a quarter as wide as torchvision's, the stem is a 3x3 convolution
    and there is no pooling before the first stage. As in ResNeXt-101 32x8d the 1x1
    convolutions do most of the arithmetic, around grouped 3x3 ones.
    """

    def __init__(self, blocks: list[int], groups: int, width: int, num_classes: int) -> None:
        # torchvision's width is counted per 64 channels of a stage; ours has 16.
        super().__init__(Bottleneck, blocks, groups=groups, width_per_group=4 * width)
        self.conv1 = nn.Conv2d(1, 64, 3, stride=2, padding=1, bias=False)
        self.maxpool = nn.Identity()
        self.fc = nn.Linear(512, num_classes)

    def _make_layer(self, block: type[Bottleneck], planes: int, *args, **kwargs) -> nn.Sequential:
        return super()._make_layer(block, planes // 4, *args, **kwargs)


def resnext14_8x4d(num_classes: int = 10) -> SmallResNeXt:
    """Return the network of the quick preset: 14 weighted layers, 0.54 M parameters."""
    return SmallResNeXt([1, 1, 1, 1], groups=8, width=4, num_classes=num_classes)


def create_model(name: str, num_classes: int) -> nn.Module:
    """Return a network with random weights.

    Args:
        name: `resnext14_8x4d`, or any classification network of torchvision.
        num_classes: outputs of the last layer.

    Raises:
        InputError: no network has that name.
    """
    if name == "resnext14_8x4d":
        return resnext14_8x4d(num_classes)
    if name not in torchvision.models.list_models(module=torchvision.models):
        raise InputError(
            f"There is no classification network {name!r}: it is neither resnext14_8x4d nor one "
            "of torchvision's."
        )
    return torchvision.models.get_model(name, num_classes=num_classes)


def imagenette_indices() -> list[int]:
    """Return the ImageNet class numbers of Imagenette's ten classes, in its order."""
    categories = ResNeXt101_32X8D_Weights.IMAGENET1K_V1.meta["categories"]
    names = [names[0] for names in torchvision.datasets.Imagenette._WNID_TO_CLASS.values()]
    return [categories.index(name) for name in names]


def restrict_head_(model: ResNet, classes: list[int]) -> None:
    """Keep only these rows of the last layer, in place: a classifier of fewer classes."""
    head = nn.Linear(model.fc.in_features, len(classes))
    with torch.no_grad():
        head.weight.copy_(model.fc.weight[classes])
        head.bias.copy_(model.fc.bias[classes])
    model.fc = head


def save_checkpoint(model: nn.Module, path: Path, name: str) -> None:
    """Write a network's weights as safetensors, with its name in the header.

    The same weights give the same bytes: with a second entry the header's order would be random.

    Raises:
        CheckpointError: a weight is NaN or infinite; nothing is written.
    """
    state = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    _require_finite(state, "the network")
    save_file(state, path, metadata={"model": name})


def load_checkpoint(path: Path) -> nn.Module:
    """Return the network that `save_checkpoint` wrote, in evaluation mode on the CPU.

    Raises:
        CheckpointError: the file is no safetensors file, of another network, or has
            NaN or infinite weights.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{shown(path)} is not a readable safetensors file ({error})."
        ) from error
    if "compressed_2to4" in header:
        raise CheckpointError(
            f"{shown(path)} is compressed; read it with helpers.sparsity.load_compressed."
        )
    if "model" not in header or "fc.weight" not in state:
        raise CheckpointError(
            f"{shown(path)} cannot be loaded: it lacks `model` in its header or the weights "
            "`fc.weight`. Write checkpoints with helpers.models.save_checkpoint, of networks whose "
            "last layer is called `fc`, as that of ResNet and ResNeXt is."
        )
    model = create_model(header["model"], num_classes=len(state["fc.weight"]))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        raise CheckpointError(
            f"{shown(path)} does not hold the weights of {header['model']}: {detail}"
        ) from error
    _require_finite(state, shown(path))
    return model.eval()


def _require_finite(state: dict[str, Tensor], where: str) -> None:
    for key, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise CheckpointError(
                f"{key} of {where} has NaN or infinite values. The training that made it has "
                "diverged: lower the learning rate, or go back to an earlier checkpoint."
            )
