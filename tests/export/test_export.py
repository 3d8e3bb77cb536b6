"""Every format, read back in the way its user would, computes what the run's model computes; a checkpoint is never obeyed."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision import models

import grasp_sparse as gs
from grasp_sparse import cli
from grasp_sparse.export import command, source, weights
from grasp_sparse.export.onnx import INPUT
from grasp_sparse.export.source import read_source
from grasp_sparse.train.checkpoint import load_checkpoint, read_checkpoint
from grasp_sparse.train.checkpoint_files import checkpoint_name
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.models import OWN_MODELS, vgg_small
from grasp_sparse.train.run import start_run

_SMALL = {"model": "vgg_small", "model_args": {"stem": 16, "widths": [32], "depth": 1}}
_RUNS = {
    "sparse": _SMALL | {"max_density": 1.0},
    "blocks": _SMALL | {"pattern": "block(8, 8)", "max_density": 1.0},
    "masked": _SMALL | {"max_density": 1e-6},
    "dense": _SMALL | {"dense": True},
    "torchvision": {
        "model": "resnet18", "max_density": 1.0, "image_size": 32, "train_limit": 16, "batch_size": 8,
        "memory_format": "channels_last",
    },
    "the paper's": {"model": "resnet32", "max_density": 1.0, "image_size": 16, "train_limit": 16, "batch_size": 8},
    "averaged": _SMALL | {"ema_decay": 0.9, "epochs": 3, "keep_checkpoints": 1},
    "factory": {"model": f"{__name__}:strange_net", "max_density": 1.0},
    "versioned": {"model": f"{__name__}:versioned_net", "max_density": 1.0},
    "versioned dense": {"model": f"{__name__}:versioned_net", "dense": True},
}  # fmt: skip

needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript")), reason="needs the packages onnx and onnxscript"
)


def strange_net(num_classes: int, in_channels: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_channels, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))


class _Versioned(nn.Sequential):
    """Refuses a state_dict that does not say its version, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, *rest) -> None:
        if local_metadata.get("version") != 2:
            raise ValueError(f"Expected version 2, got {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def versioned_net(num_classes: int, in_channels: int) -> nn.Module:
    return _Versioned(*strange_net(num_classes, in_channels))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run by its name in _RUNS; trained when first asked for."""
    folder, made = tmp_path_factory.mktemp("runs"), set()

    def run(name: str) -> Path:
        if name not in made:
            made.add(name)
            settings = {
                "data": "fake", "image_size": 8, "train_limit": 32, "test_limit": 10, "batch_size": 16, "epochs": 1, "lr": 0.05, "sparsity": 0.8,
                "samples_per_class": 1, "timing_rounds": 0, "tensorboard": "off", **_RUNS[name],
            }  # fmt: skip
            start_run(TrainConfig(**settings), folder / name)
        return folder / name

    return run


def _plain(name: str) -> nn.Module:
    if name == "torchvision":
        return models.resnet18(num_classes=10)
    if name == "the paper's":
        return OWN_MODELS["resnet32"](10, 3)
    if name.startswith("versioned"):
        return versioned_net(10, 3)
    return strange_net(10, 3) if name == "factory" else vgg_small(10, 3, **_SMALL["model_args"])


def _export(runs: Callable[[str], Path], name: str, form: str, path: Path) -> tuple[Tensor, Tensor]:
    """Write `path`; images, and what the run's own model makes of them."""
    model = _RUNS[name]["model"]
    assert command.export_run(runs(name), form, path, model=model) <= 1e-5
    trained = read_source(runs(name), model=model)
    images = torch.randn(5, *trained.shape)
    with torch.no_grad():
        return images, trained.model(images)


@torch.no_grad()
def _same(model: nn.Module, images: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(model.eval()(images), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", _RUNS)
def test_dense_weights_fit_the_plain_model(runs, name: str, tmp_path: Path) -> None:
    images, expected = _export(runs, name, "dense", tmp_path / "model.pt")
    model, state = _plain(name), torch.load(tmp_path / "model.pt", weights_only=True)
    model.load_state_dict(state, strict=True)
    _same(model, images, expected)
    assert all(tensor.is_contiguous() for tensor in state.values())
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(map(Tensor.numel, weights))
    assert zeros == (0 if _RUNS[name].get("dense") else pytest.approx(0.8, abs=0.02))


@pytest.mark.parametrize("name", _RUNS)
def test_sparse_weights_make_the_plain_model_sparse_again(runs, name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    images, expected = _export(runs, name, "sparse", path)
    model = gs.load_sparse(_plain(name), safetensors.torch.load_file(path))
    _same(model, images, expected)
    kept = any(key.endswith(".values") for key in model.state_dict())
    assert kept == (name != "masked" and not _RUNS[name].get("dense"))


class _WithWords(nn.Linear):
    def get_extra_state(self) -> str:
        return "words"

    def set_extra_state(self, state: str) -> None:
        assert state == "words"


def test_what_is_no_tensor_goes_into_dense_weights_alone(tmp_path: Path) -> None:
    model, plain = _WithWords(3, 2), _WithWords(3, 2)
    given = source.Source(model, plain, (3, 1, 1), {})
    weights.write_dense(given, tmp_path / "model.pt")
    assert torch.equal(weights.read_dense(given, tmp_path / "model.pt").weight, model.weight)
    with pytest.raises(UserError, match="got other values in _extra_state; use --format dense"):
        weights.write_sparse(given, tmp_path / "model.safetensors")


def test_the_metadata_of_sparse_weights_tell_how_they_were_made(runs, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    command.export_run(runs("sparse"), "sparse", path)
    with safetensors.safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["grasp_sparse.model"])
    assert (about["format"], about["which"], about["epoch"], about["data"]["shape"]) == (1, "last", 1, [3, 8, 8])
    assert TrainConfig.from_dict(about["config"], "metadata").sparsity == 0.8
    assert sum(layer["kept"] for layer in about["pruning"]["layers"]) > 0
    command.export_run(runs("sparse"), "sparse", tmp_path / "again.safetensors")
    assert path.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


def test_each_kind_of_weights_is_its_own(runs, tmp_path: Path) -> None:
    folder = runs("averaged")
    best = max(load_checkpoint(folder)["position"]["history"], key=lambda row: row["test_accuracy"])["epoch"]
    sections = {"last": (3, "model"), "best": (best, "model"), "ema": (3, "ema")}
    for which, (epoch, section) in sections.items():
        command.export_run(folder, "sparse", tmp_path / which, which=which)
        state = read_checkpoint(folder / checkpoint_name(epoch, 0))
        written = safetensors.torch.load_file(tmp_path / which)
        assert written.keys() == state["model"].keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in state[section].items())
    assert (tmp_path / "ema").read_bytes() != (tmp_path / "last").read_bytes()


def test_weights_that_a_run_does_not_have_are_refused(runs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Expected a run with a moving average for --which ema"):
        command.export_run(runs("sparse"), "dense", tmp_path / "model.pt", which="ema")


@pytest.mark.parametrize(
    ("history", "message"),
    [([], "Expected a finished epoch for --which best"), ([{"epoch": "1"}], "rows of numbers"), (None, "rows of numbers"),
     ([{"epoch": 7, "test_accuracy": 0.5}], "Expected a checkpoint at the end of an epoch in .*, found none; --which last")],
    ids=["none yet", "words", "missing", "deleted"],
)  # fmt: skip
def test_a_best_epoch_that_is_not_there_is_refused(runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, history, message) -> None:
    state = load_checkpoint(runs("sparse"))
    state["position"]["history"] = history
    monkeypatch.setattr(source, "load_checkpoint", lambda folder: state)
    with pytest.raises(UserError, match=message):
        command.export_run(runs("sparse"), "dense", tmp_path / "model.pt", which="best")


def test_where_the_best_epoch_left_no_checkpoint_the_best_that_did_is_taken_and_named(
    runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its save found no room, and training went on."""
    folder = runs("sparse")
    state = load_checkpoint(folder)
    state["position"]["history"] = [{"epoch": 1, "test_accuracy": 0.5}, {"epoch": 7, "test_accuracy": 0.9}]
    monkeypatch.setattr(source, "load_checkpoint", lambda folder: state)
    with pytest.warns(UserWarning, match="checkpoint-e007-s000000.pt, is not there; taking checkpoint-e001-s000000.pt"):
        command.export_run(folder, "sparse", tmp_path / "best", which="best")
    command.export_run(folder, "sparse", tmp_path / "last")
    written = [safetensors.torch.load_file(tmp_path / name) for name in ("best", "last")]
    assert all(torch.equal(written[0][name], tensor) for name, tensor in written[1].items())


@pytest.mark.parametrize(
    "data",
    [{}, {"num_classes": 10, "shape": [3, 8]}, {"num_classes": "10", "shape": [3, 8, 8]}, {"num_classes": 10, "shape": [3, 1 << 20, 1 << 20]},
     {"num_classes": 10, "shape": [3, -8, 8]}],
    ids=["nothing", "two sizes", "word", "huge", "negative"],
)  # fmt: skip
def test_images_that_no_data_set_has_are_refused(runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: dict) -> None:
    state = load_checkpoint(runs("sparse")) | {"data": data}
    monkeypatch.setattr(source, "load_checkpoint", lambda folder: state)
    with pytest.raises(UserError, match="Expected data in .* to be num_classes, and shape"):
        command.export_run(runs("sparse"), "dense", tmp_path / "model.pt")


@needs_onnx
@pytest.mark.parametrize("name", ["sparse", "masked", "blocks", "torchvision", "the paper's"])
def test_onnx_computes_the_same_at_any_batch_size(runs, name: str, tmp_path: Path) -> None:
    import onnx
    from onnx.reference import ReferenceEvaluator

    path = tmp_path / "model.onnx"
    images, expected = _export(runs, name, "onnx", path)
    onnx.checker.check_model(path)
    evaluate = ReferenceEvaluator(str(path))
    for count in (1, 5):
        (logits,) = evaluate.run(None, {INPUT: images[:count].numpy()})
        torch.testing.assert_close(torch.from_numpy(logits), expected[:count], rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_onnx_without_its_packages_says_what_to_install(runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install onnx onnxscript"):
        command.export_run(runs("sparse"), "onnx", tmp_path / "model.onnx")


def test_a_factory_that_a_checkpoint_names_is_not_called(runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setitem(globals(), "strange_net", lambda **_: called.append(1))
    for trusted in (None, "os:system", "resnet18"):
        with pytest.raises(UserError, match=f"Expected --model {re.escape(__name__)}:strange_net on the command line too"):
            command.export_run(runs("factory"), "dense", tmp_path / "model.pt", model=trusted)
    assert not called and not (tmp_path / "model.pt").exists()


def test_a_file_that_computes_something_else_is_not_left(runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(trained, path):
        torch.save({name: tensor + 1 for name, tensor in trained.plain.state_dict().items()}, path)

    monkeypatch.setattr(command, "write_dense", wrong)
    with pytest.raises(UserError, match="Expected model.pt to compute what the run does"):
        command.export_run(runs("dense"), "dense", tmp_path / "model.pt")
    assert not list(tmp_path.iterdir())


class _Stopped(BaseException):
    """Neither an error of ours nor of anybody: a signal, say."""


def _fail(*_: object) -> None:
    raise _Stopped


@pytest.mark.parametrize("failing", ["write_dense", "read_dense", "_compare", "move_over"])
def test_an_export_that_fails_leaves_the_file_of_the_one_before(
    runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "model.pt"
    command.export_run(runs("dense"), "dense", path)
    good = path.read_bytes()
    monkeypatch.setattr(command, failing, _fail)
    with pytest.raises(_Stopped):
        command.export_run(runs("sparse"), "dense", path)
    assert path.read_bytes() == good and list(tmp_path.iterdir()) == [path]


def test_what_has_the_name_of_the_export_was_read_back(runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, compare = tmp_path / "model.pt", command._compare

    def watched(*arguments: object) -> float:
        assert not path.exists()
        return compare(*arguments)

    monkeypatch.setattr(command, "_compare", watched)
    command.export_run(runs("sparse"), "dense", path)
    assert list(tmp_path.iterdir()) == [path]


def test_the_command_writes_beside_the_run_and_says_so(runs, capsys: pytest.CaptureFixture) -> None:
    folder = runs("sparse")
    assert cli.main(["export", str(folder), "--format", "sparse"]) == 0
    assert f"wrote {folder}.safetensors" in capsys.readouterr().out
    assert cli.main(["export", str(folder), "--format", "dense", "--out", str(folder)]) == 2
    assert "Expected --out to be a file" in capsys.readouterr().err
    assert cli.main(["export", "nowhere", "--format", "dense"]) == 2
