"""Read the graph of a model that torch.fx has traced. Used from `04_export_onnx.ipynb` on."""

from collections import defaultdict

from torch import fx, nn


def module_calls(model: fx.GraphModule) -> dict[str, list[fx.Node]]:
    """Return the calls of each module by its name, in order of execution."""
    calls: defaultdict[str, list[fx.Node]] = defaultdict(list)
    for node in model.graph.nodes:
        if node.op == "call_module":
            calls[str(node.target)].append(node)
    return dict(calls)


def called_module(model: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """Return the module that a node calls; None if it calls none."""
    return model.get_submodule(str(node.target)) if node.op == "call_module" else None


def first_input(node: fx.Node) -> fx.Node | None:
    """Return the node whose result is the first positional argument; None if there is none."""
    first = node.args[0] if node.args else None
    return first if isinstance(first, fx.Node) else None


def is_read(model: fx.GraphModule, name: str) -> bool:
    """Return whether the model also uses a module's parameters without calling the module."""
    reads = (str(node.target) for node in model.graph.nodes if node.op == "get_attr")
    return any(target.startswith(f"{name}.") for target in reads)
