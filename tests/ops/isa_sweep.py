"""Run as a program by test_isa.py: compares the compiled kernels with the reference on shapes that reach every edge of their
loops, and one thread with two, bit for bit. Prints the instruction set that ran; the first difference ends it with an error."""

from __future__ import annotations

from itertools import product

import torch
from op_cases import (
    BLOCK_SIZES,
    DTYPES,
    IMAGE_LAYOUTS,
    NORM_CASES,
    ROW_LAYOUTS,
    STORED,
    WINDOWS,
    block_matrix,
    close,
    norm_inputs,
    sparse_matrix,
)
from torch import Tensor

from grasp_sparse import _extension
from grasp_sparse.ops import reference, reference_blocks, reference_pool
from grasp_sparse.ops.dtypes import compute_dtype
from grasp_sparse.ops.layout import output_size

ops = torch.ops.grasp_sparse


def check(name: str, case: str, dtype: torch.dtype, lay, weights: tuple, activations: tuple[Tensor, ...], rest: tuple = ()) -> None:
    """One operation: in ``dtype``, activations in the layout, against the float64 reference; then with two threads."""
    activations = tuple(a.to(dtype) for a in activations)
    module = reference_blocks if name.startswith("bsr") else reference
    expected = getattr(module, name)(*weights, *(a.double() for a in activations), *rest)
    cast = [a.to(compute_dtype(dtype)) if isinstance(a, Tensor) and a.is_floating_point() else a for a in weights]
    arguments = (*cast, *(lay(a) for a in activations), *rest)
    if isinstance(expected, Tensor):
        expected = (expected,)
    for result, wanted in zip(both_threads(name, case, arguments), expected, strict=True):
        close(result, wanted, f"{name}, {case}")


def both_threads(name: str, case: str, arguments: tuple) -> tuple[Tensor, ...]:
    """The results of an operation, which are the same bits with one thread and with two."""
    results = []
    for threads in (1, 2):  # and two for the reference
        torch.set_num_threads(threads)
        result = getattr(ops, name)(*arguments)
        results.append(result if isinstance(result, tuple) else (result,))
    if not all(torch.equal(one, two) for one, two in zip(*results, strict=True)):
        raise AssertionError(f"{name}, {case}: two threads give other bits than one.")
    return results[0]


def sweep_linear() -> None:
    shapes, batches, layouts = ((7, 5), (33, 1), (67, 130)), (1, 9, 16, 33, 200), ("row-major", "feature-major", "sliced")
    cases = list(product(STORED, shapes, (0.2, 1.0), batches, layouts))
    cases += product(STORED, ((20, 3000), (3000, 20)), (0.002, 0.05), (200,), ("row-major",))  # in blocks of channels
    for dtype, shape, density, batch, layout in cases:
        values, indices, _ = sparse_matrix(*shape, density)
        x, g = torch.randn(batch, shape[1]).double(), torch.randn(batch, shape[0]).double()
        bias = torch.randn(shape[0]).double()
        common = f"{dtype} {shape} density {density} batch {batch} {layout}", STORED[dtype], ROW_LAYOUTS[layout][0]
        check("csr_spmm", *common, (values, *indices, bias), (x,))
        check("csr_spmm_t", *common, (values, *indices), (g,))
        check("csr_sddmm", *common, indices, (g, x))
        check("csr_spmm_backward", *common, (values, *indices), (g, x))
        check("csr_spmm", *common, (values, *indices, bias), (x,), (True,))
        check("csr_spmm_backward", *common, (values, *indices), (g, x, torch.randn_like(g).relu()), (batch % 2 == 0,))


