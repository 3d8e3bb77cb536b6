"""What the launchers decide on the host, and that the package does without Triton."""

from __future__ import annotations

import math
import subprocess
import sys
from itertools import product

import pytest
import torch
from op_cases import WINDOWS, block_matrix

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources, PTXASError

from grasp_sparse.ops import reference_blocks
from grasp_sparse.ops.schema import BLOCK_SCHEMAS
from grasp_sparse.ops.triton import BLOCK_SIDES, kernels, launch, tuning
from grasp_sparse.ops.triton.window import divisor, window


@pytest.mark.parametrize("name", WINDOWS)
def test_every_pair_of_pixels_that_a_tap_joins_meets_in_one_phase(name):
    """By brute force over the image: dgrad's phases, grid and shifted reads reach each (input, tap, output) exactly once."""
    kernel, stride, padding, dilation, image = WINDOWS[name]
    of = window(kernel, stride, padding, dilation)
    output, grid = of.output_size(image), of.phase_size(image)
    for axis in (0, 1):
        s, pad, d = stride[axis], padding[2 * axis], dilation[axis]
        joined = {(j * s - pad + k * d, k, j) for j in range(output[axis]) for k in range(kernel[axis])}
        joined = {(i, k, j) for i, k, j in joined if 0 <= i < image[axis]}
        found = []
        for phase, a, k in product(range(s), range(grid[axis]), range(kernel[axis])):
            if (k * d + of.shift[axis]) % s == phase:
                i, (j, rest) = phase + a * s, divmod(phase + pad - k * d, s)
                assert rest == 0
                if i < image[axis] and 0 <= a + j < output[axis]:
                    found.append((i, k, a + j))
        assert len(found) == len(set(found)) and set(found) == joined


def test_parts_cover_the_tokens_and_depend_on_nothing_that_is_measured():
    for tokens, step, programs, processors in product((1, 511, 513, 16384, 10**6), (32, 64), (1, 29, 5000), (1, 132)):
        parts, part = tuning.parts_of_tokens(tokens, step, programs, processors)
        assert 1 <= parts <= 32 and part % step == 0 and (parts - 1) * part < tokens <= parts * part
        assert parts == 1 or part >= 256


def test_divisors_divide_exactly():
    numbers = [*range(1, 70), 196, 2**16 - 1, 2**16, 12345, 2**30 - 1, 2**30 + 1, 2**31 - 1]
    for number in numbers:
        _, magic, shift = divisor(number)
        assert -(2**31) <= magic < 0
        most = 2**31 - 1
        for m in {*range(200), number - 1, number, number + 1, most - most % number - 1, most - most % number, most}:
            assert 0 > m or m > most or (2 * m * (magic + 2**32) >> 32) >> shift == m // number, f"{m} / {number}"


class Clock:
    """Stands in for the device: a launch takes what ``seconds`` says of its tile, and the first one of each a compilation more."""

    CUDA, TILES = torch.device("cuda"), tuple(tuning.Tile(size, 64, 4, 3) for size in (64, 128, 256, 512))

    def __init__(self, monkeypatch, seconds: dict[int, float]) -> None:
        self.now, self.seconds, self.launched, self.capturing = 0.0, seconds, [], False

        class Event:
            def __init__(event, enable_timing: bool) -> None:
                event.at = math.nan

            def record(event) -> None:
                event.at = self.now

            def elapsed_time(event, end) -> float:
                return end.at - event.at

            def synchronize(event) -> None:
                pass

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        monkeypatch.setattr(tuning, "_chosen", {})

    def launch(self, tile: tuning.Tile) -> None:
        if self.seconds[tile.size] == math.inf:
            raise OutOfResources(300_000, 227_000, "shared memory")
        self.now += self.seconds[tile.size] + (1000 if tile not in self.launched else 0)
        self.launched.append(tile)

    def fastest(self, key: str) -> int:
        return tuning.fastest(key, self.TILES, self.launch, self.CUDA).size


def test_the_fastest_tile_is_found_once_and_remembered(monkeypatch):
    clock = Clock(monkeypatch, {64: 4.0, 128: 2.0, 256: 3.0, 512: math.inf})
    assert clock.fastest("a call") == 128 and len(clock.launched) == 3 * (1 + tuning.RUNS)
    clock.seconds[128] = 9.0
    clock.launched.clear()
    assert clock.fastest("a call") == 128 and not clock.launched
    assert clock.fastest("another call") == 256
    assert tuning.fastest("one tile", clock.TILES[:1], pytest.fail, clock.CUDA) == clock.TILES[0]


