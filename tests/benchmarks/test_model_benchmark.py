"""Whole steps: equal gradients before any timing, masks made once, rows that say what was reached."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from small_networks import convolutions, pictures, use_small_ones
from torch import nn

from benchmarks import models, networks
from benchmarks.networks import Network, load_images
from grasp_sparse.bench.arms import WrongResultError
from grasp_sparse.bench.breakdown import CATEGORIES, breakdown, category
from grasp_sparse.bench.results import read_rows
from grasp_sparse.bench.steps import check_steps, dense_steps, masked_copy, sparse_steps
from grasp_sparse.nn import SparseConv2d
from grasp_sparse.planning import Times, measure
from grasp_sparse.pruning import prune
from grasp_sparse.train.errors import UserError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_ones(monkeypatch)


def _run(folder: Path, *flags: str) -> int:
    return models.main([
        "--quick", "--threads", "1", "--seconds-per-case", "0.001", "--mask-dir", str(folder / "masks"), "--out",
        str(folder / "models.csv"), *flags,
    ])  # fmt: skip


def test_steps_and_breakdown_are_written_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _run(tmp_path) == 0
    rows, parts = read_rows(tmp_path / "models.csv"), read_rows(tmp_path / "models-breakdown.csv")
    conv = [row for row in rows if row["model"] == "resnet32" and row["budget"] == "flops"]
    assert [row["arm"] for row in conv] == ["dense nchw", "dense channels_last", "sparse nchw", "sparse channels_last"]
    assert {row["arm"] for row in rows if row["model"] == "mlp"} == {"dense rows", "dense oneDNN", "sparse rows"}
    for row in rows:
        assert row["data"] == "Pictures (small)" and row["pass"] == "training step" and float(row["median_s"]) > 0
        reached = float(row["flop_sparsity" if row["budget"] == "flops" else "weight_sparsity"])
        assert reached == pytest.approx(float(row["sparsity"]), abs=0.02)
    assert {row["denormals"] for row in rows} == {"zero"} and not torch.tensor([1e-40]).mul(1.0).any()
    sparse = conv[2]
    assert sum(int(sparse[f"layers_{kind}"]) for kind in ("sparse", "masked", "dense")) == 3
    shares: dict[tuple[str, ...], float] = {}
    for part in parts:
        case = tuple(part[key] for key in ("model", "budget", "sparsity", "arm"))
        shares[case] = shares.get(case, 0) + float(part["share"])
    assert [arm.split()[0] for model, *_, arm in shares if model == "resnet32"] == ["dense", "sparse", "refitted"] * 2
    assert len(shares) == 10 and all(total == pytest.approx(1, abs=1e-2) for total in shares.values())
    assert {part["category"] for part in parts} == set(CATEGORIES)

    monkeypatch.setattr(models, "measure_network", None)  # nothing is left to measure
    assert _run(tmp_path, "--resume") == 0
    assert read_rows(tmp_path / "models.csv") == rows


def test_some_sparsities_alone(tmp_path: Path) -> None:
    assert _run(tmp_path, "--model", "mlp", "--sparsity", "0.98") == 0
    assert {(row["budget"], row["sparsity"]) for row in read_rows(tmp_path / "models.csv")} == {("weights", "0.98")}
    with pytest.raises(UserError, match=r"Expected --sparsity among those of the budgets \(flops 0.95; weights 0.98\), got 0.5"):
        _run(tmp_path, "--sparsity", "0.5")


def test_masks_are_scored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, wanted = Network("net", convolutions, 4, 32, micro_batch=5), [("flops", 0.5), ("weights", 0.75)]
    masks = networks.masks_of(network, pictures(), wanted, tmp_path, 0)
    assert masks["weights", 0.75].sparsity == pytest.approx(0.75, abs=0.01)
    assert {path.name for path in tmp_path.iterdir()} == {
        "net-pictures-small-flops-0.5-seed0.safetensors", "net-pictures-small-weights-0.75-seed0.safetensors",
    }  # fmt: skip
    monkeypatch.setattr(networks, "score", None)
    assert networks.masks_of(network, pictures(), wanted, tmp_path, 0) == masks


def test_a_wrong_gradient_leaves_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    forward = SparseConv2d.forward

    def wrong(self: SparseConv2d, x: torch.Tensor) -> torch.Tensor:
        y = forward(self, x)
        return y + 0.2 * (y - y.detach())  # the same output, a gradient that is a fifth too large

    monkeypatch.setattr(SparseConv2d, "forward", wrong)
    monkeypatch.setattr(measure, "measure_layer", lambda *_: Times(2e-3, 2e-3, 1e-3))  # whatever they take, layers run sparse
    assert _run(tmp_path, "--model", "resnet32") == 1
    assert not (tmp_path / "models.csv").exists()
    assert re.search(r"not measured: sparse nchw: gradient of \w+ differs from dense nchw's by 2.0e-01", capsys.readouterr().out)


def test_another_loss_is_found() -> None:
    model, batch = convolutions(), (torch.randn(4, 3, 8, 8), torch.arange(4))
    masks = prune(model, [batch], 0.8)
    masked = masked_copy(model, masks)
    steps = dense_steps(masked, batch) | sparse_steps(masked, masks, batch)[0]
    assert check_steps(steps, masks) < 1e-3
    with torch.no_grad():
        steps["sparse channels_last"].model[7].bias[0] += 1
    with pytest.raises(WrongResultError, match="sparse channels_last: loss"):
        check_steps(steps, masks)


def test_images_come_from_class_folders(tmp_path: Path) -> None:
    from torchvision.io import write_png

    for name in ("cat", "dog"):
        (tmp_path / "pets" / "train" / name).mkdir(parents=True)
        for i in range(3):
            write_png(torch.randint(0, 256, (3, 20, 24), dtype=torch.uint8), str(tmp_path / "pets" / "train" / name / f"{i}.png"))
    images = load_images(str(tmp_path / "pets"))
    assert (images.name, tuple(images.images.shape), sorted(images.labels.tolist())) == ("pets", (6, 3, 32, 32), [0, 0, 0, 1, 1, 1])
    assert images.images.mean().abs() < 1e-4
    x, y = images.batch(Network("large", convolutions, 4, 64), 0)
    assert x.shape == (4, 3, 64, 64) and y.shape == (4,)
    assert load_images(str(tmp_path / "pets"), "cats (and dogs)").name == "cats (and dogs)"
    with pytest.raises(UserError, match="Expected --data-dir to hold train/<class>"):
        load_images(str(tmp_path / "nowhere"))


def test_published_networks() -> None:
    made = {network.name: network for network in networks.NETWORKS}
    assert {name: (n.batch, n.side) for name, n in made.items()} == {
        "vgg19": (128, 32), "resnet32": (128, 32), "resnet50": (32, 224), "mlp": (256, None),
    }  # fmt: skip
    with torch.device("meta"):
        assert [m.weight.shape for m in made["mlp"].make() if isinstance(m, nn.Linear)] == [(4096, 3072), (4096, 4096), (10, 4096)]


def test_operators_are_told_apart() -> None:
    named = {
        "aten::mkldnn_convolution": "conv and linear", "grasp_sparse::csr_conv2d_fprop": "conv and linear",
        "aten::native_batch_norm_backward": "norm", "aten::threshold_backward": "activation", "aten::max_pool2d_with_indices": "pooling",
        "aten::_fused_sgd_": "optimizer", "aten::add_": "other",
    }  # fmt: skip
    assert {name: category(name) for name in named} == named
    assert category("aten::empty", "aten::native_batch_norm") == "norm"


def test_breakdown_adds_up_what_ran() -> None:
    linear, x = nn.Linear(64, 64), torch.randn(256, 64)
    spent = breakdown(lambda: torch.relu(linear(x)), steps=2)
    assert list(spent) == list(CATEGORIES)
    assert spent["conv and linear"] > 0 and spent["activation"] > 0 and spent["norm"] == spent["pooling"] == spent["optimizer"] == 0


def test_breakdown_is_of_a_step_that_nothing_disturbed() -> None:
    linear, x, calls = nn.Linear(64, 64), torch.randn(256, 64), iter(range(6))

    def step() -> None:
        linear(x)
        if next(calls) == 3:  # the second that is profiled
            torch.nn.functional.max_pool2d(torch.randn(16, 16, 64, 64), 2)

    assert breakdown(step, steps=3)["pooling"] == 0


class _FeatureMajor(nn.Module):
    """What follows lies with the batch innermost, as behind sparse layers on a GPU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.t().contiguous().t()


@pytest.mark.parametrize("turned", [False, True], ids=["rows", "feature-major"])
def test_dropout_drops_the_same_in_every_step_that_is_compared(turned: bool) -> None:
    def make(other: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Linear(40, 64), nn.ReLU(), other, nn.Dropout(0.5), nn.Linear(64, 10))

    model, batch = make(nn.Identity()), (torch.randn(32, 40), torch.arange(32) % 10)
    masks = prune(model, [batch], 0.5, "magnitude")
    masked = masked_copy(model, masks)
    state = torch.get_rng_state()
    steps = dense_steps(masked, batch) | sparse_steps(masked, masks, batch)[0]
    if turned:
        steps["sparse rows"].model[2] = _FeatureMajor()
    assert check_steps(steps, masks) < 1e-9
    assert torch.equal(torch.get_rng_state(), state) and not any(module._forward_pre_hooks for module in steps["sparse rows"].model)
