"""A run that leaves the finite numbers ends, says where, and leaves what was saved."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import NET, at_call, config_of

from grasp_sparse.train import engine
from grasp_sparse.train.checkpoint import load_checkpoint
from grasp_sparse.train.checkpoint_files import checkpoint_name, list_checkpoints
from grasp_sparse.train.engine import Trainer
from grasp_sparse.train.errors import DivergedError
from grasp_sparse.train.run import resume_run, start_run


@pytest.mark.parametrize(
    "changes", [{"dense": True}, {}, {"batch_size": 8, "accumulate": 2, "precision": "bf16"}], ids=["dense", "sparse", "bf16 in parts"]
)
def test_a_loss_that_is_not_finite_names_step_and_layer_and_leaves_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict
) -> None:
    """The second batch norm, layer 5, multiplies by so much that its output overflows, from the sixth step on."""
    trained: list[torch.nn.Module] = []
    begin = Trainer.__init__

    def remember(self, config, model, *others) -> None:
        begin(self, config, model, *others)
        trained.append(model)

    monkeypatch.setattr(Trainer, "__init__", remember)
    at_call(5, lambda: trained[0][5].weight.data.fill_(3e38), engine, "training_step", monkeypatch)
    with pytest.raises(DivergedError, match=r"step 2 of epoch 2 .*: first in the output of layer 5 \(\w+\): .* lower --lr"):
        start_run(config_of(**changes), tmp_path)
    assert load_checkpoint(tmp_path)["position"]["epoch"] == 1


def _trainers(monkeypatch: pytest.MonkeyPatch) -> list[Trainer]:
    """The trainers that are made from now on."""
    made: list[Trainer] = []
    begin = Trainer.__init__
    monkeypatch.setattr(Trainer, "__init__", lambda self, *given: (begin(self, *given), made.append(self))[0])
    return made


def _finite(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return bool(value.isfinite().all())
    return all(map(_finite, value.values() if isinstance(value, dict) else value)) if isinstance(value, (dict, list)) else True


_SPOILT: dict[str, Callable[[Trainer], torch.Tensor]] = {
    "weights": lambda trainer: trainer.model[5].weight,
    "running statistics": lambda trainer: trainer.model[5].running_var,
    "moments": lambda trainer: trainer.optimizer.state[trainer.model[5].weight]["momentum_buffer"],
    "averages": lambda trainer: trainer.ema.averages["5.weight"],
}


@pytest.mark.parametrize("what", _SPOILT)
@pytest.mark.parametrize("stop", [False, True], ids=["by the clock", "at a signal"])
def test_what_is_not_finite_is_never_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, stop: bool) -> None:
    """Spoilt by the sixth step, whose loss still is finite."""
    trainers = _trainers(monkeypatch)

    def spoil() -> None:
        _SPOILT[what](trainers[0]).data[3] = float("inf")
        if stop:
            signal.raise_signal(signal.SIGTERM)

    at_call(6, spoil, engine, "training_step", monkeypatch)
    message = r"Expected finite numbers to save after step 2 of epoch 2 .learning rate 0.\d+., got 1 \w+ of 16 values in .*5\.\w+.*lower --lr"
    with pytest.raises(DivergedError, match=message):
        start_run(config_of(ema_decay=0.9, checkpoint_minutes=10.0 if stop else 0.0), tmp_path)
    state = load_checkpoint(tmp_path)
    assert list_checkpoints(tmp_path)[0].name == checkpoint_name(1, 0 if stop else 1) and _finite(state)
    monkeypatch.undo()
    resume_run(tmp_path, NET)
    assert _finite(load_checkpoint(tmp_path))


@pytest.mark.parametrize("averages", [False, True], ids=["of the model", "of the moving average"])
def test_a_test_loss_that_is_not_finite_is_no_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, averages: bool) -> None:
    """Its accuracy may be the best of all, by chance; the run ends and what it names as the best is of another epoch."""
    real, calls, spoilt = engine.evaluate, [], 4 if averages else 3

    def evaluate(*arguments):
        calls.append(None)
        return (float("nan"), 1.0) if len(calls) == spoilt else real(*arguments)

    monkeypatch.setattr(engine, "evaluate", evaluate)
    whose = "test loss of the moving average" if averages else "test loss"
    with pytest.raises(DivergedError, match=f"the {whose} is nan after step 4 of epoch 2 .*: all weights are finite, .*what was saved before stands"):
        start_run(config_of(ema_decay=0.9), tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(1, 0), checkpoint_name(0, 1)]
    assert [row["epoch"] for row in load_checkpoint(tmp_path)["position"]["history"]] == [1]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_a_test_loss_of_spoilt_weights_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainers = _trainers(monkeypatch)
    at_call(4, lambda: trainers[0].model[5].weight.data.fill_(float("nan")), engine, "training_step", monkeypatch)
    with pytest.raises(DivergedError, match="the test loss is nan after step 4 of epoch 1 .*: there are 16 nan of 16 values in 5.weight;"):
        start_run(config_of(), tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(0, 1)]
