"""Which weights of a dense parameter an optimizer keeps at zero, as bits in the order of the parameter's memory."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from grasp_sparse.bits import pack_like
from grasp_sparse.nn import MaskedConv2d, MaskedLinear
from grasp_sparse.nn.masked import consumer_of, hand_over


def layer_masks(model: nn.Module) -> dict[Tensor, Tensor]:
    """weight -> bool mask of every masked layer in ``model`` whose weight is trained: what ``masks=`` of an optimizer takes.

    The optimizer follows masks that change in place; give it a mask tensor that replaces one with ``set_masks``.
    """
    layers = (module for module in model.modules() if isinstance(module, (MaskedLinear, MaskedConv2d)))
    return {layer.weight: layer.mask for layer in layers if layer.weight.requires_grad}


def _refuse_others(optimizer: torch.optim.Optimizer, *_) -> None:
    """Before any step: RuntimeError where it would train pruned weights on gradients that were left unmasked for another."""
    own = getattr(optimizer, "_masks", None)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            consumer = consumer_of(parameter)
            if consumer is not None and consumer is not own and parameter.grad is not None:
                raise RuntimeError(
                    "Expected the optimizer with raw_gradients=True to step its masked weights, got another one, which would train "
                    "pruned weights; delete the first (and its schedulers) or build it without raw_gradients."
                )


class PackedMasks:
    """The masks of an optimizer, packed when they are first needed and again when a mask or its parameter has changed.

    Changes in place are seen (``load_state_dict`` makes them), also a parameter that took other strides or another device. Bits
    stay where they are when they change: a CUDA graph that was recorded with them follows the next update outside of it.

    Args:
        masks: parameter -> mask.
        before: what these masks replace; bits of the same parameters take their places.

    Raises:
        ValueError: a mask is not a bool tensor of the shape of its parameter.
    """

    def __init__(self, masks: Mapping[Tensor, Tensor], before: PackedMasks | None = None) -> None:
        for parameter, mask in masks.items():
            if mask.dtype != torch.bool or mask.shape != parameter.shape:
                raise ValueError(
                    f"Expected a bool mask of shape {list(parameter.shape)}, got {mask.dtype} {list(mask.shape)}; "
                    "masks= maps each parameter to the mask of its own shape."
                )
        self._masks = dict(masks)
        # parameter -> what the bits were made from, bits
        self._packed: dict[Tensor, tuple[tuple, Tensor]] = {}
        if before is not None:
            self._packed = {parameter: ((), bits) for parameter, (_, bits) in before._packed.items()}

    def __reduce__(self):
        return PackedMasks, (self._masks,)

    def get(self, parameter: Tensor) -> Tensor | None:
        """The mask of ``parameter``, the tensor that was given."""
        return self._masks.get(parameter)

    def take_raw_gradients(self) -> None:
        """Masked layers no longer mask the gradients of these parameters, while this lives; no other optimizer may step them."""
        for parameter in self._masks:
            hand_over(parameter, self)
        refuse = register_optimizer_step_pre_hook(_refuse_others)
        weakref.finalize(self, refuse.remove)

    def check_within(self, parameters: Sequence[Tensor]) -> None:
        """ValueError if a mask belongs to none of ``parameters``."""
        strays = self._masks.keys() - set(parameters)
        if strays:
            raise ValueError(
                f"Expected masks of parameters that the optimizer updates, got {len(strays)} of others, the first of shape "
                f"{list(next(iter(strays)).shape)}; leave them out."
            )

    def bits(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The ``mask_bits`` argument of the operations; empty where no parameter has a mask."""
        if not self._masks or not any(parameter in self._masks for parameter in parameters):
            return []
        return [self._bits_of(p) if p in self._masks else torch.empty(0, dtype=torch.uint8, device=p.device) for p in parameters]

    def _bits_of(self, parameter: Tensor) -> Tensor:
        mask = self._masks[parameter]
        made_from = mask._version, parameter.stride(), parameter.device
        made, bits = self._packed.get(parameter, ((), None))
        if made != made_from:
            packed = pack_like(mask, parameter)
            same_place = bits is not None and (bits.device, bits.shape) == (packed.device, packed.shape)
            bits = bits.copy_(packed) if same_place else packed
            self._packed[parameter] = made_from, bits
        return bits
