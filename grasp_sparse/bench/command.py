"""`grasp-sparse bench`: what pruning a user's own model would bring, layer by layer and for a whole training step."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from grasp_sparse.bench.arms import WrongResultError
from grasp_sparse.bench.denormals import flush_denormals
from grasp_sparse.bench.layers import layer_table, measure_layers, verdict
from grasp_sparse.bench.results import DENSE, SPARSE, Row, kind_of, machine, now, write_rows
from grasp_sparse.bench.steps import check_steps, dense_steps, fastest, masked_copy, sparse_steps, step_rows
from grasp_sparse.choice import sparsity_under
from grasp_sparse.costs import weight_costs
from grasp_sparse.masks import MaskSet
from grasp_sparse.patterns import get_pattern
from grasp_sparse.pruning import prune
from grasp_sparse.timing import interleaved
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.logging import say, table
from grasp_sparse.train.models import build_model

_SCORING_PIECE = 8  # samples scored at a time: GraSP's second derivative keeps several times a step's memory


@dataclass(frozen=True)
class BenchOptions:
    """Flags of the command; `input` as "32x3x224x224", batch first."""

    model: str
    input: str
    sparsity: float | None = None
    pattern: str = "unstructured"
    budget: str = "weights"
    criterion: str = "grasp"
    num_classes: int | None = None
    rounds: int = 9
    seconds_per_layer: float = 1.0
    threads: int | None = None
    seed: int = 0
    out: Path | None = None


def input_shape(text: str) -> tuple[int, ...]:
    """"32x3x224x224" -> (32, 3, 224, 224). Raises UserError for anything else, and for a batch of one: norm layers need two."""
    parts = text.lower().split("x")
    if not all(part.isdecimal() and int(part) for part in parts) or len(parts) < 2 or int(parts[0]) < 2:
        raise UserError(f"Expected --input as BATCHxCHANNELSxHEIGHTxWIDTH, e.g. 32x3x224x224, a batch of at least 2; got {text!r}")
    return tuple(map(int, parts))


def _checked(options: BenchOptions) -> tuple[int, ...]:
    if not 0 < sparsity_under(get_pattern(options.pattern), options.sparsity) < 1:
        raise UserError(f"Expected --sparsity above 0 and below 1, got {options.sparsity}")
    if options.rounds < 2:
        raise UserError(f"Expected --rounds of at least 2, for quartiles; got {options.rounds}")
    if not options.seconds_per_layer > 0:
        raise UserError(f"Expected --seconds-per-layer above 0, got {options.seconds_per_layer}")
    if options.threads is not None and not 1 <= options.threads <= 4096:
        raise UserError(f"Expected --threads: 1 to 4096, got {options.threads}")
    return input_shape(options.input)


def model_and_batch(options: BenchOptions, shape: tuple[int, ...]) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The model with fresh weights, and a batch of normal random numbers with random classes as targets."""
    torch.manual_seed(options.seed)
    model = build_model(options.model, options.num_classes, shape[1] if len(shape) == 4 else None)
    x = torch.randn(shape)
    try:
        with torch.no_grad():
            logits = model.eval()(x[:2])
    except Exception as error:  # anybody's model
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"model {options.model} cannot take an input {options.input}: {reason}") from error
    if not torch.is_tensor(logits) or logits.dim() != 2:
        found = f"shape {list(logits.shape)}" if torch.is_tensor(logits) else type(logits).__name__
        raise UserError(f"Expected model {options.model} to return logits [N, classes], got {found}")
    with torch.no_grad():
        trained = copy.deepcopy(model).train()(x[:2])  # a copy: running statistics move
    if not torch.is_tensor(trained):
        raise UserError(
            f"Expected model {options.model} to return logits in training, got {type(trained).__name__}; give a factory of yours, "
            "package.module:factory, that builds it without auxiliary outputs"
        )
    return model.train(), (x, torch.randint(logits.shape[1], (len(x),)))


