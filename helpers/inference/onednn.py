"""Dense layers and pooling on a CPU as oneDNN runs them at its best.

PyTorch calls a layer with the weight as the model holds it. On a CPU that often means to
rearrange the weight in every call, or on processors not made by Intel a kernel several times
slower than the best. oneDNN's own calls take a weight that was rearranged once, and do what
follows the layer while they write. Compared with sparse layers in
`06_infer_and_benchmark.ipynb`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from helpers.inference.kernels import Call, CpuKernel, ProductLayer
from helpers.inference.traced import called_module
from helpers.layers import is_plain

# Our activations by oneDNN's names, with their parameters.
_ONEDNN: dict[str, tuple[str, list[float]]] = {
    "": ("none", []),
    "ReLU": ("relu", []),
    "ReLU6": ("hardtanh", [0.0, 6.0]),
    "hard-swish": ("hardswish", []),
}


class OneDnn(CpuKernel):
    """The layer in oneDNN with its weight in oneDNN's order; convolutions are channels-last."""

    name = "oneDNN"

    @classmethod
    def takes(cls, layer: ProductLayer) -> bool:
        if not is_plain(layer, nn.Linear, nn.Conv2d) or not torch.backends.mkldnn.is_available():
            return False
        if layer.weight.dtype != torch.float32 or layer.weight.device.type != "cpu":
            return False
        if isinstance(layer, nn.Linear):
            return True
        return layer.padding_mode == "zeros" and not isinstance(layer.padding, str)

    def for_shape(self, shape: torch.Size, out: Tensor | None = None) -> Call:
        layer = self.layer
        return self._conv(layer, shape) if isinstance(layer, nn.Conv2d) else self._linear(shape)

    def _conv(self, conv: nn.Conv2d, shape: torch.Size) -> Call:
        geometry: list[Any] = [conv.padding, conv.stride, conv.dilation, conv.groups]
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight  # its stub lacks the last argument
        weight = reorder(conv.weight.detach().to_mkldnn(), *geometry, list(shape))
        bias, operator = conv.bias, torch.ops.mkldnn._convolution_pointwise
        epilogue, then = self.epilogue, _ONEDNN[self.epilogue.activation]
        # After an addition PyTorch lets oneDNN compute a ReLU, and nothing else.
        relu = "relu" if epilogue.activation == "ReLU" else None

        def call(input: Tensor, residual: Tensor | None = None) -> Tensor:
            if residual is None:
                return operator.default(input, weight, bias, *geometry, *then, "")
            output = operator.binary(
                input, residual, weight, bias, *geometry, "add", 1.0, relu, [], ""
            )
            return output if relu else epilogue.activate_(output)

        return call

    def _linear(self, shape: torch.Size) -> Call:
        assert isinstance(self.layer, nn.Linear)
        bias, epilogue = self.layer.bias, self.epilogue
        tokens = shape[:-1].numel()
        weight = torch.ops.mkldnn._reorder_linear_weight(self.layer.weight.detach(), tokens)
        operator = torch.ops.mkldnn._linear_pointwise
        then = _ONEDNN[epilogue.activation]

        def call(input: Tensor, residual: Tensor | None = None) -> Tensor:
            if residual is None:
                return operator.default(input, weight, bias, *then, "")
            return epilogue.activate_(operator.binary(input, residual, weight, bias, "add"))

        return call


def pool_channels_last_(model: fx.GraphModule) -> None:
    """Let 2-D pooling run channels-last, in place: there PyTorch uses the processor's vectors.

    Over images stored channel by channel the same pooling takes ten times as long.
    """
    for node in model.graph.nodes:
        module = called_module(model, node)
        if module is not None and is_plain(module, nn.MaxPool2d, nn.AvgPool2d):
            model.set_submodule(str(node.target), _ChannelsLast(module))
        elif node.op == "call_function" and node.target in (F.max_pool2d, F.avg_pool2d):
            node.args, node.kwargs = (node.target, *node.args), dict(node.kwargs)
            node.target = _channels_last
    model.recompile()


class _ChannelsLast(nn.Module):
    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, input: Tensor) -> Any:
        return _channels_last(self.pool, input)


def _channels_last(pool: Callable[..., Any], input: Tensor, *args: Any, **kwargs: Any) -> Any:
    if input.dim() == 4:
        input = input.contiguous(memory_format=torch.channels_last)
    return pool(input, *args, **kwargs)
