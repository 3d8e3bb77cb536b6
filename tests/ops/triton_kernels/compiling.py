"""Compiles what a call would launch, for a device that is not there, and reads what became of it.

A call runs with its kernels replaced by recorders; the arguments are turned into Triton's signature as a launch would do it.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from grasp_sparse.ops.triton import launch

KERNELS = ("product_kernel", "sampled_kernel", "regroup_kernel", "longest_first_kernel")
_TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}


class Launch(NamedTuple):
    """One launch, in what Triton compiles it from; can be sent to another process."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, object]
    attributes: dict[tuple[int], list]
    options: dict[str, int]


class Compiled(NamedTuple):
    registers: int  # a thread
    warps: int
    local: int  # bytes a thread
    spills: int  # instructions that go to local memory; a stack of some bytes that nothing touches is none
    shared: int  # bytes a program, with what the launch adds
    ptx: str

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"^\s*(?:@%p\d+ )?{re.escape(instruction)}", self.ptx, re.MULTILINE))


class _Recorder:
    def __init__(self, kernel, launches: list[Launch]):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        return self._record

    def _record(self, *arguments, **constants):
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
        signature, attributes = {}, {}
        for i, (parameter, argument) in enumerate(zip(self.kernel.params, arguments, strict=False)):
            plain = not parameter.do_not_specialize
            if isinstance(argument, torch.Tensor):
                signature[parameter.name] = _TYPES[argument.dtype]
                attributes[(i,)] = [["tt.divisibility", 16]]
            elif argument is None or (argument == 1 and plain):
                signature[parameter.name], constants[parameter.name] = "constexpr", argument
            else:
                signature[parameter.name] = "i32"
                if argument % 16 == 0 and plain:
                    attributes[(i,)] = [["tt.divisibility", 16]]
        signature |= {name: "constexpr" for name in constants}
        function = self.kernel.fn
        self.launches.append(Launch(function.__module__, function.__name__, signature, constants, attributes, options))


@contextmanager
def recorded(wgmma: bool = True) -> Iterator[list[Launch]]:
    """Inside, nothing is launched; what would have been on a device with or without wgmma is in the list."""
    launches: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "has_wgmma", lambda device: wgmma)
        patch.setattr(launch, "_inside", lambda values, *_: values)  # reads lists that a recorder did not make
        for name in KERNELS:
            patch.setattr(launch, name, _Recorder(getattr(launch, name), launches))
        yield launches


@contextmanager
def chosen_tile(choose: Callable) -> Iterator[list]:
    """Inside, of several tiles the one that ``choose`` gives of their tuple is launched; the list has all there were."""
    seen = []

    def chosen(key, tiles, run, device):
        seen[:] = tiles
        return choose(tiles)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "fastest", chosen)
        yield seen


def compiled(of: Launch, capability: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(import_module(of.module), of.kernel)
    source = ASTSource(fn=kernel, signature=of.signature, constexprs=of.constants, attrs=of.attributes)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=of.options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        resources = _printed(tools / "cuobjdump", "--dump-resource-usage", file.name)
        usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", resources)}
        code = _printed(tools / "nvdisasm", "-c", file.name) if usage["STACK"] or usage["LOCAL"] else ""
    spills, shared = len(re.findall(r"\b(?:LDL|STL)\b", code)), usage["SHARED"] + made.metadata.shared
    return Compiled(usage["REG"], of.options.get("num_warps", 4), usage["LOCAL"], spills, shared, made.asm["ptx"])


def _printed(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
