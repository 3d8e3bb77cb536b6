"""Lists that kernels walk and the stored indices do not hold, made on the device by one small launch at every call.

Made anew because indices are ordinary buffers that a training loop may write at any time; nothing is remembered, nothing is
copied to the host, and a CUDA graph that replays the call sees the indices of then.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("chunks", "rows", "taps", "groups", "shift_h", "shift_w"))
def regroup_kernel(
    ccol_indices,  # [taps * chunks + 1]
    row_indices,  # [nblocks]
    permutation,  # [nblocks]
    pointers,  # out [phases * chunks + 1]
    entries,  # out [nblocks]: tap * rows + block row
    places,  # out [nblocks]: of the entry in values
    chunks,
    rows,
    taps,
    groups,
    shift_h,
    shift_w,
    KERNEL_W: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DILATION_H: tl.constexpr,
    DILATION_W: tl.constexpr,
    TAPS: tl.constexpr,  # next power of two
    BLOCK: tl.constexpr,
):
    """The transposed list, which is ordered by (tap, chunk), in the order (phase of the tap, chunk, tap) in which dgrad walks it.

    Where a group begins follows from ccol_indices alone: after all entries of the taps of earlier phases, and those of lower
    chunks of its own taps. So each program writes one group and needs nothing of the others.
    """
    group = tl.program_id(0)
    phase, chunk = group // chunks, group % chunks
    t = tl.arange(0, TAPS)
    real = t < taps
    phases_of = (t // KERNEL_W * DILATION_H + shift_h) % STRIDE_H * STRIDE_W + (t % KERNEL_W * DILATION_W + shift_w) % STRIDE_W
    own = real & (phases_of == phase)
    tap_starts = tl.load(ccol_indices + t * chunks, mask=real, other=0)
    tap_ends = tl.load(ccol_indices + (t + 1) * chunks, mask=real, other=0)
    starts = tl.load(ccol_indices + t * chunks + chunk, mask=own, other=0)
    counts = tl.load(ccol_indices + t * chunks + chunk + 1, mask=own, other=0) - starts
    first = tl.sum(tl.where(real & (phases_of < phase), tap_ends - tap_starts, tl.where(own, starts - tap_starts, 0)))
    total = tl.sum(counts)
    tl.store(pointers + group, first)
    if group == groups - 1:
        tl.store(pointers + groups, first + total)

    ends = tl.cumsum(counts)
    for begin in range(0, total, BLOCK):
        p = begin + tl.arange(0, BLOCK)
        of = (p[:, None] < ends[None, :]) & (p[:, None] >= (ends - counts)[None, :])  # the tap of each entry
        tap = tl.sum(tl.where(of, t[None, :], 0), axis=1)
        source = p + tl.sum(tl.where(of, (starts - ends + counts)[None, :], 0), axis=1)
        listed = p < total
        row = tl.load(row_indices + source, mask=listed, other=0)
        tl.store(entries + first + p, tap * rows + row, mask=listed)
        tl.store(places + first + p, tl.load(permutation + source, mask=listed, other=0), mask=listed)


@triton.jit(do_not_specialize=("groups",))
def longest_first_kernel(pointers, order, groups, BLOCK: tl.constexpr):
    """Lists by falling length, equal ones as they come: each finds its rank by counting those before it."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = i < groups
    length = tl.load(pointers + 1 + i, mask=known, other=0) - tl.load(pointers + i, mask=known, other=0)
    rank = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, groups, BLOCK):
        j = first + tl.arange(0, BLOCK)
        other = tl.load(pointers + 1 + j, mask=j < groups, other=0) - tl.load(pointers + j, mask=j < groups, other=0)
        ahead = (other[None, :] > length[:, None]) | ((other[None, :] == length[:, None]) & (j[None, :] < i[:, None]))
        rank += tl.sum((ahead & (j < groups)[None, :]).to(tl.int32), axis=1)
    tl.store(order + rank, i, mask=known)
