"""benchmarks.accuracy: every trial is a run that can be started, rows say what result.json says, and nothing is trained twice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import accuracy
from benchmarks.accuracy_studies import SEEDS, STUDIES, Trial
from grasp_sparse.bench.plots import write_plots
from grasp_sparse.bench.results import read_rows

_TINY = {"train_limit": 128, "test_limit": 32, "batch_size": 32, "model_args": {"stem": 4, "widths": [8], "depth": 1}}


@pytest.mark.parametrize("study", STUDIES)
def test_every_trial_is_a_valid_recipe_of_its_own(study: str) -> None:
    trials = list(STUDIES[study]())
    assert len({trial.name for trial in trials}) == len(trials) > 1
    for trial in trials:
        for seed in SEEDS[study]:
            config = accuracy.config_of(trial, seed, "somewhere", threads=1)
            assert (config.seed, config.threads, config.dense) == (seed, 1, trial.method == "dense")


def _quick_trials(recipes: list[dict]) -> list[Trial]:
    common = {"data": "fake", "model": "vgg_small", "epochs": 1, "timing_rounds": 2, "plan": "density", **_TINY}
    return [Trial("quick", recipe["criterion"], f"{recipe['sparsity']:g}", common | recipe) for recipe in recipes]


def test_rows_are_those_of_the_runs_and_are_not_trained_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    trials = _quick_trials([{"criterion": "random", "sparsity": sparsity} for sparsity in (0.5, 0.9)])
    monkeypatch.setattr(accuracy, "quick", lambda: trials)
    flags = ["--quick", "--threads", "1", "--seeds", "0", "1", "--out", str(tmp_path / "a.csv"), "--runs", str(tmp_path / "runs")]
    assert accuracy.main(flags) == 0
    out = capsys.readouterr().out
    rows = read_rows(tmp_path / "a.csv")
    assert [(row["target"], row["seed"]) for row in rows] == [("0.5", "0"), ("0.9", "0"), ("0.5", "1"), ("0.9", "1")]
    for row, sparsity in zip(rows, (0.5, 0.9, 0.5, 0.9), strict=True):
        folder = tmp_path / "runs" / "quick" / f"fake-vgg_small-random-{sparsity}-seed{row['seed']}"
        result = json.loads((folder / "result.json").read_text())
        assert row["accuracy"] == f"{result['training']['last_accuracy']:.4f}"
        assert float(row["weight_sparsity"]) == pytest.approx(sparsity, abs=0.01)
        assert int(row["steps"]) == 4
        assert "epoch   1/1" in (folder / "out.txt").read_text()
    assert out.count(" ± ") == 2
    assert write_plots(tmp_path / "a.csv") == [tmp_path / "a.png"]

    monkeypatch.setattr(accuracy, "start_run", lambda *_, **__: pytest.fail("trained again"))
    assert accuracy.main([*flags, "--resume"]) == 0
    assert len(read_rows(tmp_path / "a.csv")) == 4


def test_what_another_study_has_trained_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, *_ = _quick_trials([{"criterion": "random", "sparsity": 0.5}])
    twin, other = replace(one, study="again", method="by another name"), replace(one, study="again", target="0.6", recipe=one.recipe | {"sparsity": 0.6})
    monkeypatch.setattr(accuracy, "STUDIES", {"quick": lambda: [one], "again": lambda: [twin, other]})
    monkeypatch.setattr(accuracy, "SEEDS", {"quick": (0,), "again": (0, 1)})
    flags = ["--threads", "1", "--out", str(tmp_path / "a.csv"), "--runs", str(tmp_path / "runs"), "--resume"]
    assert accuracy.main([*flags, "--study", "quick"]) == 0
    trained, start = [], accuracy.start_run
    monkeypatch.setattr(accuracy, "start_run", lambda config, *rest, **more: (trained.append((config.sparsity, config.seed)), start(config, *rest, **more))[1])
    assert accuracy.main([*flags, "--study", "again"]) == 0
    assert trained == [(0.6, 0), (0.5, 1), (0.6, 1)]
    first, *rows = read_rows(tmp_path / "a.csv")
    assert rows[0] == first | {"study": "again", "method": "by another name"}


def test_a_run_that_cannot_be_has_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(accuracy, "quick", lambda: _quick_trials([{"criterion": "nonsense", "sparsity": 0.5}]))
    assert accuracy.main(["--quick", "--threads", "1", "--out", str(tmp_path / "a.csv"), "--runs", str(tmp_path / "runs")]) == 0
    assert "quick: fake vgg_small nonsense 0.5, seed 0: no row: " in capsys.readouterr().out
    assert not (tmp_path / "a.csv").exists()
