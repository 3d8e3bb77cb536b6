"""The kernels keep working memory per thread: calls that run side by side, and in forked processes, must not meet."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from op_cases import block_matrix, sparse_matrix
from torch.utils.data import DataLoader, Dataset

from grasp_sparse.nn import SparseConv2d, SparseLinear

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
