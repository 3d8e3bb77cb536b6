"""What a person and a program see of a run: lines, tables, durations, one JSON line an epoch."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from grasp_sparse.files import write_atomically
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
    """RUN/log.jsonl, a line for each row of `history`, to which others add."""

    def __init__(self, run_dir: Path, history: list[dict[str, Any]]) -> None:
        self.path, self._history, self._written = run_dir / LOG_NAME, history, None

    def write(self) -> None:
        """Make the file say what the history does. Raises OSError when it cannot; the next call mends what that left.

        The first call of a process, and one after a failure, writes the file anew: no epoch is there twice after a crash, none is
        missing or cut short after a full disk. Other calls append, for those who follow the file.
        """
        written, self._written = self._written, None
        lines = [json.dumps(row) + "\n" for row in self._history[written or 0 :]]
        if written is None:
            write_atomically(self.path, lambda file: file.write("".join(lines).encode()))
        elif lines:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
        self._written = len(self._history)
