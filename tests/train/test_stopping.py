"""Ways in which a run stops and goes on: signals, the clock, a full disk, the same command again."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import several_ranks
import torch
from several_ranks import small_config

from benchmarks.run_states import same
from grasp_sparse import cli
from grasp_sparse.files import locked_folder
from grasp_sparse.train import distributed, engine, evaluation, prepare, run, signals
from grasp_sparse.train.agreement import Requests
from grasp_sparse.train.checkpoint import load_checkpoint
from grasp_sparse.train.checkpoint_files import checkpoint_name, list_checkpoints
from grasp_sparse.train.engine import Trainer
from grasp_sparse.train.errors import DivergedError, UserError
from grasp_sparse.train.logging import EpochLog
from grasp_sparse.train.run import continue_or_start_run, resume_run, start_run
from grasp_sparse.train.signals import Interrupted, Preempted, deferred_stop, preemption_raises

_NET = {"model": "several_ranks:noisy_net"}


def _config(**changes: object):
    return small_config(**{"train_limit": 64, "batch_size": 16, "epochs": 3, **_NET, **changes})


def _same_end(a: Path, b: Path) -> bool:
    first, second = load_checkpoint(a), load_checkpoint(b)
    return all(same(first[part], second[part]) for part in ("model", "optimizer", "rng", "pruning", "masks_digest"))


def _at_call(count: int, action: Callable[[], object], owner: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Do `action` at the end of call number `count` of a function."""
    real, done = getattr(owner, name), []

    def counted(*arguments, **others):
        result = real(*arguments, **others)
        done.append(None)
        if len(done) == count:
            action()
        return result

    monkeypatch.setattr(owner, name, counted)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    start_run(_config(), folder)
    return folder


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
@pytest.mark.parametrize("steps", [2, 4, 12], ids=["inside an epoch", "between epochs", "after the last step"])
def test_a_schedulers_signal_ends_the_step_and_saves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, number: signal.Signals, steps: int
) -> None:
    with monkeypatch.context() as patch:
        _at_call(steps, lambda: (signal.raise_signal(number), signal.raise_signal(number)), engine, "training_step", patch)
        message = "stopped by a signal; saved, go on with: .*--resume .* --model several_ranks:noisy_net"
        with pytest.raises(Preempted, match=message) as stop:
            start_run(_config(), tmp_path)
    assert stop.value.saved
    position = load_checkpoint(tmp_path)["position"]
    assert position["epoch"] * 4 + position["step"] == steps
    resume_run(tmp_path, _NET)
    assert _same_end(tmp_path, whole)


def test_a_signal_during_evaluation_does_not_wait_for_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    """Evaluating ImageNet takes minutes. The epoch stays open and is evaluated when the run goes on."""
    looked = []
    batches = evaluation.evaluation_batches

    def watched(*arguments):
        for batch in batches(*arguments):
            looked.append(None)
            if len(looked) == 1:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluation_batches", watched)
        with pytest.raises(Preempted):
            start_run(_config(test_limit=100), tmp_path / "parts")
    assert len(looked) <= 2
    assert [path.name for path in list_checkpoints(tmp_path / "parts")] == [checkpoint_name(0, 4)]
    resume_run(tmp_path / "parts", _NET)
    start_run(_config(test_limit=100), tmp_path / "whole")
    assert _same_end(tmp_path / "parts", tmp_path / "whole")


def test_checkpoints_by_the_clock_are_within_an_epoch_and_go_on_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    """kill -9 after step 7: what is lost is what came after the last checkpoint, not the epoch."""

    class Killed(BaseException):
        pass

    def kill() -> None:
        raise Killed

    with monkeypatch.context() as patch:
        _at_call(8, kill, engine, "training_step", patch)
        with pytest.raises(Killed):
            start_run(_config(checkpoint_minutes=0.0), tmp_path)
    assert list_checkpoints(tmp_path)[0].name == checkpoint_name(1, 3)
    resume_run(tmp_path, {**_NET, "checkpoint_minutes": 10.0})
    assert _same_end(tmp_path, whole)
    assert load_checkpoint(tmp_path)["config"]["checkpoint_minutes"] == 10.0


def test_the_clock_counts_from_the_last_save() -> None:
    requests = Requests([], save_seconds=0.05)
    assert requests.mine() == (False, False, False)
    time.sleep(0.06)
    assert requests.mine()[0]
    requests.saved()
    assert not requests.mine()[0]
    assert not Requests([], save_seconds=600).mine()[0]


