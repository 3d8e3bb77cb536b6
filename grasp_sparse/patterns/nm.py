"""N:M: of every M consecutive inputs of one output the N best are kept, as sparse tensor cores read 2:4."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grasp_sparse.formats import from_blocks, to_blocks
from grasp_sparse.patterns.checks import check_sizes, check_weight


@dataclass(frozen=True)
class NM:
    """`n` of every `m` consecutive inputs of one output, of a convolution: of m consecutive channels of one tap.

    Where m does not divide the inputs, the last r < m of them keep ceil(n·r / m): at most n, and never none. Elsewhere the density
    of every layer is n / m, so a scope or a budget has nothing to decide.
    """

    n: int
    m: int
    block_size: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_sizes(self.name, self.n, self.m)
        if self.n > self.m:
            raise ValueError(f"Expected n of at most m in {self.name}")

    @property
    def name(self) -> str:
        return f"nm({self.n}, {self.m})"

    @property
    def density(self) -> float:
        return self.n / self.m

    def best(self, scores: Tensor, density: float, within: Tensor | None = None) -> Tensor:
        """Mask of the best of every m inputs; among equal scores the lower index wins.

        density: n / m, or more on the way there, in rounds: of r inputs ceil(density·r) are kept.
        within: bool mask to stay inside; ValueError if it leaves some m inputs fewer than that.
        """
        check_weight(self.name, scores.shape)
        allowed = torch.ones_like(scores, dtype=torch.bool)
        inputs = to_blocks(allowed, (1, self.m)).sum(-1, keepdim=True)
        quotas = torch.tensor([math.ceil(density * r - 1e-9) for r in range(self.m + 1)], device=scores.device)[inputs]
        allowed = to_blocks(allowed if within is None else within, (1, self.m))
        if bool((allowed.sum(-1, keepdim=True) < quotas).any()):
            kept = int(quotas.max())
            raise ValueError(f"Expected within to leave of every {self.m} inputs the {kept} that pattern {self.name} keeps, got fewer")
        ranked = to_blocks(scores, (1, self.m)).masked_fill(~allowed, -math.inf)
        places = ranked.argsort(dim=-1, descending=True, stable=True)
        ranks = torch.empty_like(places).scatter_(-1, places, torch.arange(self.m, device=scores.device).expand_as(places))
        return from_blocks(ranks < quotas, scores.shape)
