"""Batch norm on CUDA, run by the emulator, equals its reference: every type, layout, residual and ReLU, whole vectors and rests."""

from __future__ import annotations

import pytest
import torch
from csr_laws import STORED
from op_cases import IMAGE_LAYOUTS, NORM_CASES, close, norm_inputs
from random_cases import off_by_one

from grasp_sparse.ops import reference
from grasp_sparse.ops.dtypes import compute_dtype

EPS = 1e-5
# One share and several of a channel, in whole vectors and not; more channels than a grid of the device, one value more than one.
SHAPES = [(3, 5, 7, 7), (8, 3, 33, 65), (7, 2, 61, 61), (130, 24, 2, 2), (33, 67, 4, 4), (1, 1, 1, 2)]
CHWN = IMAGE_LAYOUTS["CHWN"][0]
LAYOUTS = {name: lay for name, (lay, _) in IMAGE_LAYOUTS.items()} | {
    "CHWN-off-by-one": lambda x: off_by_one(x.permute(1, 2, 3, 0).contiguous()).permute(3, 0, 1, 2),
    "expanded": lambda x: x[:1, :1, :1, :1].expand(x.shape),
}
dtypes = pytest.mark.parametrize("dtype", STORED.values(), ids=STORED)


def rounded(tensors, dtype):
    """x and residual as they are stored, vectors as they are computed with."""
    return [t if t is None else t.to(dtype if t.dim() == 4 else compute_dtype(dtype)) for t in tensors]


def exact(tensors):
    return [t.double() if isinstance(t, torch.Tensor) else t for t in tensors]


def lie_alike(a, b) -> bool:
    return all(s == t for size, s, t in zip(a.shape, a.stride(), b.stride(), strict=True) if size > 1)


def check(emulated, dtype, shape, case, x_lies, g_lies=None, r_lies=None) -> None:
    residual, relu, affine = case
    x, r, w, b = rounded(norm_inputs(shape, residual, affine), dtype)
    given = [x_lies(x), None if r is None else (r_lies or x_lies)(r), w, b]
    wanted, (y, mean, var) = reference.batch_norm_train(*exact(given), EPS, relu), emulated.batch_norm_train(*given, EPS, relu)
    for name, got, want in zip(("y", "mean", "var"), (y, mean, var), wanted, strict=True):
        close(got, want, f"{name} {case}")
    assert y.dtype == dtype and lie_alike(y, wanted[0]) and mean.dtype == var.dtype == compute_dtype(dtype)

    kept = emulated.batch_norm_eval(*given, mean, var, EPS, relu)
    assert torch.equal(kept, y) and lie_alike(kept, y)
    close(
        emulated.batch_norm_eval(*given, mean + 1, var * 2, EPS, relu),
        reference.batch_norm_eval(*exact([*given, mean + 1, var * 2]), EPS, relu), f"eval {case}",
    )  # fmt: skip

    g = (g_lies or x_lies)(torch.randn(shape).to(dtype))
    saved = given[0], y if residual and relu else None, w, b, mean, var
    got, wanted = emulated.batch_norm_backward(g, *saved, EPS, relu), reference.batch_norm_backward(*exact([g, *saved]), EPS, relu)
    for name, one, other in zip(("gx", "g_residual", "g_weight", "g_bias"), got, wanted, strict=True):
        close(one, other, f"{name} {case}")
        assert one.dtype == (dtype if name in ("gx", "g_residual") else compute_dtype(dtype)) and lie_alike(one, other)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@dtypes
def test_equals_reference(emulated, dtype, shape):
    for case in NORM_CASES:
        check(emulated, dtype, shape, case, CHWN)


@pytest.mark.parametrize("layout", LAYOUTS)
@dtypes
def test_equals_reference_in_every_layout(emulated, dtype, layout):
    lies = LAYOUTS[layout]
    if layout != "expanded":  # a batch of equal values has no spread to divide by
        check(emulated, dtype, (4, 6, 6, 6), (True, True, True), lies)
    check(emulated, dtype, (4, 6, 6, 6), (True, True, True), CHWN, lies, lies)


@pytest.mark.parametrize("multiprocessors", [1, 7, 1000])
def test_every_way_of_cutting(emulator, emulated, multiprocessors):
    emulator.set_limits(multiprocessors, 64 << 10)
    for shape in ((8, 3, 33, 65), (7, 2, 61, 61), (16, 1, 128, 131)):
        check(emulated, torch.float32, shape, (True, True, True), CHWN)
        check(emulated, torch.bfloat16, shape, (False, True, True), CHWN)


