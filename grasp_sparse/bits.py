"""Bool masks with one bit a weight: eight to a byte, the first in the highest bit, as numpy.packbits orders them."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """The bool tensor ``mask [n]`` as ``[ceil(n / 8)]`` uint8 on the same device; bits past the end are 0.

    ``[1, 0, 0, 0, 0, 0, 0, 1,  1]`` becomes ``[0b10000001, 0b10000000]``.
    """
    octets = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (octets << _places(mask.device)).sum(1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, count: int) -> Tensor:
    """The bool tensor ``[count]`` that :func:`pack_bits` packed."""
    return (bits.unsqueeze(1) >> _places(bits.device)).bitwise_and_(1).bool().view(-1)[:count]


def pack_like(mask: Tensor, weight: Tensor) -> Tensor:
    """``mask``, of the shape of ``weight``, packed in the order in which the weights lie in memory, on their device.

    That is the order of channels_last for a channels_last weight, and row-major for one whose memory has gaps.
    """
    if not is_dense(weight):
        return pack_bits(mask.to(weight.device).reshape(-1))
    in_order = torch.empty_like(weight, dtype=torch.bool).copy_(mask)
    return pack_bits(in_order.as_strided((weight.numel(),), (1,)))


def unpack_like(bits: Tensor, weight: Tensor) -> Tensor:
    """The bool mask of the shape of ``weight`` that :func:`pack_like` packed."""
    flat = unpack_bits(bits, weight.numel())
    return flat.as_strided(weight.shape, weight.stride()) if is_dense(weight) else flat.view(weight.shape)


def is_dense(tensor: Tensor) -> bool:
    """Whether every place in memory between the first and the last element is one element."""
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size != 1):
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True


def _places(device: torch.device) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
