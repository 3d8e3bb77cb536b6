"""Surgery on whole models: dense layers become sparse ones in place, and back.

A layer is changed where it stands (its class, parameters and buffers), so every reference to it, its hooks, its mode and
the place or places where it is registered stay as they are. Everything is checked and built before the first change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grasp_sparse.formats import mask_from_csr
from grasp_sparse.nn import MaskedConv2d, MaskedLinear, SparseConv2d, SparseLayer, SparseLinear
from grasp_sparse.nn.sparse import STORED, stored_structure
from grasp_sparse.surgery_report import SurgeryReport, input_shapes, report_layers

# Above this share of kept weights a layer runs dense on an exactly masked weight instead. At 0.3 the sparse kernels were 1.05
# to 1.8 times as fast as the dense layer that would run in their place, at 0.4 between 0.75 and 1.3 times
# (benchmarks/results/layers-crossover.csv). That dense linear is nn.Linear; where MKL is as fast as oneDNN, 0.2 is better.
MAX_DENSITY = 0.3

_KINDS = {
    "sparse": {nn.Linear: SparseLinear, nn.Conv2d: SparseConv2d},
    "masked": {nn.Linear: MaskedLinear, nn.Conv2d: MaskedConv2d},
}
_DENSE = (nn.Linear, nn.Conv2d)
_CHANGED = tuple(kind for kinds in _KINDS.values() for kind in kinds.values())
_READ_WEIGHTS_OF_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer)

# What makes a module itself rather than a layer of some kind; it survives the change of kind.
_IDENTITY = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_non_persistent_buffers_set"}

# What sparse layers keep beside tensors and dense ones do not have.
_SPARSE_ONLY = ("weight_shape", "border")


class _Step(NamedTuple):
    """One weight, every layer that holds it, and what becomes of them."""

    layers: list[nn.Module]
    mask: Tensor
    runs: str
    reason: str = ""
    kept: int = 0


def sparsify_(
    model: nn.Module, masks: Mapping[str, Tensor], example_input: Any = None, max_density: float = MAX_DENSITY
) -> SurgeryReport:
    """Turns the masked ``nn.Linear`` and ``nn.Conv2d`` layers of ``model`` into sparse ones, in place.

    Create the optimizer afterwards: the weights are new Parameters. Layers that share a weight share its values. A layer
    then runs ``sparse`` (sparse kernels), ``masked`` (a dense kernel on a weight whose pruned entries stay exactly zero: for
    densities above ``max_density``, grouped convolutions, and layers whose weight another module reads) or ``dense``
    (nothing pruned).

    Args:
        masks: parameter name -> bool tensor of the parameter's shape, True where kept, as from ``gs.prune``.
        example_input: one input of ``model``, or a tuple or dict of them; adds each layer's input shape to the report.
        max_density: largest density that runs sparse, in [0, 1].

    Returns:
        A report of every layer; ``print`` it.

    Raises:
        ValueError: a mask that fits no parameter or not its shape, or a layer that cannot be changed; nothing was changed.
    """
    if not 0 <= max_density <= 1:
        raise ValueError(f"Expected max_density in [0, 1], got {max_density}.")
    steps = _plan(model, masks, max_density)
    replacements = _build(steps)
    shapes = {} if example_input is None else input_shapes(model, example_input)
    decided = {layer: (step.kept, step.runs, step.reason) for step in steps for layer in step.layers}
    report = report_layers(model, decided, dict(getattr(masks, "skipped", ())), shapes)
    _swap(replacements)
    return report


def densify_(model: nn.Module) -> nn.Module:
    """Turns sparse and masked layers back into ``nn.Linear`` and ``nn.Conv2d``, exact zeros where pruned; returns ``model``.

    Create the optimizer anew afterwards: the weights are new Parameters. Layers that shared values share the weight.
    """
    weights: dict[nn.Parameter, nn.Parameter] = {}
    replacements = {}
    for layer in model.modules():
        if isinstance(layer, _CHANGED):
            dense = layer.to_dense()
            dense.weight = weights.setdefault(layer.values if isinstance(layer, SparseLayer) else layer.weight, dense.weight)
            replacements[layer] = dense
    _swap(replacements)
    return model


def load_sparse(model: nn.Module, state_dict: Mapping[str, Any]) -> nn.Module:
    """Gives a freshly built dense ``model`` the structure and the values of a sparse checkpoint, in place; returns it.

    Args:
        model: the dense architecture; its values do not matter.
        state_dict: of a model that went through :func:`sparsify_`; the masks are not needed.

    Raises:
        ValueError: missing or unexpected keys, wrong shapes or corrupt indices, all listed; nothing was changed.
    """
    if any(isinstance(module, _CHANGED) for module in model.modules()):
        raise ValueError("Expected a dense model, got one with sparse layers; use densify_ first or model.load_state_dict.")
    steps, problems = [], []
    for holders in _holders(model).values():
        layers = {name: module for name, module, attribute in holders if type(module) in _DENSE and attribute == "weight"}
        try:
            steps += _stored_step(layers, state_dict)
        except ValueError as error:
            problems.append(str(error))
    _raise_if(problems)
    replacements = _build(steps)
    wanted = model.state_dict()
    for name, module in model.named_modules(remove_duplicate=False):
        if module in replacements:
            prefix = f"{name}." if name else ""
            for key in module.state_dict(prefix=prefix):
                del wanted[key]
            wanted |= replacements[module].state_dict(prefix=prefix)
    _raise_if(_differences(wanted, state_dict))
    _swap(replacements)
    model.load_state_dict(state_dict)
    return model


def _plan(model: nn.Module, masks: Mapping[str, Tensor], max_density: float) -> list[_Step]:
    """Checks every mask against the model and decides how each weight runs."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unknown = [name for name in masks if name not in parameters]
    if unknown:
        hint = "; its layers are sparse already, call densify_ first" if any(isinstance(m, _CHANGED) for m in model.modules()) else ""
        raise ValueError(f"Expected masks named after parameters of the model, got {', '.join(unknown)}{hint}.")
    holders = _holders(model)
    read_elsewhere = {
        child: type(module).__name__
        for module in model.modules()
        if isinstance(module, _READ_WEIGHTS_OF_CHILDREN)
        for child in module.children()
    }
    steps: dict[nn.Parameter, _Step] = {}
    for name, mask in masks.items():
        weight = parameters[name]
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != weight.shape:
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"{name}: Expected a bool mask of shape {list(weight.shape)}, got {got}.")
        if weight in steps:
            if not torch.equal(steps[weight].mask, mask.to(weight.device)):
                raise ValueError(f"{name}: Expected the same mask for every name of a shared weight, got different ones.")
            continue
        for holder in holders[weight]:
            _check_changeable(*holder)
        layers = [module for _, module, _ in holders[weight]]
        reader = next((read_elsewhere[layer] for layer in layers if layer in read_elsewhere), None)
        groups = max(getattr(layer, "groups", 1) for layer in layers)
        mask = mask.to(weight.device)
        kept = int(mask.count_nonzero())
        if kept == mask.numel():
            runs, reason = "dense", "nothing pruned"
        elif groups > 1:
            runs, reason = "masked", f"{groups} groups"
        elif reader:
            runs, reason = "masked", f"{reader} reads the weight"
        elif kept > max_density * mask.numel():
            runs, reason = "masked", f"density above {max_density:g}"
        else:
            runs, reason = "sparse", ""
        steps[weight] = _Step(layers, mask, runs, reason, kept)
    return list(steps.values())


