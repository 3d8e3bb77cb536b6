"""Whole training steps on a GPU: forward, cross-entropy, backward, SGD with momentum, of pruned networks against dense ones.

    python -m benchmarks.gpu_steps                                VGG-16-BN, ResNet-50, WideResNet-50-2, ViT-B/16 at 224 x 224
    python -m benchmarks.gpu_steps --model vgg16_bn --sparsity 0.95
    python -m benchmarks.gpu_steps --budget-seconds 110           what matters most of it, and what was left out
    python -m benchmarks.gpu_steps --device cpu --quick           that the program runs; says nothing about speed

The sparsity is the share of multiply-adds removed; masks are scored on random images, for what they cost is a matter of how many
weights each layer keeps. Precisions: float32, tf32, and bfloat16 under autocast, dense and pruned alike; dense in all that are
asked for (with --budget-seconds: in that of the pruned one, of float32 in TF32 too) and in both memory formats. `vs best dense`
is against the fastest dense step of the network so far, whichever case it was measured in. Each layer of a pruned network runs as
gs.plan has measured it to be faster. Pruned networks are given channels_last; sparse convolutions of single weights lay images
batch innermost, and what follows keeps it. They take their steps with torch's fused SGD, as the dense ones do, and once more with
gs.optim.SGD, which masks in the update. A step is recorded as a CUDA graph and replayed, all arms of a case in turns. Loss and
gradients of a pruned network are compared with those of the dense one with zeros in place before anything is measured. Writes
benchmarks/results/gpu-steps.csv after every case, gpu-steps-plan.csv with the times of every layer before it, and prints a table at
the end (benchmarks/gpu_summary.py).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.gpu_cases import add_budget, limit_memory, measure_within, use_fastest_convolutions
from benchmarks.gpu_possible import possible_steps
from benchmarks.gpu_shapes import NETWORKS, PATTERNS, SPARSITIES, TINY_NETWORK, GpuNetwork, StepCase, steps_in_order
from benchmarks.gpu_summary import plan_line, table
from benchmarks.runner import RESULTS, Results, add_device, check_device, parser, run, settings_of, share, tell, times_of
from grasp_sparse.bench.arms import LAYOUTS, WrongResultError
from grasp_sparse.bench.precision import STORAGE, precision
from grasp_sparse.bench.results import DENSE, SPARSE, Row, kind_of, same, timing_columns
from grasp_sparse.bench.steps import STEP, check_steps, dense_steps, masked_copy, sparse_steps
from grasp_sparse.masks import MaskSet
from grasp_sparse.optim import SGD, layer_masks
from grasp_sparse.planning import Plan, plan
from grasp_sparse.pruning import prune
from grasp_sparse.surgery import sparsify_
from grasp_sparse.train.optimizer import make_optimizer
from grasp_sparse.train.step import loss_function, training_step

CLASSES, SCORED, COMPARED = 1000, 16, 8
OWN_SGD = "peer gs.optim.SGD"  # the pruned network again, with that optimizer
_SGD = {"lr": STEP.lr, "momentum": STEP.momentum, "weight_decay": STEP.weight_decay}
KEY = ("model", "pattern", "sparsity", "planned_in")


class _Autocast(nn.Module):
    """A model whose forward runs under autocast."""

    def __init__(self, model: nn.Module, device: str) -> None:
        super().__init__()
        self.model, self.device = model, device

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(self.device, torch.bfloat16):
            return self.model(x)


def step_of(
    model: nn.Module, x: Tensor, y: Tensor, used: str, device: str, optimizer: torch.optim.Optimizer | None = None
) -> Callable[[], object]:
    """One training step of `model`, which is taken over; as `train` does it, unless another `optimizer` is given."""
    optimizer, loss = optimizer or make_optimizer(STEP, model), loss_function(STEP)
    runs = _Autocast(model, device) if STORAGE[used] != torch.float32 else model

    def step() -> None:
        with precision(used):
            training_step(runs, optimizer, loss, x, y)

    return step


def prepared(
    network: GpuNetwork, model: nn.Module, batch: tuple[Tensor, Tensor], pattern: str, sparsity: float
) -> tuple[nn.Module, MaskSet, float]:
    """The network with zeros in place, its masks, and how far gradients are apart at most. Raises WrongResultError if too far."""
    x, y = batch
    scored = [(x[:SCORED], y[:SCORED])]
    masks = prune(model, scored, sparsity, network.criterion, pattern=pattern, budget="flops", micro_batch_size=4)
    masked = masked_copy(model, masks)
    few = x[:COMPARED], y[:COMPARED]
    with precision("float32"):  # TF32 alone would make more of a difference than is allowed
        steps, _ = sparse_steps(masked, masks, few, plan="density", max_density=1.0)
        return masked, masks, check_steps(dense_steps(masked, few) | steps, masks)


def torchs_sgd(model: nn.Module) -> torch.optim.SGD:
    """Torch's fused one, for which masked layers mask their gradients themselves."""
    return torch.optim.SGD(model.parameters(), fused=True, **_SGD)


