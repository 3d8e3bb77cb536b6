"""What TensorBoard reads of a run: every step and epoch once, also after a crash; and nothing where it is not wanted."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402
from tensorboard.summary.writer import event_file_writer  # noqa: E402

from grasp_sparse.train import recorder  # noqa: E402
from grasp_sparse.train.config import TrainConfig  # noqa: E402
from grasp_sparse.train.distributed import Ranks  # noqa: E402
from grasp_sparse.train.errors import UserError  # noqa: E402
from grasp_sparse.train.position import Position  # noqa: E402
from grasp_sparse.train.recorder import Recorder, delete_events  # noqa: E402

_CONFIG = TrainConfig(name="demo", epochs=3, tensorboard="on", log_every=2, log_seconds=0.0)
_STEPS = 4  # an epoch


@pytest.fixture(autouse=True)
def a_second_between_two_writers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As between two processes: files are read in the order of their names, which begin with the second."""
    seconds = itertools.count(1_000_000_000)
    monkeypatch.setattr(event_file_writer, "time", SimpleNamespace(time=lambda: next(seconds)))


def _row(epoch: int) -> dict[str, float]:
    names = (
        "train_loss", "test_loss", "train_accuracy", "test_accuracy", "images_per_s", "seconds", "test_seconds", "train_seconds", "lr",
        "corrupt_images",
    )  # fmt: skip
    return {"epoch": epoch, "steps": _STEPS, **dict.fromkeys(names, float(epoch))}


def _train(run_dir: Path, position: Position, until: int) -> None:
    """On from `position` to `until` steps in all, then die as after a kill: nothing of it gets into a checkpoint."""
    with Recorder(_CONFIG, run_dir, position, _STEPS, {"threads": 2}) as written:
        while position.epoch * _STEPS + position.step < until:
            with written.progress():
                while position.step < _STEPS and (done := position.epoch * _STEPS + position.step + 1) <= until:
                    position.step += 1
                    for name, value in (("loss", 64.0 * done), ("images", 64.0), ("seconds", 0.5)):
                        position.sums[name] += value
                    written.step(0.1)
            if position.step == _STEPS:
                row = _row(position.epoch + 1)
                position.epoch, position.step, position.sums = position.epoch + 1, 0, Position().sums
                position.history.append(row)
                written.epoch(row)


def _read(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def _position(epoch: int, step: int) -> Position:
    return Position(epoch=epoch, step=step, history=[_row(n + 1) for n in range(epoch)])


@pytest.mark.parametrize(
    ("died_at", "saved"),
    [(6, (1, 0)), (6, (1, 2)), (8, (1, 0)), (8, (1, 4)), (8, (2, 0)), (9, (2, 0)), (3, (0, 2))],
    ids=["mid-epoch, epoch saved", "mid-epoch, step saved", "epoch written, not saved", "epoch written, its last step saved",
         "between epochs", "after an epoch", "first epoch"],
)  # fmt: skip
def test_a_resumed_run_has_every_step_and_epoch_once(tmp_path: Path, died_at: int, saved: tuple[int, int]) -> None:
    _train(tmp_path, Position(), until=died_at)
    _train(tmp_path, _position(*saved), until=3 * _STEPS)
    read = _read(tmp_path)
    steps = [step for step, _ in read["step/loss"]]
    assert steps == sorted(set(steps)) and {2, 4, 6, 8, 10, 12} - set(steps) <= {saved[0] * _STEPS + saved[1]}
    assert read["step/loss"] == [(step, pytest.approx(step)) for step in steps]
    assert {value for _, value in read["step/images per second"]} == {128.0}
    for tag in ("loss/train", "loss/test", "accuracy/test", "epoch/images_per_s"):
        assert read[tag] == [(4, 1.0), (8, 2.0), (12, 3.0)], tag


def test_the_recipe_is_there_as_text(tmp_path: Path) -> None:
    _train(tmp_path, Position(), until=2)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (shown,) = [events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"] if tag.startswith("recipe")]
    assert "lr: 0.1" in shown and 'name: "demo"' in shown


def test_a_new_run_in_the_folder_starts_empty(tmp_path: Path) -> None:
    _train(tmp_path, Position(), until=8)
    delete_events(tmp_path)
    _train(tmp_path, Position(), until=2)
    assert _read(tmp_path)["step/loss"] == [(2, 2.0)]


@pytest.mark.parametrize("choice", ["auto", "off"])
def test_without_the_package_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    if choice == "auto":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with Recorder(TrainConfig(tensorboard=choice), tmp_path, Position(), _STEPS, {}) as written:
        written.epoch(_row(1))
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_asked_for_and_missing_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="found none; pip install tensorboard"):
        TrainConfig(tensorboard="on").validate()


def test_other_ranks_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(recorder, "current_ranks", lambda: Ranks(1, 2, 1))
    _train(tmp_path, Position(), until=5)
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""
