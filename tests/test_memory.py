"""Memory scales with the kept weights, and a steady training step allocates its results and nothing else."""

from __future__ import annotations

import bisect
import itertools
import json
import os
import platform
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from op_outputs import Call, OperationOutputs
from sparse_training import sparse_step
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, ResNet

import grasp_sparse as gs
from grasp_sparse import _extension
from grasp_sparse.formats import csr_from_mask
from grasp_sparse.nn import BatchNorm2d, SparseConv2d, SparseLayer, SparseLinear, conv_norm_relu
from grasp_sparse.ops.schema import CONV_NORM_SCHEMAS, NORM_SCHEMAS, POOL_SCHEMAS, SCHEMAS
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.footprint import measure_footprint
from grasp_sparse.train.models import ResNet32, vgg_small

compiled = pytest.mark.skipif(not _extension.status().loaded, reason="compiled kernels are not loaded")
BATCH = torch.zeros(2, 1, 28, 28), torch.zeros(2, dtype=torch.int64)


def _sparse_vgg(density: float = 0.05) -> tuple[nn.Module, list[SparseLayer], int]:
    """The model, its sparse layers, and how many numbers its parameters hold outside of them."""
    model = vgg_small()
    masks = {name: torch.rand_like(p) < density for name, p in model.named_parameters() if p.dim() > 1}
    gs.sparsify_(model, masks, max_density=1.0)
    layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
    return model, layers, sum(p.numel() for p in model.parameters()) - sum(layer.nnz for layer in layers)


def test_training_keeps_twelve_bytes_a_kept_weight_and_twelve_for_its_indices():
    """float32 weight, gradient and momentum; int32 column, row and permutation. A dense weight costs the first twelve."""
    model, layers, dense = _sparse_vgg()
    assert len(layers) == 6 and dense < 2000
    nnz = sum(layer.nnz for layer in layers)
    footprint = measure_footprint(TrainConfig(), model, BATCH)
    trained = footprint.parameters + footprint.gradients + footprint.optimizer
    assert trained == 12 * (nnz + dense)
    pointers = sum(layer.crow_indices.numel() + layer.ccol_indices.numel() for layer in layers)
    assert footprint.indices == 12 * nnz + 4 * pointers
    assert footprint.total <= 0.15 * 12 * sum(layer.weight_shape.numel() for layer in layers)


@pytest.mark.parametrize("during_backward", [False, True])
def test_optimizers_hold_one_number_a_weight_and_state(during_backward):
    model, layers, dense = _sparse_vgg()
    weights = sum(layer.nnz for layer in layers) + dense
    for kind, options, moments in ((gs.optim.SGD, dict(momentum=0.9), 1), (gs.optim.AdamW, {}, 2)):
        optimizer = kind(model.parameters(), lr=0.01, during_backward=during_backward, **options)
        nn.functional.cross_entropy(model(BATCH[0]), BATCH[1]).backward()
        gradients = sum(p.grad.numel() for p in model.parameters() if p.grad is not None)
        assert gradients == (0 if during_backward else weights)
        optimizer.step()
        optimizer.zero_grad()
        held = [t for state in optimizer.state.values() for t in state.values() if t.dim() > 0]
        assert sum(t.untyped_storage().nbytes() for t in held) == moments * 4 * weights
        optimizer.stop_during_backward()


def _profile() -> torch.profiler.profile:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)


def _allocations(run) -> tuple[list[int], list[Tensor]]:
    """Bytes of every block that torch's CPU allocator gave out during ``run``, largest first, and what it returned."""
    with _profile() as profile:
        outputs = run()
    sizes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return sorted((size for size in sizes if size > 0), reverse=True), list(outputs)


