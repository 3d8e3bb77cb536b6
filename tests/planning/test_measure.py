"""Layers are measured as they run, until it is clear who is faster."""

from __future__ import annotations

import copy

import pytest
import torch
from small_net import X, masks_of
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import grasp_sparse as gs
from grasp_sparse.nn import MaskedLinear, SparseLinear
from grasp_sparse.planning import measure
from grasp_sparse.planning.inputs import LayerInput

pytestmark = pytest.mark.skipif(not gs._extension.status().loaded, reason="without compiled kernels nothing is measured")


class Casts(TorchDispatchMode):
    """The shapes of what is made bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default and kwargs.get("dtype") == torch.bfloat16:
            self.shapes.append(args[0].shape)
        return function(*args, **(kwargs or {}))


class TestMeasuring:
    @pytest.mark.parametrize("layer, shape", [(nn.Linear(6, 4), (3, 6)), (nn.Conv2d(2, 4, 3, bias=False), (2, 2, 5, 5))])
    def test_the_model_is_not_touched(self, layer, shape):
        layer.register_forward_hook(lambda *_: pytest.fail("a hook of the model ran"))
        mask = torch.rand_like(layer.weight) < 0.5
        before, state = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
        times = measure.measure_layer(layer, mask, LayerInput(shape, "row-major", torch.float32, True), rounds=2)
        assert all(0 < seconds < 10 for seconds in times)
        assert all(torch.equal(layer.state_dict()[name], tensor) for name, tensor in before.items())
        assert all(parameter.grad is None for parameter in layer.parameters()) and torch.equal(torch.get_rng_state(), state)

    def test_convolutions_of_single_weights_are_measured_as_they_run_on_cuda(self):
        given = LayerInput((4, 6, 5, 5), "channels_last", torch.float32, True)
        with FakeTensorMode():
            conv, linear = nn.Conv2d(6, 8, 3, device="cuda"), nn.Linear(6, 8, device="cuda")
        assert measure._input_of_sparse(conv, given, None) == given._replace(layout="batch-innermost")
        assert measure._input_of_sparse(conv, given, (16, 16)) == given == measure._input_of_sparse(nn.Conv2d(6, 8, 3), given, None)
        rows = LayerInput((4, 6), "row-major", torch.float32, True)
        assert measure._input_of_sparse(linear, rows, None) == rows

    def test_half_precision_and_frozen_layers_can_be_measured(self, net):
        net.bfloat16()
        net.first.requires_grad_(False)
        plan = gs.plan(net, masks_of(net), X)
        assert all(row.times and row.runs in ("sparse", "masked") for row in plan.rows)

    @pytest.mark.parametrize("kind", [nn.Linear, MaskedLinear, SparseLinear])
    def test_under_autocast_every_call_casts_its_weight(self, kind):
        dense = nn.Linear(100, 90)
        layer = dense if kind is nn.Linear else kind.from_dense(dense, torch.rand(90, 100) < 0.5)
        weights = [parameter.shape for parameter in layer.parameters() if parameter.dim() > 1]
        with torch.autocast("cpu", torch.bfloat16):
            run = measure._arm(layer, torch.randn(3, 100, dtype=torch.bfloat16), torch.Generator())
            with Casts() as casts:
                run(), run()
        # To the kernels values of single weights are float32.
        assert casts.shapes.count(weights[0]) == (0 if kind is SparseLinear else 2)

    @pytest.mark.parametrize(
        "milliseconds, ends",
        [
            ({"dense": [3, 3, 3], "masked": [3, 3.1, 9], "sparse": [1, 1.05, 5]}, True),
            ({"dense": [4, 4, 4], "masked": [4, 4, 4], "sparse": [8, 8, 8]}, True),
            ({"dense": [14] * 3, "masked": [14] * 3, "sparse": [10] * 3}, False),  # near
            ({"dense": [9, 9, 9], "masked": [9, 20, 20], "sparse": [3, 3, 3]}, False),  # unsettled
            ({"dense": [5, 5, 5], "masked": [15, 15, 15], "sparse": [6, 6, 6]}, False),  # masked three times dense: is it?
            ({"dense": [0.1] * 3, "masked": [0.1] * 3, "sparse": [0.02] * 3}, False),  # a moment in which others took a core
            ({"dense": [0.1] * 140, "masked": [0.1] * 140, "sparse": [0.02] * 140}, True),
            ({"dense": [0.1] * 260, "masked": [0.1] * 260, "sparse": [0.1] * 260}, False),
            ({"dense": [0.1] * 270, "masked": [0.1] * 270, "sparse": [0.1] * 270}, True),
            ({"dense": [30] * 15, "masked": [30] * 15, "sparse": [30] * 15}, True),  # enough is enough
            ({"dense": [30] * 14, "masked": [30] * 14, "sparse": [30] * 14}, False),
            ({"dense": [2000] * 3, "masked": [2000] * 3, "sparse": [2000] * 3}, True),
        ],
    )
    def test_rounds_end_when_the_answer_is_clear_or_took_long(self, milliseconds, ends):
        assert measure._decided({name: [ms / 1e3 for ms in taken] for name, taken in milliseconds.items()}) is ends
