"""A convolution and the batch norm behind it as one operation: what the two give one after the other, in every layout."""

from __future__ import annotations

import pytest
import torch
from op_cases import COMPILED, IMAGE_LAYOUTS, NORM_CASES, STORED, WINDOWS, close, same_layout_or_ambiguous, sparse_matrix
from torch.utils.flop_counter import FlopCounterMode

from grasp_sparse.formats import csr_from_mask
from grasp_sparse.ops import csr_conv2d_batch_norm, reference
from grasp_sparse.ops.dtypes import compute_dtype
from grasp_sparse.ops.layout import output_size

ops = torch.ops.grasp_sparse
EPS = 1e-5
LAYOUTS = ("NCHW", "channels_last", "CHWN", "sliced")
GEOMETRIES = ("1x1", "1x1-whole-vectors", "1x1-stride2", "3x3", "3x3-stride2", "3x3-dilation2", "4x4-same", "3x3-on-1x40")


def _case(window: str, case: tuple[bool, bool, bool], batch: int, channels: int, filters: int, dtype, lay, mean: float = 0.0):
    """Arguments of csr_conv2d_norm_train; what is an image in this dtype and layout, the rest in what is computed in."""
    kernel, stride, padding, dilation, image = WINDOWS[window]
    with_residual, relu, affine = case
    computed = compute_dtype(dtype)
    values, indices, _ = sparse_matrix(filters, channels * kernel[0] * kernel[1], 0.2, computed)
    x = torch.randn(batch, channels, *image).to(dtype)
    bias = torch.randn(filters, dtype=computed) + mean
    size = (batch, filters, *output_size(image, kernel, stride, padding, dilation))
    residual = lay(torch.randn(size).to(dtype)) if with_residual else None
    weight, shift = (torch.randn(filters, dtype=computed) if affine else None for _ in range(2))
    return [values, *indices, bias, lay(x), residual, weight, shift, EPS, relu, kernel, stride, padding, dilation]


def _leaves(arguments: list) -> list:
    return [t.detach().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments]


def _wanted(arguments: list) -> list[torch.Tensor]:
    return [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]


def _apart(values, crow, col, ccol, row, permutation, bias, x, residual, weight, shift, eps, relu, *window):
    """The two operations; also from where autograd differentiates both."""
    z = ops.csr_conv2d_fprop(values, crow, col, ccol, row, permutation, bias, x, *window)
    return ops.batch_norm_train(z, residual, weight, shift, eps, relu)[0], z


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("window", GEOMETRIES)
@pytest.mark.parametrize("dtype", STORED.values(), ids=STORED)
def test_equals_reference_and_the_two_operations(dtype, window, layout):
    lay, promised = IMAGE_LAYOUTS[layout]
    for case, (batch, channels, filters) in zip(NORM_CASES, [(3, 5, 16), (17, 20, 37), (1, 3, 64), (33, 40, 24)] * 2, strict=True):
        what = f"{case}, {batch} x {channels} -> {filters}"
        arguments = _leaves(_case(window, case, batch, channels, filters, dtype, lay))
        y, z, mean, var = ops.csr_conv2d_norm_train(*arguments)
        apart, between = _apart(*arguments)
        assert torch.equal(z, between) and not z.requires_grad
        assert same_layout_or_ambiguous(arguments[7], y, promised), what
        exact = z.double()  # as stored: a bfloat16 z has been rounded
        variance, center = torch.var_mean(exact, (0, 2, 3), correction=0)
        close(mean, center, what), close(var, variance, what)
        doubles = [t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments]
        close(y, reference.batch_norm_train(exact, *doubles[8:11], EPS, case[1])[0], what)

        g = torch.randn(y.shape).to(dtype)
        dvalues, dbias, dx, *rest = torch.autograd.grad(y, _wanted(arguments), g)
        assert same_layout_or_ambiguous(arguments[7], dx, promised), what
        if layout != "channels_last":  # the two operations, nothing else
            for one, other in zip((dvalues, dbias, dx, *rest), torch.autograd.grad(apart, _wanted(arguments), g), strict=True):
                assert torch.equal(one, other)
            continue
        saved = (g, arguments[7], z, y if case[0] and case[1] else None, *arguments[9:11], mean, var)
        exact = [t.double() if isinstance(t, torch.Tensor) else t for t in saved]
        want = reference.csr_conv2d_norm_backward(doubles[0], *arguments[1:6], *exact, EPS, *arguments[12:])
        # The bias's is all but zero, for a norm takes the mean away: rounding of so much.
        terms = reference.batch_norm_backward(exact[0], *exact[2:], EPS, case[1])[0].abs().sum((0, 2, 3)).max()
        close((dbias / terms).to(dtype), want[2] / terms, what)
        residual = [want[3] if case[1] else g.double()] if case[0] else []
        for one, other in zip((dx, dvalues, *rest), (*want[:2], *residual, *want[4 : 4 + 2 * case[2]]), strict=True):
            scale = other.abs().max().clamp_min(1e-3)  # sums of many, some of which cancel
            close((one.double() / scale).to(dtype), other / scale, what)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", NORM_CASES, ids=str)