def masking_sgd(model: nn.Module) -> SGD:
    """Ours, which masks the gradients of masked layers as it reads them: they spare a pass over each."""
    masks = layer_masks(model)
    return SGD(model.parameters(), masks=masks, raw_gradients=bool(masks), **_SGD)


def _computing_in(used: str, device: str) -> AbstractContextManager:
    """As a step in this precision does."""
    contexts = ExitStack()
    contexts.enter_context(precision(used))
    if STORAGE[used] != torch.float32:
        contexts.enter_context(torch.autocast(device, torch.bfloat16))
    return contexts


def arms_of(
    masked: nn.Module, masks: MaskSet, x: Tensor, y: Tensor, of_dense: Iterable[str], used: str, device: str
) -> tuple[dict[str, Callable[[], object]], Plan]:
    """Steps of the dense network in the precisions `of_dense`, in both memory formats, of the pruned one in `used`; its plan.

    The pruned one takes them with torch's fused SGD, as the dense one does, and beside it with ours.
    """
    arms = {}
    for other in of_dense:
        for layout, memory_format in LAYOUTS.items():
            model, given = copy.deepcopy(masked).to(memory_format=memory_format), x.contiguous(memory_format=memory_format)
            arms[f"{DENSE} {other} {layout}"] = step_of(model.train(), given, y, other, device)
    last = LAYOUTS["channels_last"]
    model, given = copy.deepcopy(masked).to(memory_format=last), x.contiguous(memory_format=last)
    with _computing_in(used, device):
        chosen = plan(model, masks, given)
        sparsify_(model, masks, plan=chosen)
    own = copy.deepcopy(model).train()
    arms[f"{SPARSE} {used} channels_last"] = step_of(model.train(), given, y, used, device, torchs_sgd(model))
    arms[f"{OWN_SGD} {used} channels_last"] = step_of(own, given, y, used, device, masking_sgd(own))
    return arms, chosen


def known_of(case: StepCase, x: Tensor) -> Row:
    """What every row of a case says."""
    return {"model": case.network.name, "input": "x".join(map(str, x.shape)), "pattern": case.pattern,
            "sparsity": f"{case.sparsity:g}", "planned_in": case.precision}  # fmt: skip


def measure(known: Row, arms: dict[str, Callable[[], object]], masks: MaskSet, difference: float, device: str, rounds: int) -> list[Row]:
    """Rows of the steps."""
    times = times_of(arms, device, rounds)
    rows = []
    for name in times:
        kind, *_, used, layout = name.split()
        rivals = [other for other in times if kind_of(other) == kind and used in other.split()]
        dense = min(times[other].median for other in times if kind_of(other) == DENSE and used in other.split())
        rows.append({
            **known, "weight_sparsity": f"{masks.sparsity:.5f}", "pass": "training step", "precision": used, "layout": layout,
            "arm": name, **timing_columns(times, name, rivals), "vs dense of this precision": f"{dense / times[name].median:.3f}",
            "gradient_difference": f"{difference:.1e}",
        })  # fmt: skip
    return rows


def planned_rows(known: Row, chosen: Plan) -> list[Row]:
    """Rows of the layers as they were planned."""
    return [known | {
        "layer": ", ".join(row.layers), "shape": "x".join(map(str, row.shape)), "kept": row.kept, "runs": row.runs,
        **({f"{way}_s": f"{seconds:.6g}" for way, seconds in row.times._asdict().items()} if row.times else {}),
        "reason": row.reason,
    } for row in chosen.rows]  # fmt: skip


def against_best_dense(rows: list[Row], earlier: Iterable[Row]) -> list[Row]:
    """The rows of a case, against the fastest dense step among them and those of `earlier` cases of the network: dense steps are
    the same in all of them, but with a budget none has every precision."""
    alike = [row for row in (*earlier, *rows) if same(row, rows[0], ("model", "input")) and kind_of(row["arm"]) == DENSE]
    best = min(float(row["median_s"]) for row in alike)
    return [row | {"vs best dense": f"{best / float(row['median_s']):.3f}"} for row in rows]


