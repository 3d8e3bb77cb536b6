"""The GPU benchmarks run, on the CPU and on tiny shapes: what they compare is checked, what they write is complete."""

from __future__ import annotations

import csv
import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import gpu_layers, gpu_steps, gpu_summary
from benchmarks.gpu_shapes import ALONE, GROUPS, PASSES, PATTERNS, SPARSITIES, GpuNetwork, in_order
from benchmarks.shapes import ConvShape, LinearShape
from grasp_sparse.bench.arms import WrongResultError
from grasp_sparse.bench.ceilings import Ceilings
from grasp_sparse.bench.cuda_arms import check, dense_arms, pruned_arms, wrong_arms
from grasp_sparse.bench.kernel_calls import KERNELS
from grasp_sparse.bench.precision import STORAGE, precision
from grasp_sparse.bench.results import write_rows
from grasp_sparse.nn import SparseLinear
from grasp_sparse.train.errors import UserError


def test_layers_write_every_arm(tmp_path, capsys):
    out = tmp_path / "layers.csv"
    patterns = ["unstructured", "block(32, 32)"]
    arguments = ["--device", "cpu", "--quick", "--rounds", "2", "--sparsity", "0.5", "--pattern", *patterns, "--out", str(out)]
    assert gpu_layers.main(arguments) == 0
    rows = list(csv.DictReader(out.open()))
    sparse = [row for row in rows if row["arm"].startswith("sparse")]
    assert {(row["group"], row["pattern"], row["pass"], row["precision"]) for row in sparse} == {
        (group, pattern, what, used)
        for group in ("linear", "conv") for pattern in patterns for what in (*PASSES, *ALONE)
        for used in gpu_layers.PRECISIONS[pattern.partition("(")[0]]
    }  # fmt: skip
    assert all(float(row["vs dense of this precision"]) > 0 and 0 < float(row["roofline"]) for row in sparse)
    assert all(int(row["nnz"]) == (8192 if row["group"] == "linear" else 9216) for row in rows)
    assert {row["layout"] for row in sparse} == {"rows", "feature-major", "channels_last", "chwn"}
    assert re.search(r"linear 128->128 batch 32 +block\(32, 32\) +bfloat16 +forward\+backward +\d", capsys.readouterr().out)


def _row(arm: str, ratio: float, sparsity: str = "0.95", **others: str) -> dict[str, str]:
    *_, precision, layout = arm.split()
    known = {"pattern": "unstructured", "pass": "forward", "best": "yes", "roofline": "", "cuda": "a device", "torch": "2"}
    return known | {"arm": arm, "precision": precision, "layout": layout, "sparsity": sparsity,
                    "vs dense of this precision": str(ratio), "vs best dense": str(ratio / 4)} | others  # fmt: skip


def test_one_table_of_layers_peers_and_steps(tmp_path, capsys):
    layers = [
        _row("dense float32 rows", 1, group="linear", shape="linear 4->4 batch 2"),
        _row("sparse unstructured float32 rows", 1, group="linear", shape="linear 4->4 batch 2", best=""),
        _row("sparse unstructured float32 feature-major", 2, group="linear", shape="linear 4->4 batch 2", roofline="0.4"),
        _row("sparse unstructured float32 rows", 8, group="linear", shape="linear 4->4 batch 2", roofline="0.4"),
        _row("sparse unstructured float32 rows", 6, "0.99", group="linear", shape="linear 4->4 batch 2", roofline="0.5"),
        _row("peer torch 2:4 float32 rows", 1.25, group="linear", shape="linear 4->4 batch 2", best=""),
    ]
    steps = [_row("sparse float32 channels_last", 1.5, model="resnet50", **{"pass": "training step"})]
    plan = [
        {"model": "resnet50", "pattern": "unstructured", "sparsity": "0.95", "planned_in": "float32", "layer": layer, "runs": runs,
         "dense_s": dense, "masked_s": "2", "sparse_s": "1"}
        for layer, runs, dense in (("a", "sparse", "3"), ("b", "masked", "1"), ("c", "sparse", ""))
    ]  # fmt: skip
    for name, rows in zip((*gpu_summary.FILES, gpu_summary.PLANS), (layers, steps, plan), strict=True):
        write_rows(tmp_path / name, rows)
    assert gpu_summary.main(["--results", str(tmp_path)]) == 0
    head, legend, *lines = capsys.readouterr().out.splitlines()
    assert head == "on a device, torch 2:" and legend == gpu_summary.LEGEND
    assert [line.split() for line in lines] == [
        ["pattern", "by", "precision", "pass", "95%", "99%"],
        "linear 4->4 batch 2 unstructured float32 forward 4.00x (1.00x) 40% 6.00x (1.50x) 50%".split(),
        ["linear", "4->4", "batch", "2", "unstructured", "torch", "2:4", "float32", "forward", "1.25x", "(0.31x)", "-"],
        ["resnet50", "unstructured", "float32", "training", "step", "1.50x", "(0.38x)", "-"],
        [*"resnet50 unstructured 0.95 float32 layers: 2 sparse, 1 masked; together".split(), "1.33x", "dense,",
         *"slower than dense: 1 (b 0.50x)".split()],
    ]  # fmt: skip
    with pytest.raises(UserError, match="Expected gpu-layers.csv or gpu-steps.csv"):
        gpu_summary.main(["--results", str(tmp_path / "nowhere")])


