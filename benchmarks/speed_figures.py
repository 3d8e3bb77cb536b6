"""The figures that README and docs/speed.md quote, from the CSV files of the three machines."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

from benchmarks.runner import RESULTS
from grasp_sparse.bench.layer_plots import crossover, layer_lines
from grasp_sparse.bench.results import DENSE, REFITTED, SPARSE, geometric_mean, kind_of, read_rows

_FUSED = ("norm", "activation", "pooling")
MACHINES = {"Zen 5": "", "Zen 4": "-zen4", "Xeon": "-xeon"}  # and how the names of their files end
STEPS = {machine: f"models{ending}" for machine, ending in MACHINES.items()}  # their files of steps
STEP_CASES = (("flops", "0.9"), ("flops", "0.95"), ("flops", "0.98"), ("weights", "0.95"), ("weights", "0.98"), ("weights", "0.99"))
MODELS = {
    "vgg19": "VGG-19-BN, 32², batch 128", "resnet32": "ResNet-32 of the paper, 32², batch 128", "resnet50": "ResNet-50, 224², batch 32",
    "mlp": "MLP 3072-4096-4096-10, batch 256",
}  # fmt: skip
LAYER_CASES = (0.9, 0.95, 0.98, 0.99)
GROUPS = {
    "conv3x3": "3×3 convolutions 64 @ 32², 128 @ 16², 256 @ 8², 512 @ 4², batch 128",
    "resnet50": "every convolution of ResNet-50 at 224², batch 16 and 32",
    "linear": "linear 1024→1024, 4096→1024, 1024→4096, 768→3072, batch 128, 512, 2048",
}  # fmt: skip
SHORT = {"conv3x3": "3×3 convolutions", "resnet50": "ResNet-50's convolutions", "linear": "linear layers"}


class SlowerLayer(NamedTuple):
    """A layer that by medians is slower than dense, as the plan has it and in its faster layout."""

    name: str
    runs: str  # "sparse" or "masked"
    speed: float  # times as fast as the fastest dense path
    overlaps: bool  # whether its lower quartile reaches dense's upper one


@cache
def rows_of(name: str) -> list[dict[str, str]]:
    return read_rows(RESULTS / f"{name}.csv")


def machine_of(name: str) -> str:
    """"Zen 4" for "bench-resnet50-zen4"; what no ending names is of the first machine."""
    return next((machine for machine, ending in MACHINES.items() if ending and ending in name), next(iter(MACHINES)))


class Speed(NamedTuple):
    """Times as fast as dense by medians; by dense's lower and sparse's upper quartile, and the other way round."""

    median: float
    low: float
    high: float
    rounds: int


def step_speeds(name: str) -> dict[tuple[str, str, str], Speed]:
    """Of a file of steps, (model, budget, sparsity) -> how many times as fast the faster sparse step is as the fastest dense one."""
    best: dict[tuple[str, str, str], dict[str, Mapping[str, str]]] = {}
    for row in rows_of(name):
        if row["best"]:
            best.setdefault((row["model"], row["budget"], row["sparsity"]), {})[kind_of(row["arm"])] = row
    return {
        case: Speed(
            float(rows[SPARSE]["vs best dense"]), float(rows[DENSE]["q1_s"]) / float(rows[SPARSE]["q3_s"]),
            float(rows[DENSE]["q3_s"]) / float(rows[SPARSE]["q1_s"]), int(rows[SPARSE]["rounds"]),
        )
        for case, rows in best.items()
    }  # fmt: skip


def without_own_norms(machine: str) -> tuple[list[float], bool]:
    """What is left of the speed of a step, as a share of it, if the dense one has the norms, activations and poolings of a sparse one.

    Of the cases for which such a network was profiled, and True; or, where there is none, of all that have norms, from what these take
    in the sparse one's profile, and False.
    """
    cases: dict[tuple[str, str, str], dict[str, dict[str, float]]] = {}
    for row in rows_of(f"{STEPS[machine]}-breakdown"):
        own = cases.setdefault((row["model"], row["budget"], row["sparsity"]), {}).setdefault(kind_of(row["arm"]), {})
        own[row["category"]] = float(row["seconds"])

    profiled = [sum(found[REFITTED].values()) / sum(found[DENSE].values()) for found in cases.values() if REFITTED in found]
    if profiled:
        return profiled, True
    gains = [
        sum(found[DENSE].get(kind, 0.0) - found[SPARSE].get(kind, 0.0) for kind in _FUSED) / sum(found[DENSE].values())
        for found in cases.values()
        if found[DENSE].get("norm")
    ]
    return [1 - gain for gain in gains], False


def asked_speeds(name: str) -> dict[tuple[str, str], list[dict[str, str]]]:
    """(model, speed asked for) -> rows of the steps of the network that was found, or one row without times that says the most that can be had."""
    found: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows_of(name):
        found.setdefault((row["model"], row["asked"]), []).append(row)
    return found


def layer_speeds(name: str, group: str) -> dict[float, float]:
    """Sparsity -> geometric mean over the shapes of a group: the faster sparse arm against the fastest dense one."""
    lines = [line for line in layer_lines(rows_of(name)) if line.group.partition(",")[0] == group]
    if not lines:
        return {}
    shares = [share for share in lines[0].sparsity if all(share in line.sparsity for line in lines)]
    return {share: geometric_mean([line.speed[line.sparsity.index(share)] for line in lines]) for share in shares}


def speeds_against_linear(name: str) -> dict[float, float]:
    """The same of the linear layers against `nn.Linear` as people have it, which is not always torch's fastest path."""
    found: dict[float, list[float]] = {}
    for row in rows_of(name):
        if row["group"] == "linear" and row["best"] and kind_of(row["arm"]) == SPARSE:
            found.setdefault(float(row["sparsity"]), []).append(float(row["vs dense nn.Linear"]))
    return {share: geometric_mean(speeds) for share, speeds in found.items()}


def shape_label(row: Mapping[str, str]) -> str:
    """ "linear 768->3072 batch 512" as people write it."""
    return row["shape"].replace("->", "→").replace(" batch ", ", batch ")


def crossings(name: str) -> dict[str, list[float | None]]:
    """Group -> of each shape the density at which sparse is no faster than dense; None where it is faster at all that were measured."""
    found: dict[str, list[float | None]] = {}
    for line in layer_lines(rows_of(name)):
        points = sorted((1 - share, speed) for share, speed in zip(line.sparsity, line.speed, strict=True))
        found.setdefault(line.group.partition(",")[0], []).append(crossover(*map(list, zip(*points, strict=True))))
    return found


def slower_layers(name: str) -> tuple[int, list[SlowerLayer]]:
    """How many layers a network has, and which are slower than dense."""
    layers: dict[str, list[Mapping[str, str]]] = {}
    for row in rows_of(name):
        if row["pass"] == "forward+backward":
            layers.setdefault(row["layer"], []).append(row)
    slower = []
    for layer, own in layers.items():
        fastest = {kind: next(row for row in own if row["best"] and kind_of(row["arm"]) == kind) for kind in (DENSE, SPARSE)}
        dense, sparse = fastest[DENSE], fastest[SPARSE]
        speed = float(sparse["vs best dense"])
        if speed < 1:
            slower.append(SlowerLayer(layer, sparse["runs"], speed, float(sparse["q1_s"]) <= float(dense["q3_s"])))
    return len(layers), slower
