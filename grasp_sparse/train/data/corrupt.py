"""Image files that cannot be read: named once, counted, and too many of them end the run."""

from __future__ import annotations

import warnings
from collections.abc import Iterable

from grasp_sparse.train.errors import UserError

_NAMED = 3


class CorruptImages:
    """The unreadable files that this process has met, and how often a batch had to do without one.

    `files`: path -> why it cannot be read. `limit`: so many different files are let pass.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.files: dict[str, str] = {}
        self._passed_over = 0

    def add(self, failures: Iterable[tuple[str, str]]) -> None:
        """Count (path, reason) of what a batch did without; warn of each file that is new. UserError beyond the limit."""
        for path, reason in failures:
            self._passed_over += 1
            if path not in self.files:
                self.files[path] = reason
                if len(self.files) <= self.limit:
                    warnings.warn(f"skipped a corrupt image ({len(self.files)} of at most {self.limit}): {path}: {reason}", stacklevel=2)
        if len(self.files) > self.limit:
            raise UserError(self._too_many())

    def take(self) -> int:
        """How many images were replaced or left out since the last call; the same file counts each time."""
        count, self._passed_over = self._passed_over, 0
        return count

    def _too_many(self) -> str:
        last = list(self.files.items())[-_NAMED:]
        named = "; ".join(f"{path}: {reason}" for path, reason in last)
        return (
            f"Expected at most {self.limit} corrupt images, got {len(self.files)}, the last of them {named}; "
            "mend them or allow more with --max-corrupt, also for a run that goes on; to leave them out, start a new run"
        )
