"""Wrong arguments given straight to an operation are refused; nothing is read or written out of bounds."""

from __future__ import annotations

import pytest
import torch
from op_cases import COMPILED, OPERATIONS, examples

from grasp_sparse.formats import csr_from_mask

INDEX_NAMES = ("crow_indices", "col_indices", "ccol_indices", "row_indices", "permutation")
REFUSED = (RuntimeError, IndexError, ValueError)


def _set(place, number):
    def change(index):
        index[place] = number

    return change


CORRUPTIONS = {
    "last far too large": _set(-1, 2**30),
    "first negative": _set(0, -1),
    "first far too large": _set(0, 2**30),
    "middle negative": _set(2, -(2**30)),
    "middle too large": _set(2, 10_000),
}
# The lists that an operation walks: forward by rows, transposed by columns, weight gradient by rows, joint backward both.
WALKED = {
    **dict.fromkeys(("csr_spmm", "csr_sddmm", "csr_conv2d_fprop", "csr_conv2d_wgrad"), INDEX_NAMES[:2]),
    **dict.fromkeys(("csr_spmm_t", "csr_conv2d_dgrad"), INDEX_NAMES[2:]),
    **dict.fromkeys(("csr_spmm_backward", "csr_conv2d_backward"), INDEX_NAMES),
    **dict.fromkeys(("bsr_spmm", "bsr_sddmm", "bsr_conv2d_fprop", "bsr_conv2d_wgrad"), INDEX_NAMES[:2]),
    **dict.fromkeys(("bsr_spmm_t", "bsr_conv2d_dgrad"), INDEX_NAMES[2:]),
}


def _call(name, arguments):
    return getattr(torch.ops.grasp_sparse, name)(*arguments)


@pytest.mark.skipif(not COMPILED, reason="the reference reads indices through torch's own checks, and not all of them")
@pytest.mark.parametrize("change", CORRUPTIONS.values(), ids=CORRUPTIONS)
@pytest.mark.parametrize("name, index", [(name, index) for name in OPERATIONS for index in WALKED[name]])
def test_corrupt_index_is_refused(name, index, change):
    arguments = list(examples(torch.float32)[name])
    place = INDEX_NAMES.index(index) + (0 if "sddmm" in name or "wgrad" in name else 1)
    arguments[place] = arguments[place].clone()
    change(arguments[place])
    with pytest.raises(REFUSED):
        _call(name, arguments)


@pytest.mark.skipif(not COMPILED, reason="the reference takes any integer type")
@pytest.mark.parametrize("name", OPERATIONS)
def test_wrong_index_type_or_length_is_refused(name):
    for index in WALKED[name]:
        place = INDEX_NAMES.index(index) + (0 if "sddmm" in name or "wgrad" in name else 1)
        for change in (torch.Tensor.long, torch.Tensor.float, lambda t: t[:-1], lambda t: t.unsqueeze(0), lambda t: t[:0]):
            arguments = list(examples(torch.float32)[name])
            arguments[place] = change(arguments[place])
            with pytest.raises(REFUSED):
                _call(name, arguments)


def _place(name: str, argument: str) -> int:
    schema = getattr(torch.ops.grasp_sparse, name).default._schema
    return [a.name for a in schema.arguments].index(argument)


