"""Micro-batches, precision, clipping, moving averages, AdamW and compiling: each changes what it says and nothing else."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
import several_ranks
import torch
from several_ranks import after_steps, small_config
from torch import nn

import grasp_sparse
from benchmarks.run_states import same
from grasp_sparse import _extension, pruning
from grasp_sparse.masks import MaskSet
from grasp_sparse.planning import Times, cache, layer_times, measure
from grasp_sparse.train.checkpoint import load_checkpoint
from grasp_sparse.train.data_parallel import compiled
from grasp_sparse.train.ema import Ema
from grasp_sparse.train.engine import Trainer
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.optimizer import make_optimizer, restore_optimizer
from grasp_sparse.train.prepare import data_and_model
from grasp_sparse.train.run import resume_run, start_run
from grasp_sparse.train.signals import Interrupted
from grasp_sparse.train.step import StepOptions, step_options, training_step


def _step(model: nn.Module, options: StepOptions, images: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = torch.randn(images, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(images) % 10
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    return training_step(model, optimizer, nn.functional.cross_entropy, x, y, options)


def _net() -> nn.Module:
    torch.manual_seed(0)
    return several_ranks.plain_net(10, 3)


@pytest.mark.parametrize("accumulate", [2, 5, 12])
def test_a_batch_in_parts_is_the_same_step(accumulate: int) -> None:
    """Also in parts of different sizes, of 2 and 3 images for 5."""
    whole, parts = _net(), _net()
    loss, logits = _step(whole, StepOptions())
    loss_of_parts, logits_of_parts = _step(parts, StepOptions(accumulate=accumulate))
    torch.testing.assert_close((loss_of_parts, logits_of_parts), (loss, logits))
    torch.testing.assert_close(list(parts.parameters()), list(whole.parameters()))


def test_clipping_bounds_the_norm_of_all_gradients_together() -> None:
    before, model, free = _net(), _net(), _net()
    _step(free, StepOptions())
    whole = torch.cat([(a - b).flatten() for a, b in zip(free.parameters(), before.parameters())]).norm().item() / 0.1
    _step(model, StepOptions(clip_norm=whole / 4))
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before.parameters())]).norm().item()
    assert moved == pytest.approx(0.1 * whole / 4, rel=1e-3)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_autocast_computes_low_and_keeps_float32_weights(precision: str, dtype: torch.dtype) -> None:
    model, seen = _net(), []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    options = step_options(small_config(precision=precision))
    loss, _ = _step(model, options)
    exact, _ = _step(_net(), StepOptions())
    assert seen == [dtype] and loss.dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert loss.item() == pytest.approx(exact.item(), rel=1e-2) and loss.item() != exact.item()
    assert options.scaler.is_enabled() == (precision == "fp16")


@pytest.mark.skipif(not _extension.status().loaded, reason="without compiled kernels nothing is measured")
@pytest.mark.parametrize(("precision", "inside"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_layers_are_planned_in_the_precision_of_the_run(
    monkeypatch: pytest.MonkeyPatch, precision: str, inside: torch.dtype
) -> None:
    """Between layers activations are what autocast makes of them, and what was measured is remembered under its dtype."""
    given, keys, remember = [], [], cache.remember
    monkeypatch.setattr(cache, "remember", lambda key, *rest: keys.append(key) or remember(key, *rest))
    monkeypatch.setattr(measure, "measure_layer", lambda layer, mask, x, *rest: given.append(x.dtype) or Times(2e-3, 2e-3, 1e-3))
    monkeypatch.setattr(layer_times, "_LONG_LOOK", 0.0)  # nothing is looked at twice
    config = small_config(plan="auto", precision=precision)
    data, model = data_and_model(config)
    several_ranks.sparsify_for_training(config, model, several_ranks.masks_for(config, model, data), data)
    assert Counter(given) == Counter([torch.float32, inside, inside])  # images come as they are
    assert {str(torch.bfloat16) in key for key in keys} == {precision == "bf16"} and not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("choice", [{"plan": "density"}, {"plan": "auto", "max_density": 0.1}], ids=str)
def test_a_speedup_is_searched_among_networks_that_the_run_makes(monkeypatch: pytest.MonkeyPatch, choice: dict) -> None:
    seen = []

    def search(model, masks_at, sparsest, names, batch, speedup, loss_fn, pattern, *made_with):
        seen.append(made_with)
        return MaskSet(masks_at(0.5, dict.fromkeys(names, 1.0)), {"dense_step_s": 2.0, "sparse_step_s": 1.0})

    monkeypatch.setattr(pruning, "time_search", search)
    config = small_config(budget="time", speedup=2.0, sparsity=None, **choice)
    data, model = data_and_model(config)
    several_ranks.masks_for(config, model, data)
    assert seen == [(config.plan, config.max_density)]
    config.precision = "bf16"
    with pytest.raises(UserError, match="Expected --precision fp32 with --budget time, .* got bf16"):
        several_ranks.masks_for(config, model, data)


def test_gradients_that_overflow_float16_skip_the_step_and_lower_the_scale() -> None:
    model, options = _net(), step_options(small_config(precision="fp16"))
    before = [parameter.clone() for parameter in model.parameters()]
    options.scaler._lazy_init_scale_growth_tracker(torch.device("cpu"))
    options.scaler.update(2.0**40)
    _step(model, options)
    assert all(map(torch.equal, before, model.parameters()))
    assert options.scaler.get_scale() < 2.0**40


def _momenta(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [state["momentum_buffer"] for state in optimizer.state.values()]


def _steps(config, scales: tuple[float, ...], restored: bool = False) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A net after as many steps as `scales` for their loss; `restored`: as from a checkpoint written before the first."""
    model, options = _net(), step_options(config)
    optimizer = make_optimizer(config, model)
    if restored:
        restore_optimizer(config, optimizer, {**optimizer.state_dict(), "state": {}})
    options.scaler._lazy_init_scale_growth_tracker(torch.device("cpu"))
    for scale in scales:
        options.scaler.update(scale)
        x, y = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 10
        training_step(model, optimizer, nn.functional.cross_entropy, x, y, options)
    return model, optimizer


