"""The fused optimizers on CUDA equal torch's, keep pruned weights at zero, and go on counting in a recorded graph."""

from __future__ import annotations

import copy

import pytest
import torch

from grasp_sparse.optim import SGD, AdamW

pytestmark = pytest.mark.gpu

OPTIMIZERS = {
    "sgd": (SGD, torch.optim.SGD, dict(lr=0.1)),
    "momentum": (SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, weight_decay=1e-2)),
    "nesterov": (SGD, torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True)),
    "adamw": (AdamW, torch.optim.AdamW, dict(lr=1e-2)),
}
SHAPES = [(3, 5), (1000,), (64, 32, 3, 3), (), (7, 4099)]


def parameters(dtype=torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype).cuda()) for shape in SHAPES]
    made[2].data = made[2].data.contiguous(memory_format=torch.channels_last)
    return made


def set_gradients(made: list[torch.nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for p in made:
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))  # strides as of p: torch's fused ones ask for them


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_equals_torch(kind, dtype):
    ours_kind, stock_kind, options = OPTIMIZERS[kind]
    ours, stock = parameters(dtype), parameters(dtype)
    optimizer, reference = ours_kind(ours, **options), stock_kind(stock, **options)
    for step in range(4):
        set_gradients(ours, step), set_gradients(stock, step)
        optimizer.step(), reference.step()
        if step == 1:  # states load into each other
            optimizer.load_state_dict(copy.deepcopy(reference.state_dict()))  # or they would share its tensors
    for p, q in zip(ours, stock, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_masks(kind):
    made = parameters()
    masks = {made[2]: torch.rand(made[2].shape, device="cuda") < 0.3, made[4]: torch.rand(made[4].shape, device="cuda") < 0.3}
    optimizer = OPTIMIZERS[kind][0](made, masks=masks, **OPTIMIZERS[kind][2])
    for step in range(3):
        set_gradients(made, step)
        made[4].grad[~masks[made[4]]] = torch.nan
        optimizer.step()
    for p, mask in masks.items():
        assert bool((p[~mask] == 0).all()) and bool(p.isfinite().all())


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_a_step_is_left_out_without_asking_the_device(kind):
    ours_kind, stock_kind, options = OPTIMIZERS[kind]
    ours, stock = parameters(), parameters()
    optimizer, reference = ours_kind(ours, **options), stock_kind(stock, fused=True, **options)
    found = torch.tensor([0.0, 1.0, 0.0], device="cuda").unbind()
    for step, found_inf in enumerate(found):
        set_gradients(ours, step), set_gradients(stock, step)
        optimizer.found_inf = reference.found_inf = found_inf
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        reference.step()
    for p, q in zip(ours, stock, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_a_recorded_step_goes_on_counting(kind):
    ours_kind, stock_kind, options = OPTIMIZERS[kind]
    ours, stock = parameters(), parameters()
    optimizer, reference = ours_kind(ours, **options), stock_kind(stock, **options)
    set_gradients(ours, 0), set_gradients(stock, 0)
    optimizer.step(), reference.step()  # starts the states
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        optimizer.step()
    for _ in range(3):
        graph.replay()
        reference.step()
    for p, q in zip(ours, stock, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_a_recorded_step_follows_a_mask_once_a_step_outside_has_seen_it(kind):
    made = parameters()
    mask = torch.rand(made[0].shape, device="cuda") < 0.5
    optimizer = OPTIMIZERS[kind][0](made, masks={made[0]: mask}, **OPTIMIZERS[kind][2])
    set_gradients(made, 0)
    optimizer.step()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        optimizer.step()
    mask.logical_not_()
    optimizer.step()
    for _ in range(2):
        graph.replay()
    assert torch.equal(made[0] != 0, mask)


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_a_first_step_is_not_recorded(kind):
    made = parameters()
    optimizer = OPTIMIZERS[kind][0](made, **OPTIMIZERS[kind][2])
    set_gradients(made, 0)
    held = [p.detach().clone() for p in made]
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="Expected the optimizer to have taken a step before it is recorded"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()
    assert all(map(torch.equal, made, held))


@pytest.mark.parametrize("kind", ["momentum", "adamw"])
def test_a_learning_rate_on_the_device_is_not_recorded(kind):
    made = parameters()
    optimizer = OPTIMIZERS[kind][0](made, **OPTIMIZERS[kind][2])
    set_gradients(made, 0)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1, device="cuda")
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="Expected lr to be a number while a CUDA graph is recorded"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()
