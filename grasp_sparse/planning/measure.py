"""Seconds of one layer, forward and backward: dense as the model has it, masked, and sparse, in turns in one process."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from grasp_sparse.cuda_timing import device_times
from grasp_sparse.nn import MaskedConv2d, MaskedLinear, SparseConv2d, SparseLinear
from grasp_sparse.nn.masked import LaterMask
from grasp_sparse.planning.inputs import LayerInput
from grasp_sparse.timing import interleaved

ROUNDS = 60
_USUAL_ROUNDS = 15
_BRIEF_ROUNDS = 1200  # at most, of calls shorter than _BRIEF
_SHORTEST = 0.03  # seconds of calls before anything is clear: what others do for a moment outlasts a few short calls
_SHORT_ENOUGH = 0.08  # … after which, from ROUNDS on, measuring ends
_LONG_ENOUGH = 0.5  # … from _USUAL_ROUNDS on
_TOO_LONG = 5.0  # … at any rate
_CLEAR = 1.5  # one way this much faster: no more rounds are needed
_SETTLED = 1.1  # … if the two fastest calls of each are this near
_DEVICE_ROUNDS = 10  # a GPU is nobody else's meanwhile
_BRIEF = 1e-3  # seconds; calls shorter than this get one unmeasured call each before the measured one


class Times(NamedTuple):
    """Seconds of forward + backward, the fastest of the rounds: whatever else a shared machine does only ever adds."""

    dense: float
    masked: float
    sparse: float

    def __add__(self, other: Times) -> Times:
        return Times(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, calls: int) -> Times:
        return Times(*(seconds * calls for seconds in self))


def measure_layer(
    layer: nn.Module, mask: Tensor, given: LayerInput, block_size: tuple[int, int] | None = None, rounds: int | None = None
) -> Times:
    """Times of ``layer``, a dense ``nn.Linear`` or ``nn.Conv2d`` with one group, under ``mask`` on inputs like ``given``.

    The layer is copied; its gradients and hooks stay out of it. Data are random: zeros would be cheaper. With ``block_size``
    the sparse one stores whole blocks. The masked one leaves its gradient unmasked, as under an optimizer with ``raw_gradients``.
    What it costs to turn images at the ends of a chain of sparse layers is not counted. ``rounds``: at most so many.
    """
    inputs = {"dense": given, "masked": given, "sparse": _input_of_sparse(layer, given, block_size)}
    masked_kind, sparse_kind = (
        (MaskedLinear, SparseLinear) if isinstance(layer, nn.Linear) else (MaskedConv2d, SparseConv2d)
    )
    dense = masked_kind.from_dense(layer, mask).to_dense()
    if dense.bias is not None:
        dense.bias = nn.Parameter(dense.bias.detach().clone(), requires_grad=dense.bias.requires_grad)
    device = dense.weight.device
    generator = torch.Generator(device).manual_seed(0)
    with torch.enable_grad(), torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        masked = masked_kind.from_dense(dense, mask)
        consumer = LaterMask(masked)  # while this lives
        sparse = sparse_kind.from_dense(dense, mask, block_size)
        arms = {
            name: _arm(arm, inputs[name].random(generator), generator)
            for name, arm in (("dense", dense), ("masked", masked), ("sparse", sparse))
        }
        if device.type == "cuda":
            timings = device_times(arms, min(rounds or _DEVICE_ROUNDS, _DEVICE_ROUNDS))
        else:
            first = interleaved(arms, 2, warmup=1)
            brief = max(timing.best for timing in first.values()) < _BRIEF
            most = rounds or (_BRIEF_ROUNDS if brief else ROUNDS)
            timings = interleaved(arms, most, warmup=0, lead_in=int(brief), enough=_decided)
        torch.clear_autocast_cache()  # or casts of these layers would live as long as the caller's autocast
    return Times(*(timings[name].best for name in Times._fields))


def _input_of_sparse(layer: nn.Module, given: LayerInput, block_size: tuple[int, int] | None) -> LayerInput:
    """In a chain of sparse convolutions of single weights on CUDA images lie batch innermost, whatever the dense model's layout."""
    turned = layer.weight.is_cuda and block_size is None and isinstance(layer, nn.Conv2d) and len(given.shape) == 4
    return given._replace(layout="batch-innermost") if turned else given


def _arm(layer: nn.Module, x: Tensor, generator: torch.Generator) -> Callable[[], None]:
    """One forward and backward of ``layer`` on ``x``, with random gradients in the layout of its output.

    Autocast casts a weight that is a leaf once for as long as it is on: the dense layer's, not what the others make of theirs.
    A training step enters autocast anew, so every call here casts.
    """
    parameters = [x, *layer.parameters()]
    y = layer(x)
    grad = torch.empty_like(y).copy_(torch.randn(y.shape, generator=generator, device=y.device)) if y.requires_grad else None

    def run() -> None:
        for parameter in parameters:
            parameter.grad = None
        torch.clear_autocast_cache()
        y = layer(x)
        if grad is not None:
            y.backward(grad)

    return run


def _decided(seconds: dict[str, list[float]]) -> bool:
    """Whether it is clear who is faster, or has taken too long to become so."""
    spent = sum(map(sum, seconds.values()))
    rounds = len(seconds["sparse"])
    if spent < _SHORTEST:
        return False
    if spent > (_SHORT_ENOUGH if rounds >= ROUNDS else _LONG_ENOUGH if rounds >= _USUAL_ROUNDS else _TOO_LONG):
        return True
    fastest = {name: heapq.nsmallest(2, taken) for name, taken in seconds.items()}
    settled = all(second <= _SETTLED * first for first, second in fastest.values())
    # Masked does what dense does; where it seems much slower, that may be the machine.
    wins = fastest["sparse"][0] * _CLEAR < min(fastest["dense"][0], fastest["masked"][0])
    loses = fastest["sparse"][0] > _CLEAR * fastest["masked"][0]
    return settled and (wins or loses)