def test_gradients_equal_the_float64_reference(case, layout):
    arguments = _leaves(_case("3x3", case, 17, 20, 40, torch.float64, IMAGE_LAYOUTS[layout][0]))
    y, z, mean, var = ops.csr_conv2d_norm_train(*arguments)
    g = torch.randn_like(y)
    values, indices, (_, x, _, weight, shift, eps, relu, *window) = arguments[0], arguments[1:6], arguments[6:]
    gate = y if case[0] and relu else None
    with torch.no_grad():
        saved = (g, x, z, gate, weight, shift, mean, var, eps, relu, *window)
        for input_grad in (True, False):
            got = ops.csr_conv2d_norm_backward(values, *indices, *saved, input_grad)
            for one, other in zip(got, reference.csr_conv2d_norm_backward(values, *indices, *saved, input_grad), strict=True):
                close(one, other)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last"])
@pytest.mark.parametrize("case", NORM_CASES, ids=str)
def test_gradcheck_and_gradgradcheck(case, layout):
    window = ([2, 2], [1, 2], [1, 0, 0, 1], [1, 1])
    values, indices, _ = sparse_matrix(8, 8, 0.3)  # eight float64 channels fill a vector
    with_residual, relu, affine = case
    lay = IMAGE_LAYOUTS[layout][0]
    x, residual = lay(torch.randn(2, 2, 2, 4, dtype=torch.float64)), lay(torch.randn(2, 8, 2, 2, dtype=torch.float64))
    vectors = [torch.randn(8, dtype=torch.float64) for _ in range(3)]
    arguments = [values, vectors[0], x, *([residual] if with_residual else []), *(vectors[1:] if affine else [])]

    def function(values, bias, x, *rest):
        rest = list(rest)
        r = rest.pop(0) if with_residual else None
        return ops.csr_conv2d_norm_train(values, *indices, bias, x, r, *(rest or (None, None)), EPS, relu, *window)[0]

    given = _leaves(arguments)
    assert torch.autograd.gradcheck(function, given, check_batched_grad=False)
    assert torch.autograd.gradgradcheck(function, given)


@pytest.mark.parametrize("case", NORM_CASES[:4], ids=str)
def test_only_the_gradients_asked_for(case):
    arguments = _leaves(_case("3x3", case, 5, 6, 20, torch.float64, IMAGE_LAYOUTS["channels_last"][0]))
    y = ops.csr_conv2d_norm_train(*arguments)[0]
    g = torch.randn_like(y)
    together = iter(torch.autograd.grad(y, _wanted(arguments), g))
    for tensor in _wanted(arguments):
        alone = [t.detach().requires_grad_(t is tensor) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in arguments]
        (got,) = torch.autograd.grad(ops.csr_conv2d_norm_train(*alone)[0], _wanted(alone), g)
        torch.testing.assert_close(got, next(together))


@pytest.mark.parametrize("dtype", STORED.values(), ids=STORED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout, dtype):
    lay, _ = IMAGE_LAYOUTS[layout]
    for case in NORM_CASES:
        arguments = _leaves(_case("3x3-stride2", case, 3, 5, 16, dtype, lay))
        torch.library.opcheck(ops.csr_conv2d_norm_train.default, tuple(arguments))
        with torch.no_grad():
            y, z, mean, var = ops.csr_conv2d_norm_train(*arguments)
            values, indices, (_, x, residual, weight, shift, eps, relu, *window) = arguments[0], arguments[1:6], arguments[6:]
            gate = y if residual is not None and relu else None
            plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in (values, *indices, torch.randn_like(y), x, z, gate, weight, shift)]
            for input_grad in (True, False):
                given = (*plain, mean, var, eps, relu, *window, input_grad)
                torch.library.opcheck(ops.csr_conv2d_norm_backward.default, given)


