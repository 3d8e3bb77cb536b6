"""Arguments for the two operations: parameters that reach every edge of the loops, in every memory layout; and what holds for any."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from grasp_sparse.bits import pack_like
from grasp_sparse.ops import reference_update

TOLERANCE = {torch.float32: dict(rtol=2e-5, atol=2e-5), torch.float64: dict(rtol=1e-12, atol=1e-12)}
OPERATIONS = ("sgd_update_", "adamw_update_")
SHAPES = [(n,) for n in (0, 1, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1000)] + [(), (1, 300), (3, 5, 3, 3), (0, 4), (4, 0, 3, 3), (130, 257)]


def _same(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.contiguous_format)


def _channels_last(t: Tensor) -> Tensor:
    return t.clone(memory_format=torch.channels_last) if t.dim() == 4 else _same(t)


def _transposed(t: Tensor) -> Tensor:
    return t.t().contiguous().t() if t.dim() == 2 else _same(t)


def _with_gaps(t: Tensor) -> Tensor:
    return torch.stack((t, t + 1), dim=-1)[..., 0] if t.dim() else _same(t)


# How value, gradient and states lie; different strides inside one parameter too.
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "contiguous": (_same, _same, _same),
    "channels_last": (_channels_last, _channels_last, _channels_last),
    "transposed": (_transposed, _transposed, _transposed),
    "gradient differs": (_channels_last, _same, _channels_last),
    "state differs": (_same, _same, _transposed),
    "value has gaps": (_with_gaps, _same, _same),
    "all have gaps": (_with_gaps, _with_gaps, _with_gaps),
}


def arguments(
    name: str, dtype: torch.dtype, layout: str = "contiguous", masked: bool = True, shapes=SHAPES, density: float = 0.5, **changes
) -> list:
    """Positional arguments of the operation. With ``masked`` every second parameter has bits, and there gradients are NaN or
    infinite and values and states nonzero where pruned. ``changes`` replace scalars by name."""
    generator = torch.Generator().manual_seed(len(shapes))
    value_lies, grad_lies, state_lies = LAYOUTS[layout]

    def normal(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    values = [value_lies(normal(shape)) for shape in shapes]
    grads = [grad_lies(normal(shape)) for shape in shapes]
    bits = []
    for i, (value, grad) in enumerate(zip(values, grads, strict=True)):
        mask = torch.rand(value.shape, generator=generator) < density
        bits.append(pack_like(mask, value) if i % 2 else torch.empty(0, dtype=torch.uint8))
        if masked and i % 2:
            grad[~mask] = (torch.nan, torch.inf, -torch.inf)[i // 2 % 3]
    states = [[state_lies(normal(shape)) for shape in shapes] for _ in range(2)]
    mask_bits = bits if masked else []
    if name == "sgd_update_":
        scalars = dict(lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.01, nesterov=False, maximize=False, first_step=False)
        return [values, grads, states[0], mask_bits, *(scalars | changes).values()]
    steps = [torch.tensor(float(i), dtype=(torch.float32, torch.float64)[i % 2]) for i in range(len(shapes))]
    scalars = dict(lr=0.1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, maximize=False)
    return [values, grads, states[0], [s.square() for s in states[1]], steps, mask_bits, *(scalars | changes).values()]


def written(name: str, arguments: list) -> list[Tensor]:
    """The tensors that the operation changes: values, states, steps."""
    return [t for index in ((0, 2) if name == "sgd_update_" else (0, 2, 3, 4)) for t in arguments[index]]


def copied(arguments: list) -> list:
    """The same with all tensors in new memory of the same strides."""
    return [[_clone_strided(t) for t in a] if isinstance(a, list) else a for a in arguments]


def _clone_strided(t: Tensor) -> Tensor:
    span = sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) + 1 if t.numel() else 0
    return t.new_empty(span).as_strided(t.shape, t.stride()).copy_(t)


def check(name: str, made: list, case: str = "", found_inf: float | None = None) -> None:
    """The operation writes what its reference does in float64, zeros where that has them, and the same bits with two threads."""
    found = None if found_inf is None else torch.tensor(found_inf)
    one, two = copied(made), copied(made)
    exact = [[t.double() if t.is_floating_point() else t for t in a] if isinstance(a, list) else a for a in copied(made)]
    getattr(reference_update, name)(*exact, found)
    operation = getattr(torch.ops.grasp_sparse, name)
    operation(*one, found)
    torch.set_num_threads(2)
    operation(*two, found)
    torch.set_num_threads(1)
    for got, same, want in zip(written(name, one), written(name, two), written(name, exact), strict=True):
        assert torch.equal(got, same), f"{name}, {case}: two threads give other bits than one"
        if found_inf:
            assert torch.equal(got.double(), want), f"{name}, {case}: written although it was to be left out"
        torch.testing.assert_close(got.double(), want, **TOLERANCE[got.dtype], msg=lambda text: f"{name}, {case}: {text}")
        assert torch.equal(got == 0, want == 0), f"{name}, {case}: other zeros than the reference"
