"""The random streams that a run draws from: torch's, and those of Python and NumPy, which transforms and models of users draw from.

All but torch's on a GPU are Mersenne Twisters of 624 words. Those of Python and NumPy are held as tensors, so that a checkpoint
stays one of plain values.
"""

from __future__ import annotations

import math
import random
import struct
import sys
from typing import Any

import torch
from torch import Tensor

_WORDS = 624
_NAMES = {"torch", "cuda", "python", "numpy"}
_PYTHON_VERSION = 3  # of random.getstate, since Python 3.2


def seed_streams(seed: int) -> None:
    """Begin every stream of this process anew; NumPy's where NumPy is imported."""
    torch.manual_seed(seed)
    bits = seed & 0xFFFFFFFFFFFFFFFF  # random.seed would drop the sign, NumPy takes 32 bits at a time
    random.seed(bits)
    if (numpy := _numpy_random()) is not None:
        numpy.seed([bits & 0xFFFFFFFF, bits >> 32])


def rng_state() -> dict[str, Any]:
    """This process's random streams, as an entry of a checkpoint's section rng."""
    _, words, gauss = random.getstate()
    return {
        "torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": {"words": torch.tensor(words, dtype=torch.int64), "gauss": gauss}, "numpy": _numpy_state(),
    }  # fmt: skip


def restore_rng(state: dict[str, Any]) -> None:
    """Go on drawing where `rng_state` was taken."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    python, numpy = state["python"], state["numpy"]
    random.setstate((_PYTHON_VERSION, tuple(python["words"].tolist()), python["gauss"]))
    if numpy is not None:
        import numpy.random as numpy_random

        words, gauss = numpy["words"].tolist(), numpy["gauss"]
        numpy_random.set_state(("MT19937", words[:_WORDS], words[_WORDS], int(gauss is not None), gauss or 0.0))


def is_rng(entry: object) -> bool:
    """Whether `restore_rng` can take it, whoever wrote it."""
    return (
        isinstance(entry, dict) and entry.keys() == _NAMES and _is_cpu_rng(entry["torch"])
        and (entry["cuda"] is None or _is_bytes(entry["cuda"])) and _is_twister(entry["python"])
        and (entry["numpy"] is None or _is_twister(entry["numpy"]))
    )  # fmt: skip


def _numpy_random() -> Any | None:
    """numpy.random, if somebody has imported it: only then can somebody have drawn from it."""
    return sys.modules.get("numpy.random")


def _numpy_state() -> dict[str, Any] | None:
    """None also where somebody has put another generator than NumPy's own behind its functions."""
    numpy = _numpy_random()
    if numpy is None or (state := numpy.get_state(legacy=False))["bit_generator"] != "MT19937":
        return None
    words = torch.tensor([*state["state"]["key"].tolist(), int(state["state"]["pos"])], dtype=torch.int64)
    return {"words": words, "gauss": float(state["gauss"]) if state["has_gauss"] else None}


def _is_bytes(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.uint8 and value.dim() == 1


def _is_cpu_rng(state: object) -> bool:
    """Whether a Mersenne Twister can be in that state: torch believes where in its 624 words the next number lies."""
    if not _is_bytes(state) or len(state) != len(torch.get_rng_state()):
        return False
    _, left, seeded, following = struct.unpack_from("=qiiQ", state.numpy())
    return seeded == 1 and ((left, following) == (1, 0) or (1 <= left <= _WORDS and left + following == _WORDS + 1))


def _is_twister(state: object) -> bool:
    """624 words and where among them the next number lies, which NumPy believes too; and the normal number left over, or None."""
    if not isinstance(state, dict) or state.keys() != {"words", "gauss"}:
        return False
    words, gauss = state["words"], state["gauss"]
    if not isinstance(words, Tensor) or words.dtype is not torch.int64 or words.shape != (_WORDS + 1,):
        return False
    within = bool(((words >= 0) & (words < 1 << 32)).all()) and int(words[_WORDS]) <= _WORDS
    return within and (gauss is None or (type(gauss) is float and math.isfinite(gauss)))
