"""Masks that change, layouts that change, copies, and what is refused."""

from __future__ import annotations

import copy
import io
import weakref

import pytest
import torch
from mixed_model import assert_equal_parameters, backward, mixed_model, train
from torch import nn

import grasp_sparse as gs
from grasp_sparse import optim
from grasp_sparse.bits import pack_like
from grasp_sparse.nn import MaskedLinear
from grasp_sparse.optim import fused

MAKE = {
    "SGD": lambda p, **options: optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2, **options),
    "AdamW": lambda p, **options: optim.AdamW(p, lr=1e-2, **options),
}
every = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)


@every
def test_a_dense_model_with_masks_trains_like_its_masked_layers(make):
    dense, masked = nn.Linear(20, 10), None
    masks = gs.MaskSet({"weight": torch.rand(10, 20) < 0.3})
    masked = MaskedLinear.from_dense(copy.deepcopy(dense), masks["weight"])
    optimizers = [
        make(dense.parameters(), masks={p: masks[name] for name, p in dense.named_parameters() if name in masks}),
        make(masked.parameters()),
    ]
    with torch.no_grad():
        dense.weight.mul_(masks["weight"])
    for model, optimizer in zip((dense, masked), optimizers, strict=True):
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            optimizer.zero_grad()
            model(torch.randn(7, 20, generator=generator)).square().sum().backward()
            optimizer.step()
    assert dense.weight.count_nonzero() == masks.kept
    assert_equal_parameters(dense, masked)


@every
def test_infinite_gradients_of_pruned_weights_do_nothing(make):
    weights = [torch.linspace(-1, 1, 50).requires_grad_() for _ in range(2)]
    mask = torch.rand(50) < 0.5
    for weight, poison in zip(weights, (0.0, torch.nan), strict=True):
        optimizer = make([weight], masks={weight: mask})
        for step in range(3):
            weight.grad = torch.where(mask, torch.sin(weight.detach() + step), poison)
            optimizer.step()
        assert all(torch.isfinite(s).all() for s in optimizer.state[weight].values())
    assert torch.equal(*weights) and (weights[0][~mask] == 0).all() and (weights[0][mask] != 0).all()


@every
def test_masks_that_change_are_followed(make):
    layer = MaskedLinear.from_dense(nn.Linear(16, 8), torch.rand(8, 16) < 0.5)
    optimizer = make(layer.parameters(), masks=optim.layer_masks(layer))

    def step():
        layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
        assert torch.equal(layer.weight != 0, masked)

    masked = layer.mask.clone()
    step()
    other = MaskedLinear.from_dense(nn.Linear(16, 8), torch.rand(8, 16) < 0.5)
    layer.load_state_dict(other.state_dict())  # in place
    masked = other.mask
    step()
    masked = torch.rand(8, 16) < 0.5
    optimizer.set_masks({layer.weight: masked})
    step()
    masked = torch.ones(8, 16, dtype=torch.bool)
    optimizer.set_masks({})
    step()


@every
def test_bits_stay_in_their_place_for_graphs_that_read_them(make):
    """A graph holds addresses: what it reads must not be freed when masks change, nor be of yesterday after the next step."""
    weights = [torch.ones(20, requires_grad=True) for _ in range(2)]
    mask = torch.rand(20) < 0.5
    optimizer = make(weights, masks={weights[0]: mask, weights[1]: torch.rand(20) < 0.5})

    def bits() -> list[torch.Tensor]:
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        return [optimizer._masks.bits([weight])[0] for weight in weights if optimizer._masks.get(weight) is not None]

    before = bits()
    mask.logical_not_()
    assert [b.data_ptr() for b in bits()] == [b.data_ptr() for b in before] and torch.equal(before[0], pack_like(mask, weights[0]))
    other = torch.rand(20) < 0.5
    optimizer.set_masks({weights[0]: other})
    (after,) = bits()
    assert after.data_ptr() == before[0].data_ptr() and torch.equal(after, pack_like(other, weights[0]))
    freed = weakref.ref(before[1])
    del before
    assert freed() is not None


@every
def test_a_first_step_is_not_recorded(make, monkeypatch):
    weights = [torch.ones(3, requires_grad=True) for _ in range(2)]
    optimizer = make(weights)
    weights[0].grad = torch.ones(3)
    optimizer.step()
    monkeypatch.setattr(fused, "_is_recording", lambda tensor: True)
    optimizer.step()
    weights[1].grad = torch.ones(3)
    held = [weight.detach().clone() for weight in weights]
    with pytest.raises(RuntimeError, match="Expected the optimizer to have taken a step before it is recorded"):
        optimizer.step()
    assert all(map(torch.equal, weights, held)) and not optimizer.state.get(weights[1])


