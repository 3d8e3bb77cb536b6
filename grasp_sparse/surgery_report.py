"""What surgery did to a model, layer by layer, as data and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from grasp_sparse.planning import LayerInput, PlanRow, Times
from grasp_sparse.planning.plan import describe_way
from grasp_sparse.targets import BlockSize


@dataclass(frozen=True)
class LayerReport:
    """One layer: how many weights it keeps and how it runs."""

    name: str
    kind: str  # class of the dense layer
    shape: tuple[int, ...]  # of the dense weight; of several, as a recurrent layer has, of the first
    weights: int  # in all
    kept: int
    runs: str  # "sparse", "masked" or "dense"
    reason: str  # why it does not run sparse; or whose weight it shares
    input_shape: tuple[int, ...] | None  # of the first call; None without example_input, or if the layer did not run
    times: Times | None = None  # seconds of forward + backward, of all layers that share the weight; None if not measured
    block_size: BlockSize = None  # of the blocks that a sparse layer stores whole

    @property
    def density(self) -> float:
        """Kept weights as a share of all."""
        return self.kept / max(1, self.weights)


@dataclass(frozen=True)
class SurgeryReport:
    """Every layer with a prunable kind of weight, in the order of the model; ``str()`` is a table.

    ``kept`` and ``weights`` count shared weights once.
    """

    rows: tuple[LayerReport, ...]
    kept: int
    weights: int
    fused_norms: int = 0  # batch norms replaced by fused ones

    @property
    def density(self) -> float:
        """Kept weights of the listed layers as a share of all."""
        return self.kept / max(1, self.weights)

    def __str__(self) -> str:
        measured = any(row.times for row in self.rows)
        columns = ["layer", "kind", "weight", "input", "kept", "density", "masked ms", "sparse ms", "runs", ""]
        lines = [columns]
        for row in self.rows:
            shape, seen = ("x".join(map(str, size or ())) or "-" for size in (row.shape, row.input_shape))
            times = [f"{seconds * 1e3:.3f}" for seconds in row.times[1:]] if row.times else ["-", "-"]
            density = f"{row.density:.2%}"
            way = describe_way(row.runs, row.block_size)
            lines.append([row.name or "(the model)", row.kind, shape, seen, f"{row.kept:,}", density, *times, way, row.reason])
        runs = [row.runs for row in self.rows]
        counts = ", ".join(f"{runs.count(kind)} {kind}" for kind in ("sparse", "masked", "dense"))
        lines.append(["total", "", f"{self.weights:,}", "", f"{self.kept:,}", f"{self.density:.2%}", "", "", counts, ""])
        hidden = {"input"} if all(row.input_shape is None for row in self.rows) else set()
        hidden |= set() if measured else {"masked ms", "sparse ms"}
        lines = [[entry for entry, column in zip(line, columns, strict=True) if column not in hidden] for line in lines]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        table = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in lines]
        if self.fused_norms:
            table.append(f"and {self.fused_norms} batch norms fused with what follows them")
        return "\n".join(table)


def report_layers(
    model: nn.Module,
    decided: Mapping[nn.Module, PlanRow],
    skipped: Mapping[str, str],
    inputs: Mapping[str, Iterable[LayerInput]],
) -> SurgeryReport:
    """The report on a model that is still dense.

    Args:
        decided: layer -> what was planned for its weight.
        skipped: module name -> why it was left dense.
        inputs: module name -> what it was given, as from ``layer_inputs``.
    """
    rows = []
    kept = weights = 0
    first_holder: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        if not (module in decided or name in skipped or type(module) in (nn.Linear, nn.Conv2d)):
            continue
        matrices = [p for p in module.parameters(recurse=False) if p.dim() > 1]  # several in an attention or a recurrent layer
        weight = matrices[0] if matrices else None
        shape = () if weight is None else tuple(weight.shape)
        size = sum(p.numel() for p in matrices)
        keeps, runs, reason, times, block_size = size, "dense", skipped.get(name, "no mask"), None, None
        if module in decided:
            row = decided[module]
            keeps, runs, reason, times, block_size = row.kept, row.runs, row.reason, row.times, row.block_size
        if weight is not None and first_holder.setdefault(weight, name) != name:
            reason = f"shares the weight of {first_holder[weight]}"
        else:
            kept, weights = kept + keeps, weights + size
        first = next(iter(inputs.get(name, ())), None)
        seen = None if first is None else first.shape
        rows.append(LayerReport(name, type(module).__name__, shape, size, keeps, runs, reason, seen, times, block_size))
    return SurgeryReport(tuple(rows), kept, weights)
