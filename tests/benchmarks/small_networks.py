"""Networks and images for whom a benchmark takes moments."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks import networks
from benchmarks.networks import Images, Network


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )  # fmt: skip


def linears() -> nn.Module:
    return nn.Sequential(nn.Linear(3072, 8), nn.ReLU(), nn.Linear(8, 10))


CONVOLUTIONS, LINEARS = Network("resnet32", convolutions, 4, 32), Network("mlp", linears, 4, None)


def pictures() -> Images:
    return Images("Pictures (small)", torch.randn(40, 3, 32, 32), torch.arange(40) % 10)


def use_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """What --quick measures is these."""
    monkeypatch.setattr(networks, "QUICK", (CONVOLUTIONS, LINEARS))
    monkeypatch.setattr(networks, "load_images", lambda *_: pictures())
