"""The report is made from two files of a run, says what they say, and its plots are there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grasp_sparse.report import human_bytes, human_seconds, write_report

_ROWS = [
    {"epoch": e, "train_loss": 1 / e, "test_loss": 1.1 / e, "train_accuracy": 1 - 0.5 / e, "test_accuracy": 1 - 0.6 / e}
    for e in (1, 2, 3)
]


def _arm(median: float) -> dict:
    return {"median": median, "q1": 0.9 * median, "q3": 1.1 * median, "count": 5}


def _result(pruned: bool, timed: bool) -> dict:
    layers = [
        {"name": f"conv{i}.weight", "shape": [8, 8, 3, 3], "kept": kept, "total": 576, "density": kept / 576,
         "flops_kept": 10 * kept, "flops_total": 5760, "runs": "sparse"}
        for i, kept in enumerate((100, 3, 0))
    ]  # fmt: skip
    kinds = {"parameters": 4000, "gradients": 4000, "optimizer": 4000, "indices": 0}
    arms = {"dense nchw": _arm(0.2), "dense channels_last": _arm(0.15), **({"sparse": _arm(0.05)} if pruned else {})}
    return {
        "config": {"name": "demo", "model": "net", "criterion": "grasp", "budget": "flops", "batch_size": 128},
        "environment": {"threads": 2, "allocator": "system default", "cuda": None},
        "data": {"name": "pictures"},
        "pruning": {"weight_sparsity": 0.97, "flop_sparsity": 0.98, "skipped": [], "layers": layers} if pruned else None,
        "training": {"epochs": 3, "seconds": 9.0, "last_accuracy": 0.8, "best_accuracy": 0.81, "best_epoch": 2},
        "timing": {"arms": arms, "best_dense": "dense channels_last"} if timed else None,
        "memory": {"dense": kinds, **({"sparse": kinds} if pruned else {})} if timed else None,
    }


@pytest.mark.parametrize("pruned", [True, False])
@pytest.mark.parametrize("timed", [True, False])
def test_report_has_the_plots_it_shows(tmp_path: Path, pruned: bool, timed: bool) -> None:
    (tmp_path / "result.json").write_text(json.dumps(_result(pruned, timed)))
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _ROWS))
    text = write_report(tmp_path).read_text()
    plots = {path.name for path in tmp_path.glob("*.png")}
    assert plots == {"training.png"} | ({"density.png"} if pruned else set()) | ({"step.png"} if timed else set())
    assert all(f"({name})" in text for name in plots)
    assert "last epoch (3) | **80.00%**" in text and "best epoch (2) | 81.00%" in text
    assert ("**3.00 times** as fast" in text) == (pruned and timed)
    assert ("97.00% of the weights and 98.00% of the multiply-adds" in text) == pruned


def test_numbers_carry_their_unit() -> None:
    assert [human_bytes(n) for n in (12, 1234, 6e6, 2.5e9)] == ["12 B", "1.23 kB", "6 MB", "2.5 GB"]
    assert [human_seconds(s) for s in (0.0612, 2.0)] == ["61.2 ms", "2 s"]
