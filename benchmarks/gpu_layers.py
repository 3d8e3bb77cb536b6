"""Single layers on a GPU, whole passes and kernel by kernel, against every dense precision and torch's own sparse products.

    python -m benchmarks.gpu_layers                     linear layers and the convolutions of three networks
    python -m benchmarks.gpu_layers --group linear --sparsity 0.95
    python -m benchmarks.gpu_layers --budget-seconds 120      what matters most of it, and what was left out
    python -m benchmarks.gpu_layers --device cpu --quick      that the program runs; says nothing about speed

Masks are random, of whole blocks where the pattern says so. A call is recorded as a CUDA graph and replayed, all arms that are
measured together in turns; cuDNN has searched for its fastest algorithms before. An arm that does not agree with the dense layer
in float64 is left out, and the exit status is 1. So is, with a line and no more, what leaves a small layer none of its few blocks
(benchmarks/gpu_possible.py). The passes are forward, and forward with backward; of linear layers and of the largest convolution
of a network also fprop, dgrad and wgrad, the kernels of which they consist, each alone. `roofline` is the share of what the
device can do: the larger of multiply-adds over its measured rate and bytes over its measured bandwidth, divided by the time. A call
finds in the L2 cache what the one before has left there, dense or sparse: of layers that fit into it the share may pass 1.
Writes benchmarks/results/gpu-layers.csv after every shape, and prints a table at the end (benchmarks/gpu_summary.py). The order
of the shapes: benchmarks/gpu_shapes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import gpu_peers
from benchmarks.gpu_cases import add_budget, limit_memory, lost, measure_within, said, use_fastest_convolutions
from benchmarks.gpu_possible import possible_layers
from benchmarks.gpu_shapes import ALONE, GROUPS, PASSES, PATTERNS, SPARSITIES, TINY, Combination, LayerCase, in_order
from benchmarks.gpu_summary import table
from benchmarks.runner import RESULTS, Results, add_device, check_device, parser, run, settings_of, share, tell, times_of
from benchmarks.shapes import Shape
from grasp_sparse.bench.arms import WrongResultError
from grasp_sparse.bench.ceilings import Ceilings, measure_ceilings
from grasp_sparse.bench.cuda_arms import CudaArm, dense_arms, pruned_arms, wrong_arms
from grasp_sparse.bench.precision import STORAGE, TOLERANCE, precision
from grasp_sparse.bench.results import DENSE, Row, kind_of, timing_columns
from grasp_sparse.nn import SparseConv2d, SparseLinear
from grasp_sparse.pruning import make_masks
from grasp_sparse.timing import Timing

KEY = ("group", "shape", "pattern", "sparsity", "pass")
# Single weights are no work for tensor cores, whole blocks no work for anything else.
PRECISIONS = {"unstructured": ("float32", "bfloat16"), "block": ("bfloat16", "tf32")}


def pruned_layer(dense: nn.Module, pattern: str, sparsity: float, seed: int) -> nn.Module:
    """`dense` under a random mask of this pattern."""
    device = dense.weight.device
    scores = torch.rand(dense.weight.shape, generator=torch.Generator(device).manual_seed(seed), device=device)
    mask = make_masks({"weight": scores}, sparsity, pattern)["weight"].to(device)
    kind = SparseLinear if isinstance(dense, nn.Linear) else SparseConv2d
    return kind.from_dense(dense, mask, block_size=PATTERNS[pattern])


def work(layer: nn.Module, x: Tensor, y: Tensor, itemsize: int, what: str, input_grad: bool = True) -> tuple[float, float]:
    """(floating-point operations, bytes) that a pass cannot do without: kept weights at every position; all tensors once."""
    backward = what == "forward+backward"  # all others are one product, between an input and an output
    nnz, positions = layer.nnz, y.numel() // y.shape[1]
    products = 1 + backward + (backward and input_grad)
    activations = x.numel() * (1 + (backward and input_grad)) + y.numel() * (1 + backward)
    return 2.0 * nnz * positions * products, float(activations * itemsize + nnz * 4 * products)


Call = Callable[[], object]


def measure(
    group: str, shape: Shape, together: list[Combination], passes: tuple[str, ...], ceilings: Ceilings, device: str, rounds: int,
    seed: int,
) -> tuple[list[Row], list[str]]:  # fmt: skip
    """Rows of one shape, and what was left out because it was wrong: dense in every precision and pruned in every combination
    of `together`, for all `passes`, all of a pass in turns."""
    generator = torch.Generator(device).manual_seed(seed)
    torch.manual_seed(seed)
    with torch.device(device):
        dense = shape.layer()
    x = shape.input(generator)
    with torch.no_grad():
        y = dense(x)
    grad = torch.randn(y.shape, generator=generator, device=device)
    given = {what: (x, None if what == "forward" else grad) for what in passes}
    how = {what: {"input_grad": shape.input_grad, "kernel": what if what in ALONE else None} for what in passes}
    everything = torch.ones_like(dense.weight, dtype=torch.bool)
    reference, problems = _right({what: dense_arms(dense, *given[what], **how[what]) for what in passes}, dense, everything)
    layers, arms, peers = {}, {}, {}
    for combination in together:
        pattern, sparsity = combination
        layer = layers[combination] = pruned_layer(dense, pattern, sparsity, seed)
        names = PRECISIONS[pattern.partition("(")[0]]
        made = {what: pruned_arms({pattern: layer}, *given[what], names, **how[what]) for what in passes}
        arms[combination], wrong = _right(made, dense, layer.mask)
        problems += [f"{sparsity:.0%} {problem}" for problem in wrong]
        has_peers = "forward" in passes and isinstance(dense, nn.Linear) and device == "cuda"
        peers[combination] = _peers(layer, x, grad, pattern) if has_peers else {}
    rows: list[Row] = []
    for what in passes:
        if not reference[what]:
            raise WrongResultError(problems[0])
        own = {one: {**arms[one][what], **peers[one].get(what, {})} for one in together}
        pruned = {(*combination, name): call for combination, calls in own.items() for name, call in calls.items()}
        times = _times({**reference[what], **pruned}, device, rounds)
        for combination in together:
            of_dense = {name: times[name] for name in reference[what]}
            of_pruned = {name: times[*combination, name] for name in own[combination]}
            pattern, sparsity = combination
            known = {"group": group, "shape": str(shape), "count": shape.count, "pattern": pattern, "sparsity": f"{sparsity:g}",
                     "nnz": layers[combination].nnz, "pass": what, "input_grad": "yes" if shape.input_grad else "no"}  # fmt: skip
            rows += _rows(of_dense | of_pruned, arms[combination][what], known, ceilings, layers[combination], x, y)
    return rows, problems


def _times(arms: Mapping[object, Call], device: str, rounds: int) -> dict[object, Timing]:
    """As `times_of`, whatever the arms are called."""
    return dict(zip(arms, times_of({str(name): arm for name, arm in arms.items()}, device, rounds).values(), strict=True))


def _right(
    arms: Mapping[str, Mapping[str, CudaArm]], dense: nn.Module, mask: Tensor
) -> tuple[dict[str, dict[str, CudaArm]], list[str]]:
    """By pass, the arms that compute what they should, and a line about each of the others."""
    flat = {(what, name): arm for what, named in arms.items() for name, arm in named.items()}
    wrong = wrong_arms(flat, dense, mask)
    right = {what: {name: arm for name, arm in named.items() if (what, name) not in wrong} for what, named in arms.items()}
    return right, [f"{name}, {what}: {problem}" for (what, name), problem in wrong.items()]


def _peers(layer: nn.Module, x: Tensor, grad: Tensor, pattern: str) -> dict[str, dict[str, Call]]:
    """By pass, peers that compute the right thing, by "peer <name> <precision> rows"; one line about each that does not run or
    is wrong."""
    found: dict[str, dict[str, Call]] = {}
    weight = layer.to_dense_weight().detach()
    for name in ("float32", "bfloat16"):
        dtype = STORAGE[name]
        with precision(name):
            peers = gpu_peers.available(weight.to(dtype), PATTERNS[pattern], x.to(dtype), grad.to(dtype), TOLERANCE[name], tell)
        for what, calls in peers.items():
            found.setdefault(what, {}).update({f"peer {peer} {name} rows": call for peer, call in calls.items()})
    return found


def _rows(
    times: Mapping[str, Timing], arms: Mapping[str, CudaArm], known: Row, ceilings: Ceilings, layer: nn.Module,
    x: Tensor, y: Tensor,
) -> list[Row]:  # fmt: skip
    rows = []
    for name in times:
        kind = kind_of(name)
        *_, used, layout = name.split()
        row = known | {"precision": used, "layout": layout, "arm": name}
        row |= timing_columns(times, name, [other for other in times if kind_of(other) == kind and used in other.split()])
        rivals = [time.median for other, time in times.items() if kind_of(other) == DENSE and used in other.split()]
        if rivals:
            row["vs dense of this precision"] = f"{min(rivals) / times[name].median:.3f}"
        if name in arms:
            flops, size = work(layer, x, y, STORAGE[used].itemsize, known["pass"], known["input_grad"] == "yes")
            # three digits of whatever it is: 0.000 has no logarithm
            row["roofline"] = f"{ceilings.seconds(flops, size, used, bool(layer.block_size)) / times[name].median:.3g}"
        rows.append(row)
    return rows


def warm(shape: Shape, together: list[Combination], device: str, seed: int) -> None:
    """Calls the layers of whole blocks once, which compiles and tunes their kernels; the compiled ones stay on the disk."""
    generator = torch.Generator(device).manual_seed(seed)
    with torch.device(device):
        dense = shape.layer()
    x = shape.input(generator)
    with torch.no_grad():
        grad = torch.randn_like(dense(x))
    for pattern, sparsity in together:
        if PATTERNS[pattern]:
            layer = pruned_layer(dense, pattern, sparsity, seed)
            for arm in pruned_arms({pattern: layer}, x, grad, PRECISIONS["block"], input_grad=shape.input_grad).values():
                arm()


def describe(rows: list[Row]) -> list[str]:
    """One line a pattern, sparsity and pass but forward alone: each precision against the dense layer of that precision."""
    lines = []
    for one in dict.fromkeys((row["pattern"], row["sparsity"], row["pass"]) for row in rows if row["pass"] != "forward"):
        pattern, sparsity, what = one
        found = [row for row in rows if (row["pattern"], row["sparsity"], row["pass"]) == one]
        best = [row for row in found if kind_of(row["arm"]) == "sparse" and row["best"]]
        ratios = "  ".join(
            f"{row['precision']} {float(row['median_s']) * 1e3:.3g} ms {float(row.get('vs dense of this precision', 'nan')):.2f}x "
            f"(roofline {float(row['roofline']):.0%})" for row in best
        )  # fmt: skip
        lines.append(f"{rows[0]['shape']:44} {pattern:16} {float(sparsity):.0%}  {what:16}  {ratios}")
    return lines


def main(arguments: list[str] | None = None) -> int:
    flags = parser("gpu_layers", __doc__)
    add_device(flags)
    flags.add_argument("--group", nargs="+", choices=tuple(GROUPS), default=list(GROUPS), help="default: all")
    flags.add_argument("--pattern", nargs="+", choices=tuple(PATTERNS), default=list(PATTERNS), help="default: all")
    flags.add_argument("--sparsity", type=share, nargs="+", default=SPARSITIES, metavar="S", help="default: %(default)s")
    flags.add_argument("--rounds", type=int, default=7, help="measured calls of an arm (default: %(default)s)")
    flags.add_argument("--out", type=Path, help="CSV to write (default: gpu-layers.csv in benchmarks/results)")
    add_budget(flags)
    options = flags.parse_args(arguments)
    check_device(options)
    limit_memory(options)
    use_fastest_convolutions(options.device)

    settings, patterns = settings_of(options), options.pattern
    if options.quick:
        patterns = [pattern for pattern in patterns if (PATTERNS[pattern] or (0,))[0] <= 32]
        every = [(pattern, sparsity) for pattern in patterns for sparsity in options.sparsity]
        cases = [LayerCase(*case, every, passes) for case in TINY for passes in (PASSES, ALONE)]
    else:
        cases = in_order(options.group, patterns, options.sparsity)
    cases, never = possible_layers(cases)
    if options.warm:
        number, count = options.warm
        mine = [case for case in cases if case.passes == PASSES][number - 1 :: count]  # of which the others are a part
        return measure_within(mine, str, lambda case: warm(case.shape, case.together, options.device, options.seed), options)
    cases = [case._replace(together=family) for case in cases for family in families(case.together)]
    results = Results(options.out or RESULTS / "gpu-layers.csv", settings, options.resume)
    ceilings = measure_ceilings(options.device)
    for line in (str(ceilings), *never):
        tell(line)

    def run_one(case: LayerCase) -> None:
        known = [{"group": case.group, "shape": str(case.shape), "pass": what} for what in case.passes]

        def rows_of(pattern: str, sparsity: float) -> list[Row]:
            return [one | {"pattern": pattern, "sparsity": f"{sparsity:g}"} for one in known]

        case = case._replace(together=[one for one in case.together if not results.has(rows_of(*one))])
        if not case.together:
            return
        rows = None
        try:
            rows, problems = measure(*case, ceilings, options.device, options.rounds, options.seed)
        except Exception as error:
            if len(case.together) == 1 or options.device == "cuda" and lost():
                raise
            tell(f"{case}: {said(error)}; now one after the other")
        if rows is None:  # out here, where nothing holds the memory of what failed any longer
            _all_of([lambda one=one: run_one(case._replace(together=[one])) for one in case.together])
            return
        for one in (each for combination in case.together for each in rows_of(*combination)):
            results.add([row for row in rows if row.items() >= one.items()], KEY)
        for line in describe(rows):
            tell(line)
        if problems:
            raise WrongResultError("; ".join(problems))

    failed = measure_within(cases, str, run_one, options)
    print("\n".join(table(results.rows)))
    print(f"wrote {results.path}")
    return 1 if failed else 0


def families(together: list[Combination]) -> list[list[Combination]]:
    """Single weights and blocks apart: a kernel that breaks the device takes only those of its own kind along."""
    single = [(pattern, sparsity) for pattern, sparsity in together if PATTERNS[pattern] is None]
    return [family for family in (single, [one for one in together if one not in single]) if family]


def _all_of(calls: list[Call]) -> None:
    """All of them, whatever some raise; the last of that is raised at the end."""
    failure = None
    for call in calls:
        try:
            call()
        except Exception as error:
            failure = error
    if failure is not None:
        raise failure


if __name__ == "__main__":
    run(main)
