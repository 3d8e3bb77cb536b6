"""The GPU benchmarks run, on the CPU and on tiny shapes: what they compare is checked, what they write is complete."""

from __future__ import annotations

import csv

import pytest
import torch
from torch import nn

from benchmarks import gpu_layers, gpu_steps
from benchmarks.gpu_shapes import GROUPS
from grasp_sparse.bench.arms import WrongResultError
from grasp_sparse.bench.ceilings import Ceilings
from grasp_sparse.bench.cuda_arms import check, dense_arms, pruned_arms
from grasp_sparse.nn import SparseConv2d, SparseLinear


def test_layers_write_every_arm(tmp_path, capsys):
    out = tmp_path / "layers.csv"
    patterns = ["unstructured", "block(32, 32)"]
    arguments = ["--device", "cpu", "--quick", "--rounds", "2", "--sparsity", "0.5", "--pattern", *patterns, "--out", str(out)]
    assert gpu_layers.main(arguments) == 0
    rows = list(csv.DictReader(out.open()))
    sparse = [row for row in rows if row["arm"].startswith("sparse")]
    assert {(row["group"], row["pattern"], row["pass"], row["precision"]) for row in sparse} == {
        (group, pattern, what, used)
        for group in ("linear", "conv") for pattern in patterns for what in gpu_layers.PASSES
        for used in gpu_layers.PRECISIONS[pattern.partition("(")[0]]
    }  # fmt: skip
    assert all(float(row["vs dense of this precision"]) > 0 and 0 < float(row["roofline"]) for row in sparse)
    assert all(int(row["nnz"]) == (8192 if row["group"] == "linear" else 9216) for row in rows)
    assert "linear block(32, 32) bfloat16" in capsys.readouterr().out


@pytest.mark.slow
def test_steps_write_every_arm(tmp_path):
    out = tmp_path / "steps.csv"
    arguments = ["--device", "cpu", "--quick", "--rounds", "2", "--sparsity", "0.9", "--pattern", "block(32, 32)", "--precision", "float32"]
    assert gpu_steps.main([*arguments, "--out", str(out)]) == 0
    assert {row["arm"] for row in csv.DictReader(out.open())} == {
        "dense float32 nchw", "dense float32 channels_last", "sparse float32 channels_last"
    }  # fmt: skip


def test_images_lie_batch_innermost_from_the_first_sparse_convolution_on():
    conv = SparseConv2d.from_dense(nn.Conv2d(4, 6, 3), torch.rand(6, 4, 3, 3) < 0.5)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), conv, nn.ReLU())
    x = torch.randn(5, 3, 9, 9)
    expected = model(x)
    gpu_steps.batch_innermost_(model)
    assert model(x).permute(1, 2, 3, 0).is_contiguous()
    torch.testing.assert_close(model(x), expected)


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


def test_the_roofline_is_the_slower_of_the_two_limits():
    ceilings = Ceilings({"float32": 1e12, "tf32": 4e12, "bfloat16": 8e12}, 1e9)
    assert ceilings.seconds(8e12, 1.0, "bfloat16", True) == 1
    assert ceilings.seconds(8e12, 1.0, "bfloat16", False) == 8  # no tensor cores: what bfloat16 is stored as does not matter
    assert ceilings.seconds(1.0, 3e9, "tf32", True) == 3


def test_convolutions_of_networks():
    found = GROUPS["vgg16"]()
    assert sum(shape.count for shape in found) == 12 and {shape.kernel for shape in found} == {3}
    assert {(shape.in_channels, shape.size) for shape in GROUPS["resnet50"]()} >= {(64, 56), (256, 56), (2048, 7)}
