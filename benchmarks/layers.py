"""Forward and backward of single layers, sparse against every dense path, in turns in one process.

    python -m benchmarks.layers --quick     two shapes, a minute
    python -m benchmarks.layers             all shapes
    python -m benchmarks.layers --cold      every call measured, see below

In its turn an arm makes three unmeasured calls before the measured one: in a network a layer's input and gradient have just
been written by its neighbours. With --cold there are none, and each arm starts with its data evicted by the arm before: that
is the other end, and the smaller an arm's work the more it pays.

Prints ratios and writes benchmarks/results/layers.csv (layers-cold.csv), one row an arm: where and with what it was measured,
median and quartiles in seconds, and how many times slower than the sparse layer. Machines differ and are shared: quote ratios.
Nothing is measured unless the arms agree on the results, on memory poisoned with NaN.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.arms import SPARSE, check, make_arms
from benchmarks.shapes import FULL, QUICK, ConvShape, LinearShape
from grasp_sparse.timing import interleaved
from grasp_sparse.environment import describe_environment

RESULTS = Path(__file__).parent / "results"
LEAD_IN = 3
SPARSITIES = (0.9, 0.95, 0.98, 0.99)


def measure(shape: ConvShape | LinearShape, sparsity: float, rounds: int, lead_in: int, seed: int) -> list[dict]:
    """Rows of one shape at one sparsity. Raises RuntimeError, and measures nothing, when the results differ."""
    arms = make_arms(shape, 1 - sparsity, torch.Generator().manual_seed(seed))
    check(arms)
    times = interleaved(arms, rounds, lead_in=lead_in)
    sparse = times[SPARSE].median
    nnz = arms[SPARSE].layer.nnz
    return [
        {
            "shape": str(shape),
            "sparsity": sparsity,
            "nnz": nnz,
            "pass": "forward+backward",
            "precision": "float32",
            "caches": "warm" if lead_in else "cold",
            "arm": name,
            "median_s": f"{time.median:.6f}",
            "q1_s": f"{time.q1:.6f}",
            "q3_s": f"{time.q3:.6f}",
            "rounds": time.count,
            "times_sparse": f"{time.median / sparse:.2f}",
        }
        for name, time in times.items()
    ]


def describe(rows: list[dict]) -> str:
    ratios = ", ".join(f"{row['times_sparse']}x vs {row['arm']}" for row in rows if row["arm"] != SPARSE)
    return f"{rows[0]['shape']:40} {rows[0]['caches']} {rows[0]['sparsity']:.0%}  {ratios}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two shapes instead of all")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="measured rounds; each runs every arm once (default: %(default)s)")
    parser.add_argument("--sparsity", type=float, nargs="+", default=SPARSITIES, metavar="S", help="default: %(default)s")
    parser.add_argument("--cold", action="store_true", help="no unmeasured calls in between")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="CSV to write (default: layers.csv or layers-cold.csv in benchmarks/results)")
    options = parser.parse_args(arguments)
    out = options.out or RESULTS / ("layers-cold.csv" if options.cold else "layers.csv")
    torch.set_num_threads(options.threads)
    environment = describe_environment()
    rows = []
    cases = [(shape, sparsity) for shape in (QUICK if options.quick else FULL) for sparsity in options.sparsity]
    for shape, sparsity in tqdm(cases, disable=not sys.stderr.isatty(), leave=False):
        measured = measure(shape, sparsity, options.rounds, 0 if options.cold else LEAD_IN, options.seed)
        tqdm.write(describe(measured))
        rows += [{**row, **environment} for row in measured]
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
