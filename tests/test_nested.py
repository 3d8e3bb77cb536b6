"""Nested inputs keep their structure, and models are given a namedtuple as the one argument that it is."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence, unpack_sequence

from grasp_sparse.costs import weight_costs
from grasp_sparse.criteria import score
from grasp_sparse.criteria.batches import Batch, StoredBatches, micro_batches
from grasp_sparse.nested import count_samples, first_tensor, map_tensors
from grasp_sparse.planning import layer_inputs
from grasp_sparse.pruning import prune
from grasp_sparse.scratch import call_model, move


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor | None


def test_everything_but_the_tensors_stays():
    data = {"a": [Pair(torch.ones(2), None), (torch.ones(3), "text")], "b": 4}
    doubled = map_tensors(lambda tensor: 2 * tensor, data)
    pair, (tensor, text) = doubled["a"]
    assert type(pair) is Pair and pair.right is None and pair.left.tolist() == [2, 2]
    assert tensor.tolist() == [2, 2, 2] and text == "text" and doubled["b"] == 4
    assert first_tensor({"n": 1, "pair": Pair(None, torch.zeros(7))}).shape == (7,)


class Difference(nn.Module):
    """Of two images, given as a pair or one by one."""

    def __init__(self, one_by_one: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one_by_one = one_by_one
        self.body = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5))

    def forward(self, *pair):
        left, right = pair if self.one_by_one else pair[0]
        return self.body(left - right)


@pytest.mark.parametrize("criterion", ["grasp", "snip"])
@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_a_namedtuple_is_one_argument_and_its_parts_count_as_those_of_a_tuple(criterion, micro_batch_size):
    pair, targets = Pair(torch.randn(10, 6), torch.randn(10, 6)), torch.arange(10) % 5
    scores = score(Difference(), [(pair, targets)], criterion, micro_batch_size=micro_batch_size)
    expected = score(Difference(one_by_one=True), [(tuple(pair), targets)], criterion, micro_batch_size=micro_batch_size)
    assert all(torch.equal(scores[name], value) for name, value in expected.items())
    assert layer_inputs(Difference(), pair).keys() == {"body", "body.0", "body.1", "body.2"}


@pytest.mark.parametrize("memory_limit", [0, 1 << 20])
def test_stored_namedtuples_come_back_as_they_were(memory_limit):
    class Local(NamedTuple):  # which no pickle could name
        part: torch.Tensor | None

    packed = packed_sequences()
    drawn = [((Local(torch.randn(3)), Local(None), [packed]), torch.zeros(3)) for _ in range(3)]
    stored = StoredBatches(drawn, memory_limit=memory_limit)
    for batch, (inputs, _) in zip(stored, drawn, strict=True):
        assert isinstance(batch, Batch) and type(batch.inputs[0]) is Local and torch.equal(batch.inputs[0].part, inputs[0].part)
        assert batch.inputs[1] == Local(None)
        assert all(map(torch.equal, unpack_sequence(batch.inputs[2][0]), unpack_sequence(packed)))


LENGTHS = [2, 5, 1, 4]


def packed_sequences(dtype=torch.float32, features: int = 3):
    generator = torch.Generator().manual_seed(0)
    return pack_sequence([torch.randn(n, features, generator=generator, dtype=dtype) for n in LENGTHS], enforce_sorted=False)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.rnn, self.head = nn.Linear(3, 4), nn.GRU(4, 6), nn.Linear(6, 5)

    def forward(self, packed):
        _, state = self.rnn(packed._replace(data=self.first(packed.data).tanh()))
        return self.head(state[0])


@pytest.mark.parametrize("enforce_sorted", [True, False])
def test_packed_sequences_are_moved_as_what_they_are(enforce_sorted):
    packed = pack_sequence([torch.randn(n, 3) for n in sorted(LENGTHS, reverse=True)], enforce_sorted=enforce_sorted)
    moved = move(packed, torch.device("meta"), torch.float64)
    assert type(moved) is type(packed) and moved.data.dtype == torch.float64 and moved.data.is_meta
    assert moved.batch_sizes.device.type == "cpu" and (moved.sorted_indices is None) == enforce_sorted
    assert count_samples(packed) == 4 and first_tensor(packed) is packed.data


@pytest.mark.parametrize("criterion", ["grasp", "snip"])
def test_packed_sequences_are_samples(criterion):
    """Each sequence counts once, however long, and however the batch is cut."""
    model, packed, targets = Recurrent().double(), packed_sequences(torch.float64), torch.tensor([0, 1, 2, 3])
    whole = score(model, [(packed, targets)], criterion)
    samples = zip(unpack_sequence(packed), targets, strict=True)
    one_by_one = [(pack_sequence([sequence]), target[None]) for sequence, target in samples]
    for cut in (score(model, one_by_one, criterion), score(model, [(packed, targets)], criterion, micro_batch_size=3)):
        for name, value in whole.items():
            torch.testing.assert_close(cut[name], value, rtol=1e-9, atol=0)


def test_packed_sequences_are_dealt_out_with_their_targets():
    packed = packed_sequences()
    pieces = list(micro_batches([Batch(packed, torch.arange(4))], 2))
    assert [piece.targets.tolist() for piece in pieces] == [[0, 2], [1, 3]]
    _, lengths = pad_packed_sequence(pieces[0].inputs)
    assert lengths.tolist() == [LENGTHS[0], LENGTHS[2]] and [piece.samples for piece in pieces] == [2, 2]


@pytest.mark.parametrize("criterion", ["grasp", "snip", "synflow", "magnitude"])
def test_a_model_of_packed_sequences_can_be_pruned(criterion):
    model, packed = Recurrent(), packed_sequences()
    masks = prune(model, [(packed, torch.arange(4))], 0.5, criterion, budget="flops")
    assert masks.keys() == {"first.weight", "head.weight"}
    assert weight_costs(model, packed) == {"first.weight": sum(LENGTHS) / 4, "head.weight": 1}
    assert call_model(model.double(), packed).shape == (4, 5)
