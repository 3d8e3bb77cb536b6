"""A run on a GPU loses nothing: what fails, is wrong or finds no time costs a line, and no other case."""

from __future__ import annotations

import argparse
import csv
import os
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_cases, gpu_layers, gpu_peers, gpu_steps
from benchmarks.gpu_shapes import ALONE, GROUPS, NETWORKS, PASSES, PATTERNS, SPARSITIES, TARGETS, in_order, steps_in_order
from grasp_sparse.bench import cuda_arms
from grasp_sparse.bench.ceilings import Ceilings
from grasp_sparse.bench.precision import STORAGE

HERE = Path(__file__).parents[2]
TINY = ["--device", "cpu", "--quick", "--rounds", "2", "--sparsity", "0.5", "0.75", "--pattern", "unstructured"]


def options(**changed) -> argparse.Namespace:
    return argparse.Namespace(**{"after": 0, "budget_seconds": None, "device": "cpu"} | changed)


def test_the_most_telling_layers_come_first_and_each_once():
    ordered = in_order(list(GROUPS), list(PATTERNS), SPARSITIES)
    group, shape, together, passes = ordered[0]
    assert (group, str(shape), passes) == ("linear", "linear 4096->4096 batch 16384", PASSES)
    targets = [(pattern, sparsity) for pattern, wanted in TARGETS.items() for sparsity in wanted]
    assert together == targets
    whole, alone = ([case for case in ordered if case.passes == passes] for passes in (PASSES, ALONE))
    every = [(case.group, str(case.shape), combination) for case in whole for combination in case.together]
    wanted = {(group, str(shape), (p, s)) for group in GROUPS for shape in GROUPS[group]() for p in PATTERNS for s in SPARSITIES}
    assert len(every) == len(set(every)) and set(every) == wanted
    images = [case.group for case in whole if case.group != "linear" and len(case.together) == 2]
    assert images == sorted(images, key=list(GROUPS).index)
    kept = [min(sparsity for _, sparsity in case.together) for case in ordered]
    assert kept.index(0.8) == len(kept) - kept.count(0.8) and all(sparsity >= 0.9 for sparsity in kept[: kept.index(0.8)])
    assert in_order(["vgg16"], ["block(32, 32)"], [0.8])[0].together == [("block(32, 32)", 0.8)]


def test_kernels_are_measured_alone_early():
    """Those of linear layers, and of the convolution of each network that has most to do; before the other convolutions."""
    ordered = in_order(list(GROUPS), list(PATTERNS), SPARSITIES)
    alone = [i for i, case in enumerate(ordered) if case.passes == ALONE]
    assert alone[-1] + 1 == next(i for i, case in enumerate(ordered) if case.group != "linear" and case.passes == PASSES)
    assert all(len(ordered[i].together) == sum(map(len, TARGETS.values())) for i in alone)
    shapes = {group: [ordered[i].shape for i in alone if ordered[i].group == group] for group in GROUPS}
    assert set(shapes.pop("linear")) == set(GROUPS["linear"]()) and shapes == {
        group: [max(GROUPS[group](), key=lambda shape: shape.work * shape.count)] for group in shapes
    }
    assert str(ordered[alone[0]]).startswith("linear 4096->4096 batch 16384 kernel by kernel unstructured 95%, ")


def test_single_weights_and_blocks_are_measured_apart():
    """One that breaks the device takes none of the other kind along."""
    single, blocks = [("unstructured", 0.9), ("unstructured", 0.99)], [("block(32, 32)", 0.9), ("block(64, 64)", 0.9)]
    assert gpu_layers.families([single[0], *blocks, single[1]]) == [single, blocks]
    assert gpu_layers.families(single) == [single] and gpu_layers.families(blocks) == [blocks]


def test_what_compiles_on_the_device_is_tested_last():
    files = gpu.test_files()
    assert {HERE / file for file in files} == set((HERE / "tests" / "gpu").glob("test_*.py"))
    last = [file for file in files if "block" in file or "training" in file or "plan" in file]
    assert len(last) == 3 and files[-3:] == last and any("unstructured" in file for file in files)


def test_the_most_telling_steps_come_first():
    cases = steps_in_order(NETWORKS, list(PATTERNS), SPARSITIES, list(STORAGE))
    assert [str(case) for case in cases[:4]] == [
        "vgg16_bn block(64, 64) 95% bfloat16", "vgg16_bn unstructured 95% float32",
        "wide_resnet50_2 block(64, 64) 95% bfloat16", "vit_b_16 block(64, 64) 95% bfloat16",
    ]  # fmt: skip
    assert len(set(cases)) == len(cases) == 4 * 4 * 5 * 3


