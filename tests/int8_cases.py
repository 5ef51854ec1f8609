"""A residual network as an ONNX file, for the tests of quantisation."""

from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import nn

from helpers.sparsity import prune_2to4_


def images(count: int = 32, seed: int = 0) -> np.ndarray:
    """Return images for `residual_file`."""
    return np.random.default_rng(seed).standard_normal((count, 4, 6, 6), dtype=np.float32)


def weight(*shape: int, seed: int, sparse: bool = True) -> np.ndarray:
    """Return the weight of a convolution (4 dimensions) or of a linear layer."""
    layer = nn.Conv2d(shape[1], shape[0], shape[2]) if len(shape) == 4 else nn.Linear(*shape[::-1])
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(shape, generator=generator))
    model = nn.Sequential(layer)
    if sparse:
        prune_2to4_(model)
    return layer.weight.detach().numpy()


def residual_file(
    path: Path,
    opset: int = 20,
    half: bool = False,
    sparse: bool = True,
    named: bool = True,
    more: tuple[NodeProto, ...] = (),
    stored: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write stem, two branches, an addition, pooling and a classifier; return the path.

    Args:
        path: file to write.
        opset: of the file.
        half: FP16 instead of FP32.
        sparse: prune the weights 2:4.
        named: give the nodes names.
        more: further nodes at the end, whose last output is the output of the file.
        stored: further weights.
    """
    dtype = np.float16 if half else np.float32
    arrays = {
        "stem.w": weight(8, 4, 3, 3, seed=1, sparse=sparse),
        "main.w": weight(16, 8, 3, 3, seed=2, sparse=sparse) / 4,
        "down.w": weight(16, 8, 1, 1, seed=3, sparse=sparse) / 4,
        "fc.w": weight(10, 16, seed=4, sparse=sparse),
        **{f"{name}.b": np.linspace(-0.5, 0.5, size) for name, size in BIASES.items()},
        **(stored or {}),
    }
    kind = {"pads": [1, 1, 1, 1]}
    nodes = [
        helper.make_node("Conv", ["images", "stem.w", "stem.b"], ["s"], "stem", **kind),
        helper.make_node("Relu", ["s"], ["sr"], "stem_relu"),
        helper.make_node("Conv", ["sr", "down.w", "down.b"], ["d"], "down"),
        helper.make_node("Conv", ["sr", "main.w", "main.b"], ["m"], "main", **kind),
        helper.make_node("Add", ["m", "d"], ["j"], "join"),
        helper.make_node("Relu", ["j"], ["jr"], "join_relu"),
        helper.make_node("GlobalAveragePool", ["jr"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["v"], "flatten"),
        helper.make_node("Gemm", ["v", "fc.w", "fc.b"], ["logits"], "fc", transB=1),
        *more,
    ]
    if not named:
        for node in nodes:
            node.name = ""
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    output = nodes[-1].output[0]
    graph = helper.make_graph(
        nodes,
        "residual",
        [helper.make_tensor_value_info("images", kind, ["batch", 4, 6, 6])],
        [helper.make_tensor_value_info(output, kind, None)],
        [numpy_helper.from_array(array.astype(dtype), name) for name, array in arrays.items()],
    )
    imports = [helper.make_opsetid("", opset)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


BIASES = {"stem": 8, "main": 16, "down": 16, "fc": 10}
PRODUCTS = ("stem", "down", "main", "fc")