def _full(monkeypatch: pytest.MonkeyPatch, full: Callable[[int], bool]) -> list[int]:
    """A disk on which the saves of those numbers find no room."""
    real, saves = engine.save_checkpoint, []

    def save(*arguments):
        saves.append(len(saves) + 1)
        if full(saves[-1]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(engine, "save_checkpoint", save)
    return saves


def test_a_full_disk_is_a_warning_and_the_next_save_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path) -> None:
    saves = _full(monkeypatch, lambda number: number == 2)
    with pytest.warns(UserWarning, match="cannot write the checkpoint of epoch 3, step 0 .*No space.*training goes on") as said:
        start_run(_config(), tmp_path)
    assert len(said) == 1 and saves == [1, 2, 3]
    assert _same_end(tmp_path, whole)


def test_a_disk_that_is_full_at_the_end_is_an_error_and_what_was_saved_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    with monkeypatch.context() as patch:
        _full(patch, lambda number: number >= 2)
        message = "cannot write the checkpoint .*No space.* make room, .*--resume"
        with pytest.warns(UserWarning), pytest.raises(UserError, match=message):
            start_run(_config(), tmp_path)
    assert list_checkpoints(tmp_path)[0].name == checkpoint_name(1, 0)
    resume_run(tmp_path, _NET)
    assert _same_end(tmp_path, whole)


def test_a_log_that_cannot_be_written_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(EpochLog, "append", full)
    with pytest.warns(UserWarning, match="cannot write epoch 1 to"):
        start_run(_config(epochs=1), tmp_path)
    monkeypatch.undo()
    resume_run(tmp_path, _NET)
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_damaged_checkpoints_are_put_aside_and_the_run_ends_as_if_they_had_not_been(tmp_path: Path, whole: Path) -> None:
    start_run(_config(epochs=3, keep_checkpoints=3), tmp_path)
    newest, second, _ = list_checkpoints(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-100])
    second.write_bytes(b"")
    with pytest.warns(UserWarning, match=f"going back to {checkpoint_name(1, 0)}"):
        resume_run(tmp_path, _NET)
    assert _same_end(tmp_path, whole)
    assert {path.name for path in tmp_path.glob("*.damaged")} == {f"{newest.name}.damaged", f"{second.name}.damaged"}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_checkpoint(tmp_path)


def test_a_checkpoint_that_a_network_disk_does_not_give_is_not_put_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    start_run(_config(keep_checkpoints=3), tmp_path)
    before = sorted(path.name for path in tmp_path.iterdir())

    def stale(path: Path) -> bytes:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", stale)
        with pytest.raises(UserError, match="cannot read checkpoint .*Stale file handle"):
            resume_run(tmp_path, _NET)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    resume_run(tmp_path, _NET)
    assert _same_end(tmp_path, whole)


def test_auto_starts_goes_on_and_ends_by_one_and_the_same_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    given = {**_NET, "epochs": 3}
    for _ in range(2):
        with monkeypatch.context() as patch:
            _at_call(5, lambda: signal.raise_signal(signal.SIGTERM), engine, "training_step", patch)
            with pytest.raises(Preempted):
                continue_or_start_run(_config(), given, tmp_path)
    result = continue_or_start_run(_config(), given, tmp_path)
    assert _same_end(tmp_path, whole)
    monkeypatch.setattr(engine, "training_step", lambda *_: pytest.fail("the run was complete"))
    again = continue_or_start_run(_config(), given, tmp_path)
    assert {**again, "training": 0} == {**result, "training": 0}


