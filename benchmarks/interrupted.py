"""A run on two ranks that is stopped by a signal, loses a rank and goes on each time, beside one that nothing disturbs.

    python -m benchmarks.interrupted --quick
    python -m benchmarks.interrupted --data-dir cifar10 --data-name 'CIFAR-10 (JPEG q75)'     an ImageFolder: train/<class>/*, test or val

Both are `torchrun --nproc-per-node 2 -m grasp_sparse train --resume auto`, the same line started again after each stop, as a
scheduler's restart loop would. In its first epoch torchrun gets SIGTERM, in its second SIGKILL ends one rank. Writes
benchmarks/results/interrupted.json: what was sent when, what the run went on from, and which parts of the two last checkpoints
differ, bit for bit: there must be none. What the processes printed stays beside the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from benchmarks.run_states import differing_parts
from benchmarks.runner import RESULTS, parser, run, settings_of, tell
from grasp_sparse.files import write_atomically
from grasp_sparse.train.checkpoint import load_checkpoint
from grasp_sparse.train.checkpoint_files import list_checkpoints
from grasp_sparse.train.errors import UserError

RANKS = 2
_POLL = 0.05  # seconds
_PATIENCE = 600.0  # … for any one thing to happen
_COMMON = {
    "model": "vgg_small", "sparsity": 0.95, "warmup": 0.1, "memory_format": "channels_last", "tensorboard": "off", "timing_rounds": 0,
    "plan": "density",  # a measured plan may differ between two runs, and their last bits with it
}  # fmt: skip
_FULL = {"data": "imagefolder", "image_size": 32, "batch_size": 64, "epochs": 3, "checkpoint_minutes": 0.05, "workers": 1}
_QUICK = {
    "data": "fake", "image_size": 8, "batch_size": 8, "epochs": 3, "train_limit": 480, "test_limit": 20, "samples_per_class": 2,
    "checkpoint_minutes": 0.0,
}  # fmt: skip
_SMALL = ("stem=16", "widths=[64, 128]", "depth=2")


class Stop(NamedTuple):
    """One end that came too early: what was sent to whom, once a checkpoint of a begun epoch after `epochs` whole ones lay there."""

    sent: signal.Signals
    to: str  # "torchrun" or "rank 1"
    epochs: int


STOPS = (Stop(signal.SIGTERM, "torchrun", 0), Stop(signal.SIGKILL, f"rank {RANKS - 1}", 1))


def command(recipe: dict[str, Any], out: Path) -> list[str]:
    """What is started, and started again."""
    train = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "-m", "grasp_sparse", "train"]
    flags = [word for name, value in recipe.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    arguments = [word for pair in _SMALL for word in ("--model-arg", pair)]
    return [*train, *flags, *arguments, "--resume", "auto", "--out", str(out)]


class Run:
    """One folder, and the processes that train in it, one after the other."""

    def __init__(self, recipe: dict[str, Any], folder: Path, threads: int) -> None:
        self.recipe, self.folder, self.threads, self.seconds = recipe, folder, threads, 0.0

    def start(self, stop: Stop | None = None) -> int:
        """The exit code of one process, which gets the signal of `stop` on its way. Raises UserError if it ends before that."""
        began = time.monotonic()
        environment = os.environ | {"OMP_NUM_THREADS": str(self.threads)}
        with self.folder.with_suffix(".txt").open("a", encoding="utf-8") as said:
            process = subprocess.Popen(command(self.recipe, self.folder), env=environment, stdout=said, stderr=subprocess.STDOUT)
            try:
                if stop:
                    self._wait_for(process, stop.epochs, began + _PATIENCE)
                    os.kill(process.pid if stop.to == "torchrun" else _children(process.pid)[-1], stop.sent)
                code = process.wait(_PATIENCE)
            finally:
                if process.poll() is None:
                    process.terminate()  # not SIGKILL, which would leave the ranks to themselves
                    process.wait(_PATIENCE)
        self.seconds += time.monotonic() - began
        return code

    def _wait_for(self, process: subprocess.Popen, epochs: int, deadline: float) -> None:
        """Until there is a checkpoint from the middle of the epoch after `epochs` whole ones."""
        while (place := self.position()) < (epochs, 1) or place[1] == 0:
            if process.poll() is not None or time.monotonic() > deadline:
                raise UserError(f"Expected a checkpoint in the middle of epoch {epochs + 1}, got none; see {self.folder.with_suffix('.txt')}")
            time.sleep(_POLL)

    def position(self) -> tuple[int, int]:
        """Finished epochs, and steps of the next, of the checkpoint that a restart would go on from."""
        newest = next(iter(list_checkpoints(self.folder)), None)
        return (0, 0) if newest is None else (int(newest.stem.split("-e")[1].split("-")[0]), int(newest.stem.split("-s")[1]))


def _children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def interrupted(recipe: dict[str, Any], folder: Path, threads: int) -> dict[str, Any]:
    """What the JSON file holds but for the machine. Raises UserError for a run that does not end as it should."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    whole, parts = (Run(recipe, folder / name, threads) for name in ("undisturbed", "interrupted"))
    happened = []
    with tqdm(total=len(STOPS) + 2, desc="undisturbed", disable=not sys.stderr.isatty(), leave=False) as bar:
        _expect_success(whole.start(), whole)
        bar.update()
        for stop in STOPS:
            bar.set_description(f"until {stop.sent.name}")
            code = parts.start(stop)
            epochs, step = parts.position()
            happened.append({"sent": stop.sent.name, "to": stop.to, "exit_code": code, "goes_on_after": {"epochs": epochs, "steps": step}})
            tell(f"{stop.sent.name} to {stop.to}: torchrun ended with {code}; goes on after {epochs} epochs and {step} steps")
            bar.update()
        bar.set_description("to the end")
        _expect_success(parts.start(), parts)
        bar.update()
    runs = {run.folder.name: _end_of(run) for run in (whole, parts)}
    shown = recipe | ({"data_dir": "DIR"} if "data_dir" in recipe else {})
    return {
        "command": " ".join(["torchrun", *command(shown, Path("RUN"))[3:]]), "stops": happened, "runs": runs,
        "differing_parts": differing_parts(whole.folder, parts.folder),
    }  # fmt: skip