def test_a_ratio_too_small_to_be_written_does_not_cost_the_table():
    rows = [_row("peer torch 2:4 float32 rows", ratio, group="linear", shape="linear 4->4 batch 2") for ratio in (0.0, 0.5)]
    assert gpu_summary.table(rows)[-1].split()[-2:] == ["0.00x", "(0.00x)"]


def test_a_step_is_compared_with_the_fastest_dense_one_of_any_case():
    """With a budget a case of float32 has no dense bfloat16 beside it; others have."""

    def row(arm: str, seconds: float, model: str = "resnet50") -> dict:
        return {"model": model, "input": "64x3x224x224", "arm": arm, "median_s": f"{seconds:g}"}

    rows = [row("dense float32 nchw", 4), row("sparse float32 channels_last", 2)]
    assert [row["vs best dense"] for row in gpu_steps.against_best_dense(rows, [])] == ["1.000", "2.000"]
    earlier = [row("dense bfloat16 nchw", 1), row("sparse bfloat16 nchw", 0.5), row("dense bfloat16 nchw", 0.1, "vgg16_bn")]
    assert [row["vs best dense"] for row in gpu_steps.against_best_dense(rows, earlier)] == ["0.250", "0.500"]


def test_steps_are_compared_in_full_float32(monkeypatch):
    """Where TF32 is on, the comparison must not see it."""
    seen = []
    monkeypatch.setattr(gpu_steps, "prune", lambda *arguments, **options: {})
    monkeypatch.setattr(gpu_steps, "masked_copy", lambda *arguments: None)
    monkeypatch.setattr(gpu_steps, "dense_steps", lambda *arguments: {})
    monkeypatch.setattr(gpu_steps, "sparse_steps", lambda *arguments, **options: ({}, {}))

    def check_steps(*arguments):
        seen.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        raise WrongResultError

    monkeypatch.setattr(gpu_steps, "check_steps", check_steps)
    with precision("tf32"), pytest.raises(WrongResultError):
        gpu_steps.prepared(GpuNetwork("", 1), None, (torch.ones(1), torch.ones(1)), "unstructured", 0.9)
    assert seen == [("highest", False)]


@pytest.mark.slow
def test_steps_write_every_arm(tmp_path):
    out = tmp_path / "steps.csv"
    arguments = ["--device", "cpu", "--quick", "--rounds", "2", "--sparsity", "0.9", "--pattern", "block(32, 32)", "--precision", "float32"]
    assert gpu_steps.main([*arguments, "--out", str(out)]) == 0
    assert {row["arm"] for row in csv.DictReader(out.open())} == {
        "dense float32 nchw", "dense float32 channels_last", "sparse float32 channels_last",
        "peer gs.optim.SGD float32 channels_last",
    }  # fmt: skip


def test_a_wrong_layer_is_not_measured():
    dense, x, grad = nn.Linear(64, 64), torch.randn(8, 64), torch.randn(8, 64)
    mask = torch.rand(64, 64) < 0.3
    layer = SparseLinear.from_dense(dense, mask)
    check(dense_arms(dense, x, grad), dense, torch.ones_like(mask))
    arms = pruned_arms({"unstructured": layer}, x, grad, ("float32", "bfloat16"))
    check(arms, dense, mask)
    with torch.no_grad():
        arms["sparse unstructured float32 rows"].layer.values[0, 0] += 1
    with pytest.raises(WrongResultError, match="output differs"):
        check(arms, dense, mask)


