"""A model of the time of a matrix product on a GPU, dense or 2:4, from 13 parameters.

A library cuts the outputs of a product into tiles, which the multiprocessors of the GPU work
through in waves; it may also cut the inputs, to have more tiles. The model computes the time of
every way to cut and takes the fastest, as a library does that searches for its best kernel. The
parameters are fitted to measured times by `benchmarks/calibrate.py`. Explained in
`07_sparse_tensor_cores.ipynb`.
"""

import math
from dataclasses import dataclass, fields

import numpy as np

from helpers.measurement.roofline import datatype_named

# The ways to cut a product: rows and outputs of a tile, and into how many parts the inputs.
TILES = [(32, 32), (32, 64), (32, 128), (32, 256), (64, 32), (64, 64), (64, 128), (64, 256),
         (128, 64), (128, 128), (128, 256)]  # fmt: skip
PARTS = (1, 2, 3, 4, 6, 8)
_ROWS, _OUTPUTS, _PARTS = np.array(
    [(rows, outputs, parts) for rows, outputs in TILES for parts in PARTS], dtype=float
).T
# How many tiles a multiprocessor holds at a time: as many as fit where the largest fits once.
_HELD = np.clip(128 * 256 // (_ROWS * _OUTPUTS), 1, 4)
INPUTS_AT_ONCE = 64  # a kernel works through the inputs in steps of this many
HOT_US = 500.0  # after this many microseconds a product has slowed down by half of `heat`


@dataclass(frozen=True)
class Kernels:
    """The parameters of all kernels of one GPU, datatype and pattern.

    `launch_us` passes before a kernel works, `tile_us` before a wave of tiles does, and
    `part_us` to add up a product whose inputs are cut. `step_ns` is the least time for each
    input in a wave. `tile_tflops` is the rate of the whole GPU within tiles, and `peak_tflops` the
    rate that it sustains over a long product; there `heat` is the share by which very long
    products take longer. `feed_gbps` is the rate at which operands reach all multiprocessors,
    `cache_gbps` that of the cache and `memory_gbps` that of the memory. `side` is how many
    tiles along the outputs the kernels work on before they go to the next rows. `alone` is the
    share of the full rate that a wave takes at least, however few tiles it holds. `rounding` is
    how far an incomplete wave counts as a whole number of tiles: 1 is wholly.
    """

    launch_us: float
    tile_us: float
    part_us: float
    step_ns: float
    tile_tflops: float
    peak_tflops: float
    heat: float
    feed_gbps: float
    cache_gbps: float
    memory_gbps: float
    side: float
    alone: float
    rounding: float

    def to_vector(self) -> np.ndarray:
        """Return the parameters on scales without bounds, for a fit."""
        values = np.array([getattr(self, each.name) for each in fields(self)])
        rounding = values[-1]
        return np.append(np.log(values[:-1]), math.log(rounding / (1 - rounding)))

    @classmethod
    def from_vector(cls, vector: np.ndarray) -> "Kernels":
        """Return the parameters from what `to_vector` returned."""
        values = [*np.exp(vector[:-1]).tolist(), 1 / (1 + math.exp(-vector[-1]))]
        return cls(**dict(zip((each.name for each in fields(cls)), values, strict=True)))

    def microseconds(
        self,
        sizes: np.ndarray,
        datatype: str,
        sparse: bool,
        multiprocessors: int,
        cache_mb: float,
        read: np.ndarray | float = 1.0,
    ) -> np.ndarray:
        """Return the time of each product in microseconds.

        Args:
            sizes: (products, 3): m, n and k of each.
            datatype: a name in `helpers.measurement.roofline.DATATYPES`.
            sparse: whether the weights are compressed.
            multiprocessors: of the GPU.
            cache_mb: the GPU's last cache, in 10^6 bytes.
            read: (products,) the numbers of the activations in memory over m k: below 1 for a
                convolution, whose windows overlap.

        Returns:
            (products,) float64.
        """
        kind = datatype_named(datatype)
        width = kind.input_bytes
        stored = kind.compressed_share if sparse else 1.0
        m, n, k = np.asarray(sizes, dtype=float).T[:, :, None]
        macs = m * n * k
        down, across = np.ceil(m / _ROWS), np.ceil(n / _OUTPUTS)
        share = down * across * _PARTS / multiprocessors  # tiles of each multiprocessor
        waves = np.ceil(share / _HELD)
        last = np.ceil(share - (waves - 1) * _HELD)  # held in the last wave
        whole = (waves - 1) * _HELD + np.maximum(last, self.alone * _HELD)
        worked = self.rounding * whole + (1 - self.rounding) * np.maximum(share, 1)
        inputs = np.ceil(k / _PARTS / INPUTS_AT_ONCE) * INPUTS_AT_ONCE
        rate = self.tile_tflops * 1e6 / 2 / multiprocessors  # MACs in a microsecond
        feed = self.feed_gbps * 1e3 / multiprocessors  # bytes in a microsecond
        step = _longest(_ROWS * _OUTPUTS / rate, (_ROWS + _OUTPUTS * stored) * width / feed)
        tiles = _longest(worked * inputs * step, waves * inputs * self.step_ns / 1e3)
        tiles += waves * self.tile_us
        own = np.broadcast_to(np.asarray(read, dtype=float), (len(m),))[:, None]
        once = width * (m * k * own + n * k * stored + m * n)
        # The tiles of a wave share their operands; what the cache does not hold until the
        # next wave is read again.
        wide = np.minimum(across, self.side)
        high = np.minimum(down, np.maximum(multiprocessors * _HELD / wide, 1))
        wave = width * inputs * (high * _ROWS * own + wide * _OUTPUTS * stored)
        again = wave * _PARTS * np.maximum(down * across / (high * wide), 1) + width * m * n
        missed = 1 / (1 + (cache_mb * 1e6 / once) ** 3)
        moved = missed * np.maximum(again, once) / (self.memory_gbps * 1e3)
        moved += (1 - missed) * once / (self.cache_gbps * 1e3)
        sustained = macs / (self.peak_tflops * 1e6 / 2)
        sustained *= 1 + self.heat * sustained / (sustained + HOT_US)
        added = self.part_us + 8 * _PARTS * m * n / (self.cache_gbps * 1e3)
        times = self.launch_us + _longest(tiles, moved, sustained) + np.where(_PARTS > 1, added, 0)
        return times.min(axis=1)


def _longest(*times: np.ndarray) -> np.ndarray:
    """Return about the longest of some times that overlap; more where several are long."""
    squares = (each * each for each in times)
    return np.sqrt(np.sqrt(sum(square * square for square in squares)))
