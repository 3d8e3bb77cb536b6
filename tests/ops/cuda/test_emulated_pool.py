"""Max pooling on CUDA, run by the emulator, picks what the reference picks and sums up what came of it."""

from __future__ import annotations

import pytest
import torch
from csr_laws import STORED
from op_cases import IMAGE_LAYOUTS, close
from pool_cases import CASES, WINDOWS, picture

from grasp_sparse.ops import reference_pool

dtypes = pytest.mark.parametrize("dtype", STORED.values(), ids=STORED)


def check(emulated, x, g_layout: str, window) -> None:
    y, places = emulated.max_pool2d(x, *window)
    wanted, wanted_places = reference_pool.max_pool2d(x, *window)
    torch.testing.assert_close(y, wanted, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(places, wanted_places) and (y.stride() == wanted.stride() == places.stride() or y.numel() == 0)
    g = IMAGE_LAYOUTS[g_layout][0](torch.randn(y.shape).to(x.dtype))
    gx = emulated.max_pool2d_backward(g, places, x.shape[2:], *window)
    expected = reference_pool.max_pool2d_backward(g.double(), places, x.shape[2:], *window)
    close(gx, expected)
    assert gx.dtype == x.dtype and (gx.stride() == expected.stride() or gx.numel() == 0)


@pytest.mark.parametrize("window, shape", CASES, ids=str)
@dtypes
def test_equals_reference(emulated, dtype, window, shape):
    check(emulated, picture(shape, "CHWN", dtype).detach(), "CHWN", WINDOWS[window])


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@dtypes
def test_equals_reference_in_every_layout(emulated, dtype, layout):
    check(emulated, picture((8, 3, 9, 7), layout, dtype).detach(), layout, WINDOWS["3x3/2-ceil"])
    check(emulated, picture((8, 3, 9, 7), "CHWN", dtype).detach(), layout, WINDOWS["2x2/2"])


def test_many_blocks_of_a_channel_and_images_that_begin_between_vectors(emulated):
    check(emulated, picture((32, 2, 40, 33), "CHWN", torch.float32).detach(), "CHWN", WINDOWS["3x3/2"])
    check(emulated, picture((9, 2, 40, 33), "CHWN", torch.bfloat16).detach()[1:], "CHWN", WINDOWS["3x3/2"])
    off_by_one = torch.randn(1 + 2 * 6 * 5 * 8)[1:].view(2, 6, 5, 8).permute(3, 0, 1, 2)
    check(emulated, off_by_one, "CHWN", WINDOWS["3x3/2"])


def test_nan_and_infinity(emulated):
    x = picture((8, 5, 9, 9), "CHWN", torch.float32).detach()
    x[0, 0, 2, 2] = x[1, 3, 4, 5] = x[1, 3, 4, 6] = torch.nan
    x[2] = -torch.inf
    for window in WINDOWS.values():
        check(emulated, x, "CHWN", window)


def test_a_window_in_the_padding_alone(emulated):
    window = (2, 2), (1, 1), (2, 2), (3, 3), False
    x = picture((4, 3, 1, 1), "CHWN", torch.float32).detach()
    check(emulated, x, "CHWN", window)
    y, places = emulated.max_pool2d(x, *window)
    assert torch.equal(y.isneginf(), places == reference_pool.NO_PLACE) and y.isneginf().any()


def test_nothing_in_nothing_out(emulated):
    for shape in ((0, 3, 4, 4), (2, 0, 4, 4)):
        check(emulated, torch.zeros(shape), "NCHW", WINDOWS["2x2/2"])


def test_wrong_arguments_are_refused(emulated):
    x, ones, rest = torch.zeros(1, 1, 8, 8), (1, 1), ((1, 1), (0, 0), (1, 1), False)
    for arguments, said in (
        ((x, (2, 2), (2, 2), (2, 0), ones, False), "at most half the window"),
        ((x, (16, 16), *rest), "at most 255 places"),
        ((x, (9, 2), *rest), "too small"),
        ((x, (2,), *rest), "two numbers"),
        ((x[0], (2, 2), *rest), r"\[N, C, H, W\]"),
        ((x.int(), (2, 2), *rest), "float32, bfloat16"),
        ((x, (1, 1), (2**31 - 1,) * 2, (0, 0), ones, False), "31 bits"),
    ):
        with pytest.raises(RuntimeError, match=said):
            emulated.max_pool2d(*arguments)
    y, places = emulated.max_pool2d(x, (2, 2), *rest)
    for g, taken, size in ((y[..., 1:], places, (8, 8)), (y, places[..., 1:], (8, 8)), (y, places.int(), (8, 8)), (y, places, (9, 8))):
        with pytest.raises(RuntimeError, match="Expected"):
            emulated.max_pool2d_backward(g, taken, size, (2, 2), *rest)
