"""Builds grasp_sparse._C. Everything else about the package is in pyproject.toml.

Environment:
    GRASP_SPARSE_NO_EXT=1   build no extension: the package runs on its pure-torch reference
    MAX_JOBS                compilers at once (default: the number of cores)

The extension is optional: without a working compiler the package still installs, and says at import why it is slow.
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

CPU = Path("csrc/cpu")
# One binary for torch >= 2.11: only the stable ABI of that version is used.
TORCH_TARGET_VERSION = "0x020b000000000000"
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
# csrc/cpu/kernels.cpp is compiled once for each; which one runs is chosen at run time. No -march=native anywhere.
ISA_FLAGS = {"scalar": []}
if IS_X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]


def extension_arguments():
    if os.environ.get("GRASP_SPARSE_NO_EXT") == "1":
        return {}
    from pybind11 import get_include
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildKernels(BuildExtension):
        """Compiles kernels.cpp for every instruction set, then the rest as usual."""

        def build_extension(self, ext):
            compiler = self.compiler

            def compile_for(isa):
                directory = Path(self.build_temp) / isa  # an object file is named after its source: one folder each
                flags = ["-O3", "-fPIC", "-std=c++17", "-Wno-psabi", f"-DGRASP_SPARSE_ISA={isa}", *ISA_FLAGS[isa]]
                directory.mkdir(parents=True, exist_ok=True)
                target = directory / "kernels.o"
                compiler.spawn([*compiler.compiler_cxx[:1], *flags, "-c", str(CPU / "kernels.cpp"), "-o", str(target)])
                return str(target)

            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                ext.extra_objects = list(pool.map(compile_for, ISA_FLAGS))
            super().build_extension(ext)

    defines = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)] + ([("GRASP_SPARSE_X86", None)] if IS_X86 else [])
    sources = sorted(str(path) for path in CPU.glob("*.cpp") if path.name != "kernels.cpp")
    extension = CppExtension(
        "grasp_sparse._C",
        [*sources, "csrc/info.cpp"],
        include_dirs=[get_include()],
        define_macros=defines,
        depends=sorted(str(path) for path in Path("csrc").rglob("*.h")) + [str(CPU / "kernels.cpp")],
        extra_compile_args=["-O3"],
        py_limited_api=False,
    )
    extension.optional = True
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildKernels}}


setup(**extension_arguments())
