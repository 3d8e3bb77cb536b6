"""The scaling benchmark fits lines rightly, measures what it says, and writes what it measured."""

from __future__ import annotations

import csv

import pytest
import torch

from benchmarks import scaling
from benchmarks.shapes import ConvShape, LinearShape
from grasp_sparse.timing import Timing, interleaved

SMALL = ConvShape(3, 4, 6, 5), LinearShape(20, 10, 8)


def test_points_on_a_line_give_that_line():
    line = scaling.fit_line([10, 20, 50], [1.2, 1.4, 2.0])
    assert (line.a, line.b, line.r2) == pytest.approx((1.0, 0.02, 1.0))
    assert line.largest_deviation == pytest.approx(0, abs=1e-12)
    assert line(100) == pytest.approx(3.0)


def test_deviation_and_r2_of_points_off_the_line():
    line = scaling.fit_line([0, 1, 2], [1.0, 4.0, 1.0])  # the best line is flat, at 2
    assert (line.a, line.b, line.r2) == pytest.approx((2.0, 0.0, 0.0), abs=1e-12)
    assert line.largest_deviation == pytest.approx(1.0)


def test_one_number_of_weights_is_no_line():
    with pytest.raises(ValueError, match="two different numbers"):
        scaling.fit_line([5, 5], [1.0, 1.1])


def test_threads_are_what_the_row_says_and_are_put_back(monkeypatch):
    torch.set_num_threads(1)
    seen = []

    def spied(arms, *args, **options):
        """Runs the arms and notes how many threads each left behind."""

        def spy(name, run):
            return lambda: (run(), seen.append((name, torch.get_num_threads())))

        return interleaved({name: spy(name, run) for name, run in arms.items()}, *args, **options)

    monkeypatch.setattr(scaling, "interleaved", spied)
    one, two = scaling.measure_threads(SMALL[1], 0.2, 2, 0)
    assert set(seen) == {("1", 1), ("2", 2), ("1 dense", 1), ("2 dense", 2), ("1 copy", 1), ("2 copy", 2)}
    assert (one["threads_used"], two["threads_used"]) == (1, 2)
    assert float(two["times_as_fast_as_one_thread"]) == pytest.approx(float(one["median_s"]) / float(two["median_s"]), rel=0.1)
    assert float(two["fastest_times_as_fast"]) == pytest.approx(float(one["best_s"]) / float(two["best_s"]), rel=0.1)
    assert float(two["best_s"]) <= float(two["q1_s"]) and float(one["fastest_times_as_fast"]) == 1
    assert float(one["dense_product_times_as_fast"]) == 1 and float(two["dense_product_times_as_fast"]) > 0
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    "dense_two, counted, left_out",
    [
        ([1.0, 1.9, 1.05, 1.5, 1.0, 1.0], [1, 3, 5], 2),  # the second and the fourth round had one core for two threads
        ([1.9, 1.05, 1.9, 1.9, 1.9, 1.9], [1, 2, 3, 4, 5, 6], 0),  # one round alone says nothing: all count
    ],
)
def test_only_rounds_count_in_which_each_thread_had_a_core(monkeypatch, dense_two, counted, left_out):
    def fake(arms, rounds, *, lead_in, enough):
        taken = {name: [] for name in arms}
        for i, dense in enumerate(dense_two[:rounds], 1):
            for name, seconds in zip(taken, (10.0 * i, 1.0 * i, 2.0, dense, 3.0, 2.0), strict=True):
                taken[name].append(seconds)
            if i >= 3 and enough(taken):
                break
        return {name: Timing.of(seconds) for name, seconds in taken.items()}

    monkeypatch.setattr(scaling, "interleaved", fake)
    monkeypatch.setattr(scaling, "_dense_product", lambda seed: None)
    times, out = scaling.in_turns({"1": (1, None), "2": (2, None)}, 2, 3, 0)
    assert (times["2"], out) == (Timing.of([float(i) for i in counted]), left_out)
    assert times["1"] == Timing.of([10.0 * i for i in counted])


def test_the_program_writes_its_rows_and_the_plot(tmp_path, capsys):
    out = tmp_path / "new" / "scaling.csv"
    scaling.main(["--rounds", "2", "--threads", "1", "--density", "0.5", "0.2", "0.1", "--out", str(out)], SMALL, SMALL)
    rows = list(csv.DictReader(out.open()))
    assert [row["measured"] for row in rows] == ["weights"] * 6 + ["threads"] * 4
    assert [int(row["nnz"]) for row in rows[:6]] == [54, 22, 11, 100, 40, 20]
    assert all(row["torch"] and row["kernels"] and float(row["median_s"]) > 0 for row in rows)
    assert all(float(row["fit_r2"]) <= 1 and row["fit_b_s"] for row in rows[:6])
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert printed.count("ns per kept weight") == 2 and printed.count("two threads") == 2 and "wrote" in printed
