"""How far a run is, as a checkpoint holds it, and whether a run can be there at all."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from grasp_sparse.train.checkpoint import require


# Of the open epoch. `reduced`: bytes of gradients that this rank handed to all-reduces. `corrupt`: images passed over, by all ranks.
_SUMS = ("loss", "correct", "images", "seconds", "waited", "reduced", "corrupt")


@dataclass
class Position:
    """How far a run is: the next step of the next epoch, seconds spent, rows of finished epochs, sums of the open one."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    finished: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(_SUMS, 0.0))


ROW_NUMBERS = (
    "epoch", "steps", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "images_per_s", "data_seconds",
    "train_seconds", "test_seconds", "seconds", "reduced_bytes", "corrupt_images",
)  # fmt: skip


def is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_row(row: object) -> bool:
    return isinstance(row, dict) and all(is_number(row.get(key)) for key in ROW_NUMBERS)


def position_from(saved: dict[str, Any], epochs: int, steps_per_epoch: int) -> Position:
    """The position in a checkpoint of a run of that length; UserError for one that no such run can reach."""
    fresh = asdict(Position())
    require(saved.keys() == fresh.keys(), "position", f"the fields {', '.join(fresh)}", list(saved))
    position = Position(**saved)
    require(type(position.finished) is bool, "finished in position", "true or false", position.finished)
    first, last = (1, epochs) if position.finished else (0, epochs - 1)
    epoch, step = position.epoch, position.step
    require(type(epoch) is int and first <= epoch <= last, "epoch in position", f"{first} to {last}", epoch)
    require(type(step) is int and 0 <= step <= steps_per_epoch, "step in position", f"0 to {steps_per_epoch}", step)
    seconds = position.seconds
    require(is_number(seconds) and seconds >= 0, "seconds in position", "a number of at least 0", seconds)
    sums, names = position.sums, fresh["sums"].keys()
    known = isinstance(sums, dict) and sums.keys() == names
    require(known and all(map(is_number, sums.values())), "sums in position", f"numbers for {', '.join(names)}", sums)
    history = position.history
    whole = isinstance(history, list) and len(history) == epoch and all(map(_is_row, history))
    require(whole, "history in position", f"{epoch} rows of numbers", history)
    return position
