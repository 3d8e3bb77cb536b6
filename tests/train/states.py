"""What checkpoints hold, compared bit for bit."""

from __future__ import annotations

import torch


def same(a: object, b: object) -> bool:
    """Whether two trees of dicts, lists and tensors are equal; lists and tuples of the same things are."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b
