"""Which runs benchmarks.accuracy trains: networks, methods, sparsities. Every study holds all else equal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

# The demo's net at half its widths: what a laptop trains in a fraction of a minute.
_SMALL = {"model": "vgg_small", "model_args": {"stem": 16, "widths": [64, 128], "depth": 2}}
_FASHION = {"data": "fashion-mnist", "epochs": 4, "samples_per_class": 20}
_CIFAR = {"data": "cifar10", "epochs": 4, "samples_per_class": 20}
_TRAINING = {
    "batch_size": 128, "lr": 0.1, "warmup": 0.1, "weight_decay": 5e-4, "memory_format": "channels_last", "tensorboard": "off",
}  # fmt: skip
RANDOM_ERK = {"criterion": "random", "scope": "erk"}


@dataclass(frozen=True)
class Trial:
    """One run but for its seed. `method` and `target` are what a table calls it; `recipe` are fields of a TrainConfig."""

    study: str
    method: str
    target: str
    recipe: dict[str, Any] = field(hash=False)

    @property
    def on_cifar(self) -> bool:
        return self.recipe["data"] == "cifar10"

    @property
    def name(self) -> str:
        return f"{self.study}: {self.recipe['data']} {self.recipe['model']} {self.method} {self.target}"


def _criteria() -> Iterator[Trial]:
    """The criteria against each other at equal numbers of weights."""
    recipe = _SMALL | _FASHION | _TRAINING
    yield Trial("criteria", "dense", "0", recipe | {"dense": True})
    methods = {name: {"criterion": name} for name in ("grasp", "snip", "synflow", "magnitude")} | {"random-erk": RANDOM_ERK}
    for method, choice in methods.items():
        for sparsity in (0.9, 0.95, 0.98, 0.99):
            yield Trial("criteria", method, f"{sparsity:g}", recipe | choice | {"sparsity": sparsity})


def _budgets() -> Iterator[Trial]:
    """What to limit, weights, multiply-adds or time: accuracy against the measured time of a step."""
    for data in (_FASHION, _CIFAR):
        recipe = _SMALL | data | _TRAINING
        yield Trial("budgets", "dense", "0", recipe | {"dense": True})
        recipe |= {"criterion": "grasp"}
        for sparsity in (0.9, 0.95, 0.98, 0.99):
            yield Trial("budgets", "grasp weights", f"{sparsity:g}", recipe | {"sparsity": sparsity})
            yield Trial("budgets", "random-erk weights", f"{sparsity:g}", recipe | RANDOM_ERK | {"sparsity": sparsity})
        for sparsity in (0.9, 0.95, 0.98):
            yield Trial("budgets", "grasp flops", f"{sparsity:g}", recipe | {"budget": "flops", "sparsity": sparsity})
        for speedup in (2.0, 2.5, 3.0):
            yield Trial("budgets", "grasp time", f"{speedup:g}x", recipe | {"budget": "time", "speedup": speedup})


def _cifar10() -> Iterator[Trial]:
    """The paper's two networks at 98 % and dense, its schedule compressed into the seconds given: accuracy at equal wall time."""
    schedule = {
        "data": "cifar10", "epochs": 160, "max_seconds": 540.0, "batch_size": 128, "lr": 0.1, "weight_decay": 5e-4,
        "schedule": "step", "milestones": [0.5, 0.75], "samples_per_class": 10, "memory_format": "channels_last",
        "tensorboard": "off",
    }  # fmt: skip
    for model in ("resnet32", "vgg19"):
        yield Trial("cifar10", "dense", "0", schedule | {"model": model, "dense": True})
        for method, choice in (("grasp", {"criterion": "grasp"}), ("random-erk", RANDOM_ERK)):
            yield Trial("cifar10", method, "0.98", schedule | choice | {"model": model, "sparsity": 0.98})


def quick() -> Iterator[Trial]:
    """That the program runs: made-up images, a few steps, nothing planned."""
    recipe = _SMALL | _TRAINING | {"data": "fake", "epochs": 2, "test_limit": 64, "timing_rounds": 3, "plan": "density"}
    yield Trial("quick", "dense", "0", recipe | {"dense": True})
    yield Trial("quick", "grasp", "0.95", recipe | {"sparsity": 0.95})


STUDIES: dict[str, Callable[[], Iterator[Trial]]] = {"criteria": _criteria, "budgets": _budgets, "cifar10": _cifar10}
SEEDS = {"criteria": (0, 1, 2), "budgets": (0, 1, 2), "cifar10": (0,), "quick": (0,)}
