"""The layer benchmark: every arm a row, no row for a wrong result, rows that survive an interruption."""

from __future__ import annotations

import copy
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from small_shapes import SMALL
from torch import nn

from benchmarks import layers, runner
from benchmarks.shapes import GROUPS, ConvShape, conv3x3, linear, resnet50
from grasp_sparse.bench import arms
from grasp_sparse.bench.layers import measure_layers
from grasp_sparse.bench.results import read_rows
from grasp_sparse.nn import MaskedLinear, SparseConv2d
from grasp_sparse.pruning import make_masks
from grasp_sparse.surgery import sparsify_
from grasp_sparse.train.errors import UserError

_FLAGS = ["--quick", "--threads", "1", "--sparsity", "0.5", "0.75", "--seconds-per-shape", "0.001"]


@pytest.fixture(autouse=True)
def small_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "QUICK", SMALL)


def _run(out: Path, *flags: str) -> int:
    return layers.main([*_FLAGS, *flags, "--out", str(out)])


def test_layers_that_apply_the_relu_behind_them_are_compared_without_it():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 16), nn.ReLU(), nn.Linear(16, 4))
    scores = {f"{i}.weight": torch.rand(model[i].weight.shape) for i in (0, 3)}
    masks, x = make_masks(scores, 0.5, "block(4, 4)"), torch.randn(3, 4, 5, 5)
    sparse = copy.deepcopy(model)
    report = sparsify_(sparse, masks, x, dict.fromkeys(masks, "sparse"))
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    assert {row["layer"] for row in measure_layers(model, sparse, report, seconds=1e-3)} == {"0", "3"}


def test_a_masked_layer_is_measured_as_it_is_trained_its_gradient_left_to_the_optimizer():
    dense, x = nn.Linear(6, 4), torch.randn(5, 6)
    layer = MaskedLinear.from_dense(dense, torch.rand(4, 6) < 0.5)
    arm = arms.layer_arms(layer.to_dense(), {"": layer}, x, torch.ones(5, 4))["sparse"]
    arm()
    assert not arm.layer.weight._backward_hooks and arm.layer.weight.grad[~layer.mask].all()


def test_a_row_an_arm_with_what_it_takes_to_read_it(tmp_path: Path) -> None:
    assert _run(tmp_path / "layers.csv") == 0
    rows = read_rows(tmp_path / "layers.csv")
    first = [row for row in rows if row["shape"] == "conv3x3 4->6 at 5x5 batch 8"]
    assert [(row["arm"], row["sparsity"], row["nnz"]) for row in first] == [
        ("dense nchw", "0", "216"), ("dense channels_last", "0", "216"), ("sparse nchw", "0.5", "108"),
        ("sparse channels_last", "0.5", "108"), ("sparse nchw", "0.75", "54"), ("sparse channels_last", "0.75", "54"),
    ]  # fmt: skip
    for row in rows:
        assert 0 < float(row["q1_s"]) <= float(row["median_s"]) <= float(row["q3_s"])
        dense = [other for other in rows if other["shape"] == row["shape"] and other["arm"].startswith("dense")]
        best = min(float(other["median_s"]) for other in dense)
        assert float(row["vs best dense"]) == pytest.approx(best / float(row["median_s"]), rel=2e-3, abs=1e-3)
        assert {row["threads"], row["precision"], row["caches"], row["pass"]} == {"1", "float32", "warm", "forward+backward"}
        assert all(row[column] for column in ("cpu", "kernels", "torch", "grasp_sparse", "layout", "rounds", "allocator"))
    assert {row["arm"] for row in rows if row["group"] == "linear"} == {"dense nn.Linear", "dense oneDNN", "sparse"}
    assert sum(bool(row["best"]) for row in rows) == 3 * len(SMALL["conv3x3"] + SMALL["linear"])


def test_the_input_of_a_first_layer_gets_no_gradient(tmp_path: Path) -> None:
    _run(tmp_path / "layers.csv")
    needs = {row["shape"]: row["input_grad"] for row in read_rows(tmp_path / "layers.csv")}
    assert needs["conv5x5/2 3->4 at 7x7 batch 8"] == "no" and needs["conv3x3 4->6 at 5x5 batch 8"] == "yes"


def test_bfloat16_is_checked_and_measured(tmp_path: Path) -> None:
    assert _run(tmp_path / "layers.csv", "--precision", "bfloat16", "--cold") == 0
    rows = read_rows(tmp_path / "layers.csv")
    assert {(row["precision"], row["caches"]) for row in rows} == {("bfloat16", "cold")}
    assert "dense oneDNN" not in {row["arm"] for row in rows}


