"""The phases of a run on a GPU, on stand-ins for all they start: none takes another with it; the table is shown in any case."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_needs

SCRIPT = "import os, sys, time\nname, arguments = {name!r}, sys.argv[1:]\n"
STAND_INS = {  # of the modules in benchmarks; what each was called with is in a file "called"
    "gpu_needs": "",
    "gpu_layers": "print('this device: fast')",
    "gpu_steps": "print('a step')",
    "gpu_summary": "print('the table')",
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder to run in: `project(gpu_layers="code", …)` writes modules that do nothing but what they are told, and say so."""
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "__init__.py").write_text("")
    (tmp_path / "tests" / "gpu").mkdir(parents=True)
    (tmp_path / "tests" / "conftest.py").write_text(
        "def pytest_addoption(parser):\n    parser.addoption('--share')\n"
        "def pytest_configure(config):\n    [config.addinivalue_line('markers', mark) for mark in ('gpu', 'large')]\n"
    )

    def write(test: str = "assert True", setup: str = "", **changed: str) -> Path:
        (tmp_path / "setup.py").write_text(setup)
        for name, code in (STAND_INS | changed).items():
            called = "open('called', 'a').write(' '.join((name, *arguments)) + '\\n')\n"
            (tmp_path / "benchmarks" / f"{name}.py").write_text(SCRIPT.format(name=name) + called + code)
        (tmp_path / "tests" / "gpu" / "test_it.py").write_text(f"import pytest\n@pytest.mark.gpu\ndef test_it():\n    {test}\n")
        return tmp_path

    return write


def run(folder: Path, *flags: str) -> int:
    return gpu.main(["--seconds", "60", "--logs", str(folder / "out"), "--results", str(folder / "out"), "--workers", "1", *flags])


def called(folder: Path) -> list[str]:
    return (folder / "called").read_text().splitlines()


def test_every_phase_runs_and_few_files_are_left(project, capfd):
    folder = project()
    assert run(folder, "--layers=--group linear", "--steps=--sparsity 0.9") == 0
    names = [line.split()[0] for line in called(folder)]
    assert names[:2] == ["gpu_needs", "gpu_needs"] and names[-3:] == ["gpu_layers", "gpu_steps", "gpu_summary"]
    assert sorted(names[2:-3]) == ["gpu_layers", "gpu_layers", "gpu_steps"]  # beside the tests
    layers, steps = called(folder)[-3:-1]
    assert f"--out {folder}/out/gpu-layers.csv --budget-seconds" in layers and layers.endswith("--group linear")
    assert steps.endswith("--sparsity 0.9") and all("--warm" in line for line in called(folder)[2:-3])
    assert sorted(path.name for path in (folder / "out").iterdir()) == ["build.log", "layers.log", "steps.log", "tests.log"]
    out = capfd.readouterr().out
    assert "1 passed" in out and "this device: fast" in out and out.rstrip().endswith("the table")


def test_what_fails_is_shown_and_stops_nothing_else(project, capfd):
    folder = project(test="assert 1 == 2", gpu_layers="'--warm' in arguments or sys.exit('layers are broken')")
    assert run(folder, "--no-warm") == 1
    captured = capfd.readouterr()
    assert "FAILED tests/gpu/test_it.py::test_it" in captured.out and "| layers are broken" in captured.out
    assert "failed: tests, layers" in captured.err and called(folder)[-2].startswith("gpu_steps")
    assert captured.out.rstrip().endswith("the table")


def test_what_is_not_built_is_not_tested(project, capfd):
    folder = project(setup="raise SystemExit('no compiler')")
    assert run(folder) == 1
    assert called(folder) == ["gpu_needs", "gpu_summary --results " + str(folder / "out")]
    assert "| no compiler" in (out := capfd.readouterr().out) and out.rstrip().endswith("the table")


def test_kernels_that_do_not_load_are_not_built(project):
    folder = project(gpu_needs="sys.exit('--built' in arguments)")
    assert run(folder) == 1 and [line.split()[0] for line in called(folder)] == ["gpu_needs", "gpu_needs", "gpu_summary"]


def test_what_is_lacking_ends_it_before_anything(project):
    folder = project(gpu_needs="sys.exit(2)")
    assert run(folder) == 2 and called(folder) == ["gpu_needs"]


def test_a_phase_without_end_leaves_time_to_the_others(project, capfd, monkeypatch):
    monkeypatch.setattr(gpu, "TABLE_SECONDS", 1.0)
    monkeypatch.setattr(gpu, "SHARES", {"build": 1, "tests": 1, "layers": 0.5, "steps": 1})
    folder = project(gpu_layers="print('half', flush=True); time.sleep(1000)")
    began = time.monotonic()
    assert run(folder, "--no-warm", "--seconds", "22") == 1
    assert time.monotonic() - began < 26
    out = capfd.readouterr().out
    assert "failed: not done after" in out and "KeyboardInterrupt" in (folder / "out" / "layers.log").read_text()
    assert called(folder)[-2].startswith("gpu_steps") and out.rstrip().endswith("the table")


