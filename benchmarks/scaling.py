"""How the time of a sparse layer grows with its kept weights, and how it shrinks with a second thread.

    python -m benchmarks.scaling            some minutes
    python -m benchmarks.scaling --quick    fewer rounds, two shapes with two threads

Forward and backward, after unmeasured calls as in benchmarks.layers.

Weights: one layer at several densities, in turns; the line t = a + b * nnz by least squares. b is what a kept weight costs, a
what a call costs without any; R2 and the largest distance of a median from the line say how straight it is.
Threads: the same layer at 95 % sparsity with one thread and with two, in turns in one process; the ratio of the medians, and that of
the fastest calls, for what others do on a shared machine only ever adds.
Beside it, in the same turns, that of torch's product of two dense matrices and that of a copy of memory larger than caches: what
two threads of this machine were worth then where arithmetic bounds, and where memory does. On a shared machine they may be one core
for a while: with several threads only those rounds count, here and above, in which they made the dense product nearly as many times
as fast as one; the others are rounds_left_out.

Prints both and writes scaling.csv, one row a median with where and with what it was measured, and scaling.png, into
benchmarks/results. Nothing is measured unless sparse and dense agree on the results.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from tqdm import tqdm

from benchmarks.layers import LEAD_IN, make_arms
from benchmarks.runner import RESULTS
from benchmarks.shapes import QUICK, ConvShape, LinearShape, Shape, conv3x3, linear
from grasp_sparse.bench.arms import Arm
from grasp_sparse.bench.plots import write_plots
from grasp_sparse.bench.results import SPARSE, kind_of, machine, now, write_rows
from grasp_sparse.timing import Timing, interleaved

FITTED = (ConvShape(128, 128, 16, 128), LinearShape(4096, 1024, 512))
DENSITIES = (0.1, 0.05, 0.02, 0.01, 0.005)
THREADED = (*conv3x3(), *linear([512]))
THREADS_DENSITY = 0.05
_CORES = 0.9  # of the threads' number: a dense product this many times as fast shows that each had a core
COLUMNS = (
    "measured", "shape", "density", "nnz", "pass", "precision", "layout", "threads_used", "median_s", "q1_s", "q3_s", "best_s", "rounds",
    "rounds_left_out",
    "fit_s", "fit_a_s", "fit_b_s", "fit_r2", "fit_largest_deviation",
    "times_as_fast_as_one_thread", "fastest_times_as_fast", "dense_product_times_as_fast", "copy_times_as_fast",
)  # fmt: skip


@dataclass(frozen=True)
class Line:
    """seconds = a + b * nnz; r2 of the fit and the largest |measured / fitted - 1|."""

    a: float
    b: float
    r2: float
    largest_deviation: float

    def __call__(self, nnz: float) -> float:
        return self.a + self.b * nnz

    def __str__(self) -> str:
        cost = f"{self.a * 1e3:.3f} ms + {self.b * 1e9:.3f} ns per kept weight"
        return f"{cost}, R2 {self.r2:.4f}, largest deviation {self.largest_deviation:.1%}"


def fit_line(nnz: list[int], seconds: list[float]) -> Line:
    """Least squares through at least two different counts."""
    if len(set(nnz)) < 2:
        raise ValueError(f"Expected at least two different numbers of weights to fit a line, got {nnz}; give more densities.")
    x, t = numpy.array(nnz, float), numpy.array(seconds)
    b, a = numpy.polyfit(x, t, 1)
    fitted = a + b * x
    spread = float(((t - t.mean()) ** 2).sum())
    r2 = 1 - float(((t - fitted) ** 2).sum()) / spread if spread else 0.0
    return Line(float(a), float(b), r2, float(numpy.abs(t / fitted - 1).max()))


def sparse_arm(shape: Shape, density: float, seed: int) -> Arm:
    """The sparse layer of `shape` (a convolution: in NCHW), once it agrees with the dense ones."""
    arms, _ = make_arms(shape, [1 - density], "float32", seed)
    return next(arm for name, arm in arms.items() if kind_of(name) == SPARSE)


def measure_nnz(shape: Shape, densities: list[float], rounds: int, seed: int) -> tuple[list[dict], Line]:
    arms = {f"{density:g}": sparse_arm(shape, density, seed) for density in densities}
    threads = torch.get_num_threads()
    times, left_out = in_turns({name: (threads, arm) for name, arm in arms.items()}, threads, rounds, seed)
    nnz = {name: arm.layer.nnz for name, arm in arms.items()}
    line = fit_line(list(nnz.values()), [times[name].median for name in arms])
    rows = [
        {
            **_row("weights", shape, float(name), nnz[name], threads, times[name], left_out),
            "fit_s": f"{line(nnz[name]):.6f}",
            "fit_a_s": f"{line.a:.6f}",
            "fit_b_s": f"{line.b:.4e}",
            "fit_r2": f"{line.r2:.5f}",
            "fit_largest_deviation": f"{line.largest_deviation:.4f}",
        }
        for name in arms
    ]
    return rows, line


def measure_threads(shape: Shape, density: float, rounds: int, seed: int) -> list[dict]:
    arm = sparse_arm(shape, density, seed)
    times, left_out = in_turns({"1": (1, arm), "2": (2, arm)}, 2, rounds, seed)
    return [
        {
            **_row("threads", shape, density, arm.layer.nnz, int(name), times[name], left_out),
            "times_as_fast_as_one_thread": f"{times['1'].median / times[name].median:.4g}",
            "fastest_times_as_fast": f"{times['1'].best / times[name].best:.4g}",
            "dense_product_times_as_fast": f"{times['1 dense'].median / times[f'{name} dense'].median:.4g}",
            "copy_times_as_fast": f"{times['1 copy'].median / times[f'{name} copy'].median:.4g}",
        }
        for name in ("1", "2")
    ]


def in_turns(
    arms: dict[str, tuple[int, Callable[[], object]]], threads: int, rounds: int, seed: int
) -> tuple[dict[str, Timing], int]:
    """Times of the arms, each with so many threads, and beside them "1 dense" and "`threads` dense", a dense product, and "… copy".

    Where `threads` are several, rounds go on, up to four times as many, until there are `rounds` in which each thread had a
    core, and only these count; how many were left out is the second result. Of fewer than two, all count. Leaves torch with
    the threads it had.
    """
    before, others = torch.get_num_threads(), {"dense": _dense_product(seed), "copy": _copy()}
    arms = arms | {f"{count} {name}": (count, run) for name, run in others.items() for count in {1, threads}}
    taken: dict[str, list[float]] = {}

    def enough(seconds: dict[str, list[float]]) -> bool:
        taken.update(seconds)  # the lists, which grow
        return len(_with_cores(taken, threads)) >= rounds

    try:
        running = {name: _with_threads(count, run) for name, (count, run) in arms.items()}
        times = interleaved(running, rounds * (4 if threads > 1 else 1), lead_in=LEAD_IN, enough=enough)
    finally:
        torch.set_num_threads(before)
    counted = _with_cores(taken, threads) if taken else []
    if len(counted) < 2:
        return times, 0
    count = next(iter(times.values())).count
    return {name: Timing.of([seconds[i] for i in counted]) for name, seconds in taken.items()}, count - len(counted)


def _with_cores(seconds: dict[str, list[float]], threads: int) -> list[int]:
    """The rounds in which every thread had a core of its own, by the dense product."""
    one, all_threads = seconds["1 dense"], seconds[f"{threads} dense"]
    return [i for i, (slow, fast) in enumerate(zip(one, all_threads, strict=True)) if slow >= _CORES * threads * fast or threads == 1]


def _dense_product(seed: int) -> Callable[[], object]:
    """Bound by arithmetic, not by memory."""
    left, right = torch.randn(2, 1024, 1024, generator=torch.Generator().manual_seed(seed))
    return lambda: left @ right


def _copy() -> Callable[[], object]:
    """Bound by memory: 64 MB into 64 MB."""
    source = torch.ones(1 << 24)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _with_threads(count: int, run: Callable[[], object]) -> Callable[[], object]:
    def with_threads() -> None:
        torch.set_num_threads(count)
        run()

    return with_threads


def _row(measured: str, shape: Shape, density: float, nnz: int, threads: int, time: Timing, left_out: int) -> dict:
    return {
        "measured": measured,
        "shape": str(shape),
        "density": density,
        "nnz": nnz,
        "pass": "forward+backward",
        "precision": "float32",
        "layout": "nchw" if isinstance(shape, ConvShape) else "rows",
        "threads_used": threads,
        "median_s": f"{time.median:.6f}",
        "q1_s": f"{time.q1:.6f}",
        "q3_s": f"{time.q3:.6f}",
        "best_s": f"{time.best:.6f}",
        "rounds": time.count,
        "rounds_left_out": left_out,
    }


def main(
    arguments: list[str] | None = None,
    fitted: tuple[Shape, ...] = FITTED,
    threaded: tuple[Shape, ...] = THREADED,
) -> None:
    """The shapes are arguments for tests, which have no minutes."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="7 rounds, and two shapes with two threads")
    parser.add_argument("--threads", type=int, default=2, help="threads while weights are varied (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="measured rounds; each runs every arm once (default: 25)")
    parser.add_argument("--density", type=float, nargs="+", default=DENSITIES, metavar="D", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "scaling.csv", help="CSV to write, the plot beside it")
    options = parser.parse_args(arguments)
    rounds = options.rounds or (7 if options.quick else 25)
    torch.set_num_threads(options.threads)
    quick = [shape for shapes in QUICK.values() for shape in shapes]
    shapes = [shape for shape in threaded if not options.quick or shape in quick]
    rows = []
    with tqdm(total=len(fitted) + len(shapes), disable=not sys.stderr.isatty(), leave=False) as bar:
        for shape in fitted:
            measured, line = measure_nnz(shape, options.density, rounds, options.seed)
            bar.write(f"{shape}: {line}")
            bar.update()
            rows += measured
        for shape in shapes:
            measured = measure_threads(shape, THREADS_DENSITY, rounds, options.seed)
            ratio, fastest, dense, copy = (measured[-1][column] for column in COLUMNS[-4:])
            bar.write(
                f"{shape} at {1 - THREADS_DENSITY:.0%}: two threads are {ratio}x as fast as one, {fastest}x in the fastest calls, "
                f"{dense}x in a dense product, {copy}x in a copy"
            )
            bar.update()
            rows += measured
    where = machine() | {"date": now()}
    write_rows(options.out, [{column: row.get(column, "") for column in COLUMNS} | where for row in rows])
    (plot,) = write_plots(options.out)
    print(f"wrote {options.out} and {plot.name}")


if __name__ == "__main__":
    main()
