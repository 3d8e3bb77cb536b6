"""Runs that are killed, one after the other, forked from one process: importing torch for each would take longer than the runs.

    python forked_runs.py FOLDER SEEDS

What happened is written to FOLDER/happened.json; a test reads it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import random
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import several_ranks
import torch

from benchmarks.run_states import differing_parts
from grasp_sparse import cli
from grasp_sparse.train import engine
from grasp_sparse.train.checkpoint import load_checkpoint
from grasp_sparse.train.checkpoint_files import list_checkpoints
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.run import continue_or_start_run

_RANKS, TOOK_TOO_LONG = 2, 98
_CONFIG = several_ranks.small_config(
    model="several_ranks:noisy_net", train_limit=64, batch_size=8, accumulate=2, epochs=3, ema_decay=0.9, checkpoint_minutes=0.0,
    keep_checkpoints=1,
)


def forked(work: Callable[[], int], said: Path, **environment: str) -> int:
    """The id of a new process that does `work`, its output in the file `said`, and ends with what it returns."""
    process = os.fork()
    if process:
        return process
    code = 99
    try:
        with said.open("w") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        os.environ.update(environment)
        code = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(process: int, seconds: float = 60.0) -> int:
    """The exit code of the process, minus the signal that ended it; one that takes longer is killed: TOOK_TOO_LONG."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return TOOK_TOO_LONG


def auto(folder: Path, config: TrainConfig) -> int:
    """Notes in FOLDER.saved, by one call of the system each, the positions whose checkpoints were written when the call returned."""
    save = engine.save_checkpoint

    def noted(run_dir: Path, state: dict[str, Any], keep: int) -> object:
        written = save(run_dir, state, keep)
        with open(folder.with_suffix(".saved"), "ab", buffering=0) as file:
            file.write(f"{state['position']['epoch']} {state['position']['step']}\n".encode())
        return written

    with mock.patch.object(engine, "save_checkpoint", noted):
        continue_or_start_run(config, {"model": config.model}, folder)
    return 0


def last_saved(folder: Path) -> tuple[int, int]:
    """The last position that a run in that folder knew to be saved."""
    noted = folder.with_suffix(".saved")
    lines = noted.read_text().splitlines() if noted.exists() else []
    epoch, step = lines[-1].split() if lines else (0, 0)
    return int(epoch), int(step)


def what_stands(folder: Path) -> tuple[int, int] | str:
    """The position a resume would go on from; a complaint if any checkpoint there is damaged."""
    if not list_checkpoints(folder):
        return 0, 0
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            position = load_checkpoint(folder)["position"]
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return position["epoch"], position["step"]


def killed_at_random(folder: Path, seed: int, whole: Path, seconds: float) -> dict[str, Any]:
    """A run that is killed two times at moments drawn by `seed` and then let go to its end.

    `seconds`: what a whole run takes, as far as is known; in the result as far as is known then. On a machine that others use too, it
    may have become shorter, and moments drawn from too many seconds would come when runs have ended.
    """
    draw, target, stood, saved, codes = random.Random(seed), folder / f"seed-{seed}", [], [], []
    for _ in range(2):
        begun, fresh = time.monotonic(), not list_checkpoints(target)
        codes.append(ended(forked(lambda: auto(target, _CONFIG), folder / f"seed-{seed}.txt"), draw.uniform(0, seconds)))
        if fresh and codes[-1] != TOOK_TOO_LONG:
            seconds = time.monotonic() - begun
        stood.append(what_stands(target))
        saved.append(last_saved(target))
    last = ended(forked(lambda: auto(target, _CONFIG), folder / f"seed-{seed}.txt"))
    return {
        "seconds": seconds, "codes": codes, "stood": stood, "saved": saved, "last": last, "said": (folder / f"seed-{seed}.txt").read_text() if last else "",
        "differing": [] if last else differing_parts(target, whole),
        "left": sorted(path.name for path in target.iterdir() if path.suffix == ".partial"),
    }  # fmt: skip


_FLAGS = {
    "--data": "fake", "--image-size": "8", "--train-limit": "96", "--test-limit": "20", "--batch-size": "8", "--epochs": "8",
    "--lr": "0.05", "--sparsity": "0.7", "--samples-per-class": "2", "--score-batch": "5", "--timing-rounds": "0", "--plan": "density",
    "--model": "several_ranks:noisy_net", "--checkpoint-minutes": "0",
}  # fmt: skip