WRONG = [  # operation, argument, how it is made wrong
    ("csr_spmm", "x", lambda x: x[:, :-1]),
    ("csr_spmm", "x", torch.Tensor.double),
    ("csr_spmm", "values", lambda v: v[:, :-1]),
    ("csr_spmm", "bias", lambda b: b[:-1]),
    ("csr_spmm_t", "g", lambda g: g[:, :-1]),
    ("csr_spmm_t", "g", torch.Tensor.double),
    ("csr_spmm_t", "values", lambda v: v[:, :-1]),
    ("csr_sddmm", "g", lambda g: g[:-1]),
    ("csr_sddmm", "x", torch.Tensor.double),
    ("csr_conv2d_fprop", "x", lambda x: x[:, :-1]),
    ("csr_conv2d_fprop", "x", torch.Tensor.double),
    ("csr_conv2d_fprop", "values", lambda v: v[:, :-1]),
    ("csr_conv2d_fprop", "bias", lambda b: b[:-1]),
    ("csr_conv2d_fprop", "kernel_size", lambda _: [2, 2]),
    ("csr_conv2d_fprop", "stride", lambda _: [0, 1]),
    ("csr_conv2d_dgrad", "g", lambda g: g[:, :-1]),
    ("csr_conv2d_dgrad", "g", torch.Tensor.double),
    ("csr_conv2d_dgrad", "values", lambda v: v[:, :-1]),
    ("csr_conv2d_wgrad", "g", lambda g: g[:-1]),
    ("csr_conv2d_wgrad", "x", torch.Tensor.double),
    ("csr_spmm_backward", "g", lambda g: g[:-1]),
    ("csr_spmm_backward", "values", lambda v: v[:, :-1]),
    ("csr_conv2d_backward", "x", torch.Tensor.double),
    ("csr_conv2d_backward", "values", lambda v: v[:, :-1]),
    ("csr_conv2d_backward", "g", lambda g: g[:, :-1]),
    ("bsr_spmm", "values", lambda v: v[:-1]),
    ("bsr_spmm", "values", torch.Tensor.double),
    ("bsr_spmm", "bias", lambda b: b[:-1]),
    ("bsr_spmm", "out_features", lambda _: 7),
    ("bsr_spmm_t", "in_features", lambda _: 7),
    ("bsr_sddmm", "g", lambda g: g[:-1]),
    ("bsr_conv2d_fprop", "values", lambda v: v[:-1]),
    ("bsr_conv2d_fprop", "out_channels", lambda _: 5),
    ("bsr_conv2d_fprop", "kernel_size", lambda _: [2, 2]),
    ("bsr_conv2d_dgrad", "in_channels", lambda _: 7),
    ("bsr_conv2d_wgrad", "g", lambda g: g[:-1]),
]
WRONG_FOR_KERNELS = [  # what the reference's torch functions accept, but a kernel must not
    ("csr_conv2d_fprop", "x", lambda x: x[0]),
    ("csr_spmm", "x", lambda x: x[0]),
    ("csr_sddmm", "g", lambda g: g[:, :-1]),
    ("csr_sddmm", "x", lambda x: x[:, :-1]),
    ("csr_spmm", "bias", torch.Tensor.double),
    ("csr_conv2d_fprop", "kernel_size", lambda _: [3, 2, 1]),
    ("csr_conv2d_fprop", "padding", lambda _: [1, 1]),
    ("csr_conv2d_fprop", "dilation", lambda _: [0, 1]),
    ("csr_conv2d_fprop", "stride", lambda _: [-1, 1]),
    ("csr_conv2d_fprop", "x", lambda x: x[:, :, :1, :1]),
    ("csr_conv2d_dgrad", "input_size", lambda _: [9, 4]),
    ("csr_conv2d_dgrad", "input_size", lambda _: [-1, 4]),
    ("csr_conv2d_dgrad", "g", lambda g: g[:, :, :-1]),
    ("csr_conv2d_wgrad", "g", lambda g: g[:, :, :, :-1]),
    ("csr_conv2d_wgrad", "g", lambda g: g[:, :-1]),
    ("csr_conv2d_wgrad", "x", lambda x: x[:, :-1]),
    ("csr_spmm_backward", "x", lambda x: x[:, :-1]),
    ("csr_conv2d_backward", "g", lambda g: g[:, :, :-1]),
    ("bsr_spmm", "x", lambda x: x[0]),
    ("bsr_spmm", "x", lambda x: x[:, :2]),
    ("bsr_spmm", "values", lambda v: v.flatten(1)),
    ("bsr_spmm", "out_features", lambda _: -1),
    ("bsr_spmm", "out_features", lambda _: 2**62),
    ("bsr_spmm_t", "g", lambda g: g[:, :2]),
    ("bsr_sddmm", "block_size", lambda _: [2]),
    ("bsr_sddmm", "block_size", lambda _: [2, 0]),
    ("bsr_sddmm", "block_size", lambda _: [2**40, 3]),
    ("bsr_sddmm", "block_size", lambda _: [1, 2]),
    ("bsr_sddmm", "block_size", lambda _: [3, 1]),
    ("bsr_sddmm", "x", torch.Tensor.double),
    ("bsr_conv2d_fprop", "x", lambda x: x[:, :2]),
    ("bsr_conv2d_fprop", "x", lambda x: x[0]),
    ("bsr_conv2d_dgrad", "g", lambda g: g[:, :, :-1]),
    ("bsr_conv2d_dgrad", "input_size", lambda _: [9, 4]),
    ("bsr_conv2d_wgrad", "block_size", lambda _: [2, 5]),
    ("bsr_conv2d_wgrad", "x", lambda x: x[:, :2]),
]


def _id(value) -> str | None:
    return value if isinstance(value, str) else getattr(value, "__name__", "").replace("<lambda>", "wrong") or None


@pytest.mark.parametrize("name, argument, change", WRONG + (WRONG_FOR_KERNELS if COMPILED else []), ids=_id)
def test_wrong_argument_is_refused(name, argument, change):
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in examples(torch.float32)[name]]
    place = _place(name, argument)
    arguments[place] = change(arguments[place])
    with pytest.raises(REFUSED):
        _call(name, arguments)


@pytest.mark.skipif(not COMPILED, reason="torch's own checks guard the reference")
@pytest.mark.parametrize("window", ["stride", "padding", "dilation"])
@pytest.mark.parametrize("huge", [2**31, 2**62, 2**63 - 1])
def test_window_that_overflows_is_refused(window, huge):
    arguments = list(examples(torch.float32)["csr_conv2d_fprop"])
    place = {"stride": -3, "padding": -2, "dilation": -1}[window]
    arguments[place] = [huge, *arguments[place][1:]]
    with pytest.raises(RuntimeError, match=f"{window} between"):
        _call("csr_conv2d_fprop", arguments)


@pytest.mark.skipif(not COMPILED, reason="the reference pads for real, and there is not that much memory")
@pytest.mark.parametrize("channels, dilation", [(16, 2**28 - 1), (1, 2**31 - 1), (1, 2**20)])
def test_bands_that_overflow_are_refused(channels, dilation):
    """One pixel that a window of 2 x 2 far apart taps sees: sizes whose product 64 bits do not hold, or 32."""
    indices = csr_from_mask(torch.ones(8, 4 * channels, dtype=torch.bool))
    values, x, g = torch.randn(1, indices.nnz), torch.randn(1, channels, 1, 1), torch.randn(1, 8, 1, 1)
    window = [2, 2], [1, 1], [dilation, 0, dilation, 0], [dilation, dilation]
    for name, arguments in (
        ("csr_conv2d_fprop", (values, *indices, None, x, *window)),
        ("csr_conv2d_wgrad", (*indices, g, x, *window)),
        ("csr_conv2d_dgrad", (values, *indices, g, [1, 1], *window)),
        ("csr_conv2d_backward", (values, *indices, g, x, *window)),
    ):
        with pytest.raises(RuntimeError, match="32-bit offsets"):
            _call(name, arguments)
