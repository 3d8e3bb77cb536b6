"""The settings of a run as they stand in its report: what was chosen, and all of them as a TOML recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from grasp_sparse.train.config import TrainConfig


def changed_settings(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(setting, value) of every setting that is not at its default, in the order of the defaults."""
    defaults = TrainConfig().to_dict()
    return [(name, toml_value(value)) for name, value in _in_order(config).items() if value != defaults.get(name)]


def recipe_toml(config: Mapping[str, Any]) -> str:
    """A recipe that `grasp-sparse train --recipe` reads as this config; what is unset stays out, TOML has no null."""
    return "\n".join(f"{name} = {toml_value(value)}" for name, value in _in_order(config).items() if value is not None)


def toml_value(value: Any) -> str:
    """A str, bool, number, None, list or dict of them as TOML writes it (None as "none")."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(str(key), ensure_ascii=False)} = {toml_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    # JSON's strings, numbers and booleans are TOML's, but for DEL, which TOML wants escaped
    return "none" if value is None else json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _in_order(config: Mapping[str, Any]) -> dict[str, Any]:
    known = {name: config[name] for name in TrainConfig().to_dict() if name in config}
    return known | dict(config)
