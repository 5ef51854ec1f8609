"""The form in which the GPU keeps a 2:4 weight: half the values, and their positions.

`compress_2to4` compresses one weight; `save_compressed` writes a whole model with every
2:4 weight compressed; `read_checkpoint` reads any safetensors file. Explained in
`02_prune_2_4.ipynb`.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from helpers.errors import InputError
from helpers.files import atomic_write, shown
from helpers.parameters import (
    is_dtensor,
    is_freed,
    plain_name,
    require_local,
    require_no_placeholder,
    require_numbers,
    unwrapped,
    wraps_numbers,
)
from helpers.sparsity.masks import groups_of_four


@dataclass(frozen=True)
class Compressed:
    """A 2:4 weight as values and 2-bit positions.

    `values` has the shape of the weight with half its input channels. `metadata` is
    a flat uint8 tensor: four positions of two bits in each byte, the lowest first,
    in the order of the values. Bits that are left over in the last byte are zero.
    """

    values: Tensor
    metadata: Tensor

    @property
    def positions(self) -> Tensor:
        """The index, 0 to 3, of each value in its group of four, shaped as `values`."""
        shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=self.metadata.device)
        positions = (self.metadata[:, None] >> shifts & 3).flatten().long()
        return positions[: self.values.numel()].view(self.values.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of values and metadata together."""
        return self.values.nbytes + self.metadata.nbytes


def compress_2to4(weight: Tensor, name: str = "the weight") -> Compressed:
    """Store a 2:4 weight as half its values and two bits for each.

    In FP16 the result takes 9/16 of the dense bytes, in INT8 5/8. Values keep all
    their bits, those of a NaN too; -0.0 is a zero like any other and is restored as 0.0.

    Args:
        weight: (out, in) or `(out, in, *kernel)`, already 2:4, of any type up to 64 bits
            and on any device; the work is done on the CPU.
        name: what to call it in an error.

    Raises:
        InputError: the weight is not 2:4, or `in` is not a multiple of four.

    Source: Mishra et al., arXiv 2104.08378, section 3.
    """
    compressed = _compressed(weight, name)
    if compressed is None:
        raise InputError(
            f"{name} is not 2:4: a group of four holds more than two non-zeros. "
            "Prune it with prune_2to4_ first."
        )
    return compressed


