"""Several runs in one table and one page: every number is its own run's, means are over seeds alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from made_up_runs import write_run
from page_reader import Page

from grasp_sparse import cli
from grasp_sparse.report.comparison import GROUP_HEADER, common_folder, comparison_rows, labelled, seed_groups, write_comparison
from grasp_sparse.report.runs import read_run
from grasp_sparse.train.errors import UserError


def _runs(folder: Path) -> list[Path]:
    return [
        write_run(folder / "a", name="a", seed=0, accuracy=0.80),
        write_run(folder / "b", name="b", seed=1, accuracy=0.84),
        write_run(folder / "c", name="c", seed=0, accuracy=0.70, pruned=False),
        write_run(folder / "d", name="d", seed=0, accuracy=0.75, timed=False, criterion="snip"),
    ]


def test_a_row_holds_the_numbers_of_its_run(tmp_path: Path) -> None:
    alike, header, rows = comparison_rows(labelled([read_run(folder) for folder in _runs(tmp_path)]))
    assert alike == {"model": "net", "data": "pictures"}
    a, _, c, d = (dict(zip(header, row, strict=True)) for row in rows)
    assert a == {
        "run": "a", "criterion": "grasp", "budget": "flops", "settings": "seed 0", "removed": "97.00%", "last": "80.00%", "best": "81.00%",
        "dense step": "150 ms", "sparse step": "50 ms", "speed": "3.00×", "bytes kept": "2.4 kB", "all-reduced": "404 B",
        "training": "1 min 15 s",
    }  # fmt: skip
    assert (c["criterion"], c["sparse step"], c["bytes kept"], c["all-reduced"]) == ("dense", "–", "12 kB", "4 kB")
    assert (d["criterion"], d["dense step"], d["speed"], d["all-reduced"]) == ("snip", "–", "–", "404 B")  # bytes need no timing


def test_means_are_over_runs_that_differ_in_the_seed_alone(tmp_path: Path) -> None:
    (row,) = seed_groups(labelled([read_run(folder) for folder in _runs(tmp_path)]))
    assert row == ["a, b", "grasp", "flops", "–", "97.00%", "0 1", "82.00% ± 2.83", "83.00% ± 2.83", "3.00×"]


@pytest.mark.parametrize(
    ("changes", "column", "cells"),
    [({"criterion": "snip"}, "criterion", ["grasp", "snip"]),
     ({"pattern": "block(8, 8)"}, "criterion", ["grasp", "grasp, block(8, 8)"]),
     ({"scope": "layer"}, "criterion", ["grasp", "grasp, layer"]),
     ({"budget": "weights"}, "budget", ["flops", "weights"]),
     ({"precision": "bf16"}, "settings", ["precision fp32", "precision bf16"]),
     ({"batch_size": 64, "accumulate": 2}, "settings", ["batch_size 128, accumulate 1", "batch_size 64, accumulate 2"]),
     ({"seed": 1}, "settings", ["seed 0", "seed 1"]),
     ({"nesterov": False}, "settings", ["nesterov true", "nesterov false"]),
     ({"clip_norm": 1.0}, "settings", ["clip_norm none", "clip_norm 1.0"]),
     ({"model_args": {"depth": 1}}, "settings", ["model_args {}", 'model_args {"depth" = 1}'])],
    ids=str,
)  # fmt: skip
def test_runs_that_differ_in_one_setting_are_told_apart_beside_their_names(
    tmp_path: Path, changes: dict, column: str, cells: list[str]
) -> None:
    runs = [read_run(write_run(tmp_path / "x" / "run")), read_run(write_run(tmp_path / "y" / "run", **changes))]
    alike, header, rows = comparison_rows(labelled(runs))
    assert header[1 : header.index("last")] == [column] and column not in alike
    assert [row[1] for row in rows] == cells


def test_ranks_tell_runs_apart_and_are_no_seeds(tmp_path: Path) -> None:
    """Twice the ranks take twice the images a step: the mean over both is of nothing."""
    folders = [write_run(tmp_path / name, name=name, seed=seed) for seed, name in enumerate("abcd")]
    for folder in folders[2:]:
        result = json.loads((folder / "result.json").read_text()) | {"scale": {"ranks": 2}}
        (folder / "result.json").write_text(json.dumps(result))
    named = labelled([read_run(folder) for folder in folders])
    _, header, rows = comparison_rows(named)
    assert [row[header.index("settings")] for row in rows] == [f"seed {n}, ranks {1 + n // 2}" for n in range(4)]
    assert [(row[0], row[GROUP_HEADER.index("settings")]) for row in seed_groups(named)] == [("a, b", "ranks 1"), ("c, d", "ranks 2")]
    assert "ranks 1 1 2 2" in Page(write_comparison([*named.values()], tmp_path)).text


def test_where_and_how_often_files_are_written_tells_nothing_apart(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / "a", name="a", keep_checkpoints=9, workers=0)), read_run(write_run(tmp_path / "b", name="b", seed=1))]
    _, header, rows = comparison_rows(labelled(runs))
    assert [row[header.index("settings")] for row in rows] == ["seed 0", "seed 1"] and len(seed_groups(labelled(runs))) == 1


def test_the_same_seed_twice_is_no_spread(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, name=name)) for name in "ab"]
    assert seed_groups(labelled(runs)) == []


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / where)) for where in ("x/one", "y/one")]
    assert list(labelled(runs)) == ["x/one", "y/one"]
    assert common_folder(runs) == tmp_path
    with pytest.raises(UserError, match="more than once"):
        labelled([runs[0], read_run(tmp_path / "x" / ".." / "x" / "one")])


def test_the_page_stands_alone(tmp_path: Path) -> None:
    runs = [read_run(folder) for folder in _runs(tmp_path)]
    page = Page(write_comparison(runs, tmp_path / "out"))
    assert page.figures == 2 and all(word in page.text for word in ("4 runs compared", "82.00% ± 2.83", "snip", "2 threads"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["comparison.html"]


def test_many_runs_have_a_line_each(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / f"{n}", name=f"run{n}", seed=n)) for n in range(20)]
    assert Page(write_comparison(runs, tmp_path)).figures == 2


def test_the_command_compares_runs_and_draws_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folders = [str(folder) for folder in _runs(tmp_path / "runs")[:2]]
    assert cli.main(["report", *folders]) == 0
    printed = capsys.readouterr().out
    assert "criterion grasp" in printed and "runs/comparison.html" in printed
    rows = [line.split()[:5] for line in printed.splitlines() if line.startswith(("a ", "b "))]
    assert rows == [["a", "seed", "0", "80.00%", "81.00%"], ["b", "seed", "1", "84.00%", "85.00%"]]
    assert cli.main(["report", folders[0], "--out", str(tmp_path / "elsewhere")]) == 0
    assert (tmp_path / "elsewhere" / "report.html").exists() and not (tmp_path / "runs" / "a" / "report.html").exists()


def test_the_command_says_what_an_unfinished_run_lacks(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (write_run(tmp_path / "run") / "result.json").unlink()
    assert cli.main(["report", str(tmp_path / "run")]) == 2
    assert "finish it with grasp-sparse train --resume" in capsys.readouterr().err


def test_runs_that_are_not_finished_are_left_out_of_a_comparison(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    a, b, c, d = _runs(tmp_path)
    (b / "result.json").unlink()
    (c / "log.jsonl").write_text("{")
    (tmp_path / "comparison.html").touch()  # of an earlier call: a shell's runs/* names it too
    assert cli.main(["report", *map(str, sorted(tmp_path.iterdir()))]) == 0
    printed = capsys.readouterr()
    assert [line[0] for line in printed.out.splitlines() if line.startswith(("a ", "b ", "c ", "d "))] == ["a", "d"]
    first, second = printed.err.splitlines()
    assert f"left out: Expected a finished run in {b}" in first and f"of a run in {c}, got damaged ones" in second


def test_a_single_run_is_not_compared_with_those_left_out(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folders = [write_run(tmp_path / name, name=name) for name in "ab"]
    (folders[1] / "result.json").unlink()
    assert cli.main(["report", *map(str, folders)]) == 2
    assert f"Expected a finished run in {folders[1]}" in capsys.readouterr().err and not (tmp_path / "comparison.html").exists()
