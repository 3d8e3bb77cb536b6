"""The recipes that come with the package: valid, named after what they are, and their models take the images of their data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from image_files import write_class_folders

from grasp_sparse import cli
from grasp_sparse.train.config import TrainConfig, packaged_recipes, read_recipe
from grasp_sparse.train.criterion_args import criterion_options
from grasp_sparse.train.models import build_model
from grasp_sparse.train.run import start_run
from grasp_sparse.train.schedule import learning_rate
from grasp_sparse.train.step import loss_function, step_options

_SHAPES = {
    "fashion-mnist": (10, 1, 28), "cifar10": (10, 3, 32), "cifar100": (100, 3, 32), "tiny-imagenet": (200, 3, 64), "imagenet": (1000, 3, 224),
}  # fmt: skip


def _recipe(name: str) -> TrainConfig:
    return TrainConfig.from_dict(read_recipe(name), name).validate()


@pytest.mark.parametrize("name", sorted(packaged_recipes()))
def test_the_model_of_a_recipe_takes_its_images_and_the_criterion_its_options(name: str) -> None:
    config = _recipe(name)
    classes, channels, side = _SHAPES[config.data]
    with torch.device("meta"):
        model = build_model(config.model, classes, channels, config.model_args).eval()
        assert model(torch.empty(2, channels, side, side)).shape == (2, classes)
    criterion_options(config)


@pytest.mark.parametrize("name", sorted(name for name in packaged_recipes() if name != "demo"))
def test_a_recipe_says_in_its_name_what_it_is(name: str) -> None:
    config = _recipe(name)
    assert name.startswith(f"{config.data}-") and config.model.startswith(name.removeprefix(f"{config.data}-").split("-")[0])
    assert config.criterion == "grasp" and config.name == name


@pytest.mark.parametrize("data", ["cifar10", "cifar100", "tiny-imagenet"])
@pytest.mark.parametrize(("model", "weight_decay"), [("vgg19", 5e-4), ("resnet32", 1e-4)])
def test_the_papers_protocol(data: str, model: str, weight_decay: float) -> None:
    config = _recipe(f"{data}-{model}-grasp")
    assert (config.batch_size, config.momentum, config.nesterov, config.weight_decay) == (128, 0.9, False, weight_decay)
    assert config.epochs == (300 if data == "tiny-imagenet" else 160)
    rates = [learning_rate(config, epoch / config.epochs) for epoch in range(config.epochs)]
    changes = [epoch for epoch in range(1, config.epochs) if rates[epoch] != rates[epoch - 1]]
    assert changes == [config.epochs // 2, config.epochs * 3 // 4]
    assert [rates[0], rates[changes[0]], rates[changes[1]]] == pytest.approx([0.1, 0.01, 0.001])


@pytest.mark.parametrize(
    ("recipe", "classes", "batches", "each"),
    [("cifar10-vgg19", 10, 1, 10), ("cifar10-resnet32", 10, 1, 10), ("cifar100-vgg19", 100, 1, 10),
     ("cifar100-resnet32", 100, 2, 5), ("tiny-imagenet-vgg19", 200, 10, 1), ("tiny-imagenet-resnet32", 200, 10, 1)],
)  # fmt: skip
def test_the_papers_scoring_batches(recipe: str, classes: int, batches: int, each: int) -> None:
    """So many batches of so many images of every class; batch norms, and the halves of a batch, see what theirs did."""
    config = _recipe(f"{recipe}-grasp")
    assert config.samples_per_class == batches * each and config.score_batch == classes * each
    assert config.criterion_args == {"preset": "paper"}


@pytest.mark.parametrize("model", ["resnet50", "vgg16"])
def test_the_papers_scoring_on_imagenet_takes_its_150_batches_of_250_images_20_at_a_time(model: str) -> None:
    config = _recipe(f"imagenet-{model}-grasp")
    assert config.score_batch == 20 and 1000 * config.samples_per_class == pytest.approx(150 * 250, rel=0.02)
    assert config.criterion_args == {"redraw": "last"}


def test_the_modern_recipe_takes_the_steps_that_torchvision_takes() -> None:
    """What its comment says it has from there: --lr 0.5 --weight-decay 0.00002 --random-erase 0.1 …, 8 GPUs x 128 images."""
    config = _recipe("imagenet-resnet50-modern")
    assert (config.optimizer, config.lr, config.momentum, config.nesterov, config.weight_decay) == ("sgd", 0.5, 0.9, False, 2e-5)
    assert (config.batch_size * config.accumulate, config.warmup * config.epochs) == (8 * 128, 5)
    assert (config.trivial_augment, config.random_erasing, config.image_size) == (True, 0.1, None)


def test_the_modern_recipe_has_what_newer_training_adds() -> None:
    config = _recipe("imagenet-resnet50-modern")
    assert (config.label_smoothing, config.warmup, config.ema_decay) == (0.1, 0.05, 0.9999)
    assert (config.schedule, config.precision) == ("cosine", "bf16")
    rates = [learning_rate(config, step / 1000) for step in range(1001)]
    top = rates.index(max(rates))
    assert top == 50 and rates[top] == config.lr and rates[0] < 0.05 * config.lr and rates[-1] < 1e-3 * config.lr
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[525] == pytest.approx(config.lr / 2)  # half-way down a cosine, not a staircase
    assert loss_function(config).label_smoothing == 0.1 and step_options(config).dtype is torch.bfloat16


@pytest.mark.parametrize("model", ["resnet50", "vgg16"])
def test_the_papers_protocol_on_imagenet_lowers_the_rate_after_30_and_60_of_90_epochs(model: str) -> None:
    config = _recipe(f"imagenet-{model}-grasp")
    assert (config.epochs, config.batch_size, config.lr, config.weight_decay) == (90, 256, 0.1, 1e-4)
    steps = 90 * 5004  # images of ImageNet in batches of 256
    rates = [learning_rate(config, epoch * 5004 / steps) for epoch in (0, 29, 30, 59, 60, 89)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_one_command_trains_what_a_recipe_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of the README, on two classes of ImageNet and an image a side of 32, for one step."""
    write_class_folders(tmp_path / "images", ("train", "val"), ("n01440764", "n01443537"), count=4, suffix="JPEG")
    seen: dict[str, TrainConfig] = {}

    def run(config: TrainConfig, run_dir: Path, *rest: object) -> dict:
        seen["config"] = config
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("grasp_sparse.train.run.start_run", run)
    cli.main(["train", "--recipe", "imagenet-resnet50-grasp", "--sparsity", "0.95", "--data-dir", str(tmp_path / "images")])
    config = seen["config"]
    assert (config.sparsity, config.model, config.data, config.device) == (0.95, "resnet50", "imagenet", "cuda")
    small = {
        "device": "cpu", "image_size": 32, "epochs": 1, "batch_size": 4, "samples_per_class": 2, "score_batch": 2, "workers": 0,
        "timing_rounds": 0, "tensorboard": "off", "plan": "density", "model": "resnet18",
    }  # fmt: skip
    result = start_run(TrainConfig.from_dict({**config.to_dict(), **small}, "test"), tmp_path / "run")
    assert result["pruning"]["weight_sparsity"] == pytest.approx(0.95, abs=1e-3)
    assert result["data"]["name"] == "ImageNet (2 classes)"


def test_options_of_the_criterion_go_when_a_flag_names_another(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[TrainConfig] = []
    monkeypatch.setattr("grasp_sparse.train.run.start_run", lambda config, *rest: seen.append(config) or {})
    for criterion in ("snip", "grasp"):
        cli.main(["train", "--recipe", "cifar10-vgg19-grasp", "--criterion", criterion])  # fails behind the run: there was none
    assert [config.criterion_args for config in seen] == [{}, {"preset": "paper"}]
