"""Random streams: seeded as one, held by a checkpoint as one, and gone on with where they stood, Python's and NumPy's too."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import several_ranks
import torch
from several_ranks import small_config
from torch import Tensor, nn

from benchmarks.run_states import differing_parts
from grasp_sparse.train import engine, streams
from grasp_sparse.train.checkpoint import load_checkpoint
from grasp_sparse.train.run import resume_run, start_run
from grasp_sparse.train.sharding import seed_rank
from grasp_sparse.train.signals import Interrupted
from grasp_sparse.train.streams import is_rng, restore_rng, rng_state, seed_streams


class _DrawsElsewhere(nn.Module):
    """Noise from Python and NumPy, as augmentation of users adds it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + 0.1 * random.gauss(0, 1) + 0.1 * float(np.random.normal())) if self.training else x


def elsewhere_net(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(_DrawsElsewhere(), *several_ranks.noisy_net(num_classes, in_channels))


_NET = {"model": f"{__name__}:elsewhere_net"}


def _draws() -> list[float]:
    """Two of each kind: the second normal number of Python and NumPy is left over from the first."""
    drawn = [(random.random(), random.gauss(0, 1), np.random.rand(), np.random.normal(), float(torch.rand(()))) for _ in range(2)]
    return [number for row in drawn for number in row]


@pytest.mark.parametrize("before", [0, 1, 2, 623, 624, 625])
def test_every_stream_goes_on_where_its_state_was_taken(before: int) -> None:
    seed_streams(5)
    for _ in range(before):
        random.random(), np.random.rand()
    random.gauss(0, 1), np.random.normal()
    state = rng_state()
    assert is_rng(state)
    expected = _draws()
    seed_streams(6)
    restore_rng(state)
    assert _draws() == expected


def test_a_seed_is_one_for_all_streams_and_python_and_numpy_take_its_sign_and_upper_bits() -> None:
    """Which torch's twister drops."""
    drawn = []
    for seed in (3, 3, -3, 3 + (1 << 40)):
        seed_streams(seed)
        drawn.append(_draws())
    assert drawn[0] == drawn[1]
    torchs = slice(4, None, 5)
    for other in drawn[2:]:
        assert set(drawn[0]) & set(other) <= set(drawn[0][torchs])


def test_each_rank_has_streams_of_its_own() -> None:
    drawn = []
    for rank in (0, 1, 2):
        seed_streams(0)
        seed_rank(0, rank)
        drawn.append(_draws())
    assert not set(drawn[0]) & set(drawn[1]) and not set(drawn[1]) & set(drawn[2])


def test_another_generator_behind_numpys_functions_is_left_alone() -> None:
    own = np.random.get_bit_generator()
    try:
        np.random.set_bit_generator(np.random.PCG64(3))
        state = rng_state()
        expected = np.random.rand()
    finally:
        np.random.set_bit_generator(own)
    assert state["numpy"] is None and is_rng(state) and 0 <= expected < 1
    restore_rng(state)


def test_numpy_is_neither_imported_nor_asked_for_where_nobody_has() -> None:
    """The file alone: the package around it imports NumPy."""
    program = (
        f"import sys; sys.modules['numpy'] = sys.modules['numpy.random'] = None; exec(open({streams.__file__!r}).read())\n"
        "seed_streams(1); state = rng_state(); restore_rng(state); print(state['numpy'])"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr


def test_a_resumed_run_draws_from_python_and_numpy_what_the_uninterrupted_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same seed, other states before it: each run begins by its seed alone."""
    config = small_config(train_limit=64, batch_size=16, epochs=2, **_NET)
    start_run(config, tmp_path / "whole")
    random.seed(77), np.random.seed(77)
    with monkeypatch.context() as patch:
        step, done = engine.training_step, []

        def third(*arguments):
            result = step(*arguments)
            done.append(None)
            if len(done) == 3:
                signal.raise_signal(signal.SIGINT)
            return result

        patch.setattr(engine, "training_step", third)
        with pytest.raises(Interrupted):
            start_run(config, tmp_path / "parts")
    assert load_checkpoint(tmp_path / "parts")["rng"][0]["numpy"] is not None
    random.seed(999), np.random.seed(999)
    resume_run(tmp_path / "parts", _NET)
    assert differing_parts(tmp_path / "whole", tmp_path / "parts") == []
