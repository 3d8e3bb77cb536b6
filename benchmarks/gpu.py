"""Everything on a machine with a GPU, within a limit of time: build, tests, layers, whole steps, one table at the end.

    make gpu                                             in less than nine minutes
    make gpu GPU_RESULTS=folder GPU_LOGS=folder          where the CSV files and the logs of the phases go
    python -m benchmarks.gpu --seconds 1700              with more time

Every phase is a process of its own with a share of the time, and what one leaves the later ones have. One that fails or does not
end in time costs no other (but what is not built is not tested), its last lines are shown, and the exit status is 1. Tests run in
several processes; while they do, others compile the kernels of whole blocks that the benchmarks need, whose results stay on the
disk. What was measured is in the CSV files at every moment, and the table shows it in any case. When the command itself is ended
(SIGTERM, Ctrl-C), it ends its processes, and shows the table.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

# Nothing of torch or of the package here: what is built must not be in use, and the device's memory belongs to the phases.
HERE = Path(__file__).parents[1]
RESULTS = HERE / "benchmarks" / "results"
SECONDS = 530.0  # of all
SHARES = {"build": 130, "tests": 150, "layers": 110, "steps": 135}
LONGEST_BUILD = 240.0  # without one there is nothing: it may take of the others' time
TABLE_SECONDS = 8.0
BETWEEN = 18.0  # a benchmark is told to end so much earlier than it is ended: torch takes long to start, and so may the last case
GRACE = 10.0  # for a process to end and write what it has, after it was asked to
TAIL = 25  # lines of a log
NO_TESTS = 5  # pytest's exit status where none was chosen
COMPILING = ("block", "plan", "training")  # names of tests that compile kernels on the device
TELLING = ("this device:", "no time left", "not measured", "peer not available", "layers: ", "the device answers no more")


@dataclass
class Job:
    """A process: what runs, where its output goes, variables of its environment, exit statuses that are none of failure."""

    command: Sequence[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    fine: tuple[int, ...] = (0,)


def run_jobs(jobs: Sequence[Job], seconds: float, helpers: Sequence[Job] = ()) -> list[str]:
    """Runs the jobs at the same time, for `seconds` at most, `helpers` beside them for as long. Returns what went wrong of jobs.

    One that does not end in time is interrupted (SIGINT), which pytest and the benchmarks end on in order; then killed, with
    whatever it has started.
    """
    began = time.monotonic()
    running: list[tuple[Job, subprocess.Popen]] = []
    problems: list[str] = []
    try:
        for job in (*jobs, *helpers):
            with job.log.open("ab") as log:
                running.append((job, subprocess.Popen(
                    job.command, cwd=HERE, env={**os.environ, "PYTHONUNBUFFERED": "1", **job.environment}, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=_heed_interrupts,
                )))  # fmt: skip
        for job, process in running[: len(jobs)]:
            try:
                status = process.wait(max(0.0, began + seconds - time.monotonic()))
            except subprocess.TimeoutExpired:
                problems.append(f"not done after {seconds:.0f} s: {shlex.join(job.command)}")
            else:
                if status not in job.fine:
                    problems.append(f"exit status {status}: {shlex.join(job.command)}")
    finally:
        _end([process for _, process in running])
    return problems


def _heed_interrupts() -> None:
    """In a new process, which ignores SIGINT where this one does (nohup make gpu &)."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """All of them, and those that they have started; at once where there is nothing left to end."""
    for process in processes:
        if process.poll() is None:
            _signal(process, signal.SIGINT)
    until = time.monotonic() + GRACE
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            pass
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen, number: int) -> None:
    try:
        os.killpg(process.pid, number)  # its session: compilers, workers
    except ProcessLookupError:
        pass


@dataclass
class Clock:
    """Shares of the time that is left among the phases that are left."""

    seconds: float
    began: float = field(default_factory=time.monotonic)
    phases: dict[str, float] = field(default_factory=lambda: dict(SHARES))

    def left(self) -> float:
        return self.seconds - TABLE_SECONDS - (time.monotonic() - self.began)

    def share(self, phase: str) -> float:
        """For `phase`, which is the next; it is not counted any more."""
        weights = sum(self.phases.values())
        share = max(0.0, self.left()) * self.phases.pop(phase) / weights - GRACE / 2
        return max(share, min(LONGEST_BUILD, 0.7 * self.left())) if phase == "build" else max(share, 1.0)


class Run:
    """The phases, in their order; `problems` says which of them failed."""

    def __init__(self, options: argparse.Namespace, began: float) -> None:
        self.options, self.clock, self.problems = options, Clock(options.seconds, began), {}
        self.options.logs.mkdir(parents=True, exist_ok=True)
        self.options.results.mkdir(parents=True, exist_ok=True)

    def log(self, phase: str) -> Path:
        path = self.options.logs / f"{phase}.log"
        path.write_bytes(b"")
        return path

    def phase(self, name: str, title: str, jobs: Callable[[float, Path], tuple[list[Job], list[Job]]]) -> bool:
        """Runs it; whether all went well."""
        seconds, log = self.clock.share(name), self.log(name)
        print(f"{title} (at most {seconds:.0f} s)", flush=True)
        began = time.monotonic()
        main, helpers = jobs(seconds, log)
        problems = run_jobs(main, seconds, helpers)
        _gather(log, [job.log for job in main], [job.log for job in helpers])
        lines = log.read_text(errors="replace").splitlines()
        print(*(f"  {line}" for line in _told(lines, name)), f"  {time.monotonic() - began:.0f} s", sep="\n", flush=True)
        if problems:
            self.problems[name] = problems
            shown = [*(f"failed: {problem}" for problem in problems), *(f"| {line}" for line in _tail(lines))]
            print(*(f"  {line}" for line in shown), sep="\n", flush=True)
        return not problems

    def build(self) -> bool:
        environment = {"PYTHONWARNINGS": "ignore", "FORCE_CUDA": "1", "GRASP_SPARSE_REQUIRE_EXT": "1"}
        if "TORCH_CUDA_ARCH_LIST" not in os.environ and (found := _capability()):
            environment["TORCH_CUDA_ARCH_LIST"] = found  # for this device alone: half the time
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        check = [sys.executable, "-m", "benchmarks.gpu_needs", "--built"]
        both = ["/bin/sh", "-c", f"{shlex.join(command)} && {shlex.join(check)}"]
        return self.phase("build", "building the kernels", lambda seconds, log: ([Job(both, log, environment)], []))

    def tests(self) -> bool:
        options, count = self.options, self.options.workers
        environment = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        reports = ["-vv", "--tb=short", "-rfE", "-o", "faulthandler_timeout=100"]  # the project's own -q takes one v away
        pytest = [sys.executable, "-m", "pytest", *test_files(), "-p", "no:cacheprovider", *reports]
        chosen = shlex.split(options.pytest_args)

        def jobs(seconds: float, log: Path) -> tuple[list[Job], list[Job]]:
            commands = [[*pytest, "-m", "gpu and not large", "--share", f"{i}/{count}", *chosen] for i in range(1, count + 1)]
            commands.append([*pytest, "-m", "gpu and large", *chosen])  # one after the other: they fill the memory
            tests = [Job(command, log.with_suffix(f".{i}"), environment, (0, NO_TESTS)) for i, command in enumerate(commands)]
            warm = [
                Job(
                    [*self.benchmark(name, seconds, flags), "--warm", f"{i}/{parts}"],
                    log.with_suffix(f".warm-{name}-{i}"),
                    environment,
                )
                for name, flags, parts in (("layers", options.layers, 2), ("steps", options.steps, 1)) for i in range(1, parts + 1)
            ]  # fmt: skip
            return tests, warm if options.warm else []

        return self.phase("tests", f"the tests that need a device, in {count + 1} processes", jobs)

    def benchmark(self, name: str, seconds: float, flags: str) -> list[str]:
        out = self.options.results / f"gpu-{name}.csv"
        budget = ["--budget-seconds", f"{max(1.0, seconds - BETWEEN):.0f}"]
        return [sys.executable, "-m", f"benchmarks.gpu_{name}", "--out", str(out), *budget, *shlex.split(flags)]

    def measure(self, name: str, title: str, flags: str) -> bool:
        return self.phase(name, title, lambda seconds, log: ([Job(self.benchmark(name, seconds, flags), log)], []))


def test_files() -> list[str]:
    """Those of tests/gpu: first what needs nothing compiled on the device, so that it is tested however long the rest takes, and
    whatever that does to the device."""
    files = (path.relative_to(HERE).as_posix() for path in (HERE / "tests" / "gpu").glob("test_*.py"))
    return sorted(files, key=lambda name: (any(part in name for part in COMPILING), name))


def _capability() -> str | None:
    """ "9.0", asked in another process: this one must not take the device's memory."""
    asked = [sys.executable, "-c", "import torch; print('%d.%d' % torch.cuda.get_device_capability())"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else None


def _gather(log: Path, *groups: Sequence[Path]) -> None:
    """One file of all, in which those of the second group come first: the end of a log is what is looked at."""
    parts = [path for group in reversed(groups) for path in group if path != log]
    with log.open("ab") as whole:
        for path in parts:
            whole.write(f"=== {path.suffix[1:]}\n".encode() + path.read_bytes())
            path.unlink()


def _told(lines: Sequence[str], phase: str) -> list[str]:
    """What is worth a look also where all is well."""
    if phase != "tests":
        return [line for line in lines if any(part in line for part in TELLING)][:TAIL]
    counts: dict[str, int] = {}
    for line in lines:
        if re.search(r" in \d[\d.]*s", line):  # pytest's last one
            for count, what in re.findall(r"(\d+) (passed|failed|skipped|errors?)", line):
                counts[what.rstrip("s")] = counts.get(what.rstrip("s"), 0) + int(count)
    return [", ".join(f"{count} {what}" for what, count in counts.items()) or "no test ended"]


def _tail(lines: Sequence[str]) -> list[str]:
    """What failed, by name, or else the last lines."""
    return [line for line in lines if line.startswith(("FAILED ", "ERROR ", "error: "))][: 2 * TAIL] or list(lines[-TAIL:])


@contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """Inside, SIGTERM raises KeyboardInterrupt."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(arguments: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--seconds", type=float, default=SECONDS, help="of everything (default: %(default)s)")
    flags.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help="of the CSV files (default: %(default)s)")
    flags.add_argument("--logs", type=Path, default=HERE / "build" / "gpu-logs", metavar="FOLDER", help="default: %(default)s")
    flags.add_argument("--layers", default="", metavar="FLAGS", help="of benchmarks.gpu_layers")
    flags.add_argument("--steps", default="", metavar="FLAGS", help="of benchmarks.gpu_steps")
    flags.add_argument("--pytest-args", default="", metavar="FLAGS", help="of pytest")
    workers = max(1, min(10, (os.cpu_count() or 2) - 5))
    flags.add_argument("--workers", type=int, default=workers, help="of tests (default: %(default)s)")
    flags.add_argument("--no-warm", dest="warm", action="store_false", help="compile no kernels while the tests run")
    options = flags.parse_args(arguments)
    clock_began = time.monotonic()  # what follows asks torch for its device, which counts as well
    options.results, options.logs = options.results.absolute(), options.logs.absolute()
    began = time.time()
    if subprocess.run([sys.executable, "-m", "benchmarks.gpu_needs"], cwd=HERE, check=False).returncode:
        return 2
    with _terminated_like_interrupted():
        made = Run(options, clock_began)
        interrupted = False
        try:
            if made.build():
                made.tests()
                made.measure("layers", "single layers", options.layers)
                made.measure("steps", "whole training steps", options.steps)
        except KeyboardInterrupt:
            interrupted = True
            print("interrupted", file=sys.stderr)
    print(f"results in {options.results}, logs in {options.logs}", flush=True)
    for path in sorted(options.results.glob("gpu-*.csv")):
        if path.stat().st_mtime < began:
            print(f"{path.name} is of an earlier run", flush=True)
    subprocess.run([sys.executable, "-m", "benchmarks.gpu_summary", "--results", str(options.results)], cwd=HERE, check=False)
    if made.problems:
        print(f"failed: {', '.join(made.problems)}", file=sys.stderr)
    return 130 if interrupted else 1 if made.problems else 0


if __name__ == "__main__":
    sys.exit(main())
