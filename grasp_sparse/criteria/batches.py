"""The samples a criterion looks at: drawn once, kept for a second pass, cut into micro-batches.

GraSP reads its samples twice and both passes must see the same inputs, so a DataLoader that shuffles and augments is
sampled once (what can be made again is not kept: RereadBatches). Only inputs and targets are kept, on the CPU: up to
`MEMORY_LIMIT` bytes in memory, the rest in an unnamed temporary file, so that hundreds of ImageNet batches need the memory
of one. (To draw class-balanced batches from others all their samples are held once, until the last class has enough.)
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_sequence, unpack_sequence

from grasp_sparse.nested import count_samples, first_tensor, leaves, map_tensors
from grasp_sparse.scratch import move

MEMORY_LIMIT = 1 << 30


class Batch(NamedTuple):
    """One micro-batch: inputs (a tensor, tuple or dict; a namedtuple is one argument) and targets."""

    inputs: Any
    targets: Any

    @property
    def samples(self) -> int:
        return count_samples(self.inputs)


def as_batch(item: Any) -> Batch:
    """(input, target) as a Batch; ValueError for anything else."""
    if isinstance(item, (tuple, list)) and len(item) == 2:
        batch = Batch(*item)
        if first_tensor(batch.inputs).ndim and batch.samples:
            return batch
        shape = list(first_tensor(batch.inputs).shape)
        raise ValueError(f"Expected batches with at least one sample, got an input of shape {shape}")
    size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
    kind = type(item).__name__
    raise ValueError(f"Expected batches to be an iterable of (input, target), got one holding a {kind}{size}")


class RereadBatches:
    """Batches that whoever makes them can make again, the same bits every time: read anew for each pass, none is kept.

    `read` gives a fresh iterator over (input, target).
    """

    def __init__(self, read: Callable[[], Iterable[Any]]) -> None:
        self._read = read

    def __iter__(self) -> Iterator[Batch]:
        return map(as_batch, self._read())


class StoredBatches:
    """Batches read once from any iterable, which can be iterated again and again and give the same bits every time."""

    def __init__(
        self, batches: Iterable[Any], *, count: int | None = None, memory_limit: int = MEMORY_LIMIT, allow_none: bool = False
    ) -> None:
        self._in_memory: list[Batch] = []
        self._spilled: list[tuple[Batch, int, int]] = []  # structure without its tensors, and where they are in the file
        self._file: Any = None
        held = 0
        for item in islice(batches, count):
            batch = Batch(*move(tuple(as_batch(item)), torch.device("cpu")))
            size = _bytes(batch)
            if held + size <= memory_limit and not self._spilled:
                self._in_memory.append(batch)
                held += size
            else:
                self._spill(batch)
        if count is not None and len(self) < count:
            raise ValueError(f"Expected at least num_batches={count} batches, got {len(self)}")
        if not len(self) and not allow_none:
            raise ValueError("Expected at least one batch, got none (an iterator that is already used up?)")

    def _spill(self, batch: Batch) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile()
        buffer, tensors, nothing = io.BytesIO(), [], torch.empty(0)

        def take_out(tensor: Tensor) -> Tensor:
            # torch.save writes the whole storage behind a view: a slice of a data set would carry the data set along.
            tensors.append(tensor.clone())
            return nothing

        structure = map_tensors(take_out, batch)
        torch.save(tensors, buffer)
        self._spilled.append((structure, self._file.seek(0, io.SEEK_END), buffer.tell()))
        self._file.write(buffer.getbuffer())

    @property
    def spilled(self) -> bool:
        """Whether memory does not hold them all."""
        return bool(self._spilled)

    def __len__(self) -> int:
        return len(self._in_memory) + len(self._spilled)

    def __iter__(self) -> Iterator[Batch]:
        yield from self._in_memory
        for structure, offset, size in self._spilled:
            self._file.seek(offset)
            tensors = iter(torch.load(io.BytesIO(self._file.read(size)), weights_only=True))
            yield map_tensors(lambda _, tensors=tensors: next(tensors), structure)


def class_balanced(
    batches: Iterable[Any], samples_per_class: int, num_classes: int, num_batches: int = 1
) -> list[tuple[Tensor, Tensor]]:
    """Draws `num_batches` batches with `samples_per_class` samples of each class, the first ones found, none twice.

    Each batch is (inputs [C·k, …], targets [C·k]) concatenated class by class, as the authors of GraSP do. Raises
    ValueError when `batches` ends before every class has enough, naming the classes, and for a target that is no class.
    """
    return list(balanced_batches(batches, samples_per_class, num_classes, num_batches))


def balanced_batches(
    batches: Iterable[Any], samples_per_class: int, num_classes: int, num_batches: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of `class_balanced` one by one; their samples, of which all are held at first, are let go with each."""
    if samples_per_class < 1 or num_classes < 1 or num_batches < 1:
        raise ValueError(
            "Expected samples_per_class, num_classes and num_batches of at least 1, "
            f"got {samples_per_class}, {num_classes} and {num_batches}"
        )
    needed = samples_per_class * num_batches
    found: list[list[Tensor]] = [[] for _ in range(num_classes)]
    for item in batches:
        inputs, targets = as_batch(item)
        tensors = isinstance(inputs, Tensor) and isinstance(targets, Tensor)
        if not tensors or targets.ndim != 1 or targets.is_floating_point():
            raise ValueError("Expected tensors and one integer class per sample for class-balanced sampling")
        for sample, label in zip(inputs, targets.tolist(), strict=True):
            if not 0 <= label < num_classes:
                raise ValueError(f"Expected targets in [0, num_classes={num_classes}), got {label}")
            if len(found[label]) < needed:
                found[label].append(sample.clone())  # a view would keep the whole loader batch alive
        if all(len(samples) == needed for samples in found):
            break
    short = [str(label) for label, samples in enumerate(found) if len(samples) < needed]
    if short:
        raise ValueError(
            f"Expected {needed} samples of each of {num_classes} classes, the data ended too early for "
            f"class {', '.join(short[:10])}{' …' if len(short) > 10 else ''}"
        )
    for _ in range(num_batches):
        inputs = torch.stack([sample for samples in found for sample in samples[:samples_per_class]])
        for samples in found:
            del samples[:samples_per_class]
        yield inputs, torch.arange(num_classes, device=inputs.device).repeat_interleave(samples_per_class)


def micro_batches(batches: Iterable[Batch], size: int | None) -> Iterator[Batch]:
    """Cuts each batch into pieces of at most `size` samples (None: as they are).

    Samples are dealt out like cards, so that the pieces of a batch sorted by class see every class.
    """
    for batch in batches:
        pieces = 1 if size is None else -(-batch.samples // size)
        for piece in range(pieces):
            yield Batch(*(_every(part, piece, pieces) for part in batch)) if pieces > 1 else batch


def _every(data: Any, first: int, step: int) -> Any:
    def cut(sequences: PackedSequence) -> PackedSequence:
        return pack_sequence(unpack_sequence(sequences)[first::step], enforce_sorted=False)

    return map_tensors(lambda tensor: tensor[first::step] if tensor.ndim else tensor, data, packed=cut)


def _bytes(data: Any) -> int:
    return sum(leaf.data.numel() * leaf.data.element_size() for leaf in leaves(data))