@pytest.mark.parametrize(
    ("given", "message"),
    [({"lr": 0.5}, "--lr 0.5 .the run: 0.05."), ({"epochs": 9, "seed": 3}, "--epochs 9 .the run: 3., --seed 3 .the run: 0."),
     ({"model": "resnet18"}, "--model resnet18 .the run: several_ranks:noisy_net.")],
    ids=str,
)  # fmt: skip
def test_a_flag_that_contradicts_the_run_is_refused(whole: Path, given: dict, message: str) -> None:
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    with pytest.raises(UserError, match=f"Expected the recipe of the run in .*, got another {message}; leave it out"):
        continue_or_start_run(_config(), {**_NET, **given}, whole)
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path, whole: Path) -> None:
    program = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(whole / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        holder.stdout.readline()
        with pytest.raises(UserError, match="another process is training the run in"):
            resume_run(whole, _NET)
    finally:
        holder.kill()
        holder.wait()
    with locked_folder(whole):  # a killed process holds nothing
        pass


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
    _at_call(5, lambda: trained[0][5].weight.data.fill_(3e38), engine, "training_step", monkeypatch)
    with pytest.raises(DivergedError, match=r"step 2 of epoch 2 .*: first in the output of layer 5 \(\w+\): .* lower --lr"):
        start_run(_config(**changes), tmp_path)
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

    _at_call(6, spoil, engine, "training_step", monkeypatch)
    message = r"Expected finite numbers to save after step 2 of epoch 2 .learning rate 0.\d+., got 1 \w+ of 16 values in .*5\.\w+.*lower --lr"
    with pytest.raises(DivergedError, match=message):
        start_run(_config(ema_decay=0.9, checkpoint_minutes=10.0 if stop else 0.0), tmp_path)
    state = load_checkpoint(tmp_path)
    assert list_checkpoints(tmp_path)[0].name == checkpoint_name(1, 0 if stop else 1) and _finite(state)
    monkeypatch.undo()
    resume_run(tmp_path, _NET)
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
    with pytest.raises(DivergedError, match=f"the {whose} is nan after step 4 of epoch 2 .*: all weights are finite, .*the last checkpoint"):
        start_run(_config(ema_decay=0.9), tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(1, 0)]
    assert [row["epoch"] for row in load_checkpoint(tmp_path)["position"]["history"]] == [1]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 1


def test_a_test_loss_of_spoilt_weights_names_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainers = _trainers(monkeypatch)
    _at_call(4, lambda: trainers[0].model[5].weight.data.fill_(float("nan")), engine, "training_step", monkeypatch)
    with pytest.raises(DivergedError, match="the test loss is nan after step 4 of epoch 1 .*: there are 16 nan of 16 values in 5.weight;"):
        start_run(_config(), tmp_path)
    assert not list_checkpoints(tmp_path)


_SMALL = [
    "--data", "fake", "--image-size", "8", "--train-limit", "64", "--test-limit", "20", "--batch-size", "16", "--sparsity", "0.7",
    "--samples-per-class", "2", "--plan", "density", "--model", "vgg_small", "--model-arg", "widths=[16]", "--model-arg", "depth=1",
    "--timing-rounds", "0", "--threads", "1",
]  # fmt: skip


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_the_command_saves_and_exits_0_within_seconds(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "grasp_sparse", "train", *_SMALL, "--epochs", "100000", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **several_ranks.python_path()}
    )
    try:
        deadline = time.monotonic() + 60
        while not list_checkpoints(tmp_path / "run") and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(number)
        start = time.monotonic()
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, time.monotonic() - start < 5) == (0, True), errors
    expected = f"grasp-sparse: stopped by a signal; saved, go on with: grasp-sparse train --resume {tmp_path / 'run'}"
    assert errors.strip().splitlines()[-1] == expected
    load_checkpoint(tmp_path / "run")


