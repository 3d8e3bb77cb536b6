"""2-D convolution that stores and multiplies only kept weights."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from grasp_sparse.formats import CsrIndices, storage_of
from grasp_sparse.nn.kernels import batch_innermost
from grasp_sparse.nn.linear import check_mask
from grasp_sparse.nn.sparse import SparseLayer
from grasp_sparse.nn.symbolic import called, is_symbolic
from grasp_sparse.ops import bsr_conv2d, csr_conv2d

_NO_PADDING = (0, 0, 0, 0)


class SparseConv2d(SparseLayer):
    """``nn.Conv2d`` with one group, of whose filters only ``values`` exist.

    Input ``[N, in_channels, H, W]`` or ``[in_channels, H, W]``; the output has its memory layout, but on CUDA, where single weights
    are stored, that with the batch innermost.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, padding_mode: as ``nn.Conv2d``, sizes as pairs.
        values, indices, bias: as :class:`SparseLayer`.

    Raises:
        ValueError: as :class:`SparseLayer`.
    """

    groups = 1

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: tuple[int, int],
        values: Tensor,
        indices: CsrIndices,
        bias: Tensor | None = None,
        *,
        stride: tuple[int, int] = (1, 1),
        padding: tuple[int, int] | str = (0, 0),
        dilation: tuple[int, int] = (1, 1),
        padding_mode: str = "zeros",
    ) -> None:
        super().__init__((out_channels, in_channels, *kernel_size), values, indices, bias)
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.kernel_size = tuple(kernel_size)
        self.stride = tuple(stride)
        self.padding = padding if isinstance(padding, str) else tuple(padding)
        self.dilation = tuple(dilation)
        self.padding_mode = padding_mode
        self.border = resolve_padding(self.padding, self.kernel_size, self.dilation)

    @classmethod
    def from_dense(cls, module: nn.Conv2d, mask: Tensor, block_size: tuple[int, int] | None = None) -> SparseConv2d:
        """Keeps the entries of ``module.weight`` where the bool ``mask``, of the weight's shape, is True.

        The bias Parameter is taken over; ``module`` is not changed.

        Args:
            block_size: output channels by input channels of one tap, the blocks that are stored whole; None stores single
                weights.

        Raises:
            ValueError: ``module`` has more than one group, or ``mask`` does not fit or keeps a part of a block.
        """
        if module.groups != 1:
            raise ValueError(f"Expected a convolution with one group, got {module.groups}; use MaskedConv2d.")
        check_mask(module, mask)
        storage = storage_of(block_size)
        indices = storage.from_mask(mask.to(module.weight.device))
        layer = cls(
            module.in_channels,
            module.out_channels,
            module.kernel_size,
            storage.gather(module.weight, indices),
            indices,
            module.bias,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            padding_mode=module.padding_mode,
        )
        layer.values.requires_grad_(module.weight.requires_grad)
        return layer.train(module.training)

    def to_dense(self) -> nn.Conv2d:
        """An ``nn.Conv2d`` with exact zeros where pruned; it takes over the bias Parameter."""
        dense = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            bias=False,
            padding_mode=self.padding_mode,
            device="meta",
        )
        dense.weight = nn.Parameter(self.to_dense_weight().detach(), requires_grad=self.values.requires_grad)
        dense.bias = self.bias
        return dense.train(self.training)

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        """As that of ``nn.Conv2d``; if ``relu``, which takes whole blocks, max(…, 0) of it."""
        if is_symbolic(input):
            return called(self, input, relu=relu)
        if relu and self.block_size is None:
            raise ValueError("Expected relu with values of whole blocks only, got single weights; put nn.ReLU behind the layer.")
        x, border = input, self.border
        if self.padding_mode != "zeros":
            top, bottom, left, right = border
            x, border = F.pad(x, (left, right, top, bottom), mode=self.padding_mode), _NO_PADDING
        if self.block_size is None:
            x = batch_innermost(x)
            return csr_conv2d(x, self.values, self._walked(), self.bias, self.kernel_size, self.stride, border, self.dilation)
        return bsr_conv2d(x, self.values, self._walked(), self.weight_shape, self.bias, self.stride, border, self.dilation, relu)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.border != _NO_PADDING:
            text += f", padding={self.padding}"
        if self.dilation != (1, 1):
            text += f", dilation={self.dilation}"
        if self.bias is None:
            text += ", bias=False"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode}"
        return f"{text}, {self._kept()}"


def resolve_padding(
    padding: tuple[int, int] | str, kernel_size: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int, int, int]:
    """(top, bottom, left, right) of what ``nn.Conv2d`` calls padding; of an odd total "same" puts the extra one last."""
    if padding == "valid":
        return _NO_PADDING
    if padding == "same":
        vertical, horizontal = (d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True))
        return vertical // 2, vertical - vertical // 2, horizontal // 2, horizontal - horizontal // 2
    return padding[0], padding[0], padding[1], padding[1]