@pytest.mark.parametrize("mean", [1e4, -1e6])
@pytest.mark.parametrize("outlier, rtol", [(False, 2e-6), (True, 3e-5)])
def test_digits_survive_a_large_mean(emulated, mean, outlier, rtol):
    x = norm_inputs((16, 6, 20, 20), False, False, mean=mean)[0].float()
    if outlier:
        x[0, :, 0, 0] = 0
    _, got_mean, got_var = emulated.batch_norm_train(CHWN(x), None, None, None, EPS, False)
    torch.testing.assert_close(got_mean.double(), x.double().mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(got_var.double(), x.double().var((0, 2, 3), correction=0), rtol=rtol, atol=0)


@dtypes
def test_constant_channels(emulated, dtype):
    x = torch.tensor([3.7, -1e4, 0.0], dtype=dtype)[:, None, None].expand(5, 3, 6, 9)
    y, mean, var = emulated.batch_norm_train(CHWN(x), None, None, None, EPS, False)
    assert torch.equal(mean, x[0, :, 0, 0].to(mean.dtype)) and not var.any() and not y.any()


def test_nan_and_infinity_stay_in_their_channel(emulated):
    x, g = torch.randn(4, 6, 5, 5), torch.randn(4, 6, 5, 5)
    x[1, 2, 3, 3], x[0, 4, 0, 0] = torch.nan, torch.inf
    residual = torch.randn_like(x)
    residual[2, 0, 1, 1], residual[2, 1, 1, 1] = torch.nan, -torch.inf
    for r in (None, residual):
        y, mean, var = emulated.batch_norm_train(CHWN(x), r, None, None, EPS, True)
        torch.testing.assert_close(y, reference.batch_norm_train(x, r, None, None, EPS, True)[0], equal_nan=True)
        saved = (CHWN(g), CHWN(x), None if r is None else y, None, None, mean, var, EPS, True)
        for got, want in zip(emulated.batch_norm_backward(*saved), reference.batch_norm_backward(*saved), strict=True):
            torch.testing.assert_close(got, want, equal_nan=True)


@dtypes
def test_the_same_bits_on_every_run(emulated, dtype):
    x, r, w, b = (CHWN(t) if t.dim() == 4 else t for t in rounded(norm_inputs((8, 3, 33, 65), True, True), dtype))
    runs = []
    for _ in range(2):
        y, mean, var = emulated.batch_norm_train(x, r, w, b, EPS, True)
        runs.append((y, mean, var, *emulated.batch_norm_backward(r, x, y, w, b, mean, var, EPS, True)))
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [1, 300])
def test_running_statistics_follow(emulated, dtype, channels):
    running = [torch.rand(channels, dtype=dtype) for _ in range(2)]
    expected, batch = [t.clone() for t in running], [torch.rand(channels, dtype=dtype) for _ in range(2)]
    for count in (2, 1000):
        emulated.batch_norm_follow_(*running, *batch, 0.3, count)
        reference.batch_norm_follow_(*expected, *batch, 0.3, count)
    for got, want in zip(running, expected, strict=True):
        close(got, want)


def test_wrong_arguments_are_refused(emulated):
    x, vector = torch.randn(2, 3, 4, 4), torch.ones(3)
    for arguments, message in (
        ((x[0], None, None, None), r"\[N, C, H, W\]"),
        ((x[:0], None, None, None), "at least one"),
        ((x, x[:, :1], None, None), "residual of the shape"),
        ((x, x.double(), None, None), "residual on the device"),
        ((x, None, vector[:2], None), "weight of 3"),
        ((x, None, vector, vector.double()), "bias on the CPU"),
        ((x.int(), None, None, None), "float32, bfloat16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            emulated.batch_norm_train(*arguments, EPS, False)
    with pytest.raises(RuntimeError, match="y only where relu"):
        emulated.batch_norm_backward(x, x, x, None, None, vector, vector, EPS, False)
    with pytest.raises(RuntimeError, match="g of the shape"):
        emulated.batch_norm_backward(x[:1], x, None, None, None, vector, vector, EPS, False)
    with pytest.raises(RuntimeError, match="mean of 3"):
        emulated.batch_norm_eval(x, None, None, None, vector[:1], vector, EPS, False)
    for wrong in ((vector[:2], vector, vector), (vector.double(), vector, vector), (torch.ones(6)[::2], vector, vector)):
        with pytest.raises(RuntimeError, match="contiguous vectors"):
            emulated.batch_norm_follow_(vector, *wrong, 0.1, 4)
    with pytest.raises(RuntimeError, match="more than one"):
        emulated.batch_norm_follow_(vector, vector, vector, vector, 0.1, 1)
