"""A call of every operation that is differentiated, with all its arguments."""

from __future__ import annotations

import torch
from op_cases import CALLS, examples, norm_inputs, operation, sparse_matrix


def _norms_and_pools() -> dict[str, tuple]:
    x, residual, weight, bias = (t.requires_grad_() for t in norm_inputs((3, 4, 5, 2), residual=True, affine=True))
    statistics = (torch.randn(4, dtype=x.dtype), torch.rand(4, dtype=x.dtype) + 0.5)
    values, indices, _ = sparse_matrix(8, 16, 0.3)
    images, between = torch.randn(3, 4, 5, 2, dtype=x.dtype), torch.randn(3, 8, 4, 1, dtype=x.dtype)
    images, between = (t.to(memory_format=torch.channels_last).requires_grad_() for t in (images, between))
    vectors = [torch.randn(8, dtype=x.dtype, requires_grad=True) for _ in range(3)]
    window = ([2, 2], [1, 1], [0, 0, 0, 0], [1, 1])
    return {
        "csr_conv2d_norm_train": (
            values.requires_grad_(), *indices, vectors[0], images, between, *vectors[1:], 1e-5, True, *window
        ),
        "batch_norm_train": (x, residual, weight, bias, 1e-5, True),
        "batch_norm_eval": (x, None, weight, bias, *statistics, 1e-5, True),
        "max_pool2d": (x, (2, 2), (1, 1), (1, 0), (1, 1), False),
    }


CASES = (*CALLS, *_norms_and_pools())


def call_of(case: str) -> tuple[str, list]:
    """The name and all arguments, defaults too."""
    name, inputs = case.partition(",")[0], list((examples() | _norms_and_pools())[case])
    schema = operation(case).default._schema.arguments
    return name, inputs + [argument.default_value for argument in schema[len(inputs) :]]
