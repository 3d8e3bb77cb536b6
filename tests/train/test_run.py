"""Runs: resumed equals uninterrupted bit for bit, interrupts lose nothing, and a result says what was measured."""

from __future__ import annotations

import dataclasses
import json
import signal
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.run_states import same
from grasp_sparse import _extension
from grasp_sparse.masks import MaskSet
from grasp_sparse.planning import Times, measure
from grasp_sparse.train import engine, run
from grasp_sparse.train.checkpoint import load_checkpoint, save_checkpoint
from grasp_sparse.train.checkpoint_files import checkpoint_name, has_run
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.errors import DivergedError, UserError
from grasp_sparse.train.run import resume_run, start_run
from grasp_sparse.train.signals import Interrupted


def dropout_net(num_classes: int, in_channels: int) -> nn.Module:
    """Draws from the global random stream at every step, which a resume must continue."""
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(4),
        nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )  # fmt: skip


class _WithAux(nn.Sequential):
    def forward(self, x: torch.Tensor) -> object:
        return (super().forward(x), None) if self.training and torch.is_grad_enabled() else super().forward(x)


def with_aux(num_classes: int, in_channels: int) -> nn.Module:
    """Like torchvision's googlenet: more than logits, in training only."""
    return _WithAux(*dropout_net(num_classes, in_channels))


class _Particular(nn.Sequential):
    _version = 2

    def get_extra_state(self) -> dict[str, str]:
        return {"made": "with care"}

    def set_extra_state(self, state: dict[str, str]) -> None:
        assert state == {"made": "with care"}

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest) -> None:
        if local_metadata.get("version") != 2:
            raise ValueError("Expected version 2")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def particular_net(num_classes: int, in_channels: int) -> nn.Module:
    """Like torchvision's mnasnet: takes no state without its version. It also keeps what is no tensor there."""
    return _Particular(*dropout_net(num_classes, in_channels))


_TRUSTED = {"model": f"{__name__}:dropout_net"}  # a checkpoint alone does not choose whose code runs


def _config(**changes: object) -> TrainConfig:
    small = TrainConfig(
        data="fake", image_size=8, train_limit=64, test_limit=20, batch_size=16, epochs=3, lr=0.05, **_TRUSTED,
        sparsity=0.7, samples_per_class=2, timing_rounds=0, plan="density", tensorboard="off",
    )  # fmt: skip
    return dataclasses.replace(small, **changes)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _after_steps(count: int, action: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    """Call `action` at the end of the step number `count`."""
    step, done = engine.training_step, []

    def counted(*arguments):
        result = step(*arguments)
        done.append(None)
        return action() or result if len(done) == count else result

    monkeypatch.setattr(engine, "training_step", counted)


def _ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def _history(state: dict) -> list[dict]:
    """Rows without what a clock wrote."""
    return [{k: v for k, v in row.items() if "seconds" not in k and "_per_s" not in k} for row in state["position"]["history"]]


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
@pytest.mark.parametrize("steps", [4, 6, 12], ids=["between epochs", "inside an epoch", "after the last step"])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, dense: bool) -> None:
    config = _config(dense=dense)
    start_run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        _after_steps(steps, _ctrl_c, patch)
        with pytest.raises(Interrupted, match="--resume"):
            start_run(config, tmp_path / "parts")
    torch.manual_seed(999)
    resume_run(tmp_path / "parts", _TRUSTED)
    whole, parts = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "parts")
    for part in ("config", "model", "optimizer", "rng", "pruning"):
        assert same(whole[part], parts[part]), part
    assert _history(whole) == _history(parts)
    logged = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert logged == parts["position"]["history"] and len(logged) == 3


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_a_model_that_asks_for_the_version_of_a_state_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dense: bool) -> None:
    config = _config(model=f"{__name__}:particular_net", dense=dense, epochs=1, ema_decay=0.9, criterion="synflow")
    whole = start_run(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        _after_steps(2, _ctrl_c, patch)
        with pytest.raises(Interrupted):
            start_run(config, tmp_path / "parts")
    parts = resume_run(tmp_path / "parts", {"model": config.model})
    assert parts["training"]["last_accuracy"] == whole["training"]["last_accuracy"]
    assert load_checkpoint(tmp_path / "parts")["model"]["_extra_state"] == {"made": "with care"}


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _tensors(item)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense"])
def test_what_was_read_from_a_checkpoint_is_not_held_while_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dense: bool
) -> None:
    """But for the moments, which the optimizer takes over as they are. A network, its moments and its average are gigabytes."""
    with monkeypatch.context() as patch:
        _after_steps(6, _ctrl_c, patch)
        with pytest.raises(Interrupted):
            start_run(_config(dense=dense, ema_decay=0.9), tmp_path)
    read, held = [], []

    def watched(path: Path) -> dict:
        state = load_checkpoint(path.parent)
        read.extend(weakref.ref(tensor) for part in ("model", "ema", "rng") for tensor in _tensors(state[part]))
        return state

    monkeypatch.setattr(run, "read_checkpoint", watched)
    _after_steps(1, lambda: held.extend(tensor().shape for tensor in read if tensor() is not None), monkeypatch)
    resume_run(tmp_path, _TRUSTED)
    assert len(read) > 20 and held == []


