"""Blocks: tiles of outputs by inputs. Whole blocks keep the products of a pruned layer dense inside, as tensor cores want them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grasp_sparse.formats import block_extents, block_grid, from_blocks, to_blocks
from grasp_sparse.patterns.checks import check_sizes, check_weight


class _Tiles:
    """Groups are the tiles of `tile` = (outputs, inputs) that `formats.to_blocks` cuts, block row after block row.

    A convolution is cut tap by tap, so a tile holds neighbouring channels of one tap. At the edges tiles are smaller.
    """

    name: str
    tile: tuple[int, int]
    density: ClassVar[None] = None

    def group_size(self, shape: Sequence[int]) -> int | Tensor:
        check_weight(self.name, shape)
        heights, widths = block_extents(shape, self.tile)
        whole = shape[0] % self.tile[0] == 0 and shape[1] % self.tile[1] == 0
        return self.tile[0] * self.tile[1] if whole else torch.outer(heights, widths).flatten()

    def pool(self, scores: Tensor) -> Tensor:
        check_weight(self.name, scores.shape)
        return to_blocks(scores, self.tile).flatten(2).sum(-1, dtype=torch.float64).flatten()

    def expand(self, kept: Tensor, scores: Tensor) -> Tensor:
        tiles = kept.view(*block_grid(scores.shape, self.tile), 1, 1)
        return from_blocks(tiles.expand(-1, -1, *self.tile), scores.shape)


@dataclass(frozen=True)
class Block(_Tiles):
    """Tiles of `bh` outputs by `bw` inputs; layers store them whole."""

    bh: int
    bw: int

    def __post_init__(self) -> None:
        check_sizes(self.name, self.bh, self.bw)

    @property
    def name(self) -> str:
        return f"block({self.bh}, {self.bw})"

    @property
    def tile(self) -> tuple[int, int]:
        return self.bh, self.bw

    @property
    def block_size(self) -> tuple[int, int]:
        return self.tile


@dataclass(frozen=True)
class Vector(_Tiles):
    """`v` consecutive outputs of one input, which read the same activation: the groups of `block(v, 1)`.

    Layers store them as single weights, and the kernels of those run them; `block(v, 1)` itself is stored as blocks.
    """

    v: int
    block_size: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_sizes(self.name, self.v)

    @property
    def name(self) -> str:
        return f"vector({self.v})"

    @property
    def tile(self) -> tuple[int, int]:
        return self.v, 1
