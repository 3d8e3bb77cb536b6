"""Which tile a kernel runs with: short lists, of which the fastest is found by timing the call itself once, and remembered.

No choice changes a bit of the result (see product.py, sampled.py), so measured times may decide, and a call inside a
CUDA graph, which cannot be timed, takes the first of the list. Nothing else here waits for the device.

The tests compile the first tile of every list for sm_80 and sm_90, which must spill nothing and fit into the registers and the
shared memory of both; all others too with GRASP_SPARSE_ALL_KERNELS=1.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch

RUNS = 5


class Tile(NamedTuple):
    """How a kernel is cut.

    Attributes:
        size: tokens a program of the product; blocks a program of the sampled product.
        step: what one turn of the loop reduces: channels of the product, tokens of the sampled product.
        warps, stages: of Triton.
    """

    size: int
    step: int
    warps: int
    stages: int

    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


def product_tiles(dtype: torch.dtype, precision: str, produced: int, images: bool, wgmma: bool) -> tuple[Tile, ...]:
    """For blocks that make ``produced`` channels of whatever they read; the usual best first.

    Eight warps only without a window: Triton has miscompiled loops over one with eight. Tiles of 128 x 128 only where operands
    do not pass through registers on their way to the tensor cores; so with tiles of 128 x 64 over a window, of 16 bits, which
    Triton 3.6 spills where there is a stride.
    """
    if dtype == torch.float32 and precision == "ieee":  # fused multiply-adds, no tensor cores: operands live in registers
        tiles = [Tile(128 if produced == 32 else 64, 16, 4, 3)]  # the other size spills
        if produced > 32 and not images:
            tiles.append(Tile(128, 16, 8, 3))
        return tuple(tiles)
    step = 32 if dtype == torch.float32 else 64  # channels: the 128 bytes of a swizzled row of shared memory
    if produced == 128 and (not wgmma or images and dtype == torch.float32):
        tiles = [Tile(64, step, 4, 3)]
    elif produced == 64 and images and not wgmma and dtype != torch.float32:
        tiles = [Tile(64, step, 4, 3), Tile(64, step, 4, 4)]
    else:
        tiles = [Tile(128, step, 4, 3), Tile(64, step, 4, 4), Tile(128, step, 4, 4)]
    if not images:
        tiles.append(Tile(128 if produced == 128 else 256, step, 8, 3))
    return tuple(tiles)


def sampled_tiles(dtype: torch.dtype, precision: str, block_size: Sequence[int], wgmma: bool) -> tuple[Tile, ...]:
    """For kept blocks ``[bh, bw]``; the usual best first."""
    together = max(1, 64 // block_size[1])
    if dtype == torch.float32 and precision == "ieee":
        return (Tile(together, 16, 4, 2),)
    step = 64 if wgmma and dtype != torch.float32 and min(block_size) < 128 else 32  # where registers hold no more
    tiles = [Tile(together, step, 4, 3), Tile(together, step, 4, 4)]
    if wgmma and block_size[1] < 128:  # what is read of g serves twice the channels, if rows have as many blocks
        tiles.append(Tile(2 * together, step, 4, 3))
    return tuple(tiles)


def parts_of_tokens(tokens: int, step: int, programs: int, processors: int, wanted: int | None = None) -> tuple[int, int]:
    """How many parts the tokens of a sampled product are cut into, and the tokens of each (a multiple of ``step``).

    Enough to give every processor four programs, but none of less than 512 tokens, and at most 32: each part writes a
    gradient of its own. Timings play no role, because the parts are part of the order of the sum.
    """
    wanted = wanted or max(1, min(math.ceil(4 * processors / programs), math.ceil(tokens / 512), 32))
    part = math.ceil(math.ceil(tokens / wanted) / step) * step
    return math.ceil(tokens / part), part


@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def has_wgmma(device: torch.device) -> bool:
    """Whether tensor cores read operands from shared memory: wgmma, and what followed it where there is no wgmma any more (10.x)."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device)[0] in (9, 10)


_chosen: dict[Hashable, Tile] = {}


def fastest(key: Hashable, tiles: Sequence[Tile], launch: Callable[[Tile], None], device: torch.device) -> Tile:
    """The tile with which ``launch`` is fastest; timed at the first call with this key on this device."""
    if len(tiles) == 1 or device.type != "cuda":
        return tiles[0]
    key = (key, tiles, device)
    if key not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return tiles[0]
        _chosen[key] = _fastest_that_runs(tiles, launch)
    return _chosen[key]


def _fastest_that_runs(tiles: Sequence[Tile], launch: Callable[[Tile], None]) -> Tile:
    """Leaves out those that this device has too little shared memory for, or this Triton cannot compile; all of them: its error.

    Triton has an error of its own for what it refuses, and a plain RuntimeError where one of its passes fails.
    """
    from triton.errors import TritonError

    times, reason = {}, None
    for tile in tiles:
        try:
            launch(tile)
        except TritonError as error:
            reason = reason or error
        except RuntimeError as error:
            torch.cuda.synchronize()  # raises if it is the device that failed
            reason = reason or error
        else:
            times[tile] = _milliseconds(lambda: launch(tile))
    if not times:
        raise reason
    return min(times, key=times.__getitem__)


def _milliseconds(run: Callable[[], None]) -> float:
    """Of the fastest of some runs."""
    begins, ends = ([torch.cuda.Event(enable_timing=True) for _ in range(RUNS)] for _ in range(2))
    for begin, end in zip(begins, ends, strict=True):
        begin.record()
        run()
        end.record()
    ends[-1].synchronize()
    return min(begin.elapsed_time(end) for begin, end in zip(begins, ends, strict=True))