def test_a_case_that_fails_costs_a_line(capsys):
    done = []

    def measure(case: int) -> None:
        if case == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")
        done.append(case)

    assert gpu_cases.measure_within(range(3), str, measure, options()) == 1
    assert done == [0, 2] and "1: not measured: OutOfMemoryError: CUDA out of memory.\n" in capsys.readouterr().out


def test_no_case_begins_that_would_not_end_in_time(monkeypatch, capsys):
    clock = [100.0]
    monkeypatch.setattr(gpu_cases, "BEGAN", 95.0)
    monkeypatch.setattr(gpu_cases.time, "monotonic", lambda: clock[0])

    def measure(case: int) -> None:
        clock[0] += 10

    assert gpu_cases.measure_within(range(20), str, measure, options(budget_seconds=40)) == 0
    assert clock[0] == 130
    assert "no time left for 17 of 20 cases: 3; 4; " in (line := capsys.readouterr().out) and line.endswith("and 5 more\n")


def test_where_the_device_is_lost_a_new_process_goes_on(monkeypatch):
    class Replaced(BaseException):
        pass

    def execv(program, arguments):
        seen.extend(arguments)
        raise Replaced

    def measure(case: int) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    seen: list[str] = []
    monkeypatch.setattr(gpu_cases, "lost", lambda: True)
    monkeypatch.setattr(os, "closerange", lambda *of: None)
    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(Replaced):
        gpu_cases.measure_within(range(9), str, measure, options(device="cuda", after=3, budget_seconds=1e6))
    assert seen[0] == sys.executable and seen[-5:-1] == ["--resume", "--after", "4", "--budget-seconds"]
    done: list[int] = []
    assert gpu_cases.measure_within(range(6), str, done.append, options(after=4)) == 1 and done == [4, 5]


def rows_of(path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.open()))


def test_a_wrong_arm_is_left_out_and_no_other(tmp_path, monkeypatch, capsys):
    class Wrong(cuda_arms.CudaArm):
        def _forward(self):
            y = super()._forward()
            return y + 1 if self.pruned and self.precision == "bfloat16" else y

    monkeypatch.setattr(cuda_arms, "CudaArm", Wrong)
    out = tmp_path / "layers.csv"
    assert gpu_layers.main([*TINY, "--out", str(out)]) == 1
    whole = [row for row in rows_of(out) if row["arm"].startswith("sparse") and row["pass"] in PASSES]
    assert {row["precision"] for row in whole} == {"float32"}
    assert "bfloat16 rows, forward: output differs from the dense layer's in float64" in capsys.readouterr().out


def test_what_cannot_be_measured_together_is_measured_apart(tmp_path, monkeypatch):
    measure = gpu_layers.measure

    def small(group, shape, together, *others):
        if len(together) > 1 or together == [("unstructured", 0.75)]:
            raise torch.OutOfMemoryError("out of memory")
        return measure(group, shape, together, *others)

    monkeypatch.setattr(gpu_layers, "measure", small)
    out = tmp_path / "layers.csv"
    assert gpu_layers.main([*TINY, "--out", str(out)]) == 1
    assert {(row["group"], row["sparsity"]) for row in rows_of(out)} == {("linear", "0.5"), ("conv", "0.5")}
    monkeypatch.setattr(gpu_layers, "measure", measure)
    before = rows_of(out)
    assert gpu_layers.main([*TINY, "--out", str(out), "--resume"]) == 0
    after = rows_of(out)
    assert after[: len(before)] == before and {row["sparsity"] for row in after} == {"0.5", "0.75"}


def test_a_tiny_share_of_the_roofline_is_not_nothing(tmp_path, monkeypatch, capsys):
    """Of a busy machine, say: rounded to 0.000 it had no logarithm, and no table was printed."""
    monkeypatch.setattr(gpu_layers, "measure_ceilings", lambda device: Ceilings(dict.fromkeys(STORAGE, 1e30), 1e30))
    assert gpu_layers.main([*TINY, "--out", str(tmp_path / "layers.csv")]) == 0
    shares = [float(row["roofline"]) for row in rows_of(tmp_path / "layers.csv") if row["roofline"]]
    assert shares and all(0 < share < 1e-12 for share in shares)
    assert "x) 0%" in capsys.readouterr().out


