"""The CUDA kernels, run by the emulator, equal the reference on calls that hypothesis makes up, on devices of any size."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import close
from random_cases import conv_cases, linear_cases

from grasp_sparse.ops import reference
from grasp_sparse.ops.schema import SCHEMAS

devices = st.tuples(st.sampled_from((1, 3, 40, 1000)), st.sampled_from((24 << 10, 48 << 10, 227 << 10)))


def check(emulator, names: list[str], case, device: tuple[int, int]) -> None:
    emulator.set_limits(*device)
    available = case.arguments()
    exact = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in available.items()}
    for name in names:
        operation = getattr(torch.ops.grasp_sparse_emulated, name)
        arguments = [a.name for a in operation.default._schema.arguments]
        got = operation(*(available[argument] for argument in arguments))
        wanted = getattr(reference, name)(*(exact[argument] for argument in arguments))
        for one, other in zip(*((r,) if isinstance(r, torch.Tensor) else r for r in (got, wanted)), strict=True):
            close(one, other, name)
            strides = zip(one.shape, one.stride(), other.stride(), strict=True)
            assert one.numel() == 0 or all(s == t for size, s, t in strides if size > 1), name


@given(linear_cases, devices)
def test_linear_family_equals_reference(emulator, case, device):
    check(emulator, [name for name in SCHEMAS if "conv2d" not in name], case, device)


@given(conv_cases, devices)
def test_conv_family_equals_reference(emulator, case, device):
    check(emulator, [name for name in SCHEMAS if "conv2d" in name], case, device)
