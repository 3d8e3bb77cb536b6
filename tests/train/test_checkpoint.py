"""Checkpoints: whole or not there, no code run from them, damage is named."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

from grasp_sparse.files import write_atomically
from grasp_sparse.train.checkpoint import FILE_NAME, load_checkpoint, save_checkpoint
from grasp_sparse.train.errors import UserError

_STATE = {
    "config": {"name": "x"}, "model": {"w": torch.arange(1000.0)}, "optimizer": {}, "rng": {"torch": torch.get_rng_state(), "cuda": []}, "position": {"epoch": 3},
    "pruning": None, "environment": {},
}  # fmt: skip


def test_round_trip(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, _STATE)
    loaded = load_checkpoint(tmp_path)
    assert loaded["position"] == {"epoch": 3} and torch.equal(loaded["model"]["w"], torch.arange(1000.0))
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, _STATE)

    def disk_full(file) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomically(tmp_path / FILE_NAME, disk_full)
    assert load_checkpoint(tmp_path)["position"] == {"epoch": 3}
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "foreign", "wrong format"])
def test_damage_is_named_in_one_line(tmp_path: Path, damage: str) -> None:
    path = save_checkpoint(tmp_path, _STATE)
    if damage == "missing":
        path.unlink()
    elif damage == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    elif damage == "wrong format":
        torch.save({**_STATE, "format": 99}, path)
    else:
        path.write_bytes({"empty": b"", "truncated": path.read_bytes()[:700], "text": b"not a checkpoint"}[damage])
    with pytest.raises(UserError, match="checkpoint") as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("section", "value"),
    [("config", [1]), ("config", {1: 2}), ("model", None), ("model", {3: torch.zeros(1)}), ("optimizer", 1), ("rng", {}),
     ("rng", {"torch": torch.zeros(3), "cuda": []}), ("rng", {"torch": torch.get_rng_state(), "cuda": 5}), ("position", []),
     ("pruning", 3), ("pruning", {"layers": 3}), ("environment", None)],
)  # fmt: skip
def test_a_section_of_another_type_is_named(tmp_path: Path, section: str, value: object) -> None:
    save_checkpoint(tmp_path, {**_STATE, section: value})
    with pytest.raises(UserError, match=f"Expected .*{section}.*start a new run") as error:
        load_checkpoint(tmp_path)
    assert "\n" not in str(error.value)


class _Evil:
    def __reduce__(self):
        return (Path.touch, (Path("/tmp/grasp_sparse_was_here"),))


def test_code_in_a_checkpoint_is_refused(tmp_path: Path) -> None:
    torch.save({**_STATE, "model": _Evil(), "format": 1}, tmp_path / FILE_NAME)
    with pytest.raises(UserError):
        load_checkpoint(tmp_path)
    (tmp_path / FILE_NAME).write_bytes(pickle.dumps(_Evil(), protocol=2))
    with pytest.raises(UserError):
        load_checkpoint(tmp_path)
    assert not Path("/tmp/grasp_sparse_was_here").exists()
