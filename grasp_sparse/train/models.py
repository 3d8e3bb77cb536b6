"""Models by name: the demo's net, the paper's two, any of torchvision's or timm's, or a factory of the user's."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from grasp_sparse.nn import conv_norm_relu
from grasp_sparse.train.errors import UserError


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)


def _paper_init_(model: nn.Module) -> None:
    """Initial weights of the GraSP paper's code: Kaiming-normal fan-out convolutions, N(0, 0.01) linear layers."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.01)
            nn.init.zeros_(module.bias)


class VGG(nn.Module):
    """3x3 convolutions with batch norm and ReLU, then ONE linear layer. `"M"` in `plan` is a 2x2 max-pool.

    Input [N, in_channels, H, W], output logits [N, num_classes]. `pool_first` pools before norm and ReLU, not after.
    """

    def __init__(self, plan: Sequence[int | str], num_classes: int, in_channels: int, pool_first: bool = False) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for entry in plan:
            if entry == "M":
                layers.insert(len(layers) - 2 * pool_first, nn.MaxPool2d(2))
            else:
                layers += [_conv3x3(channels, entry), nn.BatchNorm2d(entry), nn.ReLU(inplace=True)]
                channels = entry
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        _paper_init_(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.pool(self.features(x)).flatten(1))


def vgg19(num_classes: int = 10, in_channels: int = 3) -> VGG:
    """The paper's VGG19: 16 convolutions, one linear layer; 20,024,000 prunable weights for ten classes of colour images."""
    plan = [64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4]
    return VGG(plan, num_classes, in_channels)


def vgg_small(
    num_classes: int = 10, in_channels: int = 1, stem: int = 32, widths: Sequence[int] = (128, 128), depth: int = 2
) -> VGG:
    """The demo's net: a light stem at full size, then for each entry of `widths` a 2x2 pool and `depth` convolutions.

    The wide convolutions run at 14x14 and 7x7 (28x28 input), where the multiply-adds are. Pooling comes before norm and
    ReLU, which then touch a quarter of the values.
    """
    plan: list[int | str] = [stem]
    for width in widths:
        plan += ["M", *[width] * depth]
    return VGG(plan, num_classes, in_channels, pool_first=True)


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut (1x1 convolution where the shape changes)."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = conv_norm_relu(self.conv1, self.bn1, x)
        return conv_norm_relu(self.conv2, self.bn2, y, self.shortcut(x))


class ResNet32(nn.Module):
    """The paper's ResNet32: three stages of five blocks, widths 32/64/128; 1,855,584 prunable weights for ten classes."""

    def __init__(self, num_classes: int = 10, in_channels: int = 3, widths: Sequence[int] = (32, 64, 128), blocks: int = 5):
        super().__init__()
        self.conv1 = _conv3x3(in_channels, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        stages, channels = [], widths[0]
        for stage, width in enumerate(widths):
            strides = [1 if stage == 0 else 2] + [1] * (blocks - 1)
            stages.append(nn.Sequential(*(_BasicBlock(channels if i == 0 else width, width, s) for i, s in enumerate(strides))))
            channels = width
        self.stages = nn.Sequential(*stages)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(channels, num_classes)
        _paper_init_(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(conv_norm_relu(self.conv1, self.bn1, x))
        return self.classifier(self.pool(x).flatten(1))


_TIMM = "timm:"
OWN_MODELS: dict[str, Callable[..., nn.Module]] = {"vgg_small": vgg_small, "vgg19": vgg19, "resnet32": ResNet32}


def build_model(name: str, num_classes: int | None, in_channels: int | None, args: dict[str, Any] | None = None) -> nn.Module:
    """The named model with fresh weights, `num_classes` outputs and a first convolution for `in_channels`; None: its own.

    Raises UserError for an unknown name or arguments the factory refuses.
    """
    args = dict(args or {})
    own = name in OWN_MODELS
    factory = OWN_MODELS[name] if own else _factory(name)
    try:
        accepted = inspect.signature(factory).parameters
        takes_any = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
        wanted = {"num_classes": takes_any or "num_classes" in accepted, "in_channels": "in_channels" in accepted}
        shapes = {"num_classes": num_classes, "in_channels": in_channels}
        shape_args = {key: value for key, value in shapes.items() if wanted[key] and value is not None}
        model = factory(**{**shape_args, **args})
    except Exception as error:  # the factory is anybody's code: whatever it raises, the choice of model is what has to change
        raise UserError(f"model {name} refused its arguments {args}: {error}") from error
    if not isinstance(model, nn.Module):
        raise UserError(f"Expected model {name} to return a torch.nn.Module, got {type(model).__name__}")
    if in_channels is not None and "in_channels" not in shape_args:
        _match_first_conv(model, in_channels)
    return model


def _factory(name: str) -> Callable[..., nn.Module]:
    """`timm:name`, `package.module:factory`, or the name of a torchvision model; all without pretrained weights.

    timm's have a prefix since both have a resnet50, and they are not the same.
    """
    if name.startswith(_TIMM):
        return _timm_factory(name.removeprefix(_TIMM))
    if ":" in name:
        module_name, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise UserError(f"cannot load model {name}: {error}") from error
    from torchvision import models  # a second to import: only when asked for

    if name in models.list_models(module=models):
        return models.get_model_builder(name)
    known = [*OWN_MODELS, *models.list_models(module=models)]
    near = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else (
        f"use {', '.join(OWN_MODELS)}, a torchvision name, timm:name or package.module:factory"
    )
    raise UserError(f"unknown model '{name}'; {hint}")


def _timm_factory(name: str) -> Callable[..., nn.Module]:
    try:
        import timm
    except ImportError as error:
        raise UserError(f"model {_TIMM}{name} needs timm, which is not installed: pip install timm") from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(_TIMM + match for match in near)}?" if near else "timm.list_models() lists them"
        raise UserError(f"unknown model '{_TIMM}{name}'; {hint}")

    def create(num_classes: int | None = None, in_channels: int | None = None, **args: Any) -> nn.Module:
        shape = {"num_classes": num_classes, "in_chans": in_channels}
        return timm.create_model(name, **{key: value for key, value in shape.items() if value is not None}, **args)

    return create


def _match_first_conv(model: nn.Module, in_channels: int) -> None:
    """Replace the first convolution by one that takes `in_channels` (grey images into a colour model)."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            if module.in_channels == in_channels or module.groups != 1:
                return
            replacement = nn.Conv2d(
                in_channels, module.out_channels, module.kernel_size, module.stride, module.padding, module.dilation,
                bias=module.bias is not None, padding_mode=module.padding_mode,
            )
            with torch.no_grad():
                # same spread per output as the layer it replaces, which the model initialised for its own depth
                scale = (module.in_channels / in_channels) ** 0.5
                replacement.weight.normal_().mul_(module.weight.std() * scale)
                if module.bias is not None:
                    replacement.bias.copy_(module.bias)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, replacement)
            return
