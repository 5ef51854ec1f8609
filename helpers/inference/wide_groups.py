"""Write grouped convolutions of an ONNX file with fewer, wider groups.

ONNX Runtime has no fast INT8 kernel for narrow groups on a CPU. A grouped convolution is a product
with a block-diagonal matrix: neighbouring groups can be joined if the blocks between them are
filled with zeros. The function stays the same, at the price of multiplications by zero. Explained
in `08_int8.ipynb`.
"""

import numpy as np
import onnx
from onnx import NodeProto, numpy_helper

from helpers.sparsity.onnx_constants import attributes_of
from helpers.sparsity.onnx_file import STANDARD_DOMAINS

MIN_CHANNELS = 32


def widen_groups_(model: onnx.ModelProto, channels: int = MIN_CHANNELS) -> tuple[str, ...]:
    """Join the groups of grouped convolutions in place; return the names of the convolutions.

    As many neighbouring groups are joined as give one group `channels` input channels, or all if
    there are fewer. Depthwise convolutions are left alone: ONNX Runtime has a kernel for them.

    Args:
        model: with its weights.
        channels: that a group should have at least.
    """
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    widened = []
    for node in graph.node:
        joined = _groups_to_join(node, stored, channels)
        if joined == 1:
            continue
        weight = numpy_helper.to_array(stored[node.input[1]])
        groups = attributes_of(node)["group"]
        name = f"{node.input[1]}_groups_of_{joined * weight.shape[1]}"
        if name not in stored:
            wide = numpy_helper.from_array(_block_diagonal(weight, groups, joined), name)
            graph.initializer.append(wide)
            stored[name] = wide
        node.input[1] = name
        next(item for item in node.attribute if item.name == "group").i = groups // joined
        widened.append(node.name or node.output[0])
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    del graph.value_info[:]  # it may have the shapes of the old weights
    return tuple(widened)


def _groups_to_join(node: NodeProto, stored: dict[str, onnx.TensorProto], channels: int) -> int:
    """Return how many groups of a convolution become one; 1 leaves it as it is."""
    if node.op_type != "Conv" or node.domain not in STANDARD_DOMAINS:
        return 1
    groups = attributes_of(node).get("group", 1)
    weight = stored.get(node.input[1])
    if groups == 1 or weight is None:
        return 1
    per_group = weight.dims[1]
    if per_group == 1 and weight.dims[0] == groups:
        return 1
    fitting = [
        joined
        for joined in range(1, groups + 1)
        if groups % joined == 0 and joined * per_group >= channels
    ]
    return min(fitting, default=groups)


def _block_diagonal(weight: np.ndarray, groups: int, joined: int) -> np.ndarray:
    """Return a grouped weight (K, C / groups, ...) whose neighbouring groups are joined."""
    out, per_group, *kernel = weight.shape
    rows = out // groups
    wide = np.zeros((out, joined * per_group, *kernel), weight.dtype)
    for group in range(groups):
        place = group % joined * per_group
        block = slice(group * rows, (group + 1) * rows)
        wide[block, place : place + per_group] = weight[block]
    return wide
