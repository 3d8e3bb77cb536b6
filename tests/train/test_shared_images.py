"""Images shared by several processes: together they see the very bits that one process sees with the whole batch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from image_files import write_class_folders
from torch import Tensor

from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.data import folder
from grasp_sparse.train.data.images import Share
from grasp_sparse.train.data.sets import Data, load_data

_SEED, _EPOCH = 3, 2


@pytest.fixture(params=["in memory", "files", "small files"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Data:
    """26 training images."""
    if request.param == "in memory":
        return load_data(TrainConfig(data="fake", image_size=8, train_limit=26))
    if request.param == "files":
        write_class_folders(tmp_path, count=13)
        return load_data(TrainConfig(data="imagefolder", data_dir=str(tmp_path), image_size=8, workers=0, trivial_augment=True))
    write_class_folders(tmp_path, count=13, size=(64, 64))
    return load_data(TrainConfig(data="tiny-imagenet", data_dir=str(tmp_path), workers=0, random_erasing=0.5))


def _bits(batches: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("first_step", [0, 2])
def test_parts_see_together_what_one_process_sees_with_the_whole_batch(data: Data, size: int, first_step: int) -> None:
    whole = list(data.train.shuffled(8, _SEED, _EPOCH, first_step))
    parts = [
        list(data.train.shuffled(8 // size, _SEED, _EPOCH, first_step, share=Share(rank, size))) for rank in range(size)
    ]
    assert len(whole) == 3 - first_step and {len(part) for part in parts} == {len(whole)}
    for step, (x, y) in enumerate(whole):
        together = _bits([part[step] for part in parts])
        assert x.dtype == torch.uint8 and torch.equal(together[0], x) and torch.equal(together[1], y)


def test_the_augmentation_of_an_image_does_not_depend_on_the_batch_size(data: Data) -> None:
    a, b = (_bits(list(data.train.shuffled(size, _SEED, _EPOCH))) for size in (6, 8))
    assert torch.equal(a[0], b[0])


def test_an_epoch_is_augmented_unlike_the_one_before(data: Data) -> None:
    a, b = (_bits(list(data.train.shuffled(13, _SEED, epoch))) for epoch in (0, 1))
    same = sum(any(torch.equal(x, other) for other in b[0]) for x in a[0])
    assert same < 13


@pytest.mark.parametrize("size", [1, 2, 3, 30])
def test_evaluation_sees_each_image_once_over_all_parts(data: Data, size: int) -> None:
    stored = Counter(x.numpy().tobytes() for x in _bits(list(data.train.in_order(7)))[0])
    seen: Counter = Counter()
    for rank in range(size):
        for x, y in data.train.in_order(4, Share(rank, size)):
            assert len(x) == len(y) <= 4
            seen.update(image.numpy().tobytes() for image in x)
    assert seen == stored and seen.total() == 26


@pytest.mark.parametrize("size", [1, 2, 5])
def test_micro_batches_of_scoring_are_the_same_whoever_scores_them(data: Data, size: int) -> None:
    whole = list(data.scoring_batches(4, 4, _SEED))
    parts = [data.scoring_batches(4, 4, _SEED, Share(rank, size)) for rank in range(size)]
    assert sum(map(len, parts)) == len(whole) and {part.total for part in parts} == {sum(len(y) for _, y in whole)}
    dealt = [list(part) for part in parts]
    for number, (x, y) in enumerate(whole):
        again, labels = dealt[number % size][number // size]
        assert torch.equal(x, again) and torch.equal(y, labels) and torch.equal(y, y.sort().values)


def test_scoring_reads_the_same_bits_again_and_decodes_one_micro_batch_at_a_time(tmp_path: Path, monkeypatch) -> None:
    write_class_folders(tmp_path, count=13)
    data = load_data(TrainConfig(data="imagefolder", data_dir=str(tmp_path), image_size=8, workers=0))
    decoded, load = [], folder.default_loader
    monkeypatch.setattr(folder, "default_loader", lambda path: decoded.append(path) or load(path))
    batches = data.scoring_batches(6, 4, seed=0)
    assert not decoded
    first = iter(batches)
    x, _ = next(first)
    assert len(decoded) == 4 and len(x) == 4
    once, twice = (_bits(list(batches)) for _ in range(2))
    assert torch.equal(once[0], twice[0]) and torch.equal(once[1].bincount(), torch.tensor([6, 6]))
