"""Loads the compiled libraries once and remembers why when it cannot.

The operators register themselves for the CPU, or for CUDA, when their library loads and take over from the pure-torch reference;
nothing else in the package asks whether it is there.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from importlib import import_module

import torch  # its libraries must be in the process before ours asks for them


@dataclass(frozen=True)
class ExtensionStatus:
    """What was compiled and what runs.

    Attributes:
        loaded: whether compiled kernels are in use.
        reason: why not, in one sentence with what to do; None when loaded.
        isa: the instruction set in use: "avx512", "avx2", "scalar", "reference" without the library, or "none" when
            GRASP_SPARSE_ISA names one that cannot run: every kernel then raises RuntimeError with the reason.
        runnable_isas: those that GRASP_SPARSE_ISA may name on this machine, best first.
        built: what was compiled in, for people: {"cpu": "avx512 avx2 scalar", "compiler": …, "cuda": "sm_80 sm_90"}.
        cuda_reason: why the CUDA kernels are not in use, in one sentence with what to do; None when they are loaded.
    """

    loaded: bool
    reason: str | None
    isa: str
    runnable_isas: tuple[str, ...]
    built: dict[str, str]
    cuda_reason: str | None = None


def status() -> ExtensionStatus:
    """The outcome of the attempt made when grasp_sparse was imported."""
    return _status


def _load() -> ExtensionStatus:
    if os.environ.get("GRASP_SPARSE_NO_EXT") == "1":
        return _without("GRASP_SPARSE_NO_EXT=1 is set; unset it to use the compiled kernels.")
    try:
        library = import_module("grasp_sparse._C")
    except ModuleNotFoundError:
        return _without(
            "the extension was not built; install a C++ compiler (on Debian: apt-get install g++) and run "
            "pip install --no-build-isolation . again."
        )
    except ImportError as error:
        return _without(f"the extension does not load ({error}); rebuild it against this torch: pip install --no-build-isolation .")
    runnable = tuple(library.runnable_isas())
    cuda, cuda_reason = _load_cuda()
    built = {"cpu": " ".join(library.compiled_isas()), "compiler": library.compiler(), **cuda}
    try:
        return ExtensionStatus(True, None, library.active_isa(), runnable, built, cuda_reason)
    except RuntimeError as error:  # GRASP_SPARSE_ISA; a warning here, so that a program can end in a line of its own
        warnings.warn(f"grasp_sparse cannot run its kernels: {error}", RuntimeWarning, stacklevel=2)
        return ExtensionStatus(False, str(error), "none", runnable, built, cuda_reason)


def _load_cuda() -> tuple[dict[str, str], str | None]:
    """What was compiled for GPUs, and why it is not in use. Warns only where there is a GPU that would run it."""
    rebuild = "FORCE_CUDA=1 pip install --no-build-isolation ."
    try:
        return {"cuda": import_module("grasp_sparse._cuda").targets()}, None
    except ModuleNotFoundError:
        reason = f"the CUDA kernels were not built; with nvcc and a torch built with CUDA, run {rebuild}"
    except ImportError as error:
        reason = f"the CUDA kernels do not load ({error}); rebuild them against this torch: {rebuild}"
    if torch.cuda.device_count():  # asks the driver's library, and starts nothing
        warnings.warn(f"grasp_sparse runs its slow pure-torch reference on CUDA: {reason}", RuntimeWarning, stacklevel=3)
    return {}, reason


def _without(reason: str) -> ExtensionStatus:
    warnings.warn(f"grasp_sparse runs on its slow pure-torch reference: {reason}", RuntimeWarning, stacklevel=2)
    return ExtensionStatus(False, reason, "reference", (), {}, reason)


_status = _load()
