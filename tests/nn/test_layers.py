"""Sparse and masked layers stand for a dense layer whose weight was multiplied by the mask."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from layer_cases import DENSE, pruned, random_mask, sparse_of
from torch import nn

from grasp_sparse.nn import MaskedConv2d, MaskedLinear, SparseConv2d, SparseLinear


def masked_of(module: nn.Module, mask: torch.Tensor) -> nn.Module:
    return (MaskedLinear if isinstance(module, nn.Linear) else MaskedConv2d).from_dense(module, mask)


BOTH = pytest.mark.parametrize("make", [sparse_of, masked_of], ids=["sparse", "masked"])


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@BOTH
@pytest.mark.parametrize("density", [0, 0.3, 1])
@pytest.mark.parametrize("case", DENSE.values(), ids=DENSE)
def test_forward_and_gradients_equal_the_pruned_dense_layer(case, density, make):
    dense, x = case()
    dense, x = dense.double(), x.double()
    mask = random_mask(dense, density)
    layer = copy.deepcopy(make(dense, mask))
    pruned(dense, mask)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    for module, given in zip((layer, dense), inputs, strict=True):
        module(given).square().sum().backward()
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    if dense.bias is not None:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    if make is sparse_of:
        torch.testing.assert_close(layer.values.grad[0], dense.weight.grad[mask])
    else:
        torch.testing.assert_close(layer.weight.grad, dense.weight.grad * mask)


@pytest.mark.filterwarnings("ignore:Initializing zero-element", "ignore:grad and param do not obey")
@pytest.mark.parametrize("block_size", [None, (4, 4)], ids=["unstructured", "block(4, 4)"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 5, 0), (2, 0, 0)], ids=str)
def test_a_linear_layer_without_inputs_gives_its_bias(shape, bias, block_size):
    """A layer behind which everything was pruned away: how many rows x has, its elements do not tell."""
    dense = nn.Linear(0, 6, bias=bias)
    layer = SparseLinear.from_dense(dense, torch.ones_like(dense.weight, dtype=torch.bool), block_size)
    x = torch.randn(shape, requires_grad=True)
    y, expected = layer(x), torch.nn.functional.linear(x, dense.weight, dense.bias)
    assert torch.equal(y, expected) and y.shape == (*shape[:-1], 6)
    wanted = (x, layer.bias) if bias else (x,)  # the bias is that of the dense layer
    grads = [torch.autograd.grad(result, wanted, torch.ones_like(result)) for result in (y, expected)]
    assert all(map(torch.equal, *grads))


@BOTH
@pytest.mark.parametrize("case", DENSE.values(), ids=DENSE)
def test_round_trip_is_exact(case, make):
    dense, _ = case()
    mask = random_mask(dense)
    layer = make(dense, mask)
    expected = pruned(copy.deepcopy(dense), mask)
    back = layer.to_dense()
    assert type(back) is type(dense)
    assert repr(back) == repr(dense)
    assert torch.equal(back.weight, expected.weight)
    assert torch.equal(layer.to_dense_weight(), expected.weight)
    assert torch.equal(layer.mask, mask)
    assert back.bias is dense.bias
    assert (layer.nnz, layer.density) == (int(mask.sum()), pytest.approx(float(mask.float().mean())))


@BOTH
def test_source_is_left_alone_and_flags_are_kept(make):
    dense = nn.Linear(6, 4).eval()
    dense.weight.requires_grad_(False)
    before = dense.weight.clone()
    layer = make(dense, random_mask(dense))
    assert torch.equal(dense.weight, before)
    weight = layer.values if make is sparse_of else layer.weight
    assert not layer.training and not weight.requires_grad and layer.bias.requires_grad
    assert not layer.to_dense().weight.requires_grad and not layer.to_dense().training


@BOTH
def test_wrong_mask_is_refused(make):
    dense = nn.Linear(6, 4)
    for mask in (torch.ones(4, 5).bool(), torch.ones(4, 6), torch.ones(24).bool()):
        with pytest.raises(ValueError, match=r"Expected a bool mask of shape \[4, 6\]"):
            make(dense, mask)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_gradients_that_are_not_finite_stop_at_the_mask(bad, dtype):
    dense = nn.Linear(6, 4).to(dtype)
    mask = random_mask(dense)
    layer = masked_of(dense, mask)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for _ in range(2):
        layer(torch.full((3, 6), bad, dtype=dtype)).sum().backward()
        assert layer.weight.grad.dtype == dtype
        assert (layer.weight.grad[~mask] == 0).all() and not layer.weight.grad[mask].isfinite().any()
        optimizer.step()
    assert (layer.weight[~mask] == 0).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_masked_gradients_are_those_of_a_masked_weight(layout):
    dense = nn.Conv2d(3, 8, 3).to(memory_format=layout)
    mask = random_mask(dense)
    layer, x = masked_of(dense, mask), torch.randn(2, 3, 6, 6).to(memory_format=layout)
    pruned(dense, mask)
    for module in (layer, dense):
        module(x).square().sum().backward()
    assert torch.equal(layer.weight.grad, dense.weight.grad * mask)


def test_masked_layers_have_second_derivatives():
    layer = masked_of(nn.Linear(5, 4).double(), torch.rand(4, 5) < 0.5)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def function(x, weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,)).tanh()

    weight = layer.weight.detach().clone().requires_grad_()
    masked = weight.detach().clone().requires_grad_()
    gradient = torch.autograd.grad(function(x, weight, layer.bias).sum(), weight, create_graph=True)[0]
    second = torch.autograd.grad(gradient.square().sum(), weight)[0]
    gradient = torch.autograd.grad(nn.functional.linear(x, masked, layer.bias).tanh().sum(), masked, create_graph=True)[0]
    expected = torch.autograd.grad((gradient * layer.mask).square().sum(), masked)[0] * layer.mask
    torch.testing.assert_close(second, expected)


def test_a_masked_layer_works_under_functional_transforms():
    layer, x = masked_of(nn.Linear(5, 4), torch.rand(4, 5) < 0.5), torch.randn(3, 5)
    parameters = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    each = torch.func.vmap(torch.func.grad(lambda p, x: torch.func.functional_call(layer, p, (x,)).sum()), in_dims=(None, 0))
    torch.testing.assert_close(each(parameters, x)["weight"], x[:, None].expand(3, 4, 5) * layer.mask)


def test_a_frozen_masked_layer_gives_no_gradient():
    dense = nn.Linear(6, 4, bias=False)
    dense.weight.requires_grad_(False)
    assert not masked_of(dense, random_mask(dense))(torch.ones(3, 6)).requires_grad


def test_values_are_the_only_weight():
    dense = nn.Conv2d(4, 6, 3)
    layer = sparse_of(dense, random_mask(dense))
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {"values": (1, layer.nnz), "bias": (6,)}
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match="use .values"):
        layer.weight


def test_attributes_and_repr_are_those_of_torch():
    dense = nn.Conv2d(4, 6, (3, 2), stride=2, padding="valid", dilation=2, bias=False)
    layer = sparse_of(dense, random_mask(dense))
    for name in ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "bias"):
        assert getattr(layer, name) == getattr(dense, name)
    assert f"nnz={layer.nnz}, density={layer.density:.4g}" in repr(layer)
    linear = sparse_of(nn.Linear(6, 4), torch.ones(4, 6, dtype=torch.bool))
    assert repr(linear) == "SparseLinear(in_features=6, out_features=4, bias=True, nnz=24, density=1)"


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double", "float"])
@BOTH
def test_conversion_leaves_indices_and_masks_alone(make, convert):
    dense = nn.Linear(6, 4)
    layer = getattr(make(dense, random_mask(dense)), convert)()
    dtype = next(layer.parameters()).dtype
    x = torch.randn(3, 6, dtype=dtype)
    assert layer(x).dtype == dtype
    layer.type(torch.float32)  # converts integer buffers as well, if it is let
    assert {buffer.dtype for buffer in layer.buffers()} == ({torch.int32} if make is sparse_of else {torch.bool})
    layer(x.float())


def test_construction_checks_its_parts():
    dense = nn.Linear(6, 4)
    layer = sparse_of(dense, random_mask(dense))
    with pytest.raises(ValueError, match=r"indices of a \[4, 5\] matrix, got \[4, 6\]"):
        SparseLinear(5, 4, layer.values, layer.indices)
    with pytest.raises(ValueError, match="Expected values of shape"):
        SparseLinear(6, 4, torch.randn(layer.nnz), layer.indices)
    with pytest.raises(ValueError, match="Expected bias of shape"):
        SparseConv2d(6, 4, (1, 1), layer.values, layer.indices, torch.randn(6))


@BOTH
def test_whole_layer_can_be_pickled_and_copied(make):
    dense, x = DENSE["conv"]()
    layer = make(dense, random_mask(dense))
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for other in (torch.load(stream, weights_only=False), copy.deepcopy(layer)):
        assert torch.equal(other(x), layer(x))
        assert all(a is not b for a, b in zip(other.parameters(), layer.parameters(), strict=True))


def test_masked_weight_stays_zero_under_infinite_gradients():
    dense = nn.Linear(6, 4)
    mask = random_mask(dense)
    layer = masked_of(dense, mask)
    layer(torch.full((1, 6), float("inf"))).sum().backward()
    assert (layer.weight.grad[~mask] == 0).all()


def test_masked_keeps_the_memory_format():
    dense = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    layer = masked_of(dense, random_mask(dense))
    for tensor in (layer.weight, layer.mask, layer.to_dense_weight()):
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_masked_keeps_groups():
    dense = nn.Conv2d(4, 6, 3, groups=2, padding=1)
    mask = random_mask(dense)
    layer = masked_of(dense, mask)
    x = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(layer(x), pruned(dense, mask)(x))


@pytest.mark.parametrize("kind", [SparseLinear, MaskedLinear, SparseConv2d, MaskedConv2d], ids=lambda kind: kind.__name__)
def test_the_argument_has_the_name_that_torch_gives_it(kind):
    dense, x = (nn.Linear(6, 4), torch.randn(3, 6)) if issubclass(kind, (SparseLinear, MaskedLinear)) else (
        nn.Conv2d(3, 4, 3), torch.randn(2, 3, 5, 5)
    )  # fmt: skip
    layer = kind.from_dense(dense, torch.rand(dense.weight.shape) < 0.5)
    assert torch.equal(layer(input=x), layer(x))


@pytest.mark.parametrize("case", ["linear", "conv", "conv-no-bias"])
@pytest.mark.parametrize("block_size", [None, (8, 8)])
def test_parameters_are_drawn_anew_as_torch_draws_them(case, block_size):
    module = nn.Linear(200, 60) if case == "linear" else nn.Conv2d(40, 60, 3, bias="no-bias" not in case)
    mask = random_mask(module) if block_size is None else torch.ones_like(module.weight, dtype=torch.bool)
    layer = sparse_of(module, mask, block_size)
    before, indices = layer.values.detach().clone(), [index.clone() for index in layer.indices]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.fill_(torch.nan)
    layer.reset_parameters()
    assert layer.values.shape == before.shape and all(map(torch.equal, layer.indices, indices))
    drawn, bound = layer.to_dense_weight().detach()[layer.mask], module.weight[0].numel() ** -0.5
    assert drawn.abs().max() <= bound and drawn.std() == pytest.approx(module.weight.std().item(), rel=0.1)
    assert not torch.equal(layer.values, before)
    if block_size is not None:  # 60 rows are no whole number of blocks of 8
        assert torch.equal(layer.storage.gather(layer.to_dense_weight(), layer.indices), layer.values)
    if layer.bias is not None:
        assert layer.bias.abs().max() <= bound and len(layer.bias.unique()) > 1
