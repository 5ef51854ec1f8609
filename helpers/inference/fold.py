"""Fold batch norms into the convolutions before them. Explained in `04_export_onnx.ipynb`."""

import copy

from torch import fx, nn
from torch.nn.utils import fuse_conv_bn_eval

from helpers.errors import InputError
from helpers.layers import is_plain

_FOLDS = {
    nn.BatchNorm1d: nn.Conv1d,
    nn.BatchNorm2d: nn.Conv2d,
    nn.BatchNorm3d: nn.Conv3d,
}


def fold_batch_norm(model: nn.Module) -> fx.GraphModule:
    """Return a copy in evaluation mode with batch norms folded into the convolutions before them.

    Folding multiplies each output channel by a number, so zeros stay zeros: a 2:4
    weight is 2:4 afterwards. It is done in FP32, before any cast to FP16. A batch norm stays
    where its convolution is used a second time, or either does more than its kind.

    Args:
        model: a network that torch.fx can trace.

    Raises:
        InputError: it cannot be traced.

    Explained in `04_export_onnx.ipynb`.
    """
    try:
        folded = fx.symbolic_trace(copy.deepcopy(model).cpu().float().eval())
    except Exception as error:  # whatever the network does with the tracer's stand-ins
        raise InputError(
            f"{type(model).__name__} cannot be traced by torch.fx ({type(error).__name__}: "
            f"{error}). Give the network as it was before torch.compile, and one whose steps do "
            "not depend on the numbers or the shape of its input."
        ) from error
    for call in list(folded.graph.nodes):
        if _folds(folded, call):
            before = call.args[0]
            layer, norm = (folded.get_submodule(node.target) for node in (before, call))
            folded.set_submodule(before.target, fuse_conv_bn_eval(layer, norm))
            call.replace_all_uses_with(before)
            folded.graph.erase_node(call)
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folded


def _folds(network: fx.GraphModule, call: fx.Node) -> bool:
    """Return whether a call is that of a batch norm, and nothing else sees the layer before it."""
    before = call.args[0] if call.args else None
    if call.op != "call_module" or not isinstance(before, fx.Node) or before.op != "call_module":
        return False
    layer, norm = (network.get_submodule(node.target) for node in (before, call))
    return (
        is_plain(norm, *_FOLDS)
        and norm.track_running_stats
        and is_plain(layer, _FOLDS[type(norm)])
        and list(before.users) == [call]
        and [node.target for node in network.graph.nodes].count(before.target) == 1
        and not is_read(network, before.target)
    )


def is_read(network: fx.GraphModule, name: str) -> bool:
    """Return whether parameters of a module are also used without calling it."""
    reads = (node.target for node in network.graph.nodes if node.op == "get_attr")
    return any(target.startswith(f"{name}.") for target in reads)
