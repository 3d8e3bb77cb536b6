"""Forward and backward of single layers, sparse against every dense path, in turns in one process.

    python -m benchmarks.layers --quick              three shapes, a minute
    python -m benchmarks.layers                      all groups
    python -m benchmarks.layers --group linear       conv3x3, resnet50 (its distinct convolutions at 224x224), linear
    python -m benchmarks.layers --cold               every call measured, see below

In its turn an arm makes up to three unmeasured calls before the measured one: in a network a layer's input and gradient
have just been written by its neighbours. With --cold there are none, and each arm starts with its data evicted by the arm
before: that is the other end, and the smaller an arm's work the more it pays.

The dense arms of a shape and the sparse ones of all sparsities run in the same turns; a convolution runs in NCHW and in
channels_last. Prints ratios and geometric means and writes benchmarks/results/layers.csv (layers-cold.csv), one row an arm,
after every shape. Machines differ and are shared: quote ratios. Nothing is measured unless the arms agree on the results, on
memory poisoned with NaN. Set the allocator as README says; the rows tell whether it was (`allocator`).
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch

from benchmarks.runner import RESULTS, Results, add_precision, measure_all, parser, run, settings_of, share, tell
from benchmarks.shapes import GROUPS, QUICK, LinearShape, Shape
from grasp_sparse.bench.arms import Arm, check_arms, layer_arms, layout_of
from grasp_sparse.bench.results import DENSE, SPARSE, Row, geometric_mean, kind_of, same, timing_columns
from grasp_sparse.nn import SparseConv2d, SparseLayer, SparseLinear
from grasp_sparse.patterns import get_pattern
from grasp_sparse.pruning import make_masks
from grasp_sparse.timing import interleaved_within

LEAD_IN = 3
SPARSITIES = (0.9, 0.95, 0.98, 0.99)
KEY = ("group", "shape", "pattern", "precision", "caches")


def random_mask(shape: torch.Size, sparsity: float, generator: torch.Generator, pattern: str = "unstructured") -> torch.Tensor:
    """A random mask of this pattern; of exactly round((1 - sparsity) * n) places if they are single ones."""
    return make_masks({"weight": torch.rand(shape, generator=generator)}, sparsity, pattern)["weight"]


def make_arms(
    shape: Shape, sparsities: list[float], precision: str, seed: int, pattern: str = "unstructured"
) -> tuple[dict[str, Arm], dict[str, int]]:
    """All arms of a shape, checked against the dense layer, and the kept weights of each.

    Raises WrongResultError when any of them computes something else.
    """
    generator = torch.Generator().manual_seed(seed)
    dense, x = shape.layer(), shape.input(generator)
    with torch.no_grad():
        y = dense(x)
    grad = torch.randn(y.shape, generator=generator)
    sparse_kind = SparseLinear if isinstance(shape, LinearShape) else SparseConv2d
    masks = {f"{sparsity:g}": random_mask(dense.weight.shape, sparsity, generator, pattern) for sparsity in sparsities}
    pruned = {label: sparse_kind.from_dense(dense, mask, get_pattern(pattern).block_size) for label, mask in masks.items()}
    arms = layer_arms(dense, pruned, x, grad, input_grad=shape.input_grad, precision=precision)
    everything = torch.ones_like(dense.weight, dtype=torch.bool)
    check_arms({name: arm for name, arm in arms.items() if kind_of(name) == DENSE}, dense, everything)
    for label, mask in masks.items():
        check_arms({name: arm for name, arm in arms.items() if name.split()[:2] == [SPARSE, label]}, dense, mask)
    kept = {name: arm.layer.nnz if isinstance(arm.layer, SparseLayer) else dense.weight.numel() for name, arm in arms.items()}
    return arms, kept


def measure(
    group: str, shape: Shape, sparsities: list[float], *, seconds: float, lead_in: int, precision: str, seed: int,
    pattern: str = "unstructured",
) -> list[Row]:  # fmt: skip
    """Rows of one shape: its dense arms, and at each sparsity its sparse ones."""
    arms, kept = make_arms(shape, sparsities, precision, seed, pattern)
    times = interleaved_within(arms, seconds, lead_in=lead_in)
    rows = []
    for name in arms:
        kind, label = name.split()[:2]
        rivals = [other for other in arms if kind_of(other) == kind and (kind == DENSE or other.split()[1] == label)]
        rows.append({
            "group": group, "shape": str(shape), "count": shape.count, "pattern": pattern, "sparsity": label if kind == SPARSE else "0",
            "nnz": kept[name], "pass": "forward+backward", "input_grad": "yes" if shape.input_grad else "no",
            "precision": precision, "caches": "warm" if lead_in else "cold", "layout": layout_of(name),
            "arm": name if kind == DENSE else " ".join([SPARSE, *name.split()[2:]]),
            **timing_columns(times, name, rivals),
        })  # fmt: skip
    return rows


def best_sparse(rows: list[Row]) -> dict[str, Row]:
    """Of rows of one shape: sparsity -> the row of the faster sparse arm."""
    return {row["sparsity"]: row for row in rows if kind_of(row["arm"]) == SPARSE and row["best"]}


def describe(rows: list[Row]) -> str:
    """One line for the shape: at each sparsity the faster sparse arm against the fastest dense one."""
    ratios = "  ".join(f"{float(s):.0%}: {float(row['vs best dense']):5.2f}x" for s, row in best_sparse(rows).items())
    return f"{rows[0]['shape']:42} {rows[0]['caches']}  {ratios}"


def summary(rows: list[Row]) -> list[str]:
    """Geometric means of the better sparse layout against the fastest dense one, a line per group, batch and sparsity.

    Of resnet50 twice: over its distinct shapes, and with each shape weighted by how often the network has it.
    """
    ratios: dict[tuple[str, str, str], list[tuple[float, float]]] = defaultdict(list)
    for row in rows:
        if kind_of(row["arm"]) == SPARSE and row["best"]:
            batch = row["shape"].rpartition(" ")[2]
            ratios[row["group"], batch, row["sparsity"]].append((float(row["vs best dense"]), float(row["count"])))
    lines = []
    for (group, batch, sparsity), found in ratios.items():
        values, counts = zip(*found, strict=True)
        line = f"{group} batch {batch} at {float(sparsity):.0%}: geometric mean {geometric_mean(values):.2f}x over {len(values)} shapes"
        if any(count != 1 for count in counts):
            line += f", {geometric_mean(values, counts):.2f}x weighted by how often each occurs ({sum(counts):.0f} layers)"
        lines.append(line)
    return lines


def main(arguments: list[str] | None = None) -> int:
    flags = parser("layers", __doc__)
    flags.add_argument("--group", nargs="+", choices=tuple(GROUPS), default=list(GROUPS), help="default: all")
    flags.add_argument("--batch", type=int, nargs="+", metavar="N", help="other batch sizes than the group's own")
    flags.add_argument("--sparsity", type=share, nargs="+", default=SPARSITIES, metavar="S", help="default: %(default)s")
    flags.add_argument("--pattern", type=lambda name: get_pattern(name).name, default="unstructured", metavar="P",
                       help="of the masks; block(16, 16) stores whole blocks (default: %(default)s)")
    flags.add_argument("--seconds-per-shape", type=float, default=6.0, metavar="S",
                       help="how long to measure; at least 5 rounds all the same (default: %(default)s)")
    flags.add_argument("--cold", action="store_true", help="no unmeasured calls in between")
    flags.add_argument("--out", type=Path, help="CSV to write (default: layers.csv or layers-cold.csv in benchmarks/results)")
    add_precision(flags)
    options = flags.parse_args(arguments)

    settings = settings_of(options)
    name = "layers-quick.csv" if options.quick else "layers-cold.csv" if options.cold else "layers.csv"
    results = Results(options.out or RESULTS / name, settings, options.resume)
    make = {group: QUICK[group] if options.quick else GROUPS[group](*([options.batch] if options.batch else [])) for group in options.group}
    cases = [(group, shape) for group, shapes in make.items() for shape in shapes]

    setting = {"pattern": options.pattern, "precision": options.precision, "caches": "cold" if options.cold else "warm"}

    def run_one(case: tuple[str, Shape]) -> None:
        group, shape = case
        known = {"group": group, "shape": str(shape), **setting}
        if results.has([known | {"sparsity": f"{sparsity:g}"} for sparsity in options.sparsity]):
            return
        rows = measure(
            group, shape, list(options.sparsity), seconds=options.seconds_per_shape, lead_in=0 if options.cold else LEAD_IN,
            precision=options.precision, seed=options.seed, pattern=options.pattern,
        )
        results.add(rows, KEY)
        tell(describe(rows))

    wrong = measure_all(cases, lambda case: str(case[1]), run_one)
    here = settings | setting
    print("\n".join(summary([row for row in results.rows if same(row, here, here)])))
    print(f"wrote {results.path}")
    return 1 if wrong else 0


if __name__ == "__main__":
    run(main)
