"""A speed that was asked for: the masks that were found are measured anew, and a speed that cannot be had leaves the most that can."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_networks import CONVOLUTIONS, LINEARS, pictures, use_small_ones
from torch import nn

from benchmarks import speedups
from benchmarks.networks import Images, Network
from grasp_sparse.bench.arms import WrongResultError
from grasp_sparse.bench.results import read_rows
from grasp_sparse.masks import MaskSet
from grasp_sparse.pruning import prune
from grasp_sparse.speedup import UnreachableSpeedupError


def _found(network: Network, images: Images, x: torch.Tensor, speedup: float, seed: int) -> MaskSet:
    masks = prune(network.model(seed), [images.scoring(network, seed)], 0.9, "magnitude")
    masks.recipe.update(tries=[{}, {}], dense_step_s=0.3, sparse_step_s=0.15)
    return masks


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_ones(monkeypatch)


def _run(path: Path, *flags: str) -> int:
    return speedups.main(["--quick", "--threads", "1", "--seconds-per-case", "0.001", "--out", str(path), *flags])


def test_what_is_found_is_measured_anew_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(speedups, "masks_for", _found)
    assert _run(tmp_path / "speedups.csv") == 0
    rows = read_rows(tmp_path / "speedups.csv")
    assert {(row["model"], row["asked"], row["tries"], row["speed in the search"]) for row in rows} == {
        ("resnet32", "2", "2", "2.000"), ("mlp", "2", "2", "2.000"),
    }  # fmt: skip
    assert all(float(row["median_s"]) > 0 and float(row["weight_sparsity"]) == pytest.approx(0.9, abs=0.01) for row in rows)
    assert "mlp       2 times as fast: 2.00 after 2 tries, measured anew" in capsys.readouterr().out

    monkeypatch.setattr(speedups, "masks_for", None)  # nothing is left to search
    assert _run(tmp_path / "speedups.csv", "--resume") == 0
    assert read_rows(tmp_path / "speedups.csv") == rows


def test_the_search_steps_on_the_batch_of_the_network_in_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def prune(model: nn.Module, batches: list, **options):
        seen.append((model, batches, options))

    monkeypatch.setattr(speedups, "prune", prune)
    for network in (CONVOLUTIONS, LINEARS):
        images = pictures()
        speedups.masks_for(network, images, images.batch(network, 0)[0], 3.0, 0)
    (model, batches, options), (_, _, rows) = seen
    assert (options["budget"], options["speedup"]) == ("time", 3.0) and len(batches[0][0]) == 40
    assert options["example_input"].shape == (4, 3, 32, 32) and rows["example_input"].shape == (4, 3072)
    assert options["example_input"].is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_speed_that_cannot_be_had_says_the_most_that_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def refuse(*_):
        raise UnreachableSpeedupError("Expected a speedup that can be reached, got 2: ask for at most 1.5.", 1.5)

    monkeypatch.setattr(speedups, "masks_for", refuse)
    assert _run(tmp_path / "speedups.csv", "--model", "mlp") == 0
    (row,) = read_rows(tmp_path / "speedups.csv")
    assert row["most"] == "1.5" and "median_s" not in row
    assert "mlp       2 times as fast: cannot be had, at most 1.5" in capsys.readouterr().out


def test_what_is_no_speed_is_refused(tmp_path: Path, capsys) -> None:
    with pytest.raises(SystemExit):
        _run(tmp_path / "speedups.csv", "--speedup", "1")
    assert "Expected a factor above 1, got 1" in capsys.readouterr().err


def test_a_wrong_network_leaves_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_):
        raise WrongResultError("a gradient differs")

    monkeypatch.setattr(speedups, "masks_for", _found)
    monkeypatch.setattr(speedups, "measure_network", wrong)
    assert _run(tmp_path / "speedups.csv") == 1
    assert not (tmp_path / "speedups.csv").exists()
