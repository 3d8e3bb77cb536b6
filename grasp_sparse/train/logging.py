"""What a person and a program see of a run: lines, tables, durations, one JSON line an epoch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from grasp_sparse.train.distributed import current_ranks

LOG_NAME = "log.jsonl"


def say(text: str = "") -> None:
    """A line on stdout, from rank 0, at once: a run that is piped into a file can be followed."""
    if current_ranks().is_main:
        print(text, flush=True)


def progress_bar(total: int, done: int, label: str) -> tqdm:
    """A bar on stderr when that is a terminal, otherwise silent."""
    shown = current_ranks().is_main and sys.stderr.isatty()
    return tqdm(total=total, initial=done, desc=label, unit="step", leave=False, disable=not shown)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], right: Iterable[int] = ()) -> str:
    """Aligned text columns; those numbered in `right` are aligned to the right."""
    lines = [list(header), *map(list, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    right = set(right)
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )


def human_duration(seconds: float) -> str:
    """5025 -> "1 h 24 min": its two largest units, of which the smaller one is rounded."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    hours = round(seconds / 3600)
    return f"{hours // 24} d {hours % 24} h"


class EpochLog:
    """RUN/log.jsonl. Rewritten from the checkpoint's history on resume: no epoch is there twice after a crash."""

    def __init__(self, run_dir: Path, history: list[dict[str, Any]]) -> None:
        self.path = run_dir / LOG_NAME
        self.path.write_text("".join(json.dumps(row) + "\n" for row in history), encoding="utf-8")

    def append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