@pytest.mark.parametrize("restored", [False, True], ids=["new", "restored"])
def test_a_first_step_whose_gradients_overflow_leaves_no_trace(restored: bool) -> None:
    """Not in the momentum either, where torch's own optimizer then has memory that nobody wrote."""
    config = small_config(precision="fp16")
    model, optimizer = _steps(config, (2.0**40, 1.0), restored)
    other, unaware = _steps(config, (1.0,))
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert all(map(torch.equal, _momenta(optimizer), _momenta(unaware))) and len(_momenta(optimizer)) == len([*model.parameters()])


@pytest.mark.parametrize("nesterov", [False, True], ids=["classical", "nesterov"])
def test_momentum_from_zeros_is_momentum_from_none(nesterov: bool) -> None:
    """Bit for bit, so that runs are what they were with torch's optimizer as it comes."""
    config = small_config(nesterov=nesterov)
    models, x, y = [_net(), _net()], torch.randn(12, 3, 8, 8), torch.arange(12) % 10
    ours = make_optimizer(config, models[0])
    settings = {name: getattr(config, name) for name in ("lr", "momentum", "nesterov", "weight_decay")}
    plain = torch.optim.SGD(models[1].parameters(), **settings, fused=True)
    assert not plain.state and config.momentum > 0
    for _ in range(2):
        for model, optimizer in zip(models, (ours, plain)):
            training_step(model, optimizer, nn.functional.cross_entropy, x, y)
        assert all(map(torch.equal, models[0].parameters(), models[1].parameters()))
        assert all(map(torch.equal, _momenta(ours), _momenta(plain)))


def test_moments_of_adamw_from_zeros_are_those_from_none() -> None:
    config = small_config(optimizer="adamw", lr=1e-3)
    models, x, y = [_net(), _net()], torch.randn(12, 3, 8, 8), torch.arange(12) % 10
    ours = make_optimizer(config, models[0])
    betas = config.momentum, config.beta2
    plain = torch.optim.AdamW(models[1].parameters(), lr=config.lr, betas=betas, weight_decay=config.weight_decay, fused=True)
    assert not plain.state and ours.state
    for _ in range(2):
        for model, optimizer in zip(models, (ours, plain)):
            training_step(model, optimizer, nn.functional.cross_entropy, x, y)
        assert same(models[0].state_dict(), models[1].state_dict()) and same(ours.state_dict()["state"], plain.state_dict()["state"])


@pytest.mark.parametrize("masked", [False, True], ids=["dense", "masked"])
@pytest.mark.parametrize(
    "changes", [{}, {"momentum": 0.0, "nesterov": False}, {"optimizer": "adamw", "lr": 1e-3}], ids=["sgd", "no momentum", "adamw"]
)
def test_a_first_gradient_after_a_resume_is_no_damage(changes: dict, masked: bool) -> None:
    config, states = small_config(**changes), []
    for resumed in (False, True):
        model = _net()
        if masked:
            mask = torch.arange(model[0].weight.numel()).view_as(model[0].weight) % 2 == 0
            grasp_sparse.sparsify_(model, {"0.weight": mask}, max_density=0)
        optimizer = make_optimizer(config, model)
        for late in (False, True):
            if late and resumed:
                saved = optimizer.state_dict()
                optimizer = make_optimizer(config, model)
                restore_optimizer(config, optimizer, saved)
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, 0.5) if late or parameter is not model[7].bias else None
            optimizer.step()
        states.append([model.state_dict(), optimizer.state_dict()["state"]])
    assert same(*states)


