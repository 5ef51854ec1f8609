"""The compiled part of the CPU engine: 2:4 products in FP32, decoded as they are computed.

A layer is a product of its weight, (rows, depth), with a matrix of (depth, pixels). The
innermost loop holds a few rows by a few vectors of pixels in registers. For every weight
that was kept it adds `value * vector`, and the two bits that say where the weight stood in
its group of four choose which of four vectors is read. The zeros cost nothing: not a
multiplication, not a load.

Around it, `_compute` takes one unit of a layer: it brings a block of the input into cache,
runs the loop over it, and writes the output with bias, residual and activation in it. The
*dense twin* is the same program over all four of every four weights: what it takes longer
is what sparsity saves.

The innermost loops are written in LLVM's intermediate form because only there can vectors
be named; numba compiles the rest. Both are kept on disk for the next process. All compiled
code is in this one file, since numba looks for changes in no other.
"""

import ctypes
import logging
import threading
import time
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numba
import numpy as np
from llvmlite import ir
from numba import carray, cfunc, literally, njit, prange, types
from numba.core import cgutils
from numba.core.registry import cpu_target
from numba.extending import intrinsic
from numpy.typing import NDArray

from helpers.machine import numba_threads

logger = logging.getLogger(__name__)

# --- what the processor offers ---


def processor_features() -> set[str]:
    """Return the instruction sets that numba compiles for, by LLVM's names.

    They are the processor's own, unless `NUMBA_CPU_NAME` and `NUMBA_CPU_FEATURES` say otherwise.
    """
    _, _, features = cpu_target.target_context.codegen().magic_tuple()
    return {name[1:] for name in features.split(",") if name.startswith("+")}


def _lanes(features: set[str]) -> int:
    """Return how many FP32 numbers the widest vector holds."""
    if "avx512f" in features:
        return 16
    if {"avx2", "fma"} <= features:
        return 8
    return 4


IS_X86 = llvm.get_default_triple().startswith(("x86_64", "i686"))
IS_ARM = llvm.get_default_triple().startswith(("aarch64", "arm64"))
LANES = _lanes(processor_features())
MOST_THREADS: int = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]

# Rows by vectors whose sums fit into the registers: 28 of 32, or 12 of 16. The twin reads
# a vector once for all rows and needs registers to hold it.
_MANY_REGISTERS = LANES == 16 or not IS_X86
ROWS = 4 if _MANY_REGISTERS else 2
VECTORS = {2: 7, 4: 6} if _MANY_REGISTERS else {2: 6, 4: 5}  # by weights kept of every four

VECTOR_BYTES = 4 * LANES

# Positions of two bits come in words of 64 bits, and a word holds those of so many groups of
# four, for two weights of each row. A read for every group would cost 5 % of the time.
GROUPS_PER_WORD = 64 // (4 * ROWS)

CACHE_LINE = 64
# Bytes between the weights that are read and those that are fetched meanwhile. With few pixels
# each weight is used only a few times, and a network's weights are too many for the caches.
FETCH_AHEAD = 4096

# --- what a unit of work is told ---

PLAN = np.dtype(
    [
        # Addresses that change from call to call, and others.
        *[(name, np.intp) for name in "input output residual scratch".split()],
        *[(name, np.intp) for name in "values positions bias".split()],
        # Of the threads: how many, what tells one its number, and where numbers to take are kept.
        *[(name, np.intp) for name in "threads thread_number next_thread next_units".split()],
        # The layer; channels and rows are those of one group. A linear layer has one image, with
        # its tokens in one row.
        *[(name, np.intp) for name in "tokens images groups channels rows".split()],
        *[(name, np.intp) for name in "height width out_height out_width".split()],
        *[(name, np.intp) for name in "kernel_width stride_y stride_x".split()],
        *[(name, np.intp) for name in "pad_y pad_x dilation_y dilation_x".split()],
        ("in_place", np.intp),  # whether whole tiles of the input can be read where they are
        # What follows: whether a hard-swish, and the smallest and largest output, infinite without
        # a ReLU or ReLU6.
        ("hard_swish", np.intp),
        ("floor", np.float32),
        ("ceiling", np.float32),
        # Of one output: weights in groups of four, and words of positions.
        *[(name, np.intp) for name in "depth words".split()],
        # How it is cut: the depth into blocks; the output into tiles of pixels by parts of rows.
        *[(name, np.intp) for name in "depth_blocks tiles parts".split()],
        ("parts_first", np.intp),  # whether all tiles of a part come before the next part
        ("x_bytes", np.intp),  # of the scratch, for the input of a unit
        ("scratch_bytes", np.intp),  # of each thread
    ],
    align=True,
)
"""What the compiled code knows of one layer at one input: addresses, sizes, and the cut."""

# --- LLVM's intermediate form ---

_FLOAT, _INT32, _INT64 = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_VECTOR = ir.VectorType(_FLOAT, LANES)
_BYTE = ir.IntType(8)
_QUARTER = ir.VectorType(_FLOAT, 4)
# As inline assembly calls them; None where the name is not known here.
_VECTOR_REGISTER = ("v" if LANES == 16 else "x") if IS_X86 else ("w" if IS_ARM else None)
# Masked reads and writes take the alignment as an argument before LLVM 22.
_ALIGNMENT = [_INT32(4)] if llvm.llvm_version_info < (22,) else []


# The smallest and the largest number, as vectors.
_Bounds = tuple[ir.Value, ir.Value]


