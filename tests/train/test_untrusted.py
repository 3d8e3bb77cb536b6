"""A checkpoint or a mask file that anybody has changed on purpose, its seal right again: an error in one line, or a run."""

from __future__ import annotations

import copy
import io
import json
import random
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import several_ranks
import torch
from torch import Tensor

from grasp_sparse import files
from grasp_sparse.masks import MaskSet
from grasp_sparse.train import engine
from grasp_sparse.train.checkpoint import load_checkpoint
from grasp_sparse.train.checkpoint_files import checkpoint_name, list_checkpoints
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.run import resume_run, start_run

_TRUSTED = {"model": "several_ranks:noisy_net"}
_KINDS = {
    "single weights": {"max_density": 1.0, "ema_decay": 0.9},
    "blocks": {"pattern": "block(4, 4)", "max_density": 1.0, "optimizer": "adamw"},
    "masked": {"max_density": 0.01, "precision": "fp16"},
}
_VALUES = [
    None, True, -1, 0, 1, 2**31, -(2**31), 2**62, 2**100, 0.5, -1.0, float("nan"), float("inf"), "", "x", "os:system",
    [], {}, [[]], {"a": 1}, (1, 2), torch.zeros(0), torch.zeros(3), torch.tensor(-1), torch.tensor(float("nan")), torch.zeros(1).expand(10**9),
]  # fmt: skip


class _Enough(Exception):
    """The run has gone on for a step: what was loaded works."""


@pytest.fixture(scope="module", params=_KINDS)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a run and its checkpoint, a step before the end of the first of two epochs."""
    folder = tmp_path_factory.mktemp("run")
    config = several_ranks.small_config(
        train_limit=32, test_limit=10, score_batch=20, checkpoint_minutes=0.0, keep_checkpoints=9, **_TRUSTED, **_KINDS[request.param]
    )
    start_run(config, folder)
    return folder, load_checkpoint(_only(folder, checkpoint_name(0, 3)))


def _only(folder: Path, name: str) -> Path:
    for path in list_checkpoints(folder):
        if path.name != name:
            path.unlink()
    return folder


def _places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The way to everything within nested containers."""
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from _places(item, (*path, key))


def _changed_tensor(tensor: Tensor, draw: random.Random) -> Tensor:
    """Of another size, another type, or with an element that should not be there."""
    changed = tensor.clone()
    how = draw.choice(["element", "element", "element", "shorter", "longer", "another type", "another shape", "swapped", "repeated"])
    if how == "element" and changed.numel():
        flat = changed.view(-1)
        values = [0, 1] if changed.dtype is torch.bool else [0, 1, 3, 127]
        if changed.dtype in (torch.int32, torch.int64):
            values += [-1, 2**31 - 1, -(2**31), int(flat.max()) + 1]
        if changed.is_floating_point():
            values += [float("nan"), float("inf"), -1e30]
        flat[draw.randrange(flat.numel())] = draw.choice(values)
    elif how == "shorter" and changed.dim():
        changed = changed[..., :-1].clone()
    elif how == "longer":
        changed = torch.cat([changed.flatten(), changed.flatten()[:1]])
    elif how == "another type":
        changed = changed.to(draw.choice([torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float16]))
    elif how == "another shape":
        changed = changed.reshape(draw.choice([(-1,), (1, -1), (-1, 1, 1)]))
    elif how == "swapped" and changed.numel() > 1:
        changed = changed.flatten().flip(0).reshape(changed.shape).clone()
    elif how == "repeated" and changed.numel() > 1:
        changed.view(-1)[0] = changed.view(-1)[-1]
    return changed


def _mutate(state: dict[str, Any], draw: random.Random) -> None:
    """One to three changes anywhere; indices and other tensors more often than their number."""
    for _ in range(draw.choice([1, 1, 2, 3])):
        places = list(_places(state))
        indices = [place for place in places if str(place[-1]).endswith(("indices", "values", "mask"))]
        place = draw.choice(indices if indices and draw.random() < 0.4 else places)
        holder = state
        for key in place[:-1]:
            holder = holder[key]
        old, key = holder[place[-1]], place[-1]
        action = draw.choice(["change", "change", "change", "replace", "remove", "rename"])
        if action == "change" and isinstance(old, Tensor):
            holder[key] = _changed_tensor(old, draw)
        elif action == "remove":
            del holder[key]
        elif action == "rename" and isinstance(holder, dict):
            holder[draw.choice(["x", 7, f"{key}.x"])] = holder.pop(key)
        else:
            holder[key] = draw.choice(_VALUES)


