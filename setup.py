"""Builds grasp_sparse._C, the kernels for the CPU, and grasp_sparse._cuda, those for GPUs. Everything else about the package is in
pyproject.toml.

Environment:
    GRASP_SPARSE_NO_EXT=1       build no extension: the package runs on its pure-torch reference
    GRASP_SPARSE_REQUIRE_EXT=1  an extension that does not build is an error (the Makefile sets it)
    GRASP_SPARSE_SANITIZE=1     AddressSanitizer and UndefinedBehaviorSanitizer in the CPU kernels; `make sanitize` sets it
    FORCE_CUDA=1                build the CUDA kernels where no GPU is visible; with GRASP_SPARSE_REQUIRE_EXT=1 they must build
    TORCH_CUDA_ARCH_LIST        GPU architectures to compile for (default: 8.0, 9.0 and what is newer through PTX)
    CUDA_HOME                   the CUDA toolkit, if it is neither in /usr/local/cuda nor beside the nvcc on the PATH
    MAX_JOBS                    compilers at once (default: the number of cores)

Otherwise the extensions are optional: without a working compiler the package still installs, and says at import why it is slow. The
CUDA kernels need nvcc, a torch that was built with CUDA, and a visible GPU or FORCE_CUDA=1.
"""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from setuptools import setup
from setuptools.errors import CompileError

CPU, CUDA = Path("csrc/cpu"), Path("csrc/cuda")
# One binary for torch >= 2.11: only the stable ABI of that version is used.
TORCH_TARGET_VERSION = "0x020b000000000000"
REQUIRED = os.environ.get("GRASP_SPARSE_REQUIRE_EXT") == "1"
FORCE_CUDA = os.environ.get("FORCE_CUDA") == "1"
# The first finding ends the process. -O1 compiles faster, and keeps accesses that would be optimized away before they are seen;
# Python's own -fwrapv would make signed overflow legal.
# Without use-after-scope: in code that is all inlined and unrolled it takes minutes to compile.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-sanitize-address-use-after-scope"]
SANITIZED = os.environ.get("GRASP_SPARSE_SANITIZE") == "1"
OPTIMIZE = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-wrapv", *SANITIZERS] if SANITIZED else ["-O3"]
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
# csrc/cpu/kernels.cpp is compiled once for each and each type, what takes longest first; which one runs is chosen at run time.
# No -march=native anywhere.
ISA_FLAGS = {"avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"], "avx2": ["-mavx2", "-mfma"]} if IS_X86 else {}
ISA_FLAGS["scalar"] = []
TYPES = ("double", "float", "Bf16")


def find_cuda():
    """The CUDA toolkit with headers and nvcc, or None. An nvcc on the PATH may be a script that calls one elsewhere."""
    nvcc = shutil.which("nvcc")
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and Path(nvcc).resolve().parents[1], "/usr/local/cuda")
    for home in filter(None, homes):
        if Path(home, "bin", "nvcc").exists() and Path(home, "include", "cuda_runtime.h").exists():
            return str(home)
    return None


def wants_cuda():
    import torch

    if torch.version.cuda is None or not (FORCE_CUDA or torch.cuda.is_available()):
        return False
    home = find_cuda()
    if home is None:
        print("grasp_sparse: no CUDA toolkit with nvcc was found (set CUDA_HOME), the CUDA kernels are not built")
        if REQUIRED and FORCE_CUDA:
            raise SystemExit("grasp_sparse: FORCE_CUDA=1 and GRASP_SPARSE_REQUIRE_EXT=1 ask for CUDA kernels that cannot be built")
        return False
    os.environ["CUDA_HOME"] = home  # torch would take the script's folder for it
    # torch's own default looks at the GPUs, of which there may be none.
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")
    return True