def _peak_of_updates(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the parameters plus the most that is held of what two first steps allocated, at any time while they update.

    What the passes themselves hold is gone by then. Whoever keeps it: allocations are counted, not tensors that can be found.
    """
    with _profile() as profile:
        for _ in range(2):
            nn.functional.cross_entropy(model(BATCH[0]), BATCH[1]).backward()
            with torch.profiler.record_function("update"):
                optimizer.step()
            optimizer.zero_grad()
    events = sorted(profile.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    updates = [(event.start_ns(), event.end_ns()) for event in events if event.name() == "update"]
    held, peaks = 0, [0, 0]
    for event in events:
        before = held
        held += event.nbytes() if event.name() == "[memory]" else 0
        for i, (start, end) in enumerate(updates):
            if start <= event.start_ns() <= end:
                peaks[i] = max(peaks[i], before, held)
    assert len(updates) == 2 and all(peaks)
    return max(peaks) + sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize(
    "make, allowed",
    [(gs.optim.SGD, 1.01), (partial(torch.optim.SGD, foreach=False), 1.6), (partial(torch.optim.SGD, foreach=True), 1.6)],
    ids=["ours", "torch", "torch-foreach"],
)
def test_the_peak_of_training_is_what_the_kept_weights_take(make, allowed):
    """Weight, gradient and momentum, four bytes each, and what an optimizer takes on the way: torch's with weight decay copies."""
    model, layers, dense = _sparse_vgg()
    optimizer = make(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    kept = sum(layer.nnz for layer in layers) + dense
    assert 12 * kept <= _peak_of_updates(model, optimizer) <= 12 * kept * allowed


def _passes():
    """One call of each operation of the sparse families, of batch norm and of pooling."""
    ops, window = torch.ops.grasp_sparse, ([3, 3], [1, 1], [1, 1, 1, 1], [1, 1])
    indices = csr_from_mask(torch.rand(24, 16 * 9) < 0.2)
    values, bias = torch.randn(1, indices.nnz), torch.randn(24)
    x, g = torch.randn(40, 16 * 9), torch.randn(40, 24)
    image, g_image = torch.randn(5, 16, 9, 9), torch.randn(5, 24, 9, 9).to(memory_format=torch.channels_last)
    by_channels = image.to(memory_format=torch.channels_last)
    behind, z, *statistics = ops.csr_conv2d_norm_train(values, *indices, bias, by_channels, g_image, bias, bias, 1e-5, True, *window)
    weight = torch.ones(16)
    y, mean, var = ops.batch_norm_train(image, image, weight, weight, 1e-5, True)
    pooling = ([3, 3], [2, 2], [1, 1], [1, 1], False)
    pooled, places = ops.max_pool2d(image, *pooling)
    return {
        "csr_spmm": lambda: [ops.csr_spmm(values, *indices, bias, x)],
        "csr_spmm_t": lambda: [ops.csr_spmm_t(values, *indices, g)],
        "csr_sddmm": lambda: [ops.csr_sddmm(*indices, g, x)],
        "csr_conv2d_fprop": lambda: [ops.csr_conv2d_fprop(values, *indices, bias, image, *window)],
        "csr_conv2d_dgrad": lambda: [ops.csr_conv2d_dgrad(values, *indices, g_image, [9, 9], *window)],
        "csr_conv2d_wgrad": lambda: [ops.csr_conv2d_wgrad(*indices, g_image, image, *window)],
        "csr_conv2d_norm_train": lambda: ops.csr_conv2d_norm_train(
            values, *indices, bias, by_channels, g_image, bias, bias, 1e-5, True, *window
        ),
        "csr_conv2d_norm_backward": lambda: ops.csr_conv2d_norm_backward(
            values, *indices, g_image, by_channels, z, behind, bias, bias, *statistics, 1e-5, True, *window
        ),
        "csr_spmm_backward": lambda: ops.csr_spmm_backward(values, *indices, g, x),
        "csr_conv2d_backward": lambda: ops.csr_conv2d_backward(values, *indices, g_image, image, *window),
        "batch_norm_train": lambda: ops.batch_norm_train(image, image, weight, weight, 1e-5, True),
        "batch_norm_backward": lambda: ops.batch_norm_backward(image, image, y, weight, weight, mean, var, 1e-5, True),
        "batch_norm_eval": lambda: [ops.batch_norm_eval(image, image, weight, weight, mean, var, 1e-5, True)],
        "batch_norm_follow_": lambda: ops.batch_norm_follow_(mean, var, mean, var, 0.1, 100) or [],
        "max_pool2d": lambda: ops.max_pool2d(image, *pooling),
        "max_pool2d_backward": lambda: [ops.max_pool2d_backward(pooled, places, image.shape[2:], *pooling)],
    }


@compiled
@pytest.mark.parametrize("name", [*SCHEMAS, *NORM_SCHEMAS, *CONV_NORM_SCHEMAS, *POOL_SCHEMAS])
def test_an_operation_allocates_its_output_and_nothing_else(name):
    run = _passes()[name]
    run()
    for _ in range(2):
        sizes, outputs = _allocations(run)
        assert sizes == sorted((output.nbytes for output in outputs), reverse=True)


@compiled
@pytest.mark.parametrize("input_grad", [True, False], ids=["inner", "first"])
@pytest.mark.parametrize("kind", ["linear", "linear-relu", "conv-nchw", "conv-channels_last"])
def test_a_layers_step_allocates_only_its_outputs_and_gradients(kind, input_grad):
    if kind.startswith("conv"):
        dense, x = nn.Conv2d(16, 24, 3, padding=1), torch.randn(5, 16, 9, 9)
        if kind == "conv-channels_last":
            x = x.to(memory_format=torch.channels_last)
        layer = SparseConv2d.from_dense(dense, torch.rand(dense.weight.shape) < 0.2)
    else:
        dense, x = nn.Linear(144, 24), torch.randn(40, 144)
        layer = SparseLinear.from_dense(dense, torch.rand(dense.weight.shape) < 0.2)
    how = {"relu": True} if kind == "linear-relu" else {}
    x.requires_grad_(input_grad)
    g = torch.randn_like(layer(x))

    def step() -> list[Tensor]:
        y = layer(x, **how)
        y.backward(g)
        return [y.detach(), *(t.grad for t in (x, *layer.parameters()) if t.requires_grad)]

    for _ in range(3):
        x.grad = None
        layer.zero_grad()
        sizes, results = _allocations(step)
    assert sizes == sorted((result.nbytes for result in results), reverse=True)


@compiled
@pytest.mark.parametrize("make", [lambda p: gs.optim.SGD(p, lr=0.1, momentum=0.9), gs.optim.AdamW], ids=["SGD", "AdamW"])
def test_an_optimizer_step_allocates_nothing(make):
    weights = [torch.randn(1, 5000, requires_grad=True), torch.randn(40, requires_grad=True)]
    optimizer = make(weights)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert _allocations(lambda: optimizer.step() or [])[0] == []


@compiled
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("input_grad", [True, False], ids=["inner", "first"])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "alone"])
def test_a_convolution_and_its_norm_allocate_only_outputs_and_gradients(with_residual, input_grad, threads):
    """What lies between them, which the backward reads, is one of the outputs."""
    torch.set_num_threads(threads)
    dense, norm = nn.Conv2d(16, 24, 3, padding=1), BatchNorm2d(24)
    conv = SparseConv2d.from_dense(dense, torch.rand(dense.weight.shape) < 0.2)
    x = torch.randn(5, 16, 9, 9).to(memory_format=torch.channels_last).requires_grad_(input_grad)
    g = torch.randn(5, 24, 9, 9).to(memory_format=torch.channels_last)
    residual = g.clone().requires_grad_() if with_residual else None
    leaves = [t for t in (x, residual, *conv.parameters(), *norm.parameters()) if t is not None and t.requires_grad]

    def step() -> list[Tensor]:
        y = conv_norm_relu(conv, norm, x, residual)
        y.backward(g)
        between, mean, var = y.detach(), norm.running_mean, norm.running_var  # of their sizes
        return [y.detach(), between, mean, var, *(leaf.grad for leaf in leaves)]

    for _ in range(3):
        for leaf in leaves:
            leaf.grad = None
        sizes, results = _allocations(step)
    assert _without_numbers(sizes) == sorted((result.nbytes for result in results), reverse=True)


