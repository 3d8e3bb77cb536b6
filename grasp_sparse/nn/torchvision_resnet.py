"""torchvision's residual networks with their norms called through :func:`norm_relu`, so that these may apply the ReLU.

Each class is its base but for its forward, which computes the same. Imports torchvision, so nothing imports this unless a
model made of these classes is at hand.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models import resnet

from grasp_sparse.nn.norm import norm_relu


class BasicBlock(resnet.BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(norm_relu(self.bn1, self.conv1(x), relu=self.relu))
        return norm_relu(self.bn2, y, x if self.downsample is None else self.downsample(x), self.relu)


class Bottleneck(resnet.Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        y = norm_relu(self.bn1, self.conv1(x), relu=self.relu)
        y = self.conv3(norm_relu(self.bn2, self.conv2(y), relu=self.relu))
        return norm_relu(self.bn3, y, x if self.downsample is None else self.downsample(x), self.relu)


class ResNet(resnet.ResNet):
    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(norm_relu(self.bn1, self.conv1(x), relu=self.relu))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


STOCK = {BasicBlock: resnet.BasicBlock, Bottleneck: resnet.Bottleneck, ResNet: resnet.ResNet}
