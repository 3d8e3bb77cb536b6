"""RUN/report.md with its plots, made from RUN/result.json and RUN/log.jsonl alone: no model, no data needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend must be chosen first)
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter, PercentFormatter  # noqa: E402

DENSE, SPARSE, ACCENT, INK, FAINT = "#94a3b8", "#0f766e", "#c2410c", "#1e293b", "#e2e8f0"
STYLE = {
    "figure.dpi": 144, "figure.facecolor": "white", "font.family": "DejaVu Sans", "font.size": 9.5,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#64748b", "xtick.color": INK, "ytick.color": INK,
    "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": FAINT,
    "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.8,
}


def read_run(run_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """result.json and the rows of log.jsonl. Raises FileNotFoundError or ValueError for a folder that holds no run."""
    result = json.loads((run_dir / "result.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    return result, rows


def human_bytes(count: float) -> str:
    """1234567 -> "1.23 MB" (decimal units)."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def human_seconds(seconds: float) -> str:
    """0.0612 -> "61.2 ms"."""
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def plot_training(rows: list[dict[str, Any]], path: Path) -> None:
    """Loss and accuracy per epoch, training and test; last and best test accuracy are marked."""
    epochs = [row["epoch"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    marker = "o" if len(rows) <= 30 else None
    for axes, quantity in ((left, "loss"), (right, "accuracy")):
        for split, colour in (("train", DENSE), ("test", SPARSE)):
            values = [row[f"{split}_{quantity}"] for row in rows]
            axes.plot(epochs, values, color=colour, marker=marker, ms=4, label=split)
        axes.set(title=f"{quantity} per epoch".capitalize(), xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    best = max(rows, key=lambda row: row["test_accuracy"])
    right.plot(best["epoch"], best["test_accuracy"], "o", ms=9, mfc="none", mec=ACCENT, mew=1.5)
    right.annotate(
        f"best {best['test_accuracy']:.2%}", (best["epoch"], best["test_accuracy"]), xytext=(0, -17),
        textcoords="offset points", ha="center", color=ACCENT,
    )
    right.margins(y=0.15)
    save_plot(figure, path)


def plot_density(layers: list[dict[str, Any]], path: Path) -> None:
    """Kept share of each layer's weights, first layer on top, logarithmic."""
    figure, axes = plt.subplots(figsize=(9, 1.1 + 0.26 * len(layers)), layout="constrained")
    names = [layer["name"].removesuffix(".weight") for layer in layers]
    density = [max(layer["density"], 1e-6) for layer in layers]
    floor = min(density) / 2
    axes.barh(names, density, color=[SPARSE if layer["runs"] == "sparse" else DENSE for layer in layers], height=0.7)
    axes.set(xscale="log", xlim=(floor, 1.0), title="Weights kept, layer by layer", xlabel="density (share of weights kept)")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g}%"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    for row, (share, layer) in enumerate(zip(density, layers)):
        inside = share > floor**0.4  # the bar is long: its label would not fit to the right of it
        axes.annotate(
            f"{layer['density']:.2%}  ·  {layer['kept']:,} of {layer['total']:,}", (share, row), xytext=(-5 if inside else 5, 0),
            textcoords="offset points", ha="right" if inside else "left", va="center", fontsize=8,
            color="white" if inside and layer["runs"] == "sparse" else INK,
        )
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(
        handles=[plt.Rectangle((0, 0), 1, 1, color=SPARSE), plt.Rectangle((0, 0), 1, 1, color=DENSE)],
        labels=["sparse kernel", "dense kernel, pruned weights (if any) held at zero"], loc="upper left",
        bbox_to_anchor=(0, -0.12 - 0.6 / len(layers)), ncols=2, fontsize=8.5,
    )
    save_plot(figure, path)


def plot_step(timing: dict[str, Any], memory: dict[str, Any], path: Path) -> None:
    """Seconds a step (median, quartiles) of each arm, and bytes by kind, dense beside sparse."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9), layout="constrained")
    _bars_of_time(left, timing)
    _bars_of_memory(right, memory)
    save_plot(figure, path)


def _bars_of_time(axes: Axes, timing: dict[str, Any]) -> None:
    arms, reference = timing["arms"], timing["arms"][timing["best_dense"]]["median"]
    names = list(arms)
    medians = [arms[name]["median"] * 1e3 for name in names]
    whiskers = [[(a["median"] - a["q1"]) * 1e3 for a in arms.values()], [(a["q3"] - a["median"]) * 1e3 for a in arms.values()]]
    axes.barh(names, medians, xerr=whiskers, color=[SPARSE if name == "sparse" else DENSE for name in names], height=0.6,
              error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 3})
    for row, name in enumerate(names):
        note = f"{medians[row]:.3g} ms"
        if name == "sparse":
            note += f"   {reference / arms[name]['median']:.2f}x as fast"
        axes.text(medians[row] + whiskers[1][row], row, "  " + note, va="center", fontsize=8.5,
                  fontweight="bold" if name == "sparse" else None)
    axes.set(title="Time of a training step", xlabel="milliseconds (median, quartiles)", xlim=(0, max(medians) * 1.32))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)


def _bars_of_memory(axes: Axes, memory: dict[str, Any]) -> None:
    kinds = {"parameters": SPARSE, "gradients": "#5eaaa3", "optimizer": "#a7d3cf", "indices": ACCENT}
    arms, totals = list(memory), [sum(memory[arm].values()) for arm in memory]
    start = [0.0] * len(arms)
    for kind, colour in kinds.items():
        sizes = [memory[arm][kind] / 1e6 for arm in arms]
        axes.barh(arms, sizes, left=start, color=colour, height=0.5, label=kind, edgecolor="white", linewidth=0.6)
        start = [a + b for a, b in zip(start, sizes)]
    for row, total in enumerate(totals):
        axes.text(total / 1e6, row, f"  {human_bytes(total)}", va="center", fontsize=8.5)
    axes.set(title="Kept in memory from step to step", xlabel="megabytes", xlim=(0, max(totals) / 1e6 * 1.25))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(ncols=4, fontsize=8, loc="upper center", bbox_to_anchor=(0.45, -0.28), columnspacing=1.0, handlelength=1.2)


def save_plot(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)


def write_report(run_dir: Path) -> Path:
    """Write the plots and report.md into `run_dir`; returns the path of report.md."""
    result, rows = read_run(run_dir)
    with plt.rc_context(STYLE):
        plot_training(rows, run_dir / "training.png")
        if result["pruning"]:
            plot_density(result["pruning"]["layers"], run_dir / "density.png")
        if result["timing"]:
            plot_step(result["timing"], result["memory"], run_dir / "step.png")
    path = run_dir / "report.md"
    path.write_text("\n".join(_markdown(result)) + "\n", encoding="utf-8")
    return path


def _markdown(result: dict[str, Any]) -> list[str]:
    config, training, pruning, timing = result["config"], result["training"], result["pruning"], result["timing"]
    lines = [f"# {config['name']}: {config['model']} on {result['data']['name']}", "", _summary(config, result), ""]
    lines += [
        "| | |", "|---|---|",
        f"| test accuracy, last epoch ({training['epochs']}) | **{training['last_accuracy']:.2%}** |",
        f"| test accuracy, best epoch ({training['best_epoch']}) | {training['best_accuracy']:.2%} |",
        f"| training, evaluation included | {training['seconds']:.0f} s |",
    ]
    if timing:
        lines += [f"| step, {name} | {_quartiles(arm)} |" for name, arm in timing["arms"].items()]
        lines += [f"| bytes kept, {arm} | {_bytes_line(kinds)} |" for arm, kinds in result["memory"].items()]
    lines += ["", "The best epoch is chosen on the test images themselves, so it flatters; the last epoch does not.", "",
              "![loss and accuracy](training.png)", ""]
    if timing:
        lines += [_timing_note(result), "", "![step time and memory](step.png)", ""]
    if pruning:
        lines += ["![density per layer](density.png)", "", *_layer_table(pruning["layers"])]
    lines += ["", "## Recipe", "", "```json", json.dumps(config, indent=1), "```", "", "## Machine", ""]
    lines += [f"- {key}: {value}" for key, value in result["environment"].items() if value is not None]
    return lines


def _summary(config: dict[str, Any], result: dict[str, Any]) -> str:
    pruning = result["pruning"]
    if not pruning:
        return "Trained dense, nothing pruned."
    pattern = config.get("pattern", "unstructured")
    how = config["criterion"] if pattern == "unstructured" else f"{config['criterion']}, pattern {pattern}"
    return (
        f"Pruned before training by {how}, budget {config['budget']}: {pruning['weight_sparsity']:.2%} of the "
        f"weights and {pruning['flop_sparsity']:.2%} of the multiply-adds removed; trained sparse from the first step."
    )


def _quartiles(arm: dict[str, float]) -> str:
    return f"{human_seconds(arm['median'])} ({human_seconds(arm['q1'])} – {human_seconds(arm['q3'])}, {arm['count']} steps)"


def _bytes_line(kinds: dict[str, int]) -> str:
    parts = ", ".join(f"{kind} {human_bytes(size)}" for kind, size in kinds.items() if size)
    return f"{human_bytes(sum(kinds.values()))}: {parts}"


def _timing_note(result: dict[str, Any]) -> str:
    timing, environment = result["timing"], result["environment"]
    note = (
        f"A step is forward, loss, backward and update on a real batch of {result['config']['batch_size']}; median and "
        f"quartiles, arms in turns in one process, {environment['threads']} threads, allocator: {environment['allocator']}."
    )
    if "sparse" in timing["arms"]:
        ratio = timing["arms"][timing["best_dense"]]["median"] / timing["arms"]["sparse"]["median"]
        note += f" The best dense path here is **{timing['best_dense']}**; the sparse step is **{ratio:.2f} times** as fast."
    return note


def _layer_table(layers: list[dict[str, Any]]) -> list[str]:
    lines = ["| layer | shape | kept | of | density | multiply-adds kept | runs |", "|---|---|---:|---:|---:|---:|---|"]
    for layer in layers:
        shape = "x".join(map(str, layer["shape"]))
        lines.append(
            f"| {layer['name']} | {shape} | {layer['kept']:,} | {layer['total']:,} | {layer['density']:.3%} "
            f"| {layer['flops_kept']:,} | {layer['runs']} |"
        )
    return lines