def sweep_conv2d() -> None:
    cases = list(product(WINDOWS, ((2, 3), (19, 20)), (1, 17, 40), ("NCHW", "channels_last", "CHWN")))
    for dtype, (window, (channels, filters), batch, layout) in product(STORED, cases):
        kernel, stride, padding, dilation, image = WINDOWS[window]
        values, indices, _ = sparse_matrix(filters, channels * kernel[0] * kernel[1], 0.2)
        bias, x = torch.randn(filters).double(), torch.randn(batch, channels, *image).double()
        geometry = (kernel, stride, padding, dilation)
        g = torch.randn_like(reference.csr_conv2d_fprop(values, *indices, bias, x, *geometry))
        case = f"{dtype} {window} {channels}->{filters} batch {batch} {layout}"
        common = case, STORED[dtype], IMAGE_LAYOUTS[layout][0]
        check("csr_conv2d_fprop", *common, (values, *indices, bias), (x,), geometry)
        check("csr_conv2d_dgrad", *common, (values, *indices), (g,), (image, *geometry))
        check("csr_conv2d_wgrad", *common, indices, (g, x), geometry)
        check("csr_conv2d_backward", *common, (values, *indices), (g, x), geometry)


def sweep_blocks() -> None:
    shape = (67, 130)
    for dtype, block_size, batch, layout in product(STORED, BLOCK_SIZES, (1, 200), ("row-major", "feature-major")):
        values, indices = block_matrix(shape, block_size, 0.3, past=torch.nan)
        x, g = torch.randn(batch, shape[1]).double(), torch.randn(batch, shape[0]).double()
        bias = torch.randn(shape[0]).double()
        common = f"{dtype} {shape} blocks {block_size} batch {batch} {layout}", STORED[dtype], ROW_LAYOUTS[layout][0]
        check("bsr_spmm", *common, (values, *indices, bias), (x,), (shape[0], batch > 1))
        check("bsr_spmm_t", *common, (values, *indices), (g,), (shape[1],))
        check("bsr_sddmm", *common, indices, (g, x), (block_size,))
    channels, filters = 10, 19
    cases = list(product(WINDOWS, ((4, 4), (5, 3)), (1, 33), ("NCHW", "channels_last", "CHWN")))
    for dtype, (window, block_size, batch, layout) in product(STORED, cases):
        *geometry, image = WINDOWS[window]
        values, indices = block_matrix((filters, channels, *geometry[0]), block_size, 0.3, past=torch.nan)
        bias, x = torch.randn(filters).double(), torch.randn(batch, channels, *image).double()
        g = torch.randn_like(reference_blocks.bsr_conv2d_fprop(values, *indices, bias, x, filters, *geometry))
        case = f"{dtype} {window} {channels}->{filters} blocks {block_size} batch {batch} {layout}"
        common = case, STORED[dtype], IMAGE_LAYOUTS[layout][0]
        check("bsr_conv2d_fprop", *common, (values, *indices, bias), (x,), (filters, *geometry, batch > 1))
        check("bsr_conv2d_dgrad", *common, (values, *indices), (g,), (channels, image, *geometry))
        check("bsr_conv2d_wgrad", *common, indices, (g, x), (block_size, *geometry))


