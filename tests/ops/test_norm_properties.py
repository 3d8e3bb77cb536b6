"""Batch norm, alone or behind a convolution, equals its reference on calls that hypothesis makes up; see test_properties.py."""

from __future__ import annotations

from dataclasses import replace

import torch
from call_laws import arguments_of, check_against_reference, check_threads, in_float64, lie_alike
from hypothesis import given, settings
from op_cases import TOLERANCE, close
from random_cases import Norm, conv_cases, image_cases, norms
from torch import Tensor

from grasp_sparse.ops import reference
from grasp_sparse.ops.schema import CONV_NORM_SCHEMAS

ops = torch.ops.grasp_sparse
many = settings(max_examples=3 * settings.default.max_examples)  # a case is drawn of two


def check_normalised(z: Tensor, y: Tensor, mean: Tensor, var: Tensor, available: dict, norm: Norm) -> dict:
    """Result and statistics of a batch norm of z are the reference's. Returns what its backward asks for."""
    exact_var, exact_mean = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    close(mean, exact_mean, "mean"), close(var, exact_var, "variance")
    # By the statistics it gave: of a channel that is all but one number, a division by eps makes much of their rounding.
    call = {**available, "x": z, "weight": available["norm_weight"], "bias": available["norm_bias"], "mean": mean, "var": var}
    check_against_reference(["batch_norm_eval"], call)
    evaluated = ops.batch_norm_eval(*arguments_of("batch_norm_eval", call))
    assert torch.equal(y, evaluated) and lie_alike(y, evaluated)
    gate = norm.saved(y) if norm.relu and norm.residual_layout else None
    call["mean"] = mean + (var + norm.eps).sqrt()  # its own would leave the bias of a convolution no gradient at all
    return {**call, "x": norm.saved(z), "y": gate, "g": without_ties(call, gate)}


def without_ties(call: dict, gate: Tensor | None) -> Tensor:
    """g, but for where rounding decides on which side of the ReLU a number lies."""
    if gate is not None or not call["relu"] or call["bias"] is None:
        return call["g"]
    linear = in_float64({**call, "residual": None, "relu": False})
    normalised = reference.batch_norm_eval(*arguments_of("batch_norm_eval", linear))
    ties = normalised.abs() <= 1e-6 * call["bias"].abs().view(-1, 1, 1)
    return torch.where(ties, 0, call["g"]) if ties.any() else call["g"]


def norm_terms(g, x, y, weight, bias, mean, var, eps, relu) -> list[Tensor]:
    """What batch_norm_backward adds up to each of its results, all of it positive."""
    inverse = (var + eps).rsqrt().view(-1, 1, 1)
    g, unit = g.abs(), ((x - mean.view(-1, 1, 1)) * inverse).abs()
    g_weight, g_bias = (g * unit).sum((0, 2, 3)), g.sum((0, 2, 3))
    share_of_weight, share_of_bias = ((sums * g.shape[1] / g.numel()).view(-1, 1, 1) for sums in (g_weight, g_bias))
    scale = inverse if weight is None else inverse * weight.abs().view(-1, 1, 1)
    return [(g + share_of_bias + unit * share_of_weight) * scale, g.new_empty(0) if y is None else g, g_weight, g_bias]


def check_sums(name: str, available: dict, terms: list[Tensor], dtypes: list[torch.dtype]) -> None:
    """As check_against_reference, but terms may all but cancel: the error is measured by the sum of their absolute values, which
    had the precision of these dtypes."""
    actual = getattr(ops, name)(*arguments_of(name, available))
    expected = getattr(reference, name)(*arguments_of(name, in_float64(available)))
    for got, want, sizes, dtype in zip(actual, expected, terms, dtypes, strict=True):
        assert lie_alike(got, want), f"{name}: strides {got.stride()}, expected {want.stride()}"
        sizes = sizes.clamp_min(1e-30) if want.numel() else 1
        tolerance = dict(rtol=0, atol=TOLERANCE[dtype]["rtol"])
        torch.testing.assert_close(got.double() / sizes, want / sizes, **tolerance, msg=lambda text: f"{name}: {text}")


@many
@given(image_cases.filter(lambda case: case.batch and case.size[0]), norms)
def test_batch_norm_equals_reference(case, norm):
    available = case.arguments()
    available |= norm.arguments(available["g"])
    call = {**available, "weight": available["norm_weight"], "bias": available["norm_bias"]}
    y, mean, var = ops.batch_norm_train(*arguments_of("batch_norm_train", call))
    call = check_normalised(call["x"], y, mean, var, available, norm)
    terms = norm_terms(*arguments_of("batch_norm_backward", in_float64(call)))
    check_sums("batch_norm_backward", call, terms, [y.dtype, y.dtype, mean.dtype, mean.dtype])
    check_threads(["batch_norm_train", "batch_norm_eval", "batch_norm_backward"], call)
    count = max(2, y.numel() // y.shape[1])
    call |= {"running_mean": torch.randn_like(mean), "running_var": torch.rand_like(var), "momentum": 0.3, "count": count}
    exact = in_float64(call)
    ops.batch_norm_follow_(*arguments_of("batch_norm_follow_", call))
    reference.batch_norm_follow_(*arguments_of("batch_norm_follow_", exact))
    for name in ("running_mean", "running_var"):
        close(call[name], exact[name], name)


@many
@given(conv_cases.filter(lambda case: case.batch and case.rows), norms)
def test_conv_and_batch_norm_equal_reference(case, norm):
    for laid_out in (case, replace(case, x_layout="channels_last")):  # there the norm is done on the way
        available = laid_out.arguments()
        available |= norm.arguments(available["g"])
        y, z, mean, var = ops.csr_conv2d_norm_train(*arguments_of("csr_conv2d_norm_train", available))
        exact = in_float64(available)
        want = reference.csr_conv2d_fprop(*arguments_of("csr_conv2d_fprop", exact))
        close(z, want, "convolution")
        assert lie_alike(z, want)
        of_norm = check_normalised(z, y, mean, var, available, norm)
        call = available | {"z": of_norm["x"]} | {name: of_norm[name] for name in ("y", "g", "mean", "var")}
        g, *terms = norm_terms(*arguments_of("batch_norm_backward", in_float64(of_norm)))
        positive = exact | {"values": exact["values"].abs(), "g": g, "x": exact["x"].abs()}
        terms = [*reference.csr_conv2d_backward(*arguments_of("csr_conv2d_backward", positive)), *terms]
        check_sums("csr_conv2d_norm_backward", call, terms, [y.dtype] * 4 + [mean.dtype] * 2)
        check_threads(list(CONV_NORM_SCHEMAS), call)
