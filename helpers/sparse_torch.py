"""Run a 2:4 network in PyTorch on Sparse Tensor Cores, with cuSPARSELt.

A 1x1 convolution over channels-last images multiplies a matrix (pixels, channels) by
its weight, as a linear layer does, and for that product cuSPARSELt has sparse kernels.
Each layer keeps whichever of its kernels is the fastest at the batch it meets; if a dense
network is faster still than the network of these, that one runs.
Explained in `06_infer_and_benchmark.ipynb`.
"""

import copy
import inspect
import json
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from helpers import cuda_graphs, machine
from helpers.artifacts import write_json
from helpers.layers import LayerWeight, is_plain
from helpers.onnx_export import is_read
from helpers.runners import Prepared, RunnerError, TorchRunner
from helpers.settings import relative
from helpers.sparsity import is_2to4
from helpers.sparsity.eligibility import why_not_sparse

# --- the ways to compute one layer ---


class Kernel(ABC):
    """One way to compute a layer, and the ReLU that follows it where `relu` says so."""

    name: str

    def __init__(self, layer: nn.Linear | nn.Conv2d, relu: bool) -> None:
        self.layer, self.relu = layer, relu

    @abstractmethod
    def __call__(self, input: Tensor, **algorithm: int) -> Tensor:
        """Return what the layer returns for an input."""

    def search(self, input: Tensor) -> dict[str, int]:
        """Return the arguments with which this kernel is the fastest for an input's shape."""
        return {}


class DenseLayer(Kernel):
    """The layer as PyTorch runs it: a convolution stays one."""

    name = "dense layer"

    def __call__(self, input: Tensor, **algorithm: int) -> Tensor:
        output = self.layer(input)
        return output.relu_() if self.relu else output


class Gemm(Kernel):
    """The layer as a product of matrices, (pixels, in) by (in, out), in channels-last."""

    def __init__(self, layer: nn.Linear | nn.Conv2d, relu: bool) -> None:
        super().__init__(layer, relu)
        self.weight = layer.weight.detach().flatten(1)
        self.bias = None if layer.bias is None else layer.bias.detach()

    @abstractmethod
    def multiply(self, rows: Tensor, **algorithm: int) -> Tensor:
        """Return the product (rows, out) for rows (rows, in), with bias and ReLU."""

    def __call__(self, input: Tensor, **algorithm: int) -> Tensor:
        pixels = self._channels_last(input)
        product = self.multiply(self._rows(pixels), **algorithm)
        output = product.view(*pixels.shape[:-1], len(self.weight))
        return output.movedim(-1, -3) if isinstance(self.layer, nn.Conv2d) else output

    def _channels_last(self, input: Tensor) -> Tensor:
        """Return the pixels that the layer looks at, with the channels as the last dimension."""
        if isinstance(self.layer, nn.Linear):
            return input
        down, right = self.layer.stride
        return input[..., ::down, ::right].movedim(-3, -1)

    def _rows(self, pixels: Tensor) -> Tensor:
        return pixels.reshape(-1, pixels.shape[-1])


class DenseGemm(Gemm):
    """The product with the dense weight; it runs on a CPU too."""

    name = "dense GEMM"

    def multiply(self, rows: Tensor, **algorithm: int) -> Tensor:
        if self.relu and self.bias is not None:
            return torch._addmm_activation(self.bias, rows, self.weight.t(), use_gelu=False)
        product = F.linear(rows, self.weight, self.bias)
        return product.relu_() if self.relu else product


def search_algorithm(
    compressed: Tensor,
    columns: Tensor,
    bias: Tensor | None = None,
    output: torch.dtype | None = None,
) -> dict[str, int]:
    """Return the arguments with which `torch._cslt_sparse_mm` is the fastest for a product.

    Args:
        compressed: the sparse matrix, as `torch._cslt_compress` returns it.
        columns: what it is multiplied by.
        bias: one number for each row of the sparse matrix.
        output: type of the product, where it is not that of the matrices.
    """
    found = torch._C._cusparselt.mm_search(compressed, columns, bias, None, output, True)
    # A fourth number comes last: how many kernels there were to choose from.
    return dict(zip(("alg_id", "split_k", "split_k_mode"), found, strict=False))