@pytest.mark.parametrize(
    "changes",
    [{"precision": "bf16", "clip_norm": 1.0}, {"precision": "fp16", "accumulate": 2},
     {"optimizer": "adamw", "lr": 1e-3, "ema_decay": 0.99}],
    ids=["bf16, clipped", "fp16, accumulated", "adamw, moving average"],
)  # fmt: skip
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path: Path, changes: dict) -> None:
    config = small_config(model="several_ranks:noisy_net", **changes)
    start_run(config, tmp_path / "whole")
    restore = after_steps(4, lambda: several_ranks.signal.raise_signal(several_ranks.signal.SIGINT))
    with pytest.raises(Interrupted):
        start_run(config, tmp_path / "parts")
    restore()
    resume_run(tmp_path / "parts", {"model": config.model})  # code of ours: it has to be named again
    whole, parts = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "parts")
    for part in ("model", "optimizer", "scaler", "ema", "rng"):
        torch.testing.assert_close(whole[part], parts[part], rtol=0, atol=0, msg=lambda text: f"{part}: {text}")
    assert (whole["scaler"] is not None) == ("fp16" in changes.values())
    assert (whole["ema"] is not None) == ("ema_decay" in changes)


def test_a_moving_average_follows_its_formula_and_copies_no_indices() -> None:
    config = small_config(model="several_ranks:noisy_net")
    data, model = data_and_model(config)
    masks = several_ranks.masks_for(config, model, data)
    several_ranks.sparsify_for_training(config, model, masks, data)
    ema = Ema(model, decay=0.5)
    floating = [tensor for tensor in model.state_dict().values() if tensor.is_floating_point()]
    assert sum(average.numel() for average in ema.averages.values()) == sum(tensor.numel() for tensor in floating)
    assert not any("indices" in name for name in ema.averages)
    expected = {name: tensor.clone() for name, tensor in ema.averages.items()}
    for updates in range(1, 10):
        decay = min(0.5, (1 + updates) / (10 + updates))
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.normal_()
                expected[name] = decay * expected[name] + (1 - decay) * tensor
        ema.update(updates)
    torch.testing.assert_close(ema.averages, expected)
    live = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with ema.applied():
        inside = {name: model.state_dict()[name].clone() for name in expected}
    torch.testing.assert_close(inside, expected)
    torch.testing.assert_close(dict(model.state_dict()), live, rtol=0, atol=0)


