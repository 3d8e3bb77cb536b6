"""Where numbers stopped being finite: asked once, when a loss already is not, and before anything is saved."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class _Call(NamedTuple):
    """One call of a module in the watched forward pass."""

    name: str
    module: nn.Module
    bad_output: Tensor | None  # the first tensor that it gave and that is not finite
    bad_input: bool
    largest_input: float  # of its finite numbers, by magnitude


def first_non_finite(model: nn.Module, images: Tensor, forward: Callable[[], object]) -> str:
    """The first thing that is not finite when the step's `images` go through `model` again, in words, for an error message.

    `model` must hold the weights from before the step that failed, and `forward` runs the step's forward pass of it. Looked at
    are, in this order: the images; the weights, of which those nearest the loss are named, since a gradient that is not finite
    spoils all that lies before its source; what each layer gives.
    """
    if not _is_finite(images):
        return f"{_kinds(images)} in the images of this batch"
    calls = _watched(model, forward)
    spoilt = {name: parameter for name, parameter in model.named_parameters() if not _is_finite(parameter)}
    if spoilt:
        name = _nearest_the_loss(spoilt, calls)
        others = f" and of {len(spoilt) - 1} parameters before it" if len(spoilt) > 1 else ""
        return f"the gradient of {name}{others} was not finite, or overflowed it, in the step before: {_kinds(spoilt[name])}"
    for call in calls:
        if call.bad_output is not None:
            layer = f"layer {call.name} ({type(call.module).__name__})"
            if call.bad_input:
                return f"first in what enters {layer}, computed by the module around it"
            return f"first in the output of {layer}: {_kinds(call.bad_output)}; its largest input was {call.largest_input:.3g}"
    return "every layer's output is finite when the step is repeated: the loss itself, or chance (dropout), made it"


def endless_buffers(model: nn.Module) -> frozenset[str]:
    """Names of the buffers that are not finite from the beginning, as a mask of minus infinity is."""
    return frozenset(name for name, buffer in model.named_buffers() if buffer.is_floating_point() and not _is_finite(buffer))


def non_finite_state(
    model: nn.Module, optimizer: torch.optim.Optimizer, averages: Mapping[str, Tensor], besides: Collection[str] = ()
) -> str | None:
    """What is not finite among the weights and buffers of `model`, the optimizer's moments and the moving `averages`, in words.

    None where all of it is. Not looked at are the tensors of the model that are named in `besides`. The device is waited for once.
    """
    state = dict(_state(model, optimizer, averages, besides))
    flags: dict[torch.device, list[Tensor]] = {}
    for tensor in state.values():
        flags.setdefault(tensor.device, []).append(tensor.isfinite().all())
    if all(bool(torch.stack(of_device).all()) for of_device in flags.values()):
        return None
    bad = [name for name, tensor in state.items() if not _is_finite(tensor)]
    others = f" and {len(bad) - 1} more tensors" if len(bad) > 1 else ""
    return f"{_kinds(state[bad[0]])} in {bad[0]}{others}"


def _state(
    model: nn.Module, optimizer: torch.optim.Optimizer, averages: Mapping[str, Tensor], besides: Collection[str]
) -> Iterator[tuple[str, Tensor]]:
    """Every floating-point tensor that a checkpoint holds, named for a person."""
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and name not in besides:
            yield name, tensor
    for name, parameter in model.named_parameters():
        for moment, tensor in optimizer.state.get(parameter, {}).items():
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                yield f"{moment} of {name}", tensor
    for name, tensor in averages.items():
        if name not in besides:
            yield f"the moving average of {name}", tensor


def _watched(model: nn.Module, forward: Callable[[], object]) -> list[_Call]:
    """The calls of all modules, those within a module before its own; at most one has a `bad_output`, the first of all."""
    calls: list[_Call] = []
    found = False
    names = {module: name or type(model).__name__ for name, module in model.named_modules()}

    def watch(module: nn.Module, args: tuple, kwargs: dict, output: object) -> None:
        nonlocal found
        bad = None if found else next((tensor for tensor in _floats(output) if not _is_finite(tensor)), None)
        if bad is None:
            calls.append(_Call(names[module], module, None, False, 0.0))  # only its place in the order matters
            return
        found, given = True, list(_floats((args, kwargs)))
        largest = max(map(_largest, given), default=0.0)
        calls.append(_Call(names[module], module, bad, not all(map(_is_finite, given)), largest))

    handles = [module.register_forward_hook(watch, with_kwargs=True) for module in model.modules()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _nearest_the_loss(spoilt: Mapping[str, Tensor], calls: list[_Call]) -> str:
    """Of the spoilt parameters the one whose module ran last; the last by name where none ran."""
    by_identity = {id(parameter): name for name, parameter in spoilt.items()}
    for call in reversed(calls):
        for parameter in call.module._parameters.values():
            if id(parameter) in by_identity:
                return by_identity[id(parameter)]
    return list(spoilt)[-1]


def _floats(value: object) -> Iterator[Tensor]:
    """The floating-point tensors in nested containers."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _floats(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _floats(item)


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def _largest(tensor: Tensor) -> float:
    return float(tensor.detach().nan_to_num(0.0, 0.0, 0.0).abs().max()) if tensor.numel() else 0.0


def _kinds(tensor: Tensor) -> str:
    """`3 nan and 5 inf of 1,000 values`."""
    counts = {"nan": int(tensor.isnan().sum()), "inf": int(tensor.isinf().sum())}
    found = " and ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
    return f"{found} of {tensor.numel():,} values"
