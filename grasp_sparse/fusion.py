"""What follows a layer done on the way out of it, in a whole model, in place: batch norms are replaced by fused ones that also
add the residual and apply the ReLU behind them, sparse linear layers and convolutions of blocks apply theirs. Pooling keeps the
layout from then on.

Modules are changed where they stand (their class), so references, Parameters, buffers, hooks and the mode stay what they
are, and so does the state_dict. A ReLU is taken into what lies before it only where the structure says that nothing else
sees what lies between the two.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise

from torch import Tensor, nn

from grasp_sparse.nn import AdaptiveAvgPool2d, AvgPool2d, BatchNorm2d, MaxPool2d, SparseConv2d, SparseLinear


class FusedBatchNorm2d(BatchNorm2d):
    """What was an ``nn.BatchNorm2d``."""


class LayoutMaxPool2d(MaxPool2d):
    """What was an ``nn.MaxPool2d``."""


class LayoutAvgPool2d(AvgPool2d):
    """What was an ``nn.AvgPool2d``."""


class LayoutAdaptiveAvgPool2d(AdaptiveAvgPool2d):
    """What was an ``nn.AdaptiveAvgPool2d``."""


class PassedReLU(nn.ReLU):
    """What was an ``nn.ReLU`` behind a layer that now applies it; hands on its input."""

    def forward(self, input: Tensor) -> Tensor:
        return input


_POOLS = {nn.MaxPool2d: LayoutMaxPool2d, nn.AvgPool2d: LayoutAvgPool2d, nn.AdaptiveAvgPool2d: LayoutAdaptiveAvgPool2d}


def fuse_(model: nn.Module) -> list[str]:
    """Replaces every plain ``nn.BatchNorm2d`` and pooling layer in ``model``; returns the names of the norms.

    The ReLU behind a norm is taken into it, and the add before that ReLU, in ``nn.Sequential``, in torchvision's ResNet, and
    in modules that declare ``fusible_norms`` (see :func:`grasp_sparse.nn.norm_relu`); in ``nn.Sequential`` also the ReLU behind a
    :class:`~grasp_sparse.nn.SparseLinear`, and behind a :class:`~grasp_sparse.nn.SparseConv2d` that stores whole blocks. Not where
    a forward or backward hook, a ``forward`` set on the instance or a second use of the module might see the difference. Code that
    takes single layers out of an ``nn.Sequential`` would: hooks and features that want the value before the ReLU need the model
    as it was.

    Subclasses of ``nn.BatchNorm2d`` and other norms are left alone. Whoever replaces layers afterwards (SyncBatchNorm) calls
    :func:`unfuse_` first: the ReLU would go with them.
    """
    uses = Counter(child for module in model.modules() for child in module._modules.values() if child is not None)
    names = {module: name for name, module in model.named_modules() if _is_stock(module, nn.BatchNorm2d)}
    with_relu: dict[nn.Module, bool] = dict.fromkeys(names, False)
    layers, relus, blocks = [], [], {}
    counterparts = {stock: ours for ours, stock in _torchvision_classes().items()}

    def may_change(module: nn.Module, kind: type[nn.Module]) -> bool:
        return _is_stock(module, kind) and uses[module] == 1 and not _has_hooks(module)

    for module in model.modules():
        if vars(module).keys() & {"forward", "_forward_impl"}:
            continue
        if type(module).forward is nn.Sequential.forward:
            for layer, relu in pairwise(module._modules.values()):
                if not may_change(relu, nn.ReLU):
                    continue
                if may_change(layer, nn.BatchNorm2d):
                    with_relu[layer] = True
                    relus.append(relu)
                elif _may_apply_relu(layer) and may_change(layer, type(layer)) and not layer.relu:
                    layers.append(layer)
                    relus.append(relu)
            continue
        kind = counterparts.get(type(module), type(module))
        if kind is not type(module) and not (_is_stock(module.relu, nn.ReLU) and not _has_hooks(module.relu)):
            continue
        norms = [norm for norm in _fusible_norms(module, kind) if may_change(norm, nn.BatchNorm2d)]
        with_relu |= dict.fromkeys(norms, True)
        if norms and kind is not type(module):
            blocks[module] = kind

    for norm, relu in with_relu.items():
        norm.__class__, norm.relu = FusedBatchNorm2d, relu
    for module in model.modules():
        if type(module) in _POOLS and _is_stock(module, type(module)):
            module.__class__ = _POOLS[type(module)]
    for layer in layers:
        layer.relu = True
    for relu in relus:
        relu.__class__ = PassedReLU
    for block, kind in blocks.items():
        block.__class__ = kind
    return list(names.values())


def unfuse_(model: nn.Module) -> nn.Module:
    """Gives every module that :func:`fuse_` changed its own class back, and every ReLU its work; returns ``model``."""
    pools = {ours: stock for stock, ours in _POOLS.items()}
    stock_classes = {FusedBatchNorm2d: nn.BatchNorm2d, **pools, PassedReLU: nn.ReLU, **_torchvision_classes()}
    for module in model.modules():
        if type(module).forward is nn.Sequential.forward:
            for layer, relu in pairwise(module._modules.values()):
                if _may_apply_relu(layer) and type(relu) is PassedReLU:
                    layer.relu = False
    for module in model.modules():
        if type(module) in stock_classes:
            module.__class__ = stock_classes[type(module)]
            if type(module) is nn.BatchNorm2d:
                del module.relu
    return model


def _may_apply_relu(layer: nn.Module | None) -> bool:
    """Whether its kernels can, on the way out of them."""
    return type(layer) is SparseLinear or (type(layer) is SparseConv2d and layer.block_size is not None)


def _is_stock(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Exactly of this class and with its behaviour."""
    return type(module) is kind and "forward" not in vars(module)


def _has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, hooks) for hooks in kinds)


def _fusible_norms(module: nn.Module, kind: type[nn.Module]) -> Iterator[nn.Module | None]:
    """The children of ``module`` that the forward of ``kind`` calls through norm_relu; none if a subclass has its own forward."""
    owner = next(base for base in kind.__mro__ if "forward" in vars(base))
    return (module._modules.get(name) for name in vars(owner).get("fusible_norms", ()))


def _torchvision_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """Our class -> torchvision's; empty while nobody has imported torchvision's, since then no model is made of it."""
    if "torchvision.models.resnet" not in sys.modules:
        return {}
    from grasp_sparse.nn import torchvision_resnet

    return torchvision_resnet.STOCK
