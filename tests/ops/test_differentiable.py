"""The short way to call an operation gives, bit for bit, what that gives, and steps aside where more than eager autograd looks on."""

from __future__ import annotations

import gc
import sys
import weakref

import pytest
import torch
from differentiable_cases import CASES, call_of
from op_cases import sparse_matrix
from torch.utils._python_dispatch import TorchDispatchMode

from grasp_sparse.ops import csr_linear, differentiable


def _results(y) -> list[torch.Tensor]:
    return [t for t in ((y,) if isinstance(y, torch.Tensor) else y) if t.requires_grad]


def test_there_is_a_short_way_for_every_case():
    assert {case.partition(",")[0] for case in CASES} == set(differentiable._ways)


@pytest.mark.parametrize("case", CASES)
def test_same_bits_and_same_derivatives(case):
    torch.manual_seed(0)
    name, inputs = call_of(case)
    leaves = [a for a in inputs if isinstance(a, torch.Tensor) and a.requires_grad]
    found = []
    for run in (lambda: getattr(torch.ops.grasp_sparse, name)(*inputs), lambda: differentiable.call(name, *inputs)):
        torch.manual_seed(1)
        results = _results(run())
        seeds = [torch.randn_like(t) for t in results]
        first = torch.autograd.grad(results, leaves, seeds, create_graph=True, materialize_grads=True)
        wanted = [g for g in first if g.requires_grad]
        seeds = [torch.randn_like(g) for g in wanted]
        second = torch.autograd.grad(wanted, leaves, seeds, materialize_grads=True) if wanted else ()
        found.append([*results, *first, *second])
    assert len(found[0]) == len(found[1]) > len(leaves)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def _linear():
    values, indices, _ = sparse_matrix(6, 8, 0.5)
    return values.requires_grad_(), indices, torch.randn(5, 8, dtype=torch.float64, requires_grad=True)


def test_eager_calls_take_it():
    values, indices, x = _linear()
    assert type(csr_linear(x, values, indices).grad_fn).__name__ == "csr_spmmBackward"
    with torch.no_grad():
        assert csr_linear(x, values, indices).grad_fn is None


def test_dispatch_modes_see_every_operation():
    """Those that count or fake operations, with and without a graph, forward and backward."""
    values, indices, x = _linear()
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Watch():
        with torch.no_grad():
            csr_linear(x, values, indices)
        csr_linear(x, values, indices).sum().backward()
    ours = [name for name in seen if name.startswith("grasp_sparse")]
    assert ours == ["grasp_sparse.csr_spmm.default"] * 2 + ["grasp_sparse.csr_spmm_backward.default"]


def test_autograd_is_not_asked_about_what_nobody_differentiates():
    values, indices, x = _linear()
    entered = []

    def watch(frame, event, _):
        if event == "call" and frame.f_code.co_filename.endswith("torch/_library/autograd.py"):
            entered.append(frame.f_code.co_name)

    sys.setprofile(watch)
    try:
        with torch.no_grad():
            csr_linear(x, values, indices)
        csr_linear(x, values, indices).sum().backward()
        assert not entered
        torch.ops.grasp_sparse.csr_spmm(values, *indices, None, x)
    finally:
        sys.setprofile(None)
    assert entered


def test_compilers_see_the_operation():
    values, indices, x = _linear()
    seen = []

    def backend(graph, _):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    torch._dynamo.reset()
    torch.compile(lambda x: csr_linear(x, values, indices), backend=backend, fullgraph=True)(x)
    assert [str(target) for target in seen] == ["grasp_sparse.csr_spmm"]


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_tracers_see_the_operation():
    values, indices, x = _linear()
    traced = torch.jit.trace(lambda x, values: csr_linear(x, values, indices), (x, values))
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    assert "grasp_sparse::csr_spmm" in kinds and "prim::PythonOp" not in kinds


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_mapped_call_sees_the_operation():
    values, indices, x = _linear()
    stacked = torch.stack([x.detach(), -x.detach()])
    y = torch.func.vmap(lambda x: csr_linear(x, values, indices))(stacked)
    expected = csr_linear(stacked, values, indices)
    torch.testing.assert_close(y, expected)
    got, want = (torch.autograd.grad(result.square().sum(), values)[0] for result in (y, expected))
    torch.testing.assert_close(got, want)


def test_what_was_saved_and_then_written_to_is_noticed():
    values, indices, x = _linear()
    y = csr_linear(x * 1, values, indices).sum()
    with torch.no_grad():
        values.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("relu", [False, True])
def test_nothing_outlives_the_result(relu):
    values, indices, x = _linear()
    gc.collect()
    gc.disable()
    try:
        inner = x * 1
        y = csr_linear(inner, values, indices, None, relu)
        kept = weakref.ref(inner), weakref.ref(y)
        del inner, y
        assert [reference() for reference in kept] == [None, None]
    finally:
        gc.enable()