class SparseGemm(Gemm):
    """The product with the compressed 2:4 weight, by cuSPARSELt, in FP16 or BF16.

    Source: `torch.sparse.semi_structured`, for layouts and limits of the shapes.
    """

    name = "sparse GEMM"
    STEP = 8  # cuSPARSELt takes rows in multiples of eight

    def __init__(self, layer: nn.Linear | nn.Conv2d, relu: bool) -> None:
        super().__init__(layer, relu)
        self.compressed = torch._cslt_compress(self.weight.contiguous())

    def _rows(self, pixels: Tensor) -> Tensor:
        # PyTorch's binding tells row-major from column-major, and ignores any other strides.
        return super()._rows(pixels).contiguous()

    def multiply(self, rows: Tensor, **algorithm: int) -> Tensor:
        # cuSPARSELt has the sparse matrix on the left: y^T = W x^T, written transposed.
        product = torch._cslt_sparse_mm(
            self.compressed,
            self._padded(rows).t(),
            bias=self.bias,
            transpose_result=True,
            **algorithm,
        )[: len(rows)]
        # It could fuse the ReLU as well, but PyTorch's binding has no argument for it.
        return product.relu_() if self.relu else product

    def search(self, input: Tensor) -> dict[str, int]:
        rows = self._padded(self._rows(self._channels_last(input)))
        return search_algorithm(self.compressed, rows.t(), self.bias)

    def _padded(self, rows: Tensor) -> Tensor:
        missing = -len(rows) % self.STEP
        return F.pad(rows, (0, 0, 0, missing)) if missing else rows


BACKENDS: dict[str, tuple[type[Gemm], ...]] = {
    "dense": (DenseGemm,),
    "cusparselt": (DenseGemm, SparseGemm),
}

# --- which of them is the fastest ---

Timer = Callable[[Sequence[Callable[[], Tensor]]], list[float]]

NOISE = 0.02  # a kernel that wins by less than this share of the time has not won
TOLERANCE = 10  # roundings of the largest output that two kernels may differ by


@dataclass(frozen=True)
class Choice:
    """The kernel of one layer for one input shape, with what was measured."""

    kernel: str
    algorithm: dict[str, int]
    milliseconds: dict[str, float]  # by kernel
    refused: dict[str, str] = field(default_factory=dict)  # why a kernel does not run, by kernel


