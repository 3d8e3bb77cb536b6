"""Before the first step: data and model that fit together, masks, sparse layers, and the table of what was kept."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from grasp_sparse.costs import weight_costs
from grasp_sparse.criteria import get_criterion
from grasp_sparse.criteria.batches import RereadBatches
from grasp_sparse.masks import MaskSet
from grasp_sparse.planning import plan
from grasp_sparse.pruning import prune
from grasp_sparse.surgery import sparsify_
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.criterion_args import criterion_options
from grasp_sparse.train.data.images import WHOLE, Share
from grasp_sparse.train.data.normalization import in_layout
from grasp_sparse.train.data.sets import Data, load_data
from grasp_sparse.train.distributed import Ranks, all_reduce_sum, broadcast_tensors, current_ranks, gather, on_main, use_device
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.logging import say, table
from grasp_sparse.train.models import build_model
from grasp_sparse.train.step import autocast, memory_format, step_options
from grasp_sparse.train.streams import seed_streams


def fresh_model(config: TrainConfig, data: Data) -> nn.Module:
    """The run's dense model with initial weights that depend on the seed alone, on the run's device."""
    seed_streams(config.seed)
    model = build_model(config.model, data.num_classes, data.shape[0], config.model_args)
    return model.to(config.device, memory_format=memory_format(config.memory_format))


def data_and_model(config: TrainConfig) -> tuple[Data, nn.Module]:
    """Data, the same on all ranks, and fresh model, checked against each other by one forward pass. Sets threads and seed first."""
    use_device(config)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    data = load_data(config)
    check_same_data(data)
    model = fresh_model(config, data)
    broadcast_tensors([*model.parameters(), *model.buffers()])  # a factory may draw from elsewhere than the seed
    model.eval()
    try:
        with torch.no_grad():
            logits = model(example_input(config, data))
    except Exception as error:  # anybody's model: some assert on the image size, some fail deep inside
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"model {config.model} cannot take {data.name} images of shape {data.shape}: {reason}") from error
    model.train()
    if not torch.is_tensor(logits) or logits.shape != (1, data.num_classes):
        shape = tuple(logits.shape) if torch.is_tensor(logits) else type(logits).__name__
        raise UserError(f"Expected model {config.model} to give logits of shape (1, {data.num_classes}) for one image, got {shape}")
    return data, model


def example_input(config: TrainConfig, data: Data) -> torch.Tensor:
    """One blank image [1, C, H, W] on the run's device."""
    return torch.zeros(1, *data.shape, device=config.device)


def example_batch(config: TrainConfig, data: Data) -> torch.Tensor:
    """Noise in the shape and layout of a training batch, [batch_size, C, H, W], for measuring what layers and steps cost."""
    batch = torch.randn(config.batch_size, *data.shape, generator=torch.Generator().manual_seed(0))
    return in_layout(batch.to(config.device), config.memory_format)


def masks_for(config: TrainConfig, model: nn.Module, data: Data) -> MaskSet:
    """Read --masks, or score `model` on class-balanced training images and choose what to keep; rank 0's, on every rank.

    The ranks share the images of criteria that add over them. What a speedup takes is measured by rank 0, alone.
    """
    if config.masks is not None:
        return on_main(lambda: _read_masks(config, model))
    if config.budget == "time":
        return on_main(lambda: _on_cpu(_score(config, model, data, Ranks())))
    masks = _score(config, model, data, current_ranks())
    return on_main(lambda: _on_cpu(masks)) if current_ranks().size > 1 else masks


def _read_masks(config: TrainConfig, model: nn.Module) -> MaskSet:
    path = Path(config.masks)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "nothing"
        raise UserError(f"Expected --masks to be a mask file, got {found} at {path}; `grasp-sparse prune` writes one")
    masks = MaskSet.load(path)
    masks.check(model)
    say(f"masks of {path} as they are, {masks.sparsity:.3%} of the weights removed; --sparsity and --criterion choose nothing")
    return masks


def _on_cpu(masks: MaskSet) -> MaskSet:
    return MaskSet({name: mask.cpu() for name, mask in masks.items()}, masks.recipe, masks.skipped)


def _score(config: TrainConfig, model: nn.Module, data: Data, ranks: Ranks) -> MaskSet:
    options = criterion_options(config)
    if config.budget == "time" and config.precision != "fp32":
        raise UserError(
            f"Expected --precision fp32 with --budget time, which measures steps in it, got {config.precision}; choose another --budget, "
            "or give masks that were made for a speedup in fp32 with --masks"
        )
    shared = ranks.size > 1 and get_criterion(config.criterion).sums
    if shared and (drawing := sorted(options.keys() & {"num_batches", "samples_per_class", "num_classes"})):
        raise UserError(f"Expected no {drawing[0]} in criterion_args on several ranks; use --samples-per-class and --score-batch")
    share = Share(ranks.rank, ranks.size) if shared else WHOLE
    batches = data.scoring_batches(config.samples_per_class, config.score_batch, config.seed, share)

    def prepared() -> Iterator[tuple[Tensor, Tensor]]:
        return ((data.prepare(x, config.device), y.to(config.device)) for x, y in batches)

    say(f"scoring {config.model} with {config.criterion} on {batches.total:,} training images")
    if config.budget == "time":
        say(f"measuring layers and steps at batch {config.batch_size} for a speedup of {config.speedup:g}")
        goal = {"speedup": config.speedup, "example_input": example_batch(config, data)}
        goal |= {"plan": config.plan, "max_density": config.max_density}
    else:
        goal = {"sparsity": config.sparsity, "example_input": example_input(config, data)}
    masks = prune(
        model, RereadBatches(prepared), criterion=config.criterion, pattern=config.pattern,
        scope=config.scope, budget=config.budget, min_density=config.min_density, include=config.include or None,
        exclude=config.exclude or None, seed=config.seed, reduce=all_reduce_sum if shared else None, **goal, **options,
    )
    if config.budget == "time":
        dense, sparse = masks.recipe["dense_step_s"], masks.recipe["sparse_step_s"]
        say(f"a step of these masks: {sparse:.4f} s, dense {dense:.4f} s, {dense / sparse:.2f} times as fast")
    return masks


