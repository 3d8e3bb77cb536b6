"""Which operations a chain of layers calls on CUDA, and that it stays batch innermost: on fake tensors, which no GPU computes.

Strides of torch's own operations come from the same code on every device where they are element by element, and from their fakes
elsewhere.
"""

from __future__ import annotations

import pytest
import torch
from op_cases import is_chwn
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from grasp_sparse.nn import AdaptiveAvgPool2d, AvgPool2d, BatchNorm2d, MaskedConv2d, MaxPool2d, SparseConv2d, kernels
from grasp_sparse.nn.norm import norm_relu

POOLED = {"avg_pool2d", "avg_pool2d_backward", "_adaptive_avg_pool2d", "_adaptive_avg_pool2d_backward"}


class Called(TorchDispatchMode):
    """The operations that were called, and those of them that gave images in another layout."""

    def __init__(self) -> None:
        super().__init__()
        self.names, self.elsewhere = [], []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.name())
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() == 4 and min(tensor.shape) > 1 and not is_chwn(tensor):
                self.elsewhere.append(function.name())
        return result


class Block(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        masks = torch.rand(8, 8, 3, 3) < 0.1, torch.rand(8, 8, 3, 3) < 0.1
        convs = (SparseConv2d.from_dense(nn.Conv2d(8, 8, 3, padding=1), mask) for mask in masks)
        # Sparse layers take bfloat16 under autocast alone, which asks for a device that is there.
        self.conv1, self.conv2 = convs if dtype == torch.float32 else (nn.Identity(), nn.Identity())
        self.bn1, self.bn2 = BatchNorm2d(8), BatchNorm2d(8)
        self.pool, self.average, self.end = MaxPool2d(3, 2, 1), AvgPool2d(2), AdaptiveAvgPool2d(3)

    def forward(self, x):
        y = self.pool(norm_relu(self.bn1, self.conv1(x)))
        y = norm_relu(self.bn2, self.conv2(y), y)
        return self.end(torch.relu(self.average(y) + 1))


@pytest.fixture
def fake_cuda(monkeypatch):
    monkeypatch.setattr(kernels, "_ON_CUDA", True)
    return FakeTensorMode()


def chwn(device: str, dtype: torch.dtype = torch.float32, shape=(16, 8, 24, 24)) -> torch.Tensor:
    n, c, h, w = shape
    return torch.ones(c, h, w, n, dtype=dtype, device=device).permute(3, 0, 1, 2)


def check(called: Called) -> None:
    assert not any("batch_norm" in name or "max_pool" in name for name in called.names if name.startswith("aten::"))
    # What torch pools sees the two outer dimensions exchanged; a permutation is only looked at.
    assert {name.partition("::")[2] for name in called.elsewhere} <= POOLED | {"transpose.int", "permute"}, called.elsewhere


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_chain_stays_batch_innermost_on_cuda(fake_cuda, dtype, training):
    block = Block(dtype).train(training)
    tensors = dict(block.named_parameters()) | dict(block.named_buffers())
    with fake_cuda:
        state = {name: fake_cuda.from_tensor(tensor).to("cuda") for name, tensor in tensors.items()}
        x = chwn("cuda", dtype)
        with Called() as called:
            y = torch.func.functional_call(block, state, x)
    assert y.dtype == dtype and is_chwn(y) and y.is_cuda
    wanted = {"batch_norm_train", "batch_norm_follow_"} if training else {"batch_norm_eval"}
    assert {f"grasp_sparse::{name}" for name in wanted | {"max_pool2d"}} <= set(called.names)
    check(called)


@pytest.mark.skipif(not kernels._ON_CPU, reason="compiled kernels are not loaded")
def test_and_so_do_its_gradients():
    """On the CPU: fake tensors of a device that is not there have no backward pass."""
    block, x = Block(), chwn("cpu").requires_grad_()
    with Called() as called:
        y = block(x)
        y.backward(torch.ones_like(y))
    assert is_chwn(x.grad) and {"grasp_sparse::batch_norm_backward", "grasp_sparse::max_pool2d_backward"} <= set(called.names)
    check(called)


@pytest.mark.parametrize("lies", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_chain_begins_at_its_first_sparse_convolution_and_ends_before_a_dense_one(fake_cuda, lies):
    """One turn in, one out, and the dense kernel has what it is fastest on."""
    block, dense = Block(), nn.Conv2d(8, 8, 3)
    masked = MaskedConv2d.from_dense(dense, torch.ones_like(dense.weight, dtype=torch.bool))
    chain = nn.Sequential(block, masked)
    tensors = dict(chain.named_parameters()) | dict(chain.named_buffers())
    with fake_cuda:
        state = {name: fake_cuda.from_tensor(tensor).to("cuda") for name, tensor in tensors.items()}
        x = torch.empty(16, 8, 24, 24, device="cuda").contiguous(memory_format=lies)
        with Called() as called:
            y = torch.func.functional_call(chain, state, x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert called.names.count("aten::clone") == 2
    assert called.names.index("aten::clone") < called.names.index("grasp_sparse::csr_conv2d_fprop")
    inside = called.names[called.names.index("grasp_sparse::csr_conv2d_fprop") : called.names.index("aten::convolution")]
    assert inside.count("aten::clone") == 1 and {"grasp_sparse::batch_norm_train", "grasp_sparse::max_pool2d"} <= set(inside)


def test_without_compiled_kernels_and_for_blocks_nothing_is_turned(fake_cuda, monkeypatch):
    single = SparseConv2d.from_dense(nn.Conv2d(16, 16, 3), torch.rand(16, 16, 3, 3) < 0.2)
    blocks = SparseConv2d.from_dense(nn.Conv2d(16, 16, 3), torch.ones(16, 16, 3, 3, dtype=torch.bool), (16, 16))
    for conv, compiled in ((single, False), (blocks, True)):
        monkeypatch.setattr(kernels, "_ON_CUDA", compiled)
        tensors = dict(conv.named_parameters()) | dict(conv.named_buffers())
        with fake_cuda:
            state = {name: fake_cuda.from_tensor(tensor).to("cuda") for name, tensor in tensors.items()}
            x = torch.empty(4, 16, 9, 9, device="cuda").contiguous(memory_format=torch.channels_last)
            with Called() as called:
                y = torch.func.functional_call(conv, state, x)
        assert y.is_contiguous(memory_format=torch.channels_last) and "aten::clone" not in called.names


@pytest.mark.parametrize("lies", [torch.contiguous_format, torch.channels_last], ids=str)
def test_other_layouts_are_torchs(fake_cuda, lies):
    with fake_cuda, Called() as called:
        norm, pool = BatchNorm2d(8, device="cuda"), MaxPool2d(2)
        x = torch.empty(16, 8, 24, 24, device="cuda").contiguous(memory_format=lies)
        pool(norm(x)), pool(norm.eval()(x))
    assert called.names and not any(name.startswith("grasp_sparse") for name in called.names)


def test_without_its_kernels_everything_is_torchs(fake_cuda, monkeypatch):
    monkeypatch.setattr(kernels, "_ON_CUDA", False)
    with fake_cuda, Called() as called:
        MaxPool2d(2)(BatchNorm2d(8, device="cuda")(chwn("cuda")))
    assert called.names and not any(name.startswith("grasp_sparse") for name in called.names)
