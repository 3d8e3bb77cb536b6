"""Which weights of a model can be pruned: named, tied ones once, the rest listed with the reason they stay dense.

Prunable are the weights of `nn.Linear` and of two-dimensional, ungrouped `nn.Conv2d`, of exactly these types: a subclass
may compute something else with its weight (torch's own attention reads its out_proj without calling it). Biases, norms and
one-dimensional parameters are never pruned and not listed. A frozen weight is prunable like any other: use `exclude`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin

Selector = str | Iterable[str] | Callable[[str, nn.Module], bool]
"""A glob pattern, several, or a predicate(module name, module); patterns match module names and parameter names."""

_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
_REASONS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (nn.MultiheadAttention, "attention keeps its projections packed"),
    (nn.modules.conv._ConvTransposeNd, "transposed convolution"),
    ((nn.Conv1d, nn.Conv3d), "only two-dimensional convolutions can be sparse"),
    (nn.modules.rnn.RNNBase, "recurrent layer"),
    (nn.modules.rnn.RNNCellBase, "recurrent layer"),
    ((nn.Embedding, nn.EmbeddingBag), "a lookup table, not a product"),
    (nn.Bilinear, "bilinear layer"),
)


class PrunableWeight(NamedTuple):
    """One weight tensor that can be pruned."""

    name: str  # as in model.named_parameters()
    parameter: nn.Parameter
    modules: tuple[tuple[str, nn.Module], ...]  # every (name, module) that uses it; several when the weight is tied


class Skipped(NamedTuple):
    """A module that holds weights and stays dense."""

    module: str
    reason: str


class WeightSelection(NamedTuple):
    """What `find_weights` returns."""

    weights: list[PrunableWeight]
    skipped: list[Skipped]


class PrunedLayer:
    """Base of this package's own layers, whose weights are pruned already."""


class _Owner(NamedTuple):
    module_name: str
    module: nn.Module
    parameter_name: str  # within the module

    @property
    def full_name(self) -> str:
        return f"{self.module_name}.{self.parameter_name}" if self.module_name else self.parameter_name


def find_weights(model: nn.Module, include: Selector | None = None, exclude: Selector | None = None) -> WeightSelection:
    """The prunable weights of `model`, in the order of `model.named_parameters()`, and the modules left dense.

    A tied weight appears once, under its first name, and only if every module that holds it could be sparse. `include`
    keeps only the weights it matches, `exclude` drops the ones it matches; a tied weight matches through any of its
    modules.
    Raises ValueError for a pattern that matches nothing, and for layers that are pruned already unless they are left out.
    """
    include, exclude = _listed(include), _listed(exclude)
    _check_unpruned(model, include, exclude)
    owners: dict[int, list[_Owner]] = {}
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module._parameters.items():
            if parameter is not None and _is_matrix(module, parameter):
                owners.setdefault(id(parameter), []).append(_Owner(module_name, module, parameter_name))

    found: list[list[_Owner]] = []
    skipped: dict[str, str] = {}
    for sharing in owners.values():
        reasons = [_why_dense(owner) for owner in sharing]
        if not any(reasons):
            found.append(sharing)
            continue
        blocker = sharing[next(index for index, reason in enumerate(reasons) if reason)]
        kind = type(blocker.module).__name__
        shared = f"its weight is shared with {blocker.full_name!r} ({kind}), which needs it dense"
        for owner, reason in zip(sharing, reasons, strict=True):
            skipped.setdefault(owner.module_name, reason or shared)

    included = _matching(include, found, skipped, model, "include") if include is not None else [True] * len(found)
    excluded = _matching(exclude, found, skipped, model, "exclude") if exclude is not None else [False] * len(found)
    weights = []
    for sharing, wanted, unwanted in zip(found, included, excluded, strict=True):
        if wanted and not unwanted:
            modules = tuple((owner.module_name, owner.module) for owner in sharing)
            weights.append(PrunableWeight(sharing[0].full_name, sharing[0].module.weight, modules))
        else:
            for owner in sharing:
                skipped[owner.module_name] = "excluded by the caller" if unwanted else "not included by the caller"
    position = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return WeightSelection(weights, [Skipped(*entry) for entry in sorted(skipped.items(), key=lambda e: position[e[0]])])


def _listed(selector: Selector | None) -> Selector | None:
    """The selector, to be read more than once."""
    return selector if selector is None or isinstance(selector, str) or callable(selector) else list(selector)


def _check_unpruned(model: nn.Module, include: Selector | None, exclude: Selector | None) -> None:
    """ValueError if the selectors leave in layers that are pruned already: only what is dense would be pruned, without a word."""

    def matched(selector: Selector, name: str, module: nn.Module) -> bool:
        if callable(selector):
            return bool(selector(name, module))
        patterns = [selector] if isinstance(selector, str) else selector
        return any(_names_layer(pattern, name) for pattern in patterns)

    pruned = [
        f"{name or 'the model itself'} ({type(module).__name__})"
        for name, module in model.named_modules()
        if isinstance(module, PrunedLayer)
        and (include is None or matched(include, name, module))
        and not (exclude is not None and matched(exclude, name, module))
    ]
    if pruned:
        got = ", ".join(pruned[:5]) + (f" and {len(pruned) - 5} more" if len(pruned) > 5 else "")
        raise ValueError(f"Expected dense layers to prune, got some that are pruned already, {got}: call densify_ first, or exclude them")


