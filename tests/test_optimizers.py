"""Any torch optimizer trains kept weights exactly as it trains a dense model whose gradient and weights are masked each step."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import grasp_sparse as gs
from grasp_sparse.nn import MaskedLinear, SparseLinear

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd-momentum-decay": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-2),
    "sgd-nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2),
    "adam-amsgrad-fused": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, weight_decay=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, weight_decay=1e-2),
}
TOLERANCE = {torch.float64: dict(rtol=1e-9, atol=1e-11), torch.float32: dict(rtol=1e-3, atol=1e-4)}
STEPS = 20


def _model() -> nn.Module:
    # No bias before the norm: its gradient is rounding noise around zero, which Adam would turn into full steps.
    norm = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.Tanh()
    return nn.Sequential(*norm, nn.Conv2d(6, 4, 3, stride=2), nn.Flatten(), nn.Linear(36, 5))


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, masks=None) -> None:
    """STEPS steps; with masks, gradients are masked before and weights after each one."""
    generator = torch.Generator().manual_seed(1)
    dtype = next(model.parameters()).dtype
    masked = [] if masks is None else [(p, masks[name]) for name, p in model.named_parameters() if name in masks]
    for _ in range(STEPS):
        x = torch.randn(8, 2, 8, 8, generator=generator).to(dtype)
        target = torch.randint(5, (8,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        for parameter, mask in masked:
            parameter.grad.mul_(mask)
        optimizer.step()
        with torch.no_grad():
            for parameter, mask in masked:
                parameter.mul_(mask)


@pytest.mark.parametrize("max_density, kind", [(1.0, SparseLinear), (0.0, MaskedLinear)], ids=["sparse", "masked"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=["float64", "float32"])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_equals_the_masked_dense_run(make, dtype, max_density, kind):
    dense = _model().to(dtype)
    masks = {name: torch.rand_like(p) < 0.3 for name, p in dense.named_parameters() if p.dim() > 1}
    with torch.no_grad():
        for name, parameter in dense.named_parameters():
            if name in masks:
                parameter.mul_(masks[name])
    sparse = copy.deepcopy(dense)
    gs.sparsify_(sparse, masks, max_density=max_density)
    assert isinstance(sparse[-1], kind)
    optimizer = make(sparse.parameters())
    _train(sparse, optimizer)
    _train(dense, make(dense.parameters()), masks)

    if kind is SparseLinear:
        nnz = sparse[-1].nnz
        assert all(s.numel() in (1, nnz) for s in optimizer.state[sparse[-1].values].values() if isinstance(s, torch.Tensor))
    gs.densify_(sparse)
    for (name, actual), expected in zip(sparse.state_dict().items(), dense.state_dict().values(), strict=True):
        torch.testing.assert_close(actual, expected, **TOLERANCE[dtype], msg=lambda text, name=name: f"{name}: {text}")
        if name in masks:
            assert (actual[~masks[name]] == 0).all()


def test_optimizer_state_survives_a_checkpoint():
    def build():
        torch.manual_seed(3)
        model = _model()
        gs.sparsify_(model, {"5.weight": torch.rand(5, 36) < 0.3})
        return model, torch.optim.AdamW(model.parameters(), lr=1e-2)

    model, optimizer = build()
    _train(model, optimizer)
    other, other_optimizer = build()
    other.load_state_dict(model.state_dict())
    other_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch would share the moments
    _train(model, optimizer)
    _train(other, other_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
