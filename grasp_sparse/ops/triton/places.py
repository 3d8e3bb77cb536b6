"""Where a kernel reads and writes: arithmetic that the kernels share, inlined into them.

Images lie in memory as ``[N, H, W, C]`` (channels_last). A product reads, for a pixel of its grid and a tap of the window, one
pixel of the other image, or nothing where the window reaches into the padding:

* fprop: pixel ``(a, b)`` of the result reads row ``a * stride - pad + ky * dilation`` of x.
* dgrad: a pixel ``i`` of the result reads the rows ``j`` of g with ``i = j * stride - pad + ky * dilation``. With stride s, pixels
  of one parity phase ``i % s`` all have the same such taps, and those of the other phases never meet them: the grid is that of
  one phase, ``i = phase + a * s``, and reads row ``a + (phase + pad - ky * dilation) / s``, a division without a rest. Every tap
  belongs to one phase only, so nothing is multiplied that does not count, at any stride.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def divided(m, magic, shift, RUN: tl.constexpr = 1):
    """m // d in three instructions, for 0 <= m < 2^31; see window.Divisor.

    RUN: so many lanes have one m. The compiler knows it of m, not of a high product, and makes wide loads only of what it knows.
    The hint stands on the operation itself: one on the result or the argument of a function is gone once that is inlined.
    """
    doubled = m.to(tl.uint32) << 1
    quotient = tl.umulhi(doubled, magic.to(tl.uint32, bitcast=True) + tl.zeros_like(doubled)) >> shift.to(tl.uint32)
    if RUN > 1:
        quotient = tl.max_constancy(quotient, [RUN])
    return quotient.to(tl.int32)


@triton.jit
def on_grid(m, pixels, pixels_magic, pixels_shift, width, width_magic, width_shift):
    """Image, row and column of the m-th pixel of images of so many pixels, so many in a row."""
    image = divided(m, pixels_magic, pixels_shift)
    rest = m - image * pixels
    row = divided(rest, width_magic, width_shift)
    return image, row, rest - row * width


@triton.jit
def tap_and_chunk(block, chunks, magic, shift, KERNEL_W: tl.constexpr, RUN: tl.constexpr = 1):
    """A block column, tap-major: the row and column of its tap in the window, and which piece of the channels it is.

    RUN: so many lanes have one block.
    """
    tap = divided(block, magic, shift, RUN)
    row = tap // KERNEL_W
    return row, tap - row * KERNEL_W, block - tap * chunks


@triton.jit
def between(row, column, height, width):
    """Whether pixels lie inside an image; as unsigned numbers, those before it are large."""
    unsigned: tl.constexpr = tl.uint32
    rows = row.to(unsigned, bitcast=True) < height.to(unsigned)
    return rows & (column.to(unsigned, bitcast=True) < width.to(unsigned))
