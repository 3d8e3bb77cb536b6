"""Builds grasp_sparse._C. Everything else about the package is in pyproject.toml.

Environment:
    GRASP_SPARSE_NO_EXT=1       build no extension: the package runs on its pure-torch reference
    GRASP_SPARSE_REQUIRE_EXT=1  an extension that does not build is an error (the Makefile sets it)
    GRASP_SPARSE_SANITIZE=1     AddressSanitizer and UndefinedBehaviorSanitizer in the kernels; `make sanitize` sets it
    MAX_JOBS                    compilers at once (default: the number of cores)

Otherwise the extension is optional: without a working compiler the package still installs, and says at import why it is slow.
"""

import os
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.errors import CompileError

CPU = Path("csrc/cpu")
# One binary for torch >= 2.11: only the stable ABI of that version is used.
TORCH_TARGET_VERSION = "0x020b000000000000"
REQUIRED = os.environ.get("GRASP_SPARSE_REQUIRE_EXT") == "1"
# The first finding ends the process. -O1 compiles faster, and keeps accesses that would be optimized away before they are seen;
# Python's own -fwrapv would make signed overflow legal.
# Without use-after-scope: in code that is all inlined and unrolled it takes minutes to compile.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-sanitize-address-use-after-scope"]
SANITIZED = os.environ.get("GRASP_SPARSE_SANITIZE") == "1"
OPTIMIZE = ["-O1", "-g1", "-fno-omit-frame-pointer", "-fno-wrapv", *SANITIZERS] if SANITIZED else ["-O3"]
IS_X86 = platform.machine().lower() in ("x86_64", "amd64")
# csrc/cpu/kernels.cpp is compiled once for each; which one runs is chosen at run time. No -march=native anywhere.
ISA_FLAGS = {"scalar": []}
if IS_X86:
    ISA_FLAGS["avx2"] = ["-mavx2", "-mfma"]
    ISA_FLAGS["avx512"] = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma"]


def extension_arguments():
    if os.environ.get("GRASP_SPARSE_NO_EXT") == "1":
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class BuildKernels(BuildExtension):
        """Compiles kernels.cpp for every instruction set, then the rest as usual."""

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                if REQUIRED:
                    raise
                # Whatever went wrong (no compiler, no headers, too little memory), the reference works without.
                print(f"grasp_sparse: the extension was not built, the package will be slow: {error}")
                self.extensions.clear()  # or an editable install would look for its file

        def build_extension(self, ext):
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                ext.extra_objects = list(pool.map(self.compile_kernels, ISA_FLAGS))
            super().build_extension(ext)

        def compile_kernels(self, isa):
            target = Path(self.build_temp) / isa / "kernels.o"
            target.parent.mkdir(parents=True, exist_ok=True)
            flags = [*OPTIMIZE, "-fPIC", "-std=c++17", "-Wall", "-Wno-psabi", f"-DGRASP_SPARSE_ISA={isa}", *ISA_FLAGS[isa]]
            command = [*self.compiler.compiler_cxx, *flags, "-c", str(CPU / "kernels.cpp"), "-o", str(target)]
            try:
                subprocess.run(command, check=True)
            except (OSError, subprocess.CalledProcessError) as error:
                raise CompileError(str(error)) from error
            return str(target)

    defines = [("TORCH_TARGET_VERSION", TORCH_TARGET_VERSION)] + ([("GRASP_SPARSE_X86", None)] if IS_X86 else [])
    sources = sorted(str(path) for path in CPU.glob("*.cpp") if path.name != "kernels.cpp")
    extension = CppExtension(
        "grasp_sparse._C",
        [*sources, "csrc/info.cpp"],
        define_macros=defines,
        depends=sorted(str(path) for path in Path("csrc").rglob("*.h")) + [str(CPU / "kernels.cpp")],
        # Errors name csrc/…, not this machine.
        extra_compile_args=["-g0", *OPTIMIZE, f"-ffile-prefix-map={Path.cwd()}/="],
        extra_link_args=SANITIZERS if SANITIZED else [],
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildKernels}}


setup(**extension_arguments())
