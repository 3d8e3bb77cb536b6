"""Forwards set on modules: which of them a copy of the model would take along, and which lead back to the model."""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from torch import nn


def check_forwards(model: nn.Module) -> None:
    """ValueError for a `forward` set on a module whose copy would still run a module of `model` that has weights or buffers.

    copy.deepcopy copies bound methods and functools.partial with what they hold, but not functions: their closures, defaults
    and globals lead back to the model.
    """
    own = {id(module): name for name, module in model.named_modules() if any(True for _ in (*module.parameters(), *module.buffers()))}
    for name, module in model.named_modules():
        for held in _held(vars(module).get("forward"), copied=True):
            if id(held) in own:
                raise ValueError(
                    f"Expected copies of the model to run on their own, got a forward set on {name or 'the model itself'} that is a "
                    f"function around {own[id(held)] or 'the model itself'}: it would run, and change, yours. Write it as a subclass, "
                    "or as functools.partial(function, module), which is copied with its module"
                )


def _held(value: Any, copied: bool) -> Iterator[Any]:
    """The modules that `value` would still run after copy.deepcopy; not `copied`: it is held by a function, which is not copied."""
    seen, left = set(), [(value, copied)]
    while left:
        value, copied = left.pop()
        if (id(value), copied) in seen:
            continue
        seen.add((id(value), copied))
        if isinstance(value, types.MethodType):
            left += [(value.__func__, copied), (value.__self__, copied)]
        elif isinstance(value, functools.partial):
            left += [(part, copied) for part in (value.func, *value.args, *value.keywords.values())]
        elif isinstance(value, types.FunctionType):
            left += [(part, False) for part in _parts(value)]
        elif isinstance(value, nn.Module) and not copied:
            yield value


def _parts(function: types.FunctionType) -> Iterator[Any]:
    """What a function holds: of its closure, its defaults and the globals that it reads."""
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # one that is empty yet
            yield cell.cell_contents
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for instruction in dis.get_instructions(function):
        if instruction.opname == "LOAD_GLOBAL" and instruction.argval in function.__globals__:
            yield function.__globals__[instruction.argval]
