"""Whole training steps of pruned networks: forward, cross-entropy, backward, SGD with momentum and weight decay.

    python -m benchmarks.models --quick                          two networks on small batches, about a minute
    python -m benchmarks.models --data-dir cifar10               all networks
    python -m benchmarks.models --model resnet50 --budget flops

Networks: the paper's VGG-19 and ResNet-32 (batch 128, 32x32), torchvision's ResNet-50 (batch 32, 224x224), an MLP
3072-4096-4096-10 (batch 256). Masks are GraSP's on real images, --data-dir DIR with DIR/train/<class>/*.jpg or else
Fashion-MNIST, under a budget in multiply-adds and one in weights; they are kept in --mask-dir. The dense network is the same
one with zeros where pruned; both run in both memory formats, in turns in one process, after loss, all gradients of the kept
weights and each sparse layer, alone and as one with its norm, were found equal on memory poisoned with NaN. A measured step
follows an unmeasured one of the same network, as it does in training; denormal numbers count as zero. Writes
benchmarks/results/models.csv, and models-breakdown.csv with where the time goes in the fastest dense and the fastest sparse step,
and in the dense one with the norms, activations and poolings that a sparse one has (tests/test_fusion.py compares such networks,
not this), after every case.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from torch import nn

from benchmarks.networks import Network, add_networks, chosen, masks_of
from benchmarks.runner import RESULTS, Results, measure_all, parser, run, settings_of, share, tell
from grasp_sparse.bench.breakdown import breakdown
from grasp_sparse.bench.denormals import flush_denormals
from grasp_sparse.bench.results import DENSE, REFITTED, SPARSE, Row, kind_of
from grasp_sparse.bench.steps import (
    Batch, Step, check_steps, dense_steps, fastest, masked_copy, refitted_step, sparse_steps, step_rows,
)  # fmt: skip
from grasp_sparse.costs import weight_costs
from grasp_sparse.masks import MaskSet
from grasp_sparse.timing import Timing, interleaved_within
from grasp_sparse.train.errors import UserError

FAMILIES = {"flops": (0.9, 0.95, 0.98), "weights": (0.95, 0.98, 0.99)}
KEY = ("model", "input", "data", "budget", "sparsity", "precision")


class MeasuredSteps(NamedTuple):
    """Steps of a network, dense and pruned, in turns; `masked` is the dense one, with zeros where pruned."""

    masked: nn.Module
    steps: Mapping[str, Step]
    times: Mapping[str, Timing]
    rows: list[Row]


def measure_network(network: Network, batch: Batch, masks: MaskSet, case: Row, seconds: float, seed: int) -> MeasuredSteps:
    """Raises WrongResultError, and measures nothing, when a gradient differs."""
    masked = masked_copy(network.model(seed), masks)
    sparse, reports = sparse_steps(masked, masks, batch)
    steps = dense_steps(masked, batch) | sparse
    difference = check_steps(steps, masks)
    times = interleaved_within(steps, seconds, lead_in=1)
    reached = {
        "nnz": masks.kept, "weight_sparsity": f"{masks.sparsity:.5f}",
        "flop_sparsity": f"{masks.flop_sparsity(weight_costs(masked, batch[0][:1], include=list(masks))):.5f}",
    }
    rows = []
    for row in step_rows(steps, times):
        runs = [layer.runs for layer in reports[row["arm"]].rows] if row["arm"] in reports else []
        counts = {f"layers_{kind}": runs.count(kind) for kind in ("sparse", "masked", "dense")} if runs else {}
        rows.append(case | reached | counts | row | {"gradient_difference": f"{difference:.1e}"})
    return MeasuredSteps(masked, steps, times, rows)


def profile(measured: MeasuredSteps, batch: Batch, case: Row) -> list[Row]:
    """Rows of where the time goes: in the fastest dense and sparse step, and in the dense one with the norms of a sparse one."""
    rows, dense = [], fastest(measured.times, DENSE)
    layout = measured.steps[dense].layout
    profiled = {name: measured.steps[name] for name in (dense, fastest(measured.times, SPARSE))}
    if layout != "rows":  # a network of dense linear layers has nothing to refit
        profiled[f"{REFITTED} {layout}"] = refitted_step(measured.masked, batch, layout)
    for name, step in profiled.items():
        found = breakdown(step)
        for category, spent in found.items():
            rows.append(case | {
                "arm": name, "category": category, "seconds": f"{spent:.6g}", "share": f"{spent / sum(found.values()):.4f}"
            })  # fmt: skip
    return rows


def describe(rows: list[Row]) -> str:
    best = next(row for row in rows if row["best"] and kind_of(row["arm"]) == SPARSE)
    dense = next(row for row in rows if row["best"] and kind_of(row["arm"]) == DENSE)
    milliseconds = [f"{float(row['median_s']) * 1e3:.4g} ms" for row in (dense, best)]
    return (
        f"{best['model']:9} {float(best['sparsity']):.0%} of {best['budget']:7}  {dense['arm']} {milliseconds[0]}, {best['arm']} "
        f"{milliseconds[1]}: {float(best['vs best dense']):.2f}x  ({best['layers_sparse']} layers sparse, "
        f"{best['layers_masked']} masked, {best['layers_dense']} dense; {float(best['flop_sparsity']):.1%} of multiply-adds removed)"
    )


def main(arguments: list[str] | None = None) -> int:
    flags = parser("models", __doc__)
    add_networks(flags)
    flags.add_argument("--budget", nargs="+", choices=tuple(FAMILIES), default=list(FAMILIES), help="default: both")
    flags.add_argument("--sparsity", type=share, nargs="+", metavar="S", help="only these of a budget's")
    flags.add_argument("--mask-dir", type=Path, default=RESULTS.parent / "masks", metavar="DIR", help="default: %(default)s")
    flags.add_argument("--seconds-per-case", type=float, metavar="S",
                       help="how long to measure; at least 5 rounds all the same (default: 30, with --quick 5)")
    flags.add_argument("--out", type=Path, help="CSV to write; the breakdown goes beside it (default: models.csv in benchmarks/results)")
    options = flags.parse_args(arguments)

    seconds = options.seconds_per_case or (5.0 if options.quick else 30.0)
    settings = {"denormals": flush_denormals()} | settings_of(options)
    path = options.out or RESULTS / ("models-quick.csv" if options.quick else "models.csv")
    results = Results(path, settings, options.resume)
    shares = Results(path.with_name(f"{path.stem}-breakdown{path.suffix}"), settings, options.resume)
    networks, images = chosen(options)
    families = {budget: FAMILIES[budget][1:2] if options.quick else FAMILIES[budget] for budget in options.budget}
    wanted = [
        (budget, sparsity) for budget, sparsities in families.items() for sparsity in sparsities
        if sparsity in (options.sparsity or sparsities)
    ]  # fmt: skip
    if not wanted:
        known = "; ".join(f"{budget} {', '.join(map(str, sparsities))}" for budget, sparsities in families.items())
        raise UserError(f"Expected --sparsity among those of the budgets ({known}), got {', '.join(map(str, options.sparsity))}")

    def run_one(item: tuple[Network, str, float]) -> None:
        network, budget, sparsity = item
        batch = images.batch(network, options.seed)
        case = {
            "model": network.name, "input": "x".join(map(str, batch[0].shape)), "data": images.name, "budget": budget,
            "sparsity": f"{sparsity:g}",
        }  # fmt: skip
        if results.has([case]) and shares.has([case]):
            return
        masks = masks_of(network, images, wanted, options.mask_dir, options.seed)[budget, sparsity]
        measured = measure_network(network, batch, masks, case, seconds, options.seed)
        results.add(measured.rows, KEY)
        shares.add(profile(measured, batch, case), KEY)
        tell(describe(measured.rows))
        gc.collect()

    items = [(network, budget, sparsity) for network in networks for budget, sparsity in wanted]
    wrong = measure_all(items, lambda item: f"{item[0].name} {item[2]:.0%} of {item[1]}", run_one)
    print(f"wrote {results.path} and {shares.path}")
    return 1 if wrong else 0


if __name__ == "__main__":
    run(main)
