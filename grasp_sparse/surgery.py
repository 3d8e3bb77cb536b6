"""Surgery on whole models: dense layers become sparse ones in place, and back.

A layer is changed where it stands (its class, parameters and buffers), so every reference to it, its hooks, its mode and
the place or places where it is registered stay as they are. Everything is checked and built before the first change.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grasp_sparse.fusion import fuse_, unfuse_
from grasp_sparse.nn import MaskedConv2d, MaskedLinear, SparseConv2d, SparseLayer, SparseLinear
from grasp_sparse.nn.sparse import STORED, stored_structure
from grasp_sparse.planning import MAX_DENSITY, decided_by_example, density_plan, given_plan, layer_inputs, measured_plan
from grasp_sparse.surgery_report import SurgeryReport, report_layers
from grasp_sparse.targets import CHANGED, DENSE, BlockSize, find_targets, parameter_holders

_KINDS = {
    "sparse": {nn.Linear: SparseLinear, nn.Conv2d: SparseConv2d},
    "masked": {nn.Linear: MaskedLinear, nn.Conv2d: MaskedConv2d},
}

# What makes a module itself rather than a layer of some kind; it survives the change of kind.
_IDENTITY = vars(nn.Module()).keys() - {"_parameters", "_buffers", "_non_persistent_buffers_set"}

# What sparse layers keep beside tensors and dense ones do not have.
_OURS_ONLY = ("weight_shape", "block_size", "border", "_seen", "_hooks")


class _Step(NamedTuple):
    """One weight, every layer that holds it, and what becomes of them."""

    layers: list[nn.Module]
    mask: Tensor
    runs: str
    block_size: BlockSize


def sparsify_(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    example_input: Any = None,
    plan: str | Mapping[str, str] = "auto",
    max_density: float | None = None,
) -> SurgeryReport:
    """Turns the masked ``nn.Linear`` and ``nn.Conv2d`` layers of ``model`` into sparse ones, in place.

    Create the optimizer afterwards: the weights are new Parameters. Layers that share a weight share its values. Batch norms
    are fused: they, and sparse layers, apply the ReLU behind them in calls where nobody sees what lies between the two, so layers
    may still be replaced, sliced, hooked and called alone (:func:`grasp_sparse.fusion.fuse_`). A layer then runs ``sparse``
    (sparse kernels), ``masked`` (a dense kernel on a weight whose pruned entries stay exactly zero: where that is faster, for
    grouped convolutions, and for layers whose weight another module reads) or ``dense`` (nothing pruned). Masks made with a block
    pattern, as their recipe says, give layers that store whole blocks, or single weights where these were measured to be faster; all
    others store single weights.

    Args:
        masks: parameter name -> bool tensor of the parameter's shape, True where kept, as from ``gs.prune``.
        example_input: one input of ``model``, or a tuple or dict of them. Give it as many samples as a training step has:
            the layers are measured on what it gives them, and a batch of one is measured as a batch of one.
            Layers that it does not call, or whose weight is read outside the layer when the model runs on it, run masked, unless
            a mapping says otherwise.
        plan: who runs sparse and who masked. "auto" measures each layer in every way where there is an ``example_input`` (and no
            ``max_density``), and goes by density otherwise; "density" goes by density; or a mapping from parameter name
            to "sparse" or "masked", as from ``gs.plan``.
        max_density: largest density that runs sparse, in [0, 1], by density; 0.3 unless given.

    Returns:
        A report of every layer; ``print`` it.

    Raises:
        ValueError: a mask that fits no parameter or not its shape, a layer that cannot be changed, or a plan that does not
            decide every masked layer or decides what is not possible; nothing was changed.
    """
    if max_density is not None and not 0 <= max_density <= 1:
        raise ValueError(f"Expected max_density in [0, 1], got {max_density}.")
    if not (plan in ("auto", "density") if isinstance(plan, str) else isinstance(plan, Mapping)):
        raise ValueError(f'Expected plan to be "auto", "density" or a mapping from parameter names, got {plan!r}.')
    if max_density is not None and not isinstance(plan, str):
        raise ValueError("Expected a plan or max_density, got both; leave one out.")
    targets = find_targets(model, masks)
    inputs = {} if example_input is None else layer_inputs(model, example_input)
    if isinstance(plan, str) and example_input is not None:  # a plan of the caller's own may ask for more
        targets = decided_by_example(targets, inputs)
    if not isinstance(plan, str):
        chosen = given_plan(targets, inputs, plan)
    elif plan == "auto" and example_input is not None and max_density is None:
        chosen = measured_plan(targets, inputs)
    else:
        chosen = density_plan(targets, inputs, MAX_DENSITY if max_density is None else max_density)
    steps = [
        _Step(list(target.layers.values()), target.mask, row.runs, row.block_size)
        for target, row in zip(targets, chosen.rows, strict=True)
    ]
    replacements = _build(steps)
    decided = {layer: row for target, row in zip(targets, chosen.rows, strict=True) for layer in target.layers.values()}
    report = report_layers(model, decided, dict(getattr(masks, "skipped", ())), inputs)
    _swap(replacements)
    return replace(report, fused_norms=len(fuse_(model)) if replacements else 0)


def densify_(model: nn.Module) -> nn.Module:
    """Turns sparse and masked layers back into ``nn.Linear`` and ``nn.Conv2d``, exact zeros where pruned; returns ``model``.

    Create the optimizer anew afterwards: the weights are new Parameters. Layers that shared values share the weight. Weights of a
    model in channels_last come back as torch makes them: ``model.to(memory_format=torch.channels_last)`` again.

    Raises:
        ValueError: a weight or bias is computed from other parameters, by ``torch.nn.utils.parametrize`` or ``torch.nn.utils.prune``;
            nothing was changed.
    """
    for name, layer in model.named_modules():
        if isinstance(layer, CHANGED):
            stored = ("values" if isinstance(layer, SparseLayer) else "weight", "bias")
            if computed := [part for part in stored if part not in layer._parameters]:
                raise ValueError(
                    f"Expected layers with parameters of their own, got {computed[0]} of {name or 'the model itself'} computed from others: "
                    "call torch.nn.utils.parametrize.remove_parametrizations, or torch.nn.utils.prune.remove, first."
                )
    weights: dict[nn.Parameter, nn.Parameter] = {}
    replacements = {}
    for layer in model.modules():
        if isinstance(layer, CHANGED):
            dense = layer.to_dense()
            trained = _trained(layer)
            vars(dense.weight).update(vars(trained))
            dense.weight = weights.setdefault(trained, dense.weight)
            replacements[layer] = dense
    _swap(replacements)
    return unfuse_(model)


def load_sparse(model: nn.Module, state_dict: Mapping[str, Any]) -> nn.Module:
    """Gives a freshly built dense ``model`` the structure and the values of a sparse checkpoint, in place; returns it.

    Args:
        model: the dense architecture; its values do not matter, but they need memory: a model built on the meta device gets some
            by ``model.to_empty(device=...)``, which leaves buffers that are in no state_dict to be filled.
        state_dict: of a model that went through :func:`sparsify_`; the masks are not needed.

    Raises:
        ValueError: missing or unexpected keys, wrong shapes or corrupt indices, all listed, or a model on the meta device;
            nothing was changed.
    """
    if any(isinstance(module, CHANGED) for module in model.modules()):
        raise ValueError("Expected a dense model, got one with sparse layers; use densify_ first or model.load_state_dict.")
    on_meta = next((name for name, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta), None)
    if on_meta is not None:
        raise ValueError(
            f"Expected a model with memory for its values, got {on_meta!r} on the meta device: "
            "call model.to_empty(device=...) first."
        )
    steps, problems = [], []
    for holders in parameter_holders(model).values():
        layers = {name: module for name, module, attribute in holders if type(module) in DENSE and attribute == "weight"}
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
    if replacements:
        fuse_(model)
    model.load_state_dict(versioned(state_dict, model))
    return model


def versioned(state_dict: Mapping[str, Any], model: nn.Module) -> Mapping[str, Any]:
    """``state_dict`` with the versions of its modules, by which some decide how to read it: those of ``model`` if it has none.

    A file of plain tensors holds none, and a module that raises without one (torchvision's MNASNet) could not be read back.
    """
    if hasattr(state_dict, "_metadata"):
        return state_dict
    given = OrderedDict(state_dict)
    given._metadata = model.state_dict()._metadata
    return given


def _stored_step(layers: dict[str, nn.Module], state_dict: Mapping[str, Any]) -> list[_Step]:
    """What ``state_dict`` says about one weight, held by these named layers: a step, or none if it is stored dense."""
    found = {}
    for name, module in layers.items():
        prefix, shape = f"{name}." if name else "", module.weight.shape
        mask = state_dict.get(f"{prefix}mask")
        if any(prefix + key in state_dict for key in STORED):
            storage, indices = stored_structure(state_dict, prefix, shape)
            found[name] = storage.mask(indices, shape), "sparse", storage.block_size
        elif mask is None:
            found[name] = torch.ones((), dtype=torch.bool).expand(shape), "dense", None
        elif isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == shape:
            found[name] = mask, "masked", None
        else:
            raise ValueError(f"{prefix}mask: Expected a bool tensor of shape {list(shape)}.")
    if not found:
        return []
    mask, *kind = next(iter(found.values()))
    if any(other_kind != kind or not torch.equal(other, mask) for other, *other_kind in found.values()):
        raise ValueError(f"{', '.join(found)}: Expected one structure for layers that share a weight, got different ones.")
    return [_Step(list(layers.values()), mask, *kind)]


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
        first, stored = None, {"block_size": step.block_size} if step.runs == "sparse" else {}
        for layer in step.layers:
            new = _KINDS[step.runs][type(layer)].from_dense(layer, step.mask, **stored)
            vars(_trained(new)).update(vars(layer.weight))
            if first is None:
                first = new
            else:
                new._buffers = dict(first._buffers)
                new._parameters = {**first._parameters, "bias": layer.bias}
            replacements[layer] = new
    return replacements


def _trained(layer: nn.Module) -> nn.Parameter:
    """What stands for the weight. Marks that users set on it, for an optimizer's groups say, go on from one to the next."""
    return layer.values if isinstance(layer, SparseLayer) else layer.weight


def _swap(replacements: Mapping[nn.Module, nn.Module]) -> None:
    for module, new in replacements.items():
        if isinstance(module, (SparseLayer, MaskedLinear, MaskedConv2d)):
            for name in _OURS_ONLY:
                vars(module).pop(name, None)
        module.__class__ = type(new)
        vars(module).update({name: value for name, value in vars(new).items() if name not in _IDENTITY})
