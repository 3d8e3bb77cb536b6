"""Laws that hold for every call, on calls that hypothesis makes up: any shape, window, layout, mask and precision.

    pytest tests/ops/test_properties.py                              the same cases every time, a few seconds
    pytest tests/ops/test_properties.py --hypothesis-profile=long    new cases, as long as you like

Every operation of the schema takes part, by the names of its arguments; a new one need not be listed here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from hypothesis import given
from op_cases import close
from random_cases import MASKS, ConvCase, LinearCase, conv_cases, linear_cases, symmetric_conv_cases
from torch import Tensor, nn

from grasp_sparse.nn import SparseConv2d, SparseLinear
from grasp_sparse.ops import reference, reference_blocks
from grasp_sparse.ops.schema import BLOCK_SCHEMAS, SCHEMAS

ops = torch.ops.grasp_sparse
LINEAR = [name for name in SCHEMAS if "conv2d" not in name]
CONV = [name for name in SCHEMAS if "conv2d" in name]
BLOCK_LINEAR = [name for name in BLOCK_SCHEMAS if "conv2d" not in name]
BLOCK_CONV = [name for name in BLOCK_SCHEMAS if "conv2d" in name]


def arguments_of(name: str, available: dict) -> list:
    """In the order of the schema."""
    return [available[argument.name] for argument in getattr(ops, name).default._schema.arguments]


def results_of(result: Tensor | None | Sequence[Tensor | None]) -> list[Tensor | None]:
    return [result] if result is None or isinstance(result, Tensor) else list(result)


def in_float64(available: dict) -> dict:
    """The same numbers, in the strides that they have."""

    def exact(value):
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: exact(value) for name, value in available.items()}


def lie_alike(a: Tensor, b: Tensor) -> bool:
    """The same strides, where a stride means anything."""
    return a.numel() == 0 or all(s == t for size, s, t in zip(a.shape, a.stride(), b.stride(), strict=True) if size > 1)


def check_against_reference(names: list[str], available: dict) -> None:
    exact = in_float64(available)
    for name in names:
        actual = results_of(getattr(ops, name)(*arguments_of(name, available)))
        module = reference_blocks if name in BLOCK_SCHEMAS else reference
        expected = results_of(getattr(module, name)(*arguments_of(name, exact)))
        for got, want in zip(actual, expected, strict=True):
            assert (got is None) == (want is None), name
            if got is not None:
                close(got, want, name)
                assert lie_alike(got, want), f"{name}: strides {got.stride()}, expected {want.stride()}"


@given(linear_cases)
def test_linear_family_equals_reference(case):
    check_against_reference(LINEAR, case.arguments())


@given(conv_cases)
def test_conv_family_equals_reference(case):
    check_against_reference(CONV, case.arguments())


@given(linear_cases)
def test_linear_family_of_blocks_equals_reference(case):
    check_against_reference(BLOCK_LINEAR, case.block_arguments())


@given(conv_cases)
def test_conv_family_of_blocks_equals_reference(case):
    check_against_reference(BLOCK_CONV, case.block_arguments())


def check_threads(names: list[str], available: dict) -> None:
    for name in names:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(results_of(getattr(ops, name)(*arguments_of(name, available))))
        torch.set_num_threads(1)
        for one, two in zip(*results, strict=True):
            assert one is None or torch.equal(one, two), name


@given(linear_cases)
def test_linear_family_has_the_same_bits_with_one_thread_and_two(case):
    check_threads(LINEAR, case.arguments())
    check_threads(BLOCK_LINEAR, case.block_arguments())


@given(conv_cases)
def test_conv_family_has_the_same_bits_with_one_thread_and_two(case):
    check_threads(CONV, case.arguments())
    check_threads(BLOCK_CONV, case.block_arguments())


def check_layer(dense: nn.Module, make: Callable[[nn.Module, Tensor], nn.Module], case: LinearCase | ConvCase) -> None:
    """Output and every gradient are those of the dense layer whose weight is held at zero off the mask."""
    arguments = case.arguments()
    x, g = arguments["x"], arguments["g"]
    mask = MASKS[case.mask](dense.weight.shape[0], dense.weight[0].numel()).view_as(dense.weight)
    dense = dense.to(x.dtype)  # both begin with the same rounded weights
    sparse = make(copy.deepcopy(dense), mask)
    with torch.no_grad():
        dense.double().weight.mul_(mask)
    inputs = x.detach().requires_grad_(), x.double().detach().requires_grad_()
    outputs = sparse(inputs[0]), dense(inputs[1])
    outputs[0].backward(g)
    outputs[1].backward(g.double())
    close(outputs[0], outputs[1], "output")
    close(inputs[0].grad, inputs[1].grad, "gradient of x")
    close(sparse.values.grad, dense.weight.grad[mask].unsqueeze(0), "gradient of the values")
    if case.bias:
        close(sparse.bias.grad, dense.bias.grad, "gradient of the bias")


@given(linear_cases.filter(lambda case: case.rows and case.cols))
def test_linear_layer_equals_the_masked_dense_one(case):
    check_layer(nn.Linear(case.cols, case.rows, case.bias), SparseLinear.from_dense, case)


@given(symmetric_conv_cases.filter(lambda case: case.rows and case.channels))
def test_conv_layer_equals_the_masked_dense_one(case):
    top, _, left, _ = case.padding
    dense = nn.Conv2d(
        case.channels, case.rows, case.kernel, stride=case.stride, padding=(top, left), dilation=case.dilation, bias=case.bias
    )
    check_layer(dense, SparseConv2d.from_dense, case)
