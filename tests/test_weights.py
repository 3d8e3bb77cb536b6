"""What can be pruned is found once, under torch's own names; what cannot is listed with a reason."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn

from grasp_sparse.nn import MaskedLinear, SparseConv2d
from grasp_sparse.pruning import prune
from grasp_sparse.weights import find_weights

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element")


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.grouped = nn.Conv2d(8, 8, 3, groups=4)
        self.reflect = nn.Conv2d(8, 8, 3, padding_mode="reflect")
        self.transposed = nn.ConvTranspose2d(8, 8, 3)
        self.conv1d = nn.Conv1d(8, 8, 3)
        self.conv3d = nn.Conv3d(8, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.layer_norm = nn.LayerNorm([8, 4])
        self.attention = nn.MultiheadAttention(8, 2)
        self.bilinear = nn.Bilinear(8, 8, 8)
        self.rnn = nn.LSTM(8, 8)
        self.embedding = nn.Embedding(10, 8)
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.position = nn.Parameter(torch.zeros(4, 8))
        self.lazy = nn.LazyLinear(8)
        self.empty = nn.Linear(0, 8)
        self.fc = nn.Linear(8, 10)


def names(selection) -> list[str]:
    return [weight.name for weight in selection.weights]


def test_only_exact_linear_and_plain_conv2d_are_prunable_and_everything_else_is_listed():
    found = find_weights(Zoo())
    assert names(found) == ["conv.weight", "reflect.weight", "fc.weight"]
    reasons = dict(found.skipped)
    for module, word in {
        "": "position",
        "grouped": "groups=4",
        "transposed": "transposed",
        "conv1d": "two-dimensional",
        "conv3d": "two-dimensional",
        "attention": "packed",
        "attention.out_proj": "subclass of Linear",
        "bilinear": "bilinear",
        "rnn": "recurrent",
        "embedding": "lookup",
        "normed.parametrizations.weight": "neither Linear nor Conv2d",
        "lazy": "forward",
        "empty": "no elements",
    }.items():
        assert word in reasons.pop(module), module
    assert not reasons  # norms are not listed


def test_names_are_those_of_named_parameters_and_tied_weights_appear_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    found = find_weights(model)
    assert names(found) == [name for name, _ in model.named_parameters() if "weight" in name] == ["0.weight", "1.weight"]
    assert found.weights[0].parameter is model[0].weight
    assert [name for name, _ in found.weights[0].modules] == ["0", "2"]
    assert names(find_weights(model, exclude="2")) == ["1.weight"]


def test_a_weight_tied_to_an_embedding_stays_dense():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    model[1].weight = model[0].weight
    found = find_weights(model)
    assert not found.weights
    assert "shared with '0.weight' (Embedding)" in dict(found.skipped)["1"]


def test_a_module_used_as_root_is_called_weight():
    assert names(find_weights(nn.Linear(3, 2))) == ["weight"]


def test_include_and_exclude_take_patterns_lists_and_predicates():
    model = torchvision.models.resnet18()
    everything = names(find_weights(model))
    assert len(everything) == 21
    found = find_weights(model, include=["layer1.*", "fc"])
    assert names(found) == [name for name in everything if name.startswith(("layer1.", "fc."))]
    assert dict(found.skipped)["conv1"] == "not included by the caller"
    found = find_weights(model, exclude="*downsample*.weight")
    assert names(found) == [name for name in everything if "downsample" not in name]
    assert dict(found.skipped)["layer2.0.downsample.0"] == "excluded by the caller"
    assert names(find_weights(model, exclude=lambda name, module: module is model.fc)) == everything[:-1]
    assert names(find_weights(model, include=lambda name, module: name == "fc")) == ["fc.weight"]


@pytest.mark.parametrize(
    ("argument", "pattern", "hint"),
    [
        ("include", "layer9.*", "prunable are 'conv.weight'"),
        ("include", ["conv", "attention"], "stays dense"),
        ("exclude", "nothing", "none"),
    ],
)
def test_a_pattern_that_matches_nothing_is_an_error(argument, pattern, hint):
    with pytest.raises(ValueError, match=f"(?s){argument}.*{hint}"):
        find_weights(Zoo(), **{argument: pattern})


def test_a_pattern_naming_a_container_says_how_to_reach_inside():
    with pytest.raises(ValueError, match=r"layer1\.\*"):
        find_weights(torchvision.models.resnet18(), exclude="layer1")


def test_excluding_a_layer_that_is_dense_anyway_is_no_error():
    assert names(find_weights(Zoo(), exclude="attention*")) == ["conv.weight", "reflect.weight", "fc.weight"]


def test_vision_transformer_lists_its_attention():
    model = torchvision.models.VisionTransformer(32, 16, 2, 2, 8, 16)
    found = find_weights(model)
    assert sum("mlp" in name for name in names(found)) == 4
    assert sum(module.endswith("self_attention") for module, _ in found.skipped) == 2


def half_pruned() -> nn.Module:
    conv, first, second = nn.Conv2d(3, 4, 3), nn.Linear(16, 6), nn.Linear(6, 5)
    sparse = SparseConv2d.from_dense(conv, torch.arange(108).view(conv.weight.shape) % 3 == 0)
    return nn.Sequential(sparse, nn.Flatten(), MaskedLinear.from_dense(first, torch.arange(96).view(6, 16) % 2 == 0), second)


@pytest.mark.parametrize(
    "selectors", [{}, {"include": "*"}, {"exclude": "0"}, {"exclude": lambda name, module: name == "0"}, {"include": ["2", "3"]}]
)
def test_layers_that_are_pruned_already_are_refused(selectors):
    with pytest.raises(ValueError, match=r"Expected dense layers to prune, .* 2 \(MaskedLinear\): call densify_ first, or exclude them"):
        prune(half_pruned(), None, 0.5, "magnitude", **selectors)
    with pytest.raises(ValueError, match=r"pruned already, the model itself \(MaskedLinear\)"):
        find_weights(half_pruned()[2])


@pytest.mark.parametrize(
    "selectors",
    [
        {"include": "3"},
        {"exclude": ["0", "2.weight"]},
        {"include": ("3.weight",)},
        {"exclude": lambda name, module: name != "3"},
    ],
)
def test_layers_that_are_pruned_already_may_be_left_out(selectors):
    masks = prune(half_pruned(), None, 0.5, "magnitude", **selectors)
    assert list(masks) == ["3.weight"] and masks.kept == 15
    assert dict(masks.skipped) == {"0": "SparseConv2d is pruned already", "2": "MaskedLinear is pruned already"}
