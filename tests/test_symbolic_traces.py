"""torch.fx sees a sparse network as it sees the dense one: the same nodes by the same names, and of each what that gives there."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn
from torchvision.models import resnet, vgg
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import grasp_sparse as gs
from grasp_sparse.nn import BatchNorm2d, MaskedConv2d, MaskedLinear, SparseConv2d, SparseLinear
from grasp_sparse.nn.norm import norm_relu
from pruned_models import pruned_copy


def small_resnet() -> nn.Module:
    return resnet.ResNet(resnet.BasicBlock, [1, 2, 1, 1], num_classes=10)


def small_vgg() -> nn.Module:
    features = vgg.make_layers([8, "M", 16, "M"], batch_norm=True)
    return nn.Sequential(features, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


@pytest.fixture(params=[small_resnet, small_vgg])
def networks(request) -> tuple[nn.Module, nn.Module]:
    """A network whose layers run sparse and masked in turn, and the dense one with zeros where it is pruned."""
    torch.manual_seed(0)
    dense = request.param().double()
    masks = gs.prune(dense, sparsity=0.7, criterion="magnitude", scope="layer")
    model, dense = copy.deepcopy(dense), pruned_copy(dense, masks)
    gs.sparsify_(model, masks, plan={name: "masked" if i % 2 else "sparse" for i, name in enumerate(masks)})
    for kind in (SparseConv2d, MaskedConv2d, BatchNorm2d):
        assert any(isinstance(module, kind) for module in model.modules())
    return model, dense


X = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_nodes_are_those_of_the_dense_network_and_give_what_these_give(networks):
    model, dense = (network.eval() for network in networks)
    names, expected = (get_graph_node_names(network)[1] for network in (model, dense))
    assert sorted(names) == sorted(expected)
    got, want = (create_feature_extractor(network, expected)(X) for network in (model, dense))
    for name in expected:
        torch.testing.assert_close(got[name], want[name], msg=lambda text, name=name: f"{name}: {text}")


def test_a_traced_network_trains_as_the_network_does(networks):
    model, dense = networks
    traced = fx.symbolic_trace(model)
    traced(X).square().sum().backward()
    dense(X).square().sum().backward()
    for (name, parameter), (_, expected) in zip(model.named_parameters(), dense.named_parameters(), strict=True):
        if parameter.shape == expected.shape and name.endswith("weight"):
            mask = getattr(model.get_submodule(name.removesuffix(".weight")), "mask", torch.ones((), dtype=torch.bool))
            torch.testing.assert_close(parameter.grad, expected.grad * mask, msg=lambda text, name=name: f"{name}: {text}")
    assert any(isinstance(module, SparseLinear | SparseConv2d) for module in traced.modules())


def test_what_a_call_asks_for_stands_in_its_node():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.relu = BatchNorm2d(4), nn.ReLU()
            self.linear = SparseLinear.from_dense(nn.Linear(4, 3), torch.rand(3, 4) < 0.5)
            self.masked = MaskedLinear.from_dense(nn.Linear(3, 2), torch.rand(2, 3) < 0.5)

        def forward(self, x):
            y = norm_relu(self.norm, self.norm(x, x, relu=True), x, self.relu)
            return self.masked(self.linear(y.mean((2, 3)), relu=True))

    net, x = Net().eval(), torch.randn(2, 4, 5, 5)
    traced = fx.symbolic_trace(net)
    calls = [(node.target, dict(node.kwargs)) for node in traced.graph.nodes if node.op == "call_module"]
    (x_node,) = (node for node in traced.graph.nodes if node.op == "placeholder")
    fused = {"residual": x_node, "relu": True}
    assert calls == [("norm", fused), ("norm", {}), ("relu", {}), ("linear", {"relu": True}), ("masked", {})]
    torch.testing.assert_close(traced(x), net(x))
