"""What follows a layer done on the way out of it, in a whole model, in place: batch norms are replaced by fused ones that also
add the residual and apply the ReLU behind them, in training as one operation with the sparse convolution before them; sparse linear
layers and convolutions of blocks apply their ReLU. Pooling keeps the layout from then on.

Modules are changed where they stand (their class), so references, Parameters, buffers, hooks and the mode stay what they
are, and so does the state_dict. Who calls the layers, an ``nn.Sequential`` or a block, asks for more with the call, and only
where nothing sees what lies between; a layer called by anybody else computes what it always did.
"""

from __future__ import annotations

import sys
from itertools import pairwise

from torch import nn

from grasp_sparse.nn import AdaptiveAvgPool2d, AvgPool2d, BatchNorm2d, FusedSequential, MaxPool2d
from grasp_sparse.nn.conv_norm import is_pair
from grasp_sparse.nn.sequential import applies_relu, fused_kind


class FusedBatchNorm2d(BatchNorm2d):
    """What was an ``nn.BatchNorm2d``."""


class LayoutMaxPool2d(MaxPool2d):
    """What was an ``nn.MaxPool2d``."""


class LayoutAvgPool2d(AvgPool2d):
    """What was an ``nn.AvgPool2d``."""


class LayoutAdaptiveAvgPool2d(AdaptiveAvgPool2d):
    """What was an ``nn.AdaptiveAvgPool2d``."""


_POOLS = {nn.MaxPool2d: LayoutMaxPool2d, nn.AvgPool2d: LayoutAvgPool2d, nn.AdaptiveAvgPool2d: LayoutAdaptiveAvgPool2d}


def fuse_(model: nn.Module) -> list[str]:
    """Replaces every plain ``nn.BatchNorm2d`` and pooling layer in ``model``; returns the names of the norms.

    In torchvision's ResNet and in modules that call :func:`grasp_sparse.nn.conv_norm_relu` or :func:`grasp_sparse.nn.norm_relu` a
    norm then does the ReLU behind it and the add before that. In ``nn.Sequential``, which becomes a
    :class:`~grasp_sparse.nn.FusedSequential`, a ReLU is done by the norm, the :class:`~grasp_sparse.nn.SparseLinear` or the
    :class:`~grasp_sparse.nn.SparseConv2d` of whole blocks before it. Each call decides, by the layers that are there, and not where a
    hook or a ``forward`` set on an instance sees the difference.

    Subclasses of ``nn.BatchNorm2d``, other norms and subclasses of ``nn.Sequential`` with a forward of their own are left alone.
    """
    norms = {module: name for name, module in model.named_modules() if _is_stock(module, nn.BatchNorm2d)}
    for norm in norms:
        norm.__class__ = FusedBatchNorm2d
    counterparts = {stock: ours for ours, stock in _torchvision_classes().items()}
    for module in model.modules():
        stock = type(module)
        if stock in _POOLS and _is_stock(module, stock):
            module.__class__ = _POOLS[stock]
        elif stock in counterparts and any(isinstance(child, BatchNorm2d) for child in module.children()):
            module.__class__ = counterparts[stock]
        elif isinstance(module, nn.Sequential) and not isinstance(module, FusedSequential) and _has_pair(module):
            module.__class__ = fused_kind(stock) or stock
    return list(norms.values())


def unfuse_(model: nn.Module) -> nn.Module:
    """Gives every module that :func:`fuse_` changed its own class back; returns ``model``."""
    pools = {ours: stock for stock, ours in _POOLS.items()}
    stock_classes = {FusedBatchNorm2d: nn.BatchNorm2d, **pools, **_torchvision_classes()}
    for module in model.modules():
        if isinstance(module, FusedSequential) and "stock" in vars(type(module)):  # not a subclass of the user's
            module.__class__ = module.stock
        elif type(module) in stock_classes:
            module.__class__ = stock_classes[type(module)]
    return model


def _has_pair(layers: nn.Sequential) -> bool:
    """Whether a layer that can apply a ReLU stands before one, or a sparse convolution before a norm."""
    return any(
        (type(following) is nn.ReLU and applies_relu(layer)) or is_pair(layer, following)
        for layer, following in pairwise(layers._modules.values())
    )


def _is_stock(module: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Exactly of this class and with its behaviour."""
    return type(module) is kind and "forward" not in vars(module)


def _torchvision_classes() -> dict[type[nn.Module], type[nn.Module]]:
    """Our class -> torchvision's; empty while nobody has imported torchvision's, since then no model is made of it."""
    if "torchvision.models.resnet" not in sys.modules:
        return {}
    from grasp_sparse.nn import torchvision_resnet

    return torchvision_resnet.STOCK
