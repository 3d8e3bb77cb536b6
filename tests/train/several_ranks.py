"""Three processes that do everything several ranks do together, started once for all tests: a process takes seconds to begin.

    python several_ranks.py FOLDER        a rank, who it is being said by the environment, as torchrun does

What the ranks found is written to FOLDER/rank-N.pt, their runs are in FOLDER too.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from image_files import write_class_folders
from torch.distributed import distributed_c10d

import grasp_sparse
from grasp_sparse import pruning
from grasp_sparse.masks import MaskSet
from grasp_sparse.nn import SparseLayer
from grasp_sparse.planning import Times, measure
from grasp_sparse.train import engine
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.data_parallel import data_parallel
from grasp_sparse.train.distributed import current_ranks, on_main, start_distributed, stop_distributed
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.prepare import check_same_structure, data_and_model, masks_for, sparsify_for_training
from grasp_sparse.train.run import resume_run, start_run
from grasp_sparse.train.signals import Interrupted

RANKS = 3
# Files of a class are in the order of their names: the first three, of which each rank tests one; and three that are no neighbours,
# for in training an image is replaced by the next one.
CORRUPT, CORRUPT_IN_TRAINING = (0, 1, 10), (0, 11, 3)
CLIPPED = 0.1  # a norm that gradients of these nets exceed
CRITERIA = ("grasp", "snip", "synflow", "magnitude", "random")


def plain_net(num_classes: int, in_channels: int) -> nn.Module:
    """Every image counts for itself: no batch norm."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )  # fmt: skip


