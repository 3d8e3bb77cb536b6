"""Laws that hold for every call, on calls that hypothesis makes up: any shape, window, layout, mask and precision.

    pytest tests/ops/test_properties.py                              the same cases every time, a few seconds
    pytest tests/ops/test_properties.py --hypothesis-profile=long    new cases, as long as you like

Every operation on a sparse weight takes part, by the names of its arguments; a new one need not be listed here. So do max pooling and
the optimizers' updates; batch norm is in test_norm_properties.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import update_cases
from call_laws import arguments_of, check_against_reference, check_threads, lie_alike
from hypothesis import given
from hypothesis import strategies as st
from op_cases import close
from random_cases import MASKS, ConvCase, LinearCase, conv_cases, linear_cases, pooling_cases, symmetric_conv_cases
from torch import Tensor, nn

from grasp_sparse.nn import SparseConv2d, SparseLinear
from grasp_sparse.ops import reference_pool
from grasp_sparse.ops.schema import BLOCK_SCHEMAS, POOL_SCHEMAS, SCHEMAS

ops = torch.ops.grasp_sparse
LINEAR = [name for name in SCHEMAS if "conv2d" not in name]
CONV = [name for name in SCHEMAS if "conv2d" in name]
BLOCK_LINEAR = [name for name in BLOCK_SCHEMAS if "conv2d" not in name]
BLOCK_CONV = [name for name in BLOCK_SCHEMAS if "conv2d" in name]


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


@given(pooling_cases)
def test_max_pool_equals_reference(case):
    available = case.arguments()
    arguments = arguments_of("max_pool2d", available)
    results = ops.max_pool2d(*arguments)
    for got, want in zip(results, reference_pool.max_pool2d(*arguments), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        assert lie_alike(got, want)
    available["places"] = results[1]
    check_against_reference(["max_pool2d_backward"], available)
    check_threads(list(POOL_SCHEMAS), available)


updates = {
    "dtype": st.sampled_from(list(update_cases.TOLERANCE)),
    "layout": st.sampled_from(sorted(update_cases.LAYOUTS)),
    "masked": st.booleans(),
    "density": st.sampled_from((0.0, 0.5, 1.0)),
    "shapes": st.lists(st.sampled_from(update_cases.SHAPES) | st.lists(st.integers(0, 20), max_size=4).map(tuple), min_size=1, max_size=4),
    "maximize": st.booleans(),
    "weight_decay": st.sampled_from((0.0, 0.1)),
}
left_out = st.none() | st.sampled_from((0.0, 1.0, float("nan")))


@given(
    **updates, found_inf=left_out, momentum=st.sampled_from((0.0, 0.9)), dampening=st.sampled_from((0.0, 0.2)),
    nesterov=st.booleans(), first_step=st.booleans(), with_momentum=st.booleans(),
)  # fmt: skip
def test_sgd_equals_reference(found_inf, with_momentum, **case):
    made = update_cases.arguments("sgd_update_", **case)
    update_cases.check("sgd_update_", made if with_momentum else [*made[:2], [], *made[3:]], found_inf=found_inf)


@given(
    **updates, found_inf=left_out, beta1=st.sampled_from((0.0, 0.9)), beta2=st.sampled_from((0.9, 0.999)),
    eps=st.sampled_from((1e-8, 1e-3)),
)  # fmt: skip
def test_adamw_equals_reference(found_inf, **case):
    update_cases.check("adamw_update_", update_cases.arguments("adamw_update_", **case), found_inf=found_inf)
