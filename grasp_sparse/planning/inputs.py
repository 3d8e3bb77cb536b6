"""What every layer is given when the model runs: shape, layout, whether a gradient goes back, how often."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grasp_sparse.ops.layout import is_batch_innermost, is_channels_last
from grasp_sparse.scratch import call_model, scratch_copy

_BATCH_INNERMOST = (1, 2, 3, 0)


class LayerInput(NamedTuple):
    """One kind of input of a layer. Random data can be made from it that cost a layer what the real ones do."""

    shape: tuple[int, ...]
    layout: str  # "row-major", "feature-major" | "nchw", "channels_last", "batch-innermost"
    dtype: torch.dtype
    needs_grad: bool  # the first layer's input has no gradient, so none is computed, dense or sparse

    def random(self, generator: torch.Generator) -> Tensor:
        """Normal numbers in this shape and layout, on the device of `generator`; a leaf that requires a gradient where the real
        input would have one."""
        x = torch.randn(self.shape, generator=generator, device=generator.device).to(self.dtype)
        if self.layout == "channels_last":
            x = x.to(memory_format=torch.channels_last)
        elif self.layout == "batch-innermost":
            x = x.permute(_BATCH_INNERMOST).contiguous().permute(3, 0, 1, 2)
        elif self.layout == "feature-major":
            x = x.t().contiguous().t()
        return x.requires_grad_(self.needs_grad)


def describe_input(x: Tensor) -> LayerInput:
    """The kind of input that ``x`` is."""
    return LayerInput(tuple(x.shape), _layout(x), x.dtype, x.requires_grad)


def _layout(x: Tensor) -> str:
    if x.dim() == 4:
        if is_channels_last(x):
            return "channels_last"
        return "batch-innermost" if is_batch_innermost(x) else "nchw"
    return "feature-major" if x.dim() == 2 and not x.is_contiguous() and x.t().is_contiguous() else "row-major"


def layer_inputs(model: nn.Module, example_input: Any) -> dict[str, Counter[LayerInput]]:
    """The inputs of each module, by module name, with the number of calls, when a copy of ``model`` runs on ``example_input``.

    ``example_input`` is one argument, a tuple of them (a namedtuple is one), or a dict of named ones. The copy runs in
    evaluation mode, with gradients where the model has them. Counted is the first argument, or the one named ``input``, where
    it is a tensor.
    """
    seen: dict[str, Counter[LayerInput]] = {}

    def note(name: str):
        def hook(module: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
            given = inputs[0] if inputs else named.get("input")  # what torch's layers call it
            if isinstance(given, Tensor):
                seen.setdefault(name, Counter())[describe_input(given)] += 1

        return hook

    with scratch_copy(model) as scratch:
        for name, module in scratch.named_modules():
            module.register_forward_pre_hook(note(name), with_kwargs=True)
        call_model(scratch.eval(), example_input)
    return seen
