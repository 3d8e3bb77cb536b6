"""Dense kernels on a weight whose pruned entries are exactly zero: for layers too dense for sparse kernels to pay.

The entry is stored as zero, and the gradient on its way to the weight is masked, so it is zero too, also where the layer's
own gradient is infinite or NaN. With both zero an optimizer that treats entries one by one leaves it there, as all of
torch's do but Muon (it mixes the entries of a matrix): momentum, moments and weight decay are all zero. The forward
multiplies by the stored weight as it is, for a masked copy of it would be a second pass over the weight in every step. Who
writes into the weight writes zeros there, as ``load_state_dict`` and ``reset_parameters`` do here; a weight that
``torch.nn.utils.parametrize`` computes is masked anew at each call.

Masking the gradient is a pass over it, and an optimizer with bit masks reads every gradient anyway: one that asks for it
(``raw_gradients``) gets the gradients of its weights as they are, and the layer costs what a dense one does. That ends with the
optimizer, and is not for copies of the layer.
"""

from __future__ import annotations

import functools
import weakref
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from grasp_sparse.nn.kernels import channels_last
from grasp_sparse.nn.linear import check_mask
from grasp_sparse.nn.symbolic import called, is_symbolic
from grasp_sparse.ops.differentiable import is_transformed
from grasp_sparse.weights import PrunedLayer

# Integers of the size of a floating-point number, to take its bits as they are.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class Consumer(Protocol):
    """Who masks gradients as it consumes them."""

    def get(self, weight: Tensor) -> Tensor | None:
        """The mask that it applies to the gradient of ``weight``, the very tensor."""


_consumers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # weight -> weak reference to its Consumer
_handed_over = 0  # how often anything was put there


def hand_over(weight: Tensor, consumer: Consumer) -> None:
    """Leaves the gradient of ``weight`` unmasked from now on, as long as ``consumer`` lives and applies the layer's own mask to it."""
    global _handed_over
    _consumers[weight] = weakref.ref(consumer)
    _handed_over += 1


def consumer_of(weight: Tensor) -> Consumer | None:
    """Who gets the gradient of ``weight`` unmasked."""
    reference = _consumers.get(weight) if _consumers else None
    return None if reference is None else reference()


class LaterMask:
    """Who masks the gradients of one masked layer later, as an optimizer with ``raw_gradients`` does, for as long as this lives."""

    def __init__(self, layer: _Masked) -> None:
        self._weight, self._mask = layer.weight, layer.mask
        hand_over(layer.weight, self)

    def get(self, weight: Tensor) -> Tensor | None:
        return self._mask if weight is self._weight else None


def _mask_gradient(grad: Tensor, mask: Tensor) -> Tensor:
    """``grad`` with zeros where the mask is False."""
    bits = _BITS.get(grad.element_size())
    if bits is None or torch.is_grad_enabled():  # to be differentiated again
        return torch.where(mask, grad, 0)
    # Once or nought times its bits: NaN and infinities vanish as they do in torch.where, whose branches on a random mask
    # no processor foresees (20 times the time on a million weights).
    return torch.mul(grad.view(bits), mask).view(grad.dtype)


