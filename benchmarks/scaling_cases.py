"""The networks of benchmarks.scaling_model at their densities, and what a step of each costs on n nodes."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.scaling_constants import FLOAT, STATE, MeasuredStep, Sizes, measured_steps, rates, resnet50_sizes, stack_sizes

STACK_DENSITIES = (1.0, 0.1, 0.05, 0.02, 0.01)
_FIRST_LAYER = 2 / 3  # of a layer's work: the gradient of the data themselves is not needed


@dataclass(frozen=True)
class Network:
    """Assumed: what a node sends and receives at once, and what a message costs beside its bytes."""

    gigabits: float
    latency: float = 50e-6

    def __str__(self) -> str:
        return f"{self.gigabits:g} Gbit/s"

    @property
    def bytes_per_second(self) -> float:
        return self.gigabits * 1e9 / 8

    def all_reduce(self, size: float, nodes: int) -> float:
        """Seconds of a ring: 2 (n - 1) messages of size / n bytes from every node to the next."""
        return 2 * (nodes - 1) * (self.latency + size / nodes / self.bytes_per_second)


NETWORKS = (Network(10), Network(25), Network(100))


@dataclass(frozen=True)
class Case:
    """A network at a density: `kept` of its prunable weights are left, a node's own work takes `seconds` a step."""

    label: str
    sizes: Sizes
    kept: int
    seconds: float

    @property
    def is_dense(self) -> bool:
        return self.kept == self.sizes.weights

    @property
    def parameters(self) -> int:
        return self.kept + self.sizes.others

    @property
    def gradient_bytes(self) -> int:
        """What is all-reduced in a step."""
        return FLOAT * self.parameters

    @property
    def state_bytes(self) -> int:
        """Weights, gradients, momentum and the indices of sparse layers."""
        return STATE * FLOAT * self.parameters + (0 if self.is_dense else self.sizes.index_bytes(self.kept))

    def step(self, nodes: int, network: Network) -> float:
        """Seconds when nothing is sent before the backward pass has ended; with all of it hidden: max(seconds, all-reduce)."""
        return self.seconds + network.all_reduce(self.gradient_bytes, nodes)

    def headroom(self, network: Network) -> float:
        """A node that many times as fast computes as long as an endless ring sends."""
        return self.seconds / (2 * self.gradient_bytes / network.bytes_per_second)

    def latency_nodes(self, network: Network) -> float:
        """Nodes of a ring that waits for messages as long as for bytes."""
        return self.gradient_bytes / network.bytes_per_second / network.latency


def resnet50_cases() -> list[Case]:
    """Measured steps, multiply-adds as the budget."""
    sizes, steps = resnet50_sizes(), measured_steps("resnet50", "flops")
    return [Case(label_of(step), sizes, round(step.kept * sizes.weights), step.seconds) for step in steps]


def label_of(step: MeasuredStep) -> str:
    return step.label if step.kept == 1 else f"{step.label} of multiply-adds removed"


def stack_cases() -> list[Case]:
    """The stack of linear layers, its seconds from the rates of measured layers."""
    sizes = stack_sizes()
    kept = [round(density * sizes.weights) for density in STACK_DENSITIES]
    labels = ["dense" if density == 1 else f"{1 - density:.0%} of weights removed" for density in STACK_DENSITIES]
    return [Case(label, sizes, count, linear_seconds(sizes, count)) for label, count in zip(labels, kept, strict=True)]


def linear_seconds(sizes: Sizes, kept: int) -> float:
    """A step of linear layers that keep `kept` weights in all, evenly spread, by :func:`benchmarks.scaling_constants.rates`."""
    rate, density = rates(), kept / sizes.weights
    seconds = 0.0
    for number, (rows, cols) in enumerate(sizes.matrices):
        work = rate.dense_weight * rows * cols if density == 1 else (
            rate.sparse_weight * density * rows * cols + rate.sparse_feature * (rows + cols)
        )
        seconds += sizes.batch * work * (1 if number else _FIRST_LAYER)
    return seconds + 2 * len(sizes.matrices) * rate.update_tensor + rate.update_parameter * (kept + sizes.others)


def break_even(dense: Case) -> float:
    """The density at which a sparse network's state is as large as the dense one's."""
    sizes = dense.sizes
    fixed = STATE * FLOAT * sizes.others + sizes.index_bytes(0)
    per_weight = STATE * FLOAT + (sizes.index_bytes(1) - sizes.index_bytes(0))
    return (dense.state_bytes - fixed) / per_weight / sizes.weights
