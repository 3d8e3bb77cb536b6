"""When a layer may apply the ReLU behind it. Asked at every call, for modules are replaced and hooked at any time."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def behaves_as(layer: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Whether ``layer`` is a ``kind`` that is called, and computes, as one. A subclass with a forward or a call of its own promises nothing."""
    of = type(layer)
    return isinstance(layer, kind) and of.forward is kind.forward and of.__call__ is nn.Module.__call__


def may_fuse(layer: nn.Module, relu: nn.Module | None = None) -> bool:
    """Whether ``relu`` is an ``nn.ReLU`` (None: a function's) and only the caller can tell if ``layer`` has applied it.

    A hook on one of the two would, or a hook on all modules, or a ``forward`` set on the instance.
    """
    if relu is not None and (type(relu) is not nn.ReLU or _is_watched(relu)):
        return False
    return not (_is_watched(layer) or _has_any_global_hook())


def _is_watched(module: nn.Module) -> bool:
    own = module.__dict__  # one look-up for five: this is asked of every pair in every call
    forward, backward = own["_forward_hooks"] or own["_forward_pre_hooks"], own["_backward_hooks"] or own["_backward_pre_hooks"]
    return bool(forward or backward or "forward" in own)
