"""Weights in files: dense ones for the plain model, sparse ones for `gs.load_sparse`; how both are read back."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from grasp_sparse.export.source import Source
from grasp_sparse.files import write_atomically
from grasp_sparse.surgery import densify_, load_sparse
from grasp_sparse.train.checkpoint import as_bytes
from grasp_sparse.train.errors import UserError

_METADATA_KEY = "grasp_sparse.model"  # one key: safetensors orders several at random, and equal models should be equal files
_FORMAT = 1


def write_dense(source: Source, path: Path) -> None:
    """The state_dict of the plain model, exact zeros where pruned: `torch.load(path, weights_only=True)`."""
    state = densify_(copy.deepcopy(source.model)).state_dict()
    for name, tensor in list(state.items()):
        if isinstance(tensor, Tensor):  # else what get_extra_state gave
            state[name] = tensor.contiguous()
    data = as_bytes(state)
    write_atomically(path, lambda file: file.write(data))


def read_dense(source: Source, path: Path) -> nn.Module:
    """The plain model with the weights in that file."""
    source.plain.load_state_dict(torch.load(path, weights_only=True), strict=True)
    return source.plain


def write_sparse(source: Source, path: Path) -> None:
    """Kept values and their places as safetensors; format, recipe and what was kept as JSON in the metadata."""
    # Clones: safetensors refuses tensors that share memory, as layers that share a weight do.
    state = source.model.state_dict()
    if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise UserError(f"Expected tensors for a safetensors file, got other values in {', '.join(others)}; use --format dense")
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    data = safetensors.torch.save(tensors, {_METADATA_KEY: json.dumps({"format": _FORMAT, **source.about})})
    write_atomically(path, lambda file: file.write(data))


def read_sparse(source: Source, path: Path) -> nn.Module:
    """The plain model, made sparse by that file; of a dense run it stays plain."""
    return load_sparse(source.plain, safetensors.torch.load_file(path))
