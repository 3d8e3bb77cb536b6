"""Run as a program by test_memory.py, with a number of threads: twenty steady steps of the sparse operations, of batch norm and
of pooling, and twenty training steps of a network; prints as JSON what each twenty did to the process.

The weights are many and the batch is small, so that the working memory of the kernels (megabytes) dwarfs the small blocks a call
may take and return.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import sys
from collections.abc import Callable

import torch

from op_outputs import OperationOutputs
from sparse_training import sparse_step

from grasp_sparse.formats import csr_from_mask
from grasp_sparse.train.models import ResNet32

ops = torch.ops.grasp_sparse
STEPS = 20
MAPPED = int(os.environ["MALLOC_MMAP_THRESHOLD_"])


class _MallInfo(ctypes.Structure):
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


_libc = ctypes.CDLL(None)
_libc.mallinfo2.restype = _MallInfo
_libc.malloc.restype, _libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]


def bytes_in_use() -> int:
    """What this process holds of malloc's memory, mapped blocks too."""
    info = _libc.mallinfo2()
    return info.uordblks + info.hblkhd


def fill_the_heap() -> None:
    """Takes the large pieces that are free in it for good, so that from now on every large block is mapped, and touched anew."""
    mapped = _libc.mallinfo2().hblks
    while _libc.mallinfo2().hblks == mapped:
        _libc.malloc(MAPPED)


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def operations() -> Callable[[], object]:
    """One call of each."""
    filters, batch = (512, 256, 3, 3), 16
    indices = csr_from_mask(torch.rand(filters[0], filters[1] * 9) < 0.5)
    values = torch.randn(1, indices.nnz)
    x, g = torch.randn(batch, filters[1] * 9), torch.randn(batch, filters[0])
    image, g_image = torch.randn(batch, filters[1], 2, 2), torch.randn(batch, filters[0], 2, 2)
    weight, pooling = torch.ones(filters[1]), ([2, 2], [1, 1], [0, 0], [1, 1], False)
    window = ([3, 3], [1, 1], [1, 1, 1, 1], [1, 1])
    by_channels = image.to(memory_format=torch.channels_last)

    def step() -> object:
        return (
            ops.csr_spmm(values, *indices, None, x),
            ops.csr_spmm_t(values, *indices, g),
            ops.csr_sddmm(*indices, g, x),
            ops.csr_conv2d_fprop(values, *indices, None, image, *window),
            ops.csr_conv2d_dgrad(values, *indices, g_image, [2, 2], *window),
            ops.csr_conv2d_wgrad(*indices, g_image, image, *window),
            *ops.csr_spmm_backward(values, *indices, g, x),
            *ops.csr_conv2d_backward(values, *indices, g_image, image, *window),
            *(normed := ops.batch_norm_train(image, image, weight, weight, 1e-5, True)),
            *ops.batch_norm_backward(image, image, normed[0], weight, weight, *normed[1:], 1e-5, True),
            *(normed := ops.csr_conv2d_norm_train(values, *indices, None, by_channels, None, None, None, 1e-5, True, *window)),
            *ops.csr_conv2d_norm_backward(
                values, *indices, normed[0], by_channels, normed[1], None, None, None, *normed[2:], 1e-5, True, *window
            ),
            *(pooled := ops.max_pool2d(image, *pooling)),
            ops.max_pool2d_backward(*pooled, [2, 2], *pooling),
        )

    return step


def network() -> Callable[[], object]:
    """A training step of a residual network, in which convolutions and norms are one operation."""
    return sparse_step(ResNet32(widths=(64, 128, 256), blocks=1), 16, 0.5)


def output_pages(step: Callable[[], object]) -> int:
    """Of the outputs of one step, those whose blocks malloc maps, and so touches anew."""
    with OperationOutputs() as seen:
        step()
    page = resource.getpagesize()
    sizes = [size for call in seen.calls for size in call.outputs]
    return sum(size // page + 2 for size in sizes if size > MAPPED - page)


def steady_steps(step: Callable[[], object]) -> dict[str, int]:
    for _ in range(3):
        step()
    pages = output_pages(step)
    fill_the_heap()
    gc.collect()
    gc.disable()  # what a step leaves behind in cycles is not waited for
    before, faults = bytes_in_use(), page_faults()
    for _ in range(STEPS):
        step()
    seen = {"growth": bytes_in_use() - before, "faults": page_faults() - faults, "output_pages": STEPS * pages}
    gc.enable()
    return seen


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    print(json.dumps({kind.__name__: steady_steps(kind()) for kind in (operations, network)}))
