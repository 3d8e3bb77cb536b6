"""torchvision's residual networks with their layers called through :func:`conv_norm_relu`, so that these may do more at once.

Each class is its base but for its forward, which computes the same. Imports torchvision, so nothing imports this unless a
model made of these classes is at hand.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models import resnet

from grasp_sparse.nn.conv_norm import conv_norm_relu


class BasicBlock(resnet.BasicBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = conv_norm_relu(self.conv1, self.bn1, x, relu=self.relu)
        return conv_norm_relu(self.conv2, self.bn2, y, x if self.downsample is None else self.downsample(x), self.relu)


class Bottleneck(resnet.Bottleneck):
    def forward(self, x: Tensor) -> Tensor:
        y = conv_norm_relu(self.conv1, self.bn1, x, relu=self.relu)
        y = conv_norm_relu(self.conv2, self.bn2, y, relu=self.relu)
        return conv_norm_relu(self.conv3, self.bn3, y, x if self.downsample is None else self.downsample(x), self.relu)


class ResNet(resnet.ResNet):
    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.maxpool(conv_norm_relu(self.conv1, self.bn1, x, relu=self.relu))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


STOCK = {BasicBlock: resnet.BasicBlock, Bottleneck: resnet.Bottleneck, ResNet: resnet.ResNet}