@pytest.mark.parametrize("kernel", ALONE)
@pytest.mark.parametrize("pattern", ["unstructured", "block(32, 32)"])
@pytest.mark.parametrize("shape", [ConvShape(64, 40, 7, 2, kernel=3, stride=2), LinearShape(96, 70, 9)], ids=str)
def test_a_kernel_alone_is_right_and_not_measured_when_wrong(shape, pattern, kernel):
    dense, x = shape.layer(), shape.input(torch.Generator())
    grad = torch.randn_like(dense(x))
    arms = dense_arms(dense, x, grad, kernel=kernel)
    assert not wrong_arms(arms, dense, torch.ones_like(dense.weight, dtype=torch.bool))
    layer = gpu_layers.pruned_layer(dense, pattern, 0.5, seed=0)
    arms = pruned_arms({pattern: layer}, x, grad, ("float32", "bfloat16"), kernel=kernel)
    assert not wrong_arms(arms, dense, layer.mask) and [arm.precision for arm in arms.values()] == ["float32", "bfloat16"]
    wrong, right = arms.values()
    alone = wrong.alone
    wrong.alone = lambda: alone() + 1
    (problem,) = wrong_arms({"wrong": wrong, "right": right}, dense, layer.mask).items()
    assert problem[0] == "wrong" and problem[1].startswith(f"{KERNELS[kernel]} differs")


def test_the_roofline_is_the_slower_of_the_two_limits():
    ceilings = Ceilings({"float32": 1e12, "tf32": 4e12, "bfloat16": 8e12}, 1e9)
    assert ceilings.seconds(8e12, 1.0, "bfloat16", True) == 1
    assert ceilings.seconds(8e12, 1.0, "bfloat16", False) == 8  # no tensor cores: what bfloat16 is stored as does not matter
    assert ceilings.seconds(1.0, 3e9, "tf32", True) == 3


def test_convolutions_of_networks():
    found = GROUPS["vgg16"]()
    assert sum(shape.count for shape in found) == 13 and {shape.kernel for shape in found} == {3}
    assert {(shape.in_channels, shape.size) for shape in GROUPS["resnet50"]()} >= {(3, 224), (64, 56), (256, 56), (2048, 7)}


@pytest.mark.parametrize("group", [name for name in GROUPS if name != "linear"])
def test_the_convolution_of_the_images_is_the_last_of_its_group(group):
    cases = in_order(list(GROUPS), list(PATTERNS), SPARSITIES)
    usual = [case.shape for case in cases if case.group == group and case.passes == PASSES][: len(GROUPS[group]())]
    assert [shape.in_channels for shape in usual if not shape.input_grad] == [usual[-1].in_channels] == [3]


@pytest.mark.parametrize("shape", [ConvShape(3, 40, 9, 2), ConvShape(32, 64, 6, 2), LinearShape(96, 64, 8)], ids=str)
@pytest.mark.parametrize("pattern", ["unstructured", "block(32, 32)"])
def test_what_a_pass_must_do_is_what_its_products_do(shape, pattern):
    """As torch counts it; of blocks it counts what lies past the edge as well."""
    layer = gpu_layers.pruned_layer(shape.layer(), pattern, 0.5, seed=0)
    x = shape.input(torch.Generator()).requires_grad_(shape.input_grad)
    y = layer(x)
    stored = 1 if pattern == "unstructured" else layer.values.numel() / layer.nnz
    for what in (*PASSES, *ALONE):
        grad = None if what == "forward" else torch.ones_like(y)
        kernel = what if what in ALONE else None
        arms = pruned_arms({pattern: layer}, x, grad, ("float32",), input_grad=shape.input_grad, kernel=kernel)
        with FlopCounterMode(display=False) as counter:
            list(arms.values())[-1]()
        flops, size = gpu_layers.work(layer, x, y, 4, what, shape.input_grad)
        assert counter.get_total_flops() == flops * stored
        products = (2 + shape.input_grad) if what == "forward+backward" else 1
        assert flops == products * 2 * layer.nnz * y.numel() / y.shape[1]
        assert size == 4 * (x.numel() * max(1, products - 1) + y.numel() * min(2, products) + products * layer.nnz)


@pytest.mark.parametrize("pattern", ["unstructured", "block(32, 32)"])
def test_the_convolution_of_the_images_is_measured(pattern):
    """Its blocks reach past three channels, and nobody wants the gradient of its input."""
    ceilings = Ceilings(dict.fromkeys(STORAGE, 1e12), 1e12)
    rows, problems = gpu_layers.measure("conv", ConvShape(3, 40, 9, 2), [(pattern, 0.5)], PASSES, ceilings, "cpu", 2, 0)
    assert not problems and {row["pass"] for row in rows} == set(PASSES)
    assert {row["input_grad"] for row in rows} == {"no"}
    assert all(float(row["roofline"]) > 0 for row in rows if row["arm"].startswith("sparse"))
