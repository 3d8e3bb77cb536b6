"""The CUDA kernels compile with setup.py for the architectures it names, spill nothing, and load where there is no GPU."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
ARCHITECTURES = ("sm_80", "sm_90")
REGISTERS = 65536  # of a multiprocessor
SECONDS = 180  # of one core
KERNELS = (
    "product", "sampled", "fill_groups", "count_groups", "rank_rows", "find_bounds", "find_places", "sgd_update", "adamw_update",
    "norm_moments", "norm_apply", "norm_gradient_sums", "norm_input_gradient", "norm_follow", "max_pool_windows", "max_pool_gradients",
)  # fmt: skip

# setup.py as it is, but for the one extension.
BUILD = """
import sys
import setuptools
from distutils.core import run_setup
command = ["-q", "build_ext", "--build-lib", sys.argv[1], "--build-temp", sys.argv[1]]
setup = run_setup("setup.py", command, stop_after="commandline")
setup.ext_modules = [e for e in setup.ext_modules if e.name == "grasp_sparse._cuda"]
setup.run_commands()
"""
LOAD = """
import sys, torch, grasp_sparse.ops
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("_cuda", sys.argv[1])
module = module_from_spec(spec)
spec.loader.exec_module(module)
print(module.targets())
from grasp_sparse.ops.schema import NORM_SCHEMAS, POOL_SCHEMAS, SCHEMAS, UPDATE_SCHEMAS
for name in SCHEMAS | NORM_SCHEMAS | POOL_SCHEMAS | UPDATE_SCHEMAS:
    assert torch._C._dispatch_has_kernel_for_dispatch_key("grasp_sparse::" + name, "CUDA"), name
"""


def _nvcc() -> bool:
    return torch.version.cuda is not None and (shutil.which("nvcc") is not None or Path("/usr/local/cuda/bin/nvcc").exists())


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not _nvcc(), reason="needs nvcc and a torch built with CUDA"),
    pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="what is preloaded, sanitizers say, is not for nvcc"),
]


def _child_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Path, float]:
    folder = tmp_path_factory.mktemp("cuda")
    environment = {**os.environ, "FORCE_CUDA": "1", "GRASP_SPARSE_REQUIRE_EXT": "1", "PYTHONWARNINGS": "ignore"}
    environment.pop("TORCH_CUDA_ARCH_LIST", None)
    environment.pop("GRASP_SPARSE_NO_EXT", None)
    began = _child_seconds()
    done = subprocess.run([sys.executable, "-c", BUILD, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    (library,) = folder.rglob("_cuda*.so")
    return library, _child_seconds() - began


def _cuobjdump() -> str:
    tool = shutil.which("cuobjdump")
    if tool is None:
        triton = pytest.importorskip("triton", reason="needs cuobjdump, of CUDA or of triton's package")
        tool = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    return tool


@pytest.fixture(scope="module")
def resources(built) -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, kernel) -> registers, stack, shared and local memory of each, as cuobjdump prints them."""
    text = subprocess.run([_cuobjdump(), "--dump-resource-usage", str(built[0])], capture_output=True, text=True, check=True).stdout
    found, architecture = {}, ""
    for line in text.splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            kernel = match[1]
        elif "REG:" in line:
            found[architecture, kernel] = {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
    return found


def test_it_compiles_in_time(built):
    assert built[1] < SECONDS


def _threads(kernel: str) -> int:
    """Of a block, or of the blocks that are meant to be on a multiprocessor together, by the mangled name."""
    if rows := re.search(r"fill_groupsI\w+?Li(\d+)E", kernel):
        return 32 * int(rows[1])
    return 512 if re.search("product|sampled", kernel) else 3 * 256 if re.search("norm_|max_pool_", kernel) else 256


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_staged_kernels_copy_without_waiting(built, architecture):
    """Of every storage type; LDGSTS is what cp.async becomes."""
    command = [_cuobjdump(), "-sass", "-arch", architecture, str(built[0])]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    staged = {}
    for kernel, code in re.findall(r"Function : (\S+)\n(.*?)(?=Function :|\Z)", text, re.DOTALL):
        if named := re.search(r"\d(product|sampled)I(NS0_\d\w+?E|f|d)", kernel):
            staged.setdefault(named.groups(), []).append("LDGSTS" in code)
    assert len(staged) == 2 * 4 and all(all(copies) for copies in staged.values()), staged


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_kernel_spills(resources, architecture):
    kernels = {name: usage for (target, name), usage in resources.items() if target == architecture}
    assert all(any(known in name for name in kernels) for known in KERNELS), kernels.keys()
    for name, usage in kernels.items():
        assert usage["LOCAL"] == 0 and usage["STACK"] == 0, f"{name}: {usage}"
        assert usage["SHARED"] <= 1024, f"{name}: {usage}"  # what a launch asks for may be all a device has but for its own share
        threads = _threads(name)
        assert usage["REG"] * threads <= REGISTERS, f"{name}: {usage}"


def test_it_loads_without_a_gpu(built):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("GRASP_SPARSE_NO_EXT", None)
    done = subprocess.run([sys.executable, "-c", LOAD, str(built[0])], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == list(ARCHITECTURES)
