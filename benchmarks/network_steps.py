"""Take one network through all steps, and judge each by the oracle of `product_oracle.py`.

`networks.py` calls `main` in a process of its own for each network.
"""

import copy
import json
import os
import resource
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from helpers.errors import HelpersError, first_line, root_cause
from helpers.inference.export import export_onnx, program_of_products
from helpers.sparsity import (
    hold_masks,
    load_compressed,
    permute_channels_,
    prune_2to4_,
    save_compressed,
    sparsity_report,
    verify_model,
    verify_onnx,
)
from helpers.sparsity.prune import Masks
from network_catalogue import Inputs, Network, catalogue
from product_oracle import FileWeight, UsedWeight, file_weights, watch

# What a step can end in. The first four are no faults of ours.
OK = "ok"
REFUSED = "refused"  # an error of ours on purpose, in one sentence
CANNOT = "cannot"  # the network, or PyTorch with it, cannot do this at all
SKIPPED = "skipped"  # an earlier step left nothing to do
LIMIT = "limit"  # of time or memory
RAW_ERROR = "raw error"  # an exception of another kind out of a function of ours
FALSE_PASS = "false PASS"  # something dense is said to be 2:4, or not said to be dense
FALSE_FAIL = "false FAIL"  # something 2:4 or exempt is said to be dense
WRONG = "wrong"  # another result that the oracle contradicts
FAULTS = (RAW_ERROR, FALSE_PASS, FALSE_FAIL, WRONG)

POINTS = 0.5  # by how much a share in per cent may differ
STEPS_OF_SGD = 2
GIB = 2**30


class Stop(Exception):  # noqa: N818
    """Ends a step, with its verdict and the reason."""

    def __init__(self, verdict: str, reason: str) -> None:
        super().__init__(verdict, reason)
        self.verdict, self.reason = verdict, reason


@contextmanager
def ours(verdict_of_refusal: str = REFUSED) -> Iterator[None]:
    """Run functions of the library: any error but those on purpose is a fault."""
    try:
        yield
    except HelpersError as error:
        raise Stop(verdict_of_refusal, str(error)) from error
    except Exception as error:
        raise Stop(LIMIT if _out_of_memory(error) else RAW_ERROR, _told(error)) from error


@contextmanager
def theirs() -> Iterator[None]:
    """Run the network, or PyTorch with it."""
    try:
        yield
    except Exception as error:
        raise Stop(LIMIT if _out_of_memory(error) else CANNOT, _told(error)) from error


def _out_of_memory(error: BaseException | None) -> bool:
    if error is None:
        return False
    text = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in text or "bad_alloc" in text:
        return True
    return _out_of_memory(error.__cause__)


def _told(error: BaseException) -> str:
    """Return the class and the first line of what an error was caused by."""
    cause = root_cause(error)
    return f"{type(cause).__name__}: {first_line(cause)}"[:400]


@dataclass
class Trial:
    """A network on its way through the steps."""

    network: Network
    folder: Path
    model: nn.Module = field(default_factory=nn.Module)
    inputs: Inputs = ()
    share: float = 0.0  # that the report promises, in per cent
    eligible: set[str] = field(default_factory=set)  # by the report
    reasons: dict[str, str] = field(default_factory=dict)  # of the report, for the others
    masks: Masks = field(default_factory=dict)
    file: Path | None = None

    def names_of(self, weight: UsedWeight) -> list[str]:
        """Return the names of the parameters that a weight was computed from."""
        return [
            name
            for name, parameter in self.model.named_parameters()
            if id(parameter) in weight.weight.parameters
        ]

    def require_masks(self) -> None:
        if not self.masks:
            raise Stop(SKIPPED, "nothing was pruned")


# --- the network ---


def make(trial: Trial) -> str:
    """Make the network, and give numbers to what a fresh one leaves at 0 or 1.

    A norm whose scales are all 1, or a last layer of zeros, would hide a mistake.
    """
    torch.manual_seed(0)
    with theirs():
        trial.model, trial.inputs = trial.network.make()
        trial.model.eval().requires_grad_(True)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in trial.model.parameters():
                if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.add_(0.05 * noise.to(parameter.dtype))
            for name, statistic in trial.model.named_buffers():
                if name.endswith("running_mean"):
                    statistic.copy_(0.1 * torch.randn(statistic.shape, generator=generator))
                elif name.endswith("running_var"):
                    statistic.copy_(0.5 + torch.rand(statistic.shape, generator=generator))
            outputs = float_outputs(trial.model, trial.inputs)
    if not any(bool(output.any()) for output in outputs):
        raise Stop(CANNOT, "all its outputs are zero")
    if not all(bool(output.isfinite().all()) for output in outputs[:1]):
        raise Stop(CANNOT, "its outputs are not finite")
    count = sum(parameter.numel() for parameter in trial.model.parameters())
    return f"{count:,} parameters"


