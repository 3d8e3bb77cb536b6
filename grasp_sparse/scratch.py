"""Working on a model without touching it: a scratch copy, and the random state put back afterwards.

Scoring runs forwards (which move BatchNorm's running statistics), switches modes, turns gradients on, re-draws weights
and consumes random numbers. All of that happens on a deep copy inside `scratch_copy`, so the caller's model, its
buffers, gradients, modes, hooks and the global random state are the same bits afterwards, also when an exception or
Ctrl-C leaves in between.
"""

from __future__ import annotations

import copy
import operator
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from grasp_sparse.nested import is_namedtuple, map_tensors
from grasp_sparse.weights import check_initialised

_HALF_PRECISION = (torch.float16, torch.bfloat16)


def capture_rng() -> Callable[[], None]:
    """Remembers the global random state (torch CPU and CUDA, numpy, python) and returns the function that puts it back."""
    cpu = torch.get_rng_state()
    # Asking an uninitialised CUDA for its state would start it: slow, and a surprise before a fork.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    numpy_state, python_state = np.random.get_state(), random.getstate()

    def restore() -> None:
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        np.random.set_state(numpy_state)
        random.setstate(python_state)

    return restore


def _seed_all(seed: int) -> None:
    seed = operator.index(seed)  # torch and random take no integers of numpy
    # torch.manual_seed would also queue a seed for a CUDA that is not yet initialised, which no restore could undo.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def preserved_rng(seed: int | None = None) -> Iterator[None]:
    """Runs the block, from `seed` if one is given, and leaves the global random state as it was."""
    restore = capture_rng()
    try:
        if seed is not None:
            _seed_all(seed)
        yield
    finally:
        restore()


@contextmanager
def scratch_copy(model: nn.Module, *, dtype: torch.dtype | None = None, seed: int | None = None) -> Iterator[nn.Module]:
    """Yields a deep copy of `model` to do anything with; gradients are enabled, its parameters ask for one where the model's do.

    `dtype` converts the copy; without it half-precision models are copied to float32, because second derivatives and
    products of fifty layers mean nothing in 8 or 11 bits. Parameter hooks are not copied (they serve training), module
    hooks are: the caller's forward hooks fire whenever the copy runs. What asks for a gradient is left as it is because a
    forward may look: reentrant checkpointing records nothing of a block whose input needs none.

    Raises ValueError for a model that cannot be deep-copied, or with lazy modules that have not run yet.
    """
    check_initialised(model)
    with preserved_rng(seed), torch.inference_mode(False), torch.enable_grad():
        try:
            scratch = copy.deepcopy(model)
        except Exception as error:
            raise ValueError(
                f"Expected a model that copy.deepcopy can copy, got {type(model).__name__}: {error}. "
                "Unwrap it (DistributedDataParallel: pass model.module) or remove tensors cached on modules."
            ) from error
        if dtype is None and any(p.dtype in _HALF_PRECISION for p in scratch.parameters()):
            dtype = torch.float32
        if dtype is not None:
            # As .double() does; .to(dtype) would also turn complex numbers into real ones.
            scratch._apply(lambda tensor: tensor.to(dtype) if tensor.is_floating_point() else tensor)
        yield scratch


@torch.no_grad()
def zero_outside(tensors: Mapping[str, torch.Tensor], within: Mapping[str, torch.Tensor] | None) -> None:
    """Makes zero, in place, what lies outside of the masks, if there are any."""
    for name, mask in (within or {}).items():
        tensors[name].masked_fill_(~mask, 0)


def move(data: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Tensors in nested tuples, lists and dicts brought to `device`; floating ones to `dtype` too when it is given."""

    def brought(tensor: torch.Tensor) -> torch.Tensor:
        there = tensor.detach().to(device, dtype if tensor.is_floating_point() else None)
        # What was made in inference mode cannot be saved for a backward; a clone made outside of it can.
        return there.clone() if there.is_inference() and not torch.is_inference_mode_enabled() else there

    return map_tensors(brought, data)


def call_model(model: nn.Module, inputs: Any) -> Any:
    """`model(tensor)`, `model(*tuple)` or `model(**dict)`, on the model's own device and in its own floating dtype.

    A namedtuple (PackedSequence) is one argument.
    """
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    inputs = move(inputs, like.device, like.dtype)
    if isinstance(inputs, Mapping):
        return model(**inputs)
    spread = isinstance(inputs, (tuple, list)) and not is_namedtuple(inputs)
    return model(*inputs) if spread else model(inputs)