def _without_numbers(sizes: list[int]) -> list[int]:
    """torch wraps the numbers it is given, as when a batch is counted, and that of a mean."""
    return [size for size in sizes if size > 8]


NETWORKS = {  # the size of its images, its convolutions with a norm, its blocks, in each of which two gradients meet
    "ResNet32": (lambda: ResNet32(10, widths=(16, 32, 32), blocks=2), 12, 15, 6),
    "torchvision": (lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10), 64, 12, 4),
}
# What torch computes in a step, once each: the pooling over all pixels, the loss, of torchvision's network that of its stem.
AVERAGE, LOSS = ["mean.dim", "div.Scalar", "new_zeros"], ["_log_softmax", "_log_softmax_backward_data", "nll_loss_backward"]
STEM = ["max_pool2d_with_indices", "max_pool2d_with_indices_backward"]


def _training(name: str) -> Callable[[], object]:
    """A training step of a sparse network, warmed up."""
    factory, size, *_ = NETWORKS[name]
    step = sparse_step(factory(), size, 0.1)
    for _ in range(2):
        step()
    return step


@compiled
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_networks_step_allocates_outputs_of_operations_and_nothing_else(name, threads):
    """At every step the same: the operations of a step, and what each of them takes are its results."""
    torch.set_num_threads(threads)
    step = _training(name)
    sizes = _allocations(step)[0]
    assert all(_allocations(step)[0] == sizes for _ in range(4))

    with _profile() as profile, OperationOutputs() as seen:
        step()
    _, _, pairs, blocks = NETWORKS[name]
    ours = {"csr_conv2d_norm_train": pairs, "csr_conv2d_norm_backward": pairs, "csr_spmm": 1, "csr_spmm_backward": 1}
    torchs = dict.fromkeys(AVERAGE + LOSS + STEM * (name == "torchvision"), 1) | {"add.Tensor": blocks}
    families = {"grasp_sparse": ours, "aten": torchs}
    expected = {f"{family}::{op}": count for family, ops in families.items() for op, count in ops.items()}
    assert Counter(call.name for call in seen.calls if _without_numbers(call.outputs)) == expected
    allocated, elsewhere = _allocations_of_calls(profile, len(seen.calls))
    copies = 0
    for call, got in zip(seen.calls, allocated, strict=True):
        copied = _copied(call)
        copies += len(copied)
        wanted = sorted(call.outputs + copied, reverse=True)
        if not call.name.startswith("grasp_sparse::"):
            got, wanted = _without_numbers(got), _without_numbers(wanted)
        assert got == wanted, call
    assert not _without_numbers(elsewhere)
    assert copies == 1  # behind the pooling
    # Seen so, autograd adds no gradients in place; else the same is allocated.
    assert not Counter(sizes) - Counter([*elsewhere, *itertools.chain(*allocated)])


