"""Layers of a 2:4 network that compute on a CPU with half the multiplications, in FP32.

A `CpuLayer` holds the weight of one convolution or linear layer in the order in which the
kernel of `helpers.inference.cpu_kernels` reads it, and cuts the work for each input shape.
Shown in `07_sparse_tensor_cores.ipynb`, after the same idea in plain loops.
"""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from helpers.inference.cpu_kernels import (
    GROUPS_PER_WORD,
    LANES,
    MOST_THREADS,
    ROWS,
    VECTOR_BYTES,
    VECTORS,
    Plan,
)
from helpers.sparsity.compressed import compress_2to4
from helpers.sparsity.masks import is_2to4

# Rows of the input that one unit reads at a time. Where they are read in place each lies in
# another page, and processors find some 64 to 96 pages at once without a search.
_MOST_DEPTHS = 80
# The sums of one unit, which wait there for the next block of depths, stay in the second.
_SUMS_BYTES = 512 * 1024
# What a tile costs beside the products of its rows, measured with AVX-512: bringing in its input,
# in rows, and starting each row, in vectors.
_ROWS_OF_INPUT = 40
_VECTORS_OF_START = 0.4
# Weights of up to so many bytes may still be in the caches from the run before.
_WEIGHTS_KEPT = 1024 * 1024
# Units of each thread from which on the threads end evenly enough.
_MOST_UNITS = 4


HARD_SWISH = "hard-swish"
# The smallest and the largest output with each activation.
_BOUNDS = {
    "": (-math.inf, math.inf),
    "ReLU": (0.0, math.inf),
    "ReLU6": (0.0, 6.0),
    HARD_SWISH: (-math.inf, math.inf),
}


@cache
def _cache_bytes() -> int:
    """Return how much of the first cache the input of a unit may take; weights pass through it."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index0/size").read_text()  # as "48K"
        kilobytes = int(size.removesuffix("K\n"))
    except (OSError, ValueError):
        kilobytes = 32  # not told by this system
    return kilobytes * 1024 * 3 // 4


@dataclass(frozen=True)
class _Packed:
    """A weight in the kernel's order: conv groups, depth blocks, blocks of rows, depths, rows."""

    kept: int
    values: NDArray[np.float32]
    positions: NDArray[np.uint64]
    edges: list[int]  # of the depth blocks, in groups of four


