"""Classification of Fashion-MNIST by five kinds of small networks."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.datasets import FashionMNIST
from torchvision.models import DenseNet, VisionTransformer
from torchvision.models.resnet import BasicBlock, Bottleneck

from accuracy_tasks.task import Batch, Data, Scores, Task, adamw, sgd
from helpers.metrics import accuracy
from helpers.training.data import FASHION_MEAN, FASHION_STD
from helpers.training.recipe import Recipe

DATA = Path(__file__).parents[2] / "data"
CLASSES = 10


@cache
def all_images() -> Data:
    """Return Fashion-MNIST: normalised images (N, 1, 28, 28) and labels (N)."""
    parts = (FashionMNIST(DATA, train=train, download=True) for train in (True, False))
    train, test = (
        (((part.data / 255 - FASHION_MEAN) / FASHION_STD).unsqueeze(1), part.targets)
        for part in parts
    )
    return Data(train, test)


def first_images(train: int, test: int) -> Data:
    """Return the first training images and the first test images of Fashion-MNIST."""
    whole = all_images()
    return Data(tuple(x[:train] for x in whole.train), tuple(x[:test] for x in whole.test))


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """Return the cross-entropy on images, half of which are mirrored."""
    images, labels = batch
    mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
    images = torch.where(mirrored.to(images.device), images.flip(-1), images)
    return F.cross_entropy(model(images), labels)


def scores(model: nn.Module, test: Batch) -> Scores:
    """Return the top-1 accuracy."""
    images, labels = test
    logits = torch.cat([model(part) for part in images.split(500)])
    return {"top-1 %": accuracy(logits, labels).top1}


# --- the networks ---


def convolution(
    inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1
) -> nn.Module:
    """Return a convolution and its batch norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    )


def classifier(channels: int) -> nn.Sequential:
    """Return the end of a convolutional network: the mean over the image, and a linear layer."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES))


def small_resnet(width: int = 8) -> nn.Module:
    """Return a ResNet of four of torchvision's basic blocks."""
    return nn.Sequential(
        convolution(1, width, 3, stride=2),
        nn.ReLU(),
        BasicBlock(width, width),
        BasicBlock(width, 2 * width, 2, convolution(width, 2 * width, 1, 2)),
        BasicBlock(2 * width, 4 * width, 2, convolution(2 * width, 4 * width, 1, 2)),
        BasicBlock(4 * width, 4 * width),
        classifier(4 * width),
    )


def small_resnext(width: int = 32, groups: int = 4) -> nn.Module:
    """Return a ResNeXt of four of torchvision's bottlenecks, whose 3x3 convolutions are grouped.

    The network of the quick preset is so wide for this data that it does as well with half of
    its inputs. This one is a fortieth of it.
    """

    def block(inputs: int, outputs: int, stride: int) -> Bottleneck:
        planes = outputs // Bottleneck.expansion
        inside = 128 // groups  # which makes the inner convolution half as wide as the outer ones
        shortcut = convolution(inputs, outputs, 1, stride) if inputs != outputs else None
        return Bottleneck(inputs, planes, stride, shortcut, groups, inside)

    return nn.Sequential(
        convolution(1, width, 3, stride=2),
        nn.ReLU(),
        block(width, width, 1),
        block(width, 2 * width, 2),
        block(2 * width, 4 * width, 2),
        block(4 * width, 4 * width, 1),
        classifier(4 * width),
    )


class SeparableBlock(nn.Module):
    """Two depthwise-separable convolutions beside a shortcut, as in Xception."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.separable = nn.Sequential(
            nn.ReLU(),
            convolution(inputs, inputs, 3, groups=inputs),
            convolution(inputs, outputs, 1),
            nn.ReLU(),
            convolution(outputs, outputs, 3, stride, groups=outputs),
            convolution(outputs, outputs, 1),
        )
        plain = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if plain else convolution(inputs, outputs, 1, stride)

    def forward(self, images: Tensor) -> Tensor:
        """Return activations of the next width, at half the resolution if the stride is 2."""
        return self.separable(images) + self.shortcut(images)


def small_xception(width: int = 12) -> nn.Module:
    """Return a network of depthwise convolutions and 1x1 convolutions."""
    return nn.Sequential(
        convolution(1, width, 3, stride=2),
        SeparableBlock(width, 2 * width, 1),
        SeparableBlock(2 * width, 4 * width, 2),
        SeparableBlock(4 * width, 4 * width, 2),
        SeparableBlock(4 * width, 4 * width, 1),
        nn.ReLU(),
        classifier(4 * width),
    )


def small_densenet() -> nn.Module:
    """Return torchvision's DenseNet in small, for one channel of 28x28."""
    model = DenseNet(
        growth_rate=8, block_config=(3, 3, 3), num_init_features=16, bn_size=2, num_classes=CLASSES
    )
    model.features.conv0 = nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False)
    model.features.pool0 = nn.Identity()
    return model


def small_vit() -> nn.Module:
    """Return torchvision's vision transformer in small, over 16 patches of 7x7."""
    model = VisionTransformer(
        image_size=28, patch_size=7, num_layers=3, num_heads=4, hidden_dim=32, mlp_dim=64,
        num_classes=CLASSES,
    )  # fmt: skip
    model.conv_proj = nn.Conv2d(1, 32, 7, stride=7)
    return model


# --- the rows ---

CONVOLUTIONAL = Recipe(epochs=3, batch_size=64, learning_rate=0.1, weight_decay=5e-4, warmup=0.1)
TRANSFORMER = Recipe(epochs=5, batch_size=64, learning_rate=2e-3, weight_decay=0.05, warmup=0.1)


def _task(
    network: str,
    mirrors: str,
    make_model: Callable[[], nn.Module],
    recipe: Recipe = CONVOLUTIONAL,
) -> Task:
    return Task(
        network=network,
        mirrors=mirrors,
        make_model=make_model,
        load_data=first_images,
        loss=loss,
        scores=scores,
        make_optimizer=adamw if recipe is TRANSFORMER else sgd,
        recipe=recipe,
        training_examples=20_000,
        test_examples=10_000,
    )


TASKS = (
    _task("small ResNet", "ResNet-50", small_resnet),
    _task("small ResNeXt", "ResNeXt-101 32x8d", small_resnext),
    _task("small Xception", "Xception", small_xception),
    _task("small DenseNet", "none", small_densenet),
    _task("small ViT", "none", small_vit, TRANSFORMER),
)