def test_a_log_line_written_after_the_checkpoint_is_not_there_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _after_steps(6, _ctrl_c, monkeypatch)
    with pytest.raises(Interrupted):
        start_run(_config(), tmp_path)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"epoch": 2}\n{"half a li')
    resume_run(tmp_path, _TRUSTED)
    assert [json.loads(line)["epoch"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_the_second_ctrl_c_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _after_steps(6, lambda: (_ctrl_c(), _ctrl_c()), monkeypatch)
    with pytest.raises(KeyboardInterrupt) as raised:
        start_run(_config(), tmp_path)
    assert not isinstance(raised.value, Interrupted)
    assert load_checkpoint(tmp_path)["position"]["epoch"] == 1  # the epoch that was complete


def test_same_seed_same_run_another_seed_another(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        start_run(_config(seed=seed, epochs=1), tmp_path / name)
    a, b, c = (load_checkpoint(tmp_path / name)["model"] for name in "abc")
    assert same(a, b) and not same(a, c)


def test_a_run_learns_and_tells_what_it_kept(tmp_path: Path) -> None:
    config = _config(
        model="vgg_small", model_args={"stem": 16, "widths": [32], "depth": 1}, exclude=["classifier"], train_limit=320, test_limit=100,
        augment=False, epochs=6, lr=0.1, timing_rounds=2,
    )  # fmt: skip
    result = start_run(config, tmp_path)
    assert result["training"]["best_accuracy"] > 0.5
    assert result["training"]["best_accuracy"] >= result["training"]["last_accuracy"]
    masks = MaskSet.load(tmp_path / "masks.safetensors")
    layers = result["pruning"]["layers"]
    assert {layer["name"]: layer["kept"] for layer in layers} == {name: int(mask.sum()) for name, mask in masks.items()}
    assert result["pruning"]["weight_sparsity"] == pytest.approx(0.7, abs=1e-3)
    assert {layer["runs"] for layer in layers} <= {"sparse", "masked", "dense"}
    assert set(result["timing"]["arms"]) == {"dense nchw", "dense channels_last", "sparse"}
    sparse = sum(result["memory"]["sparse"].values()) - result["memory"]["sparse"]["indices"]
    assert sparse < sum(result["memory"]["dense"].values()) and result["memory"]["sparse"]["indices"] > 0
    assert json.loads((tmp_path / "result.json").read_text()) == result


@pytest.mark.skipif(not _extension.status().loaded, reason="without compiled kernels nothing is measured")
def test_layers_are_measured_at_the_batch_of_the_run_and_a_resumed_run_keeps_what_was_decided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def sparse_is_faster(layer, mask, given, block_size=None):
        seen.append(given)
        return Times(2e-3, 2e-3, 1e-3)

    monkeypatch.setattr(measure, "measure_layer", sparse_is_faster)
    _after_steps(6, _ctrl_c, monkeypatch)
    with pytest.raises(Interrupted):
        start_run(_config(plan="auto", sparsity=0.3), tmp_path)
    assert {given.shape[0] for given in seen} == {16}
    monkeypatch.setattr(measure, "measure_layer", lambda *_: pytest.fail("a resumed run measured"))
    result = resume_run(tmp_path, _TRUSTED)
    assert {layer["runs"] for layer in result["pruning"]["layers"]} == {"sparse"}
    assert any(name.endswith(".values") for name in load_checkpoint(tmp_path)["model"])


@pytest.mark.parametrize("layout", ["channels_last", "chwn"])
def test_the_layout_of_images_changes_nothing_but_rounding(tmp_path: Path, layout: str) -> None:
    net = {"model": "vgg_small", "model_args": {"stem": 8, "widths": [16], "depth": 1}}  # no dropout, which draws in order of memory
    for name in ("nchw", layout):
        start_run(_config(epochs=1, memory_format=name, **net), tmp_path / name)
    expected, other = (_history(load_checkpoint(tmp_path / name))[0] for name in ("nchw", layout))
    assert other == pytest.approx(expected, rel=1e-3)


def test_given_masks_are_used_and_scoring_is_skipped(tmp_path: Path) -> None:
    start_run(_config(epochs=1), tmp_path / "first")
    path = tmp_path / "first" / "masks.safetensors"
    result = start_run(_config(epochs=1, masks=str(path), criterion="never looked at"), tmp_path / "second")
    assert same(load_checkpoint(tmp_path / "first")["model"], load_checkpoint(tmp_path / "second")["model"])
    assert result["pruning"]["weight_sparsity"] == pytest.approx(0.7, abs=1e-3)
    with pytest.raises(ValueError, match="Expected masks named like parameters"):
        start_run(_config(masks=str(path), model="resnet32"), tmp_path / "third")


def test_a_time_limit_ends_training_at_rate_zero(tmp_path: Path) -> None:
    result = start_run(_config(epochs=10_000, max_seconds=0.5), tmp_path)
    assert result["training"]["epochs"] < 10_000
    assert 0.5 <= result["training"]["seconds"] < 2
    assert load_checkpoint(tmp_path)["position"]["history"][-1]["lr"] < 0.01


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _after_steps(6, lambda: (torch.tensor(float("nan")), torch.zeros(16, 10)), monkeypatch)
    with pytest.raises(DivergedError, match=r"the loss is nan at step 2 of epoch 2 .*lower --lr"):
        start_run(_config(), tmp_path)
    assert load_checkpoint(tmp_path)["position"]["epoch"] == 1


def test_a_run_is_not_overwritten_by_accident(tmp_path: Path) -> None:
    start_run(_config(epochs=1), tmp_path)
    with pytest.raises(UserError, match="--resume .*--overwrite"):
        start_run(_config(epochs=1), tmp_path)
    start_run(_config(epochs=1), tmp_path, overwrite=True)


@pytest.mark.parametrize(
    "changes",
    [{"model": "no_such_model"}, {"train_limit": 10**9}, {"masks": "no-such-file"}, {"criterion_args": {"temperature": 0.0}},
     {"batch_size": 65}, {"exclude": ["no_such_layer*"]}],
    ids=lambda changes: next(iter(changes)),
)  # fmt: skip
def test_overwrite_deletes_nothing_for_a_run_that_cannot_start(tmp_path: Path, changes: dict) -> None:
    start_run(_config(epochs=1), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises((UserError, ValueError)):
        start_run(_config(**changes), tmp_path, overwrite=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_overwrite_leaves_nothing_of_the_old_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start_run(_config(epochs=1), tmp_path)
    for name in ("report.html", "my-notes.txt"):
        (tmp_path / name).write_text("old")
    _after_steps(1, _ctrl_c, monkeypatch)
    with pytest.raises(Interrupted):
        start_run(_config(dense=True), tmp_path, overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint_name(0, 1), ".lock", "log.jsonl", "my-notes.txt"}
    assert (tmp_path / "log.jsonl").read_text() == ""


def test_a_second_ctrl_c_says_what_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _after_steps(6, lambda: (_ctrl_c(), _ctrl_c()), monkeypatch)
    with pytest.raises(KeyboardInterrupt, match="the last checkpoint stands, go on with: .*--resume"):
        start_run(_config(), tmp_path)


@pytest.mark.parametrize(("before", "said"), [(True, "the last checkpoint stands"), (False, "saved")], ids=["before it", "after it"])
def test_a_second_ctrl_c_around_the_last_save_says_what_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bool, said: str
) -> None:
    def save(run_dir: Path, state: dict, keep: int) -> None:
        last = state["position"]["finished"]
        if last and before:
            _ctrl_c(), _ctrl_c()
        save_checkpoint(run_dir, state, keep)
        if last:
            _ctrl_c(), _ctrl_c()

    monkeypatch.setattr(engine, "save_checkpoint", save)
    with pytest.raises(KeyboardInterrupt, match=f"interrupted; {said}, go on with: .*--resume") as stop:
        start_run(_config(epochs=2), tmp_path)
    assert load_checkpoint(tmp_path)["position"]["finished"] == isinstance(stop.value, Interrupted) == (not before)


@pytest.mark.parametrize(
    ("given", "kept"),
    [({"temperature": 150}, {"temperature": 150.0}), ({"dtype": "float64"}, {"dtype": "torch.float64"}),
     ({"micro_batch_size": 8, "train": False}, {"micro_batch_size": 8, "train": False}), ({"preset": "paper"}, {"preset": "paper"})],
    ids=str,
)  # fmt: skip
def test_options_of_the_criterion_reach_it(tmp_path: Path, given: dict, kept: dict) -> None:
    start_run(_config(epochs=1, criterion_args=given), tmp_path)
    assert kept.items() <= MaskSet.load(tmp_path / "masks.safetensors").recipe.items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "vgg11", "data": "fake"}, "cannot take fake images of shape"),
        ({"model": "torch.nn:Identity"}, r"Expected model torch.nn:Identity to give logits of shape \(1, 10\)"),
        ({"batch_size": 65}, "at least one batch of 65 training images, got 64; lower --batch-size"),
        ({"model": f"{__name__}:with_aux", "dense": True}, "Expected the model to return logits in training, got tuple"),
        ({"model": "vit_b_16"}, r"cannot take fake images of shape \(3, 8, 8\): Wrong image height"),
        ({"device": "no-such-device"}, "Expected --device to be one this machine has"),
        ({"criterion": "grsp"}, "Expected criterion"),
        ({"exclude": ["no_such_layer*"]}, "no_such_layer"),
    ],
)
def test_a_choice_that_cannot_work_is_refused_before_training(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        start_run(_config(**changes), tmp_path)
    assert not has_run(tmp_path)
