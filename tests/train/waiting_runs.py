"""Two ranks that a signal, or a death, reaches while rank 0 works alone and the other waits for it.

    python waiting_runs.py FOLDER

What happened is written to FOLDER/happened.json; a test reads it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from forked_runs import command, ended, ranks, what_stands

from grasp_sparse.train import engine, prepare, run, waiting

NUMBERS = {"SIGTERM": signal.SIGTERM, "Ctrl-C": signal.SIGINT}
RECEIVERS = {"rank 0": [0], "rank 1": [1], "both": [0, 1]}
_FOREVER, _A_MOMENT = 90.0, 1.0  # the first is longer than anybody here waits


def _slow(there: Path, seconds: float) -> Callable[..., Any]:
    """In place of work on rank 0: makes the file `there`, then takes its time."""

    def work(*_: object) -> dict[str, Any]:
        there.touch()
        time.sleep(seconds)
        return {"timing": None, "memory": None}

    return work


def _sent(number: int, receivers: Sequence[int]) -> Callable[[list[int]], None]:
    """Of all processes, those receive the signal."""

    def send(processes: list[int]) -> None:
        for rank in receivers:
            os.kill(processes[rank], number)

    return send


def _while_main_works(
    folder: Path, name: str, what: str, act: Callable[[list[int]], None], seconds: float = _FOREVER
) -> dict[str, Any]:
    """Ranks to which `act` does something when rank 0 has begun with `what`: with "masks" before training, "comparing" after it, or
    "saving" in it."""
    out, there = folder / name, folder / f"{name}.there"

    def work() -> int:
        if what == "comparing":
            run.beside_dense = _slow(there, seconds)
            return command(out)
        if what == "saving":
            save, slow = engine.save_checkpoint, _slow(there, seconds)
            engine.save_checkpoint = lambda *arguments: slow() and save(*arguments)
            return command(out)
        prepare._read_masks = _slow(there, seconds)
        return command(out, "--masks", "x")

    processes = ranks(folder, name, work)
    deadline = time.monotonic() + 60
    while not there.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)  # the other rank waits by now
    act(processes)
    return _end(folder, name, processes) | {"stands": what_stands(out)}


def _end(folder: Path, name: str, processes: list[int]) -> dict[str, Any]:
    start = time.monotonic()
    codes = [ended(process) for process in processes]
    said = [(folder / f"{name}-{rank}.txt").read_text() for rank in range(len(processes))]
    return {"codes": codes, "seconds": time.monotonic() - start, "said": said}


def _leaves_without_a_word(folder: Path) -> dict[str, Any]:
    """Rank 1 ends when it hears, for the first time, that the answer comes."""

    def work() -> int:
        waiting.dist.send = lambda *_, **__: os._exit(7)
        return command(folder / "no word")

    return _end(folder, "no word", ranks(folder, "no word", work))


def main(arguments: Sequence[str]) -> None:
    folder, happened = Path(arguments[0]), {}
    torch.set_num_threads(1)
    for to, receivers in RECEIVERS.items():
        for name, number in NUMBERS.items():
            for what in ("comparing", "masks"):
                happened[f"{what}, {name} to {to}"] = _while_main_works(folder, f"{what}-{name}-{to}", what, _sent(number, receivers))
        saving = _while_main_works(folder, f"saving-{to}", "saving", _sent(signal.SIGTERM, receivers), _A_MOMENT)
        happened[f"saving, SIGTERM to {to}"] = saving
    for rank in (0, 1):
        happened[f"rank {rank} dies"] = _while_main_works(folder, f"dies-{rank}", "comparing", _sent(signal.SIGKILL, [rank]), _A_MOMENT)
    happened["no word"] = _leaves_without_a_word(folder)
    (folder / "happened.json").write_text(json.dumps(happened))


if __name__ == "__main__":
    main(sys.argv[1:])
