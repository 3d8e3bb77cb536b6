"""The last lines of a run, for a person and for a program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from grasp_sparse.train.checkpoint_files import checkpoint_name, list_checkpoints
from grasp_sparse.train.logging import say, table


def print_result(result: dict[str, Any], run_dir: Path, report: Path | None) -> None:
    """Accuracy, seconds a step, bytes, and where everything is; `report` is None where none could be written."""
    training, timing, memory = result["training"], result["timing"], result["memory"]
    say()
    say(f"test accuracy   {training['last_accuracy']:.2%} after the last epoch ({training['epochs']}), "
        f"best {training['best_accuracy']:.2%} after epoch {training['best_epoch']}")
    if corrupt := result["corrupt_files"]:
        say(f"passed over     {len(corrupt):,} image file{'s' * (len(corrupt) != 1)} that could not be read")
    if timing:
        say()
        say(_time_table(timing))
    if memory:
        say()
        say(_memory_table(memory))
    say()
    if report is not None:
        say(f"report      {report}")
    say(f"checkpoint  {list_checkpoints(run_dir)[0]}")
    if (best := run_dir / checkpoint_name(training["best_epoch"], 0)).exists():  # its save may have found no room
        say(f"best        {best}")


def _time_table(timing: dict[str, Any]) -> str:
    reference = timing["arms"][timing["best_dense"]]["median"]
    rows = [
        (f"{name} (best dense)" if name == timing["best_dense"] else name, f"{arm['median']:.4f}", f"{arm['q1']:.4f}",
         f"{arm['q3']:.4f}", f"{reference / arm['median']:.2f}x")
        for name, arm in timing["arms"].items()
    ]
    return table(("seconds a training step", "median", "quartile 1", "quartile 3", "speed"), rows, right=(1, 2, 3, 4))


def _memory_table(memory: dict[str, Any]) -> str:
    kinds = list(next(iter(memory.values())))
    rows = [(arm, *(f"{sizes[kind]:,}" for kind in kinds), f"{sum(sizes.values()):,}") for arm, sizes in memory.items()]
    return table(("bytes kept", *kinds, "all"), rows, right=range(1, len(kinds) + 2))


def result_line(result: dict[str, Any]) -> str:
    """`NAME: accuracy=… weight_sparsity=… …`: one line of key=value; what was not measured is left out."""
    pruning, timing, memory = result["pruning"], result["timing"], result["memory"]
    values: dict[str, str] = {"accuracy": f"{result['training']['last_accuracy']:.4f}"}
    if pruning:
        values |= {key: f"{pruning[key]:.5f}" for key in ("weight_sparsity", "flop_sparsity")}
    if timing:
        values["dense_step_s"] = f"{timing['arms'][timing['best_dense']]['median']:.5f}"
        if "sparse" in timing["arms"]:
            values["sparse_step_s"] = f"{timing['arms']['sparse']['median']:.5f}"
    if memory:
        values |= {f"{arm}_bytes": str(sum(sizes.values())) for arm, sizes in memory.items()}
    return f"{result['config']['name']}: " + " ".join(f"{key}={value}" for key, value in values.items())
