"""The training loop: steps, evaluation, checkpoints, and an interrupt that loses nothing."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grasp_sparse.train.checkpoint import require, save_checkpoint
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.data import Data
from grasp_sparse.train.errors import DivergedError, UserError
from grasp_sparse.train.logging import EpochLog, progress_bar, say
from grasp_sparse.train.schedule import learning_rate, training_progress
from grasp_sparse.train.step import loss_function, make_optimizer, memory_format, training_step


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during training, after the checkpoint was written."""


@dataclass
class Position:
    """How far a run is: the next step of the next epoch, seconds spent, rows of finished epochs, sums of the open one."""

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    finished: bool = False
    history: list[dict[str, Any]] = field(default_factory=list)
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(("loss", "correct", "images", "seconds", "waited"), 0.0))


_ROW_NUMBERS = (
    "epoch", "steps", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "images_per_s", "data_seconds",
    "train_seconds", "test_seconds", "seconds",
)  # fmt: skip


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_row(row: object) -> bool:
    return isinstance(row, dict) and all(type(row.get(key)) in (int, float) for key in _ROW_NUMBERS)


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
    require(_is_number(seconds) and seconds >= 0, "seconds in position", "a number of at least 0", seconds)
    sums, names = position.sums, fresh["sums"].keys()
    known = isinstance(sums, dict) and sums.keys() == names
    require(known and all(map(_is_number, sums.values())), "sums in position", f"numbers for {', '.join(names)}", sums)
    history = position.history
    whole = isinstance(history, list) and len(history) == epoch and all(map(_is_row, history))
    require(whole, "history in position", f"{epoch} rows of numbers", history)
    return position


