"""The kernel of fprop and dgrad, for linear layers and for convolutions: y = relu?(x · blocks + bias).

A program owns BM tokens (rows of x, or pixels) and one list of blocks: a block row of the weight in fprop, a block column (of
all taps of a parity phase, for images) in dgrad. It walks the list, and each block takes KB channels of the token's row of x, or
of the pixel its tap points at, to the NB channels of the result that the list stands for. Tokens stand on the M side of the
dot, so that blocks of 16 and 32 still run on m64n16 and m64n32 wgmma.

BK, what one step reduces, is KB, a part of it, or several whole blocks of the list. For each result the products are summed in the
order of the list and, within a block, of its channels, whatever the tile, the number of warps and of stages: zeros that fill up a
last step change nothing. Hence the choice of a tile is free to be measured, and the bits stay.

Programs of the same tokens are neighbours: what they read of x comes from L2 once it was fetched. The list is read a step ahead, by
hand: Triton's pipeline would spend half its stages on the way from an index to what it points at.

Offsets that grow with the batch are 64-bit, once a program; those inside a row or a window are 32-bit vectors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grasp_sparse.ops.triton.places import between, on_grid, tap_and_chunk


@triton.jit
def _entry(entries, places, start, end, step, k, KB: tl.constexpr, BK: tl.constexpr):
    """The block of a step and its place in values, or those of each k where a step takes several; 0 after the end."""
    if BK <= KB:
        entry = start + step // (KB // BK)
    else:
        entry = start + step * (BK // KB) + k // KB
    block = tl.load(entries + entry, mask=entry < end, other=0)
    place = entry
    if places is not None:
        place = tl.load(places + entry, mask=entry < end, other=0)
    return block, place


@triton.jit(
    do_not_specialize=(
        "tokens", "groups", "written_blocks", "read_blocks", "blocks_magic", "blocks_shift", "pixels", "pixels_magic",
        "pixels_shift", "grid_w", "width_magic", "width_shift", "read_h", "read_w", "written_h", "written_w", "pad_top", "pad_left",
    )
)  # fmt: skip
def product_kernel(
    x,  # [tokens, read_channels] or [N, read_h, read_w, read_channels], whole blocks of KB channels
    values,  # [nblocks, NB, KB] if READ_INNER else [nblocks, KB, NB]
    pointers,  # [groups + 1] where each list begins
    entries,  # [nblocks] which block of read channels; for images tap * read_blocks + block
    places,  # [nblocks] of the entry in values, or None: in this order
    order,  # [groups] which list the programs of one tile take, or None
    bias,  # [written_channels] or None
    y,  # [tokens, written_channels] or [N, written_h, written_w, written_channels], whole blocks of NB channels
    tokens,
    groups,
    read_channels,
    written_channels,
    written_blocks,
    read_blocks,
    blocks_magic,
    blocks_shift,
    pixels,  # of the grid, which is that of the result or of one phase of it
    pixels_magic,
    pixels_shift,
    grid_w,
    width_magic,
    width_shift,
    read_h,
    read_w,
    written_h,
    written_w,
    pad_top,
    pad_left,
    IMAGES: tl.constexpr,
    TRANSPOSED: tl.constexpr,  # dgrad: the window runs backwards
    READ_INNER: tl.constexpr,  # in values, the read channels of a block are neighbours; else the written ones
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    RELU: tl.constexpr,
    KB: tl.constexpr,
    NB: tl.constexpr,
    PRECISION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    TOGETHER: tl.constexpr = BK // KB  # blocks a step, or 0
    PARTS: tl.constexpr = KB // BK  # steps a block, or 0
    tile = tl.program_id(0) // groups
    group = tl.program_id(0) % groups
    if order is not None:
        group = tl.load(order + group)
    start = tl.load(pointers + group)
    end = tl.load(pointers + group + 1)

    m = tile * BM + tl.arange(0, BM)
    live = m < tokens
    top, left, phase_h, phase_w = m, m, 0, 0
    if IMAGES:
        image, top, left = on_grid(m, pixels, pixels_magic, pixels_shift, grid_w, width_magic, width_shift)
        if TRANSPOSED:
            phase_h = group // written_blocks // STRIDE_W
            phase_w = group // written_blocks % STRIDE_W
            row, column = phase_h + top * STRIDE_H, phase_w + left * STRIDE_W
            live = live & (row < written_h) & (column < written_w)
            written = (image.to(tl.int64) * written_h + row) * written_w + column
        else:
            written = m.to(tl.int64)
            top, left = top * STRIDE_H - pad_top, left * STRIDE_W - pad_left
        read = (image.to(tl.int64) * read_h + top) * read_w + left
    else:
        written = m.to(tl.int64)
        read = written
    read *= read_channels

    k, n = tl.arange(0, BK), tl.arange(0, NB)
    across = n * (KB if READ_INNER else 1)
    acc = tl.zeros((BM, NB), tl.float32)
    steps = (end - start) * PARTS if PARTS > 0 else tl.cdiv(end - start, TOGETHER)
    block, place = _entry(entries, places, start, end, 0, k, KB, BK)
    for step in range(steps):
        if PARTS > 0:
            inner = step % PARTS * BK + k
        else:
            inner, listed = k % KB, start + step * TOGETHER + k // KB < end
        next_block, next_place = _entry(entries, places, start, end, step + 1, k, KB, BK)

        if IMAGES:
            RUN: tl.constexpr = KB if PARTS == 0 else 1
            tap_h, tap_w, chunk = tap_and_chunk(block, read_blocks, blocks_magic, blocks_shift, KERNEL_W, RUN)
            if TRANSPOSED:
                down = (phase_h + pad_top - tap_h * DILATION_H) // STRIDE_H
                right = (phase_w + pad_left - tap_w * DILATION_W) // STRIDE_W
            else:
                down, right = tap_h * DILATION_H, tap_w * DILATION_W
            along = (down.to(tl.int64) * read_w + right) * read_channels + (chunk * KB + inner)
            if PARTS > 0:
                inside = (live & between(top + down, left + right, read_h, read_w))[:, None]
            else:
                inside = live[:, None] & between(top[:, None] + down[None, :], left[:, None] + right[None, :], read_h, read_w)
        else:
            along = block * KB + inner
            inside = live[:, None]
        down_block = place.to(tl.int64) * (KB * NB) + inner * (1 if READ_INNER else NB)
        if PARTS == 0:
            inside = inside & listed[None, :]
        w = values + down_block[:, None] + across[None, :]
        if PARTS == 0:
            weights = tl.load(w, mask=listed[:, None], other=0.0)
        else:
            weights = tl.load(w)
        activations = tl.load(x + read[:, None] + along[None, :], mask=inside, other=0.0)
        acc = tl.dot(activations, weights, acc, input_precision=PRECISION)
        block, place = next_block, next_place

    column = group % written_blocks * NB + n
    if bias is not None:
        acc += tl.load(bias + column)[None, :]
    if RELU:
        acc = tl.where(acc < 0, 0.0, acc)  # lets nan through
    result = y + (written * written_channels)[:, None] + column[None, :]
    tl.store(result, acc.to(y.dtype.element_ty), mask=live[:, None])
