"""Image files that cannot be read: named once, counted over a whole run, and too many of them end it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from pathlib import Path

from grasp_sparse.train.errors import UserError

_NAMED = 3


class CorruptImages:
    """The unreadable files that a run has met, and how often a batch of this process had to do without one.

    `files`: path -> why it cannot be read, of this process. `names`: of the run as far as this process knows, below the folder
    `root`, which may be elsewhere when the run goes on. `limit`: so many different files are let pass.
    """

    def __init__(self, limit: int, root: Path | str = "") -> None:
        self.limit, self.root = limit, root
        self.files: dict[str, str] = {}
        self.names: set[str] = set()
        self._passed_over = 0

    def add(self, failures: Iterable[tuple[str, str]]) -> None:
        """Count (path, reason) of what a batch did without; warn of each file that is new. UserError beyond the limit."""
        for path, reason in failures:
            self._passed_over += 1
            if path not in self.files:
                self.files[path] = reason
                self.names.add(os.path.relpath(path, self.root or None))
                if (count := len(self.names)) <= self.limit:
                    warnings.warn(f"skipped a corrupt image ({count} of at most {self.limit}): {path}: {reason}", stacklevel=2)
        self.check()

    def learn(self, names: Iterable[str]) -> None:
        """Count files that were met before the run was taken up, or by other ranks; each once, whoever meets it."""
        self.names.update(names)

    def check(self) -> None:
        """UserError beyond the limit."""
        if len(self.names) > self.limit:
            raise UserError(self._too_many())

    def take(self) -> int:
        """How many images were replaced or left out since the last call; the same file counts each time."""
        count, self._passed_over = self._passed_over, 0
        return count

    def _too_many(self) -> str:
        last = [f"{path}: {reason}" for path, reason in self.files.items()] or sorted(self.names)
        return (
            f"Expected at most {self.limit} corrupt images, got {len(self.names)}, the last of them {'; '.join(last[-_NAMED:])}; "
            "mend them or allow more with --max-corrupt, also for a run that goes on; to leave them out, start a new run"
        )
