"""Recipes and values: what wins over what, and mistakes that are named before anything runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from grasp_sparse.train.config import TrainConfig, packaged_recipes, read_recipe
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.resume import resumed_config
from grasp_sparse.train.schedule import learning_rate, training_progress


@pytest.mark.parametrize("name", sorted(packaged_recipes()))
def test_every_packaged_recipe_is_valid(name: str) -> None:
    TrainConfig.from_dict(read_recipe(name), name).validate()


def test_the_demo_recipe_is_what_the_demo_promises() -> None:
    config = TrainConfig.from_dict(read_recipe("demo"), "demo")
    assert (config.name, config.criterion, config.budget, config.sparsity, config.data) == (
        "demo", "grasp", "flops", 0.98, "fashion-mnist",
    )
    assert config.max_seconds is not None and config.max_seconds <= 240


def test_a_recipe_file_is_read_and_named_after_itself(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('lr = 1\nmilestones = [0.3, 0.6]\nmodel_args = {widths = [8]}\n')
    config = TrainConfig.from_dict(read_recipe(str(tmp_path / "mine.toml")), "mine")
    assert (config.name, config.lr, config.milestones, config.model_args) == ("mine", 1.0, [0.3, 0.6], {"widths": [8]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparsty = 0.9", "unknown key 'sparsty'.*did you mean sparsity"),
        ("zzz = 1", "unknown key 'zzz'.*valid keys: name, data"),
        ("epochs = 'ten'", "Expected epochs in .* to be int, got 'ten'"),
        ("epochs = 2.5", "Expected epochs in .* to be int"),
        ("nesterov = 1", "Expected nesterov in .* to be bool"),
        ("budget = 'steps'", "Expected budget in .* to be one of weights, flops, time"),
        ("epochs = ", "not valid TOML"),
        ("milestones = ['a']", "Expected every element of milestones in .* to be float, got 'a'"),
        ("include = [1]", "Expected every element of include in .* to be str, got 1"),
    ],
)
def test_a_wrong_recipe_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        TrainConfig.from_dict(read_recipe(str(path)), "bad.toml")


def test_a_field_without_a_value_is_refused_unless_that_is_its_default() -> None:
    assert TrainConfig.from_dict({"threads": None}, "test").threads is None
    with pytest.raises(UserError, match="Expected epochs in test to be int, got None"):
        TrainConfig.from_dict({"epochs": None}, "test")


def test_a_recipe_that_is_not_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\x80\xff")
    with pytest.raises(UserError, match="Expected recipe .*binary.toml to be a TOML file"):
        read_recipe(str(path))


def test_an_unknown_recipe_names_the_packaged_ones() -> None:
    with pytest.raises(UserError, match="one of: .*demo"):
        read_recipe("no-such-recipe")


@pytest.mark.parametrize(
    ("field", "value"),
    [("sparsity", 1.0), ("sparsity", -0.1), ("epochs", 0), ("batch_size", 0), ("lr", 0.0), ("momentum", 1.0), ("warmup", 1.0),
     ("label_smoothing", 1.0), ("max_seconds", 0.0), ("threads", 0), ("milestones", [1.5]), ("timing_rounds", 1),
     ("min_density", 2.0), ("threads", 1_000_000), ("seed", 10**20), ("seed", -(2**63) - 1), ("image_size", 100_000), ("max_density", 0.0),
     ("momentum", 0.0), ("sparsity", float("nan")), ("lr", float("inf")), ("weight_decay", float("inf")), ("device", "meta"),
     ("device", "cuda:")],
)  # fmt: skip
def test_a_value_out_of_range_is_named(field: str, value: object) -> None:
    with pytest.raises(UserError, match="Expected (nesterov|" + field + ")"):
        dataclasses.replace(TrainConfig(), **{field: value}).validate()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"pattern": "zebra"}, "Expected pattern to be one of unstructured, block"),
        ({"pattern": "block(8)"}, "written block"),
        ({"pattern": "nm(2, 4)", "sparsity": 0.95}, "Expected sparsity 0.5, which pattern nm"),
    ],
)
def test_a_pattern_that_is_none_or_fixes_another_sparsity_is_refused(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(TrainConfig(), **values).validate()


@pytest.mark.parametrize("values", [{"pattern": "nm(2, 4)"}, {"pattern": "nm(2, 4)", "sparsity": 0.5}, {"pattern": "block(8, 4)"}])
def test_a_pattern_can_be_written(values: dict) -> None:
    assert TrainConfig.from_dict(values, "test").validate().pattern == values["pattern"]


def test_config_survives_a_round_trip_through_plain_values() -> None:
    config = TrainConfig(model_args={"widths": [4]}, milestones=[0.2], data_dir="x")
    assert TrainConfig.from_dict(config.to_dict(), "test") == config


def test_cosine_climbs_then_falls_to_zero() -> None:
    config = TrainConfig(lr=0.4, warmup=0.1)
    assert [learning_rate(config, p) for p in (0.0, 0.05, 0.1, 0.55, 1.0)] == pytest.approx([0.0, 0.2, 0.4, 0.2, 0.0])


def test_step_divides_by_ten_at_each_milestone() -> None:
    config = TrainConfig(lr=1.0, schedule="step")
    assert [learning_rate(config, p) for p in (0.0, 0.49, 0.5, 0.75, 1.0)] == pytest.approx([1, 1, 0.1, 0.01, 0.01])


def test_progress_is_by_steps_unless_a_time_limit_ends_sooner() -> None:
    assert training_progress(TrainConfig(), 30, 100, seconds=1e9) == 0.3
    limited = TrainConfig(max_seconds=60)
    assert training_progress(limited, 30, 100, seconds=6) == 0.3
    assert training_progress(limited, 30, 100, seconds=45) == 0.75
    assert training_progress(limited, 30, 100, seconds=90) == 1.0


def test_a_run_goes_on_with_another_gpu_and_not_with_a_cpu() -> None:
    config = TrainConfig(device="cuda:1")
    state = {"recipe": config.to_dict(), "config": config.to_dict()}
    assert resumed_config(state, {"device": "cuda:0"}, Path("run/x.pt")).device == "cuda:0"
    assert resumed_config(state, {}, Path("run/x.pt")).device == "cuda:1"
    with pytest.raises(UserError, match="got another --device cpu .the run: cuda:1."):
        resumed_config(state, {"device": "cpu"}, Path("run/x.pt"))
