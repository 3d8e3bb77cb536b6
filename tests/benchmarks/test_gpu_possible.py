"""What is left out of a GPU's benchmarks because it cannot be pruned so far is exactly that, and it is said."""

from __future__ import annotations

import csv

import pytest
import torch

from benchmarks import gpu_layers
from benchmarks.gpu_possible import layer_can, possible_layers, possible_steps, sparsest
from benchmarks.gpu_shapes import GROUPS, NETWORKS, PATTERNS, SPARSITIES, TINY_NETWORK, in_order, steps_in_order
from grasp_sparse.pruning import make_masks, prune

SMALL = 2**16  # weights: masks of more take long to make, and can all be made


@pytest.mark.parametrize("group", [name for name in GROUPS if name != "linear"])
def test_a_layer_can_be_pruned_where_masks_can_be_made(group):
    for shape in {shape.weight_shape: shape for shape in GROUPS[group]()}.values():
        if torch.Size(shape.weight_shape).numel() > SMALL:
            continue
        scores = {"weight": torch.rand(shape.weight_shape)}
        for pattern, sparsity in ((pattern, sparsity) for pattern in PATTERNS for sparsity in SPARSITIES):
            if layer_can(shape, pattern, sparsity):
                assert make_masks(scores, sparsity, pattern)["weight"].any()
            else:
                with pytest.raises(ValueError, match="Expected a budget that covers the minimum"):
                    make_masks(scores, sparsity, pattern)


def test_a_network_can_be_pruned_so_far_and_no_further():
    model, image = TINY_NETWORK.make(), torch.randn(1, 3, TINY_NETWORK.side, TINY_NETWORK.side)
    most = sparsest(TINY_NETWORK, "block(64, 64)")
    assert 0.9 < most < 0.99

    def pruned(sparsity: float):
        return prune(model, None, sparsity, "magnitude", pattern="block(64, 64)", budget="flops", example_input=image)

    assert all(mask.any() for mask in pruned(most).values())
    with pytest.raises(ValueError, match="Expected a budget that covers the minimum"):
        pruned(most + 1e-3)


def test_every_case_is_measured_or_left_out():
    cases = in_order(list(GROUPS), list(PATTERNS), SPARSITIES)
    possible, (line,) = possible_layers(cases)
    every, kept = (
        {(case.passes, case.group, case.shape, one) for case in some for one in case.together} for some in (cases, possible)
    )
    assert kept == {case for case in every if layer_can(case[2], *case[3])} and all(case.together for case in possible)
    assert "3->64 at 224x224 batch 64 block(64, 64) 95%" in line
    assert line.endswith(f"; and {len({case[1:] for case in every - kept}) - 6} more")
    assert possible_layers(possible) == (possible, [])


def test_steps_that_cannot_be_are_left_out():
    cases = steps_in_order(NETWORKS[:1], ["unstructured", "block(128, 128)"], [0.95, 0.99], ["bfloat16"])
    possible, (line,) = possible_steps(cases)
    assert [str(case) for case in cases if case not in possible] == ["vgg16_bn block(128, 128) 99% bfloat16"]
    assert line == "not measured, for a layer would keep no block: vgg16_bn block(128, 128) 99% bfloat16"
    assert possible_steps(possible) == (possible, [])


def test_what_cannot_be_is_no_failure(tmp_path, capsys):
    flags = ["--device", "cpu", "--quick", "--rounds", "2", "--pattern", "block(32, 32)", "--sparsity", "0.9", "0.99"]
    assert gpu_layers.main([*flags, "--out", str(tmp_path / "layers.csv")]) == 0
    rows = csv.DictReader((tmp_path / "layers.csv").open())
    assert {(row["group"], row["sparsity"]) for row in rows} == {("linear", "0.9"), ("conv", "0.9")}
    out = capsys.readouterr().out
    assert "would keep no block: linear linear 128->128 batch 32 block(32, 32) 99%; conv conv3x3 32->64 at 6x6 batch 2" in out
