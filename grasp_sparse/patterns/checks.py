"""What every pattern asks of its sizes and of the weights it divides."""

from __future__ import annotations

from collections.abc import Sequence


def check_sizes(name: str, *sizes: object) -> None:
    """ValueError unless every size is a positive integer."""
    if any(type(size) is not int or size < 1 for size in sizes):
        raise ValueError(f"Expected positive integers in {name}, got {', '.join(map(repr, sizes))}")


def check_weight(name: str, shape: Sequence[int]) -> None:
    """ValueError unless the shape is that of a weight [out, in] or [out, in, kh, kw]."""
    if len(shape) not in (2, 4):
        raise ValueError(f"Expected scores of a weight [out, in] or [out, in, kh, kw] with pattern {name}, got shape {list(shape)}")
