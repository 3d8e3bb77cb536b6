"""Whole training steps of one network, dense and pruned, in every memory format, checked against each other first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from grasp_sparse.bench.arms import LAYOUTS, OneDnnLinear, WrongResultError
from grasp_sparse.bench.layer_checks import check_layers
from grasp_sparse.bench.pair_checks import checked_pairs
from grasp_sparse.bench.results import DENSE, SPARSE, Row, kind_of, timing_columns
from grasp_sparse.fusion import fuse_
from grasp_sparse.masks import MaskSet
from grasp_sparse.nn import SparseLayer
from grasp_sparse.poison import poisoned_memory
from grasp_sparse.scratch import preserved_rng
from grasp_sparse.surgery import sparsify_
from grasp_sparse.surgery_report import SurgeryReport
from grasp_sparse.timing import Timing
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.step import loss_function
from grasp_sparse.train.timing import step_arm

Batch = tuple[Tensor, Tensor]

# A small rate: hundreds of steps on one batch must stay among ordinary numbers.
STEP = TrainConfig(lr=1e-4, momentum=0.9, nesterov=False, weight_decay=5e-4)
# A layer's gradient in float64 may differ from the dense one's by this share of its norm, or of NEGLIGIBLE times the whole
# gradient's if that is more. In float32 deep networks cannot be compared: the dense gradient of a VGG-19 is 2e-2 away from its
# own in float64, some layers of a ResNet-50 at 98 % sparsity move by half when the last bits of the input change.
GRADIENT_TOLERANCE, NEGLIGIBLE = 1e-6, 1e-3
EXACT_SAMPLES = 8
# Two dense paths in float32, of networks shallow enough.
DENSE_TOLERANCE = 5e-2
LOSS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Step:
    """A model in training mode with its batch, both in `layout`; `run` makes one training step."""

    layout: str
    model: nn.Module
    batch: Batch
    run: Callable[[], object]

    def __call__(self) -> object:
        return self.run()


def _step(model: nn.Module, batch: Batch, layout: str) -> Step:
    """Takes `model` over. The optimizer is made here, after surgery."""
    x, y = batch
    if layout in LAYOUTS:
        model, x = model.to(memory_format=LAYOUTS[layout]), x.to(memory_format=LAYOUTS[layout])
    return Step(layout, model.train(), (x, y), step_arm(STEP, model, [(x, y)], layout))


def layouts_of(x: Tensor) -> list[str]:
    """The memory formats that a batch like `x` can have: two for images."""
    return list(LAYOUTS) if x.dim() == 4 else ["rows"]


def masked_copy(model: nn.Module, masks: Mapping[str, Tensor]) -> nn.Module:
    """An ordinary dense copy of `model` with zeros where pruned, and biases of norms away from zero.

    Behind a channel without weights a norm gives its bias and rounding; with a bias of zero, as networks begin, rounding alone
    would decide whether a ReLU lets gradients through, and no two kernels would agree.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d) and module.bias is not None:
                module.bias.add_(torch.empty(module.bias.shape).normal_(0, 0.1, generator=generator).to(module.bias.device))
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    return model


def dense_steps(masked: nn.Module, batch: Batch) -> dict[str, Step]:
    """Steps of copies of `masked`; of a network of linear layers alone also one through oneDNN, faster than MKL on AMD."""
    steps = {f"{DENSE} {layout}": _step(copy.deepcopy(masked), batch, layout) for layout in layouts_of(batch[0])}
    linears = [name for name, module in masked.named_modules() if type(module) is nn.Linear]
    if batch[0].dim() == 2 and linears:
        onednn = copy.deepcopy(masked)
        for name in linears:
            onednn.set_submodule(name, OneDnnLinear(onednn.get_submodule(name)))
        steps[f"{DENSE} oneDNN"] = _step(onednn, batch, "rows")
    return steps


def refitted_step(masked: nn.Module, batch: Batch, layout: str) -> Step:
    """A step of a copy of `masked` with the norms, activations and poolings of this package, as they are next to sparse layers."""
    model = copy.deepcopy(masked)
    fuse_(model)
    return _step(model, batch, layout)


def sparse_steps(
    masked: nn.Module, masks: MaskSet, batch: Batch, **surgery: object
) -> tuple[dict[str, Step], dict[str, SurgeryReport]]:
    """Steps of copies of `masked` after surgery, with these options of sparsify_, and what it did, by the same names."""
    steps, reports = {}, {}
    for layout in layouts_of(batch[0]):
        model, x = copy.deepcopy(masked), batch[0]
        if layout in LAYOUTS:
            model, x = model.to(memory_format=LAYOUTS[layout]), x.to(memory_format=LAYOUTS[layout])
        reports[f"{SPARSE} {layout}"] = sparsify_(model.train(), masks, example_input=x, **surgery)
        steps[f"{SPARSE} {layout}"] = _step(model, batch, layout)
    return steps, reports


