"""torchvision's residual networks with their norms called through :func:`norm_relu`, so that these may apply the ReLU.

Each class is its base but for ``forward``, which computes the same. Imports torchvision, so nothing imports this unless a
model made of these classes is at hand.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models import resnet

from grasp_sparse.nn.norm import norm_relu


class BasicBlock(resnet.BasicBlock):
    fusible_norms = ("bn1", "bn2")

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(norm_relu(self.bn1, self.conv1(x)))
        return norm_relu(self.bn2, y, x if self.downsample is None else self.downsample(x))


class Bottleneck(resnet.Bottleneck):
    fusible_norms = ("bn1", "bn2", "bn3")

    def forward(self, x: Tensor) -> Tensor:
        y = norm_relu(self.bn1, self.conv1(x))
        y = self.conv3(norm_relu(self.bn2, self.conv2(y)))
        return norm_relu(self.bn3, y, x if self.downsample is None else self.downsample(x))


class ResNet(resnet.ResNet):
    fusible_norms = ("bn1",)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(norm_relu(self.bn1, self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


STOCK = {BasicBlock: resnet.BasicBlock, Bottleneck: resnet.Bottleneck, ResNet: resnet.ResNet}
