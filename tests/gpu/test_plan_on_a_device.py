"""plan and sparsify_ on a device: each layer is measured there both ways, the faster one is taken, and the network computes what
the dense one with zeros in place computes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import grasp_sparse as gs
from grasp_sparse.nn import SparseConv2d, SparseLinear
from grasp_sparse.pruning import make_masks

pytestmark = pytest.mark.gpu

patterns = pytest.mark.parametrize("pattern", ["unstructured", "block(32, 32)"])


@pytest.fixture(autouse=True)
def full_float32():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 128, 3, 2, 1), nn.BatchNorm2d(128), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(128, 128, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10),
    )  # fmt: skip


def masks_of(model: nn.Module, pattern: str):
    """Of all but the first convolution and the classifier."""
    scores = {f"{i}.weight": torch.rand(model[i].weight.shape) for i in (3, 7, 11)}
    return make_masks(scores, 0.8, pattern)


@patterns
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "autocast"])
def test_every_layer_is_measured_and_runs_the_faster_way(pattern, dtype):
    model, x = network().cuda(), torch.randn(16, 3, 32, 32, device="cuda")
    with torch.autocast("cuda", dtype, enabled=dtype is not None):
        plan = gs.plan(model, masks_of(model, pattern), x)
    for row in plan.rows:
        assert row.times is not None and all(0 < seconds < 1 for seconds in row.times), row
        assert (row.runs == "sparse") == (1.03 * row.times.sparse < row.times.masked), row


@patterns
@pytest.mark.parametrize("plan", ["auto", "sparse", "masked"])
def test_a_step_of_the_network_is_that_of_the_masked_dense_one(pattern, plan):
    model, x = network(), torch.randn(16, 3, 32, 32)
    masks = masks_of(model, pattern)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, mask in masks.items():
            exact.get_parameter(name).mul_(mask)
    sparse, given = model.cuda(), x.cuda()
    gs.sparsify_(sparse, masks, given, plan if plan == "auto" else dict.fromkeys(masks, plan))
    if plan == "sparse":
        assert [type(sparse[i]) for i in (3, 7, 11)] == [SparseConv2d, SparseConv2d, SparseLinear]
    y, wanted = sparse(given), exact(x.double())
    torch.testing.assert_close(y.cpu().double(), wanted, rtol=1e-3, atol=1e-3)
    y.square().sum().backward()
    wanted.square().sum().backward()
    for i in (0, 1, 4, 13):  # what every way of running leaves dense
        got, want = sparse[i].weight.grad.cpu().double(), exact[i].weight.grad
        assert (got - want).norm() <= 2e-2 * want.norm(), f"layer {i}"  # a ReLU may open at the last bit
