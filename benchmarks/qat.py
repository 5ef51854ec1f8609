"""What quantisation-aware fine-tuning regains where calibration alone loses accuracy.

The quick preset's network loses nothing in INT8, so this one is made to: narrow inverted residual
blocks, as in MobileNets, whose channels reach very different magnitudes. Training on Fashion-MNIST
for minutes does not produce such channels, so after pruning and retraining each hidden channel is
multiplied by a random factor, and the weights that read it are divided by that factor. The network
computes the same in FP32. Large published networks are like that after training (Nagel et al.,
arXiv 1906.04721, figure 2).

Compared on the whole test set, image by image, in ONNX Runtime: the sparse network in FP32, its
INT8 files after calibration by the smallest and largest number and by percentiles, the INT8 file
after quantisation-aware fine-tuning, and a control that is fine-tuned as long without rounding
and calibrated again. Writes `benchmarks/results/qat_cpu.json`.
"""

import copy
import tempfile
from pathlib import Path

import torch
import typer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from helpers import machine
from helpers.files import write_json
from helpers.inference.activation_ranges import ActivationRanges, activation_ranges
from helpers.inference.export import export_onnx
from helpers.inference.int8_placement import input_scales
from helpers.inference.onnx_session import OnnxSession
from helpers.inference.quantization import quantize_for_tensorrt
from helpers.metrics import Comparison, predictions
from helpers.sparsity import prune_2to4_, verify_onnx
from helpers.sparsity.prune import Masks
from helpers.training.data import Splits, first_images, make_splits
from helpers.training.loop import train
from helpers.training.qat import train_int8
from helpers.training.recipe import Recipe

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "benchmarks" / "results" / "qat_cpu.json"
SHAPE, BATCH, CALIBRATION = (1, 28, 28), 128, 512
DENSE = Recipe(4, BATCH, 0.2, 1e-4, warmup=0.1)
SPARSE = Recipe(2, BATCH, 0.1, 1e-4, warmup=0.1)
FINE_TUNING = Recipe(2, BATCH, 0.01, 1e-4, warmup=0.1)
SPREAD = 1.0  # standard deviation of the logarithm of the channels' factors
PERCENTILES = (99.99, 99.9)


class Block(nn.Module):
    """An inverted residual block: wider by a 1x1 convolution, depthwise 3x3, narrower by a 1x1."""

    def __init__(self, inputs: int, hidden: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.wide, self.wide_norm = nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden)
        self.depth = nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False)
        self.depth_norm = nn.BatchNorm2d(hidden)
        self.narrow = nn.Conv2d(hidden, outputs, 1, bias=False)
        self.narrow_norm = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.relu(self.wide_norm(self.wide(x)))
        hidden = self.relu(self.depth_norm(self.depth(hidden)))
        output = self.narrow_norm(self.narrow(hidden))
        return x + output if self.adds else output

    @torch.no_grad()
    def spread_channels_(self, spread: float, generator: torch.Generator) -> None:
        """Give the hidden channels other magnitudes, in place; the block computes the same."""
        for norm, reader, dim in (
            (self.wide_norm, self.depth, 0),
            (self.depth_norm, self.narrow, 1),
        ):
            factors = torch.exp(spread * torch.randn(norm.num_features, generator=generator))
            norm.weight.mul_(factors)
            norm.bias.mul_(factors)
            shape = [1, 1, 1, 1]
            shape[dim] = -1
            reader.weight.div_(factors.view(shape))