def _check_momentum(optimizer: torch.optim.Optimizer) -> None:
    """UserError unless every momentum fits its parameter: the fused kernel walks both without looking at shapes."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    foreign = len(optimizer.state.keys() - set(parameters))
    require(not foreign, "the optimizer's state", "of the model's parameters", f"{foreign} entries of others")
    for number, parameter in enumerate(parameters):
        state = optimizer.state.get(parameter, {})
        what = f"the optimizer's state of parameter {number}"
        require(isinstance(state, dict) and state.keys() <= {"momentum_buffer"}, what, "a momentum_buffer", state)
        value = state.get("momentum_buffer")
        expected = f"a dense tensor of shape {list(parameter.shape)}"
        require(value is None or _fits(value, parameter), f"momentum_buffer in {what}", expected, value)


def _fits(value: object, parameter: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return False
    # empty_like keeps the strides of a tensor only when it has neither gaps nor overlaps
    dense = torch.empty_like(value).stride() == value.stride()
    return dense and (value.shape, value.dtype) == (parameter.shape, parameter.dtype)


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[list[int]]:
    """Inside, the first Ctrl-C only appends to the list (the step under way ends first); the second one raises."""
    asked: list[int] = []

    def handle(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        previous = signal.signal(signal.SIGINT, handle)
    except ValueError:  # not the main thread: no signals reach us here
        yield asked
        return
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, previous)


@torch.no_grad()
def evaluate(model: nn.Module, data: Data, config: TrainConfig) -> tuple[float, float]:
    """Mean cross-entropy and accuracy (share right) of `model` on the test images."""
    model.eval()
    loss = correct = 0.0
    for x, y in data.test.in_order(2 * config.batch_size):
        x, y = x.to(config.device, memory_format=memory_format(config.memory_format)), y.to(config.device)
        logits = model(x)
        loss += nn.functional.cross_entropy(logits, y, reduction="sum").item()
        correct += (logits.argmax(1) == y).sum().item()
    model.train()
    return loss / len(data.test), correct / len(data.test)


class Trainer:
    """Trains `model` (dense or sparse) in place. `extra` goes into every checkpoint beside what the trainer knows."""

    def __init__(self, config: TrainConfig, model: nn.Module, data: Data, run_dir: Path, extra: dict[str, Any]) -> None:
        if len(data.train) < config.batch_size:
            raise UserError(
                f"Expected at least one batch of {config.batch_size} training images, got {len(data.train)}; lower --batch-size"
            )
        self.config, self.model, self.data, self.run_dir, self.extra = config, model, data, run_dir, extra
        self.optimizer = make_optimizer(config, model)
        self.loss_fn = loss_function(config)
        self.position = Position()
        self.steps_per_epoch = len(data.train) // config.batch_size

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint whose model weights are already in `model`. Raises UserError when it does not fit."""
        self.position = position_from(state["position"], self.config.epochs, self.steps_per_epoch)
        self._restore_optimizer(state["optimizer"])
        torch.set_rng_state(state["rng"]["torch"])
        if state["rng"]["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["rng"]["cuda"])

    def _restore_optimizer(self, saved: dict[str, Any]) -> None:
        """Momentum and the last learning rate; the other settings are the config's."""
        own = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(saved)
        for group, settings in zip(self.optimizer.param_groups, own, strict=True):
            group.update(settings)
            require(_is_number(group["lr"]), "the optimizer's lr", "a number", group["lr"])
        _check_momentum(self.optimizer)

    def save(self) -> Path:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return save_checkpoint(self.run_dir, {
            "config": self.config.to_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": {"torch": torch.get_rng_state(), "cuda": cuda},
            "position": asdict(self.position),
            **self.extra,
        })

    def fit(self) -> Position:
        """Train to the end. Raises Interrupted after saving on Ctrl-C, DivergedError when the loss is not finite."""
        log = EpochLog(self.run_dir, self.position.history)
        self.model.train()
        with _deferred_interrupt() as asked:
            while not self.position.finished:
                self._train_epoch(asked)
                row = self._close_epoch()
                log.append(row)
                self.save()
                say(
                    f"epoch {row['epoch']:>3}/{self.config.epochs}  train loss {row['train_loss']:.4f}  test loss "
                    f"{row['test_loss']:.4f}  test accuracy {row['test_accuracy']:.2%}  {row['images_per_s']:,.0f} images/s  "
                    f"{row['seconds']:.0f} s"
                )
                self._stop_if(asked)
        return self.position

    def _progress(self) -> float:
        done = self.position.epoch * self.steps_per_epoch + self.position.step
        return training_progress(self.config, done, self.config.epochs * self.steps_per_epoch, self.position.seconds)

    def _stop_if(self, asked: list[int]) -> None:
        if asked:
            self.save()
            raise Interrupted

    def _train_epoch(self, asked: list[int]) -> None:
        """Steps from the current position to the end of the epoch, or to the end of --max-seconds."""
        config, position = self.config, self.position
        layout = memory_format(config.memory_format)
        batches = self.data.train.shuffled(config.batch_size, config.seed, position.epoch, position.step, config.augment)
        with progress_bar(self.steps_per_epoch, position.step, f"epoch {position.epoch + 1}/{config.epochs}") as bar:
            while (progress := self._progress()) < 1 and position.step < self.steps_per_epoch:
                start = time.perf_counter()
                x, y = next(batches)
                x, y = x.to(config.device, memory_format=layout), y.to(config.device)
                waited = time.perf_counter() - start
                rate = learning_rate(config, progress)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                loss, logits = training_step(self.model, self.optimizer, self.loss_fn, x, y)
                self._count_step(loss.item(), (logits.argmax(1) == y).sum().item(), len(y))
                taken = time.perf_counter() - start
                position.seconds += taken
                position.sums["seconds"] += taken
                position.sums["waited"] += waited
                bar.update()
                bar.set_postfix(loss=f"{position.sums['loss'] / position.sums['images']:.3f}", refresh=False)
                self._stop_if(asked)

    def _count_step(self, loss: float, correct: int, images: int) -> None:
        position = self.position
        if not math.isfinite(loss):
            rate = self.optimizer.param_groups[0]["lr"]
            raise DivergedError(
                f"the loss is {loss} at step {position.step + 1} of epoch {position.epoch + 1} (learning rate {rate:.4g}); "
                "try a lower --lr, more --warmup or less --sparsity"
            )
        position.step += 1
        position.sums["loss"] += loss * images
        position.sums["correct"] += correct
        position.sums["images"] += images

    def _close_epoch(self) -> dict[str, Any]:
        """Evaluate, turn the open sums into a row of the history and move on to the next epoch."""
        position, sums = self.position, self.position.sums
        start = time.perf_counter()
        test_loss, test_accuracy = evaluate(self.model, self.data, self.config)
        evaluation = time.perf_counter() - start
        position.seconds += evaluation
        row = {
            "epoch": position.epoch + 1,
            "steps": position.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": sums["loss"] / max(sums["images"], 1),
            "train_accuracy": sums["correct"] / max(sums["images"], 1),
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "images_per_s": sums["images"] / max(sums["seconds"], 1e-9),
            "data_seconds": sums["waited"],
            "train_seconds": sums["seconds"],
            "test_seconds": evaluation,
            "seconds": position.seconds,
        }
        position.history.append(row)
        position.epoch, position.step = position.epoch + 1, 0
        position.sums = Position().sums
        position.finished = position.epoch == self.config.epochs or self._progress() >= 1
        return row
