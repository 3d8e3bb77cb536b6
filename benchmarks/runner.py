"""What every benchmark does: keep the rows it has after each case, go on where it was interrupted, end mistakes in one line."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from tqdm import tqdm

from grasp_sparse.bench.arms import PRECISIONS, WrongResultError
from grasp_sparse.bench.results import Row, machine, now, read_rows, same, write_rows
from grasp_sparse.cuda_timing import device_times
from grasp_sparse.timing import Timing, interleaved
from grasp_sparse.train.errors import UserError

RESULTS = Path(__file__).parent / "results"


class Results:
    """A CSV file that holds the rows of the finished cases at every moment."""

    def __init__(self, path: Path, settings: Row, resume: bool) -> None:
        self.path, self.settings = path, settings
        self.rows: list[Row] = [*read_rows(path)] if resume and path.exists() else []

    def has(self, cases: Iterable[Row]) -> bool:
        """Whether rows with all these columns were measured before, with these settings on this machine."""
        return all(any(same(row, case | self.settings, case.keys() | self.settings.keys()) for row in self.rows) for case in cases)

    def add(self, rows: list[Row], key: Iterable[str]) -> None:
        """Appends rows, with the date, and writes the file; earlier rows that agree with them in the columns `key` go."""
        key = (*key, *self.settings)
        date = {"date": now()}
        rows = [row | self.settings | date for row in rows]
        if rows:
            self.rows = [old for old in self.rows if not same(old, rows[0], key)] + rows
            write_rows(self.path, self.rows)


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Flags that all benchmarks share."""
    shared = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    shared.add_argument("--quick", action="store_true", help="a few cases, about a minute")
    shared.add_argument("--threads", type=int, default=2, help="threads of torch (default: %(default)s)")
    shared.add_argument("--seed", type=int, default=0)
    shared.add_argument(
        "--resume", action="store_true", help="keep the rows of the CSV file and measure only what it lacks (else it is begun anew)"
    )
    return shared


def share(text: str) -> float:
    """A sparsity given as a flag."""
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"Expected a share above 0 and below 1, got {text}")
    return value


def add_precision(to: argparse.ArgumentParser) -> None:
    to.add_argument("--precision", choices=tuple(PRECISIONS), default="float32", help="bfloat16: under autocast (default: %(default)s)")


def add_device(to: argparse.ArgumentParser) -> None:
    to.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu with --quick: that the program runs")


def check_device(options: argparse.Namespace) -> None:
    """Raises UserError where there is no such device."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("Expected a CUDA device, found none; --device cpu --quick shows that the program runs")


def times_of(arms: Mapping[str, Callable[[], object]], device: str, rounds: int) -> dict[str, Timing]:
    """Of calls in turns, on "cuda" or "cpu"."""
    return device_times(arms, rounds) if device == "cuda" else interleaved(dict(arms), rounds)


def settings_of(options: argparse.Namespace) -> Row:
    """Sets the threads; what every row says about where it was measured."""
    torch.set_num_threads(options.threads)
    return machine()


def tell(line: str) -> None:
    """A line on stdout, at once, beside the progress bar."""
    tqdm.write(line)
    sys.stdout.flush()


def measure_all(cases: list, label: Callable[[object], str], measure: Callable[[object], None]) -> int:
    """Measures case after case under a progress bar; returns how many computed something wrong and were left out."""
    wrong = 0
    with tqdm(cases, disable=not sys.stderr.isatty(), leave=False) as bar:
        for case in bar:
            bar.set_description(label(case))
            try:
                measure(case)
            except WrongResultError as error:
                wrong += 1
                tell(f"{label(case)}: not measured: {error}")
    return wrong


def run(main: Callable[[list[str] | None], int]) -> None:
    """Ends the process: 0, 1 when a result was wrong, 2 for bad input, 130 after Ctrl-C (finished cases are in the file)."""
    try:
        sys.exit(main(None))
    except KeyboardInterrupt:
        print("\ninterrupted; finished cases are in the CSV file, go on with --resume", file=sys.stderr)
        sys.exit(130)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
