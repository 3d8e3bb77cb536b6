"""A MaskSet is a mapping of bool masks that survives a file bit by bit, and refuses files and models that do not fit."""

from __future__ import annotations

import io
import json
import os
import pickle

import pytest
import safetensors.torch
import torch
from torch import nn

import grasp_sparse.files
from grasp_sparse.masks import MaskSet

SHAPES = {"conv.weight": (3, 2, 3, 3), "fc.weight": (5, 7), "one.weight": (1, 1)}


def some_masks() -> MaskSet:
    generator = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(shape, generator=generator) < 0.3 for name, shape in SHAPES.items()}
    return MaskSet(masks, {"criterion": "grasp", "sparsity": 0.7, "seed": None}, [("attention", "packed")])


def model(conv_out: int = 3) -> nn.Module:
    net = nn.Module()
    net.conv, net.fc, net.one = nn.Conv2d(2, conv_out, 3), nn.Linear(7, 5), nn.Linear(1, 1)
    return net


def test_counts_and_densities():
    masks = MaskSet({"a": torch.tensor([[True, False], [False, False]]), "b": torch.ones(6, dtype=torch.bool)})
    assert (masks.kept, masks.numel, masks.density, masks.sparsity) == (7, 10, 0.7, 0.3)
    assert masks.layer_densities() == {"a": 0.25, "b": 1.0}
    assert masks.flop_sparsity({"a": 10.0, "b": 5.0}) == 30 / 70
    assert list(masks) == ["a", "b"] and len(masks) == 2 and "density 0.7" in repr(masks)
    with pytest.raises(ValueError, match="'b'"):
        masks.flop_sparsity({"a": 1.0})


def test_counts_are_of_what_the_masks_hold_now(tmp_path):
    """A mask is a tensor that others have, too."""
    mask = torch.ones(4, dtype=torch.bool)
    masks = MaskSet({"a": mask})
    mask[0] = False
    assert (masks.kept, masks.layer_densities()) == (3, {"a": 0.75})
    masks.save(tmp_path / "masks.safetensors")
    assert MaskSet.load(tmp_path / "masks.safetensors") == masks


def test_a_weight_without_elements_is_dense():
    masks = MaskSet({"empty": torch.ones(5, 0, dtype=torch.bool)})
    assert masks.layer_densities() == {"empty": 1.0} and masks.density == 1.0


def test_equality_is_of_names_and_masks():
    masks = some_masks()
    assert masks == MaskSet(dict(masks)) and masks != MaskSet({"fc.weight": masks["fc.weight"]})
    assert masks != MaskSet({**masks, "one.weight": ~masks["one.weight"]})


def test_only_bool_tensors_are_masks():
    with pytest.raises(ValueError, match=r"'a'.*float32"):
        MaskSet({"a": torch.ones(2)})


def test_a_file_gives_back_masks_recipe_and_skipped(tmp_path):
    masks, path = some_masks(), tmp_path / "masks.safetensors"
    masks.save(path)
    loaded = MaskSet.load(str(path))
    assert loaded == masks and list(loaded) == list(masks)
    assert loaded.recipe == masks.recipe and loaded.skipped == masks.skipped
    assert os.listdir(tmp_path) == ["masks.safetensors"]


def test_equal_masks_are_equal_files_of_one_bit_a_weight(tmp_path):
    big = MaskSet({f"layer{i}.weight": torch.rand(100, 1000) < 0.5 for i in range(8)})
    big.save(tmp_path / "a")
    MaskSet(dict(big)).save(tmp_path / "b")
    data = (tmp_path / "a").read_bytes()
    assert data == (tmp_path / "b").read_bytes()
    assert 100_000 <= len(data) < 103_000


class _FullDisk(io.FileIO):
    def write(self, data) -> int:
        super().write(data[:10])
        raise OSError("no space left")


def _refuse(*_) -> None:
    raise OSError("no space left")


FAILURES = {
    "write": lambda patch: patch.setattr(grasp_sparse.files, "open", _FullDisk, raising=False),
    "fsync": lambda patch: patch.setattr(os, "fsync", _refuse),
    "replace": lambda patch: patch.setattr(os, "replace", _refuse),
}


