"""What one kept weight costs: multiply-adds per sample, which is the number of output positions it contributes to.

A 3x3 convolution on 32x32 positions uses each of its weights 1024 times per image, a classifier once. Multiplying by
kept weights gives the compute of a pruned network (positions that only see padding are counted, as is usual).
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from grasp_sparse.nested import count_samples, first_tensor
from grasp_sparse.scratch import call_model, scratch_copy
from grasp_sparse.weights import Selector, find_weights


def weight_costs(
    model: nn.Module, example_input: Any, *, include: Selector | None = None, exclude: Selector | None = None
) -> dict[str, float]:
    """Multiply-adds per sample of one weight of every prunable parameter of `model`, by parameter name.

    `example_input` is a tensor [N, …], a tuple of arguments or a dict of keyword arguments; N is the first dimension of
    its first tensor. A namedtuple is one argument, and a PackedSequence counts its sequences. A weight used several times
    (a module called twice, a tied weight) costs the sum of its uses. Measured by hooks during one forward of a copy in eval
    mode; the model is not touched. A layer whose module is not called costs 0, with a warning.
    """
    first = first_tensor(example_input)
    if first.ndim < 1 or first.shape[0] == 0:
        raise ValueError(f"Expected example_input with at least one sample, got shape {list(first.shape)}")
    samples = count_samples(example_input)
    weights = find_weights(model, include, exclude).weights
    with scratch_copy(model) as scratch, torch.no_grad():
        positions = dict.fromkeys((weight.name for weight in weights), 0)

        def count(name: str):
            def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
                positions[name] += output.numel() // module.weight.shape[0]

            return hook

        for weight in weights:
            for module_name, _ in weight.modules:
                scratch.get_submodule(module_name).register_forward_hook(count(weight.name))
        call_model(scratch.eval(), example_input)

    unused = [name for name, uses in positions.items() if uses == 0]
    if unused:
        warnings.warn(
            f"The forward called no module of {', '.join(unused)}: counted as costing nothing. "
            "Exclude them if they are computed in another way.",
            stacklevel=2,
        )
    return {name: uses / samples for name, uses in positions.items()}