@pytest.mark.filterwarnings("ignore:grad and param do not obey")  # they do not, on purpose
@every
def test_layouts_may_change_on_the_way(make):
    """Parameters move to channels_last, then gradients come row-major; the numbers are those of a model that stays."""
    moving, staying = mixed_model(), mixed_model().to(memory_format=torch.contiguous_format)
    for model in (moving, staying):
        optimizer = make(model.parameters(), masks=optim.layer_masks(model))
        train(model, optimizer, 3)
        if model is moving:
            model[0].weight.data = model[0].weight.data.contiguous()
            train(model, optimizer, 3, seed=2)
            model.to(memory_format=torch.channels_last)
        else:
            train(model, optimizer, 3, seed=2)
        generator = torch.Generator().manual_seed(3)
        for _ in range(3):
            backward(model, generator)
            model[0].weight.grad = model[0].weight.grad.contiguous()
            optimizer.step()
    assert_equal_parameters(moving, staying, rtol=1e-12, atol=1e-12)
    assert (moving[0].weight[~moving[0].mask] == 0).all()


@every
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_goes_on_alike(make, how):
    model = mixed_model()
    optimizer = make(model.parameters(), masks=optim.layer_masks(model))
    train(model, optimizer, 3)
    if how == "deepcopy":
        other, other_optimizer = copy.deepcopy((model, optimizer))
    else:
        file = io.BytesIO()
        torch.save((model, optimizer), file)
        file.seek(0)
        other, other_optimizer = torch.load(file, weights_only=False)
    with torch.no_grad():
        for m in (model, other):
            m[7].weight += 1  # the copy must have the masks too
    train(model, optimizer, 3)
    train(other, other_optimizer, 3)
    assert_equal_parameters(model, other)
    assert (other[7].weight[~other[7].mask] == 0).all()


@every
def test_a_backward_pass_that_needs_the_old_weights_notices(make):
    weight = torch.ones(3, requires_grad=True)
    optimizer = make([weight])
    loss = weight.square().sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every
def test_gradients_of_other_kinds_are_refused_before_any_update(make):
    first, table = torch.ones(4, 4, requires_grad=True), torch.nn.Embedding(4, 4, sparse=True)
    optimizer = make([{"params": [first]}, {"params": table.parameters()}])
    (first.sum() + table(torch.tensor([1, 2])).sum()).backward()
    with pytest.raises(ValueError, match="Expected strided.*sparse_coo"):
        optimizer.step()
    assert (first == 1).all() and not any(optimizer.state[first].values())
    number = torch.ones(3, dtype=torch.complex64, requires_grad=True)
    number.grad = torch.ones_like(number)
    with pytest.raises(ValueError, match="complex64"):
        make([number]).step()


@every
def test_masks_that_do_not_fit_are_refused(make):
    weight = torch.ones(4, 4, requires_grad=True)
    for mask in (torch.ones(4, 4), torch.ones(4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="Expected a bool mask"):
            make([weight], masks={weight: mask})
    with pytest.raises(ValueError, match="Expected masks of parameters"):
        make([weight], masks={torch.ones(2): torch.ones(2, dtype=torch.bool)})


def test_options_of_torch_alone_are_refused():
    weight = torch.ones(4, requires_grad=True)
    theirs = torch.optim.AdamW([weight], amsgrad=True)
    ours = optim.AdamW([weight])
    ours.load_state_dict(theirs.state_dict())
    weight.grad = torch.ones(4)
    with pytest.raises(NotImplementedError, match="amsgrad"):
        ours.step()
    assert (weight == 1).all()
    with pytest.raises(ValueError, match="Nesterov"):
        optim.SGD([weight], nesterov=True)


@pytest.mark.parametrize("kind, name", [(optim.SGD, "foreach"), (optim.SGD, "fused"), (optim.AdamW, "amsgrad"), (optim.AdamW, "typo")])
def test_arguments_of_torch_alone_are_refused_in_a_sentence_unless_they_are_off(kind, name):
    weight = torch.ones(4, requires_grad=True)
    with pytest.raises(TypeError, match=rf"Expected the arguments of grasp_sparse\.optim\.{kind.__name__}, got {name}; one call"):
        kind([weight], **{name: True})
    if name != "typo":
        assert kind([weight], **{name: False})
