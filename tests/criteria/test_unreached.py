"""Weights that no gradient reaches are never counted as unimportant without a word."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from grasp_sparse.criteria import score
from grasp_sparse.pruning import prune
from small_models import data, norm_net, smooth_net


class Checkpointed(nn.Module):
    """A block under checkpointing, behind an embedding or a layer that can be pruned."""

    def __init__(self, first: nn.Module, use_reentrant: bool | None) -> None:
        super().__init__()
        self.first, self.use_reentrant = first, use_reentrant
        self.block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = self.first(x)
        if self.use_reentrant is None:
            return self.head(self.block(x))
        return self.head(checkpoint(self.block, x, use_reentrant=self.use_reentrant))


FIRST = {
    "embedding": (lambda: nn.Embedding(10, 8), torch.arange(10)),
    "linear": (lambda: nn.Linear(4, 8), torch.randn(10, 4, generator=torch.Generator().manual_seed(0))),
}


@pytest.mark.parametrize("first", FIRST)
@pytest.mark.parametrize("criterion", ["grasp", "snip", "synflow"])
def test_reentrant_checkpointing_is_refused_and_the_other_kind_changes_nothing(criterion, first):
    make, x = FIRST[first]
    plain, other, reentrant = (Checkpointed(make(), kind).double() for kind in (None, False, True))
    other.load_state_dict(plain.state_dict())
    batches = [(x, torch.arange(10) % 5)]
    scores = score(plain, batches, criterion)
    assert all(value.count_nonzero() for value in scores.values())
    again = score(other, batches, criterion)
    assert all(torch.equal(again[name], value) for name, value in scores.items())
    with pytest.raises(ValueError, match="Expected activation checkpointing with use_reentrant=False, got use_reentrant=True"):
        prune(reentrant, batches, 0.5, criterion)


def unused_net() -> nn.Module:
    model = norm_net()
    model[0].first, model[0].second = nn.Linear(3, 3), nn.Linear(2, 2)
    return model


@pytest.mark.parametrize("criterion", ["grasp", "snip", "synflow"])
def test_weights_that_the_forward_leaves_out_are_named_once(criterion):
    with pytest.warns(UserWarning, match=r"No gradient reached 0\.first\.weight, 0\.second\.weight in any batch") as caught:
        scores = score(unused_net(), [data(), data()], criterion)
    assert len(caught) == 1
    assert not scores["0.first.weight"].any() and scores["0.weight"].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(unused_net(), [data()], criterion, exclude=["0.first", "0.second"])


class Routed(nn.Module):
    """Uses one of two layers, as the first sample says."""

    def __init__(self) -> None:
        super().__init__()
        self.ways = nn.ModuleList([smooth_net(0), smooth_net(1)])

    def forward(self, x):
        return self.ways[int(x[0, 0, 0, 0] > 0)](x)


@pytest.mark.parametrize("criterion", ["grasp", "snip"])
def test_one_batch_of_any_process_is_enough(criterion):
    x, y = data()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(Routed(), [(x.abs(), y), (-x.abs(), y)], criterion)
    with pytest.warns(UserWarning, match=r"No gradient reached ways\.0\.0\.weight"):
        score(Routed(), [(x.abs(), y)], criterion)

    def other_process_reaches_everything(tensors):
        for tensor in tensors:
            tensor.add_(1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score(Routed(), [(x.abs(), y)], criterion, reduce=other_process_reaches_everything)


def test_scores_that_are_all_zero_would_follow_the_order_of_the_layers():
    model = smooth_net()
    nn.init.zeros_(model[5].weight)
    with pytest.raises(ValueError, match="tell weights apart, got 0 for every weight.*an output layer that starts at zero"):
        prune(model, [data()], 0.9, "snip")
    assert any(value.any() for value in score(model, [data()], "grasp").values())
