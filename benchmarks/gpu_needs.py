"""What `make gpu` needs on a machine, looked for before anything is built; each lacking thing is one line.

    python -m benchmarks.gpu_needs              before building: a CUDA device, nvcc, packages
    python -m benchmarks.gpu_needs --built      after it: compiled kernels that load
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

PACKAGES = ("numpy", "safetensors", "tqdm", "matplotlib", "jinja2", "setuptools", "ninja", "torchvision", "pytest", "hypothesis")


def lacking() -> list[str]:
    """What is missing to build, test and measure."""
    return [*_device(), *_compiler(), *_triton(), *_packages()]


def lacking_once_built() -> list[str]:
    """What is missing in the package that was built."""
    try:
        from grasp_sparse import _extension
    except ImportError as error:
        return [f"Expected grasp_sparse to be importable, got {error}"]
    status = _extension.status()
    problems = [] if status.loaded else [f"Expected compiled CPU kernels: {status.reason}"]
    return problems + ([f"Expected compiled CUDA kernels: {status.cuda_reason}"] if status.cuda_reason else [])


def _device() -> list[str]:
    try:
        import torch
    except ImportError as error:
        return [f"Expected torch in {sys.executable}, got {error}; name the interpreter that has it: GPU_PYTHON=..."]
    if torch.version.cuda is None:
        return [f"Expected a torch built with CUDA, got {torch.__version__}; install one or name another Python: GPU_PYTHON=..."]
    if not torch.cuda.is_available():
        return ["Expected a CUDA device that torch can see, got none; nvidia-smi says whether the driver sees one"]
    if (found := torch.cuda.get_device_capability()) < (8, 0):
        return [f"Expected compute capability 8.0 or above, got {found[0]}.{found[1]} ({torch.cuda.get_device_name()})"]
    return []


def _compiler() -> list[str]:
    """As setup.py looks for it."""
    nvcc = shutil.which("nvcc")
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda")
    found = [Path(home) for home in homes if home and Path(home, "bin", "nvcc").exists()]
    if not found:
        return ["Expected nvcc on the PATH or in CUDA_HOME/bin, got neither; install the CUDA toolkit or set CUDA_HOME"]
    home = next((home for home in found if Path(home, "include", "cuda_runtime.h").exists()), None)
    if home is None:
        return [f"Expected the CUDA toolkit's headers in {found[0]}/include, got no cuda_runtime.h; install them or set CUDA_HOME"]
    try:
        subprocess.run([home / "bin" / "nvcc", "--version"], check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return [f"Expected {home}/bin/nvcc to run, got {error}"]
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        return ["Expected a C++ compiler; install g++ or set CXX"]
    headers = sysconfig.get_path("include")
    if not Path(headers, "Python.h").exists():  # Triton compiles its launchers with it
        return [f"Expected Python's headers, got no {headers}/Python.h; install python3-dev or name a Python that has them: GPU_PYTHON=..."]
    return []


def _triton() -> list[str]:
    try:
        importlib.import_module("triton")
    except Exception as error:
        return [f"Expected triton to be importable, got {type(error).__name__}: {error}; kernels of whole blocks are written in it"]
    return []


def _packages() -> list[str]:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    return [f"Expected these packages too: {' '.join(missing)}; pip install {' '.join(missing)}"] if missing else []


def main(arguments: list[str] | None = None) -> int:
    flags = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_needs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flags.add_argument("--built", action="store_true", help="look at what was built")
    problems = (lacking_once_built if flags.parse_args(arguments).built else lacking)()
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