@pytest.mark.parametrize("part", [1, 2])
def test_warming_up_writes_nothing(tmp_path, part):
    flags = ["--device", "cpu", "--quick", "--pattern", "block(32, 32)", "--sparsity", "0.5", "--warm", f"{part}/2"]
    assert gpu_layers.main([*flags, "--out", str(tmp_path / "layers.csv")]) == 0
    assert not any(tmp_path.iterdir())


@pytest.mark.slow
def test_warming_up_steps_writes_nothing(tmp_path):
    flags = ["--device", "cpu", "--quick", "--pattern", "block(32, 32)", "--sparsity", "0.9", "--precision", "float32"]
    assert gpu_steps.main([*flags, "--warm", "1/1", "--out", str(tmp_path / "steps.csv")]) == 0
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "a/b", "-1/2"])
def test_parts_are_counted_from_one(text):
    with pytest.raises(argparse.ArgumentTypeError):
        gpu_cases.part(text)


def test_peers_that_do_not_run_or_are_wrong_cost_a_line(monkeypatch):
    weight, x, grad, lines = torch.randn(8, 8), torch.randn(4, 8), torch.randn(4, 8), []

    def fails(*arguments):
        raise ImportError("no such library\nat all")

    def silent(*arguments):
        raise AssertionError

    def peer(output, gradients=None):
        return lambda weight, block_size, x: gpu_peers.Peer(weight, output, gradients)

    def right():
        return x @ weight.t()

    monkeypatch.setattr(gpu_peers, "PEERS", {
        "right": peer(right, lambda grad: lambda: (grad @ weight, grad.t() @ x)),
        "right forward": peer(right),
        "wrong": peer(lambda: x @ weight),
        "wrong dx": peer(right, lambda grad: lambda: (grad @ weight.t(), grad.t() @ x)),
        "wrong dw": peer(right, lambda grad: lambda: (grad @ weight, x.t() @ grad)),
        "nan": peer(right, lambda grad: lambda: (grad @ weight * torch.nan, grad.t() @ x)),
        "not made for it": lambda *arguments: None,
        "not built": fails, "not run": peer(fails), "silent": silent,
    })  # fmt: skip
    found = gpu_peers.available(weight, None, x, grad, 1e-4, lines.append)
    assert list(found["forward"]) == ["right", "right forward", "wrong dx", "wrong dw", "nan"]
    assert list(found["forward+backward"]) == ["right"]
    assert torch.equal(found["forward"]["right"](), right())
    output, of_input, of_weight = found["forward+backward"]["right"]()
    assert torch.equal(output, right()) and torch.equal(of_input, grad @ weight) and torch.equal(of_weight, grad.t() @ x)
    others = ("wrong float32", *(f"{name} float32 backward" for name in ("wrong dx", "wrong dw", "nan")),
              *(f"{name} float32" for name in ("not built", "not run", "silent")))  # fmt: skip
    assert [line.split(": ")[1] for line in lines] == list(others)
    assert "input gradient is wrong by" in lines[1] and "weight gradient is wrong by" in lines[2] and "nan" in lines[3]
    assert lines[4].endswith("no such library") and lines[6].endswith("AssertionError")


def test_which_peer_takes_which_weight():
    """What can be built on the CPU; 2:4 needs a device."""
    weight, x = torch.randn(32, 32) * (torch.rand(32, 32) < 0.3), torch.randn(4, 32)
    grad = torch.randn(4, 32)
    peer = gpu_peers.cusparse(weight, None, x)
    torch.testing.assert_close(peer.output(), x @ weight.t())
    of_input, of_weight = peer.gradients(grad)()
    torch.testing.assert_close(of_input, grad @ weight)
    torch.testing.assert_close(of_weight.to_dense(), grad.t() @ x * (weight != 0))
    assert peer.weight is weight and gpu_peers.cusparse(weight, (16, 16), x) is None
    assert gpu_peers.block_addmm(weight, (16, 16), x) is None
    assert gpu_peers.block_addmm(weight.bfloat16(), None, x.bfloat16()) is None
    assert gpu_peers.semi_structured(weight, None, x) is None
    assert gpu_peers.semi_structured(weight.bfloat16(), (16, 16), x.bfloat16()) is None
