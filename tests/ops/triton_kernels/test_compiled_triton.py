"""The Triton kernels compile for sm_80 and sm_90 into what they are meant to be: no spills, registers and shared memory that are
there, tensor cores, asynchronous copies. No device is needed.

By default every operation × dtype × square block with its first tile; GRASP_SPARSE_ALL_KERNELS=1 compiles other blocks and every
tile too (a quarter of an hour).
"""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import product

import pytest
import torch
from op_cases import block_matrix

triton = pytest.importorskip("triton")

from compiling import Compiled, Launch, chosen_tile, compiled, recorded

from grasp_sparse.ops.triton import BLOCK_SIDES, conv2d, launch, linear

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may have
REGISTERS = 65536  # of a multiprocessor
FIRST_SHARED_LIMIT = 99 * 1024  # of the first tile, which is taken unmeasured: the least of the devices from sm_80 on
DTYPES = {  # of activations, and whether float32 may be TF32
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}
PRODUCTS = ("bsr_spmm", "bsr_spmm_t", "bsr_sddmm", "bsr_conv2d_fprop", "bsr_conv2d_dgrad", "bsr_conv2d_wgrad")
ALL = os.environ.get("GRASP_SPARSE_ALL_KERNELS") == "1"
SQUARES = [(side, side) for side in BLOCK_SIDES]
# Of which Triton 3.6 spills a register or two: accesses to local memory that are let pass there.
SPILLED = {
    (80, "bsr_conv2d_fprop", "float32", (64, 64)), (80, "bsr_conv2d_dgrad", "float32", (32, 32)),
    (80, "bsr_conv2d_dgrad", "float32", (64, 64)), (80, "bsr_conv2d_wgrad", "float32", (64, 64)),
    (80, "bsr_conv2d_wgrad", "tf32", (128, 128)), (90, "bsr_spmm", "float32", (32, 32)),
}  # fmt: skip
ALLOWED = dict.fromkeys(SPILLED, 12) if triton.__version__.startswith(("3.6.", "3.7.")) else {}
CASES = list(product((80, 90), PRODUCTS, DTYPES, SQUARES + ALL * [(128, 16), (16, 128), (64, 32), (16, 64)]))