class Autotuner:
    """Chooses among the kernels of a layer by timing them, and remembers.

    Args:
        timer: returns the milliseconds that each of several calls takes.
        cache: JSON file to keep the choices in; without one they last as long as this
            object. Its keys name GPU, version of PyTorch, type and shapes.
    """

    def __init__(self, timer: Timer, cache: Path | None = None) -> None:
        self.timer, self.cache = timer, cache
        self.choices: dict[str, Choice] = {}
        self.where = machine.gpu().get("gpu", machine.cpu_name())

    def choose(self, layer: str, kernels: Sequence[Kernel], input: Tensor) -> Choice:
        """Return the fastest of the kernels of one layer for an input.

        The first kernel is the dense layer, which stays unless another beats it by more
        than noise. A kernel that does not run for this input is left out, and the choice
        says why.

        Args:
            layer: name of the layer, for errors.
            kernels: at least one.
            input: what the layer is called with, real numbers of the right shape.

        Raises:
            RunnerError: the memory is short, a kernel gives other numbers than the first, or
                the cache cannot be read.
        """
        key = f"{self.where}, torch {torch.__version__}, {_describe(kernels, input)}"
        if key not in self.choices:
            self.choices |= self._read()  # another runner may have measured it meanwhile
        if key not in self.choices:
            self.choices[key] = self._measure(layer, kernels, input)
            if self.cache is not None:
                write_json(self.cache, self.choices)
        return self.choices[key]

    def _measure(self, layer: str, kernels: Sequence[Kernel], input: Tensor) -> Choice:
        dense, *others = kernels
        calls, refused = {dense.name: partial(dense, input)}, {}
        reference = dense(input)
        for kernel in others:
            try:
                algorithm = _search(layer, kernel, input, reference)
                calls[kernel.name] = partial(kernel, input, **algorithm)
            except torch.OutOfMemoryError as error:
                raise RunnerError(
                    f"{layer}: memory is short for the {kernel.name} and an input of shape "
                    f"{tuple(input.shape)}; use a smaller batch."
                ) from error
            except RuntimeError as error:  # a library that does not take this shape
                refused[kernel.name] = str(error)
        times = dict(zip(calls, self.timer(list(calls.values())), strict=True))
        best = min(times, key=times.get)
        if times[best] >= (1 - NOISE) * times[dense.name]:
            best = dense.name
        return Choice(best, calls[best].keywords, times, refused)

    def _read(self) -> dict[str, Choice]:
        if self.cache is None or not self.cache.exists():
            return {}
        try:
            entries = json.loads(self.cache.read_text())
            return {key: Choice(**entry) for key, entry in entries.items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise RunnerError(
                f"{relative(self.cache)} does not hold choices of kernels ({error}). "
                "Delete it; they will be measured again."
            ) from error


def _describe(kernels: Sequence[Kernel], input: Tensor) -> str:
    """Return all that the speed of a layer's kernels depends on, but for the machine."""
    layer, relu = kernels[0].layer, kernels[0].relu
    size = "x".join(map(str, input.shape))
    parts = [f"{str(input.dtype).removeprefix('torch.')} {size}"]
    parts.append(f"to {len(layer.weight)} channels")
    if isinstance(layer, nn.Conv2d):
        parts.append("stride {}x{}".format(*layer.stride))
    parts += ["bias"] * (layer.bias is not None) + ["ReLU"] * relu
    return ", ".join(parts) + ": " + " or ".join(kernel.name for kernel in kernels)


def _search(layer: str, kernel: Kernel, input: Tensor, reference: Tensor) -> dict[str, int]:
    """Return a kernel's best arguments for an input, if it then gives the right numbers."""
    algorithm = kernel.search(input)
    if not _agree(kernel(input, **algorithm), reference):
        raise RunnerError(
            f"{layer}: the {kernel.name} does not give the numbers of the dense layer, or they "
            "are not finite. If the network gives finite numbers in PyTorch, this kernel cannot "
            f"be trusted with PyTorch {torch.__version__}: use another version."
        )
    return algorithm


def _agree(output: Tensor, reference: Tensor) -> bool:
    # FP32 convolutions run in TF32 on a GPU, which rounds as FP16 does.
    rounding = max(torch.finfo(output.dtype).eps, torch.finfo(torch.float16).eps)
    output, reference = output.float(), reference.float()
    # A NaN compares as false.
    return bool((output - reference).abs().max() <= TOLERANCE * rounding * reference.abs().max())


def median_times(calls: Sequence[Callable[[], Tensor]]) -> list[float]:
    """Return the median GPU time of each call in milliseconds, measured in turns."""
    return cuda_graphs.medians(cuda_graphs.time_calls(calls))


# --- a network of them ---


class TunedLayer(nn.Module):
    """A layer with several kernels: it runs the one that was chosen for the input's shape.

    Args:
        name: the layer's name in the network.
        kernels: the dense layer first.
        autotuner: chooses among them; without one the last kernel runs.
    """

    def __init__(self, name: str, kernels: Sequence[Kernel], autotuner: Autotuner | None) -> None:
        super().__init__()
        self.name, self.autotuner = name, autotuner
        self.kernels = {kernel.name: kernel for kernel in kernels}
        self.choices: dict[torch.Size, Choice] = {}

    def forward(self, input: Tensor) -> Tensor:
        if input.shape not in self.choices:
            self.choices[input.shape] = self._choose(input)
        choice = self.choices[input.shape]
        return self.kernels[choice.kernel](input, **choice.algorithm)

    def _choose(self, input: Tensor) -> Choice:
        kernels = list(self.kernels.values())
        if self.autotuner is None:
            return Choice(kernels[-1].name, {}, {})
        return self.autotuner.choose(self.name, kernels, input)


class SelfAttention(nn.Module):
    """Multi-head self-attention as two linear layers around the attention itself.

    It computes what `attention` does in evaluation mode, and shares its weights.

    Args:
        attention: one for which `_is_self_attention` holds wherever it is called.
    """

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads
        self.qkv = _linear(attention.in_proj_weight, attention.in_proj_bias)
        self.out = _linear(attention.out_proj.weight, attention.out_proj.bias)

    def forward(self, query: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
        split = self.qkv(query).unflatten(-1, (3, self.heads, -1))  # ..., token, 3, head, width
        mixed = F.scaled_dot_product_attention(*split.movedim(-3, 0).transpose(-3, -2))
        return self.out(mixed.transpose(-3, -2).flatten(-2)), None


def _linear(weight: nn.Parameter, bias: nn.Parameter | None) -> nn.Linear:
    """Return a linear layer of parameters that exist."""
    layer = nn.Linear(*reversed(weight.shape), bias=bias is not None, device="meta")
    layer.weight, layer.bias = weight, bias
    return layer


def _is_self_attention(layer: nn.MultiheadAttention, calls: Sequence[fx.Node]) -> bool:
    """Return whether attention is always that of one batch of sequences to itself, unmasked."""
    if not layer.batch_first or layer.in_proj_weight is None:
        return False
    if layer.bias_k is not None or layer.add_zero_attn:
        return False
    for call in calls:
        given = dict(zip(ATTENTION_ARGUMENTS, call.args, strict=False)) | call.kwargs
        own = {given.get(name) for name in ("query", "key", "value")}
        masked = any(given.get(name) is not None for name in ("key_padding_mask", "attn_mask"))
        if len(own) > 1 or masked or given.get("need_weights", True):
            return False
    return True


ATTENTION_ARGUMENTS = tuple(inspect.signature(nn.MultiheadAttention.forward).parameters)[1:]


def use_gemms_(
    folded: fx.GraphModule, backend: str = "cusparselt", autotuner: Autotuner | None = None
) -> list[TunedLayer]:
    """Let the layers of a network that are matrix products run as such, in place.

    These are linear layers, 1x1 convolutions and the projections of self-attention, of the
    shapes that cuSPARSELt takes. A ReLU that follows is taken into the layer; all other
    layers stay as they are. The network then computes the same outputs, and can no longer
    be trained.

    Args:
        folded: as `fold_batch_norm` returns it, already on its device and in its type.
        backend: `cusparselt`, where weights that are not 2:4 still get a dense product;
            or `dense`, which runs anywhere and is the fair control.
        autotuner: chooses for each layer; without one every layer is a GEMM, a sparse one
            where it can be.

    Returns:
        The new layers, in order of execution.

    Raises:
        RunnerError: there is no such backend, or no layer that it could run.

    Explained in `06_infer_and_benchmark.ipynb`.
    """
    if backend not in BACKENDS:
        raise RunnerError(f"There is no backend {backend!r}; there are {', '.join(BACKENDS)}.")
    tuned = []
    for name, calls in _linear_calls_(folded):
        layer = folded.get_submodule(name)
        if _is_product(name, layer):
            relu = _absorb_relus_(folded, calls)
            gemms = [kind(layer, relu) for kind in BACKENDS[backend] if _takes(kind, layer)]
            tuned.append(TunedLayer(name, [DenseLayer(layer, relu), *gemms], autotuner))
            folded.set_submodule(name, tuned[-1])
    folded.recompile()
    wanted = BACKENDS[backend][-1].name
    if not any(wanted in layer.kernels for layer in tuned):
        raise RunnerError(
            f"No layer of the network can run as a {wanted}: it takes linear layers and 1x1 "
            "convolutions with channels in sixteens, and for a sparse one 2:4 weights. "
            "Run 02_prune_2_4.ipynb first, or prune the network with prune_2to4_."
        )
    return tuned


def _linear_calls_(network: fx.GraphModule) -> Iterator[tuple[str, list[fx.Node]]]:
    """Yield each module's name and calls; self-attention is replaced by ours, in its two parts."""
    for name, calls in _calls(network).items():
        layer = network.get_submodule(name)
        if is_plain(layer, nn.MultiheadAttention) and _is_self_attention(layer, calls):
            network.set_submodule(name, SelfAttention(layer))
            yield f"{name}.qkv", []
            yield f"{name}.out", []
        elif not is_read(network, name):
            yield name, calls


def _calls(network: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """Return where each module is called, by its name."""
    calls = defaultdict(list)
    for node in network.graph.nodes:
        if node.op == "call_module":
            calls[node.target].append(node)
    return calls


def _is_product(name: str, layer: nn.Module) -> bool:
    """Return whether a layer is a product of matrices, in a shape that cuSPARSELt takes."""
    if not is_plain(layer, nn.Linear, nn.Conv2d):
        return False
    if isinstance(layer, nn.Conv2d) and layer.padding not in ((0, 0), "valid", "same"):
        return False
    return not why_not_sparse(LayerWeight(f"{name}.weight", layer, "weight"), "cusparselt")


def _takes(kind: type[Gemm], layer: nn.Module) -> bool:
    return kind is not SparseGemm or is_2to4(layer.weight)


def _absorb_relus_(network: fx.GraphModule, calls: list[fx.Node]) -> bool:
    """Take the ReLUs out of the graph if each result of a layer goes into one, and only there."""
    if not all(len(call.users) == 1 for call in calls):
        return False
    users = [user for call in calls for user in call.users]
    if not users or not all(_is_relu(network, user) for user in users):
        return False
    for relu in users:
        relu.replace_all_uses_with(relu.args[0])
        network.graph.erase_node(relu)
    return True


def _is_relu(network: fx.GraphModule, node: fx.Node) -> bool:
    if not node.args:  # called with a keyword; too rare to follow
        return False
    if node.op == "call_module":
        return is_plain(network.get_submodule(node.target), nn.ReLU)
    return node.op == "call_function" and node.target in (F.relu, torch.relu)


def why_no_sparse_gemms() -> str:
    """Return in one sentence why sparse GEMMs cannot run on this machine; empty if they can."""
    if not torch.cuda.is_available():
        return "No NVIDIA GPU was found, so cuSPARSELt's sparse matrix products cannot run here."
    if torch.cuda.get_device_capability() < (8, 0):
        return (
            f"{torch.cuda.get_device_name()} has no Sparse Tensor Cores, which came with compute "
            "capability 8.0."
        )
    if not torch.backends.cusparselt.is_available():
        return (
            f"PyTorch {torch.__version__} was built without cuSPARSELt; install the CUDA build "
            "from pytorch.org."
        )
    return ""


class SparseTorchRunner(TorchRunner):
    """PyTorch with sparse matrix products where they are the fastest.

    On a GPU each batch size is prepared when it is first loaded, on these images: every
    layer's kernels are timed, then the network of the fastest ones takes turns with the dense
    networks, and the fastest of all is kept. On a CPU nothing is timed.

    Args:
        model: a network pruned 2:4; it is not changed.
        backend: `cusparselt`, or `dense` for the same road without sparsity, on a CPU too.
        dtype: FP16 on a GPU and FP32 on a CPU unless it is given; `cusparselt` takes
            FP16 and BF16.
        cache: JSON file for the choices of kernels, so that they are measured once.
        compile: let `torch.compile` fuse what is between the products, such as residual
            additions with their ReLU; as `TorchRunner` takes it.

    Raises:
        RunnerError: the backend does not run here or not in this type, or the network has
            no layer for it; later on, a kernel gives wrong numbers, or the network cannot
            be captured.

    Explained in `06_infer_and_benchmark.ipynb`.
    """

    def __init__(
        self,
        model: nn.Module,
        backend: str = "cusparselt",
        dtype: torch.dtype | None = None,
        cache: Path | None = None,
        compile: bool = False,
    ) -> None:
        if backend == "cusparselt":
            _require_cusparselt(dtype)
        super().__init__(model, dtype, compile)
        self.name += f", {backend}"
        autotuner = Autotuner(median_times, cache) if self.on_gpu else None
        self.networks = {"layers": self.model}
        for name in dict.fromkeys(("dense", backend)):
            # Another graph over the same layers: use_gemms_ replaces them in this one alone.
            self.networks[name] = fx.GraphModule(self.model, copy.deepcopy(self.model.graph))
            self.layers = use_gemms_(self.networks[name], name, autotuner)
        self.backend = backend
        self.milliseconds: dict[torch.Size, dict[str, float]] = {}

    def prepare(self, images: Tensor) -> Prepared:
        if not self.on_gpu:
            return self.made_ready(self.networks[self.backend], images)
        ready = {}
        for name, network in self.networks.items():
            network(images)  # every layer meets its input and chooses
            ready[name] = self.made_ready(network, images)
        # Layers that win alone can still lose together, by what the dense ones are fused with.
        times = cuda_graphs.time_graphs([each.graph for each in ready.values()], rounds=5)
        self.milliseconds[images.shape] = dict(zip(ready, cuda_graphs.medians(times), strict=True))
        return ready[self.fastest(images.shape)]

    def fastest(self, shape: torch.Size) -> str:
        """Return which network runs images of a shape that was loaded on a GPU.

        It is `layers`, every layer as it came; `dense`, each the faster of that and its dense
        product; or `cusparselt`, each the fastest of these two and its sparse product.
        """
        times = self.milliseconds[shape]
        return min(times, key=times.get)

    def choices(self) -> pd.DataFrame:
        """Return one row for each layer and input shape so far: which kernel is its fastest.

        The columns are `layer`, `input` (such as 32x64x56x56), `kernel`, and on a GPU the
        milliseconds of every kernel, under its name; `refused` says why a kernel does not run,
        where one does not. Whether the network of these kernels is the fastest, and is
        therefore run, tells `contest`.
        """
        rows = [
            {
                "layer": layer.name,
                "input": "x".join(map(str, shape)),
                "kernel": choice.kernel,
                **choice.milliseconds,
                **({"refused": choice.refused} if choice.refused else {}),
            }
            for layer in self.layers
            for shape, choice in layer.choices.items()
        ]
        return pd.DataFrame(rows, columns=None if rows else ["layer", "input", "kernel"])

    def contest(self) -> pd.DataFrame:
        """Return one row for each input shape so far: how fast each network is, and which runs.

        The columns are `input`, the milliseconds of each network under its name, as `fastest`
        explains them, and `runs`. Without a GPU there are no rows.
        """
        rows = [
            {"input": "x".join(map(str, shape)), **times, "runs": self.fastest(shape)}
            for shape, times in self.milliseconds.items()
        ]
        return pd.DataFrame(rows, columns=["input", *self.networks, "runs"])


def _require_cusparselt(dtype: torch.dtype | None) -> None:
    if reason := why_no_sparse_gemms():
        raise RunnerError(f"{reason} With backend='dense' the network runs in dense products.")
    if dtype not in (None, torch.float16, torch.bfloat16):
        raise RunnerError(
            f"cuSPARSELt does not run in {dtype} here; use torch.float16 or torch.bfloat16."
        )