def _expect_success(code: int, run: Run) -> None:
    if code:
        raise UserError(f"Expected the run to end with 0, got {code}; see {run.folder.with_suffix('.txt')}")


def _end_of(run: Run) -> dict[str, Any]:
    result = json.loads((run.folder / "result.json").read_text(encoding="utf-8"))
    history = load_checkpoint(run.folder)["position"]["history"]
    return {
        "images": {part: result["data"][part] for part in ("train", "test")}, "scale": result["scale"], "training": result["training"],
        "train_loss": [row["train_loss"] for row in history],
        "test_accuracy": [row["test_accuracy"] for row in history], "seconds_with_starts": round(run.seconds, 1),
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    flags = parser("interrupted", __doc__)
    flags.add_argument("--data-dir", metavar="DIR", help="class folders of images (--quick: made-up ones, none needed)")
    flags.add_argument("--data-name", metavar="NAME", default="an ImageFolder", help="what the file calls them (default: %(default)s)")
    flags.add_argument("--epochs", type=int, metavar="N", help="at least 2 (default: 3)")
    flags.add_argument("--runs", type=Path, default=Path("runs/interrupted"), metavar="DIR", help="default: %(default)s")
    flags.add_argument("--out", type=Path, default=RESULTS / "interrupted.json", help="file to write (default: %(default)s)")
    flags.set_defaults(threads=1)
    options = flags.parse_args(arguments)
    recipe = _recipe(options)
    environment = settings_of(options)
    found = interrupted(recipe, options.runs, options.threads) | {"data": options.data_name if not options.quick else "made up"}
    text = json.dumps(found | {"environment": environment}, indent=1)
    if not options.quick:
        write_atomically(options.out, lambda file: file.write(text.encode() + b"\n"))
        tell(f"wrote {options.out}")
    differing = found["differing_parts"]
    tell(f"last checkpoints differ in: {', '.join(differing) or 'nothing'}")
    return int(bool(differing))


def _recipe(options: argparse.Namespace) -> dict[str, Any]:
    if options.epochs is not None and options.epochs < len(STOPS):
        raise UserError(f"Expected --epochs of at least {len(STOPS)}, one for each stop; got {options.epochs}")
    recipe = _COMMON | (_QUICK if options.quick else _FULL) | {"seed": options.seed}
    if not options.quick:
        if options.data_dir is None:
            raise UserError("Expected --data-dir, a folder with train/<class>/ and test/<class>/ or val/<class>/; or --quick")
        recipe["data_dir"] = options.data_dir
    return recipe | ({} if options.epochs is None else {"epochs": options.epochs})


if __name__ == "__main__":
    run(main)
