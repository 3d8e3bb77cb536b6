"""Errors that a user can cause and mend: the command line prints their message as one line and exits with code 2."""

from __future__ import annotations


class UserError(Exception):
    """Bad input or a missing thing. The message says what was expected, what was got and what to do, in one line."""


class DivergedError(UserError):
    """Training left the finite numbers: a loss, or what a checkpoint would hold."""
