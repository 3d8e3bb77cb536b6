"""Parts of the tests, for machines on which one call must not take long."""

from __future__ import annotations

import argparse
import zlib


def parse(text: str) -> tuple[int, int]:
    """ "I/N", I from 1 to N."""
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise argparse.ArgumentTypeError(f"Expected I/N with I from 1 to N, got {text}")
    return int(number), int(count)


def share(names: list[str], number: int, count: int) -> list[str]:
    """The `number`-th of `count` parts, the same ones at every call; they differ by one test at most.

    By a hash of their names: neighbours, and those of one parameter, are alike in how long they take.
    """
    return sorted(names, key=lambda name: (zlib.crc32(name.encode()), name))[number - 1 :: count]
