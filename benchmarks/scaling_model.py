"""What a step of data-parallel training costs on several nodes, on paper: bytes, memory and time against nodes and density.

    python -m benchmarks.scaling_model            print the tables of docs/scaling.md
    python -m benchmarks.scaling_model --write    put them into docs/scaling.md and draw docs/scaling.png

Seconds of a node's own work come from benchmarks/results, where they were measured; sizes are counted on the networks; bandwidth and
latency are assumptions and are named as such. A test holds docs/scaling.md against what this prints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean

import numpy
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from benchmarks.pages import print_or_write, table
from benchmarks.scaling_cases import NETWORKS, Case, break_even, label_of, linear_seconds, resnet50_cases, stack_cases
from benchmarks.scaling_constants import (
    BREAKDOWN, LAYERS, LINEAR_BATCH, STEPS, machine_line, measured_steps, mlp_sizes, rates, resnet50_sizes, stack_sizes
)  # fmt: skip
from grasp_sparse.report.style import DENSE, INK, SPARSE, STYLE, human_bytes, human_seconds, save_plot

DOCUMENT = Path(__file__).parents[1] / "docs" / "scaling.md"
NODES = (1, 2, 8, 32, 128, 512)
_DRAWN = NETWORKS[1]


def size_table(cases: Sequence[Case]) -> str:
    state = "weights, gradients, momentum, indices"
    header = ("", "weights kept", "all-reduced a step", "of dense", state, "of dense", "saved for backward")
    dense = cases[0]
    return table(header, [
        (case.label, f"{case.kept:,}", human_bytes(case.gradient_bytes), f"{case.gradient_bytes / dense.gradient_bytes:.1%}",
         human_bytes(case.state_bytes), f"{case.state_bytes / dense.state_bytes:.1%}", human_bytes(case.sizes.activations))
        for case in cases
    ])  # fmt: skip


def time_table(cases: Sequence[Case]) -> str:
    header = ("seconds a step", "network", *(f"{nodes} node{'s' * (nodes > 1)}" for nodes in NODES))
    return table(header, [
        (case.label, str(network), *(f"{case.step(nodes, network):.3g}" for nodes in NODES)) for network in NETWORKS for case in cases
    ])  # fmt: skip


def speed_table(cases: Sequence[Case]) -> str:
    header = ("times as fast as dense", "network", *(f"{nodes} node{'s' * (nodes > 1)}" for nodes in NODES))
    return table(header, [
        (case.label, str(network), *(f"{cases[0].step(nodes, network) / case.step(nodes, network):.2f}" for nodes in NODES))
        for network in NETWORKS for case in cases[1:]
    ])  # fmt: skip


def limit_table(cases: Sequence[Case]) -> str:
    header = ("", *(f"faster node, {network}" for network in NETWORKS), *(f"nodes, {network}" for network in NETWORKS))
    return table(header, [
        (case.label, *(f"{_times(case.headroom(network))}×" for network in NETWORKS),
         *(f"{case.latency_nodes(network):,.0f}" for network in NETWORKS))
        for case in cases
    ])  # fmt: skip


def _times(factor: float) -> str:
    return f"{factor:,.0f}" if factor >= 10 else f"{factor:.1f}"


def constants_table() -> str:
    rate, rows = rates(), []
    for step in measured_steps("resnet50", "flops"):
        what = f"a step of ResNet-50, batch {resnet50_sizes().batch}, {label_of(step)}"
        rows.append((what, human_seconds(step.seconds), STEPS, ""))
    rows += [
        (f"dense linear layer, a weight and sample, batch {LINEAR_BATCH}", f"{rate.dense_weight * 1e12:.3g} ps", LAYERS, ""),
        ("sparse one, a kept weight and sample", f"{rate.sparse_weight * 1e12:.3g} ps", LAYERS, f"{rate.sparse_deviation:.0%}"),
        ("sparse one, a feature in or out and sample", f"{rate.sparse_feature * 1e12:.3g} ps", LAYERS, f"{rate.sparse_deviation:.0%}"),
        ("update, a parameter", f"{rate.update_parameter * 1e12:.3g} ps", BREAKDOWN, f"{rate.update_deviation:.0%}"),
        ("update, a parameter tensor", f"{rate.update_tensor * 1e6:.3g} µs", BREAKDOWN, f"{rate.update_deviation:.0%}"),
    ]
    measured = table(("measured", "seconds", "file", "farthest from the fit"), rows)
    latency = human_seconds(_DRAWN.latency)
    return f"{measured}\n\nMeasured on: {machine_line()}. Assumed: {', '.join(map(str, NETWORKS))}; {latency} a message."


def check_table() -> str:
    """The rates of single layers against whole measured steps of another network."""
    rows = []
    for label, kept, measured in _checked_steps():
        predicted = linear_seconds(mlp_sizes(), kept)
        rows.append((label, human_seconds(measured), human_seconds(predicted), f"{predicted / measured - 1:+.0%}"))
    return table((f"MLP 3072-4096-4096-10, batch {mlp_sizes().batch}", "measured step", "from the rates", "off by"), rows)


def _checked_steps() -> list[tuple[str, int, float]]:
    """(label, weights kept, seconds: the mean where both limits leave the same network)."""
    found: dict[float, list[float]] = {}
    for budget in ("flops", "weights"):
        for step in measured_steps("mlp", budget):
            found.setdefault(step.kept, []).append(step.seconds)
    return [
        ("dense" if kept == 1 else f"{1 - kept:.0%} of weights removed", round(kept * mlp_sizes().weights), fmean(seconds))
        for kept, seconds in sorted(found.items(), reverse=True)
    ]


def findings() -> str:
    """What the tables say, in sentences whose numbers are theirs."""
    lines = []
    for name, cases in (("ResNet-50", resnet50_cases()), ("The stack", stack_cases())):
        dense, sparse = cases[0], cases[2]
        saved = dense.gradient_bytes / sparse.gradient_bytes
        compute = dense.seconds / sparse.seconds
        lines.append(
            f"- {name}, {sparse.label}: {_times(saved)} times fewer bytes to send, {_times(compute)} times as fast a step on one node. At "
            f"{_DRAWN}, sending takes as long as computing on a node {_times(dense.headroom(_DRAWN))} times as fast as the measured one if "
            f"the network is dense, {_times(sparse.headroom(_DRAWN))} times if it is sparse."
        )
        lines.append(
            f"- {name} in memory, {sparse.label}: {human_bytes(sparse.state_bytes)} instead of {human_bytes(dense.state_bytes)}. The three "
            f"indices of a kept weight cost as much as its value, gradient and momentum: above {break_even(dense):.0%} kept nothing is "
            f"saved. What the forward pass of the dense network saves for the backward one, {human_bytes(dense.sizes.activations)}, stays."
        )
    return "\n".join(lines)


def bounds() -> str:
    """Where the model stops holding, as far as it has numbers for it."""
    checks = [(label, linear_seconds(mlp_sizes(), kept) / measured - 1) for label, kept, measured in _checked_steps()]
    worst = max(checks, key=lambda check: abs(check[1]))
    before, sparsest = measured_steps("resnet50", "flops")[-2:]
    last = resnet50_cases()[-1]
    return "\n".join([
        f"- Rates of single layers leave out what a whole step does besides. They miss the measured steps of the MLP by up to {worst[1]:+.0%} "
        f"({worst[0]}); the stack's times at the same density may be as wrong.",
        f"- Work that pruning does not touch (norms, activations, moving data) is a floor. ResNet-50 is measured, not extrapolated: from "
        f"{before.label} to {sparsest.label} of the multiply-adds removed, {before.flops / sparsest.flops:.1f} times fewer are left, and the "
        f"step goes from {human_seconds(before.seconds)} to {human_seconds(sparsest.seconds)}.",
        f"- A ring waits for 2 (n - 1) messages. For ResNet-50, {last.label}, that outweighs its bytes from "
        f"{last.latency_nodes(_DRAWN):.0f} nodes on at {_DRAWN}; libraries then change to trees, which this model does not have.",
    ])  # fmt: skip


BLOCKS: dict[str, Callable[[], str]] = {
    "constants": constants_table,
    "findings": findings,
    "resnet50 sizes": lambda: size_table(resnet50_cases()),
    "resnet50 times": lambda: time_table(resnet50_cases()),
    "resnet50 speed": lambda: speed_table(resnet50_cases()),
    "resnet50 limits": lambda: limit_table(resnet50_cases()),
    "stack shape": lambda: (
        f"{len(stack_sizes().matrices)} linear layers of {stack_sizes().matrices[0][0]} × {stack_sizes().matrices[0][1]} with bias and ReLU: "
        f"{stack_sizes().weights:,} weights, {stack_sizes().batch} samples a node and step."
    ),
    "stack sizes": lambda: size_table(stack_cases()),
    "stack times": lambda: time_table(stack_cases()),
    "stack speed": lambda: speed_table(stack_cases()),
    "stack limits": lambda: limit_table(stack_cases()),
    "check": check_table,
    "bounds": bounds,
}


def plot(path: Path) -> None:
    """Seconds a step against nodes: a panel a network, lines from nothing hidden behind the backward pass to all of it."""
    nodes = numpy.unique(numpy.logspace(0, numpy.log10(NODES[-1]), 60).astype(int))
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(9.2, 4.0), layout="constrained")
        titles = (
            f"ResNet-50, {resnet50_sizes().batch} images of 224² a node",
            f"{stack_sizes().weights / 1e9:.2g} B linear weights, {stack_sizes().batch} samples a node",
        )
        for axes, title, cases in zip(panels, titles, (resnet50_cases(), stack_cases())):
            _panel(axes, nodes.tolist(), cases)
            axes.set_title(title)
        panels[0].set_ylabel(f"seconds a step at {_DRAWN}")
        save_plot(figure, path)


def _panel(axes: Axes, nodes: list[int], cases: Sequence[Case]) -> None:
    shades = numpy.linspace(1.0, 0.45, len(cases) - 1)
    for number, case in enumerate(cases):
        colour, alpha = (DENSE, 1.0) if case.is_dense else (SPARSE, float(shades[number - 1]))
        exposed = [case.step(count, _DRAWN) for count in nodes]
        hidden = [max(case.seconds, _DRAWN.all_reduce(case.gradient_bytes, count)) for count in nodes]
        axes.fill_between(nodes, hidden, exposed, color=colour, alpha=0.16 * alpha, lw=0)
        axes.plot(nodes, exposed, color=colour, alpha=alpha)
        label, end = case.label.removesuffix(" removed"), (nodes[-1], exposed[-1])
        axes.annotate(label, end, xytext=(5, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
    axes.set(xscale="log", yscale="log", xlabel="nodes", xlim=(1, NODES[-1]))
    axes.xaxis.set_major_locator(FixedLocator(NODES))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_locator(NullLocator())


def main(arguments: list[str] | None = None) -> None:
    print_or_write("scaling_model", __doc__, DOCUMENT, BLOCKS, plot, arguments)


if __name__ == "__main__":
    main()