def test_a_signal_before_anything_is_saved_does_not_look_like_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(run, "masks_for", lambda *_: signal.raise_signal(signal.SIGTERM))
    assert cli.main(["train", *_SMALL, "--out", str(tmp_path / "run")]) == 143
    assert "stopped by a signal; nothing was saved" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the command line that a signal ended after its sixth step, of twelve."""
    folder = tmp_path_factory.mktemp("half") / "run"
    with pytest.MonkeyPatch.context() as patch:
        _at_call(6, lambda: signal.raise_signal(signal.SIGTERM), engine, "training_step", patch)
        assert cli.main(["train", *_SMALL, "--epochs", "3", "--out", str(folder)]) == 0
    return folder


_WHILE_RESUMING: dict[str, tuple[object, str]] = {
    "beginning": (distributed, "start_distributed"), "the folder locked": (run, "locked_folder"), "read": (run, "read_checkpoint"),
    "recipe": (run, "resumed_config"), "data": (prepare, "load_data"), "weights": (run, "load_weights"), "the rest": (Trainer, "restore"),
    "said": (run, "say"), "recorder": (engine, "Recorder"), "batches": (engine, "train_batches"),
}  # fmt: skip


@pytest.mark.parametrize("auto", [False, True], ids=["resume DIR", "resume auto"])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGUSR1", "Ctrl-C"])
@pytest.mark.parametrize("where", _WHILE_RESUMING)
def test_a_signal_while_a_run_is_resumed_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, half: Path, where: str, number: int, code: int,
    auto: bool,
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    shutil.copytree(half, folder)
    _at_call(1, lambda: signal.raise_signal(number), *_WHILE_RESUMING[where], monkeypatch)
    command = ["train", *_SMALL, "--epochs", "3", "--resume", "auto", "--out"] if auto else ["train", "--resume"]
    assert cli.main([*command, str(folder)]) == code
    said = capsys.readouterr().err.strip().splitlines()
    stopped = "interrupted" if code else "stopped by a signal"
    assert said == [f"grasp-sparse: {stopped}; saved, go on with: grasp-sparse train --resume {folder}"]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    position = load_checkpoint(folder)["position"]
    assert 4 * position["epoch"] + position["step"] in (6, 7)  # a step, where they had begun


def test_a_signal_before_a_complete_run_is_looked_at_again_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    """It has no step left after which somebody would look."""
    shutil.copytree(whole, tmp_path / "run")
    _at_call(1, lambda: signal.raise_signal(signal.SIGTERM), engine, "Recorder", monkeypatch)
    monkeypatch.setattr(run, "_compare_with_dense", lambda *_: pytest.fail("went on"))
    with pytest.raises(Preempted, match="stopped by a signal; saved, go on with") as stop:
        resume_run(tmp_path / "run", {**_NET, "timing_rounds": 2})
    assert stop.value.saved


def test_a_stop_while_a_run_is_resumed_names_the_model_that_has_to_be_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path
) -> None:
    shutil.copytree(whole, tmp_path / "run")
    _at_call(1, lambda: signal.raise_signal(signal.SIGINT), run, "read_checkpoint", monkeypatch)
    with pytest.raises(Interrupted, match=f"interrupted; saved, go on with: .* --resume {tmp_path}/run --model several_ranks:noisy_net$"):
        resume_run(tmp_path / "run", _NET)


def test_ctrl_c_where_there_is_nothing_to_resume_is_still_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "newest_good_checkpoint", lambda _: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt) as stop:
        resume_run(tmp_path, {})
    assert not isinstance(stop.value, Interrupted)


def test_a_signal_while_handlers_change_leaves_those_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    with preemption_raises():
        outer = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Preempted), pytest.MonkeyPatch.context() as patch:
            _at_call(1, lambda: signal.raise_signal(signal.SIGTERM), signals.signal, "signal", patch)
            with deferred_stop():
                pytest.fail("it was not raised")
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == (before, outer)


def test_a_signal_while_steps_are_timed_ends_a_run_that_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(run, "_compare_with_dense", lambda *_: signal.raise_signal(signal.SIGTERM))
    flags = [*_SMALL, "--epochs", "1", "--timing-rounds", "2", "--out", str(tmp_path / "run")]
    assert cli.main(["train", *flags]) == 0
    assert "stopped by a signal; saved, go on with" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run")["position"]["finished"]
    monkeypatch.undo()
    assert cli.main(["train", "--resume", "auto", *flags]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())["timing"]


def test_the_command_line_refuses_what_contradicts_the_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["train", *_SMALL, "--epochs", "1", "--out", str(tmp_path / "run")]
    assert cli.main([*flags, "--resume", "auto"]) == 0
    assert cli.main([*flags, "--resume", "auto"]) == 0
    assert cli.main([*flags, "--resume", "auto", "--workers", "3"]) == 0  # may change
    capsys.readouterr()
    assert cli.main([*flags, "--resume", "auto", "--lr", "0.7"]) == 2
    assert "got another --lr 0.7 (the run: 0.1); leave it out" in capsys.readouterr().err
    assert cli.main([*flags, "--resume", "auto", "--overwrite"]) == 2
    assert "Expected --resume or --overwrite, got both" in capsys.readouterr().err


def test_ctrl_c_is_still_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _at_call(2, lambda: signal.raise_signal(signal.SIGINT), engine, "training_step", monkeypatch)
    with pytest.raises(Interrupted, match="interrupted; saved"):
        start_run(_config(), tmp_path)
