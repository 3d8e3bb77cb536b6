"""The kernels keep working memory per thread: calls that run side by side, and in forked processes, must not meet."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from op_cases import block_matrix, sparse_matrix
from torch.utils.data import DataLoader, Dataset

from grasp_sparse.nn import BatchNorm2d, FusedSequential, SparseConv2d, SparseLinear

THREADS = 4
WINDOW = ((3, 3), (1, 1), (1, 1, 1, 1), (1, 1))


def _step(layer: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients; without .backward(), which would add to the gradients that other threads see."""
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])]


class _BlockConv(torch.nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        values, self.indices = block_matrix((size, size, 3, 3), (8, 4), 0.3, torch.float32)
        self.values = torch.nn.Parameter(values)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.grasp_sparse.bsr_conv2d_fprop(self.values, *self.indices, None, x, x.shape[1], *WINDOW)


def _layers() -> list[tuple[torch.nn.Module, torch.Tensor]]:
    """Of several sizes, so that a thread's working memory grows while others are in theirs."""
    cases = []
    for size in (3, 20, 70):
        linear, conv = torch.nn.Linear(2 * size, size), torch.nn.Conv2d(size, size, 3, padding=1, stride=1 + size % 2)
        cases.append((SparseLinear.from_dense(linear, torch.rand_like(linear.weight) < 0.2), torch.randn(5 * size, 2 * size)))
        cases.append((SparseConv2d.from_dense(conv, torch.rand_like(conv.weight) < 0.2), torch.randn(size // 2, size, 9, 8)))
        cases.append((_BlockConv(size), torch.randn(size // 2, size, 9, 8)))
    return cases


@pytest.mark.parametrize("pool", [1, 2])
def test_calls_from_several_python_threads(pool):
    """pool: threads of torch's own pool, of which every Python thread has one."""
    torch.set_num_threads(pool)
    cases = _layers()
    expected = [_step(*case) for case in cases]

    def work(start: int) -> None:
        torch.set_num_threads(pool)
        for turn in range(6 * len(cases)):
            place = (start + turn) % len(cases)
            for got, want in zip(_step(*cases[place]), expected[place], strict=True):
                assert torch.equal(got, want)

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(work, range(THREADS)))


def _layers_of_many_tasks() -> dict[str, tuple[torch.nn.Module, torch.Tensor]]:
    """Eight slices of samples, images in bands, and norms of some megabytes."""
    conv, linear = torch.nn.Conv2d(40, 24, 3, padding=1), torch.nn.Linear(90, 70)
    strided = torch.nn.Conv2d(40, 24, 3, padding=1, stride=2)
    cases = {
        "conv": (SparseConv2d.from_dense(conv, torch.rand_like(conv.weight) < 0.1), torch.randn(128, 40, 20, 12)),
        "strided": (SparseConv2d.from_dense(strided, torch.rand_like(strided.weight) < 0.1), torch.randn(128, 40, 20, 12)),
        "linear": (SparseLinear.from_dense(linear, torch.rand_like(linear.weight) < 0.1), torch.randn(2048, 90)),
        "blocks": (_BlockConv(20), torch.randn(128, 20, 9, 8)),
        "norm": (BatchNorm2d(40), torch.randn(128, 40, 20, 12)),
    }
    trained = SparseConv2d.from_dense(conv, torch.rand_like(conv.weight) < 0.1), BatchNorm2d(24), torch.nn.ReLU()
    cases["conv and norm in channels_last"] = FusedSequential(*trained), torch.randn(128, 40, 20, 12).to(memory_format=torch.channels_last)
    for name in ("conv", "norm"):
        layer, x = cases[name]
        cases[f"{name} in channels_last"] = layer, x.to(memory_format=torch.channels_last)
        cases[f"{name}, batch innermost"] = layer, x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2)
    return cases


def test_threads_that_take_tasks_of_others_leave_the_result_as_it_is():
    """More threads than cores: some come late and find their tasks done. A task done twice adds twice to sums of weights, one that
    nobody did leaves memory poisoned."""
    cases = _layers_of_many_tasks()
    expected = {name: _step(*case) for name, case in cases.items()}
    for threads in (2, 3, 7):
        torch.set_num_threads(threads)
        for _ in range(3):
            for name, case in cases.items():
                for got, want in zip(_step(*case), expected[name], strict=True):
                    assert torch.equal(got, want), f"{name}, {threads} threads"


class _Outputs(Dataset):
    """Item i is the output of case i, in whatever process asks for it; torch itself refuses a backward pass in a fork."""

    def __init__(self) -> None:
        self.cases = _layers()

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, i: int) -> torch.Tensor:
        layer, x = self.cases[i]
        with torch.no_grad():
            return layer(x)


def test_forked_workers_of_a_process_that_ran_the_kernels():
    """What a DataLoader does when a dataset or collate function uses a sparse model."""
    torch.set_num_threads(2)
    outputs = _Outputs()
    expected = [outputs[i] for i in range(len(outputs))]
    loader = DataLoader(outputs, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert all(torch.equal(got, want) for got, want in zip(loader, expected, strict=True))


def test_an_error_in_one_call_leaves_the_next_one_right():
    """Refused inside the parallel part of a call, whose working memory the next call takes over."""
    values, indices, _ = sparse_matrix(40, 60 * 9, 0.5, torch.float32)
    x = torch.randn(20, 60, 9, 8)
    torch.set_num_threads(2)
    expected = torch.ops.grasp_sparse.csr_conv2d_fprop(values, *indices, None, x, *WINDOW)
    broken = indices._replace(col_indices=indices.col_indices.clone())
    broken.col_indices[-1] = 2**30
    for _ in range(3):
        with pytest.raises(RuntimeError, match="corrupt"):
            torch.ops.grasp_sparse.csr_conv2d_fprop(values, *broken, None, x, *WINDOW)
        assert torch.equal(torch.ops.grasp_sparse.csr_conv2d_fprop(values, *indices, None, x, *WINDOW), expected)
