"""Errors that a user can cause and mend: the command line prints their message as one line and exits with code 2."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a missing thing. The message says what was expected, what was got and what to do, in one line."""


class DivergedError(UserError):
    """Training left the finite numbers: a loss, or what a checkpoint would hold."""


def one_line(error: BaseException) -> str:
    """The message on one line; of a worker process's traceback only the last line, which is the message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "Traceback" in str(error):
        return lines[-1].partition("Error: ")[2] or lines[-1]
    return " ".join(lines)
