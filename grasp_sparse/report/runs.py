"""A finished run as its folder tells it: result.json and log.jsonl alone, no model, no data needed."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grasp_sparse.train.errors import UserError
from grasp_sparse.train.logging import LOG_NAME
from grasp_sparse.train.position import is_number
from grasp_sparse.train.run import RESULT_NAME
from grasp_sparse.train.sharding import step_in_words

_PLOTTED = {"epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy"}
SPARSE = "sparse"  # arms of the timing are called this, or "dense LAYOUT"


@dataclass(frozen=True)
class Run:
    """`result` as in result.json, `rows` as in log.jsonl: one an epoch."""

    folder: Path
    result: dict[str, Any]
    rows: list[dict[str, Any]]

    def __post_init__(self) -> None:
        expected = ("config", "environment", "data", "pruning", "training", "timing", "memory")
        if missing := [name for name in expected if name not in self.result]:
            raise UserError(f"Expected {self.folder / RESULT_NAME} to be a run's result, got no {', '.join(missing)}; train again")
        if not self.rows:
            raise UserError(f"Expected a line for each epoch in {self.folder / LOG_NAME}, got none; train again")

    @property
    def config(self) -> dict[str, Any]:
        return self.result["config"]

    @property
    def name(self) -> str:
        return self.config["name"]

    @property
    def pruning(self) -> dict[str, Any] | None:
        """None for a run that trained dense."""
        return self.result["pruning"]

    @property
    def ranks(self) -> int:
        """How many processes trained it together."""
        return (self.result.get("scale") or {"ranks": 1})["ranks"]

    @property
    def images(self) -> str:
        """Images of a step, in words, with where they come from."""
        return step_in_words(self.config["batch_size"], self.config.get("accumulate", 1), self.ranks)

    @property
    def steps(self) -> dict[str, dict[str, float]]:
        """Median and quartiles by arm, the faster dense one first, then sparse; empty where nothing was timed."""
        timing = self.result["timing"]
        if timing is None:
            return {}
        return {name: timing["arms"][name] for name in (timing["best_dense"], SPARSE) if name in timing["arms"]}

    @property
    def all_steps(self) -> dict[str, dict[str, float]]:
        """The same for every arm that was timed."""
        return {} if self.result["timing"] is None else self.result["timing"]["arms"]

    @property
    def timed_in(self) -> dict[str, Any]:
        """The environment in which steps were timed: another than that of the training where it went on elsewhere."""
        return (self.result["timing"] or {}).get("environment") or self.result["environment"]

    @property
    def phases(self) -> dict[str, dict[str, float]]:
        """Seconds by phase of a step, dense and sparse; empty where they were not measured."""
        return (self.result["timing"] or {}).get("phases") or {}

    @property
    def speedup(self) -> float | None:
        """Median of the faster dense step / median of the sparse one."""
        if SPARSE not in self.steps:
            return None
        dense, sparse = self.steps.values()
        return dense["median"] / sparse["median"]

    @property
    def memory(self) -> dict[str, dict[str, int]]:
        """Bytes by kind, by "dense" and "sparse"; empty where nothing was measured."""
        return self.result["memory"] or {}

    @property
    def traffic(self) -> dict[str, int]:
        """Bytes that data-parallel training all-reduces in a step: every gradient once."""
        return {arm: kinds["gradients"] for arm, kinds in self.memory.items()}

    @property
    def description(self) -> str:
        """What was done, in a sentence."""
        if not self.pruning:
            return "Trained dense, nothing pruned."
        pattern = self.config.get("pattern", "unstructured")
        how = "given masks" if self.config.get("masks") else self.config["criterion"]
        how += "" if pattern == "unstructured" else f", pattern {pattern}"
        return (
            f"Pruned before training by {how}, budget {self.config['budget']}: {self.pruning['weight_sparsity']:.2%} of the "
            f"weights and {self.pruning['flop_sparsity']:.2%} of the multiply-adds removed; trained sparse from the first step."
        )


def in_words(environment: dict[str, Any]) -> str:
    """The machine and what computed on it."""
    device = environment.get("cuda") or environment.get("cpu")
    threads = f"{environment['threads']} thread{'s' * (environment['threads'] != 1)}"
    return f"{device}, {threads}, torch {environment.get('torch')}, {environment.get('kernels')} kernels"


def is_run(path: Path) -> bool:
    """Whether the folder is a run's, finished or not."""
    return (path / RESULT_NAME).is_file() or (path / LOG_NAME).is_file()


def read_run(folder: Path) -> Run:
    """The run in `folder`. Raises UserError for a folder that holds no finished run, or damaged files of one."""
    try:
        result = json.loads((folder / RESULT_NAME).read_text(encoding="utf-8"))
        rows = [json.loads(line) for line in (folder / LOG_NAME).read_text(encoding="utf-8").splitlines()]
        if not isinstance(result, dict):
            raise ValueError(f"{RESULT_NAME} holds no object")
        for number, row in enumerate(rows, 1):
            if not (isinstance(row, dict) and _PLOTTED | rows[0].keys() <= row.keys() and all(map(is_number, row.values()))):
                raise ValueError(f"line {number} of {LOG_NAME} is no epoch's")
        epochs = result["training"]["epochs"] if isinstance(result.get("training"), dict) else None
        if rows and epochs not in (None, len(rows)):
            raise ValueError(f"{len(rows)} lines in {LOG_NAME} for {epochs} epochs")
    except FileNotFoundError as error:
        raise UserError(f"Expected a finished run in {folder}, found no {Path(error.filename).name}; finish it with "
                        f"grasp-sparse train --resume {folder}") from error
    except OSError as error:
        raise UserError(f"cannot read the run in {folder} ({error})") from error
    except ValueError as error:
        raise UserError(f"Expected {RESULT_NAME} and {LOG_NAME} of a run in {folder}, got damaged ones ({error}); write them anew with "
                        f"grasp-sparse train --resume {folder}") from error
    return Run(folder, result, rows)


def finished_runs(folders: Sequence[Path]) -> list[Run]:
    """Those of several runs that can be read; the others, of which some may still be training, are named in a warning.

    Raises UserError where fewer than two are left to compare.
    """
    runs, left_out = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except UserError as error:
            left_out.append(error)
    if left_out and len(runs) < 2:
        raise left_out[0]
    for error in left_out:
        warnings.warn(f"left out: {error}", stacklevel=2)
    return runs
