"""The package is layered: a module imports only from modules that stand above it in this list."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import grasp_sparse

ORDER = [
    "_extension",
    "allocator",
    "environment",
    "files",
    "bits",
    "timing",
    "cuda_timing",
    "poison",
    "weights",
    "forwards",
    "nested",
    "scratch",
    "costs",
    "criteria",
    "formats",
    "patterns",
    "allocation",
    "grouping",
    "choice",
    "masks",
    "pruning",
    "ops",
    "nn",
    "fusion",
    "optim",
    "targets",
    "planning",
    "surgery_report",
    "surgery",
    "speedup",
    "train",
    "report",
    "export",
    "bench",
    "flags",
    "cli",
    "__main__",
]
PACKAGE = Path(grasp_sparse.__file__).parent
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py" or path.parent != PACKAGE)


def _layer(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def _imported_layers(path: Path) -> set[str]:
    """First names below grasp_sparse that the file imports, wherever in the file."""
    names = []
    for node in ast.walk(ast.parse((PACKAGE / path).read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    assert "grasp_sparse" not in names, f"{path} imports the whole package; import the module that is needed"
    return {name.split(".")[1] for name in names if name.startswith("grasp_sparse.")}


def test_every_module_has_a_place():
    assert {_layer(path) for path in FILES} <= set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_up(path):
    own = ORDER.index(_layer(path))
    below = _imported_layers(path) - set(ORDER[: own + 1])
    assert not below, f"{path} imports from {', '.join(sorted(below))}"
