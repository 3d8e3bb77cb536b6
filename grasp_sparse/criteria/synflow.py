"""SynFlow: keep synaptic flow, without data (Tanaka, Kunin, Yamins, Ganguli, NeurIPS 2020, arXiv 2006.05467).

R = 1ᵀ·f_|θ|(1): the sum of the outputs of the network with every parameter and buffer replaced by its magnitude, on an
input of ones. Infinite entries stay as they are: a mask of −∞ blocks what it is added to, and with +∞ nothing finite would
be left. The score |θ ⊙ ∂R/∂θ| is the sum of the paths through a weight, so every layer has the same total. Published as 100
scoring rounds with density^(k/100) kept after round k; `prune` does the rounds, this file is one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from grasp_sparse.criteria.batches import Batch
from grasp_sparse.criteria.graph import check_checkpointing, warn_unreached
from grasp_sparse.nested import map_tensors
from grasp_sparse.scratch import call_model


def synflow_scores(
    model: nn.Module, weights: Mapping[str, nn.Parameter], batches: Iterable[Batch], loss_fn: Any = None
) -> dict[str, Tensor]:
    """|θ ⊙ ∂R/∂θ| for every weight; changes `model` (a scratch copy).

    Takes only the input's shape, from the first batch, and no loss. Path weights grow exponentially with depth: `score`
    runs this in float64 unless told another dtype.
    """
    model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(_magnitude(parameter))
        for buffer in model.buffers():
            buffer.data = _magnitude(buffer)  # not in place, which an expanded one does not allow
    ones = _one_sample_of_ones(next(iter(batches)).inputs)
    output = call_model(model, ones)
    if not isinstance(output, Tensor):
        raise ValueError(f"Expected the model to return a tensor for criterion='synflow', got {type(output).__name__}")
    check_checkpointing(output)
    gradients = torch.autograd.grad(output.sum(), list(weights.values()), allow_unused=True)
    warn_unreached([name for name, gradient in zip(weights, gradients, strict=True) if gradient is None])
    return {
        name: torch.zeros_like(weight, requires_grad=False) if gradient is None else (weight.detach() * gradient).abs_()
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }


def _magnitude(tensor: Tensor) -> Tensor:
    """Of every entry but infinite ones, in the same dtype; of integers, which index and count, none."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return torch.where(tensor.isinf(), tensor, tensor.abs().to(tensor.dtype))


def _one_sample_of_ones(inputs: Any) -> Any:
    def ones(tensor: Tensor) -> Tensor:
        return torch.ones_like(tensor[:1], requires_grad=False) if tensor.ndim else tensor

    return map_tensors(ones, inputs, packed=lambda sequences: pack_sequence([torch.ones_like(unpack_sequence(sequences)[0])]))
