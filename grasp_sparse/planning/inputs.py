"""What every layer is given when the model runs: shape, layout, whether a gradient goes back, how often; and whose weight is read."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grasp_sparse.ops.layout import is_batch_innermost, is_channels_last
from grasp_sparse.scratch import call_model, scratch_copy
from grasp_sparse.targets import DENSE

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


class LayerInputs(dict[str, Counter[LayerInput]]):
    """Module name -> its inputs, with the number of calls."""

    read: frozenset[str] = frozenset()  # dense layers whose weight was read from outside: by the model around them, or by a hook


class _Parameters(dict[str, nn.Parameter]):
    """Those of a layer. They note that somebody asks for ``weight`` while the layer does not run.

    nn.Module looks attributes up here, so a layer that has these is of the class, and has the attributes, that it had; who goes
    through all parameters, as ``parameters()`` and ``state_dict()`` do, asks for none by name.
    """

    runs = False
    read = False

    def __getitem__(self, name: str) -> nn.Parameter:
        self.read |= name == "weight" and not self.runs
        return super().__getitem__(name)


def layer_inputs(model: nn.Module, example_input: Any) -> LayerInputs:
    """The inputs of each module, by module name, with the number of calls, when a copy of ``model`` runs on ``example_input``.

    And the names of the layers whose weight is read meanwhile by others than themselves.

    ``example_input`` is one argument, a tuple of them (a namedtuple is one), or a dict of named ones. The copy runs in
    evaluation mode, with gradients where the model has them. Counted is the first argument, or the one named ``input``, where
    it is a tensor.
    """
    seen = LayerInputs()

    def note(name: str):
        def hook(module: nn.Module, inputs: tuple, named: dict[str, Any]) -> None:
            given = inputs[0] if inputs else named.get("input")  # what torch's layers call it
            if isinstance(given, Tensor):
                seen.setdefault(name, Counter())[describe_input(given)] += 1

        return hook

    with scratch_copy(model) as scratch:
        for name, module in scratch.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):  # which take no such hook
                module.register_forward_pre_hook(note(name), with_kwargs=True)
        parameters = {name: _watched(module) for name, module in scratch.named_modules() if type(module) in DENSE}
        call_model(scratch.eval(), example_input)
    seen.read = frozenset(name for name, of_layer in parameters.items() if of_layer.read)
    return seen


def _watched(layer: nn.Module) -> _Parameters:
    """The parameters of ``layer``, from now on such as note who reads its weight."""
    parameters = layer._parameters = _Parameters(layer._parameters)

    def starts(*_: Any) -> None:
        parameters.runs = True

    def ends(*_: Any) -> None:
        parameters.runs = False

    # Last before the forward and first behind it: other hooks of the layer are outside. Always: the model may catch what it raises.
    layer.register_forward_pre_hook(starts)
    layer.register_forward_hook(ends, prepend=True, always_call=True)
    return parameters
