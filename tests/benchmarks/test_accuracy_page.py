"""docs/accuracy.md holds what the rows of accuracy.csv say, and the sums on it are right."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from benchmarks import accuracy_page
from benchmarks.accuracy_studies import STUDIES
from benchmarks.pages import filled, prose_of


def test_the_page_holds_what_the_rows_say() -> None:
    page = accuracy_page.DOCUMENT.read_text(encoding="utf-8")
    assert page == filled(page, accuracy_page.BLOCKS), "run python -m benchmarks.accuracy_page --write"
    readme = accuracy_page.README.read_text(encoding="utf-8")
    assert readme == filled(readme, accuracy_page.README_BLOCKS, shared=True), "run python -m benchmarks.accuracy_page --write"


def test_no_number_on_the_page_is_typed_by_hand() -> None:
    prose = prose_of(accuracy_page.DOCUMENT.read_text(encoding="utf-8"))
    lines = [line for line in prose.splitlines() if not line.startswith("    ")]  # commands
    assert not [line for line in lines if any(character.isdigit() for character in line)]


def test_a_line_that_turns_back_is_crossed_as_often_as_it_is_and_points_beyond_count_too() -> None:
    points = [(0.0, 0.9), (2.0, 0.7), (1.0, 0.5)]
    assert accuracy_page._heights_from(points, 1.5) == pytest.approx([0.7, 0.75, 0.6])
    assert accuracy_page._heights_from(points, -0.1) == [0.9, 0.7, 0.5]
    assert accuracy_page._heights_from(points, 2.5) == []


def _row(method: str, target: str, speed: float, accuracy: float, seed: int = 0, **others: str) -> dict[str, str]:
    return {
        "study": "budgets", "data": "fashion-mnist", "model": "vgg_small", "method": method, "target": target, "seed": f"{seed}",
        "epochs": "4", "accuracy": f"{accuracy}", "vs best dense": f"{speed}", "weight_sparsity": "0.9", "flop_sparsity": "0.8",
        "max_seconds": "", "epochs_done": "4", "steps": "1560", "seconds": "60", "step_s": "0.05", "dense_step_s": "0.1", **others,
    }  # fmt: skip


def test_the_better_one_at_equal_time_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seeds are averaged before speeds are compared; a speed that one method alone reaches has no winner."""
    rows = [
        _row("dense", "0", 1.0, 0.99),
        *(_row("grasp flops", "0.9", 2.0, 0.9 + deviation, seed) for seed, deviation in enumerate((-0.02, 0.02))),
        _row("grasp flops", "0.95", 4.0, 0.8), _row("grasp flops", "0.98", 4.5, 0.2),
        _row("random-erk weights", "0.95", 1.5, 0.88), _row("random-erk weights", "0.98", 3.2, 0.86),
    ]  # fmt: skip
    monkeypatch.setattr(accuracy_page, "read_rows", lambda _: rows)
    at = accuracy_page.equal_time()["fashion-mnist"]
    assert list(at) == ["random-erk weights", "grasp flops"]  # as the study names them
    assert at["grasp flops"][2.0] == pytest.approx(0.9)
    assert at["grasp flops"][3.0] == pytest.approx(0.9 - 0.1 * math.log(1.5) / math.log(2))
    assert sorted(at["random-erk weights"]) == [2.0, 2.5, 3.0]
    finding = accuracy_page.equal_time_finding()
    assert finding.startswith("- fashion-mnist: grasp flops at 2× (")
    assert "random-erk weights at 3× (" in finding and "4×" not in finding


def test_nothing_is_the_best_at_a_speed_where_another_is_better_and_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the other has no setting so slow to draw a line from."""
    rows = [
        _row("random-erk weights", "0.95", 2.9, 0.66), _row("random-erk weights", "0.98", 3.6, 0.60),
        _row("grasp flops", "0.9", 2.1, 0.65), _row("grasp flops", "0.95", 3.0, 0.59),
    ]  # fmt: skip
    monkeypatch.setattr(accuracy_page, "read_rows", lambda _: rows)
    at = accuracy_page.equal_time()["fashion-mnist"]
    assert at["random-erk weights"][2.0] == at["random-erk weights"][2.5] == 0.66 and 0.59 < at["grasp flops"][2.5] < 0.65
    said = accuracy_page.equal_time_finding()
    assert "random-erk weights at 2× (1.0 points before grasp flops)" in said and "grasp flops at" not in said


def test_an_epoch_that_was_begun_does_not_count_as_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch of 390 steps, as the run says that no limit ended; this one was ended in its seventh."""
    limited = {"study": "cifar10", "max_seconds": "540.0", "epochs_done": "7", "steps": "2503", "seconds": "545.8"}
    dense = _row("dense", "0", 1.0, 0.5, **limited | {"steps": "780"})
    rows = [_row("grasp weights", "0.95", 2.8, 0.61), dense, _row("grasp", "0.98", 2.8, 0.69, **limited)]
    monkeypatch.setattr(accuracy_page, "read_rows", lambda _: rows)
    assert accuracy_page.steps_per_epoch("fashion-mnist") == 390
    assert "| vgg_small, grasp, 98% | 6.4 | 9.1 min |" in accuracy_page.networks_table()
    assert "| vgg_small, dense | 2.0 | 9.1 min | 13.99× | 50.0 | 1.00× | 1.3 min |" in accuracy_page.networks_table()


def test_an_epoch_has_as_many_steps_in_every_study() -> None:
    assert len({trial.recipe["batch_size"] for study in STUDIES.values() for trial in study()}) == 1


@pytest.mark.parametrize("study", STUDIES)
def test_speeds_that_are_compared_are_of_one_machine(study: str) -> None:
    for (data,), rows in accuracy_page.grouped(accuracy_page.rows_of(study), "data").items():
        assert len({tuple(row[name] for name in ("cpu", "threads", "kernels", "allocator", "torch")) for row in rows}) == 1, data
