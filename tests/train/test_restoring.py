"""A checkpoint whose parts do not fit the run is refused by name, and what goes wrong beside it is not put down to it."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import pytest
import torch
from small_runs import NET, at_call, config_of

from grasp_sparse.train import engine, resume, run
from grasp_sparse.train.checkpoint import load_checkpoint, save_checkpoint
from grasp_sparse.train.engine import Trainer
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.position import ROW_NUMBERS, Position, position_from
from grasp_sparse.train.run import resume_run, start_run
from grasp_sparse.train.signals import Interrupted

_FIRST_SHAPE = (8, 3, 3, 3)


@pytest.mark.parametrize(
    "momentum",
    [torch.zeros(1), torch.zeros(()), torch.zeros(8, 3, 3, 4), torch.zeros(1).expand(_FIRST_SHAPE), "none of it",
     torch.zeros(_FIRST_SHAPE).to_sparse()],
    ids=["short", "scalar", "long", "overlapping", "text", "sparse layout"],
)  # fmt: skip
def test_momentum_that_does_not_fit_its_parameter_is_refused(tmp_path: Path, momentum: object) -> None:
    start_run(config_of(epochs=1, dense=True), tmp_path)
    state = load_checkpoint(tmp_path)
    state["optimizer"]["state"][0]["momentum_buffer"] = momentum
    save_checkpoint(tmp_path, state)
    with pytest.raises(UserError, match=r"Expected (momentum_buffer .* parameter 0|every tensor in .*) to be (a dense tensor of shape \[8, 3, 3, 3\]|dense)"):
        resume_run(tmp_path, NET)


@pytest.mark.parametrize(
    "damage",
    [{"state": []}, {"param_groups": 3}, {"state": {99: {}}}, {"state": {0: {"exp_avg": torch.zeros(1)}}}, {"state": {0: 5}}],
    ids=str,
)
def test_an_optimizer_of_another_kind_is_refused(tmp_path: Path, damage: dict) -> None:
    start_run(config_of(epochs=1), tmp_path)
    state = load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, {**state, "optimizer": {**state["optimizer"], **damage}})
    with pytest.raises(UserError):
        resume_run(tmp_path, NET)


def test_settings_of_the_optimizer_come_from_the_recipe_not_from_its_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        at_call(6, lambda: signal.raise_signal(signal.SIGINT), engine, "training_step", patch)
        with pytest.raises(Interrupted):
            start_run(config_of(), tmp_path)
    state = load_checkpoint(tmp_path)
    state["optimizer"]["param_groups"][0]["momentum"] = "much"
    save_checkpoint(tmp_path, state)
    resume_run(tmp_path, NET)
    assert load_checkpoint(tmp_path)["optimizer"]["param_groups"][0]["momentum"] == 0.9


@pytest.mark.parametrize(
    ("field", "value"),
    [("epoch", "two"), ("epoch", 2.0), ("epoch", -1), ("epoch", 4), ("step", 5), ("step", -1), ("step", True), ("seconds", "long"),
     ("seconds", float("nan")), ("finished", 1), ("history", []), ("history", [1, 2, 3]), ("sums", {}), ("sums", None), ("more", 1)],
)  # fmt: skip
def test_a_position_that_no_run_reaches_is_refused(field: str, value: object) -> None:
    row = dict.fromkeys(ROW_NUMBERS, 1.0)
    reached = {**dataclasses.asdict(Position(3, 0, 1.0, True)), "history": [row] * 3}
    assert position_from(reached, epochs=3, steps_per_epoch=4).epoch == 3
    with pytest.raises(UserError, match="Expected .*position"):
        position_from({**reached, field: value}, epochs=3, steps_per_epoch=4)


def test_a_checkpoint_of_another_model_is_named(tmp_path: Path) -> None:
    start_run(config_of(epochs=1), tmp_path)
    state = load_checkpoint(tmp_path)
    save_checkpoint(tmp_path, {**state, **{part: {**state[part], "model": "vgg_small"} for part in ("recipe", "config")}})
    with pytest.raises(UserError, match="does not fit model vgg_small"):
        resume_run(tmp_path, {})


@pytest.mark.parametrize("where", ["check_same_structure", "Trainer"])
def test_what_goes_wrong_beside_the_checkpoint_is_not_put_down_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """A lost connection, a device without memory."""
    start_run(config_of(epochs=1), tmp_path)

    def fail(*_: object) -> None:
        raise RuntimeError("something about this machine")

    monkeypatch.setattr(run, where, fail)
    with pytest.raises(RuntimeError, match="^something about this machine$"):
        resume_run(tmp_path, NET)


@pytest.mark.parametrize(("owner", "name"), [(resume, "load_sparse"), (Trainer, "restore")], ids=["weights", "the rest"])
def test_a_device_without_room_is_not_a_checkpoint_that_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str
) -> None:
    start_run(config_of(epochs=1), tmp_path)
    errors = [torch.OutOfMemoryError("no room"), RuntimeError("sizes differ")]

    def fail(*_: object) -> None:
        raise errors.pop(0)

    monkeypatch.setattr(owner, name, fail)
    with pytest.raises(torch.OutOfMemoryError, match="^no room$"):
        resume_run(tmp_path, NET)
    with pytest.raises(UserError, match="checkpoint-.* does not fit model .*: sizes differ"):
        resume_run(tmp_path, NET)