@dataclass(frozen=True)
class _Geometry:
    """How a convolution walks over its input."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]  # above and to the left
    padding_after: tuple[int, int]  # below and to the right
    dilation: tuple[int, int]

    def output(self, size: Sequence[int]) -> tuple[int, int]:
        """Return height and width of the output for those of the input."""
        height, width = (
            (length + before + after - dilation * (kernel - 1) - 1) // stride + 1
            for length, before, after, dilation, kernel, stride in zip(
                size,
                self.padding,
                self.padding_after,
                self.dilation,
                self.kernel,
                self.stride,
                strict=True,
            )
        )
        return height, width


# Each output pixel depends on the input pixel at the same place alone.
_SINGLE_PIXEL = _Geometry((1, 1), (1, 1), (0, 0), (0, 0), (1, 1))


class CpuLayer:
    """One convolution or linear layer with 2:4 weights, or its dense twin, on the CPU.

    Made by `from_conv` or `from_linear`; called with an input, it returns the output. Bias,
    the addition of a residual, and an activation after it cost no pass of their own. The output
    has the same bits for any number of threads.

    Pixels, or tokens, are what fills the vectors: with fewer than the processor's vectors
    hold (16 with AVX-512) a dense library is faster. Measure both.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        activation: str,
        sparse: bool,
        geometry: _Geometry | None,
        groups: int = 1,
    ) -> None:
        _require_weight(weight, bias, sparse)
        self.rows, self.columns = weight.shape[:2]
        self.activation, self.sparse, self.groups = activation, sparse, groups
        self.geometry = geometry
        # Depths in the order of the packing: position in the kernel, then channel.
        taps = weight.detach().flatten(2) if weight.dim() > 2 else weight.detach()[:, :, None]
        matrix = taps.transpose(1, 2).reshape(self.rows, -1)
        self._packed = _pack(matrix, groups, sparse)
        self._bias = _padded_bias(bias, self.rows, groups)
        self._prepared = lru_cache(maxsize=32)(self._prepare)

    def plan(self, shape: torch.Size, threads: int) -> Plan | None:
        """Return how inputs of a shape are computed, to be run again and again; None if empty.

        Unlike a call, `Plan.run` does not look at what it is given.
        """
        return self._prepare(shape, min(threads, MOST_THREADS))[1]

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, activation: str = "", sparse: bool = True) -> "CpuLayer":
        """Return a layer that computes what a convolution does.

        Args:
            conv: in FP32, with input channels of each group in a multiple of four, zero padding.
            activation: what follows: `ReLU`, `ReLU6`, `hard-swish` or nothing.
            sparse: skip the zeros of the 2:4 weight; if false, the dense twin multiplies by them.

        Raises:
            ValueError: the weight is not 2:4, not FP32, or not finite, or the padding is of
                another kind.
        """
        if conv.padding_mode != "zeros":
            raise ValueError(
                f"The convolution pads with {conv.padding_mode!r}, and this engine pads with "
                "zeros. Leave it to PyTorch."
            )
        before, after = _padding(conv)
        kernel, stride, dilation = (
            (int(pair[0]), int(pair[1])) for pair in (conv.kernel_size, conv.stride, conv.dilation)
        )
        geometry = _Geometry(kernel, stride, before, after, dilation)
        return cls(conv.weight, conv.bias, activation, sparse, geometry, conv.groups)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, activation: str = "", sparse: bool = True
    ) -> "CpuLayer":
        """Return a layer that computes what a linear layer does. Arguments as in `from_conv`."""
        return cls(linear.weight, linear.bias, activation, sparse, None)

    def output_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the output for that of an input.

        Raises:
            ValueError: the layer does not take inputs of this shape.
        """
        channels = self.columns * self.groups
        if self.geometry is None:
            if not shape or shape[-1] != channels:
                raise ValueError(
                    f"The input has shape {tuple(shape)}, and this linear layer takes "
                    f"(..., {channels})."
                )
            return (*shape[:-1], self.rows)
        if len(shape) != 4 or shape[1] != channels:
            raise ValueError(
                f"The input has shape {tuple(shape)}, and this convolution takes "
                f"(images, {channels}, height, width)."
            )
        height, width = self.geometry.output(shape[2:])
        if height < 1 or width < 1:
            raise ValueError(
                f"The input has shape {tuple(shape)}, and the convolution's kernel "
                f"{self.geometry.kernel} does not fit into it."
            )
        return shape[0], self.rows, height, width

    def __call__(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        out: Tensor | None = None,
        threads: int | None = None,
    ) -> Tensor:
        """Return the layer's output.

        Args:
            input: (images, channels, height, width) of a convolution, or (..., features) of a
                linear layer; FP32, contiguous, on the CPU.
            residual: what is added before the activation, shaped as the output; it may be `out`.
                With a hard-swish there is none.
            out: where to write the output; without it memory is allocated.
            threads: how many to compute with; by default as many as PyTorch uses.

        Raises:
            ValueError: a tensor is of another shape, type or layout, or the output would
                overwrite the input.
        """
        if threads is None:
            threads = torch.get_num_threads()
        shape, plan = self._prepared(input.shape, min(threads, MOST_THREADS))
        _require_plain(input, "The input", input.shape)
        if out is None:
            out = torch.empty(shape)
        _require_plain(out, "The output", shape)
        if residual is not None:
            _require_plain(residual, "The residual", shape)
            if self.activation == HARD_SWISH:
                raise ValueError("No residual can be added before a hard-swish. Add it before.")
        if out.data_ptr() == input.data_ptr() and out.numel():
            raise ValueError("The output would overwrite the input. Give it another buffer.")
        if plan is not None:
            added = 0 if residual is None else residual.data_ptr()
            plan.run(input.data_ptr(), out.data_ptr(), added)
        return out

    def _prepare(self, shape: torch.Size, threads: int) -> tuple[torch.Size, Plan | None]:
        """Return the output's shape, and how to compute it; nothing is to be computed for none."""
        out = torch.Size(self.output_shape(shape))
        return out, self._plan(tuple(shape), threads) if out.numel() else None

    def _plan(self, shape: tuple[int, ...], threads: int) -> Plan:
        packed, geometry = self._packed, self.geometry or _SINGLE_PIXEL
        images, height, width = self._as_images(shape)
        out_height, out_width = geometry.output((height, width))
        # Vectors that begin within a cache line cost two reads each.
        in_place = (
            geometry == _SINGLE_PIXEL
            and self.geometry is not None
            and out_height * out_width % LANES == 0
        )
        return Plan(
            packed.kept,
            threads,
            (packed.values, packed.positions, self._bias),
            values=packed.values.ctypes.data,
            positions=packed.positions.ctypes.data,
            bias=self._bias.ctypes.data,
            tokens=self.geometry is None,
            images=images,
            groups=self.groups,
            channels=self.columns,
            rows=self.rows // self.groups,
            height=height,
            width=width,
            out_height=out_height,
            out_width=out_width,
            kernel_width=geometry.kernel[1],
            stride_y=geometry.stride[0],
            stride_x=geometry.stride[1],
            pad_y=geometry.padding[0],
            pad_x=geometry.padding[1],
            dilation_y=geometry.dilation[0],
            dilation_x=geometry.dilation[1],
            in_place=in_place,
            depth=packed.edges[-1],
            words=-(-packed.edges[-1] // GROUPS_PER_WORD),
            depth_blocks=len(packed.edges) - 1,
            hard_swish=self.activation == HARD_SWISH,
            floor=_BOUNDS[self.activation][0],
            ceiling=_BOUNDS[self.activation][1],
            # Each thread has units that lie beside each other: of weights and input it reads all of
            # the smaller, and of the larger only its share.
            parts_first=threads > 1
            and packed.values.nbytes > max(4 * math.prod(shape), _WEIGHTS_KEPT),
            **self._cut(images * out_height * out_width, in_place, threads),
        )

    def _as_images(self, shape: tuple[int, ...]) -> tuple[int, int, int]:
        """Return images, height and width; where pixels are single, each image is one long row."""
        if self.geometry is None:
            return 1, 1, math.prod(shape[:-1])
        images, _, height, width = shape
        if self.geometry == _SINGLE_PIXEL:
            return images, 1, height * width
        return images, height, width

    def _cut(self, pixels: int, in_place: bool, threads: int) -> dict[str, int]:
        """Cut the output into tiles by parts, and say how much scratch a unit of it takes."""
        blocks = -(-self.rows // self.groups // ROWS)
        vectors = -(-pixels // LANES)
        tiles, parts = _tiles_and_parts(
            vectors, VECTORS[self._packed.kept], self.groups, blocks, in_place, threads
        )
        widest = -(-vectors // tiles)
        deepest = int(np.diff(self._packed.edges).max())
        x_bytes = 4 * deepest * (widest + 1) * VECTOR_BYTES
        sums_bytes = -(-blocks // parts) * ROWS * widest * VECTOR_BYTES
        # Threads do not share a page.
        scratch_bytes = -(-(x_bytes + sums_bytes) // 4096) * 4096
        return {"tiles": tiles, "parts": parts, "x_bytes": x_bytes, "scratch_bytes": scratch_bytes}


def _tiles_and_parts(
    vectors: int, most_vectors: int, groups: int, blocks: int, in_place: bool, threads: int
) -> tuple[int, int]:
    """Return into how many tiles the pixels are cut, and into how many parts the rows of each.

    As few as leave the sums of a part in cache, unless the threads end earlier with more. Each
    part brings in the tile's input for itself, so that more tiles often cost less than more parts.

    Args:
        vectors: how many the pixels fill.
        most_vectors: how many a tile may have.
        groups: how many there are of each tile.
        blocks: how many blocks of rows there are to be cut.
        in_place: whether the input is read where it is.
        threads: how many take units in turn.
    """
    fewest_tiles = -(-vectors // most_vectors)
    rows_of_input = 0 if in_place else _ROWS_OF_INPUT
    cuts = []
    for tiles in range(fewest_tiles, min(vectors, 2 * fewest_tiles) + 1):
        sums = blocks * ROWS * -(-vectors // tiles) * VECTOR_BYTES
        fewest_parts = -(-sums // _SUMS_BYTES)
        most_parts = min(blocks, _MOST_UNITS * threads // (tiles * groups))
        cuts += [(tiles, parts) for parts in range(fewest_parts, max(fewest_parts, most_parts) + 1)]
        if threads == 1 or tiles * groups > _MOST_UNITS * threads:
            break

    def end(cut: tuple[int, int]) -> float:
        """Return when the last thread is done, in products of a row with a vector."""
        tiles, parts = cut
        rows = blocks * ROWS / parts
        busy = [0.0] * threads
        for group_tile in range(tiles * groups):
            tile = group_tile % tiles
            width = vectors * (tile + 1) // tiles - vectors * tile // tiles
            unit = rows * (width + _VECTORS_OF_START) + rows_of_input * width
            for _ in range(parts):
                heapq.heapreplace(busy, busy[0] + unit)
        return max(busy)

    return cuts[0] if len(cuts) == 1 or threads == 1 else min(cuts, key=lambda cut: (end(cut), cut))


def _pack(matrix: Tensor, groups: int, sparse: bool) -> _Packed:
    """Bring a weight (rows, depth) into the order in which the kernel reads it."""
    kept = 2 if sparse else 4
    # In groups of four; blocks of them begin with a word of positions.
    depth = matrix.shape[1] // 4
    words = -(-depth // GROUPS_PER_WORD)
    word_bytes = GROUPS_PER_WORD * 4 * VECTORS[kept] * VECTOR_BYTES
    most_words = min(_cache_bytes() // word_bytes, _MOST_DEPTHS // (4 * GROUPS_PER_WORD))
    depth_blocks = -(-words // max(1, most_words))
    edges = [
        min(words * i // depth_blocks * GROUPS_PER_WORD, depth) for i in range(depth_blocks + 1)
    ]
    if not sparse:
        values = _blocks(matrix.numpy(), groups, 4)
        return _Packed(kept, _joined(values, edges), np.empty(0, np.uint64), edges)
    compressed = compress_2to4(matrix)
    values = _blocks(compressed.values.numpy(), groups, 2)
    codes = _words(_blocks(compressed.positions.numpy(), groups, 2))
    word_edges = [-(-edge // GROUPS_PER_WORD) for edge in edges]
    # The kernel reads one word behind the last.
    positions = np.append(_joined(codes, word_edges), np.uint64(0))
    return _Packed(kept, _joined(values, edges), positions, edges)


def _blocks(matrix: NDArray[Any], groups: int, kept: int) -> NDArray[Any]:
    """Return (rows, depth * kept) as (groups, blocks of rows, depth, kept * ROWS).

    Rows are filled up with zeros to whole blocks.
    """
    rows = matrix.shape[0] // groups
    depth = matrix.shape[1] // kept
    blocks = -(-rows // ROWS)
    filled = np.zeros((groups, blocks * ROWS, depth, kept), matrix.dtype)
    filled[:, :rows] = matrix.reshape(groups, rows, depth, kept)
    ordered = filled.reshape(groups, blocks, ROWS, depth, kept).transpose(0, 1, 3, 4, 2)
    return ordered.reshape(groups, blocks, depth, kept * ROWS)


def _words(positions: NDArray[Any]) -> NDArray[np.uint64]:
    """Return (..., depth, 2 * ROWS) as (..., words), the first position in the lowest bits."""
    *before, depth, each = positions.shape
    missing = -depth % GROUPS_PER_WORD
    filled = np.pad(positions.astype(np.uint64), [(0, 0)] * len(before) + [(0, missing), (0, 0)])
    together = filled.reshape(*before, -1, GROUPS_PER_WORD * each)
    shifts = 2 * np.arange(GROUPS_PER_WORD * each, dtype=np.uint64)
    return np.bitwise_or.reduce(together << shifts, axis=-1)


def _joined(ordered: NDArray[Any], edges: list[int]) -> NDArray[Any]:
    """Return (groups, blocks, depth, ...) flat, cut at edges of the depth before the blocks."""
    pieces = [group[:, first:last].ravel() for group in ordered for first, last in pairwise(edges)]
    return _aligned(np.concatenate(pieces))


def _padded_bias(bias: Tensor | None, rows: int, groups: int) -> NDArray[np.float32]:
    """Return the bias of every row of whole blocks, zero where there is none."""
    each = rows // groups
    padded = np.zeros((groups, -(-each // ROWS) * ROWS), np.float32)
    if bias is not None:
        padded[:, :each] = bias.detach().numpy().reshape(groups, each)
    return padded


def _aligned(array: NDArray[Any]) -> NDArray[Any]:
    """Return a copy that starts on a cache line."""
    raw = np.empty(array.nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    aligned = raw[start : start + array.nbytes].view(array.dtype)
    aligned[:] = array
    return aligned


def _padding(conv: nn.Conv2d) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the padding before and after, as PyTorch resolves "same" and "valid"."""
    if not isinstance(conv.padding, str):
        pair = (int(conv.padding[0]), int(conv.padding[1]))
        return pair, pair
    left, right, above, below = conv._reversed_padding_repeated_twice
    return (above, left), (below, right)


def _require_weight(weight: Tensor, bias: Tensor | None, sparse: bool) -> None:
    for what, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise ValueError(
                f"The {what} is {tensor.dtype} on {tensor.device}, and this engine computes in "
                "FP32 on the CPU. Convert the layer with .float().cpu()."
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"The {what} has NaN or infinite values. Go back to a checkpoint from before "
                "the training diverged."
            )
    if weight.shape[1] % 4:
        raise ValueError(
            f"The weight has shape {tuple(weight.shape)}, and the kernel takes input channels in "
            "a multiple of four. Leave this layer to PyTorch."
        )
    if sparse and not is_2to4(weight):
        raise ValueError(
            "The weight is not 2:4: a group of four holds more than two non-zeros. Prune it with "
            "prune_2to4_, or pass sparse=False."
        )


def _require_plain(tensor: Tensor, what: str, shape: torch.Size) -> None:
    if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
        raise ValueError(
            f"{what} is {tensor.dtype} on {tensor.device}, and this engine computes in FP32 on "
            "the CPU. Convert it with .float().cpu()."
        )
    if tensor.shape != shape:
        raise ValueError(f"{what} has shape {tuple(tensor.shape)}, and {tuple(shape)} is needed.")
    if not tensor.is_contiguous():
        raise ValueError(f"{what} is not contiguous. Call .contiguous() on it first.")