def ranks(folder: Path, name: str, work: Callable[[], int]) -> list[int]:
    """The process ids of ranks, started as torchrun starts them, that do `work`; what they say goes to FOLDER/NAME-RANK.txt."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(several_ranks.free_port()), "WORLD_SIZE": str(_RANKS)}
    return [forked(work, folder / f"{name}-{rank}.txt", RANK=str(rank), LOCAL_RANK=str(rank), **shared) for rank in range(_RANKS)]


def command(out: Path, *more: str) -> int:
    return cli.main(["train", "--resume", "auto", "--out", str(out), *(word for flag in _FLAGS.items() for word in flag), *more])


def reached(folder: Path, steps: int, processes: list[int]) -> None:
    """Wait for a checkpoint so far in training."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        found = list_checkpoints(folder)
        if found and (int(found[0].name[12:15]) * 6 + int(found[0].name[17:23])) >= steps:
            return
        time.sleep(0.005)
    for process in processes:
        os.kill(process, signal.SIGKILL)
    raise TimeoutError(f"no checkpoint of step {steps} in {folder}")


def signalled(folder: Path, name: str, number: signal.Signals, rank: int, steps: int, out: Path) -> dict[str, Any]:
    """Ranks of which one receives a signal after so many steps."""
    processes = ranks(folder, name, lambda: command(out))
    reached(out, steps, processes)
    os.kill(processes[rank], number)
    start = time.monotonic()
    codes = [ended(process) for process in processes]
    said = [(folder / f"{name}-{rank}.txt").read_text() for rank in range(_RANKS)]
    return {"codes": codes, "seconds": time.monotonic() - start, "stands": what_stands(out), "said": said}


def diverging(out: Path) -> int:
    """A run in which rank 1 alone meets an image that is not a number, in its eighth step."""
    step, seen = engine.training_step, []

    def spoilt(model, optimizer, loss_fn, x, *others):
        seen.append(None)
        if len(seen) == 8 and os.environ["RANK"] == "1":
            x = torch.full(x.shape, float("nan"))
        return step(model, optimizer, loss_fn, x, *others)

    engine.training_step = spoilt
    return command(out)


def several(folder: Path) -> dict[str, Any]:
    """Two ranks: stopped by a scheduler, then one killed, then let go to the end; beside them a run that nothing disturbs."""
    out, happened = folder / "disturbed", {}
    happened["stopped"] = signalled(folder, "stopped", signal.SIGTERM, 1, 8, out)
    happened["died"] = signalled(folder, "died", signal.SIGKILL, 1, 20, out)
    happened["last"] = [ended(process) for process in ranks(folder, "last", lambda: command(out))]
    happened["whole"] = [ended(process) for process in ranks(folder, "whole", lambda: command(folder / "undisturbed"))]
    happened["differing"] = differing_parts(out, folder / "undisturbed")
    nan = folder / "diverging"
    happened["diverged"] = [ended(process) for process in ranks(folder, "diverged", lambda: diverging(nan))]
    happened["diverged said"] = [(folder / f"diverged-{rank}.txt").read_text() for rank in range(_RANKS)]
    happened["diverged stands"] = what_stands(nan)
    return happened


def main(arguments: Sequence[str]) -> None:
    folder, seeds = Path(arguments[0]), int(arguments[1])
    torch.set_num_threads(1)
    happened: dict[str, Any] = {"several": several(folder)}
    whole = folder / "whole"
    with contextlib.redirect_stdout(None):
        auto(folder / "warm", dataclasses.replace(_CONFIG, epochs=1))  # what is imported late is in all children then
    start = time.monotonic()
    assert ended(forked(lambda: auto(whole, _CONFIG), folder / "whole.txt")) == 0, (folder / "whole.txt").read_text()
    seconds = time.monotonic() - start
    happened["seeds"] = []
    for seed in range(seeds):
        happened["seeds"].append(killed_at_random(folder, seed, whole, seconds))
        seconds = happened["seeds"][-1]["seconds"]
    (folder / "happened.json").write_text(json.dumps(happened))


if __name__ == "__main__":
    main(sys.argv[1:])
