"""What was measured on a GPU, layers and whole steps, as one table.

    python -m benchmarks.gpu_summary

Reads benchmarks/results/gpu-layers.csv and gpu-steps.csv, which benchmarks.gpu_layers and benchmarks.gpu_steps write. A cell
is how many times as fast as the dense layer or network of the same precision, in the faster of its memory formats, in brackets as
that of the fastest precision; of layers the geometric mean over the shapes of their group and, for what is ours, the share of the
roofline that was reached.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from benchmarks.runner import RESULTS, run
from grasp_sparse.bench.results import DENSE, SPARSE, Row, geometric_mean, kind_of, read_rows
from grasp_sparse.train.errors import UserError

FILES = ("gpu-layers.csv", "gpu-steps.csv")
PLANS = "gpu-steps-plan.csv"
PLANNED = ("model", "pattern", "sparsity", "planned_in")
NOISE = 0.03
LABELS = ("", "pattern", "by", "precision", "pass")
LEGEND = "times as fast as dense in this precision (as dense in the fastest one), and the share of the roofline:"


def _labels(row: Row) -> tuple[str, ...]:
    """What names a line of the table; peers by their own names."""
    peer = row["arm"].removeprefix("peer ").removesuffix(f" {row['precision']} {row['layout']}")
    by = "" if kind_of(row["arm"]) == SPARSE else peer
    of = row.get("group") or row["model"]
    return row["shape"] if of == "linear" else of, row["pattern"], by, row["precision"], row["pass"]


def _cell(rows: Sequence[Row]) -> str:
    """Of the rows of one line and sparsity: ours in the fastest layout, a peer as it is."""
    text = f"{_mean(rows, 'vs dense of this precision'):.2f}x ({_mean(rows, 'vs best dense'):.2f}x)"
    reached = [row for row in rows if row.get("roofline")]
    return f"{text} {_mean(reached, 'roofline'):.0%}" if reached else text


def _mean(rows: Sequence[Row], column: str) -> float:
    """Geometric; 0 where one was so small that it is written as 0, which has no logarithm."""
    values = [float(row[column]) for row in rows]
    return geometric_mean(values) if min(values) > 0 else 0.0


def table(rows: Sequence[Row]) -> list[str]:
    """What cells say, then a line for each group or network, pattern, precision and pass, a column for each sparsity; nothing
    for no rows."""
    found: dict[tuple[str, ...], dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        kind = kind_of(row["arm"])
        if kind != DENSE and (kind != SPARSE or row["best"]) and row.get("vs dense of this precision"):
            found[_labels(row)][float(row["sparsity"])].append(row)
    if not found:
        return []
    sparsities = sorted({sparsity for cells in found.values() for sparsity in cells})
    lines = [(*LABELS, *(f"{sparsity:.0%}" for sparsity in sparsities))]
    for labels, cells in found.items():
        lines.append((*labels, *(_cell(cells[sparsity]) if sparsity in cells else "-" for sparsity in sparsities)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [LEGEND, *("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)]


def plan_line(rows: Sequence[Row]) -> str:
    """How many layers of one planned network take longer than the dense ones would, and how all of them together compare."""
    measured = [row for row in rows if row.get("dense_s")]
    head = "{:16} {:16} {:>4} {}".format(*(rows[0][name] for name in PLANNED))
    if not measured:
        return f"{head}  no layer was measured"
    times = [(row, float(row["dense_s"]), float(row[f"{row['runs']}_s"])) for row in measured]
    slower = [f"{row['layer']} {dense / planned:.2f}x" for row, dense, planned in times if planned > (1 + NOISE) * dense]
    ways = ", ".join(f"{sum(row['runs'] == way for row in rows)} {way}" for way in dict.fromkeys(row["runs"] for row in rows))
    together = sum(dense for _, dense, _ in times) / sum(planned for *_, planned in times)
    text = f"{head}  layers: {ways}; together {together:.2f}x dense, slower than dense: {len(slower)}"
    return f"{text} ({', '.join(slower)})" if slower else text


def main(arguments: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_summary", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="of the CSV files (default: %(default)s)")
    folder = flags.parse_args(arguments).results
    rows = [row for name in FILES if (folder / name).exists() for row in read_rows(folder / name)]
    if not rows:
        raise UserError(f"Expected {' or '.join(FILES)} in {folder}, got neither; make gpu writes them on a machine with a GPU")
    print(f"on {', '.join(sorted({row['cuda'] or row['cpu'] for row in rows}))}, torch {rows[0]['torch']}:")
    print("\n".join(table(rows)))
    planned: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in read_rows(folder / PLANS) if (folder / PLANS).exists() else ():
        planned[tuple(row[name] for name in PLANNED)].append(row)
    print("\n".join(plan_line(layers) for layers in planned.values()) if planned else "no network was planned")
    return 0


if __name__ == "__main__":
    run(main)
