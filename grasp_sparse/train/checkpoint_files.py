"""The checkpoint files of a run: named by position, the last few and the best one kept, damaged ones noticed and passed over."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from grasp_sparse.files import DamagedFile, read_sealed
from grasp_sparse.train.errors import UserError

_NAME = re.compile(r"checkpoint-e(\d{3,9})-s(\d{6,9})\.pt")
_SINGLE_FILE = "checkpoint.pt"  # of runs before checkpoints were numbered


def checkpoint_name(epoch: int, step: int) -> str:
    """The file name for `epoch` finished epochs and `step` steps of the next one."""
    return f"checkpoint-e{epoch:03}-s{step:06}.pt"


def list_checkpoints(run_dir: Path) -> list[Path]:
    """The checkpoints in `run_dir`, the one furthest in training first; [] where there is no such folder."""
    names = [path.name for path in run_dir.iterdir()] if run_dir.is_dir() else []
    found = [(int(match[1]), int(match[2]), match[0]) for match in map(_NAME.fullmatch, names) if match]
    return [run_dir / name for *_, name in sorted(found, reverse=True)]


def best_checkpoint(run_dir: Path, history: Iterable[Mapping[str, Any]]) -> Path | None:
    """The checkpoint at the end of the epoch with the best test accuracy, of the epochs in `history` that left one; None if none did.

    It is a name among the others, not a copy: no crash can leave one that belongs to another state than its name says.
    """
    there = set(list_checkpoints(run_dir))
    ends = {path: row["test_accuracy"] for row in history if (path := run_dir / checkpoint_name(row["epoch"], 0)) in there}
    return max(ends, key=ends.__getitem__, default=None)


def drop_old_checkpoints(run_dir: Path, keep: int, best: Path | None) -> None:
    """Delete all but the newest `keep` and `best`. Raises OSError for the first that cannot be deleted, when the others are."""
    failed = None
    for path in list_checkpoints(run_dir)[keep:]:
        try:
            if path != best:
                path.unlink(missing_ok=True)
        except OSError as error:
            failed = failed or error
    if failed is not None:
        raise failed


def newest_good_checkpoint(run_dir: Path) -> Path:
    """The checkpoint furthest in training that holds what was written; warns, in a line, of damaged ones that it passes over.

    Raises UserError where there is none, and for one that the disk does not give: it may be good, and a run that went on from
    an older one would leave it behind.
    """
    damaged: list[str] = []
    for path in list_checkpoints(run_dir):
        try:
            read_sealed(path)
        except DamagedFile as error:
            damaged.append(f"{path.name}: {error}")
            continue
        except OSError as error:
            reason = error.strerror or error
            raise UserError(
                f"cannot read checkpoint {path} ({reason}), which may be good; try again when the disk answers, or move it away to "
                "go on from the one before"
            ) from error
        if damaged:
            warnings.warn(f"damaged checkpoint passed over, going back to {path.name} ({'; '.join(damaged)})", stacklevel=2)
        return path
    if damaged:
        raise UserError(f"cannot read any checkpoint in {run_dir} ({'; '.join(damaged)}); start a new run, or --overwrite this one")
    if (run_dir / _SINGLE_FILE).exists():
        raise UserError(
            f"Expected checkpoints named {checkpoint_name(12, 345)} in {run_dir}, got {_SINGLE_FILE} of an older version; "
            "end this run with that version, or start a new one"
        )
    raise UserError(f"Expected {run_dir} to hold a run with checkpoints, found none; --resume takes the folder of a run")


def set_damaged_aside(run_dir: Path, good: Path) -> None:
    """Rename the checkpoints further in training than `good`, all damaged, so that none counts as the newest any more."""
    every = list_checkpoints(run_dir)
    for path in every[: every.index(good)]:
        path.rename(path.with_name(f"{path.name}.damaged"))


def delete_checkpoints(run_dir: Path) -> None:
    """Delete every checkpoint, also damaged ones and one of the older kind."""
    for pattern in ("checkpoint-e*-s*.pt", "checkpoint-e*-s*.pt.damaged", _SINGLE_FILE):
        for path in run_dir.glob(pattern):
            path.unlink(missing_ok=True)


def delete_partial_files(run_dir: Path) -> None:
    """Delete what processes that were killed in the middle of writing have left."""
    for path in run_dir.glob(".*.partial"):
        path.unlink(missing_ok=True)


def has_run(run_dir: Path) -> bool:
    """Whether a run, good or damaged, is in that folder."""
    return bool(list_checkpoints(run_dir)) or (run_dir / _SINGLE_FILE).exists()
