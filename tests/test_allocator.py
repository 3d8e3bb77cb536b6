"""Memory that is kept is not asked for again, and settings from outside stand."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from grasp_sparse import allocator

# A tensor of 64 MB again and again; how many pages the kernel has handed out for 15 of them.
PROGRAM = """
import ctypes, resource
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: huge pages would make few of many
import torch
import grasp_sparse as gs
from grasp_sparse.allocator import allocator
kept = gs.keep_memory() if {keep} else None
def tensor():
    torch.ones(1 << 24)
def pages():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    tensor()
before = pages()
for _ in range(15):
    tensor()
print(kept, pages() - before, allocator(), sep="|")
"""
PAGES = (1 << 26) // 4096
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")


def _run(keep: bool, **variables: str) -> list[str]:
    environment = {name: value for name, value in os.environ.items() if name not in allocator.VARIABLES} | variables
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(keep=keep)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().split("|")


def test_the_kernel_is_asked_once() -> None:
    kept, pages, words = _run(keep=True)
    assert (kept, words) == ("True", "memory kept") and int(pages) <= 2 * PAGES
    kept, many, words = _run(keep=False)
    assert (kept, words) == ("None", "system default")
    assert int(many) >= 12 * PAGES


def test_settings_from_outside_stand() -> None:
    kept, _, words = _run(keep=True, MALLOC_TOP_PAD_="65536")
    assert (kept, words) == ("False", "MALLOC_TOP_PAD_=65536")


def test_another_c_library(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in allocator.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(allocator.ctypes, "CDLL", lambda _: object())
    monkeypatch.setattr(allocator, "_kept", False)
    assert allocator.keep_memory() is False and allocator.allocator() == "system default"