def _copied(call: Call) -> list[int]:
    """The gradient, the first of the images, where it has another layout than they: the pooling's mean gives NCHW back."""
    if not call.name.endswith("norm_backward"):
        return []
    (size, strides), *_, (_, wanted) = call.images
    return [] if strides == wanted else [size]


def _allocations_of_calls(profile: torch.profiler.profile, calls: int) -> tuple[list[list[int]], list[int]]:
    """Bytes of every block, largest first: of each operation that :class:`OperationOutputs` saw, and outside of all."""
    events = profile.profiler.kineto_results.events()
    spans = {event.name(): (event.start_ns(), event.end_ns()) for event in events if event.name().startswith("operation ")}
    found: list[list[int]] = [[] for _ in range(calls + 1)]
    starts = [spans[f"operation {i}"][0] for i in range(calls)]
    blocks = [(event.nbytes(), event.start_ns()) for event in events if event.name() == "[memory]" and event.nbytes() > 0]
    for size, time in sorted(blocks, reverse=True):
        i = bisect.bisect_right(starts, time) - 1
        found[i if i >= 0 and time <= spans[f"operation {i}"][1] else calls].append(size)
    return found[:-1], found[-1]


@compiled
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="asks glibc's malloc")
@pytest.mark.parametrize("threads", [1, 2])
def test_steady_steps_reuse_the_working_memory_of_the_kernels(threads):
    """It is kept from call to call: nothing grows, and no page is touched for the first time but those of the outputs."""
    # Fixed thresholds: a block that is freed goes back to the system at once, and taking it anew costs page faults.
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    environment |= {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    program = Path(__file__).with_name("steady_state.py")
    done = subprocess.run([sys.executable, str(program), str(threads)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    assert list(seen) == ["operations", "network"]
    for what in seen.values():
        assert what["growth"] < 65536
        assert what["faults"] <= what["output_pages"] + 200
