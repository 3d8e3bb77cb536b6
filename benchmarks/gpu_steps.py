"""Whole training steps on a GPU: forward, cross-entropy, backward, SGD with momentum, of pruned networks against dense ones.

    python -m benchmarks.gpu_steps                                VGG-16-BN, ResNet-50, WideResNet-50-2, ViT-B/16 at 224 x 224
    python -m benchmarks.gpu_steps --model vgg16_bn --sparsity 0.95
    python -m benchmarks.gpu_steps --device cpu --quick           that the program runs; says nothing about speed

The sparsity is the share of multiply-adds removed; masks are scored on random images, for what they cost is a matter of how
many weights each layer keeps. Precisions: float32, tf32, and bfloat16 under autocast, dense and pruned alike; dense in both
memory formats. Pruned networks are given channels_last; sparse convolutions of single weights lay images batch innermost, and what
follows keeps it. A step is recorded as a CUDA graph and replayed, all arms of a case in turns. Loss and gradients of a pruned
network are compared with those of the dense one with zeros in place before anything is measured. Writes
benchmarks/results/gpu-steps.csv after every case, and prints a table at the end (benchmarks/gpu_summary.py).
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.gpu_shapes import NETWORKS, PATTERNS, TINY_NETWORK, GpuNetwork
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
from grasp_sparse.bench.arms import LAYOUTS
from grasp_sparse.bench.precision import STORAGE, precision
from grasp_sparse.bench.results import DENSE, SPARSE, Row, kind_of, timing_columns
from grasp_sparse.bench.steps import STEP, check_steps, dense_steps, masked_copy, sparse_steps
from grasp_sparse.masks import MaskSet
from grasp_sparse.pruning import prune
from grasp_sparse.surgery import sparsify_
from grasp_sparse.train.optimizer import make_optimizer
from grasp_sparse.train.step import loss_function, training_step

CLASSES, SCORED = 1000, 16
KEY = ("model", "pattern", "sparsity")


class _Autocast(nn.Module):
    """A model whose forward runs under autocast."""

    def __init__(self, model: nn.Module, device: str) -> None:
        super().__init__()
        self.model, self.device = model, device

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            return self.model(x)


def step_of(model: nn.Module, x: Tensor, y: Tensor, used: str, device: str) -> Callable[[], object]:
    """One training step of `model`, which is taken over."""
    optimizer, loss = make_optimizer(STEP, model), loss_function(STEP)
    runs = _Autocast(model, device) if STORAGE[used] != torch.float32 else model

    def step() -> None:
        with precision(used):
            training_step(runs, optimizer, loss, x, y)

    return step


def arms_of(
    masked: nn.Module, masks: MaskSet, x: Tensor, y: Tensor, precisions: list[str], device: str
) -> dict[str, Callable]:
    layouts = {DENSE: tuple(LAYOUTS), SPARSE: ("channels_last",)}
    arms = {}
    for used in precisions:
        for kind in layouts:
            for layout in layouts[kind]:
                memory_format = LAYOUTS[layout]
                model, given = copy.deepcopy(masked).to(memory_format=memory_format), x.contiguous(memory_format=memory_format)
                if kind == SPARSE:
                    autocast = torch.autocast(device, torch.bfloat16) if STORAGE[used] != torch.float32 else nullcontext()
                    with precision(used), autocast:
                        sparsify_(model, masks, example_input=given)
                arms[f"{kind} {used} {layout}"] = step_of(model.train(), given, y, used, device)
    return arms


def measure(
    network: GpuNetwork, model: nn.Module, batch: tuple[Tensor, Tensor], pattern: str, sparsity: float,
    precisions: list[str], device: str, rounds: int,
) -> list[Row]:  # fmt: skip
    x, y = batch
    scored = [(x[:SCORED], y[:SCORED])]
    masks = prune(model, scored, sparsity, network.criterion, pattern=pattern, budget="flops", micro_batch_size=4)
    masked = masked_copy(model, masks)
    few = x[:8], y[:8]
    with precision("float32"):  # TF32 alone would make more of a difference than is allowed
        steps, _ = sparse_steps(masked, masks, few)
        difference = check_steps(dense_steps(masked, few) | steps, masks)
    del steps
    gc.collect()
    times = times_of(arms_of(masked, masks, x, y, precisions, device), device, rounds)
    rows = []
    for name in times:
        kind, used, layout = name.split()
        rivals = [other for other in times if kind_of(other) == kind and used in other.split()]
        dense = min(times[other].median for other in times if kind_of(other) == DENSE and used in other.split())
        rows.append({
            "model": network.name, "input": "x".join(map(str, x.shape)), "pattern": pattern, "sparsity": f"{sparsity:g}",
            "weight_sparsity": f"{masks.sparsity:.5f}", "pass": "training step", "precision": used, "layout": layout, "arm": name,
            **timing_columns(times, name, rivals), "vs dense of this precision": f"{dense / times[name].median:.3f}",
            "gradient_difference": f"{difference:.1e}",
        })  # fmt: skip
    return rows


def describe(rows: list[Row]) -> str:
    first = rows[0]
    ratios = "  ".join(
        f"{row['precision']} {row['layout']} {float(row['median_s']) * 1e3:.4g} ms {float(row['vs dense of this precision']):.2f}x"
        for row in rows if kind_of(row["arm"]) == SPARSE
    )  # fmt: skip
    return f"{first['model']:16} {first['pattern']:16} {float(first['sparsity']):.0%} of multiply-adds removed  {ratios}"


def main(arguments: list[str] | None = None) -> int:
    flags = parser("gpu_steps", __doc__)
    names = [network.name for network in NETWORKS]
    add_device(flags)
    flags.add_argument("--model", nargs="+", choices=names, default=names, help="default: all")
    flags.add_argument("--pattern", nargs="+", choices=tuple(PATTERNS), default=["unstructured", "block(64, 64)"],
                       help="default: %(default)s")
    flags.add_argument("--sparsity", type=share, nargs="+", default=(0.9, 0.95), metavar="S", help="default: %(default)s")
    flags.add_argument("--precision", nargs="+", choices=tuple(STORAGE), default=list(STORAGE), help="default: all")
    flags.add_argument("--rounds", type=int, default=7, help="measured steps of an arm (default: %(default)s)")
    flags.add_argument("--out", type=Path, help="CSV to write (default: gpu-steps.csv in benchmarks/results)")
    options = flags.parse_args(arguments)
    check_device(options)

    settings = settings_of(options)
    results = Results(options.out or RESULTS / "gpu-steps.csv", settings, options.resume)
    networks = [TINY_NETWORK] if options.quick else [network for network in NETWORKS if network.name in options.model]
    cases = [(network, pattern, sparsity) for network in networks for pattern in options.pattern for sparsity in options.sparsity]

    def run_one(case: tuple[GpuNetwork, str, float]) -> None:
        network, pattern, sparsity = case
        if results.has([{"model": network.name, "pattern": pattern, "sparsity": f"{sparsity:g}"}]):
            return
        torch.manual_seed(options.seed)
        model, count, side = network.make().to(options.device), network.batch, network.side
        batch = torch.randn(count, 3, side, side, device=options.device), torch.randint(CLASSES, (count,), device=options.device)
        rows = measure(network, model, batch, pattern, sparsity, options.precision, options.device, options.rounds)
        results.add(rows, KEY)
        tell(describe(rows))
        gc.collect()

    wrong = measure_all(cases, lambda case: f"{case[0].name} {case[1]} {case[2]:.0%}", run_one)
    print("\n".join(table(results.rows)))
    print(f"wrote {results.path}")
    return 1 if wrong else 0


if __name__ == "__main__":
    run(main)
