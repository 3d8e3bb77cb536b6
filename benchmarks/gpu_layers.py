"""Single layers on a GPU: forward, and forward with backward, against every dense precision and torch's own sparse products.

    python -m benchmarks.gpu_layers                     linear layers and the convolutions of three networks
    python -m benchmarks.gpu_layers --group linear --sparsity 0.95
    python -m benchmarks.gpu_layers --device cpu --quick      that the program runs; says nothing about speed

Masks are random, of whole blocks where the pattern says so. A call is recorded as a CUDA graph and replayed, all arms of a shape
in turns. Nothing of a shape is written unless every arm agrees with the dense layer in float64. `roofline` is the share of what
the device can do: the larger of multiply-adds over its measured rate and bytes over its measured bandwidth, divided by the time.
Writes benchmarks/results/gpu-layers.csv after every shape, and prints a table at the end (benchmarks/gpu_summary.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.gpu_peers import products, semi_structured
from benchmarks.gpu_shapes import GROUPS, PATTERNS, SPARSITIES, TINY
from benchmarks.gpu_summary import table
from benchmarks.runner import (
    RESULTS,
    Results,
    add_device,
    check_device,
    measure_all,
    parser,
    run,
    settings_of,
    share,
    tell,
    times_of,
)
from benchmarks.shapes import LinearShape, Shape
from grasp_sparse.bench.ceilings import Ceilings, measure_ceilings
from grasp_sparse.bench.cuda_arms import CudaArm, check, dense_arms, pruned_arms
from grasp_sparse.bench.precision import STORAGE, TOLERANCE, precision
from grasp_sparse.bench.results import DENSE, Row, kind_of, timing_columns
from grasp_sparse.nn import SparseConv2d, SparseLinear
from grasp_sparse.pruning import make_masks
from grasp_sparse.timing import Timing

PASSES = ("forward", "forward+backward")
KEY = ("group", "shape")
# Single weights are no work for tensor cores, whole blocks no work for anything else.
PRECISIONS = {"unstructured": ("float32", "bfloat16"), "block": ("tf32", "bfloat16")}


def pruned_layer(dense: nn.Module, pattern: str, sparsity: float, seed: int) -> nn.Module:
    """`dense` under a random mask of this pattern."""
    scores = torch.rand(dense.weight.shape, generator=torch.Generator().manual_seed(seed))
    mask = make_masks({"weight": scores}, sparsity, pattern)["weight"].to(dense.weight.device)
    kind = SparseLinear if isinstance(dense, nn.Linear) else SparseConv2d
    return kind.from_dense(dense, mask, block_size=PATTERNS[pattern])


def work(layer: nn.Module, x: Tensor, y: Tensor, itemsize: int, backward: bool) -> tuple[float, float]:
    """(floating-point operations, bytes) that a pass cannot do without: kept weights at every position; all tensors once."""
    positions = y.numel() // y.shape[1]
    passes = 3 if backward else 1
    weights = layer.values.numel() * (4 if not backward else 12)
    return 2.0 * layer.nnz * positions * passes, float((x.numel() + y.numel()) * itemsize * (2 if backward else 1) + weights)


def measure(
    group: str, shape: Shape, patterns: list[str], sparsities: list[float], ceilings: Ceilings, device: str, rounds: int, seed: int
) -> list[Row]:
    """Rows of one shape: dense in every precision, then pruned in every pattern and sparsity, for both passes."""
    generator = torch.Generator().manual_seed(seed)
    dense = shape.layer().to(device)
    x = shape.input(generator).to(device)
    with torch.no_grad():
        y = dense(x)
    grad = torch.randn(y.shape, generator=generator).to(device)
    rows: list[Row] = []
    for what in PASSES:
        incoming = grad if what == PASSES[1] else None
        reference = dense_arms(dense, x, incoming, input_grad=shape.input_grad)
        check(reference, dense, torch.ones_like(dense.weight, dtype=torch.bool))
        for pattern in patterns:
            for sparsity in sparsities:
                layer = pruned_layer(dense, pattern, sparsity, seed)
                names = PRECISIONS[pattern.partition("(")[0]]
                arms = pruned_arms({pattern: layer}, x, incoming, names, input_grad=shape.input_grad)
                check(arms, dense, layer.mask)
                others = _peers(layer, x, pattern) if incoming is None and isinstance(dense, nn.Linear) and device == "cuda" else {}
                times = times_of({**reference, **arms, **others}, device, rounds)
                known = {"group": group, "shape": str(shape), "count": shape.count, "pattern": pattern, "sparsity": f"{sparsity:g}",
                         "nnz": layer.nnz, "pass": what, "input_grad": "yes" if shape.input_grad else "no"}  # fmt: skip
                rows += _rows(times, arms, known, ceilings, layer, x, y, bool(incoming is not None))
    return rows


def _peers(layer: nn.Module, x: Tensor, pattern: str) -> dict[str, Callable[[], object]]:
    """Peers that compute the right thing, by "peer <name> <precision> rows"; one line about each that does not run or is wrong."""
    found: dict[str, Callable[[], object]] = {}
    weight = layer.to_dense_weight().detach()
    for name in ("float32", "bfloat16"):
        w, given = weight.to(STORAGE[name]), x.to(STORAGE[name])
        candidates = [(peer, product, w) for peer, product in products(w, PATTERNS[pattern], given)]
        if pattern == "unstructured" and name == "bfloat16":
            candidates.append(semi_structured(w, given))
        for peer, product, multiplied in candidates:
            try:
                with precision(name):
                    expected = given.double() @ multiplied.double().t()
                    error = float((product().double() - expected).abs().max() / expected.abs().max())
            except (RuntimeError, NotImplementedError, ImportError, AttributeError) as problem:
                tell(f"{peer} {name}: {str(problem).splitlines()[0][:100]}")
                continue
            if error <= TOLERANCE[name]:
                found[f"peer {peer} {name} rows"] = product
            else:
                tell(f"{peer} {name}: wrong by {error:.1e}, not measured")
    return found


def _rows(
    times: Mapping[str, Timing], arms: Mapping[str, CudaArm], known: Row, ceilings: Ceilings, layer: nn.Module, x: Tensor, y: Tensor,
    backward: bool,
) -> list[Row]:  # fmt: skip
    rows = []
    for name in times:
        kind = kind_of(name)
        *_, used, layout = name.split()
        row = known | {"precision": used, "layout": layout, "arm": name}
        row |= timing_columns(times, name, [other for other in times if kind_of(other) == kind and used in other.split()])
        rivals = [time.median for other, time in times.items() if kind_of(other) == DENSE and used in other.split()]
        row["vs dense of this precision"] = f"{min(rivals) / times[name].median:.3f}"
        if name in arms:
            flops, size = work(layer, x, y, STORAGE[used].itemsize, backward)
            row["roofline"] = f"{ceilings.seconds(flops, size, used, bool(layer.block_size)) / times[name].median:.3f}"
        rows.append(row)
    return rows


def describe(rows: list[Row]) -> list[str]:
    """One line a pattern and sparsity: forward with backward, each precision against the dense layer of that precision."""
    lines = []
    for pattern, sparsity in dict.fromkeys((row["pattern"], row["sparsity"]) for row in rows):
        found = [row for row in rows if (row["pattern"], row["sparsity"], row["pass"]) == (pattern, sparsity, PASSES[1])]
        best = [row for row in found if kind_of(row["arm"]) == "sparse" and row["best"]]
        ratios = "  ".join(
            f"{row['precision']} {float(row['median_s']) * 1e3:.3g} ms {float(row['vs dense of this precision']):.2f}x "
            f"(roofline {float(row['roofline']):.0%})" for row in best
        )  # fmt: skip
        lines.append(f"{rows[0]['shape']:44} {pattern:16} {float(sparsity):.0%}  {ratios}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    flags = parser("gpu_layers", __doc__)
    add_device(flags)
    flags.add_argument("--group", nargs="+", choices=tuple(GROUPS), default=list(GROUPS), help="default: all")
    flags.add_argument("--pattern", nargs="+", choices=tuple(PATTERNS), default=list(PATTERNS), help="default: all")
    flags.add_argument("--sparsity", type=share, nargs="+", default=SPARSITIES, metavar="S", help="default: %(default)s")
    flags.add_argument("--rounds", type=int, default=10, help="measured calls of an arm (default: %(default)s)")
    flags.add_argument("--out", type=Path, help="CSV to write (default: gpu-layers.csv in benchmarks/results)")
    options = flags.parse_args(arguments)
    check_device(options)

    settings = settings_of(options)
    results = Results(options.out or RESULTS / "gpu-layers.csv", settings, options.resume)
    ceilings = measure_ceilings(options.device)
    tell(str(ceilings))
    cases = TINY if options.quick else [(group, shape) for group in options.group for shape in GROUPS[group]()]
    patterns = [pattern for pattern in options.pattern if not options.quick or (PATTERNS[pattern] or (0,))[0] <= 32]

    def run_one(case: tuple[str, Shape]) -> None:
        group, shape = case
        known = [{"group": group, "shape": str(shape), "pattern": p, "sparsity": f"{s:g}"} for p in patterns for s in options.sparsity]
        if results.has(known):
            return
        rows = measure(group, shape, patterns, list(options.sparsity), ceilings, options.device, options.rounds, options.seed)
        results.add(rows, KEY)
        for line in describe(rows):
            tell(line)

    wrong = measure_all(cases, lambda case: str(case[1]), run_one)
    print("\n".join(table(results.rows)))
    print(f"wrote {results.path}")
    return 1 if wrong else 0


if __name__ == "__main__":
    run(main)
