"""How fast it is, from the CSV files in benchmarks/results.

    python -m benchmarks.speed_page            print the tables of README and docs/speed.md
    python -m benchmarks.speed_page --write    put them there and draw docs/speed.png

A test holds both against what this prints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from benchmarks.pages import README, Blocks, print_or_write, table
from benchmarks.speed_figures import (
    GROUPS, LAYER_CASES, MACHINES, MODELS, SHORT, STEP_CASES, STEPS, Speed, asked_speeds, crossings, layer_speeds, machine_of, rows_of,
    shape_label, slower_layers, speeds_against_linear, step_speeds, without_own_norms,
)  # fmt: skip
from benchmarks.speed_plot import plot
from grasp_sparse.bench.arms import speed_got
from grasp_sparse.bench.results import SPARSE, kind_of

DOCUMENT = README.parent / "docs" / "speed.md"
# What is measured beside the usual: (in words, file, groups).
SETTINGS = (
    ("in bfloat16", "layers-bfloat16", ("conv3x3", "linear")),
    ("in bfloat16", "layers-zen4-bfloat16", ("conv3x3", "linear")),
    ("in blocks of 16×16 weights", "layers-block16", ("conv3x3", "linear")),
    ("in blocks of 16×16 weights", "layers-zen4-block16", ("conv3x3", "linear")),
    ("nothing in caches", "layers-cold", ("conv3x3", "linear")),
    ("nothing in caches", "layers-zen4-cold", ("conv3x3", "linear")),
    ("without AVX-512, torch and we", "layers-zen4-avx2", ("conv3x3", "resnet50", "linear")),
    ("glibc's own settings", "layers-default-allocator", ("conv3x3", "linear")),
    ("glibc's own settings", "layers-zen4-default-allocator", ("conv3x3", "resnet50", "linear")),
    ("glibc's own settings", "layers-xeon-default-allocator", ("conv3x3", "resnet50", "linear")),
)
PEERS, PEER_SPARSITIES = ("peers", "peers-zen4"), ("0.95", "0.99")
CROSSOVERS = ("layers-crossover", "layers-zen4-crossover")
ASKED = "speedups-zen4"
# Steps, and beside them in another setting.
STEPS_AND_OTHERS = STEPS | {
    "Zen 4, without AVX-512": "models-zen4-avx2", "Zen 4, glibc's own settings": "models-zen4-default-allocator",
}  # fmt: skip
_NETWORKS = {"vgg19": "VGG-19", "resnet32": "ResNet-32", "resnet50": "ResNet-50", "mlp": "the MLP"}


def _times(speed: float) -> str:
    return f"{speed:.1f}×"


def _times_exactly(speed: float) -> str:
    return f"{speed:.2f}×"


def _range(speeds: Iterable[float]) -> str:
    """The lowest and the highest of the machines."""
    ordered = sorted(speeds)
    low, high = f"{ordered[0]:.1f}", f"{ordered[-1]:.1f}"
    return f"{low}×" if low == high else f"{low}–{high}×"


def _header(first: str, *others: str, cases: Iterable[tuple[str, float]]) -> list[str]:
    """Sparsities as column titles; what is removed is said once, where it changes."""
    titles, before = [], None
    for what, share in cases:
        titles.append(f"{what if what != before else ''} {share:.0%}".strip().replace("%", " %"))
        before = what
    return [first, *others, *titles]


def _step_header(first: str, *others: str) -> list[str]:
    return _header(first, *others, cases=[(budget, float(share)) for budget, share in STEP_CASES])


def _layer_header(first: str, *others: str) -> list[str]:
    return _header(first, *others, cases=[("", share) for share in LAYER_CASES])


def step_ranges() -> str:
    """For README: a line a model, the slowest and the fastest machine."""
    speeds = [step_speeds(name) for name in STEPS.values()]
    return table(_step_header("speed-up of a training step"), [
        (label, *(_range(found[model, *case].median for found in speeds) for case in STEP_CASES)) for model, label in MODELS.items()
    ])  # fmt: skip


def layer_ranges() -> str:
    rows = []
    for group, label in GROUPS.items():
        found = [layer_speeds(f"layers{ending}", group) for ending in MACHINES.values()]
        rows.append((label, *(_range(speeds[share] for speeds in found) for share in LAYER_CASES)))
    return table(_layer_header("speed-up of a layer"), rows)


def machine_list() -> str:
    lines = []
    for machine, ending in MACHINES.items():
        row = rows_of(f"layers{ending}")[-1]
        others = {one["cpu"] for name in ("models", "scaling") for one in rows_of(f"{name}{ending}")} - {row["cpu"]}
        line = f"- {machine}: {row['cpu']}, {row['threads']} threads, torch {row['torch'].partition('+')[0]}, {row['kernels']} kernels"
        lines.append(f"{line}{''.join(f'; some rows say {cpu}' for cpu in sorted(others))}.")
    return "\n".join(lines)


def step_table() -> str:
    rows = []
    for model, label in MODELS.items():
        for machine, name in STEPS_AND_OTHERS.items():
            found = step_speeds(name)
            speeds = [found.get((model, *case)) for case in STEP_CASES]
            if any(speeds):
                rows.append((label, machine, *(_with_quartiles(speed) if speed else "" for speed in speeds)))
                label = ""
    return table(_step_header("", ""), rows)


def _with_quartiles(speed: Speed) -> str:
    return f"{_times(speed.median)} ({speed.low:.1f}–{speed.high:.1f})"


def step_conditions() -> str:
    counts = sorted(speed.rounds for name in STEPS.values() for speed in step_speeds(name).values())
    flushed = "; ".join(f"{machine}, {_flushed(rows_of(name))}" for machine, name in STEPS.items())
    return (
        f"By {counts[0]} rounds at least, {counts[-1]} at most, the median {counts[len(counts) // 2]}. Denormal numbers count as zero: "
        f"{flushed}; elsewhere both arms contain what these cost."
    )


def _flushed(rows: Iterable[Mapping[str, str]]) -> str:
    """Of which models and limits."""
    cases: dict[tuple[str, str], bool] = {}
    for row in rows:
        case = row["model"], row["budget"]
        cases[case] = cases.get(case, True) and row.get("denormals") == "zero"
    if len(set(cases.values())) == 1:
        return "all" if all(cases.values()) else "none"
    return ", ".join(f"{_NETWORKS.get(model, model)} by {budget}" for (model, budget), zero in cases.items() if zero)


def norm_list() -> str:
    lines = []
    for machine in ("Zen 4", "Xeon"):
        left, profiled = without_own_norms(machine)
        left.sort()
        how = f"{len(left)} such networks profiled" if profiled else "estimated from what they take in the sparse network's profile"
        lines.append(f"- {machine}, {how}: {left[0] - 1:+.0%} to {left[-1] - 1:+.0%}, the median {left[len(left) // 2] - 1:+.0%}.")
    return "\n".join(lines)


def asked_table() -> str:
    """What budget="time" was asked for and what came of it; a speed that cannot be had has the most that can be."""
    lines, before = [], ""
    for (model, speed), rows in asked_speeds(ASKED).items():
        sparse = next((row for row in rows if row["best"] and kind_of(row["arm"]) == SPARSE), None)
        if sparse is None:
            found = f"cannot be had: at most {_times(float(rows[0]['most']))}", "", "", ""
        else:
            removed = (f"{float(sparse[column]):.1%}" for column in ("weight_sparsity", "flop_sparsity"))
            found = _times_exactly(float(sparse["speed in the search"])), _times_exactly(speed_got(sparse)), *removed
        lines.append((MODELS[model] if model != before else "", f"{float(speed):g}×", *found))
        before = model
    return table(("", "asked for", "in the search", "measured anew", "weights removed", "multiply-adds removed"), lines)


def layer_table() -> str:
    rows = []

    def add(label: str, speeds_of: Callable[[str], Mapping[float, float]]) -> None:
        for machine, ending in MACHINES.items():
            speeds = speeds_of(f"layers{ending}")
            rows.append((label, machine, *(_times(speeds[share]) for share in LAYER_CASES)))
            label = ""

    for group, label in GROUPS.items():
        add(label, partial(layer_speeds, group=group))
    add("these linear layers against `nn.Linear` as it is", speeds_against_linear)
    return table(_layer_header("", ""), rows)


def rate_list() -> str:
    """Multiply-adds a second as a share of what dense kernels do, by machine: the speed times the share of the weights kept."""
    lines = []
    for machine, ending in MACHINES.items():
        groups = []
        for group in GROUPS:
            speeds = layer_speeds(f"layers{ending}", group)
            groups.append(f"{SHORT[group]} {', '.join(f'{speeds[share] * (1 - share):.0%}' for share in LAYER_CASES)}")
        lines.append(f"- {machine}: {'; '.join(groups)}.".replace("%", " %"))
    return "\n".join(lines)


def setting_table() -> str:
    rows = []
    for words, name, groups in SETTINGS:
        for group in groups:
            speeds = layer_speeds(name, group)
            rows.append((f"{words}: {SHORT[group]}", machine_of(name), *(_times(speeds[share]) for share in LAYER_CASES)))
    return table(_layer_header("", ""), rows)


def crossing_list() -> str:
    """The least and the largest crossover of each group of shapes."""
    lines = []
    for name in CROSSOVERS:
        groups = crossings(name)
        said = [f"{SHORT[group]} {_share_range(found)}" for group, found in groups.items()]
        lines.append(f"- {machine_of(name)}: {', '.join(said)}.")
    return "\n".join(lines)


def _share_range(shares: Sequence[float | None]) -> str:
    """None is beyond the densest that was measured."""
    ends = [f"{share:.0%}".replace("%", " %") for share in sorted(share for share in shares if share is not None)]
    if None in shares:
        ends.append("more than was measured")
    return " to ".join(dict.fromkeys((ends[0], ends[-1])))


def network_list() -> str:
    lines = []
    for name in ("bench-resnet50-zen4", "bench-resnet50-xeon", "bench-vgg19-zen4", "bench-resnet32-zen4", "bench-mlp-zen4"):
        count, slower = slower_layers(name)
        (sparsity,) = {row["sparsity"] for row in rows_of(name)}
        line = f"- {_NETWORKS[name.split('-')[1]]}, {float(sparsity):.0%} of the weights removed, {machine_of(name)}: "
        line += f"{count - len(slower)} of {count} layers at least as fast as dense"
        for layer in slower:
            apart = "overlapping" if layer.overlaps else "apart from"
            line += f"; `{layer.name}` ({layer.runs}) {layer.speed:.2f}×, its quartiles {apart} dense's"
        lines.append(f"{line}.")
    return "\n".join(lines)


def thread_table() -> str:
    found: dict[str, dict[str, Mapping[str, str]]] = {}
    for machine, ending in MACHINES.items():
        for row in rows_of(f"scaling{ending}"):
            if row["measured"] == "threads" and row["threads_used"] == "2":
                found.setdefault(shape_label(row), {})[machine] = row
    header = ("two threads, times as fast as one", *(f"{machine}, medians" for machine in MACHINES), "Zen 4, fastest calls")
    return table(header, [
        (shape, *(f"{float(rows[machine]['times_as_fast_as_one_thread']):.2f}×" for machine in MACHINES),
         f"{float(rows['Zen 4']['fastest_times_as_fast']):.2f}×")
        for shape, rows in found.items()
    ])  # fmt: skip


def fit_table() -> str:
    fits: dict[tuple[str, str], Mapping[str, str]] = {}
    for machine, ending in MACHINES.items():
        for row in rows_of(f"scaling{ending}"):
            if row["fit_r2"]:
                fits[machine, shape_label(row)] = row
    return table(("", "", "R²", "farthest from the line"), [
        (shape, machine, f"{float(row['fit_r2']):.4f}", f"{float(row['fit_largest_deviation']):.1%}") for (machine, shape), row in fits.items()
    ])  # fmt: skip


def peer_table() -> str:
    peers = ("SparseProp", "torch CSR", "torch CSR by hand")
    cases: dict[tuple[str, str, str], dict[str, float]] = {}
    for file in PEERS:
        for row in rows_of(file):
            ours = kind_of(row["arm"]) == SPARSE
            if (ours or row["arm"] in peers) and row["pass"] == "forward+backward" and row["sparsity"] in PEER_SPARSITIES:
                case = cases.setdefault((shape_label(row), machine_of(file), row["sparsity"]), {})
                name = "ours" if ours else row["arm"]
                case[name] = max(case.get(name, 0), float(row["vs best dense"]))  # ours in the faster layout
    return table(("", "", "removed", "ours", *peers), [
        (shape, machine, f"{float(share):.0%}", *(_times(found[name]) if name in found else "" for name in ("ours", *peers)))
        for (shape, machine, share), found in cases.items()
    ])  # fmt: skip


README_BLOCKS: Blocks = {"speed of steps": step_ranges, "speed of layers": layer_ranges}
BLOCKS: Blocks = {
    "machines": machine_list,
    "steps": step_table,
    "step conditions": step_conditions,
    "norms": norm_list,
    "asked": asked_table,
    "layers": layer_table,
    "rates": rate_list,
    "settings": setting_table,
    "crossover": crossing_list,
    "networks": network_list,
    "threads": thread_table,
    "fits": fit_table,
    "peers": peer_table,
}


def main(arguments: list[str] | None = None) -> None:
    print_or_write("speed_page", __doc__, DOCUMENT, BLOCKS, plot, arguments, {README: README_BLOCKS})


if __name__ == "__main__":
    main()
