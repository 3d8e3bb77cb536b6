"""All that a run shows and writes while it trains: progress, log.jsonl, events for TensorBoard. They are the first rank's alone."""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.distributed import current_ranks
from grasp_sparse.train.logging import EpochLog, say
from grasp_sparse.train.position import Position
from grasp_sparse.train.progress import Progress
from grasp_sparse.train.tensorboard import FOLDER, TensorBoardLog, wants_tensorboard


class Recorder:
    """Follows `position`, which the trainer moves on; a context manager."""

    def __init__(
        self, config: TrainConfig, run_dir: Path, position: Position, steps_per_epoch: int, environment: Mapping[str, Any]
    ) -> None:
        self.config, self.position, self.steps_per_epoch = config, position, steps_per_epoch
        self.ranks = current_ranks()
        self.is_main = self.ranks.is_main
        self.epochs = EpochLog(run_dir, position.history)
        self.board: TensorBoardLog | None = None
        if not self.is_main:
            return
        self._write_epochs()
        if wants_tensorboard(config.tensorboard):
            # An epoch whose steps are all done, but not its test: what stands at its last step may include that test.
            whole = position.step == steps_per_epoch
            texts = {"recipe": config.to_dict(), "environment": environment}
            with self._board_may_fail():
                self.board = TensorBoardLog(run_dir, self._done - whole, config.log_every, texts)

    @contextlib.contextmanager
    def progress(self) -> Iterator[None]:
        """Through the open epoch, from the present step on."""
        config, position = self.config, self.position
        shown = Progress(
            epoch=position.epoch + 1, epochs=config.epochs, step=position.step, steps_per_epoch=self.steps_per_epoch,
            every=config.log_seconds, test_seconds=position.history[-1]["test_seconds"] if position.history else 0.0,
            seconds_left=None if config.max_seconds is None else config.max_seconds - position.seconds, shown=self.is_main,
        )  # fmt: skip
        self._before = dict(position.sums)
        with shown as self._shown:
            yield

    def step(self, rate: float) -> None:
        """After a step, at this learning rate, that is in the position already."""
        sums = self.position.sums
        loss, images, seconds = (sums[name] - self._before[name] for name in ("loss", "images", "seconds"))
        self._before = dict(sums)
        self._shown.update(int(images), sums["loss"] / sums["images"])
        self._to_board(lambda board: board.step(self._done, loss / images, rate, int(images), seconds))

    def epoch(self, row: dict[str, Any]) -> None:
        """After an epoch: its row, the last one of the history."""
        if not self.is_main:
            return
        self._write_epochs()
        self._to_board(lambda board: board.epoch(self._done, row))
        say(
            f"epoch {row['epoch']:>3}/{self.config.epochs}  train loss {row['train_loss']:.4f}  test loss {row['test_loss']:.4f}  "
            f"test accuracy {row['test_accuracy']:.2%}  {row['images_per_s']:,.0f} images/s  {row['seconds']:.0f} s"
            + (f"  {row['reduced_bytes']:,.0f} bytes all-reduced a step" if self.ranks.size > 1 else "")
            + (f"  passed over {row['corrupt_images']:,.0f} corrupt images" if row["corrupt_images"] else "")
        )

    @property
    def _done(self) -> int:
        return self.position.epoch * self.steps_per_epoch + self.position.step

    def __enter__(self) -> Recorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._to_board(lambda board: board.close())

    def _write_epochs(self) -> None:
        try:
            self.epochs.write()
        except OSError as error:
            warnings.warn(f"cannot write {self.epochs.path} ({error}); the next epoch, or a resumed run, writes all of it", stacklevel=2)

    def _to_board(self, write: Callable[[TensorBoardLog], None]) -> None:
        if self.board is not None:
            with self._board_may_fail():
                write(self.board)

    @contextlib.contextmanager
    def _board_may_fail(self) -> Iterator[None]:
        """Inside, a full disk ends the events and not the run."""
        try:
            yield
        except OSError as error:
            self.board = None
            warnings.warn(f"no more events for TensorBoard in this run ({error})", stacklevel=3)


def delete_events(run_dir: Path) -> None:
    """Delete what another run in this folder has written for TensorBoard."""
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)