@pytest.mark.parametrize("fail", FAILURES.values(), ids=FAILURES)
def test_a_failed_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, fail):
    path = tmp_path / "masks"
    masks = some_masks()
    masks.save(path)
    before = path.read_bytes()
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        fail(patch)
        MaskSet({"other": torch.ones(3, dtype=torch.bool)}).save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["masks"]


def test_truncated_and_foreign_files_are_refused(tmp_path):
    path = tmp_path / "masks"
    some_masks().save(path)
    data = path.read_bytes()
    broken = {"empty": b"", "text": b"hello, this is no mask file", "longer": data + b"x"}
    broken |= {f"cut{n}": data[:n] for n in (4, 20, len(data) // 2, len(data) - 1)}
    broken["other"] = safetensors.torch.save({"conv.weight": torch.zeros(3)})
    broken["flipped"] = data[:-1] + bytes([data[-1] ^ 0x80])
    broken["format"] = data.replace(b'\\"format\\": 1', b'\\"format\\": 9')
    broken["shape"] = data.replace(b'\\"shape\\": [5, 7]', b'\\"shape\\": [5, 9]')
    broken["names"] = data.replace(b'\\"fc.weight\\"', b'\\"fx.weight\\"')
    for name, content in broken.items():
        assert content != data, name
        path.write_bytes(content)
        with pytest.raises(ValueError, match="Expected a mask file written by MaskSet.save, got .*masks"):
            MaskSet.load(path)
    with pytest.raises(FileNotFoundError):
        MaskSet.load(tmp_path / "missing")


def test_check_names_what_does_not_fit():
    masks = some_masks()
    masks.check(model())
    with pytest.raises(ValueError, match=r"'conv.weight' \[3, 2, 3, 3\] for a weight \[4, 2, 3, 3\]"):
        masks.check(model(conv_out=4))
    with pytest.raises(ValueError, match="'conv.weight'"):
        masks.check(nn.Linear(7, 5))


def test_the_digest_is_of_names_shapes_and_masks_alone():
    a, b = torch.tensor([[True, False], [False, True]]), torch.ones(3, dtype=torch.bool)
    digest = MaskSet({"a": a, "b": b}, {"seed": 1}).digest()
    assert digest == MaskSet({"b": b.clone(), "a": a.clone()}, {"seed": 2}, [("c", "too small")]).digest()
    others = [{"a": ~a, "b": b}, {"a": a.view(4), "b": b}, {"a": a, "c": b}, {"a": a}]
    assert len({digest, *(MaskSet(other).digest() for other in others)}) == 5


def _parts(path) -> tuple[str, str, dict[str, torch.Tensor]]:
    """Of a file: key and text of its metadata, tensors."""
    with safetensors.safe_open(path, "pt") as file:
        ((key, header),) = file.metadata().items()
        return key, header, {name: file.get_tensor(name) for name in file.keys()}


def test_other_weights_than_were_written_are_refused_also_where_they_are_as_many(tmp_path):
    some_masks().save(tmp_path / "masks")
    key, header, tensors = _parts(tmp_path / "masks")
    first, second, *_ = tensors["fc.weight"].tolist()
    assert first != second
    tensors["fc.weight"][:2] = torch.tensor([second, first], dtype=torch.uint8)
    (tmp_path / "masks").write_bytes(safetensors.torch.save(tensors, {key: header}))
    with pytest.raises(ValueError, match="got .*masks: other masks than were written"):
        MaskSet.load(tmp_path / "masks")


def test_a_file_of_before_there_was_a_digest_is_read(tmp_path):
    path, masks = tmp_path / "masks", some_masks()
    masks.save(path)
    data = path.read_bytes()
    key, header, tensors = _parts(path)
    old = {name: value for name, value in json.loads(header).items() if name != "digest"}
    path.write_bytes(safetensors.torch.save(tensors, {key: json.dumps(old)}))
    assert path.read_bytes() != data and MaskSet.load(path) == masks


def test_masks_go_from_one_process_to_another():
    """By pickle, as torch.distributed.broadcast_object_list sends them."""
    masks = some_masks()
    sent = pickle.loads(pickle.dumps(masks))
    assert sent == masks and (sent.recipe, sent.skipped) == (masks.recipe, masks.skipped)