def launches(
    capability: int, name: str, dtype: str, size: tuple[int, int], channels: int = 256, stride: int = 1, side: int = 3
) -> list[list[Launch]]:
    """Of one call, for each tile that may be chosen; side: of the kernel of a convolution."""
    activations, tf32 = DTYPES[dtype]
    family, kernel = (conv2d, (side, side)) if "conv" in name else (linear, ())
    values, indices = block_matrix((channels, channels, *kernel), size, 1.0, torch.float32)
    x = torch.empty(2000, channels, dtype=activations)
    g, rest = x, ()
    if kernel:
        images = torch.empty(4, channels, 16, 16, dtype=activations, memory_format=torch.channels_last)
        x, g = images, images[..., ::stride, ::stride].contiguous(memory_format=torch.channels_last)
        rest = (kernel, (stride, stride), (side // 2,) * 4, (1, 1))
    bias = torch.empty(channels)
    arguments = {
        "bsr_spmm": (values, *indices, bias, x, channels),
        "bsr_spmm_t": (values, *indices, g, channels),
        "bsr_sddmm": (*indices, g, x, size),
        "bsr_conv2d_fprop": (values, *indices, bias, x, channels, *rest),
        "bsr_conv2d_dgrad": (values, *indices, g, channels, x.shape[2:], *rest),
        "bsr_conv2d_wgrad": (*indices, g, x, size, *rest),
    }[name]
    allowed = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    found, tiles = [], 1
    try:
        while len(found) < tiles:
            with recorded(wgmma=capability >= 90) as made, chosen_tile(lambda of: of[len(found)]) as seen:
                getattr(family, name)(*arguments)
            found.append(list(made))
            tiles = len(seen)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = allowed
    return found


def main(made: list[Launch]) -> Launch:
    return next(of for of in made if of.kernel in ("product_kernel", "sampled_kernel"))


@pytest.fixture(scope="module")
def pool():
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        yield executor


@pytest.fixture(scope="module")
def results(pool, request):
    """What the chosen tests ask for compiled at once, two at a time: the tests below wait for theirs."""
    chosen = [item.callspec.params for item in request.session.items if item.originalname == "test_resources_and_instructions"]
    futures = {}
    for capability, *case in CASES:
        if dict(zip(("capability", "name", "dtype", "size"), (capability, *case), strict=True)) not in chosen:
            continue
        tiles = launches(capability, *case)
        for i, made in enumerate(tiles if ALL else tiles[:1]):
            futures[capability, *case, i] = pool.submit(compiled, main(made), capability)
    return futures


def readable(argument) -> str:
    return "x".join(map(str, argument)) if isinstance(argument, tuple) else str(argument)


@pytest.mark.parametrize("capability, name, dtype, size", CASES, ids=readable)
def test_resources_and_instructions(results, capability, name, dtype, size):
    case = capability, name, dtype, size
    found: dict[int, Compiled] = {tile: future.result() for (*of, tile), future in results.items() if tuple(of) == case}
    assert found
    for i, code in found.items():
        assert code.spills <= ALLOWED.get(case, 0) and code.local == 0, f"tile {i}: {code.spills} accesses to {code.local} bytes of local memory"
        assert code.registers * 32 * code.warps <= REGISTERS, f"tile {i}: {code.registers} registers, {code.warps} warps"
        assert code.shared <= (SHARED_LIMIT[capability] if i else FIRST_SHARED_LIMIT), f"tile {i}"
        assert code.count("cp.async.cg.shared.global") + code.count("cp.async.ca.shared.global") > 0, f"tile {i}"
        if dtype in ("bfloat16", "float16"):
            assert code.count("ld.global.b16") == 0, f"tile {i}: loads one number at a time"
            assert (code.count("wgmma.mma_async") > 0) == (capability == 90), f"tile {i}"
            assert (code.count("mma.sync") > 0) == (capability == 80), f"tile {i}"
        elif dtype == "tf32":
            assert code.count("wgmma.mma_async") + code.count("mma.sync") > 0, f"tile {i}"
        else:
            assert code.count("fma.rn.f32") + code.count("fma.rn.f32x2") > 0 and "mma" not in code.ptx, f"tile {i}"


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("kernel", "side"), [("regroup_kernel", 1), ("regroup_kernel", 3), ("regroup_kernel", 7), ("longest_first_kernel", 3)]
)
def test_lists_spill_nothing(pool, kernel, side, capability):
    """Of every convolution that networks have at stride 2: one tap, nine, forty-nine."""
    with recorded() as made:
        values, indices = block_matrix((32, 32, side, side), (16, 16), 1.0, torch.float32)
        rest = ((side, side), (2, 2), (side // 2,) * 4, (1, 1))
        conv2d.bsr_conv2d_dgrad(values, *indices, torch.empty(1, 32, 4, 4), 32, (8, 8), *rest)
    chosen = [of for of in made if of.kernel == kernel]
    assert chosen
    for code in pool.map(compiled, chosen, [capability] * len(chosen)):
        assert code.spills == code.local == 0


VARIANTS = {
    "ragged": {"channels": 250}, "stride 2": {"stride": 2}, "1x1 at stride 2": {"stride": 2, "side": 1},
    "7x7 at stride 2": {"stride": 2, "side": 7}, "lists by length": {},
}  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_spill_nothing(pool, monkeypatch, variant, capability):
    ordered = variant == "lists by length"
    if ordered:
        monkeypatch.setattr(launch, "ORDERED_BELOW", 1 << 20)
    names = [name for name in PRODUCTS if variant == "ragged" or "conv" in name]
    tiles = [launches(capability, name, "bfloat16", (64, 64), **VARIANTS[variant]) for name in names]
    chosen = [main(made) for of in tiles for made in (of if ALL else of[:1])]
    assert not ordered or any(made.signature.get("order") == "*i32" for made in chosen)
    for code in pool.map(compiled, chosen, [capability] * len(chosen)):
        assert code.spills == code.local == 0
