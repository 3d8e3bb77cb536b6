"""Seconds of the layers of a weight, and what they store to be that fast: measured, or remembered if they were."""

from __future__ import annotations

import functools
import operator
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from grasp_sparse import _extension
from grasp_sparse.ops import triton
from grasp_sparse.planning import cache, measure
from grasp_sparse.planning.inputs import LayerInput
from grasp_sparse.planning.measure import Times
from grasp_sparse.targets import BlockSize, Target

# What has to win by more than two measurements of the same thing differ: sparse over masked, single weights over blocks.
MARGIN = 1.03

# What took longer to measure than this, in seconds, outlasted what the machine did for a moment.
_LONG_LOOK = 1.0

_Calls = Sequence[tuple[nn.Module, LayerInput, int]]


class _Look(NamedTuple):
    """Times that have just been measured, in so many seconds, and how to measure them again."""

    key: str
    times: Times
    seconds: float
    measure: Callable[[], Times]

    def again(self) -> None:
        """The fastest calls of both looks count."""
        cache.replace(self.key, self.times, Times(*map(min, self.times, self.measure())))


def calls_of(target: Target, inputs: Mapping[str, Counter[LayerInput]]) -> list[tuple[nn.Module, LayerInput, int]]:
    """(layer, kind of input, number of calls) of all layers that hold the weight."""
    return [(layer, given, calls) for name, layer in target.layers.items() for given, calls in inputs.get(name, {}).items()]


def measure_all(called: Iterable[tuple[Target, _Calls]]) -> None:
    """Puts into the cache what ``fastest_times`` will ask of it: small layers first, and most of them once more after all others.

    For half a second or some seconds a machine may wake threads late or give a core to somebody else, and dense and sparse suffer
    by different factors: a small layer has been seen to take 0.15, 0.23 and 40 ms. Two looks some time apart seldom both see that.
    """
    looks: list[_Look] = []
    for target, calls in sorted(called, key=lambda pair: pair[0].mask.numel()):
        if calls and measurable(target):
            fastest_times(target, calls, looks)
    for look in looks:
        if look.seconds < _LONG_LOOK:
            look.again()


def fastest_times(target: Target, called: _Calls, looks: list[_Look] | None = None) -> tuple[Times, BlockSize, str]:
    """Times of one weight under its mask, what its sparse layers store to be that fast, and why, if that is not the pattern's blocks.

    Each storage is measured beside the masked layer and judged by that: machines are not equally fast at all times. Single weights,
    which take more memory for indices, have to win by more than noise. What had to be measured is added to ``looks``.
    """
    usual = target.block_size
    found = {size: _storage_times(target, called, size, looks) for size in measurable(target) or [usual]}
    if usual not in found:
        return found[None], None, obstacle(target, usual)
    stored, reason = usual, ""
    if usual is not None and None in found:
        gain = found[usual].sparse / found[usual].masked / (found[None].sparse / found[None].masked)
        if gain > MARGIN:
            stored, reason = None, f"as {describe_blocks(usual)} it takes {gain:.2f} times as long"
    return found[stored], stored, reason


def _storage_times(target: Target, called: _Calls, stored: BlockSize, looks: list[_Look] | None) -> Times:
    """Summed over the layers of the weight, their inputs and calls."""
    kind = target.pattern.name if stored == target.block_size else f"{target.pattern.name} as single weights"
    parts = []
    for layer, given, calls in called:
        if not torch.is_autocast_enabled(layer.weight.device.type):
            given = given._replace(dtype=layer.weight.dtype)  # the model has run as a float32 copy if it is half precision
        key = cache.layer_key(layer, given, kind)
        times = cache.recall(key, target.kept)
        if times is None:
            again = functools.partial(measure.measure_layer, layer, target.mask, given, stored)
            start = time.perf_counter()
            times = again()
            cache.remember(key, target.kept, times)
            if looks is not None and target.mask.device.type == "cpu":  # a GPU is nobody else's meanwhile
                looks.append(_Look(key, times, time.perf_counter() - start, again))
        parts.append(times * calls)
    return functools.reduce(operator.add, parts)


def obstacle(target: Target, stored: BlockSize) -> str | None:
    """Why sparse layers that store this run on the pure-torch reference, so that measuring them would say nothing."""
    device, status = target.mask.device.type, _extension.status()
    if device == "cuda":
        return status.cuda_reason if stored is None else triton.why_not(stored)
    return None if device == "cpu" and status.loaded else f"no compiled kernels for {device}"


def measurable(target: Target) -> list[BlockSize]:
    """What may be stored and has kernels."""
    return [size for size in target.storages if obstacle(target, size) is None]


def describe_blocks(block_size: tuple[int, int]) -> str:
    return f"{block_size[0]}x{block_size[1]} blocks"
