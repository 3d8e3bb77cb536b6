"""Checkpoints: whole or not there, damage is noticed and passed over, nothing in one is believed unchecked."""

from __future__ import annotations

import errno
import io
import os
import pickle
import resource
import stat
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from grasp_sparse import files
from grasp_sparse.train import checkpoint
from grasp_sparse.train.checkpoint import FORMAT, load_checkpoint, save_checkpoint
from grasp_sparse.train.checkpoint_files import best_checkpoint, checkpoint_name, drop_old_checkpoints, list_checkpoints
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.streams import rng_state

_STATE = {
    "recipe": {}, "config": {"name": "x"}, "model": {"w": torch.arange(1000.0)}, "optimizer": {}, "scaler": None, "ema": None,
    "rng": [rng_state()], "position": {"epoch": 3, "step": 0, "history": []}, "pruning": None, "masks_digest": None,
    "environment": {}, "data": {},
}  # fmt: skip


def _at(epoch: int, step: int = 0, accuracies: tuple[float, ...] = ()) -> dict:
    history = [{"epoch": number, "test_accuracy": accuracy} for number, accuracy in enumerate(accuracies, 1)]
    return {**_STATE, "position": {"epoch": epoch, "step": step, "history": history}}


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, _STATE)
    loaded = load_checkpoint(tmp_path)
    assert loaded["position"] == _STATE["position"] and torch.equal(loaded["model"]["w"], torch.arange(1000.0))
    assert _names(tmp_path) == [path.name] == [checkpoint_name(3, 0)]
    assert loaded["corrupt_files"] == []  # none are told of in a checkpoint of an older version


def test_a_checkpoint_is_an_ordinary_torch_file(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, _STATE)
    assert torch.equal(torch.load(path, weights_only=True)["model"]["w"], torch.arange(1000.0))


def test_the_newest_is_by_position_not_by_the_order_of_names(tmp_path: Path) -> None:
    for epoch, step in ((2, 0), (10, 0), (1000, 0), (999, 1_000_001), (999, 7)):
        save_checkpoint(tmp_path, _at(epoch, step), keep=9)
    positions = [(1000, 0), (999, 1_000_001), (999, 7), (10, 0), (2, 0)]
    assert [path.name for path in list_checkpoints(tmp_path)] == [checkpoint_name(*position) for position in positions]
    assert load_checkpoint(tmp_path)["position"]["epoch"] == 1000


def test_the_last_few_and_the_best_are_kept(tmp_path: Path) -> None:
    accuracies = (0.2, 0.9, 0.5, 0.9, 0.4, 0.3)
    for epoch in range(1, 7):
        save_checkpoint(tmp_path, _at(epoch, 0, accuracies[:epoch]), keep=2)
    save_checkpoint(tmp_path, _at(6, 20, accuracies), keep=2)
    assert _names(tmp_path) == [checkpoint_name(2, 0), checkpoint_name(6, 0), checkpoint_name(6, 20)]


def test_a_tensor_that_repeats_memory_is_written_out(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {**_STATE, "model": {"w": torch.ones(1).expand(5), "m": torch.arange(6.0).view(2, 3)[:, ::2]}})
    model = load_checkpoint(tmp_path)["model"]
    assert torch.equal(model["w"], torch.ones(5)) and torch.equal(model["m"], torch.tensor([[0.0, 2], [3, 5]]))


def _is_folder(descriptor: int) -> bool:
    return stat.S_ISDIR(os.fstat(descriptor).st_mode)


def test_bytes_are_on_the_disk_before_they_have_the_name_and_the_name_before_it_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order, replace, path = [], os.replace, tmp_path / "file"

    def synced(descriptor: int) -> None:
        order.append("fsync folder" if _is_folder(descriptor) else f"fsync {os.fstat(descriptor).st_size} bytes")

    monkeypatch.setattr(files.os, "fsync", synced)
    monkeypatch.setattr(files.os, "replace", lambda *names: (order.append("replace"), replace(*names)))
    files.write_atomically(path, lambda file: (file.write(b"12345"), order.append("write")))
    assert order == ["write", "fsync 5 bytes", "replace", "fsync folder"]
    assert path.read_bytes() == b"12345"


def _refusing(folders: bool, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that does not fsync folders, or files."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if _is_folder(descriptor) == folders:
            raise OSError(number, os.strerror(number))
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP], ids=errno.errorcode.get)
def test_a_file_system_that_cannot_sync_folders_still_takes_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    descriptors = len(os.listdir("/proc/self/fd"))
    _refusing(True, number, monkeypatch)
    save_checkpoint(tmp_path, _STATE)
    assert _names(tmp_path) == [checkpoint_name(3, 0)] and load_checkpoint(tmp_path)["position"]["epoch"] == 3
    assert len(os.listdir("/proc/self/fd")) == descriptors