def float_outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    outputs = model(*inputs)
    leaves = [leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if leaf.is_floating_point() and leaf.numel()]


# --- the report ---


def report(trial: Trial) -> str:
    """What can be sparse; the shares are checked once the network is pruned."""
    with ours():
        result = sparsity_report(trial.model, example=trial.inputs)
        text = repr(result)
    rows = result.layers
    trial.share = result.macs_share
    trial.eligible = set(rows.weight[rows.eligible])
    trial.reasons = dict(zip(rows.weight, rows.reason, strict=True))
    return text.partition("\n")[0]


# --- permutation ---


def permute(trial: Trial) -> str:
    """Permute, and compare with the network before on inputs that the library has not seen."""
    before = copy.deepcopy(trial.model)
    inputs = new_inputs(trial.inputs, seed=7)
    state = {name: tensor.clone() for name, tensor in trial.model.state_dict().items()}
    try:
        with ours():
            result = permute_channels_(trial.model, trial.inputs, escapes=0)
    except Stop as stop:
        changed = [
            name
            for name, tensor in trial.model.state_dict().items()
            if not torch.equal(tensor, state[name]) and not bool(tensor.isnan().any())
        ]
        if changed:
            trial.model = before
            raise Stop(WRONG, f"refused, but {changed[0]} has changed: {stop.reason}") from stop
        if "would compute something else" in stop.reason:
            raise Stop(WRONG, f"false alarm, or a wrong permutation: {stop.reason}") from stop
        raise
    said = f"{len(result.permuted)} of {len(result.weights)} weights permuted"
    if not len(result.permuted):
        reasons = result.weights.reason.value_counts()
        most = f": {first_line(Exception(reasons.index[0]))}" if len(reasons) else ""
        return (said + most)[:300]
    error, noise, precision = difference(before, trial.model, inputs)
    told = f"{said}, outputs differ by {error:.0e} in {precision} precision"
    if not error <= max(1e-9, 30 * noise):
        trial.model = before
        raise Stop(WRONG, f"{told}, and by {noise:.0e} with weights rounded to FP32 once more")
    if noise > 1e-2:
        told += f" (but rounding alone changes them by {noise:.0e})"
    return told


def difference(before: nn.Module, after: nn.Module, inputs: Inputs) -> tuple[float, float, str]:
    """Return how much outputs differ, how much rounding changes them, and the precision.

    Both are relative to the largest output. The precision is double, if the network runs so.
    """
    rounded = copy.deepcopy(before).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in rounded.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.mul_(1 + 2**-24 * noise)
    models = [before, after, rounded]
    try:
        doubles = [copy.deepcopy(model).double() for model in models]
        values = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, inputs)
        expected, found, noisy = (_run(model, values) for model in doubles)
        precision = "double"
    except Exception:  # some networks make constants in FP32 while they run
        expected, found, noisy = (_run(copy.deepcopy(model).float(), inputs) for model in models)
        precision = "single"
    return _relative(found, expected), _relative(noisy, expected), precision


