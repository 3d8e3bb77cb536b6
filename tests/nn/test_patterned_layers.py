"""Layers under every pattern stand for the pruned dense layer, whichever way they store it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from layer_cases import DENSE, pruned, sparse_of
from torch import nn

import grasp_sparse as gs
from grasp_sparse.nn import SparseConv2d, SparseLinear
from grasp_sparse.patterns import get_pattern
from grasp_sparse.pruning import make_masks

pytestmark = pytest.mark.filterwarnings("ignore:Layers kept below", "ignore:Using padding='same'")

BLOCKS = ("block(2, 2)", "block(4, 3)", "block(5, 3)", "block(16, 32)")  # of weights [12, 20] and [6, 4, …]: whole and ragged
PATTERNS = (*BLOCKS, "vector(4)", "channel", "channel(in)", "nm(2, 3)")


def mask_of(module: nn.Module, written: str) -> torch.Tensor:
    fixed = get_pattern(written).density is not None
    masks = make_masks({"w": torch.rand(module.weight.shape)}, None if fixed else 0.5, written, min_per_layer=0)
    return masks["w"]


def layer_of(module: nn.Module, written: str, mask: torch.Tensor | None = None) -> nn.Module:
    kind = SparseLinear if isinstance(module, nn.Linear) else SparseConv2d
    return kind.from_dense(module, mask_of(module, written) if mask is None else mask, get_pattern(written).block_size)


def is_clean(layer: nn.Module, values: torch.Tensor) -> bool:
    """Nothing past the edge of the weight."""
    return torch.equal(layer.storage.gather(layer.placed(values), layer.indices), values)


@pytest.mark.parametrize("written", PATTERNS)
@pytest.mark.parametrize("case", DENSE.values(), ids=DENSE)
def test_forward_and_gradients_equal_the_pruned_dense_layer(case, written):
    dense, x = case()
    dense, x = dense.double(), x.double()
    mask = mask_of(dense, written)
    layer = copy.deepcopy(layer_of(dense, written, mask))
    pruned(dense, mask)
    inputs = x.clone().requires_grad_(), x.clone().requires_grad_()
    for module, given in zip((layer, dense), inputs, strict=True):
        module(given).square().sum().backward()
    torch.testing.assert_close(layer(x), dense(x))
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    if dense.bias is not None:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    torch.testing.assert_close(layer.placed(layer.values.grad), dense.weight.grad * mask)
    assert is_clean(layer, layer.values) and is_clean(layer, layer.values.grad)


@pytest.mark.parametrize("written", PATTERNS)
@pytest.mark.parametrize("case", DENSE.values(), ids=DENSE)
def test_round_trip_is_exact(case, written):
    dense, _ = case()
    mask = mask_of(dense, written)
    layer = layer_of(dense, written, mask)
    expected = pruned(copy.deepcopy(dense), mask)
    back = layer.to_dense()
    assert repr(back) == repr(dense) and torch.equal(back.weight, expected.weight) and back.bias is dense.bias
    assert torch.equal(layer.to_dense_weight(), expected.weight) and torch.equal(layer.mask, mask)
    assert (layer.nnz, layer.density) == (int(mask.sum()), pytest.approx(float(mask.float().mean())))


def test_values_and_repr_say_what_is_stored():
    dense = nn.Linear(20, 12)
    layer = layer_of(dense, "block(5, 3)")
    assert layer.block_size == (5, 3) and layer.values.shape == (layer.indices.nnz, 5, 3) and layer.indices.shape == (3, 7)
    assert f"nnz={layer.nnz}, density={layer.density:.4g}, block_size=(5, 3)" in repr(layer)
    assert "block_size=(5, 3)" in repr(layer.to("meta"))
    single = layer_of(dense, "vector(4)")
    assert single.block_size is None and single.values.shape == (1, single.nnz) and "block_size" not in repr(single)
    conv = layer_of(nn.Conv2d(7, 5, 3), "block(2, 4)")
    assert conv.indices.shape == (3, 2 * 9) and "block_size=(2, 4)" in repr(conv)


def test_flags_of_the_source_are_kept():
    dense = nn.Linear(6, 4).eval()
    dense.weight.requires_grad_(False)
    layer = layer_of(dense, "block(3, 2)")
    assert not layer.training and not layer.values.requires_grad and layer.bias.requires_grad


def test_masks_and_sizes_that_do_not_fit():
    dense = nn.Linear(6, 4)
    with pytest.raises(ValueError, match=r"whole \[2, 2\] blocks"):
        SparseLinear.from_dense(dense, torch.eye(4, 6).bool(), (2, 2))
    with pytest.raises(ValueError, match="two positive integers"):
        SparseLinear.from_dense(dense, torch.ones(4, 6).bool(), (0, 2))
    layer = layer_of(dense, "block(2, 2)")
    with pytest.raises(ValueError, match=r"indices of a \[2, 4\] matrix, got \[2, 3\]"):
        SparseLinear(8, 4, layer.values, layer.indices)
    with pytest.raises(ValueError, match="Expected values of shape"):
        SparseLinear(6, 4, layer.values[1:], layer.indices)


@pytest.mark.parametrize("case", ["linear", "conv-no-bias-stride-pad"])
def test_finite_differences(case):
    dense, x = DENSE[case]()
    layer = layer_of(dense.double(), "block(5, 3)")
    layer.values.data.mul_(3)

    def function(x, values):
        return torch.func.functional_call(layer, {"values": values}, x)

    arguments = (x.double()[:1].requires_grad_(), layer.values)
    assert torch.autograd.gradcheck(function, arguments) and torch.autograd.gradgradcheck(function, arguments)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("case", ["linear", "conv"])
def test_compiles_to_one_graph(case, backend):
    torch._dynamo.reset()
    dense, x = DENSE[case]()
    layer = layer_of(dense, "block(5, 3)")
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    results = []
    for module in (compiled, layer):
        y = module(x).relu()
        results.append((y, *torch.autograd.grad(y.square().sum(), [*layer.parameters()])))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
    torch._dynamo.reset()


@pytest.mark.parametrize("convert", ["half", "bfloat16", "double"])
def test_conversions_keep_the_indices(convert):
    layer = getattr(layer_of(nn.Linear(6, 4), "block(3, 4)"), convert)()
    x = torch.randn(3, 6, dtype=layer.values.dtype)
    assert layer(x).dtype == x.dtype
    layer.type(torch.float32)
    assert {buffer.dtype for buffer in layer.buffers()} == {torch.int32}
    layer(x.float())


def test_autocast():
    layer = layer_of(nn.Linear(20, 12), "block(5, 3)")
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(3, 20))
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and layer.values.grad.dtype == torch.float32


def test_pickles_and_copies():
    dense, x = DENSE["conv"]()
    layer = layer_of(dense, "block(5, 3)")
    stream = io.BytesIO()
    torch.save(layer, stream)
    stream.seek(0)
    for other in (torch.load(stream, weights_only=False), copy.deepcopy(layer)):
        assert torch.equal(other(x), layer(x)) and other.block_size == (5, 3)


OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2, nesterov=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True),
    "gs.SGD": lambda p: gs.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-2),
    "gs.AdamW": lambda p: gs.optim.AdamW(p, lr=0.01),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("written", PATTERNS)
def test_training_leaves_exact_zeros_where_pruned_and_past_the_edge(written, make):
    dense, x = DENSE["conv"]()
    mask = mask_of(dense, written)
    layer = layer_of(dense, written, mask)
    before, optimizer = layer.values.detach().clone(), make(layer.parameters())
    for _ in range(4):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
    if layer.nnz:
        assert not torch.equal(layer.values, before)
    assert is_clean(layer, layer.values)
    assert bool((layer.to_dense_weight()[~mask] == 0).all())


class TestStateDict:
    SHAPE = (12, 20)

    def _layer(self, kept: int = 9, block=(5, 3)) -> nn.Module:
        """12 x 20 in a grid of 3 x 7 blocks, ragged both ways."""
        grid = (torch.randperm(21) < kept).view(3, 7)
        mask = grid.repeat_interleave(5, 0).repeat_interleave(3, 1)[:12, :20]
        return SparseLinear.from_dense(nn.Linear(20, 12), mask, block)

    def _same(self, a: nn.Module, b: nn.Module) -> bool:
        tensors = zip((a.values, a.bias, *a.indices), (b.values, b.bias, *b.indices), strict=True)
        return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in tensors)

    @pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
    @pytest.mark.parametrize("kept", [0, 9, 21])
    def test_another_structure_of_as_many_blocks_can_be_loaded(self, kept, assign):
        source, target = self._layer(kept), self._layer(kept)
        stream = io.BytesIO()
        torch.save(source.state_dict(), stream)
        stream.seek(0)
        target.load_state_dict(torch.load(stream, weights_only=True), assign=assign)
        assert self._same(source, target) and source.nnz == target.nnz
        x = torch.randn(5, 20)
        assert torch.equal(source(x), target(x))
        target(x).sum().backward()

    @pytest.mark.parametrize("assign", [False, True], ids=["copy", "assign"])
    def test_what_a_checkpoint_holds_past_the_edge_is_zeroed(self, assign):
        source, target = self._layer(21), self._layer(21)
        state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
        state["values"][source.values == 0] = 7.0
        assert not torch.equal(state["values"], source.values)
        target.load_state_dict(state, assign=assign)
        assert self._same(source, target)

    @pytest.mark.parametrize(
        "other, got",
        [
            (lambda self: self._layer(10), "got 10"),
            (lambda self: SparseLinear.from_dense(nn.Linear(20, 12), torch.ones(12, 20).bool(), (4, 4)), "got 15 blocks of 4x4"),
            (lambda self: sparse_of(nn.Linear(20, 12), torch.rand(12, 20) < 0.5), "got nnz = "),
        ],
        ids=["more blocks", "other blocks", "single weights"],
    )
    def test_another_storage_is_refused_and_changes_nothing(self, other, got):
        target = nn.Sequential(self._layer(9))
        before = copy.deepcopy(target)
        with pytest.raises(RuntimeError, match=f"0: Expected a checkpoint with 9 blocks of 5x3 weights, {got}.*load_sparse"):
            target.load_state_dict(nn.Sequential(other(self)).state_dict())
        assert self._same(target[0], before[0])

    def test_blocks_are_refused_by_a_layer_of_single_weights(self):
        target = sparse_of(nn.Linear(20, 12), torch.ones(12, 20).bool())
        with pytest.raises(RuntimeError, match="with nnz = 240 weights, got 9 blocks of 5x3 weights"):
            target.load_state_dict(self._layer().state_dict())

    CORRUPT = {
        "column out of bounds": lambda s: s["col_indices"].__setitem__(3, 7),
        "negative column": lambda s: s["col_indices"].__setitem__(3, -1),
        "block listed twice": lambda s: s["col_indices"].__setitem__(1, int(s["col_indices"][0])),
        "rows fall": lambda s: s["crow_indices"].__setitem__(1, 10_000),
        "crow too short": lambda s: s.update(crow_indices=s["crow_indices"][:-1]),
        "crow of single rows": lambda s: s.update(crow_indices=torch.linspace(0, 15, 13).int()),
        "cols too short": lambda s: s.update(col_indices=s["col_indices"][:-1]),
        "values too few": lambda s: s.update(values=s["values"][:-1]),
        "values flat": lambda s: s.update(values=s["values"].flatten(1)),
        "values 4-D": lambda s: s.update(values=s["values"].unsqueeze(0)),
        "values integer": lambda s: s.update(values=s["values"].int()),
        "blocks without rows": lambda s: s.update(values=s["values"][:, :0]),
        "other block size": lambda s: s.update(values=s["values"].transpose(1, 2)),
        "indices float": lambda s: s.update(col_indices=s["col_indices"].float()),
        "indices missing": lambda s: s.pop("col_indices"),
    }

    @pytest.mark.parametrize("strict", [True, False], ids=["strict", "lenient"])
    @pytest.mark.parametrize("change", CORRUPT.values(), ids=CORRUPT)
    def test_corrupt_checkpoint_names_the_layer_and_changes_nothing(self, change, strict):
        model = nn.Sequential(nn.ReLU(), self._layer(15))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        state = {name: tensor.clone() for name, tensor in self._layer(15).state_dict().items()}
        change(state)
        with pytest.raises(RuntimeError, match="1: Expected"):
            model.load_state_dict({f"1.{name}": tensor for name, tensor in state.items()}, strict=strict)
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
        model(torch.randn(2, 20)).sum().backward()