def noisy_net(num_classes: int, in_channels: int, dropout: float = 0.5) -> nn.Module:
    """With running statistics and draws from each rank's random stream."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )  # fmt: skip


class _WithSpare(nn.Sequential):
    """Has a layer that only the first `users` ranks use."""

    users: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        *layers, spare = self
        for layer in layers:
            x = layer(x)
        return spare(x) if current_ranks().rank < self.users else x


def net_with_spare(num_classes: int, in_channels: int, users: int) -> nn.Module:
    net = _WithSpare(*plain_net(num_classes, in_channels), nn.Linear(num_classes, num_classes, bias=False))
    net.users = users
    return net


def small_config(**changes: object) -> TrainConfig:
    small = TrainConfig(
        data="fake", image_size=8, train_limit=96, test_limit=20, batch_size=8, epochs=2, lr=0.05, sparsity=0.7, samples_per_class=2,
        score_batch=5, timing_rounds=0, plan="density", tensorboard="off", model="several_ranks:plain_net",
    )  # fmt: skip
    return dataclasses.replace(small, **changes)


def after_steps(count: int, action: Callable[[], object]) -> Callable[[], None]:
    """Call `action` at the end of the step number `count`; returns the way back."""
    step, done = engine.training_step, []

    def counted(*arguments):
        result = step(*arguments)
        done.append(None)
        if len(done) == count:
            action()
        return result

    engine.training_step = counted
    return lambda: setattr(engine, "training_step", step)


def start_ranks(folder: Path) -> None:
    """Run this file in RANKS processes; raises CalledProcessError with what they said if one fails."""
    shared = {**os.environ, **python_path(), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(RANKS)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(folder)], env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(RANKS)
    ]  # fmt: skip
    said = [process.communicate(timeout=240)[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError("\n".join(f"rank {rank}: {text}" for rank, text in enumerate(said)))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def python_path() -> dict[str, str]:
    """The environment in which a process finds this package and this file."""
    folders = [str(Path(grasp_sparse.__file__).parents[1]), str(Path(__file__).parent)]
    return {"PYTHONPATH": os.pathsep.join(folders), "GRASP_SPARSE_CACHE": "0", "OMP_NUM_THREADS": "1"}


def interrupted_then_resumed(config: TrainConfig, folder: Path, steps: int, between: Callable[[], object] = lambda: None) -> None:
    """A run whose last rank alone receives Ctrl-C after so many steps, and goes on."""
    last = current_ranks().rank == RANKS - 1
    restore = after_steps(steps, lambda: last and signal.raise_signal(signal.SIGINT))
    try:
        start_run(config, folder)
    except Interrupted:
        pass
    else:
        raise AssertionError("the run was not interrupted")
    finally:
        restore()
    between()
    torch.manual_seed(999)
    resume_run(folder, {"model": config.model})  # code of ours: it has to be named again


def message_of(action: Callable[[], object]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def masks_by(**changes: object) -> dict[str, torch.Tensor]:
    """By name. Batch norms see the same micro-batches in one process and in many; dropout would not be the same."""
    config = small_config(model="several_ranks:noisy_net", model_args={"dropout": 0.0}, **changes)
    data, model = data_and_model(config)
    return dict(masks_for(config, model, data))


def masks_for_a_speedup() -> tuple[dict[str, torch.Tensor], int]:
    """Masks under budget time, the search replaced by one that counts how often it is made and knows the answer."""
    searches, original = [], pruning.time_search

    def search(model, masks_at, sparsest, names, *rest):
        searches.append(None)
        return MaskSet(masks_at(0.5, dict.fromkeys(names, 1.0)), {"dense_step_s": 2.0, "sparse_step_s": 1.0})

    pruning.time_search = search
    try:
        return masks_by(budget="time", speedup=2.0, sparsity=None), len(searches)
    finally:
        pruning.time_search = original


def plan_that_ranks_measure_differently() -> list[str]:
    """How the layers run when rank 0 finds sparse kernels faster and the others dense ones."""
    main, original = current_ranks().is_main, measure.measure_layer
    measure.measure_layer = lambda *_: Times(2e-3, 2e-3, 1e-3) if main else Times(1e-3, 1e-3, 2e-3)
    try:
        config = small_config(plan="auto", sparsity=0.5)
        data, model = data_and_model(config)
        summary = sparsify_for_training(config, model, masks_for(config, model, data), data)
    finally:
        measure.measure_layer = original
    return [layer["runs"] for layer in summary["layers"]]


def other_masks_on_the_last_rank() -> None:
    config = small_config()
    data, model = data_and_model(config)
    masks = {name: mask.clone() for name, mask in masks_for(config, model, data).items()}
    if current_ranks().rank == RANKS - 1:
        first = next(iter(masks.values()))
        first.copy_(first.flatten().roll(1).view_as(first))
    grasp_sparse.sparsify_(model, masks, plan="density")
    check_same_structure(model)


def other_data_on_the_last_rank() -> None:
    data_and_model(small_config(test_limit=20 - (current_ranks().rank == RANKS - 1)))


def index_changed_on_the_last_rank() -> bool:
    """Whether indices that the last rank alone has changed are unchanged there by a forward and a backward pass."""
    config = small_config()
    data, model = data_and_model(config)
    sparsify_for_training(config, model, masks_for(config, model, data), data)
    wrapped, _ = data_parallel(model)
    layer = next(module for module in model.modules() if isinstance(module, SparseLayer))
    before = layer.col_indices.clone()
    if current_ranks().rank == RANKS - 1:
        layer._adopt(layer.storage.from_mask(layer.mask.roll(1, -1)), keep_device=True)
        assert not torch.equal(layer.col_indices, before)
    left = layer.col_indices.clone()
    wrapped(torch.randn(4, *data.shape)).sum().backward()
    return torch.equal(layer.col_indices, left)


def long_work_on_main() -> str:
    """What comes of work on rank 0 that takes longer than ranks wait for one another among steps."""
    limit = distributed_c10d._set_pg_timeout
    limit(timedelta(seconds=0.5))
    try:
        return message_of(lambda: on_main(lambda: time.sleep(1.5)))
    finally:
        limit(distributed_c10d.default_pg_timeout)


def _fail() -> None:
    raise UserError("no such thing")


def work(folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    found: dict[str, Any] = {"masks": {name: masks_by(criterion=name) for name in CRITERIA}}
    found["masks"]["fewer micro-batches than ranks"] = masks_by(score_batch=10)
    found["masks"]["budget flops"] = masks_by(budget="flops")
    found["speedup"] = masks_for_a_speedup()
    found["plan"] = plan_that_ranks_measure_differently()
    found["other masks"] = message_of(other_masks_on_the_last_rank)
    found["other data"] = message_of(other_data_on_the_last_rank)
    found["main fails"] = message_of(lambda: on_main(_fail))
    found["main takes long"] = long_work_on_main()
    found["index kept"] = index_changed_on_the_last_rank()
    for users in (0, 1, RANKS):
        spare = small_config(model="several_ranks:net_with_spare", model_args={"users": users}, dense=True, epochs=1)
        found[f"spare layer of {users}"] = message_of(lambda: start_run(spare, folder / f"spare {users}"))
    found["batches of the criterion"] = message_of(lambda: masks_by(criterion_args={"num_batches": 1}))

    noisy = small_config(model="several_ranks:noisy_net", ema_decay=0.9)
    start_run(noisy, folder / "whole")
    interrupted_then_resumed(noisy, folder / "parts", steps=6)

    on_main(lambda: spoilt_images(folder / "images", "val", CORRUPT))
    photographs = small_config(
        data="imagefolder", data_dir=str(folder / "images"), workers=0, train_limit=None, test_limit=None, dense=True, epochs=1,
        max_corrupt=RANKS,
    )  # fmt: skip
    found["corrupt"] = start_run(photographs, folder / "corrupt")["corrupt_files"]
    on_main(lambda: spoilt_images(folder / "training images", "train", CORRUPT_IN_TRAINING))
    trained = dataclasses.replace(photographs, data_dir=str(folder / "training images"))
    found["corrupt in training"] = start_run(trained, folder / "corrupt in training")["corrupt_files"]
    fewer = dataclasses.replace(photographs, max_corrupt=RANKS - 1)
    found["too many corrupt"] = message_of(lambda: start_run(fewer, folder / "too many corrupt"))

    copied = folder / "to go on alone"
    interrupted_then_resumed(small_config(), folder / "plain", 6, lambda: on_main(lambda: copy_files(folder / "plain", copied)))
    found["accumulated"] = start_run(small_config(batch_size=4, accumulate=2), folder / "accumulated")["scale"]
    found["some masked"] = start_run(small_config(max_density=0.25), folder / "some masked")["scale"]
    start_run(small_config(clip_norm=CLIPPED), folder / "clipped")
    return found


def spoilt_images(root: Path, split: str, numbers: Sequence[int]) -> None:
    """Files of two classes, of which those numbers of the first one in that split cannot be read."""
    write_class_folders(root, count=4 * RANKS)
    for number in numbers:
        (root / split / "a" / f"{number}.png").write_bytes(b"")


def copy_files(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def main(arguments: Sequence[str]) -> None:
    folder, ranks = Path(arguments[0]), start_distributed()
    found = work(folder)
    torch.save(found, folder / f"rank-{ranks.rank}.pt")
    stop_distributed()


if __name__ == "__main__":
    main(sys.argv[1:])
