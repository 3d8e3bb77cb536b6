"""While rank 0 works alone and the others wait for it: a signal that reaches one of them stops all, as one does between steps.

A process that waits inside a collective does not even notice a signal. So whoever waits looks around, and sends rank 0 one word,
once: the number of the signal that it received, or 0 when it has been answered.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from grasp_sparse.train.signals import stop_number

_SHORTEST, _LONGEST = 0.001, 0.05  # seconds between two looks


@contextlib.contextmanager
def hearing_others(group: dist.ProcessGroup, others: int) -> Iterator[threading.Thread]:
    """On rank 0. Inside, the first signal that one of so many waiting ranks received arrives here too.

    The thread that it yields ends when all of them have sent their word, or one is gone.
    """
    main, lock, working = threading.main_thread().ident, threading.Lock(), True
    in_main = threading.current_thread() is threading.main_thread()  # elsewhere no signal can end the work

    def listen() -> None:
        nonlocal working
        word = torch.zeros(1, dtype=torch.int64)
        with contextlib.suppress(RuntimeError):  # a rank is gone: the next collective says so
            for _ in range(others):
                dist.recv(word, group=group)
                with lock:
                    if working and in_main and word.item():
                        working = False
                        signal.pthread_kill(main, int(word))

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    try:
        yield thread
    finally:
        with lock:
            working = False


def wait_for_answer(group: dist.ProcessGroup) -> KeyboardInterrupt | None:
    """On the other ranks: wait until rank 0 calls `announce_answer`; the stop that a signal asked for meanwhile, if any.

    Rank 0 knows of it then. A second signal raises at once; so does the first where rank 0 is gone. What collectives raise where
    rank 0 is gone and nobody asked.
    """
    answer, stop = dist.broadcast(torch.zeros(1), src=0, group=group, async_op=True), None
    try:
        _completed(answer)
    except KeyboardInterrupt as error:
        stop = error
    try:
        dist.send(torch.tensor([0 if stop is None else stop_number(stop)]), dst=0, group=group)
        _completed(answer)
    except RuntimeError:
        if stop is None:
            raise
        raise stop from None
    return stop


def announce_answer(group: dist.ProcessGroup) -> None:
    """On rank 0: the answer comes next."""
    dist.broadcast(torch.zeros(1), src=0, group=group)


def _completed(work: dist.Work) -> None:
    """Wait for `work` so that signals are noticed. Raises what it failed with."""
    pause = _SHORTEST
    while not work.is_completed():
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST)
    work.wait()
