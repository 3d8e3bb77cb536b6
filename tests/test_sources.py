"""The C++ sources are what the oldest torch that is allowed compiles them as."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch.utils.cpp_extension

ROOT = Path(__file__).parents[1]
COMPILER = shutil.which(os.environ.get("CXX") or "c++")
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
# Not the kernels of the CPU, which setup.py itself compiles, as C++17 always.
SOURCES = [path for path in sorted((ROOT / "csrc").rglob("*.cpp")) if path.name != "kernels.cpp"]


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_sources_are_cpp_17(source: Path) -> None:
    """Newer versions of torch compile extensions as C++20, so that nothing else here would say what the older ones do."""
    target = re.search(r'TORCH_TARGET_VERSION = "(\w+)"', (ROOT / "setup.py").read_text())[1]
    defined = [f"TORCH_TARGET_VERSION={target}", "USE_CUDA", 'GRASP_SPARSE_CUDA_TARGETS="none"', *["GRASP_SPARSE_X86"] * IS_X86]
    includes = [ROOT / "csrc", sysconfig.get_path("include"), *torch.utils.cpp_extension.include_paths()]
    flags = ["-std=c++17", "-fsyntax-only", "-w", *(f"-D{name}" for name in defined), *(f"-I{path}" for path in includes)]
    done = subprocess.run([COMPILER, *flags, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
