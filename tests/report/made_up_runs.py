"""Folders of runs that nobody trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.phases import PHASES

ENVIRONMENT = {"torch": "2.15.0", "threads": 2, "allocator": "system default", "cuda": None, "cpu": "EPYC", "kernels": "avx512"}


def rows(accuracy: float = 0.8, epochs: int = 3) -> list[dict[str, Any]]:
    """The last epoch has this test accuracy, the one before it 0.01 more."""
    columns = ("lr", "images_per_s", "seconds", "steps", "data_seconds", "train_seconds", "test_seconds")
    found = []
    for epoch in range(1, epochs + 1):
        test = accuracy - 0.05 * (epochs - epoch) + (0.06 if epoch == epochs - 1 else 0)
        found.append({
            "epoch": epoch, "train_loss": 1 / epoch, "test_loss": 1.1 / epoch, "train_accuracy": 0.9, "test_accuracy": test,
            **dict.fromkeys(columns, 1.5),
        })  # fmt: skip
    return found


def arm(median: float) -> dict[str, float]:
    return {"median": median, "q1": 0.9 * median, "q3": 1.1 * median, "count": 5, "best": 0.8 * median}


def result(pruned: bool = True, timed: bool = True, counted: bool = True, accuracy: float = 0.8, **settings: Any) -> dict[str, Any]:
    layers = [
        {"name": f"conv{i}.weight", "shape": [8, 8, 3, 3], "kept": kept, "total": 576, "density": kept / 576,
         "flops_kept": 10 * kept, "flops_total": 5760, "runs": "sparse"}
        for i, kept in enumerate((100, 3, 0))
    ]  # fmt: skip
    dense = {"parameters": 4000, "gradients": 4000, "optimizer": 4000, "indices": 0}
    sparse = {"parameters": 400, "gradients": 404, "optimizer": 400, "indices": 1200}
    arms = {"dense nchw": arm(0.2), "dense channels_last": arm(0.15), **({"sparse": arm(0.05)} if pruned else {})}
    phases = {name: dict.fromkeys(PHASES, 0.01) for name in ("dense channels_last", *(["sparse"] if pruned else []))}
    return {
        "config": TrainConfig(**{"name": "demo", "model": "net", "budget": "flops", "dense": not pruned, **settings}).to_dict(),
        "environment": ENVIRONMENT,
        "data": {"name": "pictures", "source": "nowhere", "train": 10, "test": 10, "num_classes": 10, "shape": [3, 8, 8]},
        "pruning": {"weight_sparsity": 0.97, "flop_sparsity": 0.98, "skipped": [["fc", "excluded"]], "layers": layers} if pruned else None,
        "training": {"epochs": 3, "seconds": 75.0, "last_accuracy": accuracy, "best_accuracy": accuracy + 0.01, "best_epoch": 2},
        "timing": {"arms": arms, "best_dense": "dense channels_last", "phases": phases} if timed else None,
        "memory": {"dense": dense, **({"sparse": sparse} if pruned else {})} if counted else None,
    }


def write_run(folder: Path, **options: Any) -> Path:
    """result.json and log.jsonl in `folder`, which is made; options of `result`."""
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result(**options)))
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(options.get("accuracy", 0.8))))
    return folder
