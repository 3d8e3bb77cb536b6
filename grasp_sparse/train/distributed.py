"""Several processes as one run: who is who, and the few collectives that training needs.

`torchrun` starts the processes and says in the environment who they are. CPU tensors and Python values travel by gloo, CUDA tensors
by NCCL. Alone, without torchrun, everything here does nothing and costs nothing.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among all: `rank` of `size` in the run, `local_rank` on its machine."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes files for all."""
        return self.rank == 0


class MainFailed(UserError):
    """Rank 0 failed and has said why; this process ends with it."""


def current_ranks() -> Ranks:
    """Who this process is; alone where no process group was started."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))


def start_distributed(config: TrainConfig) -> Ranks:
    """Join the other processes that torchrun started, if it did; from here on device "cuda" is this process's own GPU.

    Raises UserError for a device that several processes would share.
    """
    if dist.is_available() and dist.is_initialized() or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return current_ranks()
    device, local_rank = torch.device(config.device), int(os.environ.get("LOCAL_RANK", 0))
    if device.type == "cuda":
        if device.index is not None:
            raise UserError(f"Expected --device cuda under torchrun, which gives each process its own GPU, got {config.device}")
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"Expected a GPU for each process, got {torch.cuda.device_count()} for local rank {local_rank}; "
                "start fewer with --nproc-per-node"
            )
        torch.cuda.set_device(local_rank)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return current_ranks()


def stop_distributed() -> None:
    """Leave the others, at the end of a run that went well."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all ranks, in place; the same bits everywhere."""
    if current_ranks().size > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


def sum_over_ranks(*values: float) -> list[float]:
    """The sum over all ranks of each number."""
    total = torch.tensor(values, dtype=torch.float64)
    all_reduce_sum([total])
    return total.tolist()


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Give every rank rank 0's contents of each tensor, in place."""
    if current_ranks().size > 1:
        for tensor in tensors:
            dist.broadcast(tensor, src=0)


def gather(value: T) -> list[T]:
    """The value of every rank, in their order, on all of them; anything pickle can hold."""
    values = [value] * current_ranks().size
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def on_main(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, on every rank; the others wait for it. When it fails there, it fails everywhere."""
    ranks = current_ranks()
    if ranks.size == 1:
        return work()
    answer: list[Any] = [None, None]
    failure: BaseException | None = None
    if ranks.is_main:
        try:
            answer[0] = work()
        except Exception as error:
            failure, answer[1] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(answer, src=0)
    if failure is not None:
        raise failure
    if answer[1] is not None:
        raise MainFailed(f"rank 0 failed: {answer[1]}")
    return answer[0]


def barrier() -> None:
    """Wait until every rank is here."""
    sum_over_ranks(0.0)