def sweep_large() -> None:
    """Results above 1 MB, which the kernels write past the cache where whole aligned lines allow it."""
    for dtype, features, layout in product(DTYPES, (512, 515), ("row-major", "feature-major")):
        values, indices, _ = sparse_matrix(features, features, 0.01)
        x, g = torch.randn(530, features).double(), torch.randn(530, features).double()
        common = f"{dtype} {features} features, batch 530, {layout}", DTYPES[dtype], ROW_LAYOUTS[layout][0]
        check("csr_spmm", *common, (values, *indices, None), (x,))
        check("csr_spmm_t", *common, (values, *indices), (g,))
        for block_size in ((8, 8), (5, 4)):
            values, indices = block_matrix((features, features), block_size, 0.05, past=torch.nan)
            check("bsr_spmm", *common, (values, *indices, None), (x,), (features,))
            check("bsr_spmm_t", *common, (values, *indices), (g,), (features,))
    geometry = ([3, 3], [1, 1], [1, 1, 1, 1], [1, 1])
    for dtype, (batch, size), layout in product(DTYPES, ((33, 16), (32, 14), (36, 17)), ("NCHW", "channels_last", "CHWN")):
        values, indices, _ = sparse_matrix(48, 16 * 9, 0.05)
        x, g = torch.randn(batch, 16, size, size).double(), torch.randn(batch, 48, size, size).double()
        common = f"{dtype} large, batch {batch}, {size} x {size}, {layout}", DTYPES[dtype], IMAGE_LAYOUTS[layout][0]
        check("csr_conv2d_fprop", *common, (values, *indices, None), (x,), geometry)
        check("csr_conv2d_dgrad", *common, (values, *indices), (g,), ([size, size], *geometry))
        check("csr_conv2d_backward", *common, (values, *indices), (g, x), geometry)
        for block_size in ((8, 8), (5, 4)):
            values, indices = block_matrix((48, 16, 3, 3), block_size, 0.2, past=torch.nan)
            check("bsr_conv2d_fprop", *common, (values, *indices, None), (x,), (48, *geometry))
            check("bsr_conv2d_dgrad", *common, (values, *indices), (g,), (16, [size, size], *geometry))
            check("bsr_conv2d_wgrad", *common, indices, (g, x), (block_size, *geometry))


def sweep_batch_norm() -> None:
    """Rows shorter than a vector, rows with rests, folded rows, several parts; the large ones are written past the cache, of which
    some end with a line, and some, 14x14 in NCHW, with half of one."""
    shapes = ((3, 5, 7, 7), (33, 67, 4, 4), (2, 2, 40, 41), (130, 24, 2, 2), (6, 130, 13, 13))
    cases = [*product(STORED, shapes, NORM_CASES, ("NCHW", "channels_last", "CHWN", "sliced"))]
    large = (("float32", (33, 64, 48, 44)), ("float64", (33, 32, 48, 44)), ("float32", (9, 48, 33, 32)), ("float32", (7, 256, 14, 14)))
    cases += [(*of, (True, True, True), layout) for of, layout in product(large, ("NCHW", "channels_last", "CHWN"))]
    for dtype, shape, (residual, relu, affine), layout in cases:
        lay, rest = IMAGE_LAYOUTS[layout][0], (1e-5, relu)
        case = f"batch norm, {dtype} {shape} {layout} residual {residual} relu {relu} affine {affine}"
        # Rounded first, and y given to both: otherwise a value next to zero may lie on either side of the ReLU.
        stored, computed = STORED[dtype], compute_dtype(STORED[dtype])
        inputs = norm_inputs(shape, residual, affine)
        x, r, *affine_parameters = (t if t is None else t.to(stored if t.dim() == 4 else computed) for t in inputs)
        exact = [t if t is None else t.double() for t in (x, r, *affine_parameters)]
        y, mean, var = both_threads("batch_norm_train", case, (lay(x), None if r is None else lay(r), *affine_parameters, *rest))
        for got, want in zip((y, mean, var), reference.batch_norm_train(*exact, *rest), strict=True):
            close(got, want, case)
        given = (lay(x), None if r is None else lay(r), *affine_parameters, mean, var)
        (evaluated,) = both_threads("batch_norm_eval", case, (*given, *rest))
        if not torch.equal(evaluated, y):
            raise AssertionError(f"{case}: evaluation by the statistics of the batch gives other bits than training.")
        g, y = torch.randn(shape).to(stored), y if residual and relu else None
        saved = (y, *affine_parameters, mean, var, *rest)
        expected = reference.batch_norm_backward(g.double(), exact[0], *(t.double() if isinstance(t, Tensor) else t for t in saved))
        for got, want in zip(both_threads("batch_norm_backward", case, (lay(g), lay(x), *saved)), expected, strict=True):
            close(got, want, case)


