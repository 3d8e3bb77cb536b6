"""The layers and networks that are measured on a GPU, and how much of them by default."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from benchmarks.shapes import ConvShape, LinearShape, Shape, convolutions
from grasp_sparse.bench.kernel_calls import KERNELS

TOKENS = 16384
SPARSITIES = (0.8, 0.9, 0.95, 0.98, 0.99)
PATTERNS = {"unstructured": None, "block(32, 32)": (32, 32), "block(64, 64)": (64, 64), "block(128, 128)": (128, 128)}


def linear() -> list[Shape]:
    """Square layers whose dense product has from 1 to 16 thousand multiply-adds for each number it reads or writes."""
    return [LinearShape(size, size, TOKENS) for size in (1024, 2048, 4096)]


def _model(name: str) -> nn.Module:
    from torchvision import models  # a second to import

    return getattr(models, name)()


@dataclass(frozen=True)
class GpuNetwork:
    """A torchvision model, the batch it is measured on, and how its masks are scored."""

    name: str
    batch: int
    criterion: str = "grasp"
    side: int = 224  # pixels

    def make(self) -> nn.Module:
        return _model(self.name)


# Attention has no second derivative on the GPU, which GraSP asks for.
NETWORKS = (
    GpuNetwork("vgg16_bn", 64),
    GpuNetwork("wide_resnet50_2", 64),
    GpuNetwork("vit_b_16", 64, criterion="snip"),
    GpuNetwork("resnet50", 128),
)


def convs_of(name: str, batch: int) -> Callable[[], list[Shape]]:
    """Every distinct convolution of a torchvision model at 224 x 224."""
    return lambda: convolutions(lambda: _model(name), batch)


GROUPS: dict[str, Callable[[], list[Shape]]] = {
    "linear": linear,
    "vgg16": convs_of("vgg16", 64),
    "wide_resnet50_2": convs_of("wide_resnet50_2", 64),
    "resnet50": convs_of("resnet50", 64),
}
# What is to be shown first: where single weights should beat dense layers without and with tensor cores, and blocks these.
TARGETS = {"unstructured": (0.95, 0.98, 0.99), "block(64, 64)": (0.9, 0.95)}
USUAL = (("unstructured", 0.95), ("block(64, 64)", 0.95))

# Of a layer; and its kernels, each alone.
PASSES, ALONE = ("forward", "forward+backward"), tuple(KERNELS)

Combination = tuple[str, float]  # pattern and sparsity


class LayerCase(NamedTuple):
    """What is measured of a shape together."""

    group: str
    shape: Shape
    together: list[Combination]
    passes: tuple[str, ...] = PASSES

    def __str__(self) -> str:
        alone = " kernel by kernel" if self.passes == ALONE else ""
        return f"{self.shape}{alone} " + ", ".join(f"{pattern} {sparsity:.0%}" for pattern, sparsity in self.together)


def in_order(groups: Sequence[str], patterns: Sequence[str], sparsities: Sequence[float]) -> list[LayerCase]:
    """Every shape in every pattern and sparsity, the most telling first.

    TARGETS on linear layers, then kernel by kernel, everything else on the largest of them, TARGETS kernel by kernel on the
    largest convolution of each group, USUAL on the convolutions of a group after the other, those with most multiply-adds first
    and that of the images last, then what is left, of which what keeps most weights comes last.
    """
    combinations = [(pattern, sparsity) for pattern in patterns for sparsity in sparsities]
    targets = [(pattern, sparsity) for pattern, sparsity in combinations if sparsity in TARGETS.get(pattern, ())]
    usual = [combination for combination in combinations if combination in USUAL]
    sparse = [combination for combination in combinations if combination[1] >= 0.9]
    shapes = {group: sorted(GROUPS[group](), key=_least_telling) for group in groups}
    lines = [(group, shape) for group in groups if group == "linear" for shape in shapes[group]]
    images = [(group, shape) for group in groups if group != "linear" for shape in shapes[group]]
    largest = [next(image for image in images if image[0] == group) for group in groups if group != "linear"]
    turns = [(line, targets, PASSES) for line in lines] + [(line, targets, ALONE) for line in lines]
    turns += [(line, sparse, PASSES) for line in lines[:1]] + [(image, targets, ALONE) for image in largest]
    turns += [(image, usual, PASSES) for image in images]
    turns += [(case, wanted, PASSES) for wanted in (sparse, combinations) for case in (*lines, *images)]
    done: set[tuple] = set()
    ordered = []
    for case, wanted, passes in turns:
        left = [combination for combination in wanted if (case, combination, passes) not in done]
        done |= {(case, combination, passes) for combination in left}
        if left:
            ordered.append(LayerCase(*case, left, passes))
    return ordered


def _least_telling(shape: Shape) -> tuple[bool, int]:
    return not shape.input_grad, -shape.work * shape.count


class StepCase(NamedTuple):
    """A pruned network, and the precision that its steps are measured in."""

    network: GpuNetwork
    pattern: str
    sparsity: float
    precision: str

    def __str__(self) -> str:
        return f"{self.network.name} {self.pattern} {self.sparsity:.0%} {self.precision}"


def steps_in_order(
    networks: Sequence[GpuNetwork], patterns: Sequence[str], sparsities: Sequence[float], precisions: Sequence[str]
) -> list[StepCase]:
    """Every case, the most telling first: blocks in bfloat16, single weights in float32, 95 %; networks as they are given."""

    def rank(case: StepCase) -> tuple[int, int, int]:
        usual = case.pattern, case.precision
        likely = (("block(64, 64)", "bfloat16"), ("unstructured", "float32"))
        return (
            0 if case.sparsity == 0.95 and usual in likely else 1 if usual in likely else 2,
            0 if case.network.name == "vgg16_bn" else 1,
            likely.index(usual) if usual in likely else 2,
        )

    cases = [
        StepCase(network, pattern, sparsity, used)
        for sparsity in sorted(sparsities, key=lambda sparsity: abs(sparsity - 0.95))
        for network in networks for pattern in patterns for used in precisions
    ]  # fmt: skip
    return sorted(cases, key=rank)


# Tiny ones, for machines without a GPU: they say that the program runs, nothing about speed.
TINY: list[tuple[str, Shape]] = [
    ("linear", LinearShape(128, 128, 32)),
    ("conv", ConvShape(32, 64, 6, 2, bias=False)),
]
TINY_NETWORK = GpuNetwork("resnet18", 4, criterion="snip", side=32)
