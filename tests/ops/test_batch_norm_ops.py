"""The fused batch norm equals its reference and torch's own chain of operations, in every layout and shape."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from op_cases import COMPILED, DTYPES, IMAGE_LAYOUTS, NORM_CASES, STORED, close, norm_inputs, same_layout_or_ambiguous

from grasp_sparse.ops import reference
from grasp_sparse.ops.dtypes import compute_dtype

ops = torch.ops.grasp_sparse
EPS = 1e-5
SHAPES = [(3, 5, 7, 7), (2, 3, 40, 41), (33, 67, 4, 4), (1, 1, 3, 5), (130, 24, 2, 2), (5, 600, 3, 1), (1, 2, 300, 1)]
SHAPES += [(3, 260, 5, 9), (2, 1100, 9, 5)]  # rows of less and of more than a page, several runs of them


def chain(x, residual, weight, bias, relu):
    """Batch norm, add and ReLU as a network would write them."""
    y = F.batch_norm(x, None, None, weight, bias, True, 0.0, EPS)
    y = y if residual is None else y + residual
    return y.relu() if relu else y


def leaves(tensors, lay, dtype):
    """Images in the layout and dtype, vectors in what it is computed in; asking for gradients."""
    cast = [t if t is None else (lay(t.to(dtype)) if t.dim() == 4 else t.to(compute_dtype(dtype))) for t in tensors]
    return [t if t is None else t.detach().requires_grad_() for t in cast]


def gradients(y, inputs, g):
    return torch.autograd.grad(y, [t for t in inputs if t is not None], g)


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", STORED.values(), ids=STORED)
def test_equals_torch(dtype, shape, layout):
    lay, promised = IMAGE_LAYOUTS[layout]
    for residual, relu, affine in NORM_CASES:
        case = f"residual {residual}, relu {relu}, affine {affine}"
        exact = norm_inputs(shape, residual, affine)
        inputs = leaves(exact, lay, dtype)
        g = lay(torch.randn(shape, dtype=torch.float64).to(dtype))
        y, mean, var = ops.batch_norm_train(*inputs, EPS, relu)
        # The chain runs on what dtype rounded the inputs to, so that both see the same side of the ReLU.
        rounded = leaves(inputs, torch.Tensor.contiguous, torch.float64)
        expected = chain(*rounded, relu)
        close(y, expected, case)
        close(mean, rounded[0].mean((0, 2, 3)), case)
        close(var, rounded[0].var((0, 2, 3), correction=0), case)
        assert same_layout_or_ambiguous(inputs[0], y, promised), case
        for got, want in zip(gradients(y, inputs, g), gradients(expected, rounded, g.double()), strict=True):
            close(got, want, case)
        (gx,) = torch.autograd.grad(ops.batch_norm_train(*inputs, EPS, relu)[0], inputs[:1], g)
        assert same_layout_or_ambiguous(inputs[0], gx, promised), case


@pytest.mark.parametrize("residual, relu, affine", NORM_CASES)
def test_reference_equals_torch(residual, relu, affine):
    x, r, weight, bias = inputs = leaves(norm_inputs((3, 5, 4, 6), residual, affine), torch.Tensor.contiguous, torch.float64)
    expected, g = chain(*inputs, relu), torch.randn(3, 5, 4, 6, dtype=torch.float64)
    y, mean, var = reference.batch_norm_train(*inputs, EPS, relu)
    close(y, expected)
    gx, g_residual, g_weight, g_bias = reference.batch_norm_backward(
        g, x, y if residual and relu else None, weight, bias, mean, var, EPS, relu
    )
    got = [gx, *([g_residual if relu else g] if residual else []), *([g_weight, g_bias] if affine else [])]
    for one, other in zip(got, gradients(expected, inputs, g), strict=True):
        close(one, other)


@pytest.mark.parametrize("r_layout", ["NCHW", "channels_last", "sliced"])
@pytest.mark.parametrize("g_layout", ["NCHW", "channels_last", "CHWN", "sliced"])
@pytest.mark.parametrize("x_layout", ["NCHW", "channels_last", "CHWN", "transposed"])
def test_mixed_layouts(x_layout, g_layout, r_layout):
    exact = norm_inputs((4, 5, 6, 7), True, True)
    inputs = leaves(exact, torch.Tensor.contiguous, torch.float64)
    g = torch.randn(4, 5, 6, 7, dtype=torch.float64)
    mixed = [IMAGE_LAYOUTS[x_layout][0](inputs[0]), IMAGE_LAYOUTS[r_layout][0](inputs[1]), *inputs[2:]]
    y, *_ = ops.batch_norm_train(*mixed, EPS, True)
    expected = chain(*inputs, True)
    close(y, expected)
    for got, want in zip(gradients(y, inputs, IMAGE_LAYOUTS[g_layout][0](g)), gradients(expected, inputs, g), strict=True):
        close(got, want)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "CHWN"])
def test_expanded_gradient(layout):
    """What y.sum().backward() hands on: one number with all strides zero."""
    inputs = leaves(norm_inputs((4, 5, 6, 7), True, True), IMAGE_LAYOUTS[layout][0], torch.float64)
    got = torch.autograd.grad(ops.batch_norm_train(*inputs, EPS, True)[0].sum(), inputs)
    for one, other in zip(got, torch.autograd.grad(chain(*inputs, True).sum(), inputs), strict=True):
        close(one, other)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "CHWN"])
@pytest.mark.parametrize("outlier, rtol", [(False, 2e-6), (True, 3e-5)])
@pytest.mark.parametrize("mean", [1e4, -1e6])
def test_digits_survive_a_large_mean(mean, outlier, rtol, layout):
    """float32 values of spread 1 around a million: the statistics lose little against float64 on the same values.

    The first value of a channel, far from all others, is the worst case: up to five bits of the variance of its run of rows.
    """
    x = norm_inputs((16, 6, 20, 20), False, False, mean=mean)[0].float()
    if outlier:
        x[0, :, 0, 0] = 0
    _, got_mean, got_var = ops.batch_norm_train(IMAGE_LAYOUTS[layout][0](x), None, None, None, EPS, False)
    exact = x.double()
    torch.testing.assert_close(got_mean.double(), exact.mean((0, 2, 3)), rtol=1e-7, atol=0)
    torch.testing.assert_close(got_var.double(), exact.var((0, 2, 3), correction=0), rtol=rtol, atol=0)


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "CHWN"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_constant_channels(dtype, layout):
    x = IMAGE_LAYOUTS[layout][0](torch.tensor([3.7, -1e5, 0.0], dtype=dtype)[:, None, None].expand(5, 3, 6, 9).contiguous())
    y, mean, var = ops.batch_norm_train(x, None, None, None, EPS, False)
    torch.testing.assert_close(mean, x[0, :, 0, 0], rtol=0, atol=0)
    assert not var.any() and not y.any()


@pytest.mark.parametrize("layout", ["NCHW", "channels_last", "CHWN"])
def test_nan_and_infinity_go_where_torch_lets_them(layout):
    lay, _ = IMAGE_LAYOUTS[layout]
    x = torch.randn(4, 6, 5, 5)
    x[1, 2, 3, 3], x[0, 4, 0, 0] = float("nan"), float("inf")
    residual = torch.randn_like(x)
    residual[2, 0, 1, 1], residual[2, 1, 1, 1] = float("nan"), float("-inf")
    g = torch.randn_like(x)
    for r in (None, residual):
        inputs = leaves((x, r), lay, torch.float32)
        y, *_ = ops.batch_norm_train(*inputs, None, None, EPS, True)
        expected = chain(*inputs, None, None, True)
        torch.testing.assert_close(y, expected, equal_nan=True)
        for got, want in zip(gradients(y, inputs, g), gradients(expected, inputs, g), strict=True):
            torch.testing.assert_close(got, want, equal_nan=True)


@pytest.mark.parametrize("residual, relu, affine", NORM_CASES)
def test_gradcheck_and_gradgradcheck(residual, relu, affine):
    inputs = leaves(norm_inputs((3, 2, 3, 2), residual, affine), torch.Tensor.contiguous, torch.float64)
    places = [i for i, t in enumerate(inputs) if t is not None]

    def function(*given):
        arguments = list(inputs)
        for place, tensor in zip(places, given, strict=True):
            arguments[place] = tensor
        return ops.batch_norm_train(*arguments, EPS, relu)[0]

    given = [inputs[i] for i in places]
    assert torch.autograd.gradcheck(function, given, check_batched_grad=False)
    assert torch.autograd.gradgradcheck(function, given)


@pytest.mark.parametrize("layout", IMAGE_LAYOUTS)
@pytest.mark.parametrize("residual, relu, affine", NORM_CASES)
def test_by_given_statistics(residual, relu, affine, layout):
    """Equals torch's evaluation and its gradients, of any order."""
    lay, promised = IMAGE_LAYOUTS[layout]
    exact = norm_inputs((3, 5, 4, 6), residual, affine)
    mean, var = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.5

    def stock(x, r, w, b):
        y = F.batch_norm(x, mean, var, w, b, False, 0.0, EPS)
        y = y if r is None else y + r
        return y.relu() if relu else y

    results = []
    for function, lies in ((lambda *t: ops.batch_norm_eval(*t, mean, var, EPS, relu), lay), (stock, torch.Tensor.contiguous)):
        x, *_ = inputs = leaves(exact, lies, torch.float64)
        y = function(*inputs)
        first = torch.autograd.grad(y.square().sum(), [t for t in inputs if t is not None], create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), x)
        results.append((y, *first, *second))
    assert same_layout_or_ambiguous(lay(exact[0]), results[0][0], promised)
    for got, want in zip(*results, strict=True):
        close(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_opcheck_by_given_statistics(dtype):
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    mean, var = torch.randn(5, dtype=computed), torch.rand(5, dtype=computed) + 0.5
    for residual, relu, affine in NORM_CASES:
        x, r, w, b = norm_inputs((3, 5, 4, 6), residual, affine)
        images = leaves((x, r), IMAGE_LAYOUTS["CHWN"][0], dtype)
        vectors = leaves((w, b), torch.Tensor.contiguous, computed)
        torch.library.opcheck(ops.batch_norm_eval.default, (*images, *vectors, mean, var, EPS, relu))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_running_statistics_follow_as_torchs_do(dtype):
    x = torch.randn(4, 5, 3, 3, dtype=dtype) * 2 + 1
    running = [torch.rand(5, dtype=dtype), torch.rand(5, dtype=dtype)]
    expected = [t.clone() for t in running]
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    torch.library.opcheck(ops.batch_norm_follow_.default, (*running, mean, var, 0.3, 36))
    for _ in range(3):
        ops.batch_norm_follow_(*running, mean, var, 0.3, 36)
        F.batch_norm(x, *expected, None, None, True, 0.3)
    for got, want in zip(running, expected, strict=True):
        close(got, want)


@pytest.mark.parametrize("residual, relu, affine", NORM_CASES)
def test_only_the_gradients_asked_for(residual, relu, affine):
    exact = norm_inputs((3, 4, 3, 3), residual, affine)
    inputs = leaves(exact, torch.Tensor.contiguous, torch.float64)
    g = torch.randn(3, 4, 3, 3, dtype=torch.float64)
    together = iter(gradients(ops.batch_norm_train(*inputs, EPS, relu)[0], inputs, g))
    for i, tensor in enumerate(inputs):
        if tensor is not None:
            alone = [t if t is None else t.detach().requires_grad_(i == j) for j, t in enumerate(inputs)]
            (got,) = torch.autograd.grad(ops.batch_norm_train(*alone, EPS, relu)[0], [alone[i]], g)
            torch.testing.assert_close(got, next(together))


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [*((torch.float32, layout) for layout in IMAGE_LAYOUTS), *((dtype, "channels_last") for dtype in (torch.float64, torch.bfloat16))],
)
def test_opcheck(dtype, layout):
    lay, _ = IMAGE_LAYOUTS[layout]
    for residual, relu, affine in NORM_CASES:
        x, r, w, b = inputs = leaves(norm_inputs((3, 5, 4, 6), residual, affine), lay, dtype)
        torch.library.opcheck(ops.batch_norm_train.default, (*inputs, EPS, relu))
        with torch.no_grad():
            y, mean, var = ops.batch_norm_train(*inputs, EPS, relu)
            plain = [t if t is None else t.detach() for t in (x, y if residual and relu else None, w, b, mean, var)]
            torch.library.opcheck(ops.batch_norm_backward.default, (torch.randn_like(x), *plain, EPS, relu))


