"""Fold batch norms into the convolutions before them. Explained in `04_export_onnx.ipynb`."""

import copy

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import fuse_conv_bn_eval

from helpers.errors import InputError
from helpers.inference.traced import called_module, first_input, is_read, module_calls
from helpers.layers import is_plain

CONVOLUTION_OF: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: nn.Conv1d,
    nn.BatchNorm2d: nn.Conv2d,
    nn.BatchNorm3d: nn.Conv3d,
}


def fold_batch_norm(model: nn.Module) -> fx.GraphModule:
    """Return a copy in evaluation mode with batch norms folded into the convolutions before them.

    Folding multiplies each output channel by a number, so zeros stay zeros: a 2:4
    weight is still 2:4 afterwards. It is done in FP32, before any cast to FP16. A batch norm
    is not folded if its convolution is used a second time, or if either of the two has a
    hook, a parametrization or a subclass's behaviour. (`torch.fx`'s own `fuse` also folds
    where the convolution is shared, which changes the model.)

    Args:
        model: a model that torch.fx can trace.

    Raises:
        InputError: the model cannot be traced.
    """
    try:
        folded = fx.symbolic_trace(copy.deepcopy(model).cpu().float().eval())
    except Exception as error:  # anything that a model does with the tracer's stand-ins
        raise InputError(
            f"{type(model).__name__} cannot be traced by torch.fx ({type(error).__name__}: "
            f"{error}). Pass the model as it was before torch.compile; its steps must not depend "
            "on the values or the shape of its input."
        ) from error
    calls = module_calls(folded)
    for norm_call in list(folded.graph.nodes):
        layer_call = first_input(norm_call)
        if layer_call is None or list(layer_call.users) != [norm_call]:
            continue
        norm, layer = called_module(folded, norm_call), called_module(folded, layer_call)
        if not (isinstance(norm, _BatchNorm) and isinstance(layer, _ConvNd)):
            continue
        name = str(layer_call.target)
        used_once = len(calls[name]) == 1 and not is_read(folded, name)
        if used_once and _are_plain(layer, norm):
            folded.set_submodule(name, fuse_conv_bn_eval(layer, norm))
            norm_call.replace_all_uses_with(layer_call)
            folded.graph.erase_node(norm_call)
    folded.delete_all_unused_submodules()
    folded.recompile()
    return folded


def _are_plain(layer: _ConvNd, norm: _BatchNorm) -> bool:
    """Return whether a convolution and the batch norm after it do that and nothing else."""
    return (
        is_plain(norm, *CONVOLUTION_OF)
        and norm.track_running_stats
        and is_plain(layer, CONVOLUTION_OF[type(norm)])
    )
