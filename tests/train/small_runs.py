"""Small runs that tests stop, spoil and take up again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from several_ranks import small_config

from benchmarks.run_states import same
from grasp_sparse.train.checkpoint import load_checkpoint

NET = {"model": "several_ranks:noisy_net"}
COMMAND = [
    "--data", "fake", "--image-size", "8", "--train-limit", "64", "--test-limit", "20", "--batch-size", "16", "--sparsity", "0.7",
    "--samples-per-class", "2", "--plan", "density", "--model", "vgg_small", "--model-arg", "widths=[16]", "--model-arg", "depth=1",
    "--timing-rounds", "0", "--threads", "1",
]  # fmt: skip


def config_of(**changes: object):
    return small_config(**{"train_limit": 64, "batch_size": 16, "epochs": 3, **NET, **changes})


def same_end(a: Path, b: Path) -> bool:
    first, second = load_checkpoint(a), load_checkpoint(b)
    return all(same(first[part], second[part]) for part in ("model", "optimizer", "rng", "pruning", "masks_digest", "ema", "scaler"))


def at_call(count: int, action: Callable[[], object], owner: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do `action` at the end of call number `count` of a function."""
    real, done = getattr(owner, name), []

    def counted(*arguments, **others):
        result = real(*arguments, **others)
        done.append(None)
        if len(done) == count:
            action()
        return result

    monkeypatch.setattr(owner, name, counted)
