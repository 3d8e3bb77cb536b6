"""What surgery is about to change: each masked weight with every layer that holds it, checked against the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from grasp_sparse.formats import CsrIndices, storage_of
from grasp_sparse.nn import MaskedConv2d, MaskedLinear, SparseConv2d, SparseLinear
from grasp_sparse.patterns import Pattern, Unstructured, get_pattern
from grasp_sparse.weights import check_values

DENSE = (nn.Linear, nn.Conv2d)
CHANGED = (SparseLinear, SparseConv2d, MaskedLinear, MaskedConv2d)
BlockSize = tuple[int, int] | None  # of the blocks that a sparse layer stores whole; None: it stores single weights
# Names that layers of CHANGED have and dense ones do not: an attribute of the user's under one of them would hide theirs, or be lost.
_TAKEN = {"values", "mask", "weight_shape", "block_size", "border", "_hooks", *CsrIndices._fields}
_TAKEN |= {name for kind in CHANGED for name in dir(kind)}
_TAKEN = _TAKEN.difference(dir(nn.Linear(1, 1, device="meta")), dir(nn.Conv2d(1, 1, 1, device="meta")))
_READ_WEIGHTS_OF_CHILDREN = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


class Target(NamedTuple):
    """One weight that has a mask."""

    names: tuple[str, ...]  # of the parameter, as in masks; several when the weight is shared and has several masks
    layers: dict[str, nn.Module]  # module name -> every layer that holds the weight
    mask: Tensor  # on the weight's device
    kept: int
    runs: str | None  # "dense" or "masked" where nothing else is possible, None where there is a choice
    reason: str  # why there is none
    pattern: Pattern = Unstructured()  # that the masks were made with

    @property
    def density(self) -> float:
        """Kept weights as a share of all."""
        return self.kept / max(1, self.mask.numel())

    @property
    def block_size(self) -> BlockSize:
        """Of the pattern's blocks."""
        return self.pattern.block_size

    @property
    def storages(self) -> tuple[BlockSize, ...]:
        """What a sparse layer may store: the pattern's blocks, if it has any, and in any case single weights."""
        return (None,) if self.block_size is None else (self.block_size, None)


def find_targets(model: nn.Module, masks: Mapping[str, Tensor]) -> list[Target]:
    """The masked weights of ``model``, in the order of ``masks``, shared ones once; changes nothing.

    Raises:
        ValueError: a mask that fits no parameter or not its shape or not the pattern of the masks' recipe, different masks for
            one weight, one on the meta device, or a layer that cannot be changed.
    """
    pattern = _pattern_of(masks)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    unknown = [name for name in masks if name not in parameters]
    if unknown:
        hint = "; its layers are sparse already, call densify_ first" if any(isinstance(m, CHANGED) for m in model.modules()) else ""
        raise ValueError(f"Expected masks named after parameters of the model, got {', '.join(unknown)}{hint}.")
    holders = parameter_holders(model)
    read_elsewhere = {
        child: type(module).__name__
        for module in model.modules()
        if isinstance(module, _READ_WEIGHTS_OF_CHILDREN)
        for child in module.children()
    }
    targets: dict[nn.Parameter, Target] = {}
    for name, mask in masks.items():
        weight = parameters[name]
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != weight.shape:
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(f"{name}: Expected a bool mask of shape {list(weight.shape)}, got {got}.")
        check_values(name, weight)
        if weight in targets:
            target = targets[weight]
            if not torch.equal(target.mask, mask.to(weight.device)):
                raise ValueError(f"{name}: Expected the same mask for every name of a shared weight, got different ones.")
            targets[weight] = target._replace(names=(*target.names, name))
            continue
        for holder in holders[weight]:
            _check_changeable(*holder)
        layers = {module_name: module for module_name, module, _ in holders[weight]}
        mask = mask.to(weight.device)
        kept = int(mask.count_nonzero())
        reader = next((read_elsewhere[layer] for layer in layers.values() if layer in read_elsewhere), None)
        groups = max(getattr(layer, "groups", 1) for layer in layers.values())
        runs, reason = None, ""
        if kept == mask.numel():
            runs, reason = "dense", "nothing pruned"
        elif groups > 1:
            runs, reason = "masked", f"{groups} groups"
        elif reader:
            runs, reason = "masked", f"{reader} reads the weight"
        else:
            _check_storable(name, mask, pattern)
        targets[weight] = Target((name,), layers, mask, kept, runs, reason, pattern)
    return list(targets.values())


def _pattern_of(masks: Mapping[str, Tensor]) -> Pattern:
    """The pattern that the recipe of a MaskSet names; single weights where there is none, or one of the caller's own."""
    try:
        return get_pattern(str(getattr(masks, "recipe", {}).get("pattern", Unstructured.name)))
    except ValueError:
        return Unstructured()


def _check_storable(name: str, mask: Tensor, pattern: Pattern) -> None:
    if pattern.block_size is not None:
        try:
            storage_of(pattern.block_size).from_mask(mask)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None


def parameter_holders(model: nn.Module) -> dict[nn.Parameter, list[tuple[str, nn.Module, str]]]:
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
    if isinstance(module, CHANGED):
        raise ValueError(f"{what}: Expected a dense layer, got one that is pruned already; call densify_ first.")
    if type(module) not in DENSE or attribute != "weight":
        raise ValueError(f"{what}: Expected nn.Linear or nn.Conv2d to hold the masked {attribute!r}; leave its weight out of the masks.")
    if "forward" in vars(module):
        raise ValueError(f"{what}: Expected the forward of its class, got one set on the module; remove it first.")
    if taken := sorted(_TAKEN & vars(module).keys()):
        raise ValueError(f"{what}: Expected no attribute by a name of pruned layers, got {', '.join(taken)}; rename or delete it first.")
    if module._parameters.keys() != {"weight", "bias"} or module._buffers or module._modules:
        raise ValueError(f"{what}: Expected only a weight and a bias, got more parameters, buffers or children; remove them first.")
    if module.weight._backward_hooks or module.weight._post_accumulate_grad_hooks:
        raise ValueError(f"{what}: Expected no hooks on the weight Parameter, which will be replaced; remove them first.")
