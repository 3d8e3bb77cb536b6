"""Launches of the kernels on tensors that lie as they want: rows ``[tokens, channels]``, images ``[N, H, W, C]``, contiguous."""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from grasp_sparse.ops.triton.lists import longest_first_kernel, regroup_kernel
from grasp_sparse.ops.triton.product import product_kernel
from grasp_sparse.ops.triton.sampled import ROWS_AT_ONCE, sampled_kernel
from grasp_sparse.ops.triton.tuning import Tile, fastest, has_wgmma, parts_of_tokens, processors, product_tiles, sampled_tiles
from grasp_sparse.ops.triton.window import POINT, Window, divisor

# Kernels count tokens, and programs, in 32 bits; what they add to a token (a tile, a part's rest) must fit too.
MOST_TOKENS, SMALLEST_TILE = 2**31 - 4096, 64
# Programs of equal length need no order; where each processor has many, short ones fill the gaps of long ones anyway.
ORDERED_BELOW = 8


class Lists(NamedTuple):
    """The blocks that each block of the result is made of; see product.py."""

    pointers: Tensor
    entries: Tensor
    places: Tensor | None


class Images(NamedTuple):
    """Sizes (height, width) of what a convolution reads and writes, and of the grid whose pixels are its tokens."""

    window: Window
    read: tuple[int, int]
    grid: tuple[int, int]
    written: tuple[int, int]

    def grid_arguments(self) -> tuple[int, ...]:
        return *divisor(math.prod(self.grid)), *divisor(self.grid[1])

    def padding(self) -> tuple[int, int]:
        return self.window.padding[0], self.window.padding[2]


_NO_IMAGES = Images(POINT, (0, 0), (0, 0), (0, 0))


def on_device(tensor: Tensor):
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def product(
    x: Tensor,
    values: Tensor,
    lists: Lists,
    bias: Tensor | None,
    y: Tensor,
    precision: str,
    transposed: bool = False,
    relu: bool = False,
    images: Images | None = None,
    tile: Tile | None = None,
) -> None:
    """Writes y, whose last dimension like that of x are channels; ``values [nblocks, bh, bw]`` in any floating dtype.

    A dgrad (``transposed``) reduces the rows of blocks, fprop their columns.
    """
    bh, bw = values.shape[1:]
    reduced, produced = (bh, bw) if transposed else (bw, bh)
    geometry = images or _NO_IMAGES
    tokens = x.shape[0] * (math.prod(geometry.grid) if images else 1)
    groups = lists.pointers.shape[0] - 1
    read_channels, written_channels = x.shape[-1], y.shape[-1]
    read_blocks, written_blocks = math.ceil(read_channels / reduced), math.ceil(written_channels / produced)
    if values.shape[0] != lists.entries.shape[0]:
        raise ValueError(f"Expected {lists.entries.shape[0]} blocks of values, got {values.shape[0]}.")
    if bias is not None and bias.shape != (written_channels,):
        raise ValueError(f"Expected bias of shape [{written_channels}], got {list(bias.shape)}; give one number for each channel.")
    _check_size(tokens, groups)
    if y.numel() == 0:
        return
    if read_channels % reduced:
        x, values = _whole_blocks(x, reduced), _inside(values, lists, read_blocks, read_channels, transposed)
    # Tensor cores take 32-bit operands only with the reduced channels as neighbours; small blocks turn faster than large tiles.
    read_inner = not transposed or x.dtype == torch.float32
    values = (values.transpose(1, 2) if transposed and read_inner else values).to(x.dtype).contiguous()
    bias = None if bias is None else _whole_blocks(bias, produced).contiguous()
    whole = y if written_channels % produced == 0 else y.new_empty(*y.shape[:-1], written_blocks * produced)

    def launch(tile: Tile) -> None:
        programs = math.ceil(tokens / tile.size) * groups
        product_kernel[(programs,)](
            x, values, *lists, _longest_first(lists.pointers, programs), bias, whole,
            tokens, groups, x.shape[-1], whole.shape[-1], written_blocks, *divisor(read_blocks),
            *geometry.grid_arguments(), *geometry.read, *geometry.written, *geometry.padding(),
            IMAGES=images is not None, TRANSPOSED=transposed, READ_INNER=read_inner, **geometry.window.constants(),
            RELU=relu, KB=reduced, NB=produced,
            PRECISION=precision, BM=tile.size, BK=tile.step, **tile.options(),
        )  # fmt: skip

    tiles = product_tiles(x.dtype, precision, produced, images is not None, has_wgmma(x.device))
    shape = (transposed, x.dtype, precision, read_channels, written_channels, bh, bw, geometry)
    with on_device(x):
        launch(tile or fastest((shape, _magnitude(tokens), _magnitude(values.shape[0])), tiles, launch, x.device))
    if whole is not y:
        y.copy_(whole[..., :written_channels])


