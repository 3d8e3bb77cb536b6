"""The geometry of a convolution in the words of the kernels, in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from grasp_sparse.ops.layout import output_size


class Window(NamedTuple):
    kernel: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int, int, int]  # top, bottom, left, right
    dilation: tuple[int, int]

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    @property
    def phases(self) -> int:
        """Of dgrad: pixels of the input by their remainders modulo the stride, row-major."""
        return math.prod(self.stride)

    @property
    def shift(self) -> tuple[int, int]:
        """The phase of tap 0, so that the phase of tap k along an axis is ``(k * dilation + shift) % stride``."""
        return -self.padding[0] % self.stride[0], -self.padding[2] % self.stride[1]

    @property
    def is_product(self) -> bool:
        """Whether every pixel is a token of a linear layer."""
        return self.kernel == (1, 1) and self.stride == (1, 1) and not any(self.padding)

    def output_size(self, input_size: Sequence[int]) -> tuple[int, int]:
        return output_size(input_size, self.kernel, self.stride, self.padding, self.dilation)

    def phase_size(self, input_size: Sequence[int]) -> tuple[int, int]:
        """Of the largest phase."""
        return math.ceil(input_size[0] / self.stride[0]), math.ceil(input_size[1] / self.stride[1])

    def constants(self) -> dict[str, int]:
        """What kernels are compiled for."""
        names = ("KERNEL_W", "STRIDE_H", "STRIDE_W", "DILATION_H", "DILATION_W")
        return dict(zip(names, (self.kernel[1], *self.stride, *self.dilation), strict=True))


class Divisor(NamedTuple):
    """A number by which kernels divide many: m // number is (2m · magic / 2^32) >> shift, exact for 0 <= m < 2^31.

    With 2^(shift-1) < number <= 2^shift, magic = floor(2^(31+shift) / number) + 1 has 32 bits and is too large by less than what
    could lift any quotient to the next integer (Granlund and Montgomery, PLDI 1994). Kernels take it as a signed number.
    """

    number: int
    magic: int
    shift: int


def divisor(number: int) -> Divisor:
    number = max(1, number)  # of nothing: there is nothing to divide either
    shift = (number - 1).bit_length()
    return Divisor(number, (1 << 31 + shift) // number + 1 - (1 << 32), shift)


def window(kernel_size, stride, padding, dilation) -> Window:
    return Window(*(tuple(int(i) for i in of) for of in (kernel_size, stride, padding, dilation)))


POINT = Window((1, 1), (1, 1), (0, 0, 0, 0), (1, 1))