def pruning_summary(masks: MaskSet, costs: Mapping[str, float], runs: Mapping[str, str]) -> dict[str, Any]:
    """What was kept, in plain values: shares removed, and a row per layer (`runs`: parameter name -> how it runs)."""
    layers = []
    for name, mask in masks.items():
        kept, total = int(mask.sum()), mask.numel()
        layers.append({
            "name": name, "shape": list(mask.shape), "kept": kept, "total": total, "density": kept / total,
            "flops_kept": round(kept * costs[name]), "flops_total": round(total * costs[name]), "runs": runs.get(name, ""),
        })
    return {
        "weight_sparsity": float(masks.sparsity),
        "flop_sparsity": float(masks.flop_sparsity(costs)),
        "skipped": [[str(name), str(reason)] for name, reason in masks.skipped],
        "layers": layers,
    }


def sparsify_for_training(config: TrainConfig, model: nn.Module, masks: MaskSet, data: Data) -> dict[str, Any]:
    """Make the layers of `model` sparse in place, print the table, return its pruning summary.

    Rank 0 measures how each layer runs, for all: values must mean the same weights everywhere. Raises UserError unless they do.
    Layers are measured in the precision that they will train in.
    """
    costs = weight_costs(model, example_input(config, data), include=list(masks))
    example, ranks = example_batch(config, data), current_ranks()
    measured = config.plan == "auto" and config.max_density is None
    if measured:
        say(f"measuring how each of {len(masks)} layers runs fastest, unless it was measured before")
    with autocast(example.device, step_options(config).dtype):
        if ranks.size > 1 and measured:
            report = sparsify_(model, masks, example, on_main(lambda: plan(model, masks, example)))
        else:
            report = sparsify_(model, masks, example, config.plan, config.max_density)
    check_same_structure(model)
    runs = {f"{row.name}.weight": row.runs for row in report.rows}
    summary = pruning_summary(masks, costs, runs)
    say(density_table(summary))
    if ranks.size > 1:
        say(f"masks {masks.digest()[:16]} and the layers made of them are the same on all {ranks.size} ranks")
    return summary


def check_same_data(data: Data) -> None:
    """UserError unless every rank found the same images: their shares of a step would overlap, or miss some."""
    found = gather((data.digest, f"{len(data.train):,} + {len(data.test):,} images from {data.source}"))
    if others := [rank for rank, (digest, _) in enumerate(found) if digest != found[0][0]]:
        got = "; ".join(f"rank {rank}: {found[rank][1]}" for rank in (0, others[0]))
        raise UserError(
            f"Expected the same data on all ranks, got other images, names or classes than rank 0's on rank "
            f"{', '.join(map(str, others))} ({got}); give every rank the same copy in --data-dir"
        )


def check_same_structure(model: nn.Module) -> None:
    """UserError unless `model` has the same tensors, and the same indices and masks, on every rank."""
    digests = gather(structure_digest(model))
    if others := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
        raise UserError(
            f"Expected the same masks and layers on all ranks, got others than rank 0's on rank {', '.join(map(str, others))}; "
            "every rank needs the same model, seed, data and version of this package"
        )


def structure_digest(model: nn.Module) -> str:
    """SHA-256 of what must agree before gradients may be added: names, shapes and dtypes, and the contents of indices and masks."""
    hashed = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):  # what get_extra_state gave: it need not agree
            continue
        hashed.update(f"{name} {tuple(tensor.shape)} {tensor.dtype};".encode())
        if tensor.dim() and not tensor.is_floating_point():
            hashed.update(_bytes_of(tensor))
    return hashed.hexdigest()


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().numpy().tobytes()


def density_table(summary: dict[str, Any]) -> str:
    """The layers, one a line, then both totals and what was left out of pruning."""
    rows = [
        (layer["name"], "x".join(map(str, layer["shape"])), f"{layer['kept']:,}", f"{layer['density']:.3%}",
         f"{layer['flops_kept']:,}", layer["runs"])
        for layer in summary["layers"]
    ]
    kept, total = (sum(layer[key] for layer in summary["layers"]) for key in ("kept", "total"))
    flops = sum(layer["flops_kept"] for layer in summary["layers"])
    rows.append(("all", "", f"{kept:,}", f"{kept / total:.3%}", f"{flops:,}", ""))
    lines = [table(("layer", "shape", "kept", "density", "multiply-adds", "runs"), rows, right=(2, 3, 4))]
    lines.append(f"removed: {summary['weight_sparsity']:.3%} of weights, {summary['flop_sparsity']:.3%} of multiply-adds")
    lines += [f"left dense: {name} ({reason})" for name, reason in summary["skipped"]]
    return "\n".join(lines)
