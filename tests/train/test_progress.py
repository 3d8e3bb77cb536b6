"""Progress: the pace is that of the steps taken, the end is where that pace leads, and a log file is not flooded."""

from __future__ import annotations

import io

import pytest

from grasp_sparse.train.logging import human_duration
from grasp_sparse.train.progress import Progress


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _after(steps: int, seconds: float, stream: io.StringIO | None = None, **options) -> Progress:
    """After so many steps of 64 images that took `seconds` each; by default of epoch 2 of 4, 10 steps each."""
    clock = _Clock()
    usual = {"epoch": 2, "epochs": 4, "step": 0, "steps_per_epoch": 10, "every": 60.0}
    progress = Progress(**usual | options, stream=stream or io.StringIO(), clock=clock)
    with progress:
        for _ in range(steps):
            clock.now += seconds
            progress.update(64, 0.5)
    return progress


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, (6 + 20) * 2.0), ({"test_seconds": 5.0}, (6 + 20) * 2.0 + 3 * 5.0), ({"epoch": 4}, 6 * 2.0), ({"step": 3}, (3 + 20) * 2.0),
     ({"seconds_left": 30.0}, 30.0 - 8.0), ({"seconds_left": 1e9}, 52.0), ({"seconds_left": 4.0, "test_seconds": 5.0}, 5.0)],
    ids=["steps", "steps and tests", "last epoch", "resumed", "end by the clock", "no end by the clock", "time is up"],
)  # fmt: skip
def test_the_end_is_where_the_pace_leads(options: dict, expected: float) -> None:
    assert _after(4, 2.0, **options).seconds_to_go() == pytest.approx(expected)


def test_the_pace_counts_images_of_this_process_alone() -> None:
    assert _after(4, 2.0, step=3).images_per_second() == pytest.approx(32.0)


@pytest.mark.parametrize(("every", "lines"), [(60.0, 3), (200.0, 1), (0.0, 0), (1000.0, 0)])
def test_without_a_terminal_there_is_a_line_every_so_often(every: float, lines: int, capsys: pytest.CaptureFixture) -> None:
    _after(10, 21.0, every=every)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == lines
    if every == 60.0:
        assert printed[0] == "epoch   2/4  step 3/10  loss 0.5000  3 images/s  ETA 9 min 27 s"


def test_on_a_terminal_there_is_a_bar_and_no_line(capsys: pytest.CaptureFixture) -> None:
    terminal = _Terminal()
    progress = _after(10, 21.0, terminal)
    progress.bar.refresh()
    assert "epoch 2/4" in terminal.getvalue() and capsys.readouterr().out == ""
    assert progress.state(0.5) == "loss 0.5000, 3 images/s, ETA 7 min 0 s"


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture) -> None:
    terminal = _Terminal()
    _after(10, 21.0, terminal, shown=False, every=1.0)
    assert terminal.getvalue() == "" and capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.44, "0.4 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.4, "59 s"), (59.6, "1 min 0 s"),
     (3599.6, "1 h 0 min"), (5025, "1 h 24 min"), (86399, "1 d 0 h"), (90000, "1 d 1 h")],
)  # fmt: skip
def test_durations_have_two_units(seconds: float, text: str) -> None:
    assert human_duration(seconds) == text