@pytest.mark.parametrize(("folders", "number"), [(True, errno.EIO), (False, errno.EINVAL), (False, errno.EIO)])
def test_another_sync_that_fails_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: bool, number: int) -> None:
    _refusing(folders, number, monkeypatch)
    with pytest.raises(OSError, match=os.strerror(number)):
        save_checkpoint(tmp_path, _STATE)
    assert len(_names(tmp_path)) == folders  # nothing that may not be on the disk has the name of a checkpoint


class _FullDisk:
    """Behaves like open(…, "wb") until `room` bytes are written."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, path: Path, mode: str):
        disk = self

        class Limited(io.FileIO):
            def write(self, data) -> int:
                written = super().write(memoryview(data)[: disk.room])
                disk.room -= written
                if written < len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return written

        return Limited(path, mode)


@pytest.mark.parametrize("room", [0, 1, 1000, "all but the seal"])
def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int | str
) -> None:
    size = save_checkpoint(tmp_path, _at(3)).stat().st_size
    monkeypatch.setattr(files, "open", _FullDisk(size - 10 if isinstance(room, str) else room), raising=False)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, _at(4), keep=1)
    assert _names(tmp_path) == [checkpoint_name(3, 0)]
    assert load_checkpoint(tmp_path)["position"]["epoch"] == 3


def test_a_limit_on_file_sizes_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    """The operating system's own refusal, in a process of its own: the limit cannot be taken back by everyone."""
    size = save_checkpoint(tmp_path, _at(3)).stat().st_size
    child = os.fork()
    if child == 0:  # only os._exit: pytest must not go on twice
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, resource.RLIM_INFINITY))
            save_checkpoint(tmp_path, _at(4))
            os._exit(1)
        except OSError as error:
            os._exit(0 if error.errno == errno.EFBIG else 2)
        finally:
            os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert _names(tmp_path) == [checkpoint_name(3, 0)]
    assert load_checkpoint(tmp_path)["position"]["epoch"] == 3


def test_every_single_bit_is_watched(tmp_path: Path) -> None:
    """Flips across the whole file, its seal too: torch.load alone reads changed weights without a word."""
    path = save_checkpoint(tmp_path, {**_STATE, "model": {"w": torch.arange(40.0)}})
    good = path.read_bytes()
    for place in [*range(0, len(good), 37), *range(len(good) - 60, len(good))]:
        path.write_bytes(good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :])
        with pytest.raises(UserError, match=f"cannot read any checkpoint .*{path.name}"):
            load_checkpoint(tmp_path)
    path.write_bytes(good)
    load_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_damage_falls_back_to_the_one_before_and_says_so(tmp_path: Path, damage: str) -> None:
    save_checkpoint(tmp_path, _at(3))
    path = save_checkpoint(tmp_path, _at(3, 17))
    good = path.read_bytes()
    flipped = good[:900] + bytes([good[900] ^ 16]) + good[901:]
    path.write_bytes({"truncated": good[:-1], "flipped": flipped, "empty": b""}[damage])
    with pytest.warns(UserWarning, match=f"going back to {checkpoint_name(3, 0)} .{checkpoint_name(3, 17)}: ") as said:
        assert load_checkpoint(tmp_path)["position"]["step"] == 0
    assert len(said) == 1 and "\n" not in str(said[0].message)


def test_a_disk_that_does_not_answer_says_nothing_about_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, _at(3))
    newest, read = save_checkpoint(tmp_path, _at(4)), Path.read_bytes

    def failing(path: Path) -> bytes:
        if path == newest:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", failing)
    with pytest.raises(UserError, match=f"cannot read checkpoint .*{newest.name} .Input/output error.*; try again") as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path)["position"]["epoch"] == 4


def test_where_none_is_good_each_is_named_in_one_line(tmp_path: Path) -> None:
    paths = [save_checkpoint(tmp_path, _at(epoch)) for epoch in (3, 4)]
    for path in paths:
        path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=f"{checkpoint_name(4, 0)}.*{checkpoint_name(3, 0)}.*start a new run") as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_a_run_of_an_older_version_is_named(tmp_path: Path) -> None:
    torch.save({**_STATE, "format": 1}, tmp_path / "checkpoint.pt")
    with pytest.raises(UserError, match="Expected checkpoints named .* got checkpoint.pt of an older version"):
        load_checkpoint(tmp_path)


def _sealed(path: Path, state: object, **how: object) -> None:
    """What somebody writes on purpose: the seal is right, the contents are theirs."""
    buffer = io.BytesIO()
    torch.save(state, buffer, **how)
    files.write_sealed(path, buffer.getbuffer())


