"""Whole training steps of one network, dense and pruned, in every memory format, checked against each other first."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from grasp_sparse.bench.arms import LAYOUTS, OneDnnLinear, WrongResultError
from grasp_sparse.bench.results import DENSE, SPARSE, Row, kind_of, timing_columns
from grasp_sparse.masks import MaskSet
from grasp_sparse.nn import SparseLayer
from grasp_sparse.poison import poisoned_memory
from grasp_sparse.surgery import sparsify_
from grasp_sparse.surgery_report import SurgeryReport
from grasp_sparse.timing import Timing
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.step import loss_function
from grasp_sparse.train.timing import step_arm

Batch = tuple[Tensor, Tensor]

# A small rate: hundreds of steps on one batch must stay among ordinary numbers.
STEP = TrainConfig(lr=1e-4, momentum=0.9, nesterov=False, weight_decay=5e-4)
# A layer's gradient may differ from the dense one's by this share of its norm, or of NEGLIGIBLE times the whole gradient's
# if that is more: fp32 sums in another order differ by 1e-6 a layer, and a unit near zero then switches in a ReLU. The dense
# gradient of a VGG-19 in fp32 is itself 2e-2 away from its own in fp64 (where sparse and dense agree to 1e-12).
GRADIENT_TOLERANCE = 5e-2
NEGLIGIBLE = 1e-3
# … or by this many times what the dense gradient itself moves when the samples change places and the input its last bits:
# norm layers of nearly empty channels magnify rounding, and a bias that feeds a norm has no gradient but rounding.
NOISE_MARGIN, LAST_BITS = 10, 1e-6
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


def sparse_steps(masked: nn.Module, masks: MaskSet, batch: Batch) -> tuple[dict[str, Step], dict[str, SurgeryReport]]:
    """Steps of copies of `masked` after surgery, and what surgery did, by the same names."""
    steps, reports = {}, {}
    for layout in layouts_of(batch[0]):
        model, x = copy.deepcopy(masked), batch[0]
        if layout in LAYOUTS:
            model, x = model.to(memory_format=LAYOUTS[layout]), x.to(memory_format=LAYOUTS[layout])
        reports[f"{SPARSE} {layout}"] = sparsify_(model.train(), masks, example_input=x)
        steps[f"{SPARSE} {layout}"] = _step(model, batch, layout)
    return steps, reports


def check_steps(steps: Mapping[str, Step], masks: Mapping[str, Tensor]) -> float:
    """Loss and every gradient of each step against the dense one's in the same memory format, on memory poisoned with NaN.

    In the same format, because torch's own norm kernels differ from format to format by more than ours from theirs.
    Returns the largest difference of a layer's gradient as a share of its norm. Raises WrongResultError when one is too large.
    """
    worst = 0.0
    with poisoned_memory():
        for layout in dict.fromkeys(step.layout for step in steps.values()):
            (reference, dense), *others = [(name, step) for name, step in steps.items() if step.layout == layout]
            loss, expected = _loss_and_gradients(dense.model, dense, masks)
            moved = _loss_and_gradients(dense.model, _nudged(dense), masks)[1]
            whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
            for name, step in others:
                got_loss, got = _loss_and_gradients(dense.model, step, masks)
                if not abs(got_loss - loss) <= LOSS_TOLERANCE * abs(loss):
                    raise WrongResultError(f"{name}: loss {got_loss:.6g}, {reference}: {loss:.6g}; nothing is measured")
                for layer, gradient in expected.items():
                    scale = torch.maximum(gradient.norm(), NEGLIGIBLE * whole)
                    error = float((got[layer] - gradient).norm() / scale)
                    allowed = max(GRADIENT_TOLERANCE, NOISE_MARGIN * float((moved[layer] - gradient).norm() / scale))
                    if not error <= allowed:  # also when it is NaN
                        raise WrongResultError(
                            f"{name}: gradient of {layer} differs from {reference}'s by {error:.1e} of its norm "
                            f"(allowed {allowed:.0e}); nothing is measured"
                        )
                    worst = max(worst, error)
    return worst


def _nudged(step: Step) -> Step:
    """The same step on the same samples in another order, the last bits of the input changed: equal but for rounding."""
    x, y = step.batch
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x.shape, generator=generator).mul_(LAST_BITS).add_(1)
    order = torch.randperm(len(y), generator=generator)
    nudged = torch.empty_like(x).copy_((x * noise)[order])  # in the memory format of x
    return replace(step, batch=(nudged, y[order]))


def _loss_and_gradients(dense: nn.Module, step: Step, masks: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """Loss, and by layer name the gradient of weight and bias as one vector; of a pruned weight what belongs to kept entries.

    As one, because the bias of a convolution that feeds a norm has no gradient but noise.
    """
    model, (x, y) = step.model, step.batch
    model.zero_grad(set_to_none=True)
    loss = loss_function(STEP)(model(x), y)
    loss.backward()
    gradients: dict[str, list[Tensor]] = {}
    for name, parameter in dense.named_parameters():
        owner, _, attribute = name.rpartition(".")
        layer = model.get_submodule(owner)
        if isinstance(layer, SparseLayer) and attribute == "weight":
            gradient = layer.values.grad.flatten()
        else:
            gradient = getattr(layer, attribute).grad
            gradient = torch.zeros_like(parameter) if gradient is None else gradient
            gradient = gradient[masks[name]] if name in masks else gradient.flatten()
        gradients.setdefault(owner or "the model", []).append(gradient)
    found = {layer: torch.cat(parts) for layer, parts in gradients.items()}
    model.zero_grad(set_to_none=True)
    return float(loss.detach()), found


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
