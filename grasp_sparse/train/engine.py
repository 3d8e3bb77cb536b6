"""The training loop: steps, evaluation, checkpoints, and an interrupt that loses nothing; one of them in each rank."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grasp_sparse.train.agreement import Agreed, Requests
from grasp_sparse.train.checkpoint import require, save_checkpoint
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.data.sets import Data
from grasp_sparse.train.data_parallel import check_all_reached, compiled, data_parallel, without_peers
from grasp_sparse.train.distributed import MainFailed, broadcast_tensors, current_ranks, gather, on_main, sum_over_ranks
from grasp_sparse.train.divergence import endless_buffers, first_non_finite, non_finite_state
from grasp_sparse.train.ema import Ema
from grasp_sparse.train.errors import DivergedError, UserError
from grasp_sparse.train.evaluation import evaluate
from grasp_sparse.train.optimizer import make_optimizer, restore_optimizer
from grasp_sparse.train.position import Position, position_from
from grasp_sparse.train.recorder import Recorder
from grasp_sparse.train.schedule import learning_rate, training_progress
from grasp_sparse.train.sharding import images_per_step, seed_rank, train_batches
from grasp_sparse.train.signals import Interrupted, Preempted, deferred_stop
from grasp_sparse.train.step import autocast, loss_function, step_options, training_step
from grasp_sparse.train.streams import restore_rng, rng_state


_MEND = "what was saved before stands; try a lower --lr, more --warmup or less --sparsity"


class Trainer:
    """Trains `model` (dense or sparse) in place. `extra` goes into every checkpoint beside what the trainer knows.

    Under several ranks each has a trainer, and all do the same steps: every decision (when to stop, the learning rate under a
    time limit, that the loss diverged) is made on numbers that all have.
    """

    def __init__(self, config: TrainConfig, model: nn.Module, data: Data, run_dir: Path, extra: dict[str, Any]) -> None:
        self.ranks = current_ranks()
        images = images_per_step(config, self.ranks)
        if len(data.train) < images:
            raise UserError(
                f"Expected at least one batch of {images} training images, got {len(data.train)}; lower --batch-size"
            )
        self.config, self.model, self.data, self.run_dir, self.extra = config, model, data, run_dir, extra
        self.device = torch.device(config.device)
        self.optimizer = make_optimizer(config, model)
        self.options = step_options(config)
        self.loss_fn = loss_function(config)
        wrapped, self.traffic = data_parallel(model)
        self.called = compiled(config, wrapped)
        self._all_reached = self.ranks.size == 1  # else the first step tells
        self.ema = None if config.ema_decay is None else Ema(model, config.ema_decay)
        self._endless = endless_buffers(model)
        self.position = Position()
        self.steps_per_epoch = len(data.train) // images
        seed_rank(config.seed, self.ranks.rank)

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint whose model weights are already in `model`. Raises UserError when it does not fit."""
        self.position = position_from(state["position"], self.config.epochs, self.steps_per_epoch)
        restore_optimizer(self.config, self.optimizer, state["optimizer"])
        self.data.corrupt.learn(state["corrupt_files"])
        self._check_corrupt()
        for name, mine in (("ema", self.ema), ("scaler", self.options.scaler.state_dict() or None)):
            require((state[name] is None) == (mine is None), name, "there if and only if the recipe asks for it", state[name])
        if self.ema is not None:
            self.ema.restore(state["ema"])
        if state["scaler"] is not None:
            self.options.scaler.load_state_dict(state["scaler"])
        if len(state["rng"]) == self.ranks.size:
            restore_rng(state["rng"][self.ranks.rank])
        else:  # another number of ranks: rank 0 goes on, the others begin new streams
            restore_rng(state["rng"][0])
            seed_rank(self.config.seed, self.ranks.rank, self.position.epoch, self.position.step)

    def save(self, must: bool = True) -> None:
        """Write a checkpoint, from rank 0, with the random streams of all; every rank comes here, and waits till it is there.

        The ranks also tell one another which images they could not read: UserError for too many, and nothing is written. Where
        there is no room for it: UserError if it `must` be written, otherwise a warning. DivergedError where it would hold numbers
        that are not finite: a run cannot go on from those, and they would take the place of good ones.
        """
        told = gather((rng_state(), self.data.corrupt.names))
        self.data.corrupt.learn(name for _, names in told for name in names)
        self._check_corrupt()
        on_main(lambda: self._write([streams for streams, _ in told], must))

    def _check_corrupt(self) -> None:
        """UserError, on rank 0 for all, for more unreadable images than are allowed; all know of the same ones."""
        try:
            self.data.corrupt.check()
        except UserError:
            if self.ranks.is_main:
                raise
            raise MainFailed("too many corrupt images") from None

    def _write(self, streams: list[dict[str, Any]], must: bool) -> None:
        if (found := self._non_finite()) is not None:
            raise DivergedError(f"Expected finite numbers to save {self._where()}, got {found}; {_MEND}")
        state = {
            "config": self.config.to_dict(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.options.scaler.state_dict() or None,
            "ema": None if self.ema is None else self.ema.averages,
            "rng": streams,
            "corrupt_files": sorted(self.data.corrupt.names),
            "position": asdict(self.position),
            **self.extra,
        }
        try:
            save_checkpoint(self.run_dir, state, self.config.keep_checkpoints)
        except OSError as error:
            where = f"epoch {self.position.epoch + 1}, step {self.position.step}"
            problem = f"cannot write the checkpoint of {where} ({error}); those before it stand"
            if must:
                raise UserError(f"{problem}; make room, then go on from them with --resume") from error
            warnings.warn(f"{problem}, and training goes on", stacklevel=2)

    def _non_finite(self) -> str | None:
        return non_finite_state(self.model, self.optimizer, {} if self.ema is None else self.ema.averages, self._endless)

    def _where(self) -> str:
        """Which step was the last, and its learning rate, in words."""
        epoch, step = self.position.epoch, self.position.step
        place = f"step {step} of epoch {epoch + 1}" if step else f"epoch {epoch}"
        return f"after {place} (learning rate {self.optimizer.param_groups[0]['lr']:.4g})"

    def fit(self) -> Position:
        """Train to the end. Raises Interrupted or Preempted after a signal and a save, DivergedError for a loss that is not finite."""
        self.model.train()
        with deferred_stop(alone=self.ranks.size == 1) as asked:
            fresh = (self.position.epoch, self.position.step) == (0, 0)
            requests = Requests(asked, 60 * self.config.checkpoint_minutes, fresh)
            with Recorder(self.config, self.run_dir, self.position, self.steps_per_epoch, self.extra["environment"]) as recorder:
                while not self.position.finished:
                    self._train_epoch(requests, recorder)
                    recorder.epoch(self._close_epoch(requests))
                    self.save(must=self.position.finished)
                    requests.saved()
                    self._follow(requests, requests.agreed(*sum_over_ranks(*requests.mine())))
            # what came after the last save, or before the first step of a run that had none left
            self._stop_if(requests.agreed(*sum_over_ranks(*requests.mine())))
        return self.position

    def _progress(self) -> float:
        done = self.position.epoch * self.steps_per_epoch + self.position.step
        return training_progress(self.config, done, self.config.epochs * self.steps_per_epoch, self.position.seconds)

    def _follow(self, requests: Requests, agreed: Agreed) -> None:
        """Save, or save and stop, as agreed."""
        if agreed.stop:
            self.save()
            self._stop_if(agreed)
        if agreed.save:
            self.save(must=False)
            requests.saved()

    @staticmethod
    def _stop_if(agreed: Agreed) -> None:
        """Stop, as agreed, where all is saved."""
        if agreed.stop:
            raise Preempted(saved=True) if agreed.preempted else Interrupted

    def _train_epoch(self, requests: Requests, recorder: Recorder) -> None:
        """Steps from the current position to the end of the epoch, or to the end of --max-seconds."""
        config, position = self.config, self.position
        self.data.corrupt.take()  # those met in scoring belong to no epoch
        batches = train_batches(config, self.data, position.epoch, position.step, self.ranks)
        with recorder.progress():
            while (progress := self._progress()) < 1 and position.step < self.steps_per_epoch:
                start = time.perf_counter()
                x, y = next(batches)
                x, y = x.to(self.device, non_blocking=True), y.to(self.device, non_blocking=True)
                waited = time.perf_counter() - start
                rate = learning_rate(config, progress)
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                loss_fn = self.loss_fn if self._all_reached else self._first_loss
                loss, logits = training_step(self.called, self.optimizer, loss_fn, x, y, self.options, self._prepare)
                self._all_reached = True
                agreed = self._count_step(loss, logits, x, y, start, waited, requests)
                recorder.step(rate)
                self._follow(requests, agreed)

    def _first_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = self.loss_fn(logits, labels)
        check_all_reached(self.model, loss)
        return loss

    def _prepare(self, x: Tensor) -> Tensor:
        return self.data.prepare(x, self.device, self.config.memory_format)

    def _count_step(
        self, loss: Tensor, logits: Tensor, x: Tensor, y: Tensor, start: float, waited: float, requests: Requests
    ) -> Agreed:
        """Add the step of all ranks to the position, with rank 0's clock; what they agree to do now."""
        position, clock = self.position, float(self.ranks.is_main)
        correct = (logits.argmax(1) == y).sum().item()  # waits for the device: now the step is done
        taken = time.perf_counter() - start
        mine = loss.item() * len(y), correct, len(y), clock * waited, clock * taken, self.data.corrupt.take()
        total_loss, correct, images, waited, seconds, corrupt, *asked = sum_over_ranks(*mine, *requests.mine())
        if not math.isfinite(total_loss):
            self._explain_divergence(loss.item(), x)
        position.step += 1
        position.seconds += seconds
        counted = (total_loss, correct, images, seconds, waited, self.traffic.take(), corrupt)
        for name, value in zip(position.sums, counted, strict=True):
            position.sums[name] += value
        if self.ema is not None:
            self.ema.update(position.epoch * self.steps_per_epoch + position.step)
        return requests.agreed(*asked)

    def _explain_divergence(self, loss: float, x: Tensor) -> None:
        """Raises DivergedError on rank 0, for all: the step, and what a rank whose loss is not finite finds by repeating it."""
        model = without_peers(self.model)  # the others do not repeat it

        def forward() -> None:
            for images in x.tensor_split(self.options.accumulate):
                with autocast(self.device, self.options.dtype):
                    model(self._prepare(images))

        found = None if math.isfinite(loss) else first_non_finite(model, x, forward)
        rank, loss, found = next((rank, *told) for rank, told in enumerate(gather((loss, found))) if told[1] is not None)
        if not self.ranks.is_main:
            raise MainFailed("the loss is not finite")
        rate, at_rank = self.optimizer.param_groups[0]["lr"], f", rank {rank}" if self.ranks.size > 1 else ""
        raise DivergedError(
            f"the loss is {loss} at step {self.position.step + 1} of epoch {self.position.epoch + 1}{at_rank} (learning rate "
            f"{rate:.4g}): {found}; {_MEND}"
        )

    def _close_epoch(self, requests: Requests) -> dict[str, Any]:
        """Evaluate, turn the open sums into a row of the history and move on to the next epoch."""
        position, sums = self.position, self.position.sums
        start = time.perf_counter()
        measured = self._evaluate(lambda: bool(requests.asked))
        if measured is None:  # the epoch stays open: a resumed run evaluates again
            self._follow(requests, requests.agreed(*sum_over_ranks(*requests.mine())))
        clock = time.perf_counter() - start if self.ranks.is_main else 0.0
        evaluation, corrupt = sum_over_ranks(clock, self.data.corrupt.take())
        position.seconds += evaluation
        row = {
            "epoch": position.epoch + 1,
            "steps": position.step,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_loss": sums["loss"] / max(sums["images"], 1),
            "train_accuracy": sums["correct"] / max(sums["images"], 1),
            **measured,
            "images_per_s": sums["images"] / max(sums["seconds"], 1e-9),
            "data_seconds": sums["waited"],
            "train_seconds": sums["seconds"],
            "test_seconds": evaluation,
            "seconds": position.seconds,
            "reduced_bytes": sums["reduced"] / max(position.step, 1),
            "corrupt_images": sums["corrupt"] + corrupt,
        }
        position.history.append(row)
        position.epoch, position.step = position.epoch + 1, 0
        position.sums = Position().sums
        position.finished = position.epoch == self.config.epochs or self._progress() >= 1
        return row

    def _evaluate(self, stop: Callable[[], bool]) -> dict[str, float] | None:
        """Of the model, and of its moving average; running statistics are rank 0's, as those in a checkpoint are. None: stopped.

        Raises DivergedError, on rank 0 for all, for a loss that is not finite: its accuracy means nothing.
        """
        measured = {}
        averaged = [] if self.ema is None else [("ema", self.ema.applied())]
        for name, weights in [("test", contextlib.nullcontext()), *averaged]:
            with weights:
                broadcast_tensors(buffer for buffer in self.model.buffers() if buffer.is_floating_point())
                found = evaluate(self.model, self.data, self.config, stop)
            if found is None:
                return None
            if not math.isfinite(found[0]):
                on_main(lambda: self._explain_test(name, found[0]))
            measured[f"{name}_loss"], measured[f"{name}_accuracy"] = found
        return measured

    def _explain_test(self, name: str, loss: float) -> None:
        found = self._non_finite()
        cause = "all weights are finite, their products are not" if found is None else f"there are {found}"
        whose = "test loss of the moving average" if name == "ema" else "test loss"
        raise DivergedError(f"the {whose} is {loss} {self._where()}: {cause}; {_MEND}")