def _names_layer(pattern: str, name: str) -> bool:
    """Whether a pattern matches the layer of this name or its weight as masks call it."""
    return fnmatchcase(name, pattern) or fnmatchcase(f"{name}.weight" if name else "weight", pattern)


def check_initialised(model: nn.Module) -> None:
    """ValueError, naming the first of them, if `model` has lazy modules that have not run yet."""
    for name, module in model.named_modules():
        if any(isinstance(t, UninitializedTensorMixin) for t in (*module._parameters.values(), *module._buffers.values())):
            raise ValueError(f"Expected a model whose weights have shapes, got {_no_weight_yet(module)} ({name or 'the model'})")


def check_within(within: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """ValueError unless there is a bool mask for each of the weights, or scores of weights, that fits it."""
    for name, values in tensors.items():
        mask = within.get(name) if isinstance(within, Mapping) else None
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != values.shape:
            got = f"{mask.dtype} {list(mask.shape)}" if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                "Expected within to hold a bool mask of the same shape for every weight that may be pruned, "
                f"got {got} for {name!r} {list(values.shape)}"
            )


def check_values(name: str, weight: Tensor) -> None:
    """ValueError for a weight on the meta device: it has a shape and no values."""
    if weight.is_meta:
        raise ValueError(
            f"Expected weights with values, got {name!r} on the meta device: call model.to_empty(device=...), then initialise or load them"
        )


def _no_weight_yet(module: nn.Module) -> str:
    return f"{type(module).__name__} has no weight yet: run one forward first"


def _is_matrix(module: nn.Module, parameter: nn.Parameter) -> bool:
    if isinstance(parameter, UninitializedTensorMixin):
        return True
    return parameter.ndim >= 2 and not isinstance(module, _NORMS)


def _why_dense(owner: _Owner) -> str | None:
    """The reason this module's parameter cannot be pruned, or None when it can."""
    module, name = owner.module, owner.parameter_name
    kind = type(module).__name__
    if isinstance(module, PrunedLayer):
        return f"{kind} is pruned already"
    if kind.startswith("Lazy"):
        return _no_weight_yet(module)
    for types, reason in _REASONS:
        if isinstance(module, types):
            return f"{kind} ({name}): {reason}"
    if type(module) not in (nn.Linear, nn.Conv2d):
        base = next((b.__name__ for b in (nn.Linear, nn.Conv2d) if isinstance(module, b)), None)
        if base:
            return f"{kind} is a subclass of {base} and may use its weight in another way"
        return f"{kind} ({name}) is neither Linear nor Conv2d"
    if name != "weight":
        return f"{kind} is re-parametrised ({name})"
    if module.weight.numel() == 0 or not module.weight.is_floating_point():
        return f"{kind} has {'no elements' if module.weight.numel() == 0 else f'dtype {module.weight.dtype}'}"
    if type(module) is nn.Conv2d and module.groups != 1:
        return f"Conv2d with groups={module.groups}: only groups=1 can be sparse"
    return None


def _matching(
    selector: Selector, found: list[list[_Owner]], skipped: dict[str, str], model: nn.Module, argument: str
) -> list[bool]:
    """Per found weight, whether the selector matches one of its owners."""
    if callable(selector):
        return [any(selector(owner.module_name, owner.module) for owner in sharing) for sharing in found]
    patterns = [selector] if isinstance(selector, str) else selector
    matched = [False] * len(found)
    for pattern in patterns:
        hits = [any(_names_layer(pattern, owner.module_name) for owner in sharing) for sharing in found]
        if not any(hits):
            _refuse_pattern(pattern, argument, skipped, model, found)
        matched = [a or b for a, b in zip(matched, hits, strict=True)]
    return matched


def _refuse_pattern(
    pattern: str, argument: str, skipped: dict[str, str], model: nn.Module, found: list[list[_Owner]]
) -> None:
    dense = next((name for name in skipped if _names_layer(pattern, name)), None)
    if dense is not None and argument == "exclude":
        return  # it is dense anyway, which is what the caller asked for
    if dense is not None:
        hint = f"{dense!r} stays dense: {skipped[dense]}"
    elif any(fnmatchcase(name, pattern) for name, _ in model.named_modules()):
        hint = f"it names a module without weights of its own; for everything inside write {pattern + '.*'!r}"
    else:
        names = [repr(sharing[0].full_name) for sharing in found[:8]] + ["…"] * (len(found) > 8)
        hint = f"prunable are {', '.join(names)}"
    raise ValueError(
        f"Expected every pattern in {argument} to match a prunable weight, got {pattern!r} which matches none: {hint}"
    )