def _holders(model: nn.Module) -> dict[nn.Parameter, list[tuple[str, nn.Module, str]]]:
    """Every parameter with the (module name, module, attribute) triples that hold it; shared ones have several."""
    holders: dict[nn.Parameter, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(parameter, []).append((name, module, attribute))
    return holders


def _check_changeable(name: str, module: nn.Module, attribute: str) -> None:
    """Raises ValueError for a layer whose behaviour would not survive a change of kind."""
    what = f"{name or 'the model itself'} ({type(module).__name__})"
    if isinstance(module, _CHANGED):
        raise ValueError(f"{what}: Expected a dense layer, got one that is pruned already; call densify_ first.")
    if type(module) not in _DENSE or attribute != "weight":
        raise ValueError(f"{what}: Expected nn.Linear or nn.Conv2d to hold the masked {attribute!r}; leave its weight out of the masks.")
    if "forward" in vars(module):
        raise ValueError(f"{what}: Expected the forward of its class, got one set on the module; remove it first.")
    if module._parameters.keys() != {"weight", "bias"} or module._buffers or module._modules:
        raise ValueError(f"{what}: Expected only a weight and a bias, got more parameters, buffers or children; remove them first.")
    if module.weight._backward_hooks or module.weight._post_accumulate_grad_hooks:
        raise ValueError(f"{what}: Expected no hooks on the weight Parameter, which will be replaced; remove them first.")


def _stored_step(layers: dict[str, nn.Module], state_dict: Mapping[str, Any]) -> list[_Step]:
    """What ``state_dict`` says about one weight, held by these named layers: a step, or none if it is stored dense."""
    found = {}
    for name, module in layers.items():
        prefix, shape = f"{name}." if name else "", module.weight.shape
        mask = state_dict.get(f"{prefix}mask")
        if any(prefix + key in state_dict for key in STORED):
            found[name] = "sparse", mask_from_csr(stored_structure(state_dict, prefix, shape), shape)
        elif mask is None:
            found[name] = "dense", torch.ones((), dtype=torch.bool).expand(shape)
        elif isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == shape:
            found[name] = "masked", mask
        else:
            raise ValueError(f"{prefix}mask: Expected a bool tensor of shape {list(shape)}.")
    if not found:
        return []
    runs, mask = next(iter(found.values()))
    if any(other_runs != runs or not torch.equal(other, mask) for other_runs, other in found.values()):
        raise ValueError(f"{', '.join(found)}: Expected one structure for layers that share a weight, got different ones.")
    return [_Step(list(layers.values()), mask, runs)]


def _differences(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    """Keys and shapes in which two state_dicts differ, one line each."""
    lines = [f"missing key {key!r}" for key in wanted if key not in given]
    lines += [f"unexpected key {key!r}" for key in given if key not in wanted]
    for key in filter(given.__contains__, wanted):
        want, got = (getattr(value, "shape", None) for value in (wanted[key], given[key]))
        if want != got:
            lines.append(f"{key}: Expected shape {list(want or ())}, got {list(got or ())}")
    return lines


def _raise_if(problems: Iterable[str]) -> None:
    if problems := list(problems):
        raise ValueError("The state_dict does not fit this model:\n  " + "\n  ".join(problems))


def _build(steps: Iterable[_Step]) -> dict[nn.Module, nn.Module]:
    """The new layer for each old one, sharing Parameters and buffers where the old ones shared the weight."""
    replacements = {}
    for step in steps:
        if step.runs == "dense":
            continue
        first = None
        for layer in step.layers:
            new = _KINDS[step.runs][type(layer)].from_dense(layer, step.mask)
            if first is None:
                first = new
            else:
                new._buffers = dict(first._buffers)
                new._parameters = {**first._parameters, "bias": layer.bias}
            replacements[layer] = new
    return replacements


def _swap(replacements: Mapping[nn.Module, nn.Module]) -> None:
    for module, new in replacements.items():
        if isinstance(module, SparseLayer):
            for name in _SPARSE_ONLY:
                vars(module).pop(name, None)
        module.__class__ = type(new)
        vars(module).update({name: value for name, value in vars(new).items() if name not in _IDENTITY})