def test_one_slow_run_decides_nothing(monkeypatch):
    clock = Clock(monkeypatch, {64: 4.0, 128: 2.0, 256: 3.0, 512: 5.0})
    launch, calls = clock.launch, []

    def disturbed(tile: tuning.Tile) -> None:
        launch(tile)
        calls.append(tile.size)
        clock.now += 50 * (calls.count(128) == 3 and tile.size == 128)

    clock.launch = disturbed
    assert clock.fastest("a call") == 128


def test_tiles_that_do_not_compile_are_left_out_and_not_all_of_them(monkeypatch):
    clock = Clock(monkeypatch, {64: math.inf, 128: 5.0, 256: 2.0, 512: 1.0})
    launch = clock.launch

    def no_largest(tile: tuning.Tile) -> None:
        if tile.size == 512:
            raise PTXASError("no registers are left")
        launch(tile)

    clock.launch = no_largest
    assert clock.fastest("a call") == 256
    clock.seconds = dict.fromkeys(clock.seconds, math.inf)
    with pytest.raises(OutOfResources):
        clock.fastest("another call")


def test_a_pass_that_fails_leaves_a_tile_out_and_a_lost_device_does_not(monkeypatch):
    """Both are a plain RuntimeError; the device is asked which it was."""
    clock = Clock(monkeypatch, {64: 3.0, 128: 5.0, 256: 2.0, 512: 1.0})
    launch = clock.launch

    def failing(tile: tuning.Tile) -> None:
        if tile.size == 512:
            raise RuntimeError("PassManager::run failed")
        launch(tile)

    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    clock.launch = failing
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert clock.fastest("a call") == 256
    monkeypatch.setattr(torch.cuda, "synchronize", lost)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        clock.fastest("another call")


def test_inside_a_graph_the_first_tile_is_taken_unless_one_is_known(monkeypatch):
    clock = Clock(monkeypatch, {64: 4.0, 128: 2.0, 256: 3.0, 512: 5.0})
    clock.capturing = True
    assert clock.fastest("a call") == 64 and not clock.launched
    clock.capturing = False
    assert clock.fastest("a call") == 128
    clock.capturing = True
    assert clock.fastest("a call") == 128


def test_tiles_of_sampled_products_share_what_decides_the_order_of_the_sum():
    for dtype, precision, size, wgmma in product(
        (torch.float32, torch.bfloat16), ("ieee", "tf32"), product(BLOCK_SIDES, repeat=2), (False, True)
    ):
        tiles = tuning.sampled_tiles(dtype, precision, size, wgmma)
        assert len({tile.step for tile in tiles}) == 1


def test_a_window_never_runs_with_eight_warps():
    for dtype, precision, size, wgmma in product(
        (torch.float32, torch.bfloat16), ("ieee", "tf32"), product(BLOCK_SIDES, repeat=2), (False, True)
    ):
        tiles = tuning.product_tiles(dtype, precision, size[0], True, wgmma) + tuning.sampled_tiles(dtype, precision, size, wgmma)
        assert all(tile.warps <= 4 for tile in tiles)


@pytest.mark.parametrize("why", ["float64", "block of 8", "block of 48", "two dtypes", "64-bit indices", "an older device"])
def test_what_kernels_do_not_take_the_reference_computes(why, monkeypatch):
    size = {"block of 8": (16, 8), "block of 48": (48, 16)}.get(why, (16, 16))
    dtype = torch.float64 if why == "float64" else torch.float32
    values, indices = block_matrix((40, 70), size, 0.5, dtype)
    if why == "64-bit indices":
        indices = indices._replace(permutation=indices.permutation.long())
    x, g = torch.randn(9, 70, dtype=dtype), torch.randn(9, 40, dtype=torch.bfloat16 if why == "two dtypes" else dtype)
    monkeypatch.setattr(kernels, "_has_tensor_cores", lambda device: why != "an older device")
    monkeypatch.setattr(kernels, "_FAMILIES", {name: (None, at) for name, (_, at) in kernels._FAMILIES.items()})  # not to be called
    for name, arguments in {"bsr_spmm": (values, *indices, None, x, 40), "bsr_sddmm": (*indices, g, x, size)}.items():
        if name == "bsr_sddmm" or why != "two dtypes":
            torch.testing.assert_close(kernels.run(name, *arguments), getattr(reference_blocks, name)(*arguments))


