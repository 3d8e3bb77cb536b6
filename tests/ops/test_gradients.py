"""Every operation against finite differences, once and twice; and torch's own checks of its registration."""

from __future__ import annotations

import pytest
import torch
from op_cases import CALLS, IMAGE_LAYOUTS, ROW_LAYOUTS, STORED, examples, operation


def _function_of_leaves(name: str):
    """The operation as a function of its differentiable arguments alone, and those."""
    arguments = list(examples()[name])
    places = [i for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and a.requires_grad]

    def function(*leaves):
        for place, leaf in zip(places, leaves, strict=True):
            arguments[place] = leaf
        return operation(name)(*arguments)

    return function, [arguments[place] for place in places]


@pytest.mark.parametrize("name", CALLS)
def test_gradcheck(name):
    function, leaves = _function_of_leaves(name)
    assert torch.autograd.gradcheck(function, leaves, check_batched_grad=False)


@pytest.mark.parametrize("name", CALLS)
def test_gradgradcheck(name):
    function, leaves = _function_of_leaves(name)
    assert torch.autograd.gradgradcheck(function, leaves)


def _energy(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A scalar that depends on every result."""
    return sum(r.square().sum() for r in ((result,) if isinstance(result, torch.Tensor) else result))


@pytest.mark.parametrize("name", CALLS)
def test_only_the_gradients_asked_for(name):
    """Each differentiable argument alone gets the same gradient as together with the others."""
    function, leaves = _function_of_leaves(name)
    together = torch.autograd.grad(_energy(function(*leaves)), leaves)
    for i, expected in enumerate(together):
        alone = [leaf.detach().requires_grad_(i == j) for j, leaf in enumerate(leaves)]
        _energy(function(*alone)).backward()
        torch.testing.assert_close(alone[i].grad, expected)
        assert all(leaf.grad is None for j, leaf in enumerate(alone) if i != j)


@pytest.mark.parametrize("dtype", STORED.values(), ids=STORED)
@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name, dtype):
    torch.library.opcheck(operation(name).default, examples(dtype)[name])


LAYOUTS = [(name, layout) for name in CALLS for layout in (IMAGE_LAYOUTS if "conv" in name else ROW_LAYOUTS)]


@pytest.mark.parametrize("name, layout", LAYOUTS)
def test_fake_promises_the_real_strides(name, layout):
    """opcheck's fake-tensor test compares shapes, dtypes and strides of every result, here for every layout."""
    lay, _ = (IMAGE_LAYOUTS if "conv" in name else ROW_LAYOUTS)[layout]
    rank = 4 if "conv" in name else 2
    arguments = [
        lay(a.detach()) if isinstance(a, torch.Tensor) and a.dim() == rank and a.shape[0] > 1 else a
        for a in examples(torch.float32)[name]
    ]
    torch.library.opcheck(operation(name).default, tuple(arguments), test_utils=("test_schema", "test_faketensor"))