class _Assembler(ir.IRBuilder):
    """LLVM's builder, with vectors at addresses that are plain integers."""

    def at(self, base: ir.Value, *offsets: ir.Value | int) -> ir.Value:
        """Return an address further on by a number of bytes."""
        for offset in offsets:
            base = self.add(base, _INT64(offset) if isinstance(offset, int) else offset)
        return base

    def times(self, a: ir.Value, b: ir.Value | int) -> ir.Value:
        return self.mul(a, _INT64(b) if isinstance(b, int) else b)

    def is_true(self, value: ir.Value) -> ir.Value:
        return self.icmp_signed("!=", value, _INT64(0))

    def read(
        self, address: ir.Value, kind: ir.Type = _VECTOR, mask: ir.Value | None = None
    ) -> ir.Value:
        """Return what lies at an address; lanes outside of the mask are zero, and not touched."""
        pointer = self.inttoptr(address, kind.as_pointer())
        if mask is None:
            value = self.load(pointer)
            value.align = 1 if isinstance(kind, ir.IntType) else 4
            return value
        arguments = [pointer, *_ALIGNMENT, mask, kind(None)]
        return self.call(self._declared("masked.load", ".p0", kind, arguments), arguments)

    def write(self, value: ir.Value, address: ir.Value, mask: ir.Value | None = None) -> None:
        """Write a value, or those lanes of it that the mask names."""
        pointer = self.inttoptr(address, value.type.as_pointer())
        if mask is None:
            self.store(value, pointer).align = 4
        else:
            arguments = [value, pointer, *_ALIGNMENT, mask]
            write = self._declared("masked.store", ".p0", ir.VoidType(), arguments)
            self.call(write, arguments)

    def opaque(self, value: ir.Value, stays: bool = False) -> ir.Value:
        """Return the same value out of an empty piece of assembly, which LLVM cannot look into.

        LLVM then merges what makes the value with nothing that uses it. If it `stays`, it is
        also made at this place, and not where it is used.
        """
        register = _VECTOR_REGISTER if isinstance(value.type, ir.VectorType) else "r"
        if register is None:
            return value
        kind = ir.FunctionType(value.type, [value.type])
        return self.asm(kind, "", f"={register},0", [value], side_effect=stays)

    def fetch(self, address: ir.Value) -> None:
        """Have a cache line brought into the second cache, to be read later."""
        arguments = [self.inttoptr(address, _BYTE.as_pointer()), _INT32(0), _INT32(2), _INT32(1)]
        kind = ir.FunctionType(ir.VoidType(), [argument.type for argument in arguments])
        fetch = cgutils.get_or_insert_function(self.module, kind, "llvm.prefetch.p0")
        self.call(fetch, arguments)

    def multiply_add(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """Return a * b + c, in one instruction where there is one."""
        return self.call(self._declared("fmuladd", "", _VECTOR, [a, b, c]), [a, b, c])

    def splat(self, scalar: ir.Value) -> ir.Value:
        """Return a vector that holds one number in every lane."""
        nothing = ir.VectorType(scalar.type, LANES)(ir.Undefined)
        return self.pick(self.insert_element(nothing, scalar, _INT32(0)), nothing, [0] * LANES)

    def pick(self, a: ir.Value, b: ir.Value, lanes: list[int]) -> ir.Value:
        """Return lanes of two vectors; the second's are counted on from the first's."""
        return self.shuffle_vector(a, b, ir.VectorType(_INT32, len(lanes))(lanes))

    def lanes_within(self, low: ir.Value, high: ir.Value) -> ir.Value:
        """Return a mask of the lanes i with low <= i < high; both fit into 32 bits."""
        numbers = ir.VectorType(_INT32, LANES)(list(range(LANES)))
        low, high = self.splat(self.trunc(low, _INT32)), self.splat(self.trunc(high, _INT32))
        above = self.icmp_signed(">=", numbers, low)
        return self.and_(above, self.icmp_signed("<", numbers, high))

    def finish(
        self,
        value: ir.Value,
        output: ir.Value,
        residual: ir.Value | None,
        bounds: _Bounds,
        mask: ir.Value | None = None,
    ) -> None:
        """Write a vector of sums to the output, with residual, and within bounds."""
        if residual is not None:
            value = self.fadd(value, self.read(residual, mask=mask))
        self.write(self.within(value, bounds), output, mask)

    def within(self, value: ir.Value, bounds: _Bounds) -> ir.Value:
        """Return a vector with its numbers moved to the nearer bound; a NaN stays one."""
        floor, ceiling = bounds
        value = self.select(self.fcmp_ordered("<", value, floor), floor, value)
        return self.select(self.fcmp_ordered(">", value, ceiling), ceiling, value)

    def hard_swish(self, value: ir.Value) -> ir.Value:
        """Return x times the part of (x + 3) / 6 that lies within 0 and 1."""
        sixth, half, zero, one = (self.splat(_FLOAT(number)) for number in (1 / 6, 0.5, 0, 1))
        share = self.multiply_add(value, sixth, half)
        return self.fmul(value, self.within(share, (zero, one)))

    def _declared(
        self, name: str, suffix: str, result: ir.Type, arguments: list[ir.Value]
    ) -> ir.Function:
        """Return one of LLVM's own functions on vectors."""
        kind = ir.FunctionType(result, [argument.type for argument in arguments])
        name = f"llvm.{name}.v{LANES}f32{suffix}"
        return cgutils.get_or_insert_function(self.module, kind, name)


class _Weights:
    """The weights of one group of four, each spread over a whole vector."""

    def __init__(self, b: _Assembler, address: ir.Value) -> None:
        self.b, self.address = b, address
        self.quarter, self.fours = -1, None

    def __getitem__(self, i: int) -> ir.Value:
        b = self.b
        if i // 4 != self.quarter:
            self.quarter = i // 4
            four = b.read(b.at(self.address, 16 * self.quarter), _QUARTER)
            repeated = b.pick(four, four, [lane % 4 for lane in range(LANES)])
            # LLVM would turn the shuffles back into loads. The loop is bound by its loads, and
            # so four weights cost one.
            self.fours = b.opaque(repeated)
        return b.pick(self.fours, self.fours, [lane // 4 * 4 + i % 4 for lane in range(LANES)])


class _RowsFunction:
    """Writes the function that computes blocks of rows over one tile of pixels.

    Its arguments are all integers but the last two, with addresses and pitches in bytes:
        x, pitch: the tile's input and the distance between its rows.
        depth: how many groups of four input rows are summed up.
        blocks: how many blocks of `ROWS` output rows are computed.
        values, positions, bias: of the first block; those of the next ones lie behind them.
        sums: the tile's output so far.
        begins: whether the sums start from the bias rather than from `sums`.
        ends: whether the output goes to `out`, finished, rather than to `sums`.
        hard_swish: whether that follows; then there is no residual.
        out, out_pitch, residual: the first output row, the distance to the next, and what is
            added to the output, laid out alike; 0 for nothing.
        lanes: how many lanes of the last vector are pixels.
        floor, ceiling: FP32, the smallest and the largest output.
    """

    ARGUMENTS = (
        "x pitch depth blocks values positions bias sums begins ends hard_swish out out_pitch "
        "residual lanes"
    ).split()

    def __init__(self, module: ir.Module, name: str, kept: int, vectors: int) -> None:
        self.kept, self.vectors = kept, vectors
        kind = ir.FunctionType(ir.VoidType(), [_INT64] * len(self.ARGUMENTS) + [_FLOAT] * 2)
        self.function = ir.Function(module, kind, name)
        self.function.linkage = "internal"
        # In a function of its own the loop has all the registers to itself.
        self.function.attributes.add("noinline")
        self.b = _Assembler(self.function.append_basic_block())
        self.arg = dict(zip(self.ARGUMENTS, self.function.args, strict=False))
        self.cells = [
            [cgutils.alloca_once(self.b, _VECTOR) for _ in range(vectors)] for _ in range(ROWS)
        ]
        with cgutils.for_range(self.b, self.arg["blocks"], intp=_INT64) as loop:
            self._write_block(loop.index)
        self.b.ret_void()

    def _write_block(self, block: ir.Value) -> None:
        b, arg = self.b, self.arg
        sums = b.at(arg["sums"], b.times(block, ROWS * self.vectors * VECTOR_BYTES))
        with b.if_else(b.is_true(arg["begins"])) as (begins, goes_on):
            with begins:
                self._start_from_bias(b.at(arg["bias"], b.times(block, ROWS * 4)))
            with goes_on:
                self._for_each_cell(sums, lambda cell, at: b.store(b.read(at), cell))
        self._add_products(block)
        with b.if_else(b.is_true(arg["ends"])) as (ends, not_yet):
            with ends:
                with b.if_then(b.is_true(arg["hard_swish"])):
                    for cell in (cell for cells in self.cells for cell in cells):
                        b.store(b.hard_swish(b.load(cell)), cell)
                self._finish(b.times(block, b.times(arg["out_pitch"], ROWS)))
            with not_yet:
                self._for_each_cell(sums, lambda cell, at: b.write(b.load(cell), at))

    def _start_from_bias(self, bias: ir.Value) -> None:
        for row, cells in enumerate(self.cells):
            start = self.b.splat(self.b.read(self.b.at(bias, 4 * row), _FLOAT))
            for cell in cells:
                self.b.store(start, cell)

    def _for_each_cell(self, sums: ir.Value, act: Callable[[ir.Value, ir.Value], Any]) -> None:
        """Do something with every register of sums and its place in memory."""
        for row, cells in enumerate(self.cells):
            for i, cell in enumerate(cells):
                act(cell, self.b.at(sums, (row * self.vectors + i) * VECTOR_BYTES))

    def _add_products(self, block: ir.Value) -> None:
        """Add the products of all groups of four."""
        b, arg = self.b, self.arg
        before = b.times(block, b.times(arg["depth"], 4 * self.kept * ROWS))
        self.values = cgutils.alloca_once_value(b, b.at(arg["values"], before))
        self.x = cgutils.alloca_once_value(b, arg["x"])
        if self.kept == 2:
            self._add_words(block)
        else:
            with cgutils.for_range(b, arg["depth"], intp=_INT64):
                self._add_all_four(b.load(self.x), _Weights(b, b.load(self.values)))
                self._go_on()

    def _go_on(self) -> None:
        """Step to the next group of four."""
        b = self.b
        b.store(b.at(b.load(self.x), b.times(self.arg["pitch"], 4)), self.x)
        b.store(b.at(b.load(self.values), 4 * self.kept * ROWS), self.values)

    def _add_words(self, block: ir.Value) -> None:
        """Add the products of all groups, a word of positions at a time."""
        b, depth = self.b, self.arg["depth"]
        words = b.udiv(b.at(depth, GROUPS_PER_WORD - 1), _INT64(GROUPS_PER_WORD))
        positions = b.at(self.arg["positions"], b.times(block, b.times(words, 8)))
        ahead = cgutils.alloca_once_value(b, b.read(positions, _INT64))
        bits = cgutils.alloca_once(b, _INT64)
        with cgutils.for_range(b, words, intp=_INT64) as word:
            b.store(b.load(ahead), bits)
            # The next word is read now: behind the reads of vectors it would come too late.
            following = b.read(b.at(positions, 8, b.times(word.index, 8)), _INT64)
            b.store(b.opaque(following, stays=True), ahead)
            for line in range(0, GROUPS_PER_WORD * 8 * ROWS, CACHE_LINE):
                b.fetch(b.at(b.load(self.values), FETCH_AHEAD + line))
            left = b.sub(depth, b.times(word.index, GROUPS_PER_WORD))
            more = b.icmp_signed(">", left, _INT64(GROUPS_PER_WORD))
            groups = b.select(more, _INT64(GROUPS_PER_WORD), left)
            with cgutils.for_range(b, groups, intp=_INT64):
                weights = _Weights(b, b.load(self.values))
                self._add_two_of_four(b.load(self.x), weights, b.load(bits))
                b.store(b.lshr(b.load(bits), _INT64(4 * ROWS)), bits)
                self._go_on()

    def _add_two_of_four(self, x: ir.Value, weights: _Weights, bits: ir.Value) -> None:
        b = self.b
        for i in range(2 * ROWS):
            # A shift and a mask: LLVM would make one instruction of them, slower on AMD.
            position = b.and_(b.opaque(b.lshr(bits, _INT64(2 * i))), _INT64(3))
            row = b.at(x, b.times(position, self.arg["pitch"]))
            for j, cell in enumerate(self.cells[i % ROWS]):
                vector = b.read(b.at(row, j * VECTOR_BYTES))
                b.store(b.multiply_add(weights[i], vector, b.load(cell)), cell)

    def _add_all_four(self, x: ir.Value, weights: _Weights) -> None:
        b = self.b
        for lane in range(4):
            column = [weights[lane * ROWS + row] for row in range(ROWS)]
            for j in range(self.vectors):
                vector = b.read(b.at(x, b.times(self.arg["pitch"], lane), j * VECTOR_BYTES))
                for weight, cells in zip(column, self.cells, strict=True):
                    b.store(b.multiply_add(weight, vector, b.load(cells[j])), cells[j])

    def _finish(self, offset: ir.Value) -> None:
        """Write the rows out; the last vector of each may be cut short."""
        b, arg = self.b, self.arg
        floor, ceiling = self.function.args[-2:]
        bounds = b.splat(floor), b.splat(ceiling)
        cut = b.icmp_signed("<", arg["lanes"], _INT64(LANES))
        mask = b.lanes_within(_INT64(0), arg["lanes"])
        with b.if_else(b.is_true(arg["residual"])) as (adds, plain):
            for branch, adding in ((adds, True), (plain, False)):
                with branch:
                    self._finish_rows(offset, adding, bounds, cut, mask)

    def _finish_rows(
        self, offset: ir.Value, adding: bool, bounds: _Bounds, cut: ir.Value, mask: ir.Value
    ) -> None:
        b, arg = self.b, self.arg
        for row, cells in enumerate(self.cells):
            down = b.at(offset, b.times(arg["out_pitch"], row))
            for j, cell in enumerate(cells):
                place = b.at(down, j * VECTOR_BYTES)
                residual = b.at(arg["residual"], place) if adding else None
                what = b.load(cell), b.at(arg["out"], place), residual, bounds
                if j < self.vectors - 1:
                    b.finish(*what)
                    continue
                with b.if_else(cut) as (short, whole):
                    with short:
                        b.finish(*what, mask)
                    with whole:
                        b.finish(*what)


def _rows_function(module: ir.Module, kept: int, vectors: int) -> ir.Function:
    """Return a module's function for so many vectors, written at the first call."""
    name = f"{'sparse' if kept == 2 else 'dense'}_rows_by_{vectors}"
    return module.globals.get(name) or _RowsFunction(module, name, kept, vectors).function


# Intrinsics take the types of their arguments, and return a signature with what generates code.


def _intrinsic(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a numba intrinsic, for checkers of types one that takes any arguments."""
    return intrinsic(prefer_literal=True)(function)


@_intrinsic
def _add_rows(typing: Any, kept: Any, vectors: Any, arguments: Any) -> Any:
    """Call the function of `_RowsFunction` for a number of vectors with a tuple of arguments."""
    wanted = [types.intp] * len(_RowsFunction.ARGUMENTS) + [types.float32] * 2

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, given: Any) -> ir.Value:
        unpacked = [
            context.cast(builder, value, kind, wish)
            for value, kind, wish in zip(
                cgutils.unpack_tuple(builder, given[2]), arguments, wanted, strict=True
            )
        ]
        after = builder.append_basic_block()
        choice = builder.switch(given[1], after)
        for count in range(1, VECTORS[kept.literal_value] + 1):
            choice.add_case(_INT64(count), builder.append_basic_block())
            builder.position_at_end(choice.cases[-1][1])
            builder.call(_rows_function(builder.module, kept.literal_value, count), unpacked)
            builder.branch(after)
        builder.position_at_end(after)
        return context.get_dummy_value()

    return types.void(kept, types.intp, arguments), generate


def _generator(write: Callable[..., ir.Value | None]) -> Callable[..., ir.Value]:
    """Return what numba calls to generate an intrinsic, from a function that takes our builder."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> ir.Value:
        b = _Assembler(builder.block)
        result = write(b, *arguments)
        builder.position_at_end(b.block)
        return context.get_dummy_value() if result is None else result

    return generate


@_intrinsic
def _gather_lanes(
    typing: Any, stride: Any, target: Any, target_pitch: Any, source: Any, source_pitch: Any,
    rows: Any, low: Any, high: Any,
) -> Any:  # fmt: skip
    """Copy one vector of each of many rows.

    Lane i comes from number i * stride of the source if low <= i < high, else it is zero and
    the source is not touched. The stride is a literal, 1 or 2.
    """

    def write(
        b: _Assembler, _: ir.Value, target: ir.Value, target_pitch: ir.Value, source: ir.Value,
        source_pitch: ir.Value, rows: ir.Value, low: ir.Value, high: ir.Value,
    ) -> None:  # fmt: skip
        masks = [b.lanes_within(low, high)]
        if stride.literal_value == 2:
            masks = _masks_of_pairs(b, masks[0])
        with cgutils.for_range(b, rows, intp=_INT64) as row:
            value = _read_strided(b, b.at(source, b.times(row.index, source_pitch)), masks)
            b.write(value, b.at(target, b.times(row.index, target_pitch)))

    return types.void(stride, *[types.intp] * 7), _generator(write)


@_intrinsic
def _gather_vectors(
    typing: Any, stride: Any, target: Any, target_pitch: Any, source: Any, source_pitch: Any,
    rows: Any, vectors: Any,
) -> Any:  # fmt: skip
    """Copy several whole vectors of each of many rows, from every number or every second one."""
    step = stride.literal_value

    def write(
        b: _Assembler, _: ir.Value, target: ir.Value, target_pitch: ir.Value, source: ir.Value,
        source_pitch: ir.Value, rows: ir.Value, vectors: ir.Value,
    ) -> None:  # fmt: skip
        with cgutils.for_range(b, rows, intp=_INT64) as row:
            since = b.at(source, b.times(row.index, source_pitch))
            to = b.at(target, b.times(row.index, target_pitch))
            with cgutils.for_range(b, vectors, intp=_INT64) as vector:
                place = b.at(since, b.times(vector.index, step * VECTOR_BYTES))
                value = _read_strided(b, place, [None] * step)
                b.write(value, b.at(to, b.times(vector.index, VECTOR_BYTES)))

    return types.void(stride, *[types.intp] * 6), _generator(write)


def _read_strided(b: _Assembler, place: ir.Value, masks: list[ir.Value | None]) -> ir.Value:
    """Return a vector of every first or every second number, as there are one or two masks."""
    first = b.read(place, mask=masks[0])
    if len(masks) == 1:
        return first
    # The second vector starts one number early, so that it ends with the last number wanted.
    second = b.read(b.at(place, VECTOR_BYTES - 4), mask=masks[1])
    half = LANES // 2
    return b.pick(first, second, [2 * i + (i >= half) for i in range(LANES)])


def _masks_of_pairs(b: _Assembler, mask: ir.Value) -> list[ir.Value]:
    """Return the masks of the two vectors that `_read_strided` takes every second number from."""
    half = LANES // 2
    none = mask.type(None)
    first = b.pick(mask, none, [i // 2 if i % 2 == 0 else LANES for i in range(LANES)])
    second = b.pick(mask, none, [half + i // 2 if i % 2 else LANES for i in range(LANES)])
    return [first, second]


@_intrinsic
def _finish_run(
    typing: Any, target: Any, source: Any, residual: Any, length: Any, floor: Any, ceiling: Any
) -> Any:
    """Write a run of sums to the output, with residual (an address, or 0), and within bounds."""

    def write(
        b: _Assembler, target: ir.Value, source: ir.Value, residual: ir.Value,
        length: ir.Value, floor: ir.Value, ceiling: ir.Value,
    ) -> None:  # fmt: skip
        bounds = b.splat(floor), b.splat(ceiling)
        whole = b.udiv(length, _INT64(LANES))
        rest = b.sub(length, b.times(whole, LANES))
        mask = b.lanes_within(_INT64(0), rest)

        def finish(offset: ir.Value, adding: bool, mask: ir.Value | None = None) -> None:
            value = b.read(b.at(source, offset), mask=mask)
            added = b.at(residual, offset) if adding else None
            b.finish(value, b.at(target, offset), added, bounds, mask)

        with b.if_else(b.is_true(residual)) as branches:
            for branch, adding in zip(branches, (True, False), strict=True):
                with branch:
                    with cgutils.for_range(b, whole, intp=_INT64) as loop:
                        finish(b.times(loop.index, VECTOR_BYTES), adding)
                    with b.if_then(b.is_true(rest)):
                        finish(b.times(whole, VECTOR_BYTES), adding, mask)

    return types.void(*[types.intp] * 4, *[types.float32] * 2), _generator(write)


@_intrinsic
def _apply_hard_swish(typing: Any, sums: Any, vectors: Any) -> Any:
    """Replace vectors of sums, one behind the other, by their hard-swish."""

    def write(b: _Assembler, sums: ir.Value, vectors: ir.Value) -> None:
        with cgutils.for_range(b, vectors, intp=_INT64) as vector:
            place = b.at(sums, b.times(vector.index, VECTOR_BYTES))
            b.write(b.hard_swish(b.read(place)), place)

    return types.void(types.intp, types.intp), _generator(write)


@_intrinsic
def _transpose_square(
    typing: Any, finishes: Any, target: Any, target_pitch: Any, source: Any, source_pitch: Any,
    residual: Any, floor: Any, ceiling: Any,
) -> Any:  # fmt: skip
    """Transpose LANES by LANES numbers in registers.

    Where the literal `finishes` is true they are an output: a residual (an address, or 0) is
    added, and they are moved within bounds.
    """

    def write(
        b: _Assembler, _: ir.Value, target: ir.Value, target_pitch: ir.Value,
        source: ir.Value, source_pitch: ir.Value, residual: ir.Value, floor: ir.Value,
        ceiling: ir.Value,
    ) -> None:  # fmt: skip
        rows = [b.read(b.at(source, b.times(source_pitch, i))) for i in range(LANES)]
        rows = _transposed(b, rows)
        places = [b.times(target_pitch, i) for i in range(LANES)]
        if not finishes.literal_value:
            for row, place in zip(rows, places, strict=True):
                b.write(row, b.at(target, place))
        else:
            bounds = b.splat(floor), b.splat(ceiling)
            with b.if_else(b.is_true(residual)) as branches:
                for branch, adding in zip(branches, (True, False), strict=True):
                    with branch:
                        for row, place in zip(rows, places, strict=True):
                            added = b.at(residual, place) if adding else None
                            b.finish(row, b.at(target, place), added, bounds)

    return types.void(finishes, *[types.intp] * 5, *[types.float32] * 2), _generator(write)


def _transposed(b: _Assembler, rows: list[ir.Value]) -> list[ir.Value]:
    """Return the columns of a square, by exchanging its off-diagonal halves, quarters, ..."""
    rows = list(rows)
    size = LANES // 2
    while size:
        for i in (i for i in range(LANES) if not i & size):
            upper, lower = rows[i], rows[i + size]
            from_upper = [j if not j & size else LANES + j - size for j in range(LANES)]
            from_lower = [j + size if not j & size else LANES + j for j in range(LANES)]
            rows[i] = b.pick(upper, lower, from_upper)
            rows[i + size] = b.pick(upper, lower, from_lower)
        size //= 2
    return rows


@_intrinsic
def _read(typing: Any, address: Any) -> Any:
    """Return the FP32 number at an address."""

    def read(b: _Assembler, address: ir.Value) -> ir.Value:
        return b.read(address, _FLOAT)

    return types.float32(types.intp), _generator(read)


@_intrinsic
def _write(typing: Any, address: Any, value: Any) -> Any:
    """Write an FP32 number to an address."""

    def write(b: _Assembler, address: ir.Value, value: ir.Value) -> None:
        b.write(value, address)

    return types.void(types.intp, types.float32), _generator(write)


@_intrinsic
def _take_next(typing: Any, counter: Any) -> Any:
    """Return the count at an address and raise it by one, in one step for all threads."""

    def take(b: _Assembler, counter: ir.Value) -> ir.Value:
        pointer = b.inttoptr(counter, _INT64.as_pointer())
        return b.atomic_rmw("add", pointer, _INT64(1), "monotonic")

    return types.int64(types.intp), _generator(take)


@_intrinsic
def _call(typing: Any, function: Any, plan: Any) -> Any:
    """Call a compiled function of a plan at an address."""

    def call(b: _Assembler, function: ir.Value, plan: ir.Value) -> None:
        kind = ir.FunctionType(ir.VoidType(), [_INT64])
        b.call(b.inttoptr(function, kind.as_pointer()), [plan])

    return types.void(types.intp, types.intp), _generator(call)


@_intrinsic
def _call_for_number(typing: Any, function: Any) -> Any:
    """Call the C function at an address, which takes nothing and returns an int."""

    def call(b: _Assembler, function: ir.Value) -> ir.Value:
        kind = ir.FunctionType(_INT32, [])
        return b.sext(b.call(b.inttoptr(function, kind.as_pointer()), []), _INT64)

    return types.int64(types.intp), _generator(call)


# --- one unit of a layer ---

_helper = njit(nogil=True, error_model="numpy")


@_helper
def _pack_tap(
    plan: Any, x: int, pitch: int, pixel: int, pixels: int, source: int, rows: int, tap: int
) -> None:
    """Copy what one position of the kernel sees of a tile, for several channels.

    The channels begin at `source` in the first image and go to `x`, a pitch apart. The tile
    begins at an output pixel, counted through all images. `tap` counts the positions of the
    kernel row by row.
    """
    size = plan.out_height * plan.out_width
    plane = plan.height * plan.width
    down = tap // plan.kernel_width * plan.dilation_y - plan.pad_y
    right = tap % plan.kernel_width * plan.dilation_x - plan.pad_x
    image, start = divmod(pixel, size)
    out_y, out_x = divmod(start, plan.out_width)
    done = 0
    while done < pixels:
        length = min(plan.out_width - out_x, pixels - done)
        in_y = out_y * plan.stride_y + down
        in_x = out_x * plan.stride_x + right
        low, high = _inside(in_x, plan.stride_x, plan.width, length)
        if in_y < 0 or in_y >= plan.height:
            high = low
        before = image * plan.groups * plan.channels * plane + in_y * plan.width + in_x
        to, since = x + 4 * done, source + 4 * before
        _pack_run(to, pitch, since, 4 * plane, rows, length, low, high, plan.stride_x)
        done += length
        out_x = 0
        out_y += 1
        if out_y == plan.out_height:
            out_y = 0
            image += 1


@_helper
def _inside(start: int, stride: int, width: int, length: int) -> tuple[int, int]:
    """Return the range of i within `length` for which start + i * stride is within `width`."""
    if stride == 1:  # the usual one needs no division
        return min(max(-start, 0), length), min(max(width - start, 0), length)
    low = 0 if start >= 0 else (-start + stride - 1) // stride
    high = 0 if start >= width else (width - 1 - start) // stride + 1
    return min(low, length), min(high, length)


@_helper
def _pack_run(
    target: int, target_pitch: int, source: int, source_pitch: int, rows: int,
    length: int, low: int, high: int, stride: int,
) -> None:  # fmt: skip
    """Copy a run of pixels of many channels, zeros outside of low <= i < high.

    Whole vectors are written; what they write too much, the next run overwrites.
    """
    if stride > 2:
        _pack_slowly(target, target_pitch, source, source_pitch, rows, length, low, high, stride)
        return
    done = 0
    while done < length:
        to, since = target + 4 * done, source + 4 * done * stride
        vectors = (high - done) // LANES if low <= done else 0
        if vectors > 0:
            if stride == 1:
                _gather_vectors(1, to, target_pitch, since, source_pitch, rows, vectors)
            else:
                _gather_vectors(2, to, target_pitch, since, source_pitch, rows, vectors)
            done += vectors * LANES
            continue
        if stride == 1:
            _gather_lanes(1, to, target_pitch, since, source_pitch, rows, low - done, high - done)
        else:
            _gather_lanes(2, to, target_pitch, since, source_pitch, rows, low - done, high - done)
        done += LANES


@_helper
def _pack_slowly(
    target: int, target_pitch: int, source: int, source_pitch: int, rows: int,
    length: int, low: int, high: int, stride: int,
) -> None:  # fmt: skip
    for row in range(rows):
        for i in range(length):
            value = np.float32(0)
            if low <= i < high:
                value = _read(source + row * source_pitch + 4 * i * stride)
            _write(target + row * target_pitch + 4 * i, value)


@_helper
def _pack_pixels(
    plan: Any, x: int, pitch: int, pixel: int, pixels: int, group: int, first: int, last: int
) -> None:
    """Bring depths first to last of a tile of a convolution into cache."""
    plane = plan.height * plan.width
    while first < last:
        tap = first // plan.channels
        channel = first - tap * plan.channels
        rows = min(plan.channels - channel, last - first)
        source = plan.input + 4 * (group * plan.channels + channel) * plane
        _pack_tap(plan, x, pitch, pixel, pixels, source, rows, tap)
        x += rows * pitch
        first += rows


@_helper
def _pack_tokens(
    target: int, target_pitch: int, source: int, source_pitch: int, tokens: int, features: int
) -> None:
    """Bring some features of a tile of tokens into cache, transposed."""
    for token in range(0, tokens, LANES):
        for feature in range(0, features, LANES):
            to = target + feature * target_pitch + 4 * token
            since = source + token * source_pitch + 4 * feature
            if token + LANES <= tokens and feature + LANES <= features:
                nothing = np.float32(0)
                _transpose_square(0, to, target_pitch, since, source_pitch, 0, nothing, nothing)
                continue
            for i in range(min(LANES, tokens - token)):
                for j in range(min(LANES, features - feature)):
                    _write(to + j * target_pitch + 4 * i, _read(since + i * source_pitch + 4 * j))


@_helper
def _finish_tokens(
    target: int, target_pitch: int, source: int, source_pitch: int, residual: int,
    rows: int, tokens: int, floor: float, ceiling: float,
) -> None:  # fmt: skip
    """Write sums of rows by tokens to an output of tokens by rows."""
    for row in range(0, rows, LANES):
        for token in range(0, tokens, LANES):
            offset = token * target_pitch + 4 * row
            since = source + row * source_pitch + 4 * token
            if row + LANES <= rows and token + LANES <= tokens:
                added = residual + offset if residual else 0
                _transpose_square(
                    1, target + offset, target_pitch, since, source_pitch, added, floor, ceiling
                )
                continue
            for i in range(min(LANES, rows - row)):
                for j in range(min(LANES, tokens - token)):
                    place = offset + j * target_pitch + 4 * i
                    value = _read(since + i * source_pitch + 4 * j)
                    if residual:
                        value += _read(residual + place)
                    value = floor if value < floor else value
                    _write(target + place, ceiling if value > ceiling else value)


@_helper
def _finish_pixels(
    plan: Any, sums: int, pitch: int, pixel: int, pixels: int, row: int, rows: int
) -> None:
    """Write sums to the output, image by image; `row` is the first one's number in an image."""
    size = plan.out_height * plan.out_width
    done = 0
    while done < pixels:
        image = (pixel + done) // size
        start = pixel + done - image * size
        length = min(size - start, pixels - done)
        offset = 4 * ((image * plan.groups * plan.rows + row) * size + start)
        for i in range(rows):
            place = offset + 4 * i * size
            added = plan.residual + place if plan.residual else 0
            since = sums + i * pitch + 4 * done
            _finish_run(plan.output + place, since, added, length, plan.floor, plan.ceiling)
        done += length


@_helper
def _finish(plan: Any, sums: int, pitch: int, pixel: int, pixels: int, row: int, rows: int) -> None:
    """Write sums to the output, whose layout the plan tells."""
    if not plan.tokens:
        _finish_pixels(plan, sums, pitch, pixel, pixels, row, rows)
        return
    offset = 4 * (pixel * plan.rows + row)
    added = plan.residual + offset if plan.residual else 0
    _finish_tokens(
        plan.output + offset, 4 * plan.rows, sums, pitch, added, rows, pixels, plan.floor,
        plan.ceiling,
    )  # fmt: skip


class _Unit(NamedTuple):
    """One tile of pixels by one part of the rows of one group."""

    group: int
    pixel: int  # the first one, counted through all images
    pixels: int
    vectors: int
    image: int
    start: int  # the first pixel within its image
    block: int  # of rows: the first one
    end: int  # the one behind the last

    # How far the sums go straight to the output: to this block, which comes last but for a
    # block with fewer rows than `ROWS`; nowhere if the output's layout is another one.
    direct_end: int


@_helper
def _unit(plan: Any, number: int) -> _Unit:
    if plan.parts_first:
        number, tile = divmod(number, plan.tiles)
        group, part = divmod(number, plan.parts)
    else:
        number, part = divmod(number, plan.parts)
        group, tile = divmod(number, plan.tiles)
    size = plan.out_height * plan.out_width
    all_vectors = (plan.images * size + LANES - 1) // LANES
    first = all_vectors * tile // plan.tiles
    vectors = all_vectors * (tile + 1) // plan.tiles - first
    pixel = first * LANES
    pixels = min(vectors * LANES, plan.images * size - pixel)
    image, start = divmod(pixel, size)
    blocks = _blocks(plan)
    block = blocks * part // plan.parts
    end = blocks * (part + 1) // plan.parts
    direct = not plan.tokens and start + pixels <= size
    direct_end = min(end, plan.rows // ROWS) if direct else block
    return _Unit(group, pixel, pixels, vectors, image, start, block, end, direct_end)


@_helper
def _blocks(plan: Any) -> int:
    """Return how many blocks of rows a group has."""
    return (plan.rows + ROWS - 1) // ROWS


@_helper
def _words(depth: int) -> int:
    """Return how many words hold the positions of so many groups of four."""
    return (depth + GROUPS_PER_WORD - 1) // GROUPS_PER_WORD


@_helper
def _bring_in(plan: Any, unit: _Unit, x: int, first: int, last: int) -> tuple[int, int]:
    """Have groups of four depths, first to last, of a tile as the innermost loop wants them.

    Returns:
        Their address, `x` unless they are read where they are, and the distance between rows.
    """
    size = plan.out_height * plan.out_width
    pitch = unit.vectors * VECTOR_BYTES
    if plan.in_place and unit.start + unit.vectors * LANES <= size:
        channel = (unit.image * plan.groups + unit.group) * plan.channels + 4 * first
        return plan.input + 4 * (channel * size + unit.start), 4 * size
    if plan.tokens:
        source = plan.input + 4 * (unit.pixel * plan.channels + 4 * first)
        _pack_tokens(x, pitch, source, 4 * plan.channels, unit.pixels, 4 * (last - first))
        return x, pitch
    # Pixels are copied in whole vectors, which may end behind the tile.
    pitch += VECTOR_BYTES
    _pack_pixels(plan, x, pitch, unit.pixel, unit.pixels, unit.group, 4 * first, 4 * last)
    return x, pitch


@_helper
def _add_depths(
    plan: Any, kept: int, unit: _Unit, x: int, pitch: int, sums: int, first: int, last: int
) -> None:
    """Add what groups of four depths, first to last, contribute to the sums of a unit.

    After the last depth the sums of blocks before `direct_end` go to the output.
    """
    kept = literally(kept)
    size = plan.out_height * plan.out_width
    depth = last - first
    blocks = _blocks(plan)
    # Weights lie by group, block of depths, and block of rows.
    values = (unit.group * plan.depth + first) * blocks
    positions = (unit.group * plan.words + first // GROUPS_PER_WORD) * blocks
    row = (unit.image * plan.groups + unit.group) * plan.rows
    middle = unit.direct_end if last == plan.depth else unit.block
    for block, end, ends in ((unit.block, middle, True), (middle, unit.end, False)):
        if block == end:
            continue
        out = 4 * ((row + block * ROWS) * size + unit.start)
        _add_rows(
            kept,
            unit.vectors,
            (
                x, pitch, depth, end - block,
                plan.values + (values + block * depth) * 4 * kept * ROWS,
                plan.positions + (positions + block * _words(depth)) * 8,
                plan.bias + (unit.group * blocks + block) * 4 * ROWS,
                sums + (block - unit.block) * ROWS * unit.vectors * VECTOR_BYTES,
                first == 0, ends, plan.hard_swish,
                plan.output + out, 4 * size, plan.residual + out if plan.residual else 0,
                unit.pixels - (unit.vectors - 1) * LANES, plan.floor, plan.ceiling,
            ),
        )  # fmt: skip


@_helper
def _compute(plan: Any, kept: int, number: int, scratch: int) -> None:
    """Compute one unit of a layer.

    Args:
        plan: the layer, a record of `PLAN`.
        kept: how many weights of every four its values hold, 2 or 4.
        number: the unit.
        scratch: where this thread keeps the unit's input, and sums that are not yet complete.
    """
    kept = literally(kept)
    unit = _unit(plan, number)
    sums = scratch + plan.x_bytes
    for i in range(plan.depth_blocks):
        first = plan.words * i // plan.depth_blocks * GROUPS_PER_WORD
        last = min(plan.words * (i + 1) // plan.depth_blocks * GROUPS_PER_WORD, plan.depth)
        x, pitch = _bring_in(plan, unit, scratch, first, last)
        _add_depths(plan, kept, unit, x, pitch, sums, first, last)
    left = min(unit.end * ROWS, plan.rows) - unit.direct_end * ROWS
    if left > 0:
        pitch = unit.vectors * VECTOR_BYTES
        sums += (unit.direct_end - unit.block) * ROWS * pitch
        row = unit.group * plan.rows + unit.direct_end * ROWS
        if plan.hard_swish:
            _apply_hard_swish(sums, left * unit.vectors)
        _finish(plan, sums, pitch, unit.pixel, unit.pixels, row, left)


@_helper
def _compute_units(plans: Any, kept: int) -> None:
    """Compute units of a layer until no thread has left any.

    Each thread begins with units of its own, the same in each run and beside each other, since
    its caches hold what it computed of the layer before. Then it helps the others.
    """
    kept = literally(kept)
    plan = carray(plans, 1)[0]
    units = plan.groups * plan.tiles * plan.parts
    if plan.thread_number:
        thread = _call_for_number(plan.thread_number)
    else:
        thread = _take_next(plan.next_thread)
    scratch = plan.scratch + thread * plan.scratch_bytes
    for i in range(plan.threads):
        owner = (thread + i) % plan.threads
        first = units * owner // plan.threads
        end = units * (owner + 1) // plan.threads
        number = first + _take_next(plan.next_units + owner * CACHE_LINE)
        while number < end:
            _compute(plan, kept, number, scratch)
            number = first + _take_next(plan.next_units + owner * CACHE_LINE)


# What is compiled: plain functions with nothing bound to them, for numba finds those again.


def _sparse(plans: Any) -> None:
    _compute_units(plans, 2)


def _dense_twin(plans: Any) -> None:
    _compute_units(plans, 4)


def _on_each_thread(work: int, plan: int, threads: int) -> None:
    """Call the function at an address once on each thread."""
    for _ in prange(threads):
        _call(work, plan)


# --- compile once, run on several threads ---


@cache
def _work(kept: int) -> Any:
    """Return the compiled function that computes units of a layer."""
    signature = types.void(types.CPointer(numba.from_dtype(PLAN)))
    what, function = {2: ("sparse kernel", _sparse), 4: ("dense twin", _dense_twin)}[kept]

    def compile(keep: bool) -> Any:
        options: dict[str, Any] = {"cache": keep, "error_model": "numpy"}
        return cfunc(signature, **options)(function)

    return _compiled(compile, what)


@cache
def _start() -> Any:
    """Return the compiled function that calls another one on several threads."""
    signature = types.void(types.intp, types.intp, types.intp)

    def compile(keep: bool) -> Any:
        return njit(signature, parallel=True, nogil=True, cache=keep)(_on_each_thread)

    return _compiled(compile, "start of threads")


@cache
def _gomp() -> Any:
    """Return PyTorch's OpenMP if it is GCC's, else None.

    `GOMP_parallel` is the function behind `#pragma omp parallel`: it calls another on several
    threads. Numba would load a second OpenMP, and the threads of each spin for a while after their
    work, in the way of the other's.
    """
    try:
        gomp = ctypes.CDLL("libgomp.so.1")
        gomp.GOMP_parallel.argtypes = [
            ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
        ]  # fmt: skip
        gomp.GOMP_parallel.restype = None
    except (OSError, AttributeError):
        return None  # another OpenMP, as on macOS and Windows
    return gomp


@cache
def _thread_number() -> int:
    """Return the address of the function that tells a thread its number, or 0."""
    gomp = _gomp()
    return ctypes.cast(gomp.omp_get_thread_num, ctypes.c_void_p).value or 0 if gomp else 0


def _compiled(compile: Callable[[bool], Any], what: str) -> Any:
    """Compile for this processor, or fetch what an earlier process compiled.

    Args:
        compile: returns the compiled function; its argument says whether to keep it on disk.
        what: what to call it in the log.
    """
    begin = time.perf_counter()
    try:
        made = compile(True)
    except (RuntimeError, OSError) as error:
        # Numba has no error of its own for a folder that cannot be written.
        if isinstance(error, RuntimeError) and "no locator available" not in str(error):
            raise
        warnings.warn(
            "The CPU kernels cannot be kept on disk and are compiled again in every process: "
            f"{error}. Set NUMBA_CACHE_DIR to a folder that can be written.",
            RuntimeWarning,
            stacklevel=2,
        )
        made = compile(False)
    hits = made.cache_hits if hasattr(made, "cache_hits") else sum(made.stats.cache_hits.values())
    if not hits:
        seconds = time.perf_counter() - begin
        logger.info("Compiled the CPU's %s, vectors of %d, in %.1f s.", what, LANES, seconds)
    return made


# Two layers never run at once: they would share the scratch, and numba's simplest threads
# cannot be started twice.
_running = threading.Lock()
# The next thread, and of each thread the next unit; none of them shares a cache line.
_numbers = np.zeros((1 + MOST_THREADS, CACHE_LINE // 8), np.int64)


class _Scratch:
    """Memory for the units that are being computed; all layers share it and it only grows."""

    def __init__(self) -> None:
        self.size = 0
        self.grow(1)

    def grow(self, size: int) -> None:
        """Have at least so many bytes, from the edge of a page on."""
        if size > self.size:
            self.memory = np.empty(size + 4096, np.uint8)
            self.size = size
            self.address = self.memory.ctypes.data + -self.memory.ctypes.data % 4096


_scratch = _Scratch()


class Plan:
    """One layer at one input shape, ready to be computed again and again.

    Args:
        kept: how many weights of every four the values hold, 2 or 4.
        threads: how many threads share the work.
        memory: the arrays that fields hold the addresses of; they live as long as the plan.
        fields: all of `PLAN` but the addresses that change from call to call.
    """

    def __init__(
        self, kept: int, threads: int, memory: tuple[NDArray[Any], ...], **fields: float
    ) -> None:
        self.kept, self.threads, self.memory = kept, threads, memory
        record = np.zeros(1, PLAN)
        for name, value in fields.items():
            record[name] = value
        record["threads"] = threads
        record["thread_number"] = _thread_number() if threads > 1 else 0
        record["next_thread"] = _numbers.ctypes.data
        record["next_units"] = _numbers.ctypes.data + CACHE_LINE
        self.scratch_bytes = threads * int(record["scratch_bytes"][0])
        self._address = record.ctypes.data
        # A view, because a structured array is slow to write to.
        self._addresses = record.view(np.intp)[:4]

    def run(self, input: int, output: int, residual: int) -> None:
        """Compute the layer: addresses of its tensors, of the residual 0 if there is none."""
        work = _work(self.kept)
        with _running:
            _scratch.grow(self.scratch_bytes)
            self._addresses[:] = input, output, residual, _scratch.address
            _numbers[: 1 + self.threads] = 0
            if self.threads == 1:
                work.ctypes(self._address)
            elif (gomp := _gomp()) is not None:
                gomp.GOMP_parallel(work.address, self._address, self.threads, 0)
            else:
                with numba_threads():
                    _start()(work.address, self._address, self.threads)
