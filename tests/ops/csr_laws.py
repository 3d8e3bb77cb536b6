"""What every kernel of the csr_* operations must obey, whoever runs it: equal to the float64 formula, in the layout promised."""

from __future__ import annotations

import torch
from op_cases import IMAGE_LAYOUTS, ROW_LAYOUTS, close, dense_conv, dense_matrix, same_layout_or_ambiguous, sparse_matrix
from torch import Tensor

from grasp_sparse.formats import CsrIndices
from grasp_sparse.ops.dtypes import compute_dtype
from grasp_sparse.ops.layout import empty_rows

STORED = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def on(device: str, indices: CsrIndices) -> CsrIndices:
    return CsrIndices(*(index.to(device) for index in indices))


def check_linear(
    ops, dtype: torch.dtype, shape: tuple[int, int], batch: int, density: float, layout: str, device: str = "cpu"
) -> None:
    """Every operation of the linear family on x [batch, cols] and a weight of this shape."""
    rows, cols = shape
    lay, promised = ROW_LAYOUTS[layout]
    compute = compute_dtype(dtype)
    values, indices, mask = sparse_matrix(rows, cols, density, compute)
    bias = torch.randn(rows, dtype=compute)
    x, g = (torch.randn(batch, n, dtype=torch.float64).to(dtype) for n in shape[::-1])
    weight, wide_x, wide_g = dense_matrix(values.double(), mask), x.double(), g.double()
    case = f"density {density}, batch {batch}"
    v, b, lx, lg, indices = values.to(device), bias.to(device), lay(x.to(device)), lay(g.to(device)), on(device, indices)

    def expect(name: str, got: Tensor, wanted: Tensor, like: Tensor | None = None) -> None:
        close(got.cpu(), wanted, f"{name}, {case}")
        if like is not None:
            assert got.dtype == dtype
            assert same_layout_or_ambiguous(like, got, promised), f"{name}, {case}"
        else:
            assert got.dtype == compute and got.is_contiguous()

    dvalues = (wide_g.t() @ wide_x)[mask].unsqueeze(0)
    expect("csr_spmm", ops.csr_spmm(v, *indices, None, lx), wide_x @ weight.t(), lx)
    y = ops.csr_spmm(v, *indices, b, lx, True)
    expect("csr_spmm with bias and ReLU", y, (wide_x @ weight.t() + bias.double()).relu(), lx)
    expect("csr_spmm_t", ops.csr_spmm_t(v, *indices, lg), wide_g @ weight, lg)
    expect("csr_sddmm", ops.csr_sddmm(*indices, lg, lx), dvalues)

    dx, dv, db = ops.csr_spmm_backward(v, *indices, lg, lx)
    expect("dx", dx, wide_g @ weight, lg), expect("dvalues", dv, dvalues), expect("dbias", db, wide_g.sum(0))
    gated = wide_g * (y.cpu() > 0)
    for gate in (y, y.contiguous()):
        dx, dv, db = ops.csr_spmm_backward(v, *indices, lg, lx, gate, True)
        close(dx.cpu(), gated @ weight, f"gated dx, {case}")
        like = lg if gate.stride() == lg.stride() else lg.contiguous()
        assert dx.numel() == 0 or dx.stride() == empty_rows(like, x.shape).stride(), f"gated dx, {case}: {dx.stride()}"
        expect("gated dvalues", dv, (gated.t() @ wide_x)[mask].unsqueeze(0)), expect("gated dbias", db, gated.sum(0))
    dx, dv, _ = ops.csr_spmm_backward(v, *indices, lg, lx, y, False)
    assert dx.numel() == 0
    expect("gated dvalues alone", dv, (gated.t() @ wide_x)[mask].unsqueeze(0))


def check_conv(
    ops, dtype: torch.dtype, window: tuple, channels: int, filters: int, batch: int, density: float, layout: str,
    device: str = "cpu",
) -> None:  # fmt: skip
    """Every operation of the convolution family; window as in op_cases.WINDOWS."""
    kernel, stride, padding, dilation, image = window
    lay, promised = IMAGE_LAYOUTS[layout]
    compute = compute_dtype(dtype)
    values, indices, mask = sparse_matrix(filters, channels * kernel[0] * kernel[1], density, compute)
    bias = torch.randn(filters, dtype=compute)
    x = torch.randn(batch, channels, *image, dtype=torch.float64).to(dtype)
    weight = dense_matrix(values.double(), mask).view(filters, channels, *kernel).requires_grad_()
    wide_x = x.double().requires_grad_()
    wanted = dense_conv(wide_x, weight, None, stride, padding, dilation)
    g = torch.randn(wanted.shape, dtype=torch.float64).to(dtype)
    wanted_dx, wanted_dw = torch.autograd.grad(wanted, (wide_x, weight), g.double())
    wanted_dv = wanted_dw.flatten(1)[mask].unsqueeze(0)
    case = f"density {density}, batch {batch}"
    v, b, lx, lg, indices = values.to(device), bias.to(device), lay(x.to(device)), lay(g.to(device)), on(device, indices)
    place = (kernel, stride, padding, dilation)

    def expect(name: str, got: Tensor, wanted: Tensor, like: Tensor | None = None) -> None:
        close(got.cpu(), wanted.detach(), f"{name}, {case}")
        assert got.dtype == (compute if like is None else dtype)
        assert got.is_contiguous() if like is None else same_layout_or_ambiguous(like, got, promised), f"{name}, {case}"

    expect("csr_conv2d_fprop", ops.csr_conv2d_fprop(v, *indices, b, lx, *place), wanted + bias.double()[:, None, None], lx)
    expect("csr_conv2d_dgrad", ops.csr_conv2d_dgrad(v, *indices, lg, image, *place), wanted_dx, lg)
    expect("csr_conv2d_wgrad", ops.csr_conv2d_wgrad(*indices, lg, lx, *place), wanted_dv)
    dx, dv, db = ops.csr_conv2d_backward(v, *indices, lg, lx, *place)
    expect("dx", dx, wanted_dx, lg), expect("dvalues", dv, wanted_dv), expect("dbias", db, g.double().sum((0, 2, 3)))
