"""Who masks the gradient of a masked layer's weight: a hook on the weight, one, of the mask the layer has now."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from grasp_sparse.nn import MaskedConv2d, MaskedLinear
from grasp_sparse.nn.masked import LaterMask

DENSE = {"linear": nn.Linear(6, 4), "conv2d": nn.Conv2d(3, 4, 3)}
INPUT = {"linear": (5, 6), "conv2d": (2, 3, 5, 5)}
CALL = {"linear": F.linear, "conv2d": F.conv2d}
every = pytest.mark.parametrize("kind", DENSE)


def mask_of(kind: str, seed: int) -> torch.Tensor:
    mask = torch.rand(DENSE[kind].weight.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    assert mask.any() and not mask.all()
    return mask


def masked(kind: str) -> nn.Module:
    layer = MaskedLinear if kind == "linear" else MaskedConv2d
    return layer.from_dense(DENSE[kind], mask_of(kind, 0))


def kept(layer: nn.Module, kind: str) -> torch.Tensor:
    """Where the weight has a gradient after a forward and backward; with positive inputs it has one wherever it may."""
    layer.zero_grad()
    layer(torch.rand(INPUT[kind]) + 0.5).sum().backward()
    return layer.weight.grad != 0


@every
def test_one_hook_however_often_the_layer_runs(kind):
    layer = masked(kind)
    for _ in range(3):
        assert torch.equal(kept(layer, kind), layer.mask)
    assert len(layer.weight._backward_hooks) == 1


@every
def test_follows_a_mask_that_changes_and_one_that_is_another(kind):
    layer = masked(kind)
    kept(layer, kind)
    layer.mask.copy_(mask_of(kind, 1))
    assert torch.equal(kept(layer, kind), mask_of(kind, 1))
    layer.mask = mask_of(kind, 2)
    assert torch.equal(kept(layer, kind), mask_of(kind, 2))
    assert len(layer.weight._backward_hooks) == 1


@every
def test_follows_another_weight(kind):
    layer = masked(kind)
    kept(layer, kind)
    layer.weight = nn.Parameter(torch.ones_like(layer.weight))
    assert torch.equal(kept(layer, kind), layer.mask)
    assert len(layer.weight._backward_hooks) == 1


@every
def test_a_call_with_another_weight_leaves_the_mask_on_the_first(kind):
    layer, x = masked(kind), torch.rand(INPUT[kind]) + 0.5
    other = torch.ones_like(layer.weight, requires_grad=True)
    for _ in range(2):
        layer.weight.grad = other.grad = None
        y = layer(x).sum()
        (y + torch.func.functional_call(layer, {"weight": other}, x).sum()).backward()
        assert torch.equal(layer.weight.grad != 0, layer.mask) and torch.equal(other.grad != 0, layer.mask)
    assert len(layer.weight._backward_hooks) == len(other._backward_hooks) == 1


@every
def test_code_that_takes_the_weight_alone_moves_no_pruned_entry(kind):
    """As attention does that splits the weight of one layer in three: the layer itself is never called."""
    for layer in (masked(kind), copy.deepcopy(masked(kind)), pickle.loads(pickle.dumps(masked(kind)))):
        assert torch.equal(moved(layer), layer.mask)


def moved(layer: nn.Module) -> torch.Tensor:
    """Where code that takes the weight and never calls the layer gives it a gradient."""
    layer.weight.grad = None
    (layer.weight - 1).square().sum().backward()
    return layer.weight.grad != 0


def by_assignment(layer: nn.Module, kind: str) -> None:
    other = masked(kind)
    other._take(DENSE[kind], mask_of(kind, 1))
    layer.load_state_dict({name: tensor.clone() for name, tensor in other.state_dict().items()}, assign=True)


CHANGED = {
    "frozen and thawed": lambda layer, kind: (layer.requires_grad_(False), layer.requires_grad_(True)),
    "another state, assigned": by_assignment,
    "another dtype": lambda layer, kind: layer.double(),
    "on meta and back": lambda layer, kind: layer.to_empty(device="meta").to_empty(device="cpu").load_state_dict(masked(kind).state_dict()),
}


@every
@pytest.mark.parametrize("change", CHANGED)
def test_code_that_takes_the_weight_alone_of_a_changed_layer_moves_no_pruned_entry(change, kind):
    layer = copy.deepcopy(masked(kind))  # with a bias of its own
    CHANGED[change](layer, kind)
    assert torch.equal(moved(layer), layer.mask)
    assert torch.equal(layer.weight != 0, layer.mask)
    # the hook is of the mask that the layer has now
    layer.mask.copy_(mask_of(kind, 2))
    assert torch.equal(moved(layer), mask_of(kind, 2))


@every
def test_a_weight_that_was_frozen_from_the_start_moves_no_pruned_entry_once_thawed(kind):
    dense = copy.deepcopy(DENSE[kind]).requires_grad_(False)
    layer = type(masked(kind)).from_dense(dense, mask_of(kind, 0))
    assert not layer.weight.requires_grad
    nn.ModuleList([layer]).requires_grad_()
    assert torch.equal(moved(layer), layer.mask)


@every
def test_weights_that_are_drawn_anew_stay_zero_where_pruned(kind):
    layer = masked(kind)
    before = layer.weight.clone()
    layer.reset_parameters()
    assert torch.equal(layer.weight != 0, layer.mask) and not torch.equal(layer.weight, before)


def by_torch(layer: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIED = {"deepcopy": copy.deepcopy, "pickle": lambda layer: pickle.loads(pickle.dumps(layer)), "save": by_torch}


@pytest.mark.parametrize("copied", COPIED.values(), ids=COPIED)
@every
def test_copies_mask_their_own(kind, copied):
    layer = masked(kind)
    kept(layer, kind)
    twin = copied(layer)
    twin.mask = mask_of(kind, 3)
    assert torch.equal(kept(twin, kind), mask_of(kind, 3))
    assert torch.equal(kept(layer, kind), mask_of(kind, 0))
    assert torch.equal(kept(twin.double().float(), kind), mask_of(kind, 3))


@every
def test_a_weight_that_is_not_trained_stays_so(kind):
    dense = copy.deepcopy(DENSE[kind]).requires_grad_(False)
    layer = type(masked(kind)).from_dense(dense, mask_of(kind, 0))
    layer(torch.rand(INPUT[kind], requires_grad=True)).sum().backward()
    assert not layer.weight.requires_grad and layer.weight.grad is None


@every
def test_a_weight_that_is_computed_is_masked_on_its_way(kind):
    layer = masked(kind)
    source = torch.ones_like(layer.weight, requires_grad=True)
    torch.func.functional_call(layer, {"weight": 2 * source}, torch.rand(INPUT[kind]) + 0.5).sum().backward()
    assert torch.equal(source.grad != 0, layer.mask)


class _Doubled(nn.Module):
    def forward(self, parameter: torch.Tensor) -> torch.Tensor:
        return 2 * parameter


@every
def test_parametrized_weights_and_biases_are_used_and_masked_on_their_way(kind):
    layer, x = masked(kind), torch.rand(INPUT[kind]) + 0.5
    doubled = layer.to_dense()
    for name in ("weight", "bias"):
        nn.utils.parametrize.register_parametrization(layer, name, _Doubled())
        doubled.register_parameter(name, nn.Parameter(2 * doubled.get_parameter(name).detach()))
        torch.testing.assert_close(layer(x), doubled(x))
    layer(x).sum().backward()
    assert torch.equal(layer.parametrizations.weight.original.grad != 0, layer.mask)


@every
def test_other_uses_of_the_weight_move_no_pruned_entry(kind):
    """A penalty on the weight, which the layer knows nothing of."""
    layer = masked(kind)
    (layer(torch.rand(INPUT[kind])).sum() + (layer.weight - 1).square().sum()).backward()
    assert not layer.weight.grad[~layer.mask].any()


@every
def test_infinite_gradients_are_zero_where_pruned(kind):
    layer = masked(kind)
    layer(torch.full(INPUT[kind], torch.inf)).sum().backward()
    assert not layer.weight.grad[~layer.mask].any() and torch.isinf(layer.weight.grad[layer.mask]).all()


@every
def test_who_masks_later_gets_the_gradient_as_it_is_for_as_long_as_it_lives(kind):
    layer = masked(kind)
    kept(layer, kind)
    later = LaterMask(layer)
    assert kept(layer, kind).all() and not layer.weight._backward_hooks
    layer.mask = mask_of(kind, 1)  # not the one that it knows
    assert torch.equal(kept(layer, kind), layer.mask)
    later = LaterMask(layer)
    assert kept(layer, kind).all()
    del later
    assert torch.equal(kept(layer, kind), layer.mask)


def test_a_hook_that_is_gone_costs_nothing_and_others_stay():
    """An empty list of hooks on a weight is still gone through, in Python, in every backward."""
    layer, seen = MaskedLinear.from_dense(nn.Linear(6, 4), torch.rand(4, 6) < 0.5), []
    assert len(layer.weight._backward_hooks) == 1
    later = LaterMask(layer)
    layer(torch.randn(3, 6)).sum().backward()
    assert layer.weight._backward_hooks is None
    del later
    layer(torch.randn(3, 6))  # masks its gradients itself again
    layer.weight.register_hook(lambda grad: seen.append(grad.clone()))
    later = LaterMask(layer)
    layer(torch.ones(3, 6)).sum().backward()
    assert len(seen) == 1 and bool((seen[0] == 3).all()) and later is not None


class _Shifted(nn.Module):
    """Not zero where its argument is."""

    def forward(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter + 1


@every
def test_a_parametrization_that_keeps_no_zeros_is_masked_in_the_forward_too(kind):
    """Its gradient is then that of what was computed."""
    layer, x = copy.deepcopy(masked(kind)).double(), torch.rand(INPUT[kind], dtype=torch.float64)
    nn.utils.parametrize.register_parametrization(layer, "weight", _Shifted())
    original = layer.parametrizations.weight.original
    expected = CALL[kind](x, (original.detach() + 1) * layer.mask, layer.bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(torch.func.functional_call(layer, dict(layer.named_parameters()), (x,)), expected)

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, {"parametrizations.weight.original": weight}, (x,)).square().sum()

    assert torch.autograd.gradcheck(loss, original.detach().clone().requires_grad_())


class _Mixed(nn.Module):
    """Every entry from all."""

    def forward(self, parameter: torch.Tensor) -> torch.Tensor:
        return parameter / parameter.norm()


@every
def test_what_a_weight_is_computed_from_has_a_gradient_at_pruned_places_too(kind):
    """Once it was the weight itself, whose gradient was masked."""
    layer, x = masked(kind), torch.rand(INPUT[kind]) + 0.5
    layer(x).sum().backward()
    nn.utils.parametrize.register_parametrization(layer, "weight", _Mixed())
    original = layer.parametrizations.weight.original
    with torch.no_grad():
        original.add_(1)
    original.grad = None
    layer(x).sum().backward()
    leaf = original.detach().clone().requires_grad_()
    CALL[kind](x, torch.where(layer.mask, leaf / leaf.norm(), 0), layer.bias.detach()).sum().backward()
    torch.testing.assert_close(original.grad, leaf.grad)
    assert original.grad[~layer.mask].any()
    for leave in (True, False):
        nn.utils.parametrize.remove_parametrizations(layer, "weight", leave_parametrized=leave)
        assert torch.equal(kept(layer, kind), layer.mask)
        torch.testing.assert_close(layer(x), CALL[kind](x, layer.to_dense_weight(), layer.bias))
        assert not layer.weight[~layer.mask].any()
        nn.utils.parametrize.register_parametrization(layer, "weight", _Shifted())
        assert layer(x).isfinite().all()


@every
def test_a_computed_weight_compiles(kind):
    layer, x = masked(kind), torch.rand(INPUT[kind])
    nn.utils.parametrize.register_parametrization(layer, "weight", _Shifted())
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
