"""Run as a program by test_memory.py: twenty steady steps of the sparse operations, of batch norm and of pooling; prints as JSON
what they did to the process.

The weights are many and the batch is small, so that the working memory of the kernels (megabytes) dwarfs the small blocks a call
may take and return.
"""

from __future__ import annotations

import ctypes
import json
import resource

import torch

from grasp_sparse.formats import csr_from_mask

ops = torch.ops.grasp_sparse
STEPS = 20


class _MallInfo(ctypes.Structure):
    _names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in _names.split()]


_mallinfo2 = ctypes.CDLL(None).mallinfo2
_mallinfo2.restype = _MallInfo


def bytes_in_use() -> int:
    """What this process holds of malloc's memory, mapped blocks too."""
    info = _mallinfo2()
    return info.uordblks + info.hblkhd


def page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


if __name__ == "__main__":
    torch.set_num_threads(1)
    filters, batch = (512, 256, 3, 3), 16
    indices = csr_from_mask(torch.rand(filters[0], filters[1] * 9) < 0.5)
    values = torch.randn(1, indices.nnz)
    x, g = torch.randn(batch, filters[1] * 9), torch.randn(batch, filters[0])
    image, g_image = torch.randn(batch, filters[1], 2, 2), torch.randn(batch, filters[0], 2, 2)
    weight, pooling = torch.ones(filters[1]), ([2, 2], [1, 1], [0, 0], [1, 1], False)
    window = ([3, 3], [1, 1], [1, 1, 1, 1], [1, 1])
    by_channels = image.to(memory_format=torch.channels_last)

    def step() -> int:
        """Bytes of the outputs."""
        outputs = (
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
        return sum(output.nbytes for output in outputs)

    for _ in range(2):
        step()
    before, faults = bytes_in_use(), page_faults()
    output_bytes = sum(step() for _ in range(STEPS))
    print(json.dumps({
        "growth": bytes_in_use() - before,
        "faults": page_faults() - faults,
        "output_pages": output_bytes // resource.getpagesize(),
    }))