@pytest.mark.parametrize("outlier, rtol", [(False, 2e-6), (True, 3e-5)])
@pytest.mark.parametrize("mean", [1e4, -1e6])
def test_digits_survive_a_large_mean(mean, outlier, rtol):
    """float32 values of spread around 1 about a million, the first value of a channel far from all others."""
    arguments = _case("3x3", (False, False, False), 16, 20, 20, torch.float32, IMAGE_LAYOUTS["channels_last"][0], mean=mean)
    if outlier:
        arguments[7][0, :, 0, 0] = -1e3
    _, z, got_mean, got_var = ops.csr_conv2d_norm_train(*arguments)
    exact = z.double()
    torch.testing.assert_close(got_mean.double(), exact.mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(got_var.double(), exact.var((0, 2, 3), correction=0), rtol=rtol, atol=0)


def test_constant_channels():
    arguments = _case("3x3", (False, False, False), 5, 4, 20, torch.float32, IMAGE_LAYOUTS["channels_last"][0], mean=3.7)
    arguments[0].zero_()
    y, _, mean, var = ops.csr_conv2d_norm_train(*arguments)
    torch.testing.assert_close(mean, arguments[6], rtol=0, atol=0)
    assert not var.any() and not y.any()


def test_nan_and_infinity_go_where_the_two_operations_let_them():
    for case in NORM_CASES:
        arguments = _case("3x3", case, 4, 6, 24, torch.float32, IMAGE_LAYOUTS["channels_last"][0])
        arguments[7][1, 2, 3, 3] = float("nan")
        arguments[7][0, 4, 0, 0] = float("inf")
        arguments = _leaves(arguments)
        y, apart = ops.csr_conv2d_norm_train(*arguments)[0], _apart(*arguments)[0]
        torch.testing.assert_close(y.isnan(), apart.isnan())
        g = torch.randn_like(y)
        for got, want in zip(*(torch.autograd.grad(result, _wanted(arguments), g) for result in (y, apart)), strict=True):
            torch.testing.assert_close(got.isnan(), want.isnan())


@pytest.mark.parametrize("dtype", STORED.values(), ids=STORED)
@pytest.mark.parametrize("filters", [16, 50])
@pytest.mark.parametrize("image", [True, False], ids=["", "no gradient of x"])
@pytest.mark.parametrize("window, batch", [
    ("1x1-whole-vectors", 33), ("3x3", 1), ("3x3", 40), ("3x3-stride2", 17), ("3x3-on-1x40", 3), ("padding-beyond-kernel", 4),
])  # fmt: skip
def test_same_bits_for_any_number_of_threads(window, batch, image, filters, dtype):
    """Also of so many that each has few channels."""
    arguments = _leaves(_case(window, (True, True, True), batch, 30, filters, dtype, IMAGE_LAYOUTS["channels_last"][0]))
    arguments[7].requires_grad_(image)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5, 16):
            torch.set_num_threads(count)
            y, *rest = ops.csr_conv2d_norm_train(*arguments)
            torch.manual_seed(0)
            results.append([y, *rest, *torch.autograd.grad(y, _wanted(arguments), torch.randn(y.shape).to(dtype))])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(got, want) for got, want in zip(other, results[0], strict=True))


def test_flops_are_those_of_the_convolution():
    arguments = _leaves(_case("3x3", (False, True, True), 5, 4, 16, torch.float32, IMAGE_LAYOUTS["channels_last"][0]))
    expected = 2 * arguments[0].numel() * 5 * 8 * 8
    for given, share in ((arguments, 2), ([*arguments[:7], arguments[7].detach(), *arguments[8:]], 1)):
        with FlopCounterMode(display=False) as counter:
            ops.csr_conv2d_norm_train(*given)[0].sum().backward()
        counts = {str(op).removeprefix("grasp_sparse."): count for op, count in counter.get_flop_counts()["Global"].items()}
        assert counts == {"csr_conv2d_norm_train": expected, "csr_conv2d_norm_backward": share * expected}


@pytest.mark.skipif(not COMPILED, reason="compiled kernels are not loaded")
def test_wrong_arguments_are_refused():
    arguments = _case("3x3", (True, True, True), 2, 3, 16, torch.float32, IMAGE_LAYOUTS["channels_last"][0])
    x, vector = arguments[7], arguments[9]
    for place, wrong, message in (
        (0, arguments[0][:, :-1], "values of"),
        (1, arguments[1] - 1, "crow_indices|indices"),
        (6, vector[:3], "bias"),
        (7, x[0], "x of shape"),
        (7, x[:, :2], "x of shape"),
        (7, x[:0], "at least one"),
        (8, x, "residual of the shape"),
        (9, vector[:3], "weight of 16"),
        (10, vector.double(), "bias"),
        (13, [3], "kernel_size"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.csr_conv2d_norm_train(*arguments[:place], wrong, *arguments[place + 1 :])
    y, z, mean, var = ops.csr_conv2d_norm_train(*arguments)
    values, indices, (_, x, _, weight, shift, eps, relu, *window) = arguments[0], arguments[1:6], arguments[6:]
    saved = [values, *indices, y, x, z, y, weight, shift, mean, var, eps, relu, *window]
    for place, wrong, message in (
        (0, values.double(), "values"),
        (6, y[:1], "g and x of one batch"),
        (6, y.double(), "g on the CPU"),
        (7, x[:, :2], "x of shape"),
        (8, z[:, :, :3], "g of the shape"),
        (9, y[:1], "y of the shape"),
        (12, mean[:2], "mean of 16"),
        (15, False, "y only where relu"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.csr_conv2d_norm_backward(*saved[:place], wrong, *saved[place + 1 :])


def test_a_residual_has_the_dtype_of_the_result_in_float16_too():
    """Which the CPU's kernels compute in float32."""
    torch.manual_seed(0)
    indices = csr_from_mask(torch.rand(16, 8 * 9) < 0.3)
    values, x, residual = torch.randn(1, indices.nnz), torch.randn(2, 8, 5, 5), torch.randn(2, 16, 3, 3)
    half = [t.half() for t in (x, values, residual)]
    settings = (None, None, EPS, True, [3, 3])
    y, *_ = csr_conv2d_batch_norm(half[0], half[1], indices, None, half[2], *settings)
    expected, *_ = csr_conv2d_batch_norm(*(t.float() for t in half[:2]), indices, None, half[2].float(), *settings)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y, expected.half())
