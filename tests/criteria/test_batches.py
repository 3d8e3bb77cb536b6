"""Samples are read once, kept as they were, balanced by class and cut fairly."""

from __future__ import annotations

import pytest
import torch

from grasp_sparse import criteria
from grasp_sparse.criteria.batches import Batch, StoredBatches, class_balanced, micro_batches


@pytest.mark.parametrize("memory_limit", [0, 500, 1 << 20])
def test_stored_batches_give_the_same_bits_every_time_in_memory_or_on_disk(memory_limit):
    drawn = [({"image": torch.randn(3, 4, 5), "n": 2}, torch.tensor([i, i, i])) for i in range(6)]
    stored = StoredBatches(iter(drawn), memory_limit=memory_limit)
    assert len(stored) == 6
    for _ in range(2):
        for batch, (inputs, targets) in zip(stored, drawn, strict=True):
            assert torch.equal(batch.inputs["image"], inputs["image"]) and batch.inputs["n"] == 2
            assert torch.equal(batch.targets, targets) and batch.samples == 3


def test_class_balanced_takes_the_first_of_each_class_class_by_class():
    inputs = torch.arange(12.0)[:, None]
    targets = torch.tensor([0, 0, 2, 1, 1, 0, 2, 1, 2, 0, 1, 2])
    loader = [(inputs[:5], targets[:5]), (inputs[5:], targets[5:])]
    ((first, labels),) = class_balanced(loader, 2, 3)
    assert first.flatten().tolist() == [0, 1, 3, 4, 2, 6] and labels.tolist() == [0, 0, 1, 1, 2, 2]
    one, two = class_balanced(loader, 2, 3, num_batches=2)
    assert torch.equal(one[0], first) and two[0].flatten().tolist() == [5, 9, 7, 10, 8, 11]


def test_class_balanced_stops_reading_when_it_has_enough():
    def loader():
        yield torch.zeros(4, 1), torch.tensor([0, 1, 0, 1])
        raise AssertionError("read on")

    assert len(class_balanced(loader(), 2, 2)) == 1


def test_what_is_drawn_by_class_spills_like_any_other_batches(monkeypatch):
    monkeypatch.setattr(criteria, "MEMORY_LIMIT", 100)
    inputs, targets = torch.arange(64.0).view(32, 2), torch.arange(32) % 2
    expected = class_balanced([(inputs, targets)], 2, 2, num_batches=5)
    with pytest.warns(UserWarning, match="the rest is in a file"):
        stored = criteria.store_batches([(inputs, targets)], samples_per_class=2, num_classes=2, num_batches=5)
    assert stored.spilled and all(torch.equal(a, b) for got, want in zip(stored, expected, strict=True) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("targets", "classes", "message"),
    [([0, 1, 1], 3, "class 0, 2"), ([0, 5, 1], 3, r"num_classes=3.*5"), ([0.5, 1.0, 1.0], 2, "integer")],
)
def test_class_balanced_says_what_is_missing(targets, classes, message):
    with pytest.raises(ValueError, match=message):
        class_balanced([(torch.zeros(3, 1), torch.tensor(targets))], 2, classes)


def test_micro_batches_cover_every_sample_once_and_see_every_class():
    batch = Batch(torch.arange(10), torch.arange(5).repeat_interleave(2))
    pieces = list(micro_batches([batch], 5))
    assert sorted(torch.cat([piece.inputs for piece in pieces]).tolist()) == list(range(10))
    assert all(piece.targets.tolist() == [0, 1, 2, 3, 4] for piece in pieces)
    assert max(piece.samples for piece in micro_batches([batch], 3)) <= 3
    assert list(micro_batches([batch], None)) == [batch]


def test_more_batches_than_memory_should_hold_are_said_to_go_to_the_disk(monkeypatch):
    """A whole ImageNet would: the hint is what a caller needs who forgot to say how many."""
    drawn = [(torch.zeros(4, 2), torch.zeros(4))] * 3
    monkeypatch.setattr(criteria, "MEMORY_LIMIT", 100)
    with pytest.warns(UserWarning, match="more than the .* GiB that memory holds of them: the rest is in a file in .* num_batches") as said:
        assert len(criteria.store_batches(drawn, micro_batch_size=2)) == 6
    assert [warning.category for warning in said].count(UserWarning) == 1
