"""Case after case on a device, for as long as there is time: what one of them does to itself, or to the device, costs no other."""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence

import torch

from benchmarks.runner import tell

BEGAN = time.monotonic()
_NAMED = 12  # of the cases that are left out


def add_budget(to: argparse.ArgumentParser) -> None:
    to.add_argument("--budget-seconds", type=float, metavar="S", help="begin no case that would end later than this (default: all)")
    to.add_argument("--after", type=int, default=0, help=argparse.SUPPRESS)  # begins behind the first so many; see _begin_again
    to.add_argument("--warm", type=part, metavar="I/N", help="only compile what the I-th of every N cases needs, and write nothing")


def part(text: str) -> tuple[int, int]:
    """ "I/N", I from 1 to N."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"Expected I/N with I from 1 to N, got {text}")
    return int(number), int(count)


def limit_memory(options: argparse.Namespace) -> None:
    """While others use the device: what compiles for them takes no more than a quarter of its memory."""
    if options.warm and options.device == "cuda":
        torch.cuda.set_per_process_memory_fraction(0.25)


def use_fastest_convolutions(device: str) -> None:
    """cuDNN measures its algorithms once for each shape: the dense side is to be as fast as it can be."""
    torch.backends.cudnn.benchmark = device == "cuda"


def measure_within(
    cases: Sequence, label: Callable[[object], str], measure: Callable[[object], None], options: argparse.Namespace
) -> int:
    """Calls `measure` for the cases in their order; returns how many raised. Each of those costs a line, and no other case.

    Where a case has broken the device's context (an address that is none), the process begins again behind it.
    """
    failed, longest = int(options.after > 0), 0.0
    for number, case in enumerate(cases[options.after :], options.after):
        began = time.monotonic()
        if options.budget_seconds is not None and began - BEGAN + longest > options.budget_seconds:
            left = [label(other) for other in cases[number:]]
            more = f"; and {len(left) - _NAMED} more" * (len(left) > _NAMED)
            tell(f"no time left for {len(left)} of {len(cases)} cases: {'; '.join(left[:_NAMED])}{more}")
            break
        try:
            measure(case)
        except Exception as error:
            failed += 1
            tell(f"{label(case)}: not measured: {said(error)}")
            traceback.print_exc(file=sys.stderr)
            if options.device == "cuda" and lost():
                _begin_again(number + 1, options)
        longest = max(0.7 * longest, time.monotonic() - began)
        if options.device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
    return failed


def said(error: BaseException) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"


def lost() -> bool:
    """Whether the device answers this process no more."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def _begin_again(after: int, options: argparse.Namespace) -> None:
    """The same program anew, which keeps what is in its file; nothing else gives a process a device again."""
    tell(f"the device answers no more; going on in a new process behind case {after}")
    sys.stderr.flush()
    flags = ["--resume", "--after", str(after)]
    if options.budget_seconds is not None:
        flags += ["--budget-seconds", f"{options.budget_seconds - (time.monotonic() - BEGAN):.1f}"]
    os.closerange(3, 4096)  # the driver's, or the old memory would stay taken
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:], *flags])
