"""Builds the CUDA kernels for the CPU: the same sources, run by the emulator of emulate.h, as ``torch.ops.grasp_sparse_emulated``.

The library lies in the folder for temporary files under a name that says what it was built from, so it is built once.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

from grasp_sparse import _extension
from grasp_sparse.ops.schema import NORM_SCHEMAS, POOL_SCHEMAS, SCHEMAS, UPDATE_SCHEMAS

HERE = Path(__file__).parent
KERNELS = HERE.parents[2] / "csrc" / "cuda"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))
# By size, so that the slowest to compile start first.
TYPES = ("double", "Fp16", "Bf16", "float")
# In a process with sanitizers (make sanitize) the kernels have them too: what they read and write out of bounds is seen.
SANITIZED = _extension.status().built.get("compiler", "").endswith("sanitized")
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if SANITIZED else []
FLAGS = [
    *("-std=c++17", "-O1", "-g0", "-fPIC", "-Wall", "-Werror=return-type", "-Wno-unknown-pragmas"),
    "-fno-strict-aliasing",  # two numbers of 16 bits are read as one word
    "-fvisibility=hidden",  # the compiled package may be in the process too, with the same names for the same templates
    "-DGRASP_SPARSE_EMULATED",
    "-DTORCH_TARGET_VERSION=0x020b000000000000",
    *(f"-I{path}" for path in (HERE, KERNELS, *include_paths())),
    *SANITIZERS,
]


@functools.cache
def library() -> ctypes.CDLL:
    """Registers ``torch.ops.grasp_sparse_emulated.*`` for CPU tensors. RuntimeError with the compiler's words if it fails."""
    sources = sorted((*HERE.glob("*.cpp"), *HERE.glob("*.h"), *KERNELS.glob("*.*"), *(KERNELS.parent / "cpu").glob("*.h")))
    digest = hashlib.sha256(repr((torch.__version__, COMPILER, FLAGS)).encode())
    for source in sources:
        digest.update(source.read_bytes())
    path = Path(tempfile.gettempdir()) / f"grasp_sparse_emulated_{os.getuid()}" / f"{digest.hexdigest()[:24]}.so"
    if not path.exists():
        _build(path)
    _define_operations()
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


def _build(path: Path) -> None:
    path.parent.mkdir(exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory() as folder:
        units = [(HERE / "emulated.cpp", f"{name}.o", [f"-DEMULATED_TYPE={name}"]) for name in TYPES]
        sources = *KERNELS.glob("*.cpp"), HERE / "device.cpp", *HERE.glob("emulated_*.cpp")
        units += [(source, f"{source.stem}.o", []) for source in sources if source.name != "info.cpp"]

        def compile_unit(unit):
            source, name, flags = unit
            target = Path(folder) / name
            _run([COMPILER, *FLAGS, *flags, "-c", str(source), "-o", str(target)])
            return str(target)

        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            objects = list(pool.map(compile_unit, units))
        libraries = [f"-L{folder}" for folder in library_paths()] + ["-lc10", "-ltorch_cpu"]
        _run([COMPILER, "-shared", *SANITIZERS, *objects, *libraries, "-o", f"{folder}/library.so"])
        os.replace(shutil.copy(f"{folder}/library.so", f"{path}.{os.getpid()}"), path)  # whole or not at all, for parallel runs


def _run(command: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # sanitizers are not for the compiler
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[-4:])}: {done.stderr[-4000:]}")


_library = None


def _define_operations() -> None:
    global _library
    _library = torch.library.Library("grasp_sparse_emulated", "DEF")
    for name, schema in (SCHEMAS | NORM_SCHEMAS | POOL_SCHEMAS | UPDATE_SCHEMAS).items():
        _library.define(name + schema)