class _Tied(nn.Module):
    """One weight, under two names, one of which comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Linear(3, 4, bias=False), nn.Linear(3, 4)
        self.head.weight = self.embedding.weight


def test_tied_weights_have_one_average_and_stay_tied() -> None:
    model = _Tied()
    first, ema = model.head.weight.detach().clone(), Ema(model, decay=0.5)
    with torch.no_grad():
        model.head.weight.add_(1)
    ema.update(10)
    expected, live = first + 0.5, model.head.weight.detach().clone()
    assert ema.averages.keys() == model.state_dict().keys()  # an export replaces the weight under each of its names
    torch.testing.assert_close([ema.averages["embedding.weight"], ema.averages["head.weight"]], [expected] * 2)
    for _ in range(2):
        with ema.applied():
            assert model.head.weight is model.embedding.weight
            torch.testing.assert_close(model.head.weight.detach(), expected)
        torch.testing.assert_close(model.head.weight.detach(), live, rtol=0, atol=0)
    other = Ema(model, decay=0.5)
    other.restore(ema.averages)
    with other.applied():
        torch.testing.assert_close(model.head.weight.detach(), expected)
    torch.testing.assert_close(model.head.weight.detach(), live, rtol=0, atol=0)


def test_a_mask_of_minus_infinity_is_no_average() -> None:
    model = nn.Linear(3, 3)
    model.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))
    ema, first, mask = Ema(model, decay=0.5), model.weight.detach().clone(), model.mask.clone()
    for updates in (10, 11):
        with torch.no_grad():
            model.weight.add_(1)
        ema.update(updates)
    assert torch.equal(ema.averages["mask"], mask)
    torch.testing.assert_close(ema.averages["weight"], first + 1.25)
    with ema.applied():
        assert torch.equal(model.mask, mask)
    other = Ema(model, decay=0.5)
    other.restore(ema.averages)
    other.update(12)
    assert torch.equal(other.averages["mask"], mask)


def test_the_moving_average_is_evaluated_beside_the_model_and_saved(tmp_path: Path) -> None:
    start_run(small_config(ema_decay=0.9, epochs=1), tmp_path)
    state = load_checkpoint(tmp_path)
    row = state["position"]["history"][0]
    assert row["ema_loss"] > 0 and row["ema_loss"] != row["test_loss"] and 0 <= row["ema_accuracy"] <= 1
    config = small_config(ema_decay=0.9, epochs=1)
    trainer = _trainer_of(config, state, tmp_path)
    for name, tensor in trainer.model.state_dict().items():
        if name in state["ema"]:
            tensor.copy_(state["ema"][name])
    assert trainer._evaluate(lambda: False)["test_loss"] == row["ema_loss"]


def _trainer_of(config, state: dict, folder: Path) -> Trainer:
    data, model = data_and_model(config)
    several_ranks.grasp_sparse.load_sparse(model, state["model"])
    trainer = Trainer(config, model, data, folder, {})
    trainer.restore(state)
    return trainer


@pytest.mark.parametrize("damage", ["shape", "name", "missing"])
def test_an_average_that_does_not_fit_is_refused(tmp_path: Path, damage: str) -> None:
    config = small_config(ema_decay=0.9, epochs=1)
    start_run(config, tmp_path)
    state = load_checkpoint(tmp_path)
    name = next(iter(state["ema"]))
    if damage == "shape":
        state["ema"][name] = torch.zeros(1)
    elif damage == "name":
        state["ema"]["another"] = state["ema"].pop(name)
    else:
        state["ema"] = None
    with pytest.raises(UserError, match="Expected .*ema"):
        _trainer_of(config, state, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"), [("exp_avg", torch.zeros(1)), ("exp_avg_sq", None), ("step", torch.zeros(2)), ("step", "two")]
)
def test_moments_of_adamw_that_do_not_fit_are_refused(tmp_path: Path, name: str, value: object) -> None:
    config = small_config(optimizer="adamw", lr=1e-3, epochs=1)
    start_run(config, tmp_path)
    state = load_checkpoint(tmp_path)
    if value is None:
        del state["optimizer"]["state"][0][name]
    else:
        state["optimizer"]["state"][0][name] = value
    with pytest.raises((UserError, AttributeError, TypeError, ValueError)):  # resume_run makes one line of each
        _trainer_of(config, state, tmp_path)


def test_adamw_takes_its_betas_from_the_recipe() -> None:
    optimizer = make_optimizer(small_config(optimizer="adamw", momentum=0.8, beta2=0.95), _net())
    assert isinstance(optimizer, torch.optim.AdamW) and optimizer.param_groups[0]["betas"] == (0.8, 0.95)


def test_compiling_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"Expected a C\+\+ compiler for --compile, found none"):
        compiled(small_config(compile=True), _net())
    assert compiled(small_config(), net := _net()) is net


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"compile": True}, "false on the CPU"), ({"device": "cuda"}, "false without --compile"),
     ({"device": "cuda", "compile": True, "accumulate": 2}, "false with --accumulate above 1")],
)  # fmt: skip
def test_graphs_are_refused_where_there_can_be_none(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=f"Expected cuda_graphs: {message}"):
        small_config(cuda_graphs=True, **changes).validate()
    small_config(cuda_graphs=True, device="cuda", compile=True).validate()


@pytest.mark.slow
def test_a_compiled_run_is_the_run(tmp_path: Path) -> None:
    for name, compile in (("plain", False), ("compiled", True)):
        start_run(small_config(epochs=1, compile=compile), tmp_path / name)
    plain, other = (load_checkpoint(tmp_path / name) for name in ("plain", "compiled"))
    assert plain["model"].keys() == other["model"].keys()
    torch.testing.assert_close(dict(other["model"]), dict(plain["model"]), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "not fused"])
def test_a_loss_that_is_not_finite_moves_nothing(fused: bool) -> None:
    """Complex parameters, for one, have no fused optimizer."""
    x, y = torch.randn(4, 3, 8, 8), torch.arange(4)
    for factor, moves in ((float("inf"), False), (1.0, True)):
        model = _net()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused)
        training_step(model, optimizer, lambda a, b: factor * nn.functional.cross_entropy(a, b), x, y)
        assert all(torch.equal(old, new) for old, new in zip(before, model.parameters())) != moves
