"""Run as a program by test_interpreted.py: one part of the checks of the Triton kernels, on the CPU under Triton's interpreter.

In a process of its own, because the interpreter replaces the language for the whole process; and on the launchers themselves,
because the dispatcher sends CPU tensors elsewhere. The first difference ends it with an error.
"""

from __future__ import annotations

import os
import sys
from itertools import product

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import torch
import triton
import triton.language as tl
from block_cases import ConvCase, LinearCase, check_conv2d, check_linear
from op_cases import WINDOWS, block_matrix, close
from triton.errors import TritonError
from triton.runtime.interpreter import InterpretedFunction

from grasp_sparse import poison
from grasp_sparse.formats import CsrIndices, csr_from_mask
from grasp_sparse.ops import reference_blocks
from grasp_sparse.ops.triton import conv2d, launch, linear
from grasp_sparse.ops.triton.tuning import Tile
from grasp_sparse.ops.triton.window import window

DTYPES = (torch.float32, torch.float16)  # bfloat16 is wrong in the interpreter
ROWS = ("row-major", "feature-major", "sliced", "every-other-row")
IMAGES = ("NCHW", "channels_last", "CHWN", "sliced")


def sweep_linear() -> None:
    """Blocks that are a step, a part of one, and several to one; ragged edges on either side; empty rows; no tokens."""
    cases = [
        LinearCase(70, 40, 200, (16, 16)),
        LinearCase(3, 33, 90, (16, 32), relu=True),
        LinearCase(65, 70, 130, (32, 64), bias=False),
        LinearCase(9, 130, 150, (64, 128), relu=True),
        LinearCase(17, 150, 129, (128, 16)),
        LinearCase(40, 130, 260, (128, 128), density=0.8),
        LinearCase(1, 64, 128, (64, 64), density=1.0),
        LinearCase(5, 64, 96, (32, 32), density=0.0, relu=True),
        LinearCase(130, 128, 256, (16, 16), density=0.1),
        LinearCase(0, 40, 40, (16, 16)),
        *(LinearCase(20, 48, 40, (16, 16), layout=layout) for layout in ROWS),
    ]
    for case, dtype in product(cases, DTYPES):
        check_linear(lambda name: getattr(linear, name), case, dtype)


def sweep_conv2d() -> None:
    """Every window, on channels that are no multiple of the block, in turn in every layout and with every block."""
    blocks = ((16, 16), (32, 16), (16, 32), (64, 16), (32, 64))
    for i, (name, dtype) in enumerate(product(WINDOWS, DTYPES)):
        case = ConvCase(name, 2, 19 + 16 * (i % 3), 35, blocks[i % 5], (0.1, 0.4)[i % 2], i % 3 > 0, i % 4 == 1, IMAGES[i % 4])
        check_conv2d(lambda name: getattr(conv2d, name), case, dtype)
    even = ConvCase("3x3", 1, 32, 64, (32, 16), 0.3)
    strided = even._replace(window="3x3-stride2", block_size=(64, 32))
    for case in (even, even._replace(density=0.0), even._replace(batch=0), strided):
        check_conv2d(lambda name: getattr(conv2d, name), case, torch.float32)


def sweep_tiles() -> None:
    """Tiles, and parts of the tokens, that no measurement chose: the same bits from all tiles, the same numbers from all parts."""
    weight, tokens = (48, 200), 150
    for size in ((16, 16), (16, 64), (16, 128)):
        values, indices = block_matrix(weight, size, 0.6, torch.float32)
        x, g = torch.randn(tokens, weight[1]), torch.randn(tokens, weight[0])
        expected = reference_blocks.bsr_spmm(values.double(), *indices, None, x.double(), weight[0])
        lists, results = launch.Lists(indices.crow_indices, indices.col_indices, None), []
        for tile in (Tile(64, 16, 4, 2), Tile(32, 32, 4, 2), Tile(128, 64, 4, 2), Tile(16, 128, 4, 2)):
            results.append(torch.full((tokens, weight[0]), float("nan")))
            launch.product(x, values, lists, None, results[-1], "ieee", tile=tile)
            close(results[-1], expected, f"{size}, {tile}")
        gradient = reference_blocks.bsr_sddmm(*indices, g.double(), x.double(), size)
        for together, parts in product((1, 2, 4), (1, 2, 3, 7)):
            got = launch.sampled(g, x, *indices[:2], size, "ieee", tile=Tile(together, 16, 4, 2), parts=parts)
            close(got, gradient, f"{size}, {together} together, {parts} parts")


