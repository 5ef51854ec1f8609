"""Run a 2:4 network in PyTorch on Sparse Tensor Cores, with cuSPARSELt.

A 1x1 convolution over channels-last images multiplies a matrix (pixels, channels) by
its weight, as a linear layer does, and for that product cuSPARSELt has sparse kernels.
Each layer keeps whichever of its kernels is the fastest at the batch it meets; if a dense
network is faster still than the network of these, that one runs.
Explained in `06_infer_and_benchmark.ipynb`.
"""

import copy
import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from helpers.inference import cuda_graphs
from helpers.inference.autotune import Autotuner, Choice, median_times
from helpers.inference.cusparselt import SparseGemm, why_no_sparse_gemms
from helpers.inference.fold import is_read
from helpers.inference.kernels import DenseGemm, DenseLayer, Gemm, Kernel
from helpers.inference.runners import Prepared, RunnerError, TorchRunner
from helpers.layers import LayerWeight, is_plain
from helpers.sparsity import is_2to4
from helpers.sparsity.eligibility import why_not_sparse

BACKENDS: dict[str, tuple[type[Gemm], ...]] = {
    "dense": (DenseGemm,),
    "cusparselt": (DenseGemm, SparseGemm),
}


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

    def kernel_choices(self) -> pd.DataFrame:
        """Return one row for each layer and input shape so far: which kernel is its fastest.

        The columns are `layer`, `input` (such as 32x64x56x56), `kernel`, and on a GPU the
        milliseconds of every kernel, under its name; `refused` says why a kernel does not run,
        where one does not. Whether the network of these kernels is the fastest, and is
        therefore run, tells `network_times`.
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

    def network_times(self) -> pd.DataFrame:
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
