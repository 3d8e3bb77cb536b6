"""Index buffers that something else writes into, averages of all buffers first of all: no layer computes with others than its own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from grasp_sparse.formats import csr_from_mask, is_consistent
from grasp_sparse.nn import SparseConv2d, SparseLinear

INDICES = ("crow_indices", "col_indices", "ccol_indices", "row_indices", "permutation")
INPUT = {"linear": (3, 48), "conv2d": (2, 6, 5, 5)}
WRITTEN = "something wrote into them"
every = pytest.mark.parametrize("kind", INPUT)


def sparse(kind: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    dense, layer = (nn.Linear(48, 40), SparseLinear) if kind == "linear" else (nn.Conv2d(6, 9, 3), SparseConv2d)
    return layer.from_dense(dense, torch.rand(dense.weight.shape) < 0.2)


@pytest.mark.parametrize("decay", [0.9, 0.999, 0.99995])
@pytest.mark.parametrize("seed", range(3))
@every
def test_an_average_of_all_buffers_is_refused_or_right(kind, decay, seed):
    layer, x = sparse(kind, seed), torch.randn(INPUT[kind])
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
    for _ in range(20):
        average.update_parameters(layer)  # of numbers that never change
    changed = any(not torch.equal(getattr(average.module, name), getattr(layer, name)) for name in INDICES)
    if changed:
        with pytest.raises(RuntimeError, match=WRITTEN):
            average(x)
    else:
        torch.testing.assert_close(average(x), layer(x))
    torch.testing.assert_close(layer(x), sparse(kind, seed)(x), rtol=0, atol=0)


def test_averages_do_change_indices():
    """Or the test above would show nothing."""
    layer = sparse("linear")
    average = AveragedModel(layer, multi_avg_fn=get_ema_multi_avg_fn(0.99995), use_buffers=True)
    for _ in range(20):
        average.update_parameters(layer)
    assert not torch.equal(average.module.col_indices, layer.col_indices)


@pytest.mark.parametrize("name", INDICES)
@every
def test_one_number_is_enough(kind, name):
    layer, x = sparse(kind), torch.randn(INPUT[kind])
    index = getattr(layer, name)
    index[len(index) // 2] += 1
    with pytest.raises(RuntimeError, match=WRITTEN):
        layer(x)
    index[len(index) // 2] -= 1
    layer(x)


@every
def test_the_same_numbers_written_again_are_none_the_worse(kind):
    """As DistributedDataParallel writes them that broadcasts buffers."""
    layer, x = sparse(kind), torch.randn(INPUT[kind])
    expected = layer(x)
    for name in INDICES:
        getattr(layer, name).copy_(getattr(layer, name).clone())
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)
    for other in (copy.deepcopy(layer), copy.deepcopy(layer).double().float()):
        torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


def test_inference_tensors_count_no_writes():
    with torch.inference_mode():
        layer = copy.deepcopy(sparse("linear"))
        assert layer(torch.randn(INPUT["linear"])).isfinite().all()


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (3, 64)], ids=str)
def test_what_is_built_is_consistent(shape, density):
    assert is_consistent(csr_from_mask(torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density))
