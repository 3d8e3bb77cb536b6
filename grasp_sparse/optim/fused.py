"""What the optimizers here add to torch's: one call for all tensors, bit masks, and updating during the backward pass.

An optimizer names its state and its operation; everything about which tensors go into which call, in what order things are
checked and when gradients are dropped is here, so another device needs another kernel and nothing else.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from grasp_sparse.ops import reference_update
from grasp_sparse.optim.masks import PackedMasks

_COMPILED = (torch.float32, torch.float64)  # what kernels exist for; other dtypes run the reference


class FusedOptimizer(torch.optim.Optimizer):
    """Base of :class:`SGD` and :class:`AdamW`; goes before the torch optimizer whose groups and state it shares.

    Args:
        masks: parameter -> bool mask of its shape, True = kept. At every update pruned weights and their state become exactly
            zero, whatever the gradient holds. ``layer_masks(model)`` gives those of masked layers; for a dense model and a
            MaskSet, ``{p: masks[name] for name, p in model.named_parameters() if name in masks}``.
        during_backward: update each parameter in the backward pass, as soon as its gradient is complete, and drop the gradient.
            ``step()`` then only ends the iteration, with the same result bit for bit. Needs one backward pass to a step: no
            accumulation, no clipping (there is nothing to clip: torch's functions see no gradients), no GradScaler, no
            DistributedDataParallel (it averages gradients too late).
        raw_gradients: masked layers whose masks are here leave the gradients of their weights unmasked, which spares a pass over
            each; the update masks them as it reads them, with the same result bit for bit. Until then **their gradients are not
            zero where pruned**: clipping by norm, a GradScaler's search for infinities, a penalty on gradients, hooks,
            ``torch.autograd.grad`` and whoever else reads them sees those numbers too. With ``during_backward`` as well only hooks and
            ``torch.autograd.grad`` do, since nothing stays in ``.grad``. Begins and ends, with the optimizer, at the next forward; while
            it lives no other may step these weights. Gradients of compiled layers stay masked.

    A CUDA graph keeps the learning rate and the other numbers with which a step was recorded, and replays them.

    Raises:
        ValueError: options that torch refuses, masks that do not fit the parameters, or ``raw_gradients`` without masks.
    """

    def __init__(
        self, *args, masks: Mapping[Tensor, Tensor] | None = None, during_backward: bool = False, raw_gradients: bool = False,
        **kwargs,
    ) -> None:  # fmt: skip
        if raw_gradients and not masks:
            raise ValueError("Expected masks with raw_gradients=True, got none; pass masks=layer_masks(model).")
        self._during_backward, self._raw_gradients = during_backward, raw_gradients
        self._reset_hooks()
        super().__init__(*args, **kwargs)
        self.set_masks(masks or {})

    def set_masks(self, masks: Mapping[Tensor, Tensor]) -> None:
        """Replaces all masks. Weights that are no longer kept, and their state, become zero at the next update."""
        packed = PackedMasks(masks, before=getattr(self, "_masks", None))
        packed.check_within([p for group in self.param_groups for p in group["params"]])
        self._masks = packed
        if self._raw_gradients:
            packed.take_raw_gradients()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Updates every parameter that has a gradient; returns what ``closure``, called first with gradients on, returned.

        As with torch's fused optimizers a GradScaler leaves to this what it has found: of two float32 tensors of one number that it
        or somebody else has set as attributes, ``found_inf`` leaves the step out unless it is zero, and gradients are first divided by
        ``grad_scale``. No device is waited for to find out.

        Raises:
            ValueError: gradients that are sparse or complex; nothing has been changed then.
            NotImplementedError: options, loaded from a checkpoint of torch's optimizer, that exist only there.
            RuntimeError: with ``during_backward``, gradients that were left over or a GradScaler; while a CUDA graph is recorded, the
                first step of parameters that have a state, or a learning rate on the device.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._during_backward:
            self._end_backward()
        else:
            self._update([(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups])
        return loss

    def add_param_group(self, param_group: dict) -> None:
        super().add_param_group(param_group)
        if self._during_backward:
            self._hook(len(self.param_groups) - 1)

    def stop_during_backward(self) -> None:
        """Takes the hooks off the parameters: gradients stay, and ``step()`` makes the updates from now on."""
        for handle in self._handles:
            handle.remove()
        self._reset_hooks()
        self._during_backward = False

    # The two things an optimizer defines.

    def _check_group(self, group: dict) -> None:
        """Raises for options of torch's optimizer that this one does not have."""
        for option in ("amsgrad", "capturable", "differentiable"):
            if group.get(option):
                raise NotImplementedError(f"Expected {option}=False, got {option}=True; use torch.optim for it.")

    def _calls(self, group: dict, parameters: list[Tensor]) -> list[Callable[[], None]]:
        """Functions that update ``parameters``, all of one device and dtype, each with one operation; changes nothing yet."""
        raise NotImplementedError

    # Which tensors go where.

    def _update(self, chosen: Sequence[tuple[dict, list[Tensor]]]) -> None:
        calls = []
        for group, parameters in chosen:
            self._check_group(group)
            _refuse_to_record_numbers(group, parameters)
            for same in _alike(parameters):
                calls += self._calls(group, same)
        self._unscale()
        for call in calls:
            call()

    def _run(self, name: str, parameters: list[Tensor], states: Sequence[list[Tensor]], *arguments) -> None:
        owner = torch.ops.grasp_sparse if parameters[0].dtype in _COMPILED else reference_update
        bits = self._masks.bits(parameters)
        getattr(owner, name)(parameters, [p.grad for p in parameters], *states, bits, *arguments, self._left_out(parameters[0].device))
        # Kernels write behind autograd's back; a backward pass that still needs the old weights must notice.
        torch.autograd.graph.increment_version([*parameters, *(tensor for state in states for tensor in state)])

    def _unscale(self) -> None:
        """Divides all gradients by ``grad_scale``, if there is one."""
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            by_device: dict[torch.device, list[Tensor]] = {}
            for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
                by_device.setdefault(p.device, []).append(p.grad)
            for device, grads in by_device.items():
                torch._foreach_div_(grads, scale.to(device, non_blocking=True))

    def _left_out(self, device: torch.device) -> Tensor | None:
        """What says on ``device`` whether this step is to be left out, if anything does."""
        found_inf = getattr(self, "found_inf", None)
        return None if found_inf is None else found_inf.to(device, non_blocking=True)

    def _was_left_out(self) -> bool:
        found_inf = getattr(self, "found_inf", None)
        return found_inf is not None and bool(found_inf)

    # Updating during the backward pass.

    def _reset_hooks(self) -> None:
        self._handles: list = []
        self._done: set[Tensor] = set()  # updated since the last step()
        self._step_supports_amp_scaling = True  # a GradScaler then leaves unscaling, and leaving out, to step()

    def _hook(self, index: int) -> None:
        optimizer = weakref.ref(self)  # an optimizer that is gone must not go on updating

        def update(parameter: Tensor) -> None:
            if (alive := optimizer()) is not None:
                alive._update_in_backward(index, parameter)

        for parameter in self.param_groups[index]["params"]:
            if parameter.requires_grad:
                self._handles.append(parameter.register_post_accumulate_grad_hook(update))

    @torch.no_grad()
    def _update_in_backward(self, index: int, parameter: Tensor) -> None:
        try:
            if parameter in self._done:
                raise RuntimeError(
                    "Expected one backward pass to a step, got a second gradient before step(): with during_backward=True the "
                    "first one is already applied. Call step() after each backward pass, or accumulate without during_backward."
                )
            if parameter.grad is None:
                raise RuntimeError("Expected a gradient, got none: another optimizer has already applied and dropped it.")
            self._update([(self.param_groups[index], [parameter])])
            self._done.add(parameter)
        finally:
            parameter.grad = None

    def _end_backward(self) -> None:
        if self.__dict__.pop("found_inf", None) is not None:
            raise RuntimeError(
                "Expected no GradScaler with during_backward=True, got one: the updates were made with scaled gradients. "
                "Use one of the two."
            )
        if any(p.grad is not None for group in self.param_groups for p in group["params"]):
            raise RuntimeError(
                "Expected no gradients left at step() with during_backward=True, got some: of parameters that did not require "
                "gradients when the optimizer was built, or set by hand. Build the optimizer after unfreezing."
            )
        self._done.clear()

    # Copies and pickles.

    def __getstate__(self) -> dict:
        own = {"_masks": self._masks, "_during_backward": self._during_backward, "_raw_gradients": self._raw_gradients}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if "_during_backward" in state:  # a copy; load_state_dict comes here too, with the state alone
            self._reset_hooks()
            if self._during_backward:
                for index in range(len(self.param_groups)):
                    self._hook(index)
            if self._raw_gradients:
                self._masks.take_raw_gradients()


def refuse_options(kind: type[torch.optim.Optimizer], given: Mapping[str, object]) -> None:
    """TypeError for arguments, other than those of an optimizer here, that are on; torch's that are off change nothing."""
    refused = [name for name, value in given.items() if value or name not in inspect.signature(kind).parameters]
    if refused:
        raise TypeError(
            f"Expected the arguments of grasp_sparse.optim.{kind.__name__}, got {', '.join(refused)}; one call updates all tensors "
            f"already, what else torch.optim.{kind.__name__} can do is there alone."
        )


def refuse_to_record_a_start(parameters: Sequence[Tensor]) -> None:
    """RuntimeError if a CUDA graph is being recorded, each replay of which would start the state of these parameters anew."""
    if parameters and _is_recording(parameters[0]):
        raise RuntimeError(
            "Expected the optimizer to have taken a step before it is recorded in a CUDA graph, got parameters without state, "
            "which every replay would start anew; take one step first."
        )


def _refuse_to_record_numbers(group: Mapping[str, object], parameters: Sequence[Tensor]) -> None:
    """RuntimeError if a CUDA graph is being recorded and a number of ``group`` lies on the device, where no host may read it then."""
    for name, value in group.items():
        if isinstance(value, Tensor) and value.is_cuda and parameters and _is_recording(parameters[0]):
            raise RuntimeError(
                f"Expected {name} to be a number while a CUDA graph is recorded, got a tensor on {value.device}; give a float. Every "
                "replay then uses it as it is: where it changes, record anew, or use torch.optim with capturable=True."
            )


def _is_recording(tensor: Tensor) -> bool:
    if not tensor.is_cuda:
        return False
    with torch.cuda.device(tensor.device):  # whose current stream is asked for
        return torch.cuda.is_current_stream_capturing()


def _alike(parameters: list[Tensor]) -> list[list[Tensor]]:
    """``parameters`` in lists of one device and dtype; ValueError if a gradient is none that the operations take."""
    found: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    device = dtype = None
    for p in parameters:
        if p.dtype is not dtype or p.device != device:  # a lookup for each would cost as much as updating a bias
            device, dtype = p.device, p.dtype
            same = found.setdefault((device, dtype), [])
        same.append(p)
        layout = p.grad.layout
        if layout is not torch.strided or not dtype.is_floating_point:
            raise ValueError(
                f"Expected strided floating-point gradients, got {layout} {dtype}; give this parameter to a torch optimizer."
            )
    return list(found.values())