def small_mobilenet() -> nn.Module:
    """Return the network: 3 blocks, 29 k parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        Block(16, 64, 24, 2), Block(24, 96, 24, 1), Block(24, 96, 40, 2),
        nn.Conv2d(40, 128, 1, bias=False), nn.BatchNorm2d(128), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip


def sparse_network(splits: Splits, folder: Path) -> tuple[nn.Module, Masks]:
    """Return the network trained, pruned 2:4 and retrained, and its masks."""
    torch.manual_seed(0)
    model = small_mobilenet()
    train(model, splits, DENSE, 0, progress_file=folder / "dense.pt")
    masks = prune_2to4_(model)
    train(model, splits, SPARSE, 0, masks, progress_file=folder / "sparse.pt")
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, Block):
            layer.spread_channels_(SPREAD, generator)
    return model.eval(), masks


def right_answers(path: Path, loader: DataLoader) -> Tensor:
    """Return for each image whether a file classifies it correctly in ONNX Runtime."""
    session, right = OnnxSession(path), []
    for images, labels in loader:
        (logits,) = session.run(images.numpy(), ["logits"])
        right.append(predictions(torch.from_numpy(logits)) == labels)
    return torch.cat(right)


def compared(first: Tensor, second: Tensor) -> dict[str, float]:
    """Return how much more accurate the second is, in points, with its standard error."""
    both = Comparison(int((first & ~second).sum()), int((second & ~first).sum()), len(first))
    return {
        "difference": round(both.difference, 2),
        "standard_error": round(both.standard_error, 2),
        "only_first": both.only_first,
        "only_second": both.only_second,
    }


class Files:
    """The models of the comparison as files, and which test images each gets right."""

    def __init__(self, folder: Path, splits: Splits) -> None:
        self.folder, self.splits = folder, splits
        self.images, _ = first_images(splits.train, CALIBRATION)
        self.right: dict[str, Tensor] = {}

    def export(self, name: str, model: nn.Module) -> Path:
        """Write a model in FP32 and evaluate it."""
        path = export_onnx(model, self.folder / f"{name}.onnx", SHAPE)
        self._evaluate(name, path)
        return path

    def quantize(
        self,
        name: str,
        source: Path,
        percentile: float | None = None,
        ranges: ActivationRanges | None = None,
    ) -> tuple[Path, ActivationRanges]:
        """Write a file in INT8 and evaluate it; calibrate it if there are no ranges."""
        ranges = ranges or activation_ranges(source, self.images, percentile)
        path = self.folder / f"{name}.onnx"
        quantize_for_tensorrt(source, path, ranges, expect_sparse=True)
        self._evaluate(name, path)
        return path, ranges

    def _evaluate(self, name: str, path: Path) -> None:
        self.right[name] = right_answers(path, self.splits.test)
        print(f"{name}: {100 * self.right[name].float().mean():.2f} %", flush=True)


def main(work: Path | None = None) -> None:
    """Train, quantise and compare, and write the result.

    Args:
        work: folder to keep the progress of the trainings in, for a later run.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = work or Path(name)
        folder.mkdir(exist_ok=True)
        result = measure(folder)
    write_json(RESULT, result)


def measure(folder: Path) -> dict[str, object]:
    """Return the result."""
    splits = make_splits("FashionMNIST", ROOT / "data", 5000, BATCH, 500)
    model, masks = sparse_network(splits, folder)
    files = Files(folder, splits)
    reference = files.export("sparse FP32", model)
    calibrated = {
        "INT8, smallest and largest": files.quantize("INT8, smallest and largest", reference)
    }
    for percentile in PERCENTILES:
        way = f"INT8, percentile {percentile}"
        calibrated[way] = files.quantize(way, reference, percentile)
    best = max(calibrated, key=lambda way: int(files.right[way].sum()))
    path, ranges = calibrated[best]

    trained = copy.deepcopy(model)
    epochs = train_int8(
        trained, input_scales(path), splits, FINE_TUNING, 0, masks, folder / "qat.pt"
    )
    source = files.export("fine-tuned for INT8, FP32", trained)
    int8, _ = files.quantize("fine-tuned for INT8", source, ranges=ranges)

    control = copy.deepcopy(model)
    train(control, splits, FINE_TUNING, 0, masks, folder / "control.pt")
    source = files.export("fine-tuned without rounding, FP32", control)
    same = None if "largest" in best else float(best.rpartition(" ")[2])
    files.quantize("fine-tuned without rounding, INT8", source, same)

    table = verify_onnx(int8)
    right = files.right
    return {
        "what": "top-1 in per cent on the 10,000 test images of Fashion-MNIST, in ONNX Runtime. "
        "against_fp32: paired difference in points from the sparse network in FP32. "
        "best_calibration: the most accurate of the calibrated files, whose scales the fine-tuning "
        "keeps; chosen on the test set, in favour of calibration",
        "command": "python benchmarks/qat.py",
        "network": f"small MobileNet, channels spread by exp({SPREAD} * normal)",
        "recipes": {"dense": str(DENSE), "sparse": str(SPARSE), "fine_tuning": str(FINE_TUNING)},
        "calibration_images": CALIBRATION,
        "top1": {name: round(100 * float(own.float().mean()), 2) for name, own in right.items()},
        "against_fp32": {
            name: compared(right["sparse FP32"], own)
            for name, own in right.items()
            if name != "sparse FP32"
        },
        "best_calibration": best,
        "regained": compared(right[best], right["fine-tuned for INT8"]),
        "against_control": compared(
            right["fine-tuned without rounding, INT8"], right["fine-tuned for INT8"]
        ),
        "weights_2to4": f"{int(table.is_2to4.sum())} of {int(table.eligible.sum())} eligible",
        "validation_by_epoch": [epoch.validation for epoch in epochs],
        **machine.provenance(),
    }


if __name__ == "__main__":
    typer.run(main)
