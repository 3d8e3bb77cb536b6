"""MaskSet: which weights of a model are kept, by parameter name; saved with one bit a weight."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from grasp_sparse.bits import pack_bits, unpack_bits
from grasp_sparse.files import write_atomically

_METADATA_KEY = "grasp_sparse.masks"  # one key: safetensors orders several at random, and equal masks should be equal files
_FORMAT = 1


class MaskSet(Mapping[str, Tensor]):
    """Immutable mapping from parameter name to a bool mask of the weight's shape, True = kept.

    recipe: how the masks were made (criterion, sparsity, pattern, seed, version, …); anything json can hold.
    skipped: (module name, reason) of modules that stay dense.
    """

    def __init__(
        self, masks: Mapping[str, Tensor], recipe: Mapping[str, Any] | None = None, skipped: Iterable[tuple[str, str]] = ()
    ) -> None:
        for name, mask in masks.items():
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise ValueError(f"Expected a bool tensor as mask of {name!r}, got {got}")
        self._masks = dict(masks)
        self.recipe: dict[str, Any] = dict(recipe or {})
        self.skipped: list[tuple[str, str]] = [(module, reason) for module, reason in skipped]

    def __getitem__(self, name: str) -> Tensor:
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._masks)

    def __len__(self) -> int:
        return len(self._masks)

    def __eq__(self, other: object) -> bool:
        """Same names and same masks; recipes and devices do not matter."""
        if not isinstance(other, Mapping) or self.keys() != other.keys():
            return False
        return all(
            mask.shape == other[name].shape and bool((mask.cpu() == other[name].cpu()).all()) for name, mask in self.items()
        )

    __hash__ = None

    def __repr__(self) -> str:
        return f"MaskSet({len(self)} weights, {self.kept} of {self.numel} kept, density {self.density:.4g})"

    @property
    def numel(self) -> int:
        """Weights in all, kept and pruned."""
        return sum(mask.numel() for mask in self.values())

    @property
    def kept(self) -> int:
        """Weights kept in all."""
        return sum(map(_kept, self.values()))

    @property
    def density(self) -> float:
        """Share of the weights kept, of those that have a mask."""
        return self.kept / self.numel if self.numel else 1.0

    @property
    def sparsity(self) -> float:
        """Share of the weights pruned, of those that have a mask."""
        return (self.numel - self.kept) / self.numel if self.numel else 0.0

    def layer_densities(self) -> dict[str, float]:
        """Share kept of every weight; 1 for one without elements."""
        return {name: _kept(mask) / mask.numel() if mask.numel() else 1.0 for name, mask in self.items()}

    def flop_sparsity(self, costs: Mapping[str, float]) -> float:
        """Share of the multiply-adds removed, of those in weights that have a mask; `costs` from `weight_costs`."""
        if missing := sorted(self.keys() - costs.keys()):
            raise ValueError(f"Expected a cost for every mask, got none for {_some(missing)}")
        total = sum(mask.numel() * costs[name] for name, mask in self.items())
        removed = sum((mask.numel() - _kept(mask)) * costs[name] for name, mask in self.items())
        return removed / total if total else 0.0

    def digest(self) -> str:
        """SHA-256, in hexadecimal, of names, shapes and masks: equal for equal masks, whatever their order, recipe and device."""
        return _digest({name: (list(mask.shape), pack_bits(mask.cpu().reshape(-1))) for name, mask in self.items()})

    def check(self, model: nn.Module) -> None:
        """ValueError unless every mask names a parameter of `model` and has its shape; changes nothing."""
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        if unknown := [name for name in self if name not in shapes]:
            raise ValueError(
                f"Expected masks named like parameters of {type(model).__name__}, got no parameter {_some(unknown)}: "
                "these masks belong to another model, or the model is wrapped or already sparse"
            )
        if wrong := [name for name, mask in self.items() if mask.shape != shapes[name]]:
            got = ", ".join(f"{name!r} {list(self[name].shape)} for a weight {list(shapes[name])}" for name in wrong[:5])
            raise ValueError(f"Expected masks shaped like the weights of {type(model).__name__}, got {got}")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, all of it or nothing: bits packed eight to a byte, shapes and recipe as metadata."""
        packed, layers = {}, {}
        for name, mask in self.items():
            packed[name] = pack_bits(mask.cpu().reshape(-1))
            layers[name] = {"shape": list(mask.shape), "kept": _kept(mask)}
        header = {"format": _FORMAT, "recipe": self.recipe, "skipped": self.skipped, "layers": layers}
        header["digest"] = _digest({name: (layers[name]["shape"], bits) for name, bits in packed.items()})
        data = safetensors.torch.save(packed, {_METADATA_KEY: json.dumps(header)})
        write_atomically(path, lambda file: file.write(data))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> MaskSet:
        """Reads what `save` wrote, masks on the CPU. ValueError for a file that is damaged or something else."""
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = (file.metadata() or {}).get(_METADATA_KEY)
                packed = {name: file.get_tensor(name) for name in file.keys()}
        except safetensors.SafetensorError as error:
            raise ValueError(f"Expected a mask file written by MaskSet.save, got {os.fspath(path)}: {error}") from error
        try:
            if metadata is None:
                raise ValueError("a safetensors file without masks")
            header = json.loads(metadata)
            if header["format"] != _FORMAT:
                raise ValueError(f"format {header['format']}, this version reads {_FORMAT}")
            layers = header["layers"]
            if layers.keys() != packed.keys():
                raise ValueError(f"other tensors than its list of layers, {_some(sorted(layers.keys() ^ packed.keys()))}")
            masks = {name: _unpack(name, packed[name], **layer) for name, layer in layers.items()}
            digest = _digest({name: (list(mask.shape), packed[name]) for name, mask in masks.items()})
            if header.get("digest", digest) != digest:  # files of before there was one have none
                raise ValueError(f"other masks than were written, of digest {digest}")
            return cls(masks, header["recipe"], header["skipped"])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
            raise ValueError(f"Expected a mask file written by MaskSet.save, got {os.fspath(path)}: {error}") from error


def _digest(layers: Mapping[str, tuple[list[int], Tensor]]) -> str:
    """Of the shape and the packed bits of each mask."""
    hashed = hashlib.sha256()
    for name in sorted(layers):
        shape, bits = layers[name]
        hashed.update(json.dumps([name, shape]).encode())
        hashed.update(bits.numpy().tobytes())
    return hashed.hexdigest()


def _unpack(name: str, bits: Tensor, shape: list[int], kept: int) -> Tensor:
    if type(shape) is not list or any(type(size) is not int or size < 0 for size in shape):
        raise ValueError(f"{shape!r:.80} as shape of {name!r}")
    numel = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.shape != (-(-numel // 8),):
        raise ValueError(f"{bits.dtype} {list(bits.shape)} as bits of {name!r} {shape}")
    mask = unpack_bits(bits, numel).view(shape)
    if int(mask.count_nonzero()) != kept:
        raise ValueError(f"{int(mask.count_nonzero())} kept in {name!r} where {kept} were written")
    return mask


def _kept(mask: Tensor) -> int:
    """Counted whenever asked: a mask is a tensor, which whoever has it may write into."""
    return int(mask.count_nonzero())


def _some(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
