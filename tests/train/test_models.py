"""Models: the published counts of prunable weights, factories by name, and mistakes that are named."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from torch import nn

from grasp_sparse.train.errors import UserError
from grasp_sparse.train.models import build_model


def _prunable(model: nn.Module) -> int:
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))


@pytest.mark.parametrize(("name", "count"), [("vgg19", 20_024_000), ("resnet32", 1_855_584)])
def test_the_papers_nets_have_the_published_number_of_prunable_weights(name: str, count: int) -> None:
    assert _prunable(build_model(name, 10, 3)) == count


def test_vgg19_has_sixteen_convolutions_and_one_linear_layer() -> None:
    kinds = [type(m) for m in build_model("vgg19", 10, 3).modules()]
    assert (kinds.count(nn.Conv2d), kinds.count(nn.Linear)) == (16, 1)


def test_initial_weights_follow_the_papers_code() -> None:
    torch.manual_seed(0)
    model = build_model("resnet32", 10, 3)
    conv = model.stages[2][1].conv1.weight
    assert conv.std().item() == pytest.approx((2 / (128 * 9)) ** 0.5, rel=0.02)
    assert model.classifier.weight.std().item() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("name", ["vgg_small", "resnet32", "resnet18", "vgg11_bn", "torchvision.models:squeezenet1_1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_kind_of_name_gives_logits_for_grey_and_colour_images(name: str, channels: int) -> None:
    model = build_model(name, 7, channels).eval()
    with torch.no_grad():
        assert model(torch.zeros(2, channels, 32, 32)).shape == (2, 7)


def test_a_replaced_first_convolution_keeps_the_spread_of_its_outputs() -> None:
    torch.manual_seed(0)
    grey, colour = (build_model("resnet18", 10, channels).conv1.weight for channels in (1, 3))
    assert (grey.std() * 1**0.5).item() == pytest.approx((colour.std() * 3**0.5).item(), rel=0.1)


def test_arguments_reach_the_factory() -> None:
    model = build_model("vgg_small", 10, 1, {"widths": [16, 24], "stem": 8, "depth": 1})
    assert [m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d)] == [8, 16, 24]


def _fake_timm(made: dict) -> types.ModuleType:
    """What this package calls of timm, for machines without it."""
    timm = types.ModuleType("timm")
    timm.is_model = lambda name: name == "tiny_net"
    timm.list_models = lambda: ["tiny_net", "other_net"]

    def create_model(name: str, num_classes: int = 1000, in_chans: int = 3, **args: object) -> nn.Module:
        made.update(args, name=name)
        return nn.Sequential(nn.Conv2d(in_chans, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

    timm.create_model = create_model
    return timm


def test_timm_models_have_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict = {}
    monkeypatch.setitem(sys.modules, "timm", _fake_timm(made))
    model = build_model("timm:tiny_net", 7, 1, {"drop_rate": 0.1})
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 7) and made == {"name": "tiny_net", "drop_rate": 0.1}
    assert build_model("timm:tiny_net", None, None)(torch.zeros(1, 3, 8, 8)).shape == (1, 1000)
    with pytest.raises(UserError, match="unknown model 'timm:tiny_nt'; did you mean timm:tiny_net"):
        build_model("timm:tiny_nt", 7, 3)


def test_timm_itself_takes_the_same_arguments() -> None:
    pytest.importorskip("timm")
    assert build_model("timm:resnet18", 7, 1).eval()(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


def test_without_timm_its_models_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="timm:resnet50 needs timm, .*pip install timm"):
        build_model("timm:resnet50", 10, 3)


@pytest.mark.parametrize(
    ("name", "args", "hint"),
    [
        ("resnet81", {}, "did you mean resnet18"),
        ("no_such_package:net", {}, "cannot load model no_such_package:net"),
        ("torch.nn:NoSuchNet", {}, "cannot load"),
        ("vgg_small", {"width": 3}, "refused its arguments"),
        ("collections:Counter", {}, "Expected model collections:Counter to return a torch.nn.Module"),
    ],
)
def test_a_wrong_model_is_named(name: str, args: dict, hint: str) -> None:
    with pytest.raises(UserError, match=hint):
        build_model(name, 10, 3, args)
