"""What benchmarks.scaling_model starts from: rates read from the measurements in benchmarks/results, sizes read from the networks."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median

import numpy
import torch
from torch import nn

from benchmarks.runner import RESULTS
from grasp_sparse.bench.results import kind_of
from grasp_sparse.weights import find_weights

FLOAT, INDEX = 4, 4  # bytes
STATE = 3  # float32 tensors of a parameter's size that SGD with momentum keeps: the weight, its gradient, its momentum
LINEAR_BATCH = 512
_LINEAR = re.compile(r"linear (\d+)->(\d+) batch (\d+)")


# Of the machine that was measured last, and so all with the same kernels.
LAYERS, STEPS, BREAKDOWN = "layers-zen4.csv", "models-zen4.csv", "models-zen4-breakdown.csv"


@dataclass(frozen=True)
class Sizes:
    """Of a network: prunable matrices as (rows, columns), parameters beside them, samples a step, bytes saved for backward."""

    matrices: tuple[tuple[int, int], ...]
    others: int
    batch: int
    activations: int

    @property
    def weights(self) -> int:
        return sum(rows * cols for rows, cols in self.matrices)

    def index_bytes(self, kept: int) -> int:
        """Of CSR and its transpose, int32: three numbers a kept weight, one a row and a column more."""
        return INDEX * (3 * kept + sum(rows + cols + 2 for rows, cols in self.matrices))


@dataclass(frozen=True)
class Rates:
    """Seconds; how far the fits are from what was measured, at most, as a share of it."""

    dense_weight: float  # a weight and sample, forward and backward
    sparse_weight: float  # a kept weight and sample
    sparse_feature: float  # an input or output feature and sample, however many weights are kept
    update_tensor: float  # a parameter tensor
    update_parameter: float  # a parameter
    sparse_deviation: float
    update_deviation: float


def read(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def relative_fit(columns: Sequence[Sequence[float]], seconds: Sequence[float]) -> tuple[list[float], float]:
    """Coefficients of the columns with the least squares of relative errors, and the largest of these errors."""
    measured = numpy.array(seconds)
    matrix = numpy.array(columns, float).T / measured[:, None]
    found, *_ = numpy.linalg.lstsq(matrix, numpy.ones(len(measured)), rcond=None)
    return found.tolist(), float(numpy.abs(matrix @ found - 1).max())


@cache
def rates() -> Rates:
    """From LAYERS (linear layers at LINEAR_BATCH samples, float32) and the optimizer's share of the MLP in BREAKDOWN."""
    dense, kept, features, seconds = [], [], [], []
    for row in read(LAYERS):
        shape = _LINEAR.fullmatch(row["shape"])
        if shape is None or int(shape[3]) != LINEAR_BATCH or row["pass"] != "forward+backward" or not row["best"]:
            continue
        inputs, outputs, time = int(shape[1]), int(shape[2]), float(row["median_s"])
        if kind_of(row["arm"]) == "dense":
            dense.append(time / (inputs * outputs * LINEAR_BATCH))
        else:
            kept.append(int(row["nnz"]) * LINEAR_BATCH)
            features.append((inputs + outputs) * LINEAR_BATCH)
            seconds.append(time)
    (weight, feature), off = relative_fit([kept, features], seconds)
    sizes = mlp_sizes()
    updates = [row for row in read(BREAKDOWN) if (row["model"], row["category"]) == ("mlp", "optimizer")]
    counts = [sizes.others + sizes.weights * (1 - float(row["sparsity"]) * (kind_of(row["arm"]) == "sparse")) for row in updates]
    tensors = [2.0 * len(sizes.matrices)] * len(updates)
    (tensor, parameter), update_off = relative_fit([tensors, counts], [float(row["seconds"]) for row in updates])
    return Rates(median(dense), weight, feature, tensor, parameter, off, update_off)


@dataclass(frozen=True)
class MeasuredStep:
    """Seconds of a step, the faster memory format of each kind."""

    label: str
    seconds: float
    kept: float  # share of the prunable weights
    flops: float  # share of their multiply-adds


@cache
def measured_steps(model: str, budget: str) -> tuple[MeasuredStep, ...]:
    """The dense step, its median over the cases, then the sparse one of each sparsity, from STEPS.

    Machines drift from case to case, so a sparse step is that dense one divided by how many times as fast as its own the sparse one was.
    Raises ValueError where a pruned layer ran a dense kernel: such a layer sends a dense gradient, and which one it was is not said.
    """
    best = [row for row in read(STEPS) if row["model"] == model and row["budget"] == budget and row["best"]]
    steps = [MeasuredStep("dense", median(float(row["median_s"]) for row in best if kind_of(row["arm"]) == "dense"), 1.0, 1.0)]
    for row in best:
        if kind_of(row["arm"]) == "sparse":
            if int(row["layers_masked"]):
                raise ValueError(
                    f"Expected every pruned layer of {model} to run sparse at {budget} {row['sparsity']}, got {row['layers_masked']} masked"
                )
            kept, flops = 1 - float(row["weight_sparsity"]), 1 - float(row["flop_sparsity"])
            steps.append(MeasuredStep(f"{float(row['sparsity']):.0%}", steps[0].seconds / float(row["vs best dense"]), kept, flops))
    return tuple(steps)


@cache
def resnet50_sizes(batch: int = 32, side: int = 224) -> Sizes:
    from torchvision import models

    with torch.device("meta"):
        return _sizes(models.resnet50(), torch.empty(batch, 3, side, side))


def stack(width: int, depth: int) -> nn.Module:
    """`depth` times a linear layer of `width` x `width` and a ReLU."""
    return nn.Sequential(*(module for _ in range(depth) for module in (nn.Linear(width, width), nn.ReLU())))


@cache
def stack_sizes(width: int = 4096, depth: int = 60, batch: int = LINEAR_BATCH) -> Sizes:
    with torch.device("meta"):
        return _sizes(stack(width, depth), torch.empty(batch, width))


@cache
def mlp_sizes(batch: int = 256) -> Sizes:
    from benchmarks.networks import mlp

    with torch.device("meta"):
        return _sizes(mlp(), torch.empty(batch, 3072))


def _sizes(model: nn.Module, batch: torch.Tensor) -> Sizes:
    weights = {weight.name: model.get_parameter(weight.name) for weight in find_weights(model).weights}
    matrices = tuple((weight.shape[0], weight[0].numel()) for weight in weights.values())
    others = sum(parameter.numel() for name, parameter in model.named_parameters() if name not in weights)
    return Sizes(matrices, others, len(batch), saved_for_backward(model, batch))


def saved_for_backward(model: nn.Module, batch: torch.Tensor) -> int:
    """Bytes of the distinct tensors, parameters aside, that a forward pass in training keeps for the backward one."""
    own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage  # held, so that no other storage takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model.train()(batch)
    del output
    return sum(storage.nbytes() for storage in saved.values())


def machine_line() -> str:
    """Where the measurements come from, in words."""
    row = read(STEPS)[0]
    return f"{row['cpu']}, {row['threads']} threads, {row['kernels']} kernels, torch {row['torch']}"


