"""What the plots read out of rows: the faster arm of each kind, and where sparse stops to pay."""

from __future__ import annotations

from pathlib import Path

import pytest

from grasp_sparse import allocator
from grasp_sparse.bench.layer_plots import crossover, layer_lines
from grasp_sparse.bench.plots import write_plots
from grasp_sparse.bench.results import geometric_mean, machine, write_rows


def _row(arm: str, sparsity: str, median: float, **more: str) -> dict[str, str]:
    return {
        "group": "conv3x3", "shape": "conv3x3 4->4 at 8x8 batch 2", "precision": "float32", "sparsity": sparsity, "arm": arm,
        "median_s": str(median), "q1_s": str(median * 0.5), "q3_s": str(median * 2), **more,
    }  # fmt: skip


def test_a_line_compares_the_faster_arms() -> None:
    rows = [
        _row("dense nchw", "0", 9), _row("dense channels_last", "0", 6), _row("sparse nchw", "0.9", 2),
        _row("sparse channels_last", "0.9", 3), _row("sparse nchw", "0.5", 12),
    ]  # fmt: skip
    (line,) = layer_lines(rows)
    assert (line.sparsity, line.speed, line.low, line.high) == ([0.5, 0.9], [0.5, 3], [0.125, 0.75], [2, 12])
    assert [line.group for line in layer_lines([row | {"precision": "bfloat16"} for row in rows])] == ["conv3x3, bfloat16"]


def test_passes_and_patterns_are_not_mixed() -> None:
    whole, alone = {"pass": "forward+backward"}, {"pass": "fprop"}
    rows = [
        _row("dense nchw", "0", 9, **whole, pattern="unstructured"), _row("sparse nchw", "0.9", 3, **whole, pattern="unstructured"),
        _row("dense nchw", "0", 9, **whole, pattern="block(32, 32)"), _row("sparse nchw", "0.9", 1, **whole, pattern="block(32, 32)"),
        _row("dense nchw", "0", 0.1, **alone, pattern="unstructured"), _row("sparse nchw", "0.9", 0.2, **alone, pattern="unstructured"),
    ]  # fmt: skip
    assert {line.group: line.speed for line in layer_lines(rows)} == {"conv3x3": [3], "conv3x3, block(32, 32)": [9]}


def test_a_shape_without_a_sparse_arm_is_refused() -> None:
    with pytest.raises(ValueError, match="no sparse arm of conv3x3 4->4"):
        layer_lines([_row("dense nchw", "0", 9)])


@pytest.mark.parametrize(
    ("speed", "expected"), [([3, 2, 0], 0.3), ([3, 2, 1], 0.4), ([0.9, 0.8, 0.7], None), ([3, 2, 1.5], None)]
)
def test_crossover_is_where_the_line_meets_one(speed: list[float], expected: float | None) -> None:
    found = crossover([0.1, 0.2, 0.4], speed)
    assert found == (None if expected is None else pytest.approx(expected))


def test_every_kind_of_file_is_drawn(tmp_path: Path) -> None:
    case = {"model": "net", "budget": "flops", "sparsity": "0.9"}
    files = {
        "layers": [_row("dense nchw", "0", 6), _row("sparse nchw", "0.9", 2), _row("sparse nchw", "0.99", 1)],
        "crossover": [_row("dense nchw", "0", 6), _row("sparse nchw", "0.5", 9), _row("sparse nchw", "0.9", 2)],
        "peers": [
            _row(arm, "0.9", 1, peer_version="1", **{"pass": "forward", "vs best dense": "2"})
            for arm in ("dense nchw", "sparse nchw", "torch CSR")
        ],
        "models": [case | {"pass": "training step", "arm": arm, "median_s": "1"} for arm in ("dense nchw", "sparse nchw")],
        "gpu-steps": [
            {"model": "net", "pattern": "unstructured", "planned_in": "float32", "sparsity": "0.9", "pass": "training step", "arm": arm,
             "median_s": "1"}
            for arm in ("dense float32 nchw", "sparse float32 nchw")
        ],
        "asked": [
            {"model": "net", "asked": "4", "arm": arm, "median_s": "1", "best": "yes", "vs dense nchw": "3.9", "vs dense oneDNN": "3"}
            for arm in ("dense nchw", "sparse nchw")
        ] + [{"model": "net", "asked": "99", "most": "8.5"}],
        "breakdown": [
            case | {"arm": arm, "category": kind, "seconds": "1"} for arm in ("dense nchw", "sparse nchw") for kind in ("norm", "other")
        ],
    }  # fmt: skip
    for name, rows in files.items():
        write_rows(tmp_path / f"{name}.csv", rows)
    write_rows(tmp_path / "plan.csv", [{"model": "net", "layer": "0", "runs": "sparse"}])  # nothing to draw
    plots = write_plots(tmp_path)
    assert sorted(plot.name for plot in plots) == sorted(f"{name}.png" for name in files)
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)


def test_geometric_mean() -> None:
    assert geometric_mean([2, 8]) == pytest.approx(4)
    assert geometric_mean([2, 8], [3, 1]) == pytest.approx(2 * 2**0.5)


def test_the_allocator_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_kept", False)
    for name in allocator.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert machine()["allocator"] == "default"
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    assert machine()["allocator"] == "MALLOC_MMAP_MAX_=0"
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "100000000000")
    monkeypatch.setenv("MALLOC_TOP_PAD_", "268435456")
    assert machine()["allocator"] == "tuned"