def sweep_conv_norm() -> None:
    """Where channels lie side by side: rows in a ring, several rows in a tile, rests of channels and lanes, blocks of channels."""
    geometries = ("1x1", "1x1-whole-vectors", "3x3", "3x3-stride2", "3x3-on-1x40")
    sizes = ((3, 5, 16), (33, 20, 37), (17, 700, 24))
    for dtype, window, (batch, channels, filters), (residual, relu, affine) in product(STORED, geometries, sizes, NORM_CASES[::3]):
        *geometry, image = WINDOWS[window]
        stored, computed, lay = STORED[dtype], compute_dtype(STORED[dtype]), IMAGE_LAYOUTS["channels_last"][0]
        case = f"conv and norm, {dtype} {window} {batch} x {channels} -> {filters} residual {residual} relu {relu} affine {affine}"
        values, indices, _ = sparse_matrix(filters, channels * geometry[0][0] * geometry[0][1], 0.2, computed)
        x, bias = lay(torch.randn(batch, channels, *image).to(stored)), torch.randn(filters).to(computed)
        size = (batch, filters, *output_size(image, *geometry))
        r = lay(torch.randn(size).to(stored)) if residual else None
        weight, shift = (torch.randn(filters).to(computed) if affine else None for _ in range(2))
        arguments = (values, *indices, bias, x, r, weight, shift, 1e-5, relu, *geometry)
        y, z, mean, var = both_threads("csr_conv2d_norm_train", case, arguments)
        exact = [t.double() if isinstance(t, Tensor) else t for t in (z, r, weight, shift)]
        for got, want in zip((y, mean, var), reference.batch_norm_train(*exact, 1e-5, relu), strict=True):
            close(got, want, case)
        g, gate = lay(torch.randn(size).to(stored)), y if residual and relu else None
        saved = (g, x, z, gate, weight, shift, mean, var)
        exact = [t.double() if isinstance(t, Tensor) else t for t in (values, *saved)]
        wanted = reference.csr_conv2d_norm_backward(exact[0], *indices, *exact[1:], 1e-5, relu, *geometry)
        found = both_threads("csr_conv2d_norm_backward", case, (values, *indices, *saved, 1e-5, relu, *geometry))
        between = reference.batch_norm_backward(exact[1], *exact[3:], 1e-5, relu)[0]
        scales = [want.abs().max() if want.numel() else want.new_tensor(1.0) for want in wanted]
        scales[2] = between.abs().sum((0, 2, 3)).max()  # the bias's gradient is the rounding of so much
        for got, want, scale in zip(found, wanted, scales, strict=True):
            scale = scale.clamp_min(1e-3)
            close((got.double() / scale).to(got.dtype), want / scale, case)


def sweep_max_pool() -> None:
    windows = (((2, 2), (2, 2), (0, 0), (1, 1), False), ((3, 3), (2, 2), (1, 1), (1, 1), True), ((3, 2), (1, 3), (1, 1), (2, 1), False))
    shapes = ((2, 3, 7, 9), (17, 33, 6, 5))
    for dtype, window, shape, layout in product(STORED, windows, shapes, ("NCHW", "channels_last", "CHWN")):
        lay, case = IMAGE_LAYOUTS[layout][0], f"max pool, {dtype} {shape} {window} {layout}"
        x = torch.randn(shape).relu().to(STORED[dtype])
        y, places = both_threads("max_pool2d", case, (lay(x), *window))
        expected, expected_places = reference_pool.max_pool2d(x, *window)
        if not (torch.equal(y, expected) and torch.equal(places, expected_places)):
            raise AssertionError(f"{case}: another result than the reference.")
        g, rest = torch.randn(y.shape).to(STORED[dtype]), (shape[2:], *window)
        (gx,) = both_threads("max_pool2d_backward", case, (lay(g), lay(places), *rest))
        close(gx, reference_pool.max_pool2d_backward(g.double(), places, *rest), case)


if __name__ == "__main__":
    torch.manual_seed(0)
    sweep_linear()
    sweep_conv2d()
    sweep_blocks()
    sweep_large()
    sweep_batch_norm()
    sweep_conv_norm()
    sweep_max_pool()
    print(_extension.status().isa)
