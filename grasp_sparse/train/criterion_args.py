"""`criterion_args` of a recipe as keyword arguments of `prune`: names and types checked before anything is scored."""

from __future__ import annotations

import types
import typing
from typing import Any

import torch

from grasp_sparse.criteria import get_criterion
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.errors import UserError

_PLAIN = {int, float, bool, str, type(None)}
_DTYPES = {"float32": torch.float32, "float64": torch.float64}
# Of prune() and score(), for every criterion; what has a flag of its own is not among them.
_SHARED: dict[str, set[type]] = {
    "iterations": {int}, "rule": {str}, "min_per_layer": {int}, "num_batches": {int}, "num_classes": {int},
    "samples_per_class": {int}, "micro_batch_size": {int}, "dtype": {str},
}  # fmt: skip


def criterion_options(config: TrainConfig) -> dict[str, Any]:
    """What to hand to `prune`. Raises UserError for an unknown name or a wrong type, ValueError for an unknown criterion."""
    known = {**_own_options(config.criterion), **_SHARED}
    options = {name: _checked(config.criterion, name, value, known) for name, value in config.criterion_args.items()}
    if "dtype" in options:
        options["dtype"] = _dtype(options["dtype"])
    return options


def _own_options(criterion: str) -> dict[str, set[type]]:
    """Option -> its types, of those options of the criterion that a recipe can spell."""
    function = get_criterion(criterion).function
    names = function.__kwdefaults__ or {}
    hints = {name: hint for name, hint in typing.get_type_hints(function).items() if name in names}
    kinds = {name: set(typing.get_args(hint)) if isinstance(hint, types.UnionType) else {hint} for name, hint in hints.items()}
    return {name: of_one for name, of_one in kinds.items() if of_one <= _PLAIN}


def _checked(criterion: str, name: str, value: Any, known: dict[str, set[type]]) -> Any:
    if name not in known:
        has_flag = name in TrainConfig.__dataclass_fields__
        hint = f"use --{name.replace('_', '-')}" if has_flag else f"valid names: {', '.join(known)}"
        raise UserError(f"Expected criterion_args to be options of {criterion}, got {name!r}; {hint}")
    types = known[name]
    if type(value) is int and float in types:
        return float(value)
    if type(value) not in types:
        wanted = " or ".join(sorted(kind.__name__ for kind in types - {type(None)}))
        raise UserError(f"Expected {name} in criterion_args to be {wanted}, got {value!r}")
    return value


def _dtype(name: str) -> torch.dtype:
    if name not in _DTYPES:
        raise UserError(f"Expected dtype in criterion_args to be one of {', '.join(_DTYPES)}, got {name!r}")
    return _DTYPES[name]
