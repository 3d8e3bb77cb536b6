"""Scalars and the recipe for TensorBoard, in RUN/tensorboard, where the package `tensorboard` is installed."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grasp_sparse.train.errors import UserError

FOLDER = "tensorboard"
_SPLITS = ("train", "test")


def wants_tensorboard(choice: str) -> bool:
    """Whether a run with `--tensorboard auto | on | off` writes for it. Raises UserError for "on" where it is not installed."""
    installed = importlib.util.find_spec("tensorboard") is not None
    if choice == "on" and not installed:
        raise UserError("Expected the package tensorboard for --tensorboard on, found none; pip install tensorboard")
    return installed and choice != "off"


class TensorBoardLog:
    """Events of one run; the x-axis of all of them is the number of training steps done.

    Args:
        done: training steps done so far. What an earlier process wrote of later steps, before it was killed, is withdrawn.
        every: steps between two values of loss and learning rate.
        texts: by title, shown once, when nothing is done yet.

    Raises OSError where events cannot be written.
    """

    def __init__(self, run_dir: Path, done: int, every: int, texts: Mapping[str, Mapping[str, Any]]) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second to import: only when wanted

        self.every, folder = every, run_dir / FOLDER
        if folder.is_symlink():  # a run folder that came from somebody may hold one to anywhere
            raise OSError(errno.ELOOP, "Expected a folder for events, got a link", os.fspath(folder))
        self.writer = SummaryWriter(str(folder), purge_step=done + 1, flush_secs=30)
        if done == 0:
            for title, values in texts.items():
                self.writer.add_text(title, "\n".join(f"    {key}: {json.dumps(value)}" for key, value in values.items()), 0)

    def step(self, done: int, loss: float, rate: float, images: int, seconds: float) -> None:
        """After training step number `done`, from 1: its loss, learning rate and speed."""
        if done % self.every == 0:
            self.writer.add_scalar("step/loss", loss, done)
            self.writer.add_scalar("step/learning rate", rate, done)
            self.writer.add_scalar("step/images per second", images / max(seconds, 1e-9), done)

    def epoch(self, done: int, row: Mapping[str, Any]) -> None:
        """After an epoch: every number of its row of the history, training and test ones of a quantity under one heading."""
        for column, value in row.items():
            split, _, quantity = column.partition("_")
            tag = f"{quantity}/{split}" if split in _SPLITS and quantity != "seconds" else f"epoch/{column}"
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self.writer.add_scalar(tag, value, done)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()
