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
def on_grid(m, height, width):
    """Image, row and column of the m-th pixel of ``[N, height, width]``."""
    image = m // (height * width)
    rest = m - image * (height * width)
    row = rest // width
    return image, row, rest - row * width


@triton.jit
def tap_and_chunk(block, chunks, KERNEL_W: tl.constexpr):
    """A block column, tap-major: the row and column of its tap in the window, and which piece of the channels it is."""
    tap = block // chunks
    row = tap // KERNEL_W
    return row, tap - row * KERNEL_W, block - tap * chunks


@triton.jit
def between(row, column, height, width):
    """Whether pixels lie inside an image."""
    return (row >= 0) & (row < height) & (column >= 0) & (column < width)


@triton.jit
def runs(offsets, LENGTH: tl.constexpr):
    """Tells the compiler what it cannot see through loaded indices: offsets come in aligned runs of LENGTH, so loads are wide."""
    return tl.max_contiguous(tl.multiple_of(offsets, LENGTH), LENGTH)
