"""Linear layer that stores and multiplies only kept weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from grasp_sparse.formats import CsrIndices, storage_of
from grasp_sparse.nn.sparse import SparseLayer
from grasp_sparse.nn.symbolic import called, is_symbolic
from grasp_sparse.ops import bsr_linear, csr_linear


class SparseLinear(SparseLayer):
    """y = x Wᵀ + b as ``nn.Linear``, x ``[..., in_features]``, with a W of which only ``values`` exist.

    Args:
        in_features, out_features: as ``nn.Linear``.
        values, indices, bias: as :class:`SparseLayer`.
    """

    def __init__(
        self, in_features: int, out_features: int, values: Tensor, indices: CsrIndices, bias: Tensor | None = None
    ) -> None:
        super().__init__((out_features, in_features), values, indices, bias)
        self.in_features = in_features
        self.out_features = out_features

    @classmethod
    def from_dense(cls, module: nn.Linear, mask: Tensor, block_size: tuple[int, int] | None = None) -> SparseLinear:
        """Keeps the entries of ``module.weight`` where the bool ``mask [out_features, in_features]`` is True.

        The bias Parameter is taken over; ``module`` is not changed.

        Args:
            block_size: outputs by inputs of the blocks that are stored whole; None stores single weights.

        Raises:
            ValueError: ``mask`` does not fit, or keeps a part of a block.
        """
        check_mask(module, mask)
        storage = storage_of(block_size)
        indices = storage.from_mask(mask.to(module.weight.device))
        layer = cls(module.in_features, module.out_features, storage.gather(module.weight, indices), indices, module.bias)
        layer.values.requires_grad_(module.weight.requires_grad)
        return layer.train(module.training)

    def to_dense(self) -> nn.Linear:
        """An ``nn.Linear`` with exact zeros where pruned; it takes over the bias Parameter."""
        dense = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        dense.weight = nn.Parameter(self.to_dense_weight().detach(), requires_grad=self.values.requires_grad)
        dense.bias = self.bias
        return dense.train(self.training)

    def forward(self, input: Tensor, relu: bool = False) -> Tensor:
        """As that of ``nn.Linear``; if ``relu``, max(…, 0) of it."""
        if is_symbolic(input):
            return called(self, input, relu=relu)
        if self.block_size is None:
            return csr_linear(input, self.values, self._walked(), self.bias, relu)
        return bsr_linear(input, self.values, self._walked(), self.weight_shape, self.bias, relu)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, {self._kept()}"


def check_mask(module: nn.Module, mask: Tensor) -> None:
    """Raises ValueError unless ``mask`` is a bool tensor of the shape of ``module.weight``."""
    if mask.dtype != torch.bool or mask.shape != module.weight.shape:
        raise ValueError(f"Expected a bool mask of shape {list(module.weight.shape)}, got {mask.dtype} {list(mask.shape)}.")
