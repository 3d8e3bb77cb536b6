"""A speed asked for and the speed got: ``gs.prune(..., budget="time", speedup=4)`` for the networks of benchmarks.models.

    python -m benchmarks.speedups --quick                    two networks on small batches
    python -m benchmarks.speedups --data-dir cifar10         all networks, 2, 4 and 8 times as fast
    python -m benchmarks.speedups --model vgg19 --speedup 3

GraSP's masks on real images as benchmarks.models has them; a network of images is in channels_last. The search measures steps itself;
the masks that it returns are then measured anew, as in benchmarks.models: against the same network dense in its faster memory format
(of linear layers alone also through oneDNN, which the search, as a program that changes nothing else, has not), after all gradients were
found equal. Where the search says that a speed cannot be had, the row holds the most that can, and no times.
Writes benchmarks/results/speedups.csv after every case.
"""

from __future__ import annotations

import argparse
import gc
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.models import measure_network
from benchmarks.networks import Images, Network, add_networks, chosen
from benchmarks.runner import RESULTS, Results, measure_all, parser, run, settings_of, tell
from grasp_sparse.bench.arms import speed_got
from grasp_sparse.bench.denormals import flush_denormals
from grasp_sparse.bench.results import SPARSE, Row, kind_of
from grasp_sparse.bench.steps import Batch
from grasp_sparse.masks import MaskSet
from grasp_sparse.pruning import prune
from grasp_sparse.speedup import UnreachableSpeedupError

SPEEDUPS = (2.0, 4.0, 8.0)
KEY = ("model", "input", "data", "asked", "precision")


def masks_for(network: Network, images: Images, x: Tensor, speedup: float, seed: int) -> MaskSet:
    """Those under which a step on the batch `x` is that fast. Raises UnreachableSpeedupError."""
    model = network.model(seed)
    if x.dim() == 4:
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    return prune(
        model, [images.scoring(network, seed)], budget="time", speedup=speedup, example_input=x, seed=seed,
        micro_batch_size=network.micro_batch,
    )  # fmt: skip


def measure(network: Network, images: Images, batch: Batch, case: Row, seconds: float, seed: int) -> list[Row]:
    """A row an arm; or one without times, with the most that can be reached."""
    try:
        masks = masks_for(network, images, batch[0], float(case["asked"]), seed)
    except UnreachableSpeedupError as error:
        return [case | {"precision": "float32", "most": f"{error.most:g}"}]
    recipe: Mapping[str, Any] = masks.recipe
    found = {
        "budget": "time", "tries": len(recipe["tries"]), "speed in the search": f"{recipe['dense_step_s'] / recipe['sparse_step_s']:.3f}"
    }  # fmt: skip
    return measure_network(network, batch, masks, case | found, seconds, seed).rows


def describe(rows: list[Row]) -> str:
    asked = f"{rows[0]['model']:9} {float(rows[0]['asked']):g} times as fast: "
    if "arm" not in rows[0]:
        return f"{asked}cannot be had, at most {rows[0]['most']}"
    sparse = next(row for row in rows if row["best"] and kind_of(row["arm"]) == SPARSE)
    speeds = float(sparse["speed in the search"]), speed_got(sparse)
    return (
        f"{asked}{speeds[0]:.2f} after {sparse['tries']} tries, measured anew {speeds[1]:.2f} "
        f"({float(sparse['weight_sparsity']):.1%} of the weights removed, {float(sparse['flop_sparsity']):.1%} of the multiply-adds)"
    )


def factor(text: str) -> float:
    """A speed given as a flag."""
    value = float(text)
    if not 1 < value < math.inf:
        raise argparse.ArgumentTypeError(f"Expected a factor above 1, got {text}")
    return value


def main(arguments: list[str] | None = None) -> int:
    flags = parser("speedups", __doc__)
    add_networks(flags)
    flags.add_argument("--speedup", nargs="+", type=factor, metavar="X", help="default: 2 4 8, with --quick 2")
    flags.add_argument("--seconds-per-case", type=float, default=12.0, metavar="S",
                       help="how long to measure anew; at least 5 rounds all the same (default: %(default)s)")
    flags.add_argument("--out", type=Path, help="CSV to write (default: speedups.csv in benchmarks/results)")
    options = flags.parse_args(arguments)

    settings = {"denormals": flush_denormals()} | settings_of(options)
    results = Results(options.out or RESULTS / ("speedups-quick.csv" if options.quick else "speedups.csv"), settings, options.resume)
    networks, images = chosen(options)
    wanted = options.speedup or (SPEEDUPS[:1] if options.quick else SPEEDUPS)

    def run_one(item: tuple[Network, float]) -> None:
        network, speedup = item
        batch = images.batch(network, options.seed)
        case = {"model": network.name, "input": "x".join(map(str, batch[0].shape)), "data": images.name, "asked": f"{speedup:g}"}
        if results.has([case]):
            return
        rows = measure(network, images, batch, case, options.seconds_per_case, options.seed)
        results.add(rows, KEY)
        tell(describe(rows))
        gc.collect()

    items = [(network, speedup) for network in networks for speedup in wanted]
    wrong = measure_all(items, lambda item: f"{item[0].name} {item[1]:g}x", run_one)
    print(f"wrote {results.path}")
    return 1 if wrong else 0


if __name__ == "__main__":
    run(main)
