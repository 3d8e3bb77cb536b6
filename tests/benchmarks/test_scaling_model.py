"""docs/scaling.md holds what the model prints, and the model counts what a real sparse network has."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import grasp_sparse as gs
from benchmarks import scaling_cases, scaling_constants, scaling_model
from benchmarks.pages import filled, prose_of
from benchmarks.scaling_cases import Case, Network
from benchmarks.scaling_constants import relative_fit, saved_for_backward
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.footprint import measure_footprint

# Digits in the prose that are names or part of a formula.
_NAMES = re.compile(r"ResNet-50|float32|int32|2 \(n - 1\)")


def _net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 24, 3), nn.Flatten(), nn.Linear(24 * 16, 10))


def test_the_page_holds_what_the_model_prints() -> None:
    page = scaling_model.DOCUMENT.read_text(encoding="utf-8")
    assert page == filled(page, scaling_model.BLOCKS), "run python -m benchmarks.scaling_model --write"


def test_no_number_on_the_page_is_typed_by_hand() -> None:
    prose = prose_of(scaling_model.DOCUMENT.read_text(encoding="utf-8"))
    assert not re.findall(r".*\d.*", _NAMES.sub("", prose))


def test_a_page_that_lost_a_mark_is_refused() -> None:
    page = scaling_model.DOCUMENT.read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="each once"):
        filled(page.replace("<!-- bounds -->", ""), scaling_model.BLOCKS)


def test_bytes_are_those_that_training_has() -> None:
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    sizes = scaling_constants._sizes(_net(), x)
    sparse = _net()
    masks = gs.prune(sparse, [(x, y)], criterion="magnitude", sparsity=0.9, min_density=0.01)
    gs.sparsify_(sparse, masks, max_density=1.0)
    for model, kept in ((_net(), sizes.weights), (sparse, masks.kept)):
        found, case = measure_footprint(TrainConfig(), model, (x, y)), Case("", sizes, kept, 1.0)
        assert case.gradient_bytes == found.gradients
        assert case.state_bytes == found.total


def test_sparse_layers_save_no_more_than_dense_ones() -> None:
    x = torch.randn(4, 3, 8, 8)
    sparse = _net()
    gs.sparsify_(sparse, gs.prune(sparse, [(x, torch.arange(4))], criterion="magnitude", sparsity=0.9, min_density=0.01), max_density=1.0)
    indices = sum(buffer.nbytes for buffer in sparse.buffers() if not buffer.is_floating_point())
    assert saved_for_backward(sparse, x) <= saved_for_backward(_net(), x) + indices


def test_what_is_saved_is_counted_once_and_without_weights() -> None:
    x = torch.randn(8, 16)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    assert saved_for_backward(model, x) == 4 * (8 * 16 + 8 * 32)  # both inputs; ReLU keeps its result, which is the second one


@pytest.mark.parametrize(("nodes", "seconds"), [(1, 0.0), (2, 2 * (1e-3 + 0.5)), (4, 6 * (1e-3 + 0.25))])
def test_a_ring_sends_every_byte_twice_but_for_a_share(nodes: int, seconds: float) -> None:
    assert Network(8, latency=1e-3).all_reduce(1e9, nodes) == pytest.approx(seconds)


def test_headroom_is_where_an_endless_ring_takes_as_long_as_the_node() -> None:
    network = Network(25, latency=0.0)
    case = scaling_cases.stack_cases()[2]
    faster = case.seconds / case.headroom(network)
    assert network.all_reduce(case.gradient_bytes, 10**6) == pytest.approx(faster, rel=1e-5)


def test_rates_are_those_of_the_points_they_were_fitted_to() -> None:
    (slope, fixed), off = relative_fit([[1, 2, 3], [1, 1, 1]], [12.0, 14.0, 16.0])
    assert (slope, fixed, off) == (pytest.approx(2), pytest.approx(10), pytest.approx(0, abs=1e-12))


def test_a_masked_layer_is_not_taken_for_a_sparse_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling_constants, "STEPS", "models.csv")  # with older kernels some layers ran masked there
    with pytest.raises(ValueError, match="run sparse"):
        scaling_constants.measured_steps.__wrapped__("resnet50", "weights")