def check_steps(steps: Mapping[str, Step], masks: Mapping[str, Tensor]) -> float:
    """Each step against the dense one in the same memory format, on memory poisoned with NaN.

    In float32, on the whole batch: the loss, gradients that are finite, and sparse layers one by one
    (:func:`grasp_sparse.bench.layer_checks.check_layers`), with their norms where both are one operation
    (:func:`grasp_sparse.bench.pair_checks.checked_pairs`). In float64, on its first samples: every gradient.
    Returns the largest difference of a layer's gradient as a share of its norm. Raises WrongResultError when one is too large.
    """
    worst = 0.0
    with poisoned_memory():
        for layout in dict.fromkeys(step.layout for step in steps.values()):
            (reference, dense), *others = [(name, step) for name, step in steps.items() if step.layout == layout]
            loss, rounded = _loss_and_gradients(dense.model, dense, masks)
            exact = _loss_and_gradients(dense.model, _exact(dense), masks)[1]
            for name, step in others:
                with checked_pairs(name, step.model):
                    got_loss, got = _loss_and_gradients(dense.model, step, masks)
                if not abs(got_loss - loss) <= LOSS_TOLERANCE * abs(loss):
                    raise WrongResultError(f"{name}: loss {got_loss:.6g}, {reference}: {loss:.6g}; nothing is measured")
                if unfinished := [layer for layer, gradient in got.items() if not gradient.isfinite().all()]:
                    raise WrongResultError(f"{name}: gradient of {unfinished[0]} is not finite; nothing is measured")
                if kind_of(name) == SPARSE:
                    got = _loss_and_gradients(dense.model, _exact(step), masks)[1]
                    worst = max(worst, _compare(name, got, reference, exact, GRADIENT_TOLERANCE))
                else:
                    _compare(name, got, reference, rounded, DENSE_TOLERANCE)
            pruned = {name: step.model for name, step in others if kind_of(name) == SPARSE}
            check_layers(lambda: _loss_and_gradients(dense.model, dense, masks), dense.model, pruned)
    return worst


def _compare(name: str, got: Mapping[str, Tensor], reference: str, expected: Mapping[str, Tensor], allowed: float) -> float:
    """The largest difference of a layer's gradient. Raises WrongResultError where it is more than allowed."""
    worst, whole = 0.0, torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for layer, gradient in expected.items():
        error = float((got[layer] - gradient).norm() / torch.maximum(gradient.norm(), NEGLIGIBLE * whole))
        if not error <= allowed:  # also when it is NaN
            raise WrongResultError(
                f"{name}: gradient of {layer} differs from {reference}'s by {error:.1e} of its norm "
                f"(allowed {allowed:.0e}); nothing is measured"
            )
        worst = max(worst, error)
    return worst


def _exact(step: Step) -> Step:
    """The same step in float64 on the first samples of the batch, as a copy."""
    x, y = step.batch
    few = x[:EXACT_SAMPLES].double()
    few = few.contiguous(memory_format=LAYOUTS[step.layout]) if step.layout in LAYOUTS else few
    return replace(step, model=copy.deepcopy(step.model).double(), batch=(few, y[:EXACT_SAMPLES]))


def _loss_and_gradients(dense: nn.Module, step: Step, masks: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Loss, and by layer name the gradient of weight and bias as one vector; of a pruned weight what belongs to kept entries.

    As one, because the bias of a convolution that feeds a norm has no gradient but noise. Dropout drops the same at every call.
    """
    model, (x, y) = step.model, step.batch
    model.zero_grad(set_to_none=True)
    with preserved_rng(0), _dropout_in_rows(model):
        loss = loss_function(STEP)(model(x), y)
    loss.backward()
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in dense.named_parameters():
        owner, _, attribute = name.rpartition(".")
        layer = model.get_submodule(owner)
        if isinstance(layer, SparseLayer) and attribute == "weight":
            gradient = layer.placed(layer.values.grad)[masks[name]]
        else:
            gradient = getattr(layer, attribute).grad
            gradient = torch.zeros_like(parameter) if gradient is None else gradient
            gradient = gradient[masks[name]] if name in masks else gradient.flatten()
        gradients.setdefault(owner or "the model", []).append(gradient)
    found = {layer: torch.cat(parts) for layer, parts in gradients.items()}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), found


@contextmanager
def _dropout_in_rows(model: nn.Module) -> Iterator[None]:
    """Inside, dropout is given contiguous tensors: it draws in the order of memory, and sparse layers lay theirs differently."""
    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout)
    dropouts = [module for module in model.modules() if isinstance(module, kinds)]
    hooks = [dropout.register_forward_pre_hook(lambda module, inputs: (inputs[0].contiguous(),)) for dropout in dropouts]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def step_rows(steps: Mapping[str, Step], times: Mapping[str, Timing]) -> list[Row]:
    """A row a step: layout, arm, median and quartiles, speed against each dense one."""
    rows = []
    for name, step in steps.items():
        rivals = [other for other in steps if kind_of(other) == kind_of(name)]
        rows.append({
            "pass": "training step", "precision": "float32", "layout": step.layout, "arm": name,
            **timing_columns(times, name, rivals),
        })  # fmt: skip
    return rows


def fastest(times: Mapping[str, Timing], kind: str) -> str:
    """Name of the fastest arm of that kind."""
    return min((name for name in times if kind_of(name) == kind), key=lambda name: times[name].median)
