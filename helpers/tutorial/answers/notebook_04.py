"""The answers to the exercises of notebook 04."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from helpers.files import sha256
from helpers.sparsity import mask_2to4, verify_onnx
from helpers.tutorial.artifacts import NETWORKS, Artifacts
from helpers.tutorial.exercises import NO_HINT, UNTOUCHED, Judge, Value
from helpers.tutorial.settings import Settings


def _sizes() -> float:
    artifacts = Artifacts(Settings.load())
    dense, sparse = (artifacts.path(f"04_{name}_fp32.onnx").stat().st_size for name in NETWORKS)
    return sparse / dense


# The weights of the file that tries an answer, and the damage done to some of them.
_PRUNED, _DAMAGED, _DENSE = "pruned.weight", "damaged.weight", "grouped.weight"


def _write_file(path: Path, damaged: bool) -> None:
    """Write an ONNX file with a dense grouped convolution and two pruned 1x1 convolutions."""
    import onnx
    from onnx import helper, numpy_helper

    generator = torch.Generator().manual_seed(0)
    weights = {
        _DENSE: torch.randn(8, 2, 3, 3, generator=generator),
        _PRUNED: torch.randn(8, 8, 1, 1, generator=generator),
        _DAMAGED: torch.randn(8, 8, 1, 1, generator=generator),
    }
    for name in (_PRUNED, _DAMAGED):
        weights[name] *= mask_2to4(weights[name])
    if damaged:
        weights[_DAMAGED][0, 0:4] = 1
    nodes = [
        helper.make_node("Conv", ["images", _DENSE], ["one"], group=4, pads=[1, 1, 1, 1]),
        helper.make_node("Conv", ["one", _PRUNED], ["two"]),
        helper.make_node("Conv", ["two", _DAMAGED], ["logits"]),
    ]
    values = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ("batch", 8, 4, 4))
        for name in ("images", "logits")
    ]
    graph = helper.make_graph(
        nodes,
        "trial",
        values[:1],
        values[1:],
        [numpy_helper.from_array(value.numpy(), name) for name, value in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]), path)


def _judge_finding(answer: Callable[[Path], list[str]]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        sound, damaged = Path(folder) / "sound.onnx", Path(folder) / "damaged.onnx"
        _write_file(sound, damaged=False)
        _write_file(damaged, damaged=True)
        found = [answer(path) for path in (sound, damaged)]
    if found == [None, None]:
        return UNTOUCHED
    in_sound, in_damaged = ([str(name) for name in names] for names in found)
    if not in_sound and in_damaged == [_DAMAGED]:
        return ""
    if _DENSE in in_damaged:
        return "It lists layers that stay dense on purpose. Only eligible weights must be 2:4."
    if _PRUNED in in_damaged:
        return "It lists the weights that are 2:4. Those that are not are wanted."
    return NO_HINT


def _judge_damage(answer: Callable[[Path, Path], object]) -> str:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "source.onnx", Path(folder) / "target.onnx"
        _write_file(source, damaged=False)
        before = sha256(source)
        returned = answer(source, target)
        if sha256(source) != before:
            return "It changes the source. Save the changed model under the name of the target."
        if not target.exists():
            return UNTOUCHED if returned is None else "There is no file under the target's name."
        tables = [verify_onnx(path) for path in (source, target)]
        same = sha256(target) == before
    eligible = [table[table.eligible] for table in tables]
    broken = (~eligible[1].is_2to4).sum()
    # In per cent of the 64 weights of a layer: one zero less is 1.56 points.
    changed = ((eligible[0].zeros - eligible[1].zeros).abs() * 64 / 100).round().sum()
    if broken == 1 and changed == 1:
        return ""
    if same or not (tables[0].zeros - tables[1].zeros).any():
        return (
            "The target has as many zeros as the source. Change one zero, and write the changed "
            "array back into the model: `to_array` returns a copy."
        )
    if not changed:
        return "It changes a layer that stays dense on purpose. Choose an eligible weight."
    return "It changes more than one zero."


EXERCISES: dict[str, Judge] = {
    "04-file-sizes": Value(
        _sizes,
        tolerance=0.05,
        mistakes={
            0.6: "That would be so if the file left out the zeros. How does it store a zero?",
            0.5: "That would be so if the file left out the zeros. How does it store a zero?",
        },
    ),
    "04-find-damage": _judge_finding,
    "04-damage": _judge_damage,
}