def run_bench(options: BenchOptions) -> None:
    """Prunes, measures, prints both tables, writes the CSV if one is wanted. Raises UserError for bad input."""
    shape = _checked(options)
    denormals = flush_denormals()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model, batch = model_and_batch(options, shape)
    say(f"{options.model}, input {options.input}, {torch.get_num_threads()} threads: masks by {options.criterion} on random "
        "normal inputs and random targets, so the network is yours and the choice of weights is only typical")
    masks = prune(
        model, [batch], options.sparsity, options.criterion, pattern=options.pattern, budget=options.budget,
        micro_batch_size=_SCORING_PIECE, seed=options.seed,
    )  # fmt: skip
    costs = weight_costs(model, batch[0][:1], include=list(masks))
    say(f"removed: {masks.sparsity:.2%} of the weights, {masks.flop_sparsity(costs):.2%} of the multiply-adds")
    try:
        rows = _measure(options, model, masks, batch)
    except WrongResultError as error:
        raise UserError(f"a pruned layer computes something else than the dense one: {error}") from error
    if options.out is not None:
        common = {
            "model": options.model, "model_input": options.input, "criterion": options.criterion, "budget": options.budget,
            "pattern": masks.recipe["pattern"], "sparsity": f"{masks.recipe['sparsity']:g}",
            "weight_sparsity": f"{masks.sparsity:.5f}",
            "flop_sparsity": f"{masks.flop_sparsity(costs):.5f}",
        }  # fmt: skip
        environment = {"denormals": denormals} | machine() | {"date": now()}
        write_rows(options.out, [common | row | environment for row in rows])
        say(f"wrote {options.out}")


def _measure(options: BenchOptions, model: nn.Module, masks: MaskSet, batch: tuple[Tensor, Tensor]) -> list[Row]:
    masked = masked_copy(model, masks)
    sparse, reports = sparse_steps(masked, masks, batch)
    steps = dense_steps(masked, batch) | sparse
    check_steps(steps, masks)
    untrained = {name: copy.deepcopy(step.model) for name, step in sparse.items()}  # measured steps move the weights
    with tqdm(total=len(steps) * (options.rounds + 2), desc="steps", leave=False, disable=not sys.stderr.isatty()) as progress:

        def watched(step):
            return lambda: (step(), progress.update())

        times = interleaved({name: watched(step) for name, step in steps.items()}, options.rounds, warmup=2)
    rows = step_rows(steps, times)
    best = {kind: fastest(times, kind) for kind in (DENSE, SPARSE)}

    def bar(layers: Iterable) -> Iterable:
        return tqdm(layers, desc="layers", leave=False, disable=not sys.stderr.isatty())

    # Of the network one would train: layers are planned for the memory format they run in, and the other's plan is another.
    report = reports[best[SPARSE]]
    layers = measure_layers(masked, untrained[best[SPARSE]], report, seconds=options.seconds_per_layer, progress=bar)
    say()
    header = ("layer", "input", "runs", "density", "dense ms", "sparse ms", "speed")
    say(table(header, layer_table(layers), right=(3, 4, 5, 6)))
    say(verdict(layers))
    left = [row.name or "(the model)" for row in report.rows if row.runs == "dense"]
    if left:
        say(f"left dense: {', '.join(left)}")
    say()
    lines = [
        (f"{row['arm']}{' (fastest)' if row['arm'] == best[kind_of(row['arm'])] else ''}",
         *(f"{float(row[column]) * 1e3:.4g}" for column in ("median_s", "q1_s", "q3_s")), f"{float(row['vs best dense']):.2f}x")
        for row in rows
    ]
    say(table(("a whole training step", "median ms", "quartile 1", "quartile 3", "speed"), lines, right=(1, 2, 3, 4)))
    ratio = times[best[DENSE]].median / times[best[SPARSE]].median
    say(f"\n{options.model}: the sparse step is {ratio:.2f} times as fast as the fastest dense one ({best[DENSE]})")
    return layers + [{"layer": "whole step", **row} for row in rows]
