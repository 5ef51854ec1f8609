"""Let layers of a traced model run in whichever kernel is the fastest.

Explained in `06_infer_and_benchmark.ipynb`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from helpers.inference.attention import (
    SelfAttention,
    inline_self_attention_,
    split_self_attention_,
)
from helpers.inference.autotune import Autotuner, Choice
from helpers.inference.kernels import DenseLayer, Epilogue, Kernel, ProductLayer
from helpers.inference.residuals import absorb_additions_, remove_identities_
from helpers.inference.traced import called_module, first_input, is_read, module_calls
from helpers.layers import LayerWeight, is_plain

if TYPE_CHECKING:
    import pandas as pd


class TunedLayer(nn.Module):
    """A layer with several kernels: it runs the one that was chosen for the input's shape.

    Args:
        name: the layer's name in the model.
        kernels: the dense layer first.
        autotuner: chooses among them; without one the last kernel runs.
        refused: why other kernels must not run this layer, by their names.
    """

    def __init__(
        self,
        name: str,
        kernels: Sequence[Kernel],
        autotuner: Autotuner | None,
        refused: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.name, self.autotuner = name, autotuner
        self.by_channels = False  # whether to choose as if all operands were stored by channels
        self.refused = dict(refused or {})
        self.kernels = {kernel.name: kernel for kernel in kernels}
        self.choices: dict[torch.Size, Choice] = {}

    @property
    def epilogue(self) -> Epilogue:
        """What was fused into the layer."""
        return next(iter(self.kernels.values())).epilogue

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        choice = self.choice(input, residual)
        return self.kernels[choice.kernel](input, residual, **choice.algorithm)

    def choice(self, input: Tensor, residual: Tensor | None = None) -> Choice:
        """Return the kernel for inputs of this shape; the first time it is chosen."""
        first = next(iter(self.kernels.values()))
        if residual is not None and not first.fits(input, residual):
            return Choice(first.name, {}, {})  # it is broadcast, which only PyTorch does
        if input.shape not in self.choices:
            self.choices[input.shape] = self._choose(input, residual)
        return self.choices[input.shape]

    def _choose(self, input: Tensor, residual: Tensor | None) -> Choice:
        kernels = list(self.kernels.values())
        if self.autotuner is None:
            return Choice(kernels[-1].name, {}, {})
        if self.by_channels and any(kernel.by_channels for kernel in kernels):
            input = input.contiguous()
            residual = None if residual is None else residual.contiguous()
        return self.autotuner.choose(self.name, kernels, input, residual)


def tune_layers_(
    model: fx.GraphModule,
    kernels: Sequence[type[Kernel]],
    may_replace: Callable[[LayerWeight], bool] = lambda weight: True,
    autotuner: Autotuner | None = None,
    residuals: bool = False,
) -> list[TunedLayer]:
    """Replace the layers that some kernel takes by layers that choose among kernels, in place.

    A ReLU, ReLU6 or hard-swish that follows a layer is taken into it. The model then computes
    the same outputs, and can no longer be trained.

    Args:
        model: as `fold_batch_norm` returns it, already on its device and in its type.
        kernels: those to choose among, beside the dense layer itself.
        may_replace: decides from a layer's weight whether the layer may be replaced.
        autotuner: chooses for each layer; without one the last kernel that takes a layer runs.
        residuals: take the addition of a residual into the layer too; the kernels must do that.

    Returns:
        The new layers, in order of execution.
    """
    tuned: list[TunedLayer] = []
    split_self_attention_(model)
    if residuals:
        inline_self_attention_(model)
        remove_identities_(model)
    # All layers are still plain ones while it is decided what each of them takes in.
    for name, layer, calls in list(_product_layers(model)):
        taking = [kernel for kernel in kernels if kernel.takes(layer)]
        refused = {kernel.name: kernel.why_not(layer) for kernel in taking}
        fitting = [kernel for kernel in taking if not refused[kernel.name]]
        if taking and may_replace(LayerWeight(f"{name}.weight", layer, "weight")):
            add = residuals and absorb_additions_(model, calls)
            epilogue = Epilogue(_absorb_activations_(model, calls, add), add)
            own = [DenseLayer(layer, epilogue), *(kernel(layer, epilogue) for kernel in fitting)]
            reasons = {kernel: reason for kernel, reason in refused.items() if reason}
            tuned.append(TunedLayer(name, own, autotuner, reasons))
    for tuned_layer in tuned:
        model.set_submodule(tuned_layer.name, tuned_layer)
    model.recompile()
    return tuned


def choice_table(layers: Sequence[TunedLayer]) -> "pd.DataFrame":
    """Return one row for each layer and input shape so far: the kernel that was chosen, and why.

    The columns are `layer`, `input` (such as 32x64x56x56), `kernel`, and where they were
    measured the milliseconds of every kernel, under its name; `refused` says why a kernel does
    not run, where one does not.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for layer in layers:
        for shape, choice in layer.choices.items():
            row: dict[str, Any] = {
                "layer": layer.name,
                "input": "x".join(map(str, shape)),
                "kernel": choice.kernel,
                **choice.milliseconds,
            }
            if refused := layer.refused | choice.refused:
                row["refused"] = refused
            rows.append(row)
    return pd.DataFrame(rows, columns=None if rows else ["layer", "input", "kernel"])


def _product_layers(
    model: fx.GraphModule,
) -> Iterator[tuple[str, ProductLayer, list[fx.Node]]]:
    """Yield name, layer and calls of the linear layers and 2-D convolutions, as they execute."""
    for name, calls in module_calls(model).items():
        layer = model.get_submodule(name)
        if isinstance(layer, SelfAttention):
            # Called inside of the attention, where no node of the graph sees their results.
            yield f"{name}.qkv", layer.qkv, []
            yield f"{name}.out", layer.out, []
        elif (
            isinstance(layer, ProductLayer)
            and is_plain(layer, nn.Linear, nn.Conv2d)
            and not is_read(model, name)
        ):
            yield name, layer, calls


_ACTIVATION_MODULES = {nn.ReLU: "ReLU", nn.ReLU6: "ReLU6", nn.Hardswish: "hard-swish"}
_ACTIVATION_FUNCTIONS: dict[Any, str] = {
    F.relu: "ReLU",
    torch.relu: "ReLU",
    F.relu6: "ReLU6",
    F.hardswish: "hard-swish",
}


def _absorb_activations_(model: fx.GraphModule, calls: list[fx.Node], add: bool) -> str:
    """Take the activations after a layer out of the graph, and return which they were.

    That is done if every result of the layer goes into one, of the same kind, and only there.
    """
    if not calls or not all(len(call.users) == 1 for call in calls):
        return ""
    users = [user for call in calls for user in call.users]
    (activation, *others) = {_activation(model, user) for user in users}
    if others or (add and activation == "hard-swish"):  # no kernel for sums of residuals has that
        return ""
    if activation:
        for call, user in zip(calls, users, strict=True):
            user.replace_all_uses_with(call)
            model.graph.erase_node(user)
    return activation


def _activation(model: fx.GraphModule, node: fx.Node) -> str:
    """Return which activation a node is; empty if it is none of those that can be fused."""
    if first_input(node) is None:  # called with a keyword; too rare to follow
        return ""
    module = called_module(model, node)
    if module is not None:
        is_it = is_plain(module, *_ACTIVATION_MODULES)
        return _ACTIVATION_MODULES[type(module)] if is_it else ""
    return _ACTIVATION_FUNCTIONS.get(node.target, "") if node.op == "call_function" else ""
