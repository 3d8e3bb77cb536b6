"""Layers that store only kept weights, layers that keep a dense kernel on an exactly masked weight, a batch norm
and a sequence of layers that fuse the ReLU, and pooling that keeps the layout."""

from grasp_sparse.nn.conv import SparseConv2d
from grasp_sparse.nn.conv_norm import conv_norm_relu
from grasp_sparse.nn.linear import SparseLinear
from grasp_sparse.nn.masked import MaskedConv2d, MaskedLinear
from grasp_sparse.nn.norm import BatchNorm2d, norm_relu
from grasp_sparse.nn.pool import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d
from grasp_sparse.nn.sequential import FusedSequential
from grasp_sparse.nn.sparse import SparseLayer

__all__ = [
    "AdaptiveAvgPool2d", "AvgPool2d", "BatchNorm2d", "FusedSequential", "MaskedConv2d", "MaskedLinear", "MaxPool2d",
    "SparseConv2d", "SparseLayer", "SparseLinear", "conv_norm_relu", "norm_relu",
]  # fmt: skip
