"""Every operation against finite differences, once and twice; and torch's own checks of its registration."""

from __future__ import annotations

import pytest
import torch
from op_cases import DTYPES, IMAGE_LAYOUTS, OPERATIONS, ROW_LAYOUTS, examples


def _function_of_leaves(name: str):
    """The operation as a function of its differentiable arguments alone, and those."""
    arguments = list(examples()[name])
    places = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.requires_grad]

    def function(*leaves):
        for place, leaf in zip(places, leaves, strict=True):
            arguments[place] = leaf
        return getattr(torch.ops.grasp_sparse, name)(*arguments)

    return function, [arguments[place] for place in places]


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradcheck(name):
    function, leaves = _function_of_leaves(name)
    assert torch.autograd.gradcheck(function, leaves, check_batched_grad=False)


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradgradcheck(name):
    function, leaves = _function_of_leaves(name)
    assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("name", OPERATIONS)
def test_only_the_gradients_asked_for(name):
    """Each differentiable argument alone gets the same gradient as together with the others."""
    function, leaves = _function_of_leaves(name)
    together = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    for i, expected in enumerate(together):
        alone = [leaf.detach().requires_grad_(i == j) for j, leaf in enumerate(leaves)]
        function(*alone).square().sum().backward()
        torch.testing.assert_close(alone[i].grad, expected)
        assert all(leaf.grad is None for j, leaf in enumerate(alone) if i != j)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_opcheck(name, dtype):
    torch.library.opcheck(getattr(torch.ops.grasp_sparse, name).default, examples(dtype)[name])


@pytest.mark.parametrize("layout", ["feature-major", "sliced", "channels_last", "CHWN", "transposed"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_fake_promises_the_real_strides(name, layout):
    """opcheck's fake-tensor test compares shapes, dtypes and strides of every result, here for other layouts."""
    arguments = list(examples(torch.float32)[name])
    rank = 4 if "conv" in name else 2
    if layout not in (IMAGE_LAYOUTS if rank == 4 else ROW_LAYOUTS):
        pytest.skip("a layout of the other family")
    lay = (IMAGE_LAYOUTS if rank == 4 else ROW_LAYOUTS)[layout][0]
    for i, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor) and argument.dim() == rank and argument.shape[0] > 1:
            arguments[i] = lay(argument.detach())
    operation = getattr(torch.ops.grasp_sparse, name).default
    torch.library.opcheck(operation, tuple(arguments), test_utils=("test_schema", "test_faketensor"))