def warm(case: StepCase, device: str) -> None:
    """One step with every layer sparse that can be, and one as `prepared` compares it: compiles and tunes the kernels; the compiled
    ones stay on the disk."""
    x, y = _batch(case.network, device)
    model = _made(case.network, device).to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last)
    masks = prune(model, None, case.sparsity, "magnitude", pattern=case.pattern, budget="flops", example_input=x[:1])
    sparsify_(model, masks, plan="density", max_density=1.0)
    step_of(copy.deepcopy(model).train(), x[:COMPARED], y[:COMPARED], "float32", device)()
    step_of(model.train(), x, y, case.precision, device)()


def _made(network: GpuNetwork, device: str) -> nn.Module:
    with torch.device(device):
        return network.make()


def _batch(network: GpuNetwork, device: str) -> tuple[Tensor, Tensor]:
    images = torch.randn(network.batch, 3, network.side, network.side, device=device)
    return images, torch.randint(CLASSES, (network.batch,), device=device)


def describe(rows: list[Row]) -> str:
    first = rows[0]
    ratios = "  ".join(
        f"{row['precision']} {row['layout']} {float(row['median_s']) * 1e3:.4g} ms {float(row['vs dense of this precision']):.2f}x"
        for row in rows if kind_of(row["arm"]) == SPARSE
    )  # fmt: skip
    return f"{first['model']:16} {first['pattern']:16} {float(first['sparsity']):.0%} of multiply-adds removed  {ratios}"


def main(arguments: list[str] | None = None) -> int:
    flags = parser("gpu_steps", __doc__)
    names = [network.name for network in NETWORKS]
    add_device(flags)
    flags.add_argument("--model", nargs="+", choices=names, default=names, help="default: all")
    flags.add_argument("--pattern", nargs="+", choices=tuple(PATTERNS), default=list(PATTERNS), help="default: all")
    flags.add_argument("--sparsity", type=share, nargs="+", default=SPARSITIES, metavar="S", help="default: %(default)s")
    flags.add_argument("--precision", nargs="+", choices=tuple(STORAGE), default=list(STORAGE), help="default: all")
    flags.add_argument("--rounds", type=int, default=5, help="measured steps of an arm (default: %(default)s)")
    flags.add_argument("--out", type=Path, help="CSV to write (default: gpu-steps.csv in benchmarks/results)")
    add_budget(flags)
    options = flags.parse_args(arguments)
    check_device(options)
    limit_memory(options)

    settings, path = settings_of(options), options.out or RESULTS / "gpu-steps.csv"
    networks = [TINY_NETWORK] if options.quick else [network for network in NETWORKS if network.name in options.model]
    cases, never = possible_steps(steps_in_order(networks, options.pattern, options.sparsity, options.precision))
    if options.warm:
        number, count = options.warm
        return measure_within(cases[number - 1 :: count], str, lambda case: warm(case, options.device), options)
    results, plans = (Results(file, settings, options.resume) for file in (path, path.with_name(f"{path.stem}-plan{path.suffix}")))
    for line in never:
        tell(line)
    ready: dict[tuple, tuple | str] = {}  # of one network, pattern and sparsity at a time; or why it is not

    def run_one(case: StepCase) -> None:
        if results.has([dict(zip(KEY, (case.network.name, case.pattern, f"{case.sparsity:g}", case.precision), strict=True))]):
            return
        of = case[:3]
        if of not in ready:
            ready.clear()
            torch.backends.cudnn.benchmark = False  # what runs once is not worth a search
            torch.manual_seed(options.seed)
            model, batch = _made(case.network, options.device), _batch(case.network, options.device)
            try:
                ready[of] = batch, *prepared(case.network, model, batch, case.pattern, case.sparsity)
            except WrongResultError as error:  # of every precision, then
                ready[of] = str(error)
        if isinstance(ready[of], str):
            raise WrongResultError(ready[of])
        use_fastest_convolutions(options.device)
        batch, masked, masks, difference = ready[of]
        of_dense = options.precision
        if options.budget_seconds is not None:  # each has cuDNN search anew in both formats, which takes longer than to measure it
            of_dense = ["float32", "tf32"] if case.precision == "float32" else [case.precision]
        known = known_of(case, batch[0])
        arms, chosen = arms_of(masked, masks, *batch, of_dense, case.precision, options.device)
        planned = planned_rows(known, chosen)
        plans.add(planned, KEY)  # at once: they took long, and what follows may find no time
        tell(plan_line(planned))
        rows = measure(known, arms, masks, difference, options.device, options.rounds)
        results.add(against_best_dense(rows, [row for row in results.rows if same(row, settings, settings)]), KEY)
        tell(describe(rows))

    failed = measure_within(cases, str, run_one, options)
    print("\n".join(table(results.rows)))
    print(f"wrote {results.path}")
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