def cuda_targets():
    """What TORCH_CUDA_ARCH_LIST names, as the compiler calls it: "sm_80 sm_90"."""
    targets = re.findall(r"(\d+)\.(\d+a?)", os.environ["TORCH_CUDA_ARCH_LIST"])
    return " ".join(f"sm_{major}{minor}" for major, minor in targets) or os.environ["TORCH_CUDA_ARCH_LIST"]


def extension_arguments():
    if os.environ.get("GRASP_SPARSE_NO_EXT") == "1":
        return {}
    with_cuda = wants_cuda()
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    class BuildKernels(BuildExtension):
        """Compiles kernels.cpp for every instruction set and type, then the rest as usual; the extensions fail apart from each other."""

        def build_extensions(self):
            everything, self.extensions = self.extensions, []
            for extension in everything:
                self.extensions = [extension]
                try:
                    super().build_extensions()
                except Exception as error:
                    if REQUIRED and (extension.name != "grasp_sparse._cuda" or FORCE_CUDA):
                        raise
                    # Whatever went wrong (no compiler, no headers, too little memory), the reference works without.
                    print(f"grasp_sparse: {extension.name} was not built, the package will be slow without: {error}")
                    everything = [other for other in everything if other is not extension]
            self.extensions = everything  # without those that failed, or an editable install would look for their files

        def build_extension(self, ext):
            if ext.name == "grasp_sparse._C":
                with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                    objects = list(pool.map(self.compile_kernels, *zip(*product(ISA_FLAGS, TYPES), strict=True)))
                # The plainest first: of an inline function that several objects hold the linker takes the first.
                ext.extra_objects = objects[::-1]
            super().build_extension(ext)

        def compile_kernels(self, isa, element_type):
            target = Path(self.build_temp) / isa / f"kernels_{element_type}.o"
            target.parent.mkdir(parents=True, exist_ok=True)
            # -g0 against Python's own -g, which makes a third of the time and seven eighths of the library.
            flags = ["-g0", *OPTIMIZE, "-fPIC", "-std=c++17", "-Wall", "-Wno-psabi", *ISA_FLAGS[isa]]
            names = [f"-DGRASP_SPARSE_ISA={isa}", f"-DGRASP_SPARSE_TYPE={element_type}"]
            command = [*self.compiler.compiler_cxx, *flags, *names, "-c", str(CPU / "kernels.cpp"), "-o", str(target)]
            try:
                subprocess.run(command, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise CompileError(str(error)) from error
            return str(target)

    here = f"-ffile-prefix-map={Path.cwd()}/="  # errors name csrc/…, not this machine
    target = ("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)
    extensions = [
        CppExtension(
            "grasp_sparse._C",
            [*sorted(str(path) for path in CPU.glob("*.cpp") if path.name != "kernels.cpp"), "csrc/info.cpp"],
            define_macros=[target] + ([("GRASP_SPARSE_X86", None)] if IS_X86 else []),
            depends=sorted(str(path) for path in CPU.rglob("*.h")) + [str(CPU / "kernels.cpp")],
            extra_compile_args=["-g0", *OPTIMIZE, here],
            extra_link_args=SANITIZERS if SANITIZED else [],
        )
    ]
    if with_cuda:
        extensions.append(
            CUDAExtension(
                "grasp_sparse._cuda",
                sorted(str(path) for path in (*CUDA.glob("*.cpp"), *CUDA.glob("*.cu"))),
                define_macros=[target, ("USE_CUDA", None), ("GRASP_SPARSE_CUDA_TARGETS", f'"{cuda_targets()}"')],
                depends=sorted(str(path) for path in Path("csrc").rglob("*.*h")),
                # Hidden: of equal names in two libraries of a process the linker would take one for both.
                extra_compile_args={
                    "cxx": ["-g0", "-O2", "-fvisibility=hidden", here],
                    "nvcc": ["-O3", "-Xcompiler=-fvisibility=hidden"],
                },
            )
        )
    return {"ext_modules": extensions, "cmdclass": {"build_ext": BuildKernels}}


setup(**extension_arguments())