def _compressed(weight: Tensor, name: str) -> Compressed | None:
    """Return the compressed form of a weight; None if it is not 2:4.

    The loop notices that by itself: a call of `is_2to4` before it would read the weight twice.
    """
    from helpers.sparsity.compiled import keep_two_

    require_local(weight, name)
    require_numbers(weight, name)
    groups = groups_of_four(_bits(weight), name).contiguous()
    out, fours, _, kernel = groups.shape
    values = groups.new_empty(out, fours, 2, kernel)
    metadata = torch.zeros(-(-values.numel() // 4), dtype=torch.uint8)
    if not keep_two_(groups.numpy(), _magnitude(weight.dtype), values.numpy(), metadata.numpy()):
        return None
    values = values.view(weight.dtype).reshape(out, 2 * fours, *weight.shape[2:])
    return Compressed(values.to(weight.device), metadata.to(weight.device))


def decompress_2to4(compressed: Compressed) -> Tensor:
    """Return the dense weight, with its zeros, that `compress_2to4` was given.

    Raises:
        InputError: values and metadata do not belong together.
    """
    from helpers.sparsity.compiled import put_back_

    values, metadata = compressed.values, compressed.metadata
    if metadata.numel() != -(-values.numel() // 4):
        raise InputError(
            f"{metadata.numel()} bytes of metadata do not belong to {values.numel()} values: "
            "each byte holds the positions of four. Compress the weight again."
        )
    out, half, *kernel = values.shape
    pairs = _bits(values).reshape(out, half // 2, 2, math.prod(kernel)).contiguous()
    dense = pairs.new_zeros(out, half // 2, 4, math.prod(kernel))
    put_back_(pairs.numpy(), metadata.cpu().numpy(), dense.numpy())
    return dense.view(values.dtype).reshape(out, 2 * half, *kernel).to(values.device)


def _bits(tensor: Tensor) -> Tensor:
    """View numbers as integers: NumPy has neither bfloat16 nor the 8-bit floats."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    if tensor.dtype.itemsize not in integers:
        raise InputError(
            f"A weight of {tensor.dtype} cannot be compressed: its numbers must have at most "
            "64 bits. Convert it first."
        )
    return tensor.detach().cpu().view(integers[tensor.dtype.itemsize])


def _magnitude(dtype: torch.dtype) -> np.integer:
    """Return the bits that tell a number from zero: all but the sign of a float."""
    bits = np.iinfo(f"int{8 * dtype.itemsize}")
    # The "fnuz" floats have no -0.0; its bits are their NaN.
    signed = dtype.is_floating_point and "fnuz" not in str(dtype)
    return bits.dtype.type(bits.max if signed else -1)


# --- a whole model in one file ---


_HEADER, _VERSION = "compressed_2to4", 1
_AGAIN = "Copy it again, or write it again with save_compressed."


def save_compressed(
    model: nn.Module | Mapping[str, Tensor], path: Path, network: str | None = None
) -> list[str]:
    """Write a model as one safetensors file with its 2:4 weights compressed.

    Every tensor of two or more dimensions that is 2:4 along the second one (the input
    channels of all but transposed convolutions) is compressed, and stored as `name.values`
    and `name.metadata`. Everything else is stored unchanged, and tied weights once. The same
    weights give the same bytes.

    Args:
        model: a model or its `state_dict`, on any device; the names are those of the model
            without wrappers such as that of `torch.compile`.
        path: file to write, in one piece or not at all.
        network: the network's name, such as `resnet18`; kept in the header.

    Returns:
        The names of the compressed weights.

    Raises:
        InputError: an entry is not a tensor that safetensors can hold, two entries would have
            the same name, or a model has no tensors or only a part of its weights; nothing is
            written.
    """
    state = model if isinstance(model, Mapping) else _state_of(model)
    stored: dict[str, Tensor] = {}
    sparse: list[str] = []
    tied: dict[str, str] = {}
    holders: dict[tuple, str] = {}
    for name, tensor in state.items():
        if kind := _why_not_storable(tensor):
            raise InputError(
                f"{name} is not a plain dense tensor but {kind}, which safetensors cannot hold. "
                "Convert it to one, or leave it out of the state_dict."
            )
        holder = holders.setdefault(_memory(tensor), name)
        if holder != name:
            tied[name] = holder
            continue
        parts = _parts(name, tensor)
        if name not in parts:
            sparse.append(name)
        for key in parts:
            if key != name and key in state:
                raise InputError(
                    f"{key} is the name of a tensor of the model and of a part of a compressed "
                    "one. Rename the tensor."
                )
        stored |= parts
    header = {"version": _VERSION, "model": network, "sparse": sparse, "tied": tied}
    header["sha256"] = state_checksum(stored, header)
    with atomic_write(path) as part:
        # One entry: with two safetensors writes them in a random order.
        save_file(stored, part, metadata={_HEADER: json.dumps(header)})
    return sparse


@dataclass(frozen=True)
class Checkpoint:
    """What a safetensors file holds.

    `state` is the dense `state_dict`, on the CPU; `network` the network's name in the header,
    if it has one; `compressed` whether `save_compressed` wrote the file.
    """

    state: dict[str, Tensor]
    network: str | None
    compressed: bool


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a safetensors file, compressed or not. Nothing is ever unpickled.

    Args:
        path: a file of `save_compressed`, or any other safetensors file.

    Raises:
        InputError: the file is missing, damaged or of another kind.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise InputError(f"{shown(path)} is not a readable safetensors file ({error}).") from error
    if _HEADER in metadata:
        return _restore(stored, metadata[_HEADER], path)
    return Checkpoint(stored, metadata.get("model"), compressed=False)


def load_compressed(path: Path) -> dict[str, Tensor]:
    """Return the dense `state_dict` that `save_compressed` wrote, on the CPU.

    `model.load_state_dict` takes it unchanged. Nothing is ever unpickled.

    Raises:
        InputError: the file is missing, damaged or of another kind.
    """
    checkpoint = read_checkpoint(path)
    if not checkpoint.compressed:
        raise InputError(
            f"{shown(path)} was not written by save_compressed: its weights are dense. "
            "Read it with helpers.training.networks.load_checkpoint or safetensors."
        )
    return checkpoint.state


def _restore(stored: dict[str, Tensor], text: str, path: Path) -> Checkpoint:
    """Return what a compressed file holds, if its checksum is right."""
    try:
        header = json.loads(text)
        version, recorded = header["version"], header.pop("sha256")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"The header of {shown(path)} is damaged. {_AGAIN}") from error
    if version != _VERSION:
        raise InputError(
            f"{shown(path)} is in version {version} of the compressed form, and this release "
            f"reads version {_VERSION}. Use the release that wrote it."
        )
    if state_checksum(stored, header) != recorded:
        raise InputError(f"{shown(path)} is damaged: its checksum is wrong. {_AGAIN}")
    for name in header["sparse"]:
        parts = Compressed(stored.pop(f"{name}.values"), stored.pop(f"{name}.metadata"))
        stored[name] = decompress_2to4(parts)
    state = stored | {name: stored[holder] for name, holder in header["tied"].items()}
    return Checkpoint(state, header["model"], compressed=True)


def _parts(name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Return what is stored of a tensor: itself, or its values and metadata if it is 2:4."""
    # safetensors refuses tensors that share memory, so each gets its own.
    tensor = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    in_fours = tensor.dim() >= 2 and tensor.numel() > 0 and tensor.shape[1] % 4 == 0
    compressed = _compressed(tensor, name) if in_fours else None
    if compressed is None:
        return {name: tensor}
    return {f"{name}.values": compressed.values, f"{name}.metadata": compressed.metadata}


def _state_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the `state_dict` of a model without wrappers, if it holds all of its weights."""
    model = unwrapped(model)
    state = {plain_name(name): tensor for name, tensor in model.state_dict().items()}
    if not state:
        raise InputError(
            f"{type(model).__name__} has no tensors to write. If it was frozen or converted, "
            "give the model from before."
        )
    for name, _ in model.named_parameters():
        # Asked of the state, because that of FSDP1 is whole where the model is not.
        tensor = state.get(plain_name(name))
        if isinstance(tensor, Tensor) and not is_lazy(tensor):
            require_no_placeholder(tensor, plain_name(name))
    return state


def _why_not_storable(value: Any) -> str:
    """Return what an entry is that safetensors cannot hold; empty if it can."""
    if not isinstance(value, Tensor):
        return f"an object of type {type(value).__name__}"
    if is_lazy(value):
        return "a parameter of a lazy layer, without a shape"
    if value.is_quantized:
        return "a quantized tensor"
    if value.layout != torch.strided:
        return f"a {value.layout} tensor"
    if is_dtensor(value):
        return "a DTensor, of which this rank holds a part (its .full_tensor() is plain)"
    if wraps_numbers(value):
        return f"a tensor of type {type(value).__name__}"
    if value.is_meta:
        return "a tensor on the device `meta`, without numbers"
    return "a tensor whose memory has been freed" if is_freed(value) else ""


def _memory(tensor: Tensor) -> tuple:
    """Return what two tensors share only if they are one tensor, as tied weights are."""
    return (
        tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(),
    )  # fmt: skip


def state_checksum(state: Mapping[str, Tensor], header: Mapping[str, Any] | None = None) -> str:
    """Return the SHA-256 of the names, types, shapes and bytes of tensors.

    Args:
        state: a `state_dict`, in any order and on any device.
        header: anything else that the checksum should cover, as JSON.
    """
    text = "" if header is None else json.dumps(header, sort_keys=True)
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        bytes_ = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(bytes_.numpy().data)
    return digest.hexdigest()