def test_a_phase_ends_in_order_where_interrupts_are_ignored_from_outside(tmp_path):
    """As under nohup make gpu &."""
    job = gpu.Job([sys.executable, "-c", "import time; time.sleep(1000)"], tmp_path / "log")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert len(gpu.run_jobs([job], 1.0)) == 1
    finally:
        signal.signal(signal.SIGINT, before)
    assert "KeyboardInterrupt" in job.log.read_text()


def test_what_an_earlier_run_left_is_said(project, capfd):
    folder = project()
    (folder / "out").mkdir()
    (old := folder / "out" / "gpu-steps.csv").write_text("")
    os.utime(old, (1, 1))
    run(folder, "--no-warm")
    assert "gpu-steps.csv is of an earlier run" in capfd.readouterr().out


def test_ended_from_outside_it_ends_what_it_started(project):
    folder = project(gpu_layers="open('began', 'w').close(); time.sleep(1000)")
    command = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r}); from benchmarks import gpu; "
        f"from pathlib import Path; gpu.HERE, gpu.GRACE = Path({str(folder)!r}), 1.0; "
        f"flags = ['--logs', 'out', '--results', 'out', '--workers', '1']; "
        f"sys.exit(gpu.main(['--no-warm', *flags]))"
    )
    process = subprocess.Popen([sys.executable, "-c", command], cwd=folder, stdout=-1, stderr=subprocess.DEVNULL, text=True)
    until = time.monotonic() + 60
    while not (folder / "began").exists() and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    out = process.communicate(timeout=30)[0]
    assert process.returncode == 130 and out.rstrip().endswith("the table")


def test_whatever_a_job_has_started_ends_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "GRACE", 1.0)
    log = tmp_path / "log"
    jobs = [gpu.Job(["/bin/sh", "-c", "trap '' INT; (sleep 1000 & echo $!; wait)"], log), gpu.Job(["true"], tmp_path / "other")]
    began = time.monotonic()
    (problem,) = gpu.run_jobs(jobs, 0.5)
    assert problem.startswith("not done after 0 s")
    assert time.monotonic() - began < gpu.GRACE + 5
    child = int(log.read_text())
    time.sleep(0.2)
    state = Path(f"/proc/{child}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_time_that_is_left_goes_to_later_phases(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    clock = gpu.Clock(530.0, began=0.0)
    assert clock.share("build") == gpu.LONGEST_BUILD
    now[0] = 30.0  # soon done
    early = [clock.share("tests")]
    now[0] += early[0]
    early += [clock.share("layers")]
    now[0] += early[1] + gpu.GRACE  # did not end in time
    early += [clock.share("steps")]
    assert early[0] > 165 and early[1] > 120 and early[2] > 100
    assert now[0] + early[2] + gpu.GRACE + gpu.TABLE_SECONDS < 540


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda m: m.setattr(torch.cuda, "is_available", lambda: False), "Expected a CUDA device that torch can see"),
        (lambda m: m.setattr(torch.version, "cuda", None), "Expected a torch built with CUDA"),
        (lambda m: m.setattr(torch.cuda, "get_device_capability", lambda: (7, 5)), "Expected compute capability 8.0 or above"),
        (lambda m: m.setattr(gpu_needs.importlib, "import_module", lambda name: 1 / 0), "Expected triton to be importable"),
        (lambda m: m.setattr(gpu_needs, "PACKAGES", ("torch", "no_such_package")), "Expected these packages too: no_such_package"),
        (lambda m: m.setattr(gpu_needs.Path, "exists", lambda path: False), "Expected nvcc on the PATH or in CUDA_HOME/bin"),
        (lambda m: m.setattr(gpu_needs.Path, "exists", lambda path: path.name == "nvcc"), "Expected the CUDA toolkit's headers in"),
        (lambda m: m.setattr(gpu_needs.Path, "exists", lambda path: path.name != "Python.h"), "Expected Python's headers, got no"),
    ],
    ids=["device", "torch", "capability", "triton", "packages", "nvcc", "headers", "Python's headers"],
)
def test_each_lacking_thing_is_one_line(monkeypatch, capsys, tmp_path, change, says):
    (tmp_path / "bin").mkdir()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "cuda_runtime.h").write_text("")
    for tool in ("nvcc", "c++"):
        (tmp_path / "bin" / tool).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / tool).chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", str(tmp_path / "bin" / "c++"))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a device")
    assert gpu_needs.lacking() == []
    change(monkeypatch)
    assert gpu_needs.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {says}")


def test_kernels_that_were_not_built_are_named(monkeypatch):
    from grasp_sparse import _extension

    status = _extension.ExtensionStatus(True, None, "avx2", (), {}, "the CUDA kernels were not built")
    monkeypatch.setattr(_extension, "_status", status)
    assert gpu_needs.lacking_once_built() == ["Expected compiled CUDA kernels: the CUDA kernels were not built"]
