"""What surgery did to a model, layer by layer, as data and as a table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grasp_sparse.scratch import call_model, scratch_copy


@dataclass(frozen=True)
class LayerReport:
    """One layer: how many weights it keeps and how it runs."""

    name: str
    kind: str  # class of the dense layer
    shape: tuple[int, ...]  # of the dense weight
    kept: int
    runs: str  # "sparse", "masked" or "dense"
    reason: str  # why it does not run sparse; or whose weight it shares
    input_shape: tuple[int, ...] | None  # None without example_input, or if the layer did not run

    @property
    def density(self) -> float:
        """Kept weights as a share of all."""
        return self.kept / max(1, torch.Size(self.shape).numel())


@dataclass(frozen=True)
class SurgeryReport:
    """Every layer with a prunable kind of weight, in the order of the model; ``str()`` is a table.

    ``kept`` and ``weights`` count shared weights once.
    """

    rows: tuple[LayerReport, ...]
    kept: int
    weights: int

    @property
    def density(self) -> float:
        """Kept weights of the listed layers as a share of all."""
        return self.kept / max(1, self.weights)

    def __str__(self) -> str:
        lines = [("layer", "kind", "weight", "input", "kept", "density", "runs", "")]
        for row in self.rows:
            shape, seen = ("x".join(map(str, size or ())) or "-" for size in (row.shape, row.input_shape))
            lines.append((row.name or "(the model)", row.kind, shape, seen, f"{row.kept:,}", f"{row.density:.2%}", row.runs, row.reason))
        runs = [row.runs for row in self.rows]
        counts = ", ".join(f"{runs.count(kind)} {kind}" for kind in ("sparse", "masked", "dense"))
        lines.append(("total", "", f"{self.weights:,}", "", f"{self.kept:,}", f"{self.density:.2%}", counts, ""))
        if all(row.input_shape is None for row in self.rows):
            lines = [line[:3] + line[4:] for line in lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def report_layers(
    model: nn.Module,
    decided: Mapping[nn.Module, tuple[int, str, str]],
    skipped: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
) -> SurgeryReport:
    """The report on a model that is still dense.

    Args:
        decided: layer -> (kept weights, runs, reason).
        skipped: module name -> why it was left dense.
        shapes: module name -> input shape, from :func:`input_shapes`.
    """
    rows = []
    kept = weights = 0
    first_holder: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        if not (module in decided or name in skipped or type(module) in (nn.Linear, nn.Conv2d)):
            continue
        weight = next((p for p in module.parameters(recurse=False) if p.dim() > 1), None)
        shape = () if weight is None else tuple(weight.shape)
        size = 0 if weight is None else weight.numel()
        keeps, runs, reason = decided.get(module, (size, "dense", skipped.get(name, "no mask")))
        if weight is not None and first_holder.setdefault(weight, name) != name:
            reason = f"shares the weight of {first_holder[weight]}"
        else:
            kept, weights = kept + keeps, weights + size
        rows.append(LayerReport(name, type(module).__name__, shape, keeps, runs, reason, shapes.get(name)))
    return SurgeryReport(tuple(rows), kept, weights)


def input_shapes(model: nn.Module, example_input: Any) -> dict[str, tuple[int, ...]]:
    """The shape of the first input of each module, by module name, when a copy of ``model`` runs on ``example_input``.

    ``example_input`` is one argument, a tuple of them, or a dict of named ones. The copy runs in evaluation mode.
    """
    shapes: dict[str, tuple[int, ...]] = {}

    def note(name: str):
        def hook(module: nn.Module, inputs: tuple) -> None:
            if inputs and isinstance(inputs[0], Tensor):
                shapes.setdefault(name, tuple(inputs[0].shape))

        return hook

    with scratch_copy(model) as scratch, torch.no_grad():
        for name, module in scratch.named_modules():
            module.register_forward_pre_hook(note(name))
        call_model(scratch.eval(), example_input)
    return shapes