@pytest.mark.parametrize("damage", ["missing", "unsealed", "text", "foreign", "wrong format", "old pickle"])
def test_what_is_no_checkpoint_is_named_in_one_line(tmp_path: Path, damage: str) -> None:
    path = save_checkpoint(tmp_path, _STATE)
    if damage == "missing":
        path.unlink()
    elif damage == "unsealed":
        torch.save({**_STATE, "format": FORMAT}, path)
    elif damage == "text":
        files.write_sealed(path, b"not a checkpoint")
    else:
        state = {"foreign": {"weights": torch.zeros(3)}, "wrong format": {**_STATE, "format": 99}}.get(damage, {**_STATE, "format": FORMAT})
        _sealed(path, state, _use_new_zipfile_serialization=damage != "old pickle")
    with pytest.raises(UserError, match="checkpoint") as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


_SCALER = {"scale": 1.0, "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 2, "_growth_tracker": 0}
_RNG = {**rng_state(), "cuda": None}
_LAYER = {"name": "w", "shape": [2], "kept": 1, "total": 2, "density": 0.5, "flops_kept": 1, "flops_total": 2, "runs": "sparse"}
_PRUNING = {"weight_sparsity": 0.5, "flop_sparsity": 0.5, "layers": [_LAYER], "skipped": [["a", "b"]]}


def _nested(depth: int) -> list:
    return [_nested(depth - 1)] if depth else []


def _twister(name: str, place: int, word: int, gauss: object = None) -> list:
    """Random streams of which one holds that word at that place; the last place says where the next number lies."""
    words = _RNG["python"]["words"].clone()
    words[place] = word
    return [{**_RNG, name: {"words": words, "gauss": gauss}}]


def _rng_with(left: int, following: int) -> list:
    """A Mersenne Twister that would read its next numbers from behind its 624 words."""
    state = torch.get_rng_state()
    struct.pack_into("=iiQ", state.numpy(), 8, left, 1, following)
    return [{**_RNG, "torch": state}]


@pytest.mark.parametrize(
    ("section", "value"),
    [("config", [1]), ("config", {1: 2}), ("model", None), ("model", {3: torch.zeros(1)}), ("optimizer", 1), ("rng", {}), ("rng", []),
     ("rng", [{}]), ("rng", [{**_RNG, "torch": torch.zeros(3)}]), ("rng", [{**_RNG, "cuda": 5}]), ("rng", [_RNG, None]),
     ("rng", [{**_RNG, "torch": torch.zeros(5056, dtype=torch.uint8)}]), ("rng", _rng_with(624, 624)), ("rng", _rng_with(2, 624)),
     ("rng", _rng_with(1, 10**9)), ("rng", _rng_with(-1, 626)),
     ("rng", [{name: _RNG[name] for name in ("torch", "cuda")}]), ("rng", [{**_RNG, "python": None}]), ("rng", [{**_RNG, "numpy": {}}]),
     ("rng", _twister("python", -1, 625)), ("rng", _twister("numpy", -1, 10**9)), ("rng", _twister("numpy", -1, -1)),
     ("rng", _twister("numpy", 3, 2**32)), ("rng", _twister("python", 3, -1)), ("rng", _twister("numpy", 3, 1, "x")),
     ("rng", _twister("numpy", 3, 1, float("nan"))), ("rng", [{**_RNG, "numpy": {"words": torch.zeros(625), "gauss": None}}]),
     ("position", []), ("pruning", 3), ("pruning", {"layers": 3}),
     ("pruning", {**_PRUNING, "layers": [{**_LAYER, "kept": "1"}]}), ("pruning", {**_PRUNING, "layers": [3]}),
     ("pruning", {**_PRUNING, "skipped": [["a"]]}), ("pruning", {**_PRUNING, "weight_sparsity": float("nan")}),
     ("masks_digest", 3), ("environment", None), ("scaler", {}), ("scaler", {**_SCALER, "scale": float("inf")}), ("ema", []),
     ("corrupt_files", {}), ("corrupt_files", ["train/a/1.png", 2])],
)  # fmt: skip
def test_a_section_of_another_type_is_named(tmp_path: Path, section: str, value: object) -> None:
    _sealed(tmp_path / checkpoint_name(3, 0), {**_STATE, "format": FORMAT, "pruning": _PRUNING, section: value})
    with pytest.raises(UserError, match=f"Expected .*{section}.*start a new run") as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_random_states_that_occur_are_taken(tmp_path: Path) -> None:
    for draws in (0, 1, 2, 623, 624, 625, 1248):
        torch.manual_seed(draws)
        for _ in range(draws):
            torch.randint(10, ())
        save_checkpoint(tmp_path, {**_STATE, "pruning": _PRUNING, "rng": [rng_state()]})
        load_checkpoint(tmp_path)


def _loop() -> list:
    loop: list = []
    loop.append(loop)
    return loop


@pytest.mark.parametrize(
    "value",
    [torch.zeros(1).expand(10**12), torch.zeros(3, 4).t()[:2], torch.zeros(2).to_sparse(), torch.zeros(3, device="meta"),
     torch.zeros(2, requires_grad=True), torch._neg_view(torch.zeros(2)),
     torch.quantize_per_tensor(torch.zeros(2), 1.0, 0, torch.qint8), torch.tensor([0, 7], dtype=torch.uint8).view(torch.bool),
     _loop(), _nested(100), 1 << 70, 1j, torch.float32],
    ids=["expanded", "gaps", "sparse", "meta", "requires grad", "negated", "quantized", "bool of 7", "a loop", "deep", "large int", "complex", "dtype"],
)  # fmt: skip
def test_values_that_are_more_than_they_seem_are_refused(tmp_path: Path, value: object) -> None:
    _sealed(tmp_path / checkpoint_name(3, 0), {**_STATE, "format": FORMAT, "environment": {"x": value}})
    message = "every (value|tensor) in|at most 32 containers|cannot read checkpoint .*(unsupported|Unsupported)"
    with pytest.raises(UserError, match=message) as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


def test_containers_that_hold_one_another_many_times_over_are_refused(tmp_path: Path) -> None:
    """Six lists, each ten times in the next, are a million values; twenty, a few bytes more, would be what nobody can walk through."""
    value: list = [1]
    for _ in range(6):
        value = [value] * 10
    _sealed(tmp_path / checkpoint_name(3, 0), {**_STATE, "format": FORMAT, "environment": {"x": value}})
    with pytest.raises(UserError, match="to be a checkpoint of at most [0-9,]+ values, one a byte"):
        load_checkpoint(tmp_path)
    _sealed(tmp_path / checkpoint_name(3, 0), {**_STATE, "format": value})
    with pytest.raises(UserError, match="to be a grasp_sparse checkpoint of format 3, got none, in a dict"):
        load_checkpoint(tmp_path)


def test_a_tensor_in_many_places_is_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor, looks = torch.zeros(1000, dtype=torch.bool), []
    _sealed(tmp_path / checkpoint_name(3, 0), {**_STATE, "format": FORMAT, "environment": {"x": [tensor] * 200}})
    ordinary = checkpoint._is_ordinary
    monkeypatch.setattr(checkpoint, "_is_ordinary", lambda value: looks.append(id(value)) or ordinary(value))
    load_checkpoint(tmp_path)
    assert 1 < len(looks) == len(set(looks)) < 200


def test_the_best_checkpoint_is_the_best_of_those_that_are_there(tmp_path: Path) -> None:
    history = [{"epoch": epoch, "test_accuracy": accuracy} for epoch, accuracy in ((1, 0.3), (2, 0.9), (3, 0.5), (4, 0.4))]
    assert best_checkpoint(tmp_path, history) is None
    for epoch in (1, 3, 4):  # the save of the second epoch found no room
        (tmp_path / checkpoint_name(epoch, 0)).touch()
    (tmp_path / checkpoint_name(2, 5)).touch()
    best = best_checkpoint(tmp_path, history)
    assert best == tmp_path / checkpoint_name(3, 0)
    drop_old_checkpoints(tmp_path, 1, best)
    assert {path.name for path in tmp_path.iterdir()} == {checkpoint_name(3, 0), checkpoint_name(4, 0)}


def test_an_archive_that_unpacks_to_more_than_it_is_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    torch.save({**_STATE, "format": FORMAT, "environment": {"x": torch.zeros(1 << 20)}}, buffer)
    packed = io.BytesIO()
    with zipfile.ZipFile(buffer) as plain, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as deflated:
        for name in plain.namelist():
            deflated.writestr(name, plain.read(name))
    files.write_sealed(tmp_path / checkpoint_name(3, 0), packed.getbuffer())
    with pytest.raises(UserError, match="Expected the archive .* to be stored as it is"):
        load_checkpoint(tmp_path)


class _Evil:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self):
        return (Path.touch, (self.proof,))


@pytest.mark.parametrize("how", ["inside", "alone", "old pickle"])
def test_code_in_a_checkpoint_is_refused(tmp_path: Path, how: str) -> None:
    proof, path = tmp_path / "was-here", tmp_path / checkpoint_name(3, 0)
    if how == "alone":
        files.write_sealed(path, pickle.dumps(_Evil(proof), protocol=2))
    else:
        _sealed(path, {**_STATE, "model": _Evil(proof), "format": FORMAT}, _use_new_zipfile_serialization=how == "inside")
    with pytest.raises(UserError):
        load_checkpoint(tmp_path)
    assert not proof.exists()
