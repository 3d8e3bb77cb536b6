"""The training loop: steps, evaluation, checkpoints, and an interrupt that loses nothing."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grasp_sparse.train.checkpoint import save_checkpoint
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.data import Data
from grasp_sparse.train.errors import DivergedError, UserError
from grasp_sparse.train.evaluation import evaluate
from grasp_sparse.train.logging import EpochLog, progress_bar, say
from grasp_sparse.train.optimizer import make_optimizer, restore_optimizer
from grasp_sparse.train.position import Position, position_from
from grasp_sparse.train.schedule import learning_rate, training_progress
from grasp_sparse.train.signals import Interrupted, deferred_interrupt
from grasp_sparse.train.step import loss_function, memory_format, training_step


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
        restore_optimizer(self.optimizer, state["optimizer"])
        torch.set_rng_state(state["rng"]["torch"])
        if state["rng"]["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["rng"]["cuda"])

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
        with deferred_interrupt() as asked:
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