def _run(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    with torch.no_grad():
        return [output.double() for output in float_outputs(model.eval(), inputs)]


def _relative(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    scale = max(float(output[output.isfinite()].abs().max()) for output in expected)
    worst = 0.0
    for one, other in zip(found, expected, strict=True):
        gap = (one - other).abs().masked_fill(one == other, 0)
        worst = max(worst, float(gap.max()))
    return worst / scale


def new_inputs(inputs: Inputs, seed: int) -> Inputs:
    """Return other inputs of the same kind: numbers drawn anew, tokens in another order."""
    generator = torch.Generator().manual_seed(seed)

    def other(value: Tensor) -> Tensor:
        if value.is_floating_point():
            return torch.randn(value.shape, generator=generator, dtype=value.dtype)
        order = torch.randperm(value.shape[-1], generator=generator) if value.dim() else None
        return value if order is None else value[..., order]

    return tree_map_only(Tensor, other, inputs)


# --- pruning ---


def prune(trial: Trial) -> str:
    """Prune by magnitude; judge the masks, what is multiplied, and what the report promised."""
    dense = {name: p.detach().clone() for name, p in trial.model.named_parameters()}
    dense |= {name: p.detach().clone() for name, p in _all_names(trial.model)}
    with ours():
        trial.masks = prune_2to4_(trial.model)
    if set(trial.masks) != trial.eligible:
        differing = sorted(set(trial.masks) ^ trial.eligible)
        raise Stop(WRONG, f"report and masks disagree on {differing[0]}")
    for name, mask in trial.masks.items():
        if not torch.equal(trial.model.get_parameter(name), dense[name] * mask):
            raise Stop(WRONG, f"{name} has not just lost what its mask removes")
    products = watch(trial.model, trial.inputs)
    _require_2to4(trial, products)
    total = sum(product.macs for product in products)
    sparse = sum(product.macs for product in products if product.is_2to4)
    share = 100 * sparse / total if total else 0.0
    if trial.share > share + POINTS:
        raise Stop(
            WRONG, f"the report promises {trial.share:.1f} % of the MACs, and {share:.1f} % are 2:4"
        )
    if trial.share < share - POINTS:
        raise Stop(
            WRONG, f"the report sees {trial.share:.1f} % of the MACs, and {share:.1f} % are 2:4"
        )
    left = sum(p.macs for p in products if _could_be_2to4(p) and not p.is_2to4)
    told = f"{len(trial.masks)} weights, {share:.1f} % of all MACs"
    if total and left:
        told += f"; {100 * left / total:.1f} % with weights left dense"
        unlisted = {
            name
            for product in products
            if _could_be_2to4(product) and not product.is_2to4
            for name in trial.names_of(product)[:1]
        } - set(trial.reasons)
        if unlisted:
            told += f", {len(unlisted)} of them not in the report, such as {min(unlisted)}"
    return told


def _all_names(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return model.named_parameters(remove_duplicate=False)


def _could_be_2to4(product: UsedWeight) -> bool:
    weight = product.weight
    stored = bool(weight.parameters) and not weight.product  # else it is a constant activation
    return stored and product.plain and product.channels % 4 == 0


def _require_2to4(trial: Trial, products: Sequence[UsedWeight], verdict: str = WRONG) -> None:
    """Every product with a weight that has a mask is 2:4."""
    masked = {id(trial.model.get_parameter(name)): name for name in trial.masks}
    for product in products:
        names = [masked[each] for each in product.weight.parameters if each in masked]
        # What is computed from several parameters may be a constant activation.
        if names and len(product.weight.parameters) == len(names) and not product.is_2to4:
            raise Stop(verdict, f"{names[0]} is pruned, and what is multiplied is not 2:4")


# --- training ---


def hold(trial: Trial) -> str:
    """Two steps of SGD with momentum and weight decay: the zeros stay, the rest moves."""
    trial.require_masks()
    before = {name: trial.model.get_parameter(name).detach().clone() for name in trial.masks}
    optimizer = torch.optim.SGD(trial.model.parameters(), lr=1e-4, momentum=0.9, weight_decay=0.01)
    mode = "training"
    try:
        _loss(trial.model.train(), trial.inputs).backward()
    except Exception as error:  # it wants targets, for instance, or a larger batch
        mode = f"evaluation mode, since in training: {_told(error)}"[:150]
        with theirs():
            _loss(trial.model.eval(), trial.inputs).backward()
    optimizer.zero_grad()
    with ours():
        held = hold_masks(optimizer, trial.model, trial.masks)
    for _ in range(STEPS_OF_SGD):
        optimizer.zero_grad()
        with theirs():
            _loss(trial.model, trial.inputs).backward()
        with ours():
            optimizer.step()
    held.remove()
    trial.model.eval()
    moved = 0
    for name, mask in trial.masks.items():
        weight = trial.model.get_parameter(name)
        if bool(weight.detach()[~mask].any()):
            raise Stop(WRONG, f"{name} has non-zeros where its mask removes them")
        moved += not torch.equal(weight, before[name])
    if not moved:
        raise Stop(WRONG, "no weight has moved")
    _require_2to4(trial, watch(trial.model, trial.inputs))
    return f"{moved} of {len(trial.masks)} pruned weights moved, {mode}"


def _loss(model: nn.Module, inputs: Inputs) -> Tensor:
    outputs = [output for output in float_outputs(model, inputs) if output.requires_grad]
    finite = [output.masked_fill(~output.isfinite(), 0).float() for output in outputs]
    return torch.stack([output.pow(2).mean() for output in finite]).sum()


# --- the compressed form ---


def compressed(trial: Trial) -> str:
    """Save and load: every number, and the outputs, are the same."""
    trial.require_masks()
    path = trial.folder / "compressed.safetensors"
    state = trial.model.state_dict()
    with ours():
        names = save_compressed(trial.model, path)
        loaded = load_compressed(path)
    if loaded.keys() != state.keys():
        raise Stop(WRONG, f"{min(loaded.keys() ^ state.keys())} is missing or too much")
    for name, tensor in state.items():
        if not torch.equal(loaded[name], tensor):
            raise Stop(WRONG, f"{name} has changed")
    dense_bytes = sum(tensor.nbytes for tensor in state.values())
    share = 100 * path.stat().st_size / dense_bytes
    path.unlink()
    return f"{len(names)} weights compressed, {share:.0f} % of the bytes"


# --- verify ---


def verify_the_model(trial: Trial) -> str:
    """Verify passes exactly what is multiplied 2:4, and notices one weight that is not."""
    trial.require_masks()
    with ours():
        table = verify_model(trial.model)
    eligible = table[table.eligible]
    missing = set(trial.masks) - set(eligible.weight)
    if missing:
        raise Stop(FALSE_PASS, f"{min(missing)} is pruned and not judged")
    dense = eligible[~eligible.is_2to4]
    if len(dense):
        raise Stop(FALSE_FAIL, f"{len(dense)} weights, such as {dense.weight.iloc[0]}, are dense")
    _require_2to4(trial, watch(trial.model, trial.inputs), FALSE_PASS)
    name = min(trial.masks)
    weight, mask = trial.model.get_parameter(name), trial.masks[name]
    before = weight.detach().clone()
    with torch.no_grad():
        weight[~mask] = 1.0
    with ours():
        spoiled = verify_model(trial.model)
    with torch.no_grad():
        weight.copy_(before)
    found = set(spoiled.weight[spoiled.eligible & ~spoiled.is_2to4])
    if found != {name}:
        raise Stop(FALSE_PASS, f"{name} was made dense, and found were {sorted(found)[:3]}")
    return f"{len(eligible)} of {len(table)} weights judged"


# --- ONNX ---


def export(trial: Trial) -> str:
    """Write an ONNX file: with our function if the input is an image, else with PyTorch's."""
    path = trial.folder / "model.onnx"
    refusal = ""
    image = trial.inputs[0] if len(trial.inputs) == 1 else None
    if isinstance(image, Tensor) and image.dim() == 4 and image.is_floating_point():
        channels, height, width = image.shape[1:]
        try:
            with ours():
                trial.file = export_onnx(trial.model, path, (channels, height, width))
            return f"by export_onnx, {path.stat().st_size / 1e6:.1f} MB"
        except Stop as stop:
            if stop.verdict != REFUSED:
                raise
            refusal = f"; export_onnx: {stop.reason}"
    with theirs():
        try:
            program = torch.onnx.export(trial.model, trial.inputs, dynamo=True, verbose=False)
        except Exception:  # as in export_onnx
            products = program_of_products(trial.model, trial.inputs)
            program = torch.onnx.export(products, dynamo=True, verbose=False)
        assert program is not None
        program.save(path)
    trial.file = path
    return f"by torch.onnx.export, {path.stat().st_size / 1e6:.1f} MB{refusal}"


def verify_the_file(trial: Trial) -> str:
    """Verify says of every constant factor what its numbers say, and fails where one is dense."""
    if trial.file is None:
        raise Stop(SKIPPED, "there is no file")
    with ours():
        table = verify_onnx(trial.file)
    found = file_weights(trial.file, _feeds(trial.file, trial.inputs))
    said = _judge_table(table, found)
    name, spoiled = _spoil(trial.file, trial.folder, found)
    if spoiled is not None:
        with ours():
            after = verify_onnx(spoiled)
        if bool((after.eligible & ~after.is_2to4).sum() <= (table.eligible & ~table.is_2to4).sum()):
            raise Stop(FALSE_PASS, f"the weight of {name} was made dense, and nothing is found")
    return said


def _judge_table(table: Any, found: Sequence[FileWeight]) -> str:
    rows: dict[str, list[Any]] = {}
    for row in table.itertuples():
        rows.setdefault(row.node, []).append(row)
    dense = 0
    for weight in found:
        judged = rows.get(weight.node, [])
        if weight.computed or not weight.eligible:
            continue
        if not judged:
            raise Stop(FALSE_PASS, f"{weight.node} has no row")
        if not all(row.judged for row in judged):
            continue  # it is said that nothing is known, and the file does not pass
        states = {(bool(row.eligible), bool(row.is_2to4)) for row in judged}
        if weight.is_2to4 and (True, True) not in states:
            raise Stop(
                FALSE_FAIL, f"{weight.node} is 2:4, and said is: {judged[0].reason or 'dense'}"
            )
        if not weight.is_2to4 and (True, False) not in states:
            raise Stop(
                FALSE_PASS, f"{weight.node} is dense, and said is: {judged[0].reason or '2:4'}"
            )
        dense += not weight.is_2to4
    really_dense = {w.node for w in found if w.eligible and not w.is_2to4 and not w.computed}
    for row in table[table.eligible & ~table.is_2to4].itertuples():
        if row.node not in really_dense:
            raise Stop(FALSE_FAIL, f"{row.node} ({row.op} with {row.weight}) is no dense weight")
    told = f"{table.eligible.sum()} of {len(table)} rows eligible, {dense} dense"
    unjudged = table[~table.judged]
    if len(unjudged):
        told += f", {len(unjudged)} not judged ({unjudged.reason.iloc[0]})"
    return told


def _feeds(path: Path, inputs: Inputs) -> dict[str, np.ndarray]:
    model = onnx.load(path, load_external_data=False)
    values = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    stored = {tensor.name for tensor in model.graph.initializer}
    names = [item.name for item in model.graph.input if item.name not in stored]
    if len(names) != len(values):
        raise Stop(CANNOT, f"the file has {len(names)} inputs, and the network {len(values)}")
    return {name: value.numpy() for name, value in zip(names, values, strict=True)}


def _spoil(path: Path, folder: Path, found: Sequence[FileWeight]) -> tuple[str, Path | None]:
    """Write a copy of a file in which one stored 2:4 weight is dense."""
    model = onnx.load(path)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = {node.name: node for node in model.graph.node}
    for weight in found:
        tensor = stored.get(nodes[weight.node].input[weight.side])
        if weight.is_2to4 and tensor is not None:
            dense = np.ones_like(onnx.numpy_helper.to_array(tensor))
            tensor.CopyFrom(onnx.numpy_helper.from_array(dense, tensor.name))
            spoiled = folder / "spoiled.onnx"
            onnx.save(model, spoiled)
            return weight.node, spoiled
    return "", None


# --- all steps ---


STEPS: dict[str, Callable[[Trial], str]] = {
    "make": make,
    "report": report,
    "permute": permute,
    "prune": prune,
    "hold": hold,
    "compressed": compressed,
    "verify model": verify_the_model,
    "export": export,
    "verify file": verify_the_file,
}


def try_network(network: Network) -> Iterator[dict[str, Any]]:
    """Yield a row for each step as soon as it is done."""
    with TemporaryDirectory() as folder:
        trial = Trial(network, Path(folder))
        made = True
        for name, step in STEPS.items():
            start = time.perf_counter()
            verdict = OK
            try:
                if not made:
                    raise Stop(SKIPPED, "the network cannot be made")
                reason = step(trial)
            except Stop as stop:
                verdict, reason = stop.verdict, stop.reason
                made = made and name != "make"
            seconds = round(time.perf_counter() - start, 2)
            yield {
                "library": network.library, "network": network.name, "step": name,
                "verdict": verdict, "reason": reason, "seconds": seconds,
            }  # fmt: skip


def main(name: str, rows: Path, log: Path, seconds: int, gib: float) -> None:
    """Try one network within limits of processor time and memory.

    Each step adds one line of JSON to `rows` when it is done, so that what ends the process is
    the step without a line.
    """
    resource.setrlimit(resource.RLIMIT_DATA, (int(gib * GIB), int(gib * GIB)))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    signal.alarm(10 * seconds)  # in case it waits for something
    with open(log, "wb") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    (network,) = (network for network in catalogue() if str(network) == name)
    with open(rows, "a", encoding="utf-8") as file:
        for row in try_network(network):
            print(json.dumps(row), file=file, flush=True)
