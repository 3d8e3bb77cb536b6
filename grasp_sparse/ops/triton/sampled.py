"""The kernel of wgrad, for linear layers and for convolutions: gᵀ · x at the kept blocks.

A program owns TOGETHER neighbouring blocks of one block row, which share what is read of g, and one part of the tokens. Their input
channels stand on the M side of the dot, where wgmma wants 64: four blocks of 16, two of 32, one of 64. What a program sums goes
to its own place in a workspace of float32, and the parts of the tokens are added up after it in their order: no atomics, the
same bits at every run. How many parts there are follows from shapes and the device alone.

Slots: block row r has those from ``crow[r] // TOGETHER + r`` on, one more than whole groups fit between, so that a program finds
its row by counting and no list of groups must be made; at most one slot a row stays empty.

Programs of the same tokens are neighbours: what they read of g and x comes from L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from grasp_sparse.ops.triton.places import between, on_grid, tap_and_chunk

ROWS_AT_ONCE = 256  # of crow_indices, compared in one go


@triton.jit(
    do_not_specialize=(
        "tokens", "part", "nblocks", "rows", "chunks", "chunks_magic", "chunks_shift", "pixels", "pixels_magic", "pixels_shift",
        "grid_w", "width_magic", "width_shift", "image_h", "image_w", "pad_top", "pad_left",
    )
)  # fmt: skip
def sampled_kernel(
    g,  # [tokens, out_channels], whole blocks of BH channels
    x,  # [tokens, in_channels] or [N, image_h, image_w, in_channels], whole blocks of BW channels
    crow_indices,
    col_indices,
    partial,  # [parts, nblocks, BH, BW]
    tokens,
    part,  # tokens of each part, a multiple of BT
    nblocks,
    rows,
    out_channels,
    in_channels,
    chunks,  # block columns a tap
    chunks_magic,
    chunks_shift,
    pixels,  # of an image of g
    pixels_magic,
    pixels_shift,
    grid_w,
    width_magic,
    width_shift,
    image_h,
    image_w,
    pad_top,
    pad_left,
    IMAGES: tl.constexpr,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    TOGETHER: tl.constexpr,
    PRECISION: tl.constexpr,
    BT: tl.constexpr,
    ROWS: tl.constexpr,
):
    slots = nblocks // TOGETHER + rows
    slot, split = tl.program_id(0) % slots, tl.program_id(0) // slots
    r = 1 + tl.arange(0, ROWS)
    row = 0
    for first in range(0, rows, ROWS):
        begins = tl.load(crow_indices + first + r, mask=first + r <= rows, other=0) // TOGETHER + first + r
        row += tl.sum(((begins <= slot) & (first + r <= rows)).to(tl.int32))
    start, end = tl.load(crow_indices + row), tl.load(crow_indices + row + 1)
    start += (slot - start // TOGETHER - row) * TOGETHER
    if start < end:
        i, o = tl.arange(0, TOGETHER * BW), tl.arange(0, BH)
        if TOGETHER > 1:
            entry, inner = start + i // BW, i % BW
            listed = entry < end
            block = tl.load(col_indices + entry, mask=listed, other=0)
        else:
            entry, inner = start, i
            block = tl.load(col_indices + start)
        down, right, chunk = 0, 0, block
        if IMAGES:
            RUN: tl.constexpr = BW if TOGETHER > 1 else 1
            tap_h, tap_w, chunk = tap_and_chunk(block, chunks, chunks_magic, chunks_shift, KERNEL_W, RUN)
            down, right = tap_h * DILATION_H - pad_top, tap_w * DILATION_W - pad_left
        along = (chunk * BW + inner).to(tl.int64)
        if IMAGES:
            along += (down.to(tl.int64) * image_w + right) * in_channels

        acc = tl.zeros((TOGETHER * BW, BH), tl.float32)
        begin = split * part
        last = min(begin + part, tokens)
        for t in range(begin, last, BT):
            m = t + tl.arange(0, BT)
            live = m < last
            if IMAGES:
                image, a, b = on_grid(m, pixels, pixels_magic, pixels_shift, grid_w, width_magic, width_shift)
                a, b = a * STRIDE_H, b * STRIDE_W
                read = ((image.to(tl.int64) * image_h + a) * image_w + b) * in_channels
                if TOGETHER > 1:
                    inside = live[:, None] & between(a[:, None] + down[None, :], b[:, None] + right[None, :], image_h, image_w)
                else:
                    inside = (live & between(a + down, b + right, image_h, image_w))[:, None]
            else:
                read = m.to(tl.int64) * in_channels
                inside = live[:, None]
            if TOGETHER > 1:
                inside = inside & listed[None, :]
            inputs = tl.load(x + read[:, None] + along[None, :], mask=inside, other=0.0)
            grads = tl.load(g + (m.to(tl.int64) * out_channels)[:, None] + (row * BH + o)[None, :], mask=live[:, None], other=0.0)
            acc = tl.dot(tl.trans(inputs), grads, acc, input_precision=PRECISION)

        result = partial + split.to(tl.int64) * nblocks * (BH * BW) + entry.to(tl.int64) * (BH * BW) + inner
        into = result[:, None] + (o * BW)[None, :]
        if TOGETHER > 1:
            tl.store(into, acc, mask=listed[:, None])
        else:
            tl.store(into, acc)