class _MaskGradient(torch.autograd.Function):
    """The weight itself, with a gradient that is zero where the mask is False. What is compiled outlives the answer to who
    consumes the gradient, so here it is always masked."""

    @staticmethod
    def forward(ctx, weight: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(mask)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return _mask_gradient(grad, mask), None


class _Hooks:
    """Masks the gradients of the weights that a layer has, or is called with: of each by the mask that came with it last, for as long as
    it lives. A copy begins without any: it is of another layer.

    A function of autograd does the same and adds twice as much to a forward and backward of a small layer.
    """

    def __init__(self) -> None:
        self._handles = WeakTensorKeyDictionary()  # weight -> its mask, handle of the hook
        # Weight, its mask, who masks instead if somebody does, and _handed_over then: most calls are like the one before.
        self._latest: tuple[weakref.ref | None, Tensor | None, weakref.ref | None, int] = None, None, None, 0

    @property
    def have_let_go(self) -> bool:
        """Whether nothing has been seen to yet, or since :meth:`let_go`."""
        return self._latest[0] is None

    def have_seen_to(self, weight: Tensor, mask: Tensor) -> bool:
        """Whether nothing has changed since :meth:`see_to` was called last, and with these two."""
        known, known_mask, consumer, handed_over = self._latest
        return (
            known_mask is mask and handed_over == _handed_over and known is not None and known() is weight
            and (consumer is None or consumer() is not None)
        )  # fmt: skip

    def see_to(self, weight: Tensor, mask: Tensor) -> None:
        """From now on the gradient of ``weight`` is masked by ``mask``, here or by the weight's consumer."""
        later = consumer_of(weight)
        if later is not None and later.get(weight) is not mask:
            later = None
        masked_by, _ = self._handles.get(weight, (None, None))
        if masked_by is not (mask if later is None else None):
            if masked_by is not None:
                self._unhook(weight)
            if later is None:
                frozen = not weight.requires_grad
                weight.requires_grad_()  # a hook stays where it is when a weight is frozen, and thawed by somebody else
                self._handles[weight] = mask, weight.register_hook(functools.partial(_mask_gradient, mask=mask))
                if frozen:
                    weight.requires_grad_(False)
        self._latest = weakref.ref(weight), mask, None if later is None else weakref.ref(later), _handed_over

    def let_go(self) -> None:
        """Leaves the gradients of all weights as they are."""
        for weight in [*self._handles]:
            self._unhook(weight)
        self._latest = None, None, None, 0

    def _unhook(self, weight: Tensor) -> None:
        _, handle = self._handles.pop(weight)
        handle.remove()
        if not weight._backward_hooks:  # every backward would go through the empty list of them, in Python
            weight._backward_hooks = None

    def __deepcopy__(self, memo: dict) -> _Hooks:
        return _Hooks()

    def __reduce__(self) -> tuple:
        return _Hooks, ()


class _Masked(PrunedLayer):
    """The mask of a dense layer: a bool buffer of the weight's shape that a state_dict carries; all True until set.

    Who changes it other than by ``load_state_dict`` zeroes the weight where it prunes, too; optimizers of this package that have the
    mask do so in their next step.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self._hooks = _Hooks()
        self.register_buffer("mask", torch.ones_like(self.weight, dtype=torch.bool))

    def _take(self, module: nn.Module, mask: Tensor) -> None:
        check_mask(module, mask)
        # With the strides of the weight, channels_last too, or every forward would walk the two differently.
        self.mask = torch.empty_like(module.weight, dtype=torch.bool).copy_(mask)
        self.weight = nn.Parameter(
            torch.where(self.mask, module.weight.detach(), 0), requires_grad=module.weight.requires_grad
        )
        self.bias = module.bias
        self.train(module.training)
        self._hook_weight()

    def _hook_weight(self) -> None:
        """From now on, so that code that takes the weight and leaves the layer alone moves no pruned entry either: after everything that
        may have put another weight or mask in place."""
        weight = self._parameters.get("weight")
        if weight is not None and not weight.is_inference():
            self._hooks.see_to(weight, self.mask)

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)  # with hooks of its own, none yet
        self._hook_weight()

    def reset_parameters(self) -> None:
        """As torch's; pruned entries stay zero."""
        super().reset_parameters()
        if "mask" in self._buffers:  # torch calls this before there is one
            with torch.no_grad():
                self.weight.copy_(self.to_dense_weight())

    @property
    def nnz(self) -> int:
        """Number of kept weights."""
        return int(self.mask.count_nonzero())

    @property
    def density(self) -> float:
        """Kept weights as a share of all."""
        return self.nnz / max(1, self.mask.numel())

    def to_dense_weight(self) -> Tensor:
        """The weight with exact zeros where pruned; differentiable."""
        return torch.where(self.mask, self.weight, 0)

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """The stored weight, which is zero where pruned, and the bias; the weight's gradient will be zero there, too, unless it has
        a consumer who sees to that.

        Parameters are taken from where torch keeps them: as attributes they cost a microsecond of a layer's hundred.
        """
        parameters = self._parameters
        weight, bias = parameters.get("weight"), parameters["bias"] if "bias" in parameters else self.bias
        if weight is None:  # computed from others, by nn.utils.parametrize or nn.utils.prune, and not zero where pruned
            if not torch.compiler.is_compiling():
                self._hooks.let_go()  # of the tensor it is computed from, if that was the weight before
            return self.to_dense_weight(), bias
        if is_transformed():  # a function that functorch may transform is called through more of Python than it does itself
            return self.to_dense_weight(), bias
        mask = self._buffers["mask"]
        if torch.compiler.is_compiling() or not self._hooks.have_seen_to(weight, mask):
            weight = self._seen_to(weight, mask)
        return weight, bias

    def _seen_to(self, weight: Tensor, mask: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and self._hooks.have_let_go and isinstance(weight, nn.Parameter) and not weight.is_inference():
            with torch.no_grad():  # what it was computed as stays, where a parametrization is removed
                weight.copy_(torch.where(mask, weight, 0))
            self._hook_weight()
        if not (weight.requires_grad and torch.is_grad_enabled()):
            return weight
        if not weight.is_leaf or torch.compiler.is_compiling():
            return _MaskGradient.apply(weight, mask)
        self._hooks.see_to(weight, mask)
        return weight

    def _apply(self, fn, recurse: bool = True):
        mask = self.mask
        super()._apply(fn, recurse)
        if self.mask.dtype != torch.bool:  # .type(dtype), unlike .to(dtype), converts bool as well
            self.mask = mask.to(self.mask.device)
        self._hook_weight()
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        before = self._parameters.get("weight")
        super()._load_from_state_dict(state_dict, prefix, *args)
        if prefix + "weight" in state_dict or prefix + "mask" in state_dict:
            weight = self._parameters.get("weight")
            if weight is not before:  # assigned: memory of whoever gave it, not to be written into
                self.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
            with torch.no_grad():
                self.weight.copy_(self.to_dense_weight())
            self._hook_weight()

    def extra_repr(self) -> str:
        if self.mask.is_meta:
            return super().extra_repr()
        return f"{super().extra_repr()}, nnz={self.nnz}, density={self.density:.4g}"


class MaskedLinear(_Masked, nn.Linear):
    """``nn.Linear`` whose weight is exactly zero, and stays so in training, where ``mask`` is False.

    Who writes into the weight (``nn.init``, ``copy_``) writes zeros there too: the forward multiplies by what is stored.
    """

    @classmethod
    def from_dense(cls, module: nn.Linear, mask: Tensor) -> MaskedLinear:
        """Copies ``module`` with the bool ``mask [out_features, in_features]`` applied; the bias Parameter is taken over.

        Raises:
            ValueError: ``mask`` does not fit.
        """
        layer = cls(module.in_features, module.out_features, bias=False, device="meta")
        layer._take(module, mask)
        return layer

    def to_dense(self) -> nn.Linear:
        """An ``nn.Linear`` with exact zeros where pruned; it takes over the bias Parameter."""
        dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(self.to_dense_weight().detach(), requires_grad=self.weight.requires_grad)
        dense.bias = self.bias
        return dense.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """As that of ``nn.Linear``: ``[..., in_features]`` to ``[..., out_features]``."""
        if is_symbolic(input):
            return called(self, input)
        weight, bias = self._weight_and_bias()
        return F.linear(input, weight, bias)


class MaskedConv2d(_Masked, nn.Conv2d):
    """``nn.Conv2d``, any number of groups, whose weight is exactly zero, and stays so in training, where ``mask`` is False.

    Who writes into the weight (``nn.init``, ``copy_``) writes zeros there too: the forward multiplies by what is stored.
    """

    @classmethod
    def from_dense(cls, module: nn.Conv2d, mask: Tensor) -> MaskedConv2d:
        """Copies ``module`` with the bool ``mask``, of the weight's shape, applied; the bias Parameter is taken over.

        Raises:
            ValueError: ``mask`` does not fit.
        """
        layer = cls(**_conv_arguments(module), bias=False, device="meta")
        layer._take(module, mask)
        return layer

    def to_dense(self) -> nn.Conv2d:
        """An ``nn.Conv2d`` with exact zeros where pruned; it takes over the bias Parameter."""
        dense = nn.Conv2d(**_conv_arguments(self), bias=False, device="meta")
        dense.weight = nn.Parameter(self.to_dense_weight().detach(), requires_grad=self.weight.requires_grad)
        dense.bias = self.bias
        return dense.train(self.training)

    def forward(self, input: Tensor) -> Tensor:
        """As that of ``nn.Conv2d``: ``[N, in_channels, H, W]``, or without N, to ``[N, out_channels, H', W']``."""
        if is_symbolic(input):
            return called(self, input)
        weight, bias = self._weight_and_bias()
        return self._conv_forward(channels_last(input), weight, bias)


def _conv_arguments(module: nn.Conv2d) -> dict:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(module, name) for name in names}