def sweep_edges() -> None:
    """What is stored of blocks past the edges of a weight is zero, also under gradients that are not finite."""
    point = ((1, 1), (1, 1), (0, 0, 0, 0), (1, 1))
    for size in ((16, 32), (32, 16), (16, 16)):
        (_, indices), tokens = block_matrix((20, 40), size, 1.0, torch.float32), 9
        ones = torch.ones(tokens, 20), torch.ones(tokens, 40)
        outside = reference_blocks.bsr_sddmm(*indices, *ones, size) == 0
        g, x = torch.randn(tokens, 20), torch.randn(tokens, 40)
        g[2, 3], x[5, 7] = float("inf"), float("nan")
        as_images = g[:, :, None, None], x[:, :, None, None]
        for got in (linear.bsr_sddmm(*indices, g, x, size), conv2d.bsr_conv2d_wgrad(*indices, *as_images, size, *point)):
            assert outside.any() and (got[outside] == 0).all(), f"{size}: {got[outside].isnan().sum()} are not zero"
            assert got.isnan().any()


def sweep_lists() -> None:
    """The lists made on the device are those that plain Python makes."""
    for (name, (kernel, stride, padding, dilation, _)), density in product(WINDOWS.items(), (0.0, 0.3, 1.0)):
        of, rows, chunks = window(kernel, stride, padding, dilation), 5, 3
        indices = csr_from_mask(torch.rand(rows, chunks * of.taps) < density)
        got = launch.regrouped(*indices[2:], rows, of)
        for lists, wanted in zip(got, regrouped_by_hand(indices, rows, chunks, of), strict=True):
            assert lists.tolist() == wanted, f"{name}, density {density}"
    for groups in (2, 63, 64, 65, 200):
        lengths = torch.randint(0, 7, (groups,))
        pointers = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0))).to(torch.int32)
        order = launch._longest_first(pointers, programs=1)
        assert order.tolist() == lengths.argsort(descending=True, stable=True).tolist(), f"{groups} lists"


def regrouped_by_hand(indices: CsrIndices, rows: int, chunks: int, of) -> tuple[list, list, list]:
    pointers, entries, places = [0], [], []
    for phase_h, phase_w, chunk in product(*map(range, of.stride), range(chunks)):
        for tap_h, tap_w in product(*map(range, of.kernel)):
            apart = phase_h + of.padding[0] - tap_h * of.dilation[0], phase_w + of.padding[2] - tap_w * of.dilation[1]
            if apart[0] % of.stride[0] == 0 and apart[1] % of.stride[1] == 0:
                tap = tap_h * of.kernel[1] + tap_w
                begin, end = indices.ccol_indices[tap * chunks + chunk : tap * chunks + chunk + 2].tolist()
                entries += [tap * rows + row for row in indices.row_indices[begin:end].tolist()]
                places += indices.permutation[begin:end].tolist()
        pointers.append(len(entries))
    return pointers, entries, places


@triton.jit
def _counting_kernel(count, times):
    total = 0
    for i in range(tl.load(times)):
        total += 1
    tl.store(count, total)


def interpreter_counts() -> bool:
    """Whether this interpreter and this numpy get along: that of Triton 3.6 has no loops with numpy 2.4."""
    count, times = torch.zeros(1, dtype=torch.int32), torch.full((1,), 3, dtype=torch.int32)
    try:
        _counting_kernel[(1,)](count, times)
    except TritonError:
        return False
    return count.item() == 3


SWEEPS = {"linear": sweep_linear, "conv2d": sweep_conv2d, "tiles": sweep_tiles, "edges": sweep_edges, "lists": sweep_lists}

if __name__ == "__main__":
    assert isinstance(launch.product_kernel, InterpretedFunction)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if not interpreter_counts():
        sys.exit("no loops in this interpreter")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    with poison.poisoned_memory():
        SWEEPS[sys.argv[1]]()
    print("interpreted", sys.argv[1])