def sampled(
    g: Tensor,
    x: Tensor,
    crow_indices: Tensor,
    col_indices: Tensor,
    block_size: tuple[int, int],
    precision: str,
    images: Images | None = None,
    tile: Tile | None = None,
    parts: int | None = None,
) -> Tensor:
    """gᵀ x at the kept blocks, ``[nblocks, bh, bw]`` in float32; ``parts`` is for tests, how often the tokens are cut."""
    (bh, bw), nblocks, rows = block_size, col_indices.shape[0], crow_indices.shape[0] - 1
    geometry = images or _NO_IMAGES
    if g.shape[0] != x.shape[0]:
        raise ValueError(f"Expected g and x of one batch, got {g.shape[0]} and {x.shape[0]}.")
    tokens = g.shape[0] * (math.prod(geometry.grid) if images else 1)
    _check_size(tokens)
    if tokens == 0 or nblocks == 0:
        return g.new_zeros(nblocks, bh, bw, dtype=torch.float32)
    outputs, inputs = g.shape[-1], x.shape[-1]
    g, x = _whole_blocks(g, bh), _whole_blocks(x, bw)
    out_channels, in_channels = g.shape[-1], x.shape[-1]
    tiles = (tile,) if tile else sampled_tiles(x.dtype, precision, block_size, has_wgmma(x.device))
    step = tiles[0].step  # the same in all
    parts, part = parts_of_tokens(tokens, step, nblocks // tiles[0].size + rows, processors(x.device), parts)
    partial = g.new_empty(*(parts,) * (parts > 1), nblocks, bh, bw, dtype=torch.float32)

    def launch(tile: Tile) -> None:
        slots = nblocks // tile.size + rows
        sampled_kernel[(slots * parts,)](
            g, x, crow_indices, col_indices, partial, tokens, part, nblocks, rows, out_channels, in_channels,
            *divisor(in_channels // bw), *geometry.grid_arguments(), *geometry.read, *geometry.padding(),
            IMAGES=images is not None, **geometry.window.constants(),
            BH=bh, BW=bw, TOGETHER=tile.size,
            PRECISION=precision, BT=step, ROWS=ROWS_AT_ONCE, **tile.options(),
        )  # fmt: skip

    shape = ("sampled", x.dtype, precision, out_channels, in_channels, bh, bw, geometry)
    with on_device(x):
        launch(fastest((shape, _magnitude(tokens), _magnitude(nblocks)), tiles, launch, x.device))
    sums = partial.sum(0) if parts > 1 else partial
    return _inside_weight(sums, crow_indices, col_indices, outputs, inputs)


def _check_size(tokens: int, groups: int = 1) -> None:
    """Raises ValueError where a kernel, or a launch with the smallest tiles, would count past 32 bits."""
    if tokens > MOST_TOKENS:
        raise ValueError(f"Expected at most {MOST_TOKENS} tokens (rows, or pixels of all images), got {tokens}; split the batch.")
    if (programs := math.ceil(tokens / SMALLEST_TILE) * groups) >= 2**31:
        raise ValueError(f"Expected work for fewer than 2^31 programs, got {programs} of {tokens} tokens; split the batch.")


def regrouped(ccol_indices: Tensor, row_indices: Tensor, permutation: Tensor, rows: int, window: Window) -> Lists:
    """The lists of a convolution's dgrad: one for each phase and each block of input channels."""
    groups = (ccol_indices.shape[0] - 1) // window.taps * window.phases
    lists = Lists(ccol_indices.new_empty(groups + 1), torch.empty_like(row_indices), torch.empty_like(permutation))
    taps = triton.next_power_of_2(window.taps)
    if groups:
        with on_device(ccol_indices):
            regroup_kernel[(groups,)](
                ccol_indices, row_indices, permutation, *lists, groups // window.phases, rows, window.taps, groups,
                *window.shift, **window.constants(), TAPS=taps, BLOCK=max(16, 2048 // taps),
            )  # fmt: skip
    return lists


def _whole_blocks(x: Tensor, side: int) -> Tensor:
    """With zeros up to whole blocks of channels: rows that start at odd addresses cost a kernel more than a copy does."""
    rest = -x.shape[-1] % side
    return F.pad(x, (0, rest)) if rest else x


def _inside(values: Tensor, lists: Lists, read_blocks: int, read_channels: int, transposed: bool) -> Tensor:
    """Values, with zeros where blocks reach past the channels that are read."""
    blocks = lists.entries % read_blocks
    if lists.places is not None:
        blocks = torch.empty_like(blocks).scatter_(0, lists.places.long(), blocks)
    return _zero_past(read_channels, values, blocks, 1 if transposed else 2)


def _inside_weight(values: Tensor, crow_indices: Tensor, col_indices: Tensor, out_channels: int, in_channels: int) -> Tensor:
    """Values, with zeros where blocks reach past the weight."""
    bh, bw = values.shape[1:]
    if out_channels % bh:
        rows = torch.arange(crow_indices.shape[0] - 1, device=values.device)
        # told the size of its result, this waits for nothing
        rows = torch.repeat_interleave(rows, crow_indices.diff(), output_size=col_indices.shape[0])
        values = _zero_past(out_channels, values, rows, 1)
    if in_channels % bw:
        values = _zero_past(in_channels, values, col_indices % math.ceil(in_channels / bw), 2)
    return values


def _zero_past(channels: int, values: Tensor, blocks: Tensor, dim: int) -> Tensor:
    """Padding alone is not enough: 0 * nan is no 0. ``blocks`` says of which channels each is, in blocks, along ``dim``."""
    side = values.shape[dim]
    inside = blocks[:, None] * side + torch.arange(side, device=values.device) < channels
    return torch.where(inside.unsqueeze(3 - dim), values, 0)


def _longest_first(pointers: Tensor, programs: int) -> Tensor | None:
    """The lists by falling length, where few programs run: a long one that starts last would leave the device waiting."""
    groups = pointers.shape[0] - 1
    if groups == 1 or programs > ORDERED_BELOW * processors(pointers.device):
        return None
    order = pointers.new_empty(groups)
    longest_first_kernel[(math.ceil(groups / 64),)](pointers, order, groups, BLOCK=64)
    return order


def _magnitude(count: int) -> int:
    """Counts of about the same size are tuned once."""
    return count.bit_length()
