"""Rows of measurements in a CSV file: which machine, which arm, median and quartiles, speed against every baseline."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from grasp_sparse.environment import describe_environment
from grasp_sparse.files import write_atomically
from grasp_sparse.timing import Timing
from grasp_sparse.train.errors import UserError

DENSE, SPARSE = "dense", "sparse"  # first word of an arm's name
REFITTED = "refitted"  # likewise: the dense network with the norms, activations and poolings that a sparse one has; in profiles only
# glibc keeps its memory instead of giving every large tensor back to the kernel; the same for dense and sparse arms.
TUNED_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000", "MALLOC_TOP_PAD_": "268435456",
}  # fmt: skip

Row = dict[str, Any]


def machine() -> Row:
    """Versions, processor, kernels, threads; `allocator` is "tuned", "default", or the settings themselves."""
    environment = describe_environment()
    if environment["allocator"] == "system default":
        environment["allocator"] = "default"
    elif all(os.environ.get(name) == value for name, value in TUNED_ALLOCATOR.items()):
        environment["allocator"] = "tuned"
    return environment


def now() -> str:
    """When a row was measured: "2026-11-30 19:30", UTC."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M")


def kind_of(arm: str) -> str:
    """"dense", "sparse" or "refitted": the first word of the arm's name."""
    return arm.split()[0]


def timing_columns(times: Mapping[str, Timing], arm: str, among: Iterable[str]) -> Row:
    """Median and quartiles of `arm`; how many times as fast it is as each dense arm and as the fastest one of them.

    `among` are the arms of the same kind that compute the same: `best` marks the fastest of them.
    """
    time = times[arm]
    row: Row = {
        "median_s": f"{time.median:.6g}", "q1_s": f"{time.q1:.6g}", "q3_s": f"{time.q3:.6g}", "rounds": time.count,
        "best": "yes" if time.median == min(times[name].median for name in among) else "",
    }  # fmt: skip
    dense = {name: other.median for name, other in times.items() if kind_of(name) == DENSE}
    row |= {f"vs {name}": f"{median / time.median:.3f}" for name, median in dense.items()}
    return row | {"vs best dense": f"{min(dense.values()) / time.median:.3f}"}


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Writes all rows, whole or not at all; columns in the order in which they first occur, blank where a row has none."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file as text. Raises UserError for a file that is none or that ends in the middle of a row."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"Expected {path} to be a CSV file of measurements, got {error}") from error
    if any(None in row or None in row.values() for row in rows):
        raise UserError(f"Expected rows of one length in {path}, got others; measure again")
    return rows


def same(row: Mapping[str, Any], other: Mapping[str, Any], columns: Iterable[str]) -> bool:
    """Whether two rows, one of them perhaps read from a file, agree in these columns."""
    return all(_text(row.get(column)) == _text(other.get(column)) for column in columns)


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def geometric_mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    """exp of the (weighted) mean of the logarithms; expects positive values, at least one."""
    weights = [1.0] * len(values) if weights is None else weights
    return math.exp(sum(w * math.log(v) for v, w in zip(values, weights, strict=True)) / sum(weights))