@pytest.mark.parametrize("wrong", [1.01, math.nan])
def test_a_wrong_result_leaves_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: float) -> None:
    forward = SparseConv2d.forward
    monkeypatch.setattr(SparseConv2d, "forward", lambda self, x: forward(self, x) * wrong)
    assert _run(tmp_path / "layers.csv") == 1
    assert {row["group"] for row in read_rows(tmp_path / "layers.csv")} == {"linear"}


def test_wrong_gradients_are_found() -> None:
    shape = SMALL["conv3x3"][0]
    built, _ = layers.make_arms(shape, [0.5], "float32", 0)
    arm = built["sparse 0.5 nchw"]
    mask, dense = arm.layer.mask, built["dense nchw"].layer
    arm.layer.values.register_hook(lambda gradient: gradient + 0.01 * gradient.abs().max() * torch.ones_like(gradient))
    with pytest.raises(arms.WrongResultError, match="weight gradient differs from the dense layer's by 1.0e-02"):
        arms.check_arms({"sparse": arm}, dense, mask)


def test_an_interrupted_run_keeps_what_it_has_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, measured = tmp_path / "layers.csv", []
    measure = layers.measure

    def counted(group: str, shape: object, *arguments: object, **options: object) -> list:
        measured.append(str(shape))
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(group, shape, *arguments, **options)

    monkeypatch.setattr(layers, "measure", counted)
    with pytest.raises(KeyboardInterrupt):
        _run(out)
    kept = read_rows(out)
    assert {row["shape"] for row in kept} == {"conv3x3 4->6 at 5x5 batch 8"}
    assert _run(out, "--resume") == 0
    assert measured[2:] == ["conv5x5/2 3->4 at 7x7 batch 8", "linear 16->24 batch 8"]
    rows = read_rows(out)
    blank = dict.fromkeys(rows[0], "")
    assert rows[: len(kept)] == [blank | row for row in kept] and len(rows) > len(kept)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", row["date"]) for row in rows)
    assert _run(out, "--resume", "--sparsity", "0.6") == 0  # other sparsities: measured anew, in place of the old rows
    assert {row["sparsity"] for row in read_rows(out)} == {"0", "0.6"}


def test_geometric_means_plain_and_weighted() -> None:
    rows = [
        {"group": "resnet50", "shape": f"conv {i} batch 16", "arm": "sparse nchw", "best": "yes", "sparsity": "0.9",
         "vs best dense": speed, "count": count}
        for i, (speed, count) in enumerate([("2.0", 3), ("8.0", 1)])
    ]  # fmt: skip
    rows.append(rows[0] | {"best": "", "vs best dense": "1000"})  # the slower of two layouts does not count
    (line,) = layers.summary(rows)
    assert line == (
        "resnet50 batch 16 at 90%: geometric mean 4.00x over 2 shapes, 2.83x weighted by how often each occurs (4 layers)"
    )


def test_resnet50_shapes_are_the_models() -> None:
    shapes = resnet50([16])
    assert sum(shape.count for shape in shapes) == 53 and len(shapes) == 23
    assert ConvShape(3, 64, 224, 16, kernel=7, stride=2, padding=3, bias=False) in shapes
    assert next(s.count for s in shapes if str(s) == "conv1x1 64->256 at 56x56 batch 16") == 4
    weights = sum(shape.count * shape.in_channels * shape.out_channels * shape.kernel**2 for shape in shapes)
    assert weights == 23_454_912  # ResNet-50's 25,557,032 without its classifier and norms


def test_groups_have_the_promised_shapes() -> None:
    assert [str(shape) for shape in conv3x3()][::3] == ["conv3x3 64->64 at 32x32 batch 128", "conv3x3 512->512 at 4x4 batch 128"]
    assert {shape.batch for shape in linear()} == {128, 512, 2048} and set(GROUPS) == {"conv3x3", "resnet50", "linear"}


def test_bad_flags_and_files_end_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        layers.main(["--sparsity", "1.5"])
    assert stop.value.code == 2 and "Expected a share above 0 and below 1" in capsys.readouterr().err
    (tmp_path / "torn.csv").write_text("shape,arm\nconv,sparse\nconv\n")
    with pytest.raises(UserError, match="Expected rows of one length"):
        _run(tmp_path / "torn.csv", "--resume")


def test_the_process_ends_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def fails(_: object) -> int:
        raise UserError("no images")

    monkeypatch.setattr(sys, "argv", ["x"])
    with pytest.raises(SystemExit) as stop:
        runner.run(fails)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: no images\n"
