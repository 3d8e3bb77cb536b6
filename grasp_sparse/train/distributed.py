"""Several processes as one run: who is who, and the few collectives that training needs.

`torchrun` starts the processes and says in the environment who they are. CPU tensors and Python values travel by gloo, CUDA tensors
by NCCL. Alone, without torchrun, everything here does nothing and costs nothing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.signals import deferred_stop, stop_number, stop_of
from grasp_sparse.train.waiting import announce_answer, hearing_others, wait_for_answer

T = TypeVar("T")

# What rank 0 does for all (scoring for a speedup, measuring layers, timing steps at the end) takes hours on a large network, and
# torch lets ranks wait half an hour. A day is longer than any of it, and costs little: a rank that dies closes its connections, and
# those who wait know at once. Between steps torch's own limit stays, for ranks that hang: hence a group of its own.
_LONGEST_WORK_OF_MAIN = timedelta(days=1)
_waiting: dist.ProcessGroup | None = None  # of `on_main`; the default one where somebody else has joined the processes

# gloo raises plain RuntimeErrors
_COLLECTIVE_FAILED = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed out", re.IGNORECASE)


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


@dataclass(frozen=True)
class _Answer:
    """What came of rank 0's work: a result, the words of an error, or the signal that stopped it."""

    result: Any = None
    failed: str | None = None
    stopped: int = 0


class RankLost(UserError):
    """Another process of the run is gone, or no longer answers."""


class MainFailed(UserError):
    """Rank 0 failed and has said why; this process ends with it."""


def current_ranks() -> Ranks:
    """Who this process is; alone where no process group was started."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)))


def start_distributed() -> Ranks:
    """Join the other processes that torchrun started, if it did. Device "cuda" then is this process's own GPU."""
    global _waiting
    if dist.is_available() and not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        gpus = torch.cuda.device_count()
        dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo")
        if current_ranks().local_rank < gpus:
            torch.cuda.set_device(current_ranks().local_rank)
        _waiting = dist.new_group(backend="gloo", timeout=_LONGEST_WORK_OF_MAIN)
    return current_ranks()


def use_device(config: TrainConfig) -> None:
    """Make the run's device the current one: Triton launches there, and checkpoints hold that one's random stream.

    UserError for a device that this machine does not have, or that several processes would share.
    """
    ranks = current_ranks()
    if ranks.size > 1 and config.device.startswith("cuda"):
        if config.device != "cuda":
            raise UserError(f"Expected --device cuda under torchrun, which gives each process its own GPU, got {config.device}")
        if ranks.local_rank >= (gpus := torch.cuda.device_count()):
            raise UserError(
                f"Expected a GPU for each process, got {gpus} for local rank {ranks.local_rank}; start fewer with --nproc-per-node"
            )
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"Expected --device to be one this machine has, got {config.device!r} ({reason})") from error
    device = torch.device(config.device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)


@contextlib.contextmanager
def lost_ranks_named() -> Iterator[None]:
    """Inside, what a collective raises when another rank is gone becomes RankLost."""
    try:
        yield
    except RuntimeError as error:
        if current_ranks().size == 1 or not (isinstance(error, dist.DistError) or _COLLECTIVE_FAILED.search(str(error))):
            raise
        reason = str(error).strip().splitlines()[0]
        raise RankLost(
            f"another rank of this run is gone or does not answer ({reason}); what was saved before stands, start all of them again "
            "with --resume auto"
        ) from error


def stop_distributed() -> None:
    """Leave the others, at the end of a run that went well."""
    global _waiting
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        _waiting = None


def all_reduce_sum(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all ranks, in place; the same bits everywhere."""
    if current_ranks().size > 1:
        for tensor in tensors:
            _in_place(dist.all_reduce, tensor)


def sum_over_ranks(*values: float) -> list[float]:
    """The sum over all ranks of each number."""
    total = torch.tensor(values, dtype=torch.float64)
    all_reduce_sum([total])
    return total.tolist()


def broadcast_tensors(tensors: Iterable[Tensor]) -> None:
    """Give every rank rank 0's contents of each tensor, in place."""
    if current_ranks().size > 1:
        for tensor in tensors:
            _in_place(functools.partial(dist.broadcast, src=0), tensor.detach())


def _in_place(collective: Callable[[Tensor], object], tensor: Tensor) -> None:
    """Channels_last weights and their gradients are no contiguous memory, which collectives want."""
    flat = tensor.contiguous()
    collective(flat)
    if flat is not tensor:
        tensor.copy_(flat)


def gather(value: T) -> list[T]:
    """The value of every rank, in their order, on all of them; anything pickle can hold."""
    values = [value] * current_ranks().size
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def on_main(work: Callable[[], T]) -> T:
    """What `work` gives on rank 0, on every rank; the others wait for it, a day.

    When it fails there, it fails everywhere. A signal that stops rank 0 or one that waits stops all of them, and each raises it.
    """
    ranks = current_ranks()
    if ranks.size == 1:
        return work()
    return _work_for_all(work, ranks.size - 1) if ranks.is_main else _answer_of_main()


def _work_for_all(work: Callable[[], T], others: int) -> T:
    answer, failure, words = _Answer(), None, None
    try:
        # NCCL, if somebody else has joined the processes with it, knows no messages from anybody
        with contextlib.nullcontext() if _waiting is None else hearing_others(_waiting, others) as words:
            answer = _Answer(work())
    except Exception as error:
        failure, answer = error, _Answer(failed=f"{type(error).__name__}: {error}")
    except KeyboardInterrupt as stop:
        failure, answer = stop, _Answer(stopped=stop_number(stop))
    # a stop is on its way to all, and often comes more than once: from a scheduler, from torchrun, from another rank
    with lost_ranks_named(), deferred_stop(alone=False) if answer.stopped else contextlib.nullcontext():
        if words is not None:
            announce_answer(_waiting)
        dist.broadcast_object_list([answer], src=0, group=_waiting)
        if words is not None:
            words.join()
    if failure is not None:
        raise failure
    return answer.result


def _answer_of_main() -> Any:
    received: list[Any] = [None]
    with lost_ranks_named():
        stop = None if _waiting is None else wait_for_answer(_waiting)
        dist.broadcast_object_list(received, src=0, group=_waiting)
    answer: _Answer = received[0]
    if answer.stopped:
        raise stop_of(answer.stopped)
    if stop is not None:  # it came too late to stop rank 0
        raise stop
    if answer.failed is not None:
        raise MainFailed(f"rank 0 failed: {answer.failed}")
    return answer.result


def barrier() -> None:
    """Wait until every rank is here."""
    sum_over_ranks(0.0)
