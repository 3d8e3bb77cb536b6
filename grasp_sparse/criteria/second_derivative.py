"""Second derivatives where torch has none: one computed in another way, a sentence for the rest."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch.nn.functional as F
from torch import Tensor, nn

from grasp_sparse.criteria.graph import recorded_operations

# What torch and torchvision say of the backward of an operation that nobody has differentiated.
_MISSING = re.compile(r"derivative for '?(?:aten::)?(\w+?)'? is not implemented|double backwards on (\w+) not supported")


class _TwiceHardsigmoid(nn.Hardsigmoid):
    """``nn.Hardsigmoid`` by its definition, of operations that torch differentiates any number of times."""

    def forward(self, input: Tensor) -> Tensor:
        y = F.relu6(input + 3) / 6
        return input.copy_(y) if self.inplace else y


def use_twice_differentiable(model: nn.Module) -> None:
    """Changes ``model`` (a scratch copy) so that its hard sigmoids have a second derivative: same values, same first one."""
    for module in model.modules():
        if type(module) is nn.Hardsigmoid and "forward" not in vars(module):
            module.__class__ = _TwiceHardsigmoid


@contextmanager
def explained() -> Iterator[None]:
    """Inside, what torch says of a missing second derivative becomes a ValueError that names the operation."""
    try:
        yield
    except RuntimeError as error:
        found = _MISSING.search(str(error))
        if found is None:
            raise
        # Of the backward, aten::_ctc_loss_backward, the user knows the forward.
        raise _missing((found[1] or found[2]).strip("_").removesuffix("_backward")) from error


def check_twice_differentiable(gradients: Iterable[Tensor | None]) -> None:
    """ValueError if a backward marked to be differentiated once gave ``gradients``.

    torch says so only when it runs that backward again. The node it puts there leads to no weight, so it does not, and what
    came out of the first run would count as a constant, without a word.
    """
    if "torch::autograd::Error" in recorded_operations(gradient for gradient in gradients if gradient is not None):
        raise _missing("an autograd function whose backward is marked @once_differentiable")


def _missing(operation: str) -> ValueError:
    return ValueError(
        "Expected a model that can be differentiated twice, which GraSP needs, got one without a second derivative of "
        f"{operation}: use criterion='snip', or another that takes gradients only once or not at all"
    )
