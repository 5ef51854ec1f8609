"""Let layers of a traced model run in whichever kernel is the fastest.

Explained in `06_infer_and_benchmark.ipynb`.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from helpers.inference.attention import SelfAttention, split_self_attention_
from helpers.inference.autotune import Autotuner, Choice
from helpers.inference.kernels import DenseLayer, Epilogue, Kernel, ProductLayer
from helpers.inference.traced import called_module, first_input, is_read, module_calls
from helpers.layers import LayerWeight, is_plain


class TunedLayer(nn.Module):
    """A layer with several kernels: it runs the one that was chosen for the input's shape.

    Args:
        name: the layer's name in the model.
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


def tune_layers_(
    model: fx.GraphModule,
    kernels: Sequence[type[Kernel]],
    may_replace: Callable[[LayerWeight], bool] = lambda weight: True,
    autotuner: Autotuner | None = None,
) -> list[TunedLayer]:
    """Replace the layers that some kernel takes by layers that choose among kernels, in place.

    A ReLU that follows a layer is taken into it. The model then computes the same outputs, and
    can no longer be trained.

    Args:
        model: as `fold_batch_norm` returns it, already on its device and in its type.
        kernels: those to choose among, beside the dense layer itself.
        may_replace: decides from a layer's weight whether the layer may be replaced.
        autotuner: chooses for each layer; without one the last kernel that takes a layer runs.

    Returns:
        The new layers, in order of execution.
    """
    tuned = []
    split_self_attention_(model)
    for name, layer, calls in _product_layers(model):
        fitting = [kernel for kernel in kernels if kernel.takes(layer)]
        if fitting and may_replace(LayerWeight(f"{name}.weight", layer, "weight")):
            epilogue = Epilogue(relu=_absorb_relus_(model, calls))
            own = [kernel(layer, epilogue) for kernel in fitting]
            tuned.append(TunedLayer(name, [DenseLayer(layer, epilogue), *own], autotuner))
            model.set_submodule(name, tuned[-1])
    model.recompile()
    return tuned


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


def _absorb_relus_(model: fx.GraphModule, calls: list[fx.Node]) -> bool:
    """Take the ReLUs out of the graph if every result of a layer goes into one and only there."""
    if not calls or not all(len(call.users) == 1 for call in calls):
        return False
    users = [user for call in calls for user in call.users]
    if not all(_is_relu(model, user) for user in users):
        return False
    for call, relu in zip(calls, users, strict=True):
        relu.replace_all_uses_with(call)
        model.graph.erase_node(relu)
    return True


def _is_relu(model: fx.GraphModule, node: fx.Node) -> bool:
    if first_input(node) is None:  # called with a keyword; too rare to follow
        return False
    module = called_module(model, node)
    if module is not None:
        return is_plain(module, nn.ReLU)
    return node.op == "call_function" and node.target in (F.relu, torch.relu)