@pytest.mark.skipif(not COMPILED, reason="compiled kernels are not loaded")
def test_wrong_arguments_are_refused():
    x, vector = torch.randn(2, 3, 4, 4), torch.ones(3)
    for arguments, message in (
        ((x[0], None, None, None), r"\[N, C, H, W\]"),
        ((x[:0], None, None, None), "at least one"),
        ((x, x[:1], None, None), "residual of the shape"),
        ((x, x.double(), None, None), "residual"),
        ((x, None, vector[:2], None), "weight of 3"),
        ((x, None, vector, vector.double()), "bias"),
        ((x.half(), None, None, None), "float32 or float64"),
        ((x.bfloat16(), None, vector.bfloat16(), None), "weight"),
    ):
        with torch.no_grad(), pytest.raises(RuntimeError, match=message):
            ops.batch_norm_train(*arguments, EPS, False)
    with torch.no_grad(), pytest.raises(RuntimeError, match="var of 3"):
        ops.batch_norm_eval(x, None, None, None, vector, vector[:2], EPS, False)
    with pytest.raises(RuntimeError, match="y only where relu"):
        ops.batch_norm_backward(x, x, x, None, None, vector, vector, EPS, False)
    with pytest.raises(RuntimeError, match="g of the shape"):
        ops.batch_norm_backward(x[:1], x, None, None, None, vector, vector, EPS, False)
    with pytest.raises(RuntimeError, match="mean of 3"):
        ops.batch_norm_backward(x, x, None, None, None, vector[:1], vector, EPS, False)
