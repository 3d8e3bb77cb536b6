"""Pages from the templates beside this file: one HTML file each, with nothing outside of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import jinja2

from grasp_sparse.files import write_atomically


@cache
def _templates() -> jinja2.Environment:
    # What a recipe or a file name holds is text, never markup; a name that the page lacks is an error, never a blank.
    return jinja2.Environment(
        loader=jinja2.PackageLoader("grasp_sparse.report", "templates"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def write_page(template: str, values: Mapping[str, Any], path: Path) -> Path:
    """Fill `template` and write it to `path`, whole or not at all; returns `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = _templates().get_template(template).render(values)
    write_atomically(path, lambda file: file.write(text.encode()))
    return path
