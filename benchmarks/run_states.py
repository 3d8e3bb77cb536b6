"""What runs leave, compared bit for bit."""

from __future__ import annotations

from pathlib import Path

import torch

from grasp_sparse.train.checkpoint import load_checkpoint

_PARTS = ("recipe", "config", "model", "optimizer", "rng", "pruning", "masks_digest", "ema", "scaler", "corrupt_files")


def same(a: object, b: object) -> bool:
    """Whether two trees of dicts, lists and tensors are equal; lists and tuples of the same things are."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def differing_parts(a: Path, b: Path) -> list[str]:
    """Which parts of the last checkpoints in two runs' folders differ, clocks apart."""
    first, second = load_checkpoint(a), load_checkpoint(b)
    parts = [part for part in _PARTS if not same(first[part], second[part])]
    rows = [
        [{k: v for k, v in row.items() if "seconds" not in k and "_per_s" not in k} for row in state["position"]["history"]]
        for state in (first, second)
    ]
    return parts if same(*rows) else [*parts, "history"]