def _write(path: Path, state: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    files.write_sealed(path, buffer.getbuffer())


def _goes_on(folder: Path) -> str:
    """What becomes of resuming: "runs", or the error in one line."""
    try:
        resume_run(folder, _TRUSTED)
    except _Enough:
        return "runs"
    except UserError as error:
        return str(error)
    return "runs"


def _after_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    step = engine.training_step

    def last(*arguments):
        step(*arguments)
        raise _Enough

    monkeypatch.setattr(engine, "training_step", last)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("chunk", range(5))
def test_a_changed_checkpoint_is_refused_or_runs(
    run: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    source, state = run
    _after_a_step(monkeypatch)
    refused = 0
    for seed in range(40 * chunk, 40 * (chunk + 1)):
        changed = copy.deepcopy(state)
        _mutate(changed, random.Random(seed))
        folder = tmp_path / str(seed)
        folder.mkdir()
        _write(folder / checkpoint_name(0, 3), changed)
        refused += _goes_on(folder) != "runs"
    assert 10 < refused  # or nothing was changed that matters


_WITH_INDICES = pytest.mark.parametrize("run", ["single weights", "blocks"], indirect=True)


@_WITH_INDICES
@pytest.mark.parametrize("name", ["crow_indices", "col_indices"])
@pytest.mark.parametrize("value", [-1, -(2**31), 2**31 - 1, 10_000])
@pytest.mark.parametrize("place", [0, 1, -1])
def test_no_index_leads_out_of_a_layer(run: tuple[Path, dict], tmp_path: Path, name: str, value: int, place: int) -> None:
    """Of every layer, single weights and blocks alike; the whole of what a kernel is given is made from these two."""
    source, state = run
    layers = [key for key in state["model"] if key.endswith(name)]
    assert len(layers) >= 2
    for number, layer in enumerate(layers):
        changed = copy.deepcopy(state)
        changed["model"][layer].view(-1)[place] = value
        folder = tmp_path / str(number)
        folder.mkdir()
        _write(folder / checkpoint_name(0, 3), changed)
        assert "indices" in _goes_on(folder)


@_WITH_INDICES
def test_more_indices_than_the_layer_has_places_cost_no_memory(run: tuple[Path, dict], tmp_path: Path) -> None:
    source, state = run
    changed = copy.deepcopy(state)
    for key in [key for key in state["model"] if key.endswith("col_indices")]:
        changed["model"][key] = torch.zeros(1, dtype=torch.int32).expand(10**11)
        changed["model"][key.replace("col_indices", "values")] = torch.zeros(1, 1).expand(1, 10**11)
        changed["model"][key.replace("col_indices", "crow_indices")][-1] = 2**31 - 1
    _write(tmp_path / checkpoint_name(0, 3), changed)
    assert "every tensor in" in _goes_on(tmp_path)


@pytest.mark.parametrize(
    ("model", "arguments"),
    [("torch.hub:load", {"repo_or_dir": "somebody/net", "model": "net"}), ("evil:make", {}), ("several_ranks:noisy_net", {})],
    ids=["downloads code", "a module beside it", "even the very one of the run"],
)
def test_a_checkpoint_does_not_choose_whose_code_builds_the_model(
    run: tuple[Path, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, arguments: dict
) -> None:
    source, state = run
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'was-here')!r}, 'w')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(torch.hub, "load", lambda *_, **__: pytest.fail("code was loaded"))
    chosen = {"model": model, "model_args": arguments}
    changed = {**state, **{part: {**state[part], **chosen} for part in ("recipe", "config")}}
    _write(tmp_path / checkpoint_name(0, 3), changed)
    message = f"builds its model with {model}, code that is not part .* --resume {tmp_path} --model {model}"
    with pytest.raises(UserError, match=message):
        resume_run(tmp_path, {})
    assert not (tmp_path / "was-here").exists()


def test_a_model_that_is_named_is_built(run: tuple[Path, dict], tmp_path: Path) -> None:
    shutil.copytree(run[0], tmp_path / "copy")
    assert resume_run(tmp_path / "copy", _TRUSTED)["training"]["epochs"] == 2


def test_masks_of_another_run_under_the_weights_of_this_one_are_noticed(run: tuple[Path, dict], tmp_path: Path) -> None:
    source, state = run
    _write(tmp_path / checkpoint_name(0, 3), {**state, "masks_digest": "0" * 64})
    with pytest.raises(UserError, match="Expected masks_digest in .* to be that of its weights"):
        resume_run(tmp_path, _TRUSTED)


@pytest.mark.filterwarnings("ignore")
def test_a_changed_mask_file_is_refused_or_the_same(tmp_path: Path) -> None:
    """Its header is text, so names, shapes and counts can be anything; bytes after it are bits."""
    torch.manual_seed(0)
    masks = MaskSet({"a.weight": torch.rand(6, 5) < 0.4, "b.weight": torch.rand(3, 4, 3, 3) < 0.4}, {"pattern": "unstructured"})
    path = tmp_path / "masks.safetensors"
    masks.save(path)
    good = path.read_bytes()
    (length,) = struct.unpack("<Q", good[:8])
    header = json.loads(good[8 : 8 + length])
    meant = json.loads(header["__metadata__"]["grasp_sparse.masks"])
    shapes = [[-6, -5], [6, -5], [2**32, 2**32], [2**62, 4], [], [0], [6.0, 5], ["6", 5], None, 7, [30], [[6, 5]], [2**64, 0]]
    values = [*shapes, {}, "x", -1, 2**70, float("nan"), {"shape": [6, 5]}, {"shape": [6, 5], "kept": 1, "more": 2}]
    accepted = 0
    for seed in range(300):
        draw, changed = random.Random(seed), copy.deepcopy(meant)
        place = draw.choice(list(_places(changed)))
        holder = changed
        for key in place[:-1]:
            holder = holder[key]
        holder[place[-1]] = draw.choice(values)
        text = json.dumps({**header, "__metadata__": {"grasp_sparse.masks": json.dumps(changed)}}).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + good[8 + length :])
        try:
            loaded = MaskSet.load(path)
        except ValueError as error:
            assert "Expected a mask file written by MaskSet.save" in str(error)
            continue
        accepted += 1
        assert loaded.keys() == masks.keys()
        assert all(torch.equal(loaded[name].flatten(), masks[name].flatten()) for name in masks)  # their sizes are for check()
    assert accepted < 200
