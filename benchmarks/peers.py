"""Single layers against other sparse implementations, in the same turns as the dense layers and ours.

    python -m benchmarks.peers --quick
    python -m benchmarks.peers --group linear

Peers: torch's own CSR tensors (products by MKL; linear only), with the gradients of torch's autograd and with gradients written
by hand (benchmarks/compressed.py), and SparseProp (https://github.com/IST-DASLab/sparseprop), which is measured if it can be
imported: build it by hand. Each gets its inputs in the layout it likes best. Two passes: forward alone, and forward with
backward. What a peer does not support, or computes wrongly, has no row; one line says why.
Writes benchmarks/results/peers.csv after every shape.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.compressed import CsrLinear, CsrLinearByHand
from benchmarks.layers import random_mask
from benchmarks.runner import RESULTS, Results, measure_all, parser, run, settings_of, share, tell
from benchmarks.shapes import GROUPS, QUICK, LinearShape, Shape
from grasp_sparse.bench.arms import Arm, WrongResultError, check_arms, layer_arms, layout_of
from grasp_sparse.bench.results import DENSE, SPARSE, Row, kind_of, timing_columns
from grasp_sparse.environment import version_of
from grasp_sparse.nn import SparseConv2d, SparseLinear
from grasp_sparse.timing import interleaved_within

PASSES = ("forward", "forward+backward")
KEY = ("group", "shape", "sparsity", "pass")


class UnsupportedError(Exception):
    """A peer cannot do this shape; the message says why."""


class TorchCsr:
    """``torch.sparse_csr`` weight times activations [features, batch], the orientation MKL takes without a copy.

    torch's autograd gives the gradient of the weight as a dense matrix: that is what a user would get, and it is slow.
    """

    name = "torch CSR"
    note = "the gradient of the weight is dense"
    layout = "features first"
    version = str(torch.__version__)
    layer: type[nn.Module] = CsrLinear

    def available(self) -> bool:
        return torch.backends.mkl.is_available()

    def make(self, layer: nn.Module, mask: Tensor, x: Tensor, grad: Tensor | None) -> Arm:
        if not isinstance(layer, nn.Linear):
            raise UnsupportedError("CSR tensors have no convolution")
        return _CsrArm(self.layer(layer), x.t().contiguous(), None if grad is None else grad.t().contiguous())


class TorchCsrByHand(TorchCsr):
    """The same product, and gradients of the kept weights only: :class:`~benchmarks.compressed.CsrLinearByHand`."""

    name = "torch CSR by hand"
    note = "gradients by a transposed CSR tensor and sampled_addmm"
    layer = CsrLinearByHand


class _CsrArm(Arm):
    def results(self, mask: Tensor) -> dict[str, Tensor]:
        found = super().results(mask)
        return {what: tensor.t() if what in ("output", "input gradient") else tensor for what, tensor in found.items()}

    def weight_gradient(self, mask: Tensor) -> Tensor:
        layer = self.layer
        return layer.values.grad if isinstance(layer, CsrLinearByHand) else layer.weight.grad[mask]  # CSR is in row-major order


class SparseProp:
    """SparseLinear and SparseConv2d of the SparseProp package; a convolution in the faster of its two vectorisations.

    Its kernels are known to read and write out of bounds outside what is allowed here.
    """

    name = "SparseProp"
    note = ""
    layout = "contiguous"

    @property
    def version(self) -> str:
        return version_of("sparseprop")

    def available(self) -> bool:
        try:
            import sparseprop.modules  # noqa: F401
        except ImportError:
            return False
        return True

    def make(self, layer: nn.Module, mask: Tensor, x: Tensor, grad: Tensor | None) -> Arm:
        from sparseprop.modules import SparseConv2d as Conv
        from sparseprop.modules import SparseLinear as Linear

        if x.shape[0] % 8:
            raise UnsupportedError(f"batch {x.shape[0]} is not a multiple of 8")
        if int(mask.count_nonzero()) > 2_000_000:
            raise UnsupportedError("more than two million kept weights")
        if isinstance(layer, nn.Linear):
            return _SparsePropArm(Linear.from_dense(layer), x, grad)
        if layer.stride[0] > 2 or layer.kernel_size[0] != layer.kernel_size[1]:
            raise UnsupportedError("only strides 1 and 2 and square kernels")
        if int(mask.flatten(1).sum(1).max()) > 32767:
            raise UnsupportedError("more than 32767 kept weights in an output channel")
        arms = [_SparsePropArm(Conv.from_dense(layer, vectorizing_over_on=over), x, grad) for over in (False, True)]
        times = interleaved_within({str(over): arm for over, arm in enumerate(arms)}, seconds=0.2, fewest=3, most=5)
        return arms[int(min(times, key=lambda over: times[over].median))]


class _SparsePropArm(Arm):
    def weight_gradient(self, mask: Tensor) -> Tensor:
        values = self.layer.W_val.grad
        if mask.dim() == 2:
            return values  # CSR in row-major order
        from sparseprop.modules.utils import from_sparse_format_conv2d

        return from_sparse_format_conv2d(values, self.layer.W_idx, mask.shape)[mask]


PEERS = (TorchCsr(), TorchCsrByHand(), SparseProp())


def make_arms(
    shape: Shape, sparsity: float, training: bool, peers: Sequence[TorchCsr | SparseProp], seed: int
) -> tuple[dict[str, Arm], int, list[str]]:
    """Checked arms by name, the number of kept weights, and a line for each peer that is missing among them.

    Raises WrongResultError when our own layer or a dense one computes something else than the dense layer.
    """
    generator = torch.Generator().manual_seed(seed)
    dense, x = shape.layer(), shape.input(generator)
    mask = random_mask(dense.weight.shape, sparsity, generator)
    with torch.no_grad():
        # Peers keep what is not zero; among millions of random weights some are.
        dense.weight.masked_fill_(dense.weight == 0, torch.finfo(dense.weight.dtype).eps).mul_(mask)
        y = dense(x)
    grad = torch.randn(y.shape, generator=generator) if training else None
    ours = (SparseLinear if isinstance(shape, LinearShape) else SparseConv2d).from_dense(dense, mask)
    arms = layer_arms(dense, {"": ours}, x, grad, input_grad=shape.input_grad)
    check_arms(arms, dense, mask)
    left_out = []
    for peer in peers:
        try:
            arm = peer.make(copy.deepcopy(dense), mask, x, grad)
            check_arms({f"{SPARSE} (ours)": next(iter(arms.values())), peer.name: arm}, dense, mask)
            arms[peer.name] = arm
        except UnsupportedError as error:
            left_out.append(f"{shape}: no row for {peer.name}: {error}")
        except WrongResultError as error:
            left_out.append(f"{shape} at {sparsity:.0%}, {PASSES[training]}: no row for {peer.name}: wrong result: {error}")
    return arms, int(mask.count_nonzero()), left_out


def measure(
    group: str, shape: Shape, sparsity: float, training: bool, peers: Sequence[TorchCsr | SparseProp], seconds: float, seed: int
) -> tuple[list[Row], list[str]]:
    """Rows of every arm, and a line for each peer that has none."""
    arms, kept, left_out = make_arms(shape, sparsity, training, peers, seed)
    known = {
        peer.name: {"layout": peer.layout, "peer_version": peer.version, "note": peer.note if training else ""} for peer in peers
    }
    times = interleaved_within(arms, seconds, lead_in=3)
    ours = min(time.median for name, time in times.items() if kind_of(name) == SPARSE)
    rows = [
        {
            "group": group, "shape": str(shape), "sparsity": f"{sparsity:g}", "nnz": kept,
            "pass": PASSES[training], "input_grad": "yes" if training and shape.input_grad else "no", "precision": "float32",
            "caches": "warm", "layout": layout_of(name), "arm": name, **known.get(name, {}),
            **timing_columns(times, name, [other for other in arms if (kind_of(other) == DENSE) == (kind_of(name) == DENSE)]),
            "vs grasp_sparse": f"{ours / times[name].median:.3f}",
        }
        for name in arms
    ]  # fmt: skip
    return rows, left_out


def describe(rows: list[Row]) -> str:
    """One line: every arm but the dense ones against the fastest dense one."""
    ratios = "  ".join(f"{row['arm']} {float(row['vs best dense']):.2f}x" for row in rows if kind_of(row["arm"]) != DENSE)
    return f"{rows[0]['shape']:38} {float(rows[0]['sparsity']):.0%} {rows[0]['pass']:16} {ratios}"


def main(arguments: list[str] | None = None) -> int:
    groups = ("conv3x3", "linear")
    flags = parser("peers", __doc__)
    flags.add_argument("--group", nargs="+", choices=tuple(GROUPS), default=list(groups), help="default: %(default)s")
    flags.add_argument("--batch", type=int, nargs="+", metavar="N", help="other batch sizes than the group's own")
    flags.add_argument("--sparsity", type=share, nargs="+", default=(0.9, 0.95, 0.98, 0.99), metavar="S", help="default: %(default)s")
    flags.add_argument("--seconds-per-shape", type=float, default=4.0, metavar="S",
                       help="for each sparsity and pass; at least 5 rounds all the same (default: %(default)s)")
    flags.add_argument("--out", type=Path, help="CSV to write (default: peers.csv in benchmarks/results)")
    options = flags.parse_args(arguments)

    settings = settings_of(options)
    results = Results(options.out or RESULTS / ("peers-quick.csv" if options.quick else "peers.csv"), settings, options.resume)
    peers = [peer for peer in PEERS if peer.available()]
    for peer in PEERS:
        print(f"{peer.name}: {peer.version if peer in peers else 'not installed, not measured'}")
    sparsities = options.sparsity if not options.quick else (0.95, 0.99)
    make = {group: QUICK[group] if options.quick else GROUPS[group](*([options.batch] if options.batch else [])) for group in options.group}
    cases = [
        (group, shape, sparsity, training)
        for group, shapes in make.items() for shape in shapes for sparsity in sparsities for training in (False, True)
    ]  # fmt: skip

    said: set[str] = set()

    def run_one(case: tuple[str, Shape, float, bool]) -> None:
        group, shape, sparsity, training = case
        if results.has([{"group": group, "shape": str(shape), "sparsity": f"{sparsity:g}", "pass": PASSES[training]}]):
            return
        rows, left_out = measure(group, shape, sparsity, training, peers, options.seconds_per_shape, options.seed)
        for line in filter(lambda line: line not in said, left_out):
            tell(line)
        said.update(left_out)
        results.add(rows, KEY)
        tell(describe(rows))

    wrong = measure_all(cases, lambda case: f"{case[1]} {case[2]:.0%}", run_one)
    print(f"wrote {results.path}")
    return 1 if wrong else 0


if __name__ == "__main__":
    run(main)