def test_what_would_lead_kernels_out_of_their_tensors_is_refused():
    values, indices = block_matrix((40, 70), (16, 16), 1.0, torch.float32)
    x, g, images = torch.randn(9, 70), torch.randn(9, 40), torch.randn(2, 70, 4, 4)
    run, point = kernels.linear, ((1, 1), (1, 1), (0,) * 4, (1, 1))
    for call in (
        lambda: run.bsr_spmm(values, *indices, None, torch.randn(9, 90), 40),
        lambda: run.bsr_spmm(values, *indices, None, x, 70),
        lambda: run.bsr_spmm_t(values, *indices, g, 90),
        lambda: run.bsr_sddmm(*indices, x, g, (16, 16)),
        lambda: kernels.conv2d.bsr_conv2d_fprop(values, *indices, None, images, 40, (3, 1), (1, 1), (0,) * 4, (1, 1)),
    ):
        with pytest.raises(ValueError, match="they are those of another weight"):
            call()
    with pytest.raises(ValueError, match="Expected 15 blocks of values, got 14"):
        run.bsr_spmm(values[1:], *indices, None, x, 40)
    with pytest.raises(ValueError, match="Expected g and x of one batch, got 8 and 9"):
        run.bsr_sddmm(*indices, g[1:], x, (16, 16))
    for bias in (torch.zeros(39), torch.zeros(48), torch.zeros(1, 40)):
        with pytest.raises(ValueError, match=r"Expected bias of shape \[40\], got"):
            run.bsr_spmm(values, *indices, bias, x, 40)
    for short in ("col_indices", "row_indices", "permutation"):
        lists = indices._replace(**{short: getattr(indices, short)[:-1]})
        for call in (
            lambda: run.bsr_spmm(values, *lists, None, x, 40),
            lambda: run.bsr_spmm_t(values, *lists, g, 70),
            lambda: run.bsr_sddmm(*lists, g, x, (16, 16)),
            lambda: kernels.conv2d.bsr_conv2d_dgrad(values, *lists, g[..., None, None], 70, (1, 1), *point),
        ):
            with pytest.raises(ValueError, match="Expected row_indices and permutation of 1[45] entries like col_indices"):
                call()


@pytest.mark.parametrize("tokens, features, message", [
    (2**31, 40, "Expected at most .* tokens .*, got 2147483648; split the batch"),
    (2**30, 16 * 128, "Expected work for fewer than 2\\^31 programs"),
])  # fmt: skip
def test_more_than_kernels_can_count_is_refused(tokens, features, message):
    """On tensors without memory."""
    values, indices = block_matrix((features, 16), (16, 16), 1.0, torch.float32)
    x, g = torch.empty(tokens, 16, device="meta"), torch.empty(tokens, features, device="meta")
    with pytest.raises(ValueError, match=message):
        kernels.linear.bsr_spmm(values, *indices, None, x, features)
    if tokens > launch.MOST_TOKENS:
        with pytest.raises(ValueError, match=message):
            kernels.linear.bsr_sddmm(*indices, g, x, (16, 16))


def test_no_tile_is_smaller_than_launches_are_checked_for():
    for dtype, precision, produced, images, wgmma in product(
        (torch.float32, torch.bfloat16), ("ieee", "tf32"), BLOCK_SIDES, (False, True), (False, True)
    ):
        assert all(tile.size >= launch.SMALLEST_TILE for tile in tuning.product_tiles(dtype, precision, produced, images, wgmma))


def test_registered_for_cuda_when_triton_is_there_and_imported_when_it_runs():
    program = """
import sys
import grasp_sparse
assert "grasp_sparse.ops.triton" in sys.modules and "grasp_sparse.ops.triton.kernels" not in sys.modules
import torch
print(*(torch._C._dispatch_has_kernel_for_dispatch_key(f"grasp_sparse::{name}", "CUDA") for name in sys.argv[1:]))
"""
    hidden = """
import importlib.util as util
find = util.find_spec
util.find_spec = lambda name, *rest: None if name == "triton" else find(name, *rest)
"""
    for setup, registered in (("", "True"), (hidden, "False")):
        done = subprocess.run([sys.executable, "-c", setup + program, *BLOCK_SCHEMAS], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [registered] * len(BLOCK_SCHEMAS)
