"""Shared by every test: a fixed seed, and new CPU memory that is poisoned, so that a result nobody wrote is seen; and at the end,
what of GPU kernels was not checked."""

from __future__ import annotations

import signal

import hypothesis
import pytest
import shares
import torch
import unchecked

from grasp_sparse import poison
from grasp_sparse.planning import cache

# Who is started in the background of a script (nohup make test &) ignores Ctrl-C, and so do its children, which tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same cases at every run, so that a red test is red for everyone; --hypothesis-profile=long looks for new ones.
hypothesis.settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=100)
hypothesis.settings.register_profile("long", deadline=None, database=None, max_examples=5000, print_blob=True)
hypothesis.settings.load_profile("fixed")


@pytest.fixture(autouse=True)
def poisoned_memory():
    with poison.poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def seed_and_threads():
    torch.manual_seed(0)
    torch.set_flush_denormal(False)  # benchmarks set it
    # Tests are small: two threads that wait for each other take longer. Those that are about threads ask for them.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_times_from_elsewhere(monkeypatch):
    """Neither the user's file of measured layer times nor those of another test decide anything; none are left behind."""
    monkeypatch.setenv("GRASP_SPARSE_CACHE", "0")
    monkeypatch.setattr(cache, "_memory", {})
    monkeypatch.setattr(cache, "_unsaved", set())


def pytest_addoption(parser):
    parser.addoption("--share", metavar="I/N", type=shares.parse, help="run only the I-th of N parts of the tests, the same ones at every run")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items):
    _skip_without_a_device(items)
    if config.getoption("--share"):
        mine = set(shares.share([item.nodeid for item in items], *config.getoption("--share")))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in mine])
        items[:] = [item for item in items if item.nodeid in mine]


def pytest_terminal_summary(terminalreporter):
    for line in unchecked.lines(terminalreporter.getreports("skipped")):
        terminalreporter.write_line(line)


def _skip_without_a_device(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
