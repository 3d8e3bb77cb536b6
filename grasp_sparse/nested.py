"""Tensors in nested tuples, lists and dicts, which is what models are given: changed one by one, in the same structure.

A namedtuple, PackedSequence among them, is one thing with parts: it is put together again as what it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def is_namedtuple(data: Any) -> bool:
    """Whether ``data`` is a tuple whose places have names."""
    return isinstance(data, tuple) and hasattr(data, "_fields")


def map_tensors(
    function: Callable[[Tensor], Any], data: Any, packed: Callable[[PackedSequence], PackedSequence] | None = None
) -> Any:
    """``data`` with every tensor replaced by ``function(tensor)``; what is no tensor stays.

    packed: makes of packed sequences what is to be in their place. Without it ``function`` sees their tensors, except
    batch_sizes: that is their structure, and torch wants it on the CPU.
    """

    def each(value: Any) -> Any:
        return map_tensors(function, value, packed)

    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, Mapping):
        return {key: each(value) for key, value in data.items()}
    if isinstance(data, PackedSequence):
        if packed is not None:
            return packed(data)
        return data._make((each(data.data), data.batch_sizes, each(data.sorted_indices), each(data.unsorted_indices)))
    if is_namedtuple(data):
        return data._make(map(each, data))
    if isinstance(data, (tuple, list)):
        return [each(value) for value in data] if isinstance(data, list) else tuple(map(each, data))
    return data


def leaves(data: Any) -> Iterator[Tensor | PackedSequence]:
    """The tensors in ``data``, in order, and packed sequences as they are."""
    if isinstance(data, (Tensor, PackedSequence)):
        yield data
    elif isinstance(data, (Mapping, tuple, list)):
        for value in data.values() if isinstance(data, Mapping) else data:
            yield from leaves(value)


def first_tensor(data: Any) -> Tensor:
    """The first tensor in ``data``: the one whose first dimension counts samples, unless it is that of packed sequences."""
    first = _first(data)
    return first.data if isinstance(first, PackedSequence) else first


def count_samples(data: Any) -> int:
    """How many samples ``data`` holds: by its first tensor, or the number of sequences that are packed in its place."""
    first = _first(data)
    return int(first.batch_sizes[0]) if isinstance(first, PackedSequence) else first.shape[0]


def _first(data: Any) -> Tensor | PackedSequence:
    for first in leaves(data):
        return first
    raise ValueError(f"Expected a tensor, or a tuple or dict holding one, got {type(data).__name__}")
