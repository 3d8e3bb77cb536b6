"""Several ranks are one run: the masks, the steps and the bits that one process has, and no byte more between them than needed."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import several_ranks
import torch
from several_ranks import CRITERIA, RANKS, small_config
from torch import nn
from torch.utils.checkpoint import checkpoint

from benchmarks.run_states import same
from grasp_sparse.train import data_parallel, prepare
from grasp_sparse.train.checkpoint import load_checkpoint
from grasp_sparse.train.checkpoint_files import list_checkpoints
from grasp_sparse.train.data_parallel import synchronize_norms, without_peers
from grasp_sparse.train.distributed import Ranks
from grasp_sparse.train.errors import UserError
from grasp_sparse.train.run import resume_run, start_run
from grasp_sparse.train.sharding import rate_advice, regrouped, step_in_words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks left what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    several_ranks.start_ranks(folder)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    """What each rank found."""
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(RANKS)]


def _differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> int:
    assert a.keys() == b.keys()
    return sum(int((a[name] != b[name]).sum()) for name in a)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_rank_has_the_masks_of_one_process(found: list[dict], criterion: str) -> None:
    masks = [rank["masks"][criterion] for rank in found]
    assert all(same(other, masks[0]) for other in masks)
    # sums are taken in another order: weights on the verge may change places
    assert _differing(masks[0], several_ranks.masks_by(criterion=criterion)) <= 2


@pytest.mark.parametrize(
    ("case", "changes"),
    [("fewer micro-batches than ranks", {"score_batch": 10}), ("budget flops", {"budget": "flops"})],
    ids=["fewer micro-batches than ranks", "budget flops"],
)
def test_ranks_without_images_or_with_another_budget_too(found: list[dict], case: str, changes: dict) -> None:
    masks = [rank["masks"][case] for rank in found]
    assert all(same(other, masks[0]) for other in masks)
    assert _differing(masks[0], several_ranks.masks_by(**changes)) <= 2


def test_one_rank_measures_a_speedup_for_all(found: list[dict]) -> None:
    assert [rank["speedup"][1] for rank in found] == [1, 0, 0]
    masks = [rank["speedup"][0] for rank in found]
    assert all(same(other, masks[0]) for other in masks) and 0 < sum(int(mask.sum()) for mask in masks[0].values())


def test_micro_batches_cross_the_ranks_once_a_step(folder: Path, found: list[dict]) -> None:
    scale = found[0]["accumulated"]
    assert scale["images_per_step"] == 8 * RANKS
    assert scale["reduced_bytes"] == 4 * (scale["values"] + scale["dense_parameters"])
    whole, parts = load_checkpoint(folder / "plain"), load_checkpoint(folder / "accumulated")
    for name, tensor in whole["model"].items():
        torch.testing.assert_close(parts["model"][name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")


def test_layers_run_as_rank_0_measured(found: list[dict]) -> None:
    plans = [rank["plan"] for rank in found]
    assert set(plans[0]) == {"sparse"} and all(other == plans[0] for other in plans)


def test_other_masks_on_a_rank_stop_all(found: list[dict]) -> None:
    said = "UserError: Expected the same masks and layers on all ranks, got others than rank 0's on rank 2; "
    assert all(rank["other masks"].startswith(said) for rank in found)


def test_other_data_on_a_rank_stop_all(found: list[dict]) -> None:
    said = (
        "UserError: Expected the same data on all ranks, got other images, names or classes than rank 0's on rank 2 (rank 0: 96 + 20 "
        "images from generated; rank 2: 96 + 19 images from generated); "
    )
    assert all(rank["other data"].startswith(said) for rank in found)


def test_what_fails_on_rank_0_fails_everywhere_and_is_said_once(found: list[dict]) -> None:
    reason = "UserError: no such thing"
    assert [rank["main fails"] for rank in found] == [reason] + [f"MainFailed: rank 0 failed: {reason}"] * 2


def test_ranks_wait_for_rank_0_longer_than_for_one_another(found: list[dict]) -> None:
    """Scoring for a speedup and timing steps at the end take rank 0 alone as long as they take."""
    assert [rank["main takes long"] for rank in found] == [""] * RANKS


def test_indices_do_not_travel_with_each_forward_pass(found: list[dict]) -> None:
    """Rank 0's would be on the last rank otherwise, at a cost of 4 bytes for every kept weight."""
    assert [rank["index kept"] for rank in found] == [True] * RANKS


def test_images_that_cannot_be_read_are_counted_over_all_ranks(folder: Path, found: list[dict]) -> None:
    """Each rank has met one of them."""
    names = sorted(f"val/a/{number}.png" for number in several_ranks.CORRUPT)
    assert [rank["corrupt"] for rank in found] == [names] * RANKS
    state = load_checkpoint(folder / "corrupt")
    assert state["corrupt_files"] == names
    assert [row["corrupt_images"] for row in state["position"]["history"]] == [RANKS]
    said = [rank["too many corrupt"] for rank in found]
    assert said[0].startswith("UserError: Expected at most 2 corrupt images, got 3, ") and "--max-corrupt" in said[0]
    assert said[1:] == ["MainFailed: too many corrupt images"] * 2


def test_images_that_cannot_be_trained_on_are_counted_over_all_ranks_too(folder: Path, found: list[dict]) -> None:
    names = sorted(f"train/a/{number}.png" for number in several_ranks.CORRUPT_IN_TRAINING)
    assert [rank["corrupt in training"] for rank in found] == [names] * RANKS
    state = load_checkpoint(folder / "corrupt in training")
    assert state["corrupt_files"] == names and [row["corrupt_images"] for row in state["position"]["history"]] == [RANKS]


def test_layers_that_run_masked_send_the_gradient_of_their_dense_weight(folder: Path, found: list[dict]) -> None:
    model = load_checkpoint(folder / "some masked")["model"]
    stored = {name: model[f"{name}.mask" if f"{name}.mask" in model else f"{name}.values"].numel() for name in ("0", "3", "7")}
    masked = [name for name in stored if f"{name}.mask" in model]
    assert 0 < len(masked) < 3
    values = sum(stored[name] for name in stored if name not in masked)
    dense = sum(stored[name] for name in masked) + sum(model[f"{name}.bias"].numel() for name in stored)
    scale = found[0]["some masked"]
    assert (scale["values"], scale["dense_parameters"], scale["reduced_bytes"]) == (values, dense, 4 * (values + dense))


def test_gradients_are_clipped_by_the_norm_of_all_ranks_together(folder: Path, tmp_path: Path) -> None:
    start_run(small_config(batch_size=8 * RANKS, clip_norm=several_ranks.CLIPPED), tmp_path)
    clipped, alone, free = (load_checkpoint(path)["model"] for path in (folder / "clipped", tmp_path, folder / "plain"))
    for name, tensor in alone.items():
        torch.testing.assert_close(clipped[name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")
    assert any(not torch.allclose(clipped[name], free[name], rtol=1e-2) for name in alone)


@pytest.mark.parametrize("users", [0, 1])
def test_a_parameter_without_a_gradient_on_some_rank_stops_all_before_the_first_update(
    folder: Path, found: list[dict], users: int
) -> None:
    said = [rank[f"spare layer of {users}"] for rank in found]
    assert said[0].startswith("UserError: Expected every trained parameter to have a part in the loss, got none for 8.weight, ")
    assert said[1:] == ["MainFailed: parameters without a gradient: 8.weight"] * (RANKS - 1)
    assert not list_checkpoints(folder / f"spare {users}")


def test_parameters_that_all_ranks_use_are_no_reason_to_stop(found: list[dict]) -> None:
    assert [rank[f"spare layer of {RANKS}"] for rank in found] == [""] * RANKS


def test_what_a_reentrant_checkpoint_holds_is_not_looked_for() -> None:
    net, x = several_ranks.plain_net(10, 3), torch.randn(2, 3, 8, 8, requires_grad=True)
    spare = nn.ModuleList([net, nn.Linear(2, 2)])
    assert data_parallel._unreached(spare, net(x).sum()) == ["1.weight", "1.bias"]
    assert data_parallel._unreached(spare, checkpoint(net, x, use_reentrant=False).sum()) == ["1.weight", "1.bias"]
    assert data_parallel._unreached(spare, checkpoint(net, x, use_reentrant=True).sum()) == []


def test_drawing_batches_from_batches_cannot_be_shared(found: list[dict]) -> None:
    said = "UserError: Expected no num_batches in criterion_args on several ranks"
    assert all(rank["batches of the criterion"].startswith(said) for rank in found)


def test_resumed_equals_uninterrupted_bit_for_bit_on_three_ranks(folder: Path) -> None:
    whole, parts = load_checkpoint(folder / "whole"), load_checkpoint(folder / "parts")
    for part in ("config", "model", "optimizer", "rng", "ema", "pruning"):
        assert same(whole[part], parts[part]), part
    assert len(whole["rng"]) == RANKS and not same(whole["rng"][0], whole["rng"][1])
    unclocked = [
        [{k: v for k, v in row.items() if "seconds" not in k and "_per_s" not in k} for row in state["position"]["history"]]
        for state in (whole, parts)
    ]
    assert unclocked[0] == unclocked[1]


def test_a_run_of_three_ranks_goes_on_in_one_process(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    several_ranks.copy_files(folder / "to go on alone", tmp_path / "alone")
    result = resume_run(tmp_path / "alone", {"model": small_config().model})
    assert "1 rank x batch 8 x 3 micro-batches = 24 images a step as with 3 before, not to the same bits" in capsys.readouterr().out
    assert result["scale"]["images_per_step"] == 8 * RANKS
    alone, together = load_checkpoint(tmp_path / "alone"), load_checkpoint(folder / "plain")
    for name, tensor in together["model"].items():
        torch.testing.assert_close(alone["model"][name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize(
    ("saved", "size", "batch_size", "accumulate"),
    [(2, 1, 16, 2), (1, 2, 8, 1), (4, 2, 16, 2), (2, 4, 8, 1), (3, 4, 12, 1), (2, 2, 16, 1)],
)
def test_another_number_of_ranks_keeps_the_images_of_a_step(saved: int, size: int, batch_size: int, accumulate: int) -> None:
    recipe = small_config(batch_size=16)
    config = regrouped(recipe, recipe, saved, Ranks(size=size))
    assert (config.batch_size, config.accumulate) == (batch_size, accumulate)
    assert config.batch_size * config.accumulate * size == 16 * saved


def test_the_first_line_says_how_many_images_a_step_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start_run(small_config(epochs=1, accumulate=2), tmp_path)
    assert capsys.readouterr().out.splitlines()[0].endswith(", 1 rank x batch 8 x 2 micro-batches = 16 images a step")
    resume_run(tmp_path, {"model": small_config().model})
    assert capsys.readouterr().out.splitlines()[0] == "1 rank x batch 8 x 2 micro-batches = 16 images a step"
    assert step_in_words(256, 1, 8) == "8 ranks x batch 256 x 1 micro-batch = 2,048 images a step"


@pytest.mark.parametrize(
    ("size", "changes", "ways"),
    [(8, {}, "--batch-size 32 --accumulate 1 for the same step, or --lr 0.8 with some --warmup"),
     (8, {"warmup": 0.1}, "--batch-size 32 --accumulate 1 for the same step, or --lr 0.8"), (3, {}, "--lr 0.3 with some --warmup"),
     (4, {"optimizer": "adamw"}, "--batch-size 64 --accumulate 1 for the same step, or --lr 0.2 with some --warmup"),
     (1, {"batch_size": 64}, "--batch-size 256 --accumulate 1 for the same step, or --lr 0.025"),
     (8, {"batch_size": 32}, None), (1, {"batch_size": 128, "accumulate": 2}, None), (8, {"lr": 0.8}, None)],
)  # fmt: skip
def test_a_rate_meant_for_another_step_is_not_passed_over(size: int, changes: dict, ways: str | None) -> None:
    recipe = small_config(batch_size=256, lr=0.1)
    advice = rate_advice(dataclasses.replace(recipe, **changes), recipe, Ranks(size=size))
    assert (advice is None) == (ways is None)
    assert advice is None or advice.endswith(f" if its learning rate of 0.1 is for those, give {ways}")


def test_ranks_that_cannot_share_a_step_are_refused() -> None:
    recipe = small_config(batch_size=16)
    with pytest.raises(UserError, match="Expected a number of ranks that divides the 32 images of a step, got 3; the run had 2"):
        regrouped(recipe, recipe, 2, Ranks(size=3))


def test_ranks_that_come_back_have_the_batch_of_the_recipe_again() -> None:
    """Nothing but the number of ranks decides, however many times it changes: no micro-batches are left over."""
    recipe = config = small_config(batch_size=16)
    for saved, size in ((2, 4), (4, 1), (1, 8), (8, 2)):
        config = regrouped(config, recipe, saved, Ranks(size=size))
        assert config.batch_size <= recipe.batch_size
    assert config == recipe


def test_graphs_are_off_while_there_are_micro_batches() -> None:
    recipe = small_config(batch_size=16, device="cuda", compile=True, cuda_graphs=True)
    alone = regrouped(recipe, recipe, 2, Ranks(size=1))
    assert (alone.accumulate, alone.cuda_graphs) == (2, False) and alone.validate()
    assert regrouped(recipe, recipe, 2, Ranks(size=4)).cuda_graphs
    assert regrouped(alone, recipe, 1, Ranks(size=2)) == recipe


def test_what_comes_of_regrouping_is_validated() -> None:
    """A recipe of anybody's, in a checkpoint, may say what the settings beside it do not."""
    with pytest.raises(UserError, match="Expected cuda_graphs: false on the CPU"):
        regrouped(small_config(), small_config(cuda_graphs=True), 2, Ranks(size=4))


_FLAGS = [
    "--data", "fake", "--image-size", "8", "--train-limit", "96", "--test-limit", "20", "--epochs", "2", "--lr", "0.05",
    "--sparsity", "0.7", "--samples-per-class", "2", "--score-batch", "5", "--timing-rounds", "0", "--plan", "density",
    "--tensorboard", "off", "--model", "several_ranks:plain_net", "--batch-size", "8",
]  # fmt: skip


def _torchrun(*agents: list[str], out: Path, more: Sequence[str] = (), environment: Mapping[str, str] = {}) -> str:
    """Train into the folder `out` by an agent of torchrun for each of these lists of flags; what they said on stdout.

    `more`: flags of the training that take the place of those above; `environment` is added for all.
    """
    command = [sys.executable, "-m", "torch.distributed.run"]
    processes = [
        subprocess.Popen(
            [*command, *flags, "-m", "grasp_sparse", "train", *_FLAGS, *more, "--out", str(out)], text=True,
            env={**os.environ, **several_ranks.python_path(), **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for flags in agents
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(errors for _, errors in said)
    return "".join(output for output, _ in said)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run by torchrun on two ranks of one machine: its folder, and what was said."""
    folder = tmp_path_factory.mktemp("torchrun") / "two"
    return folder, _torchrun(["--standalone", "--nproc-per-node", "2"], out=folder)


def test_two_machines_train_what_two_ranks_of_one_do(two_ranks: tuple[Path, str], tmp_path: Path) -> None:
    """Two agents with a rank each, which both have the local rank 0, started as the README says."""
    endpoint = f"127.0.0.1:{several_ranks.free_port()}"
    agent = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    said = _torchrun(agent, agent, out=tmp_path / "run")
    assert said.count("epoch   1/2") == 1  # by one rank of both machines
    apart, together = load_checkpoint(tmp_path / "run"), load_checkpoint(two_ranks[0])
    for part in ("model", "optimizer", "rng", "masks_digest"):
        assert same(apart[part], together[part]), part
    assert len(apart["rng"]) == 2 and apart["position"]["finished"]


def test_torchrun_does_the_steps_of_one_process_and_reduces_only_what_is_trained(
    two_ranks: tuple[Path, str], tmp_path: Path
) -> None:
    folder, said = two_ranks
    assert said.count("epoch   1/2") == 1  # said by one rank
    assert said.splitlines()[0].endswith(", 2 ranks x batch 8 x 1 micro-batch = 16 images a step")
    config = small_config(batch_size=16)
    results = [json.loads((folder / "result.json").read_text()), start_run(config, tmp_path / "one")]
    results.append(start_run(small_config(accumulate=2), tmp_path / "accumulated"))
    assert [result["scale"]["images_per_step"] for result in results] == [16] * 3

    states = [load_checkpoint(path) for path in (folder, tmp_path / "one", tmp_path / "accumulated")]
    for state in states[1:]:
        for name, tensor in states[0]["model"].items():
            torch.testing.assert_close(state["model"][name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")
        for mine, other in zip(states[0]["position"]["history"], state["position"]["history"], strict=True):
            assert (mine["train_accuracy"], mine["test_accuracy"]) == (other["train_accuracy"], other["test_accuracy"])
            assert mine["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)

    model = states[0]["model"]
    values = sum(tensor.numel() for name, tensor in model.items() if name.endswith("values"))
    dense = sum(tensor.numel() for name, tensor in model.items() if name.endswith(("weight", "bias")))
    scale = results[0]["scale"]
    assert values > 0 and (scale["values"], scale["dense_parameters"]) == (values, dense)
    assert [row["reduced_bytes"] for row in states[0]["position"]["history"]] == [4 * (values + dense)] * 2
    assert f"{4 * (values + dense):,} bytes all-reduced a step" in said
    assert states[1]["position"]["history"][0]["reduced_bytes"] == 0


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX") or "g++"), reason="--compile needs a C++ compiler")
def test_compiled_ranks_do_the_steps_of_others_and_reduce_once_a_step(two_ranks: tuple[Path, str], tmp_path: Path) -> None:
    """In micro-batches: gradients of the first one must not cross, nor those of the last be left at home."""
    more, kernels = ["--compile", "--batch-size", "4", "--accumulate", "2"], tmp_path / "kernels"
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(kernels), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    _torchrun(["--standalone", "--nproc-per-node", "2"], out=tmp_path / "run", more=more, environment=environment)
    assert any(kernels.rglob("*.so"))  # it was compiled
    compiled, plain = load_checkpoint(tmp_path / "run"), load_checkpoint(two_ranks[0])
    assert compiled["model"].keys() == plain["model"].keys()
    for name, tensor in plain["model"].items():
        torch.testing.assert_close(compiled["model"][name], tensor, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")
    reduced = [[row["reduced_bytes"] for row in state["position"]["history"]] for state in (compiled, plain)]
    assert reduced[0] == reduced[1] and reduced[1][0] > 0


def test_a_finished_run_that_is_taken_up_by_others_tells_who_trained_it(two_ranks: tuple[Path, str], tmp_path: Path) -> None:
    folder = shutil.copytree(two_ranks[0], tmp_path / "run")
    before = json.loads((folder / "result.json").read_text())
    assert before["scale"]["ranks"] == 2
    after = resume_run(folder, {"model": before["config"]["model"]})
    assert all(after[name] == before[name] for name in ("config", "scale", "training"))


@pytest.mark.parametrize(("device", "current"), [("cuda:1", [torch.device("cuda:1")]), ("cuda", []), ("cpu", [])])
def test_a_chosen_gpu_is_the_current_one_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, device: str, current: list[torch.device]
) -> None:
    done: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", lambda *_, **__: None)  # as if the device were there
        patch.setattr(torch.cuda, "set_device", done.append)
        patch.setattr(prepare, "load_data", lambda config: done.append("data"))
        patch.setattr(prepare, "check_same_data", lambda data: None)
        patch.setattr(prepare, "fresh_model", lambda *_: done.append("model") or sys.exit())
        with pytest.raises(SystemExit):
            prepare.data_and_model(small_config(device=device))
    assert done == [*current, "data", "model"]


def test_synchronized_norms_are_refused_on_the_cpu() -> None:
    with pytest.raises(UserError, match="Expected sync_batchnorm: false on the CPU"):
        small_config(sync_batchnorm=True).validate()
    assert small_config(sync_batchnorm=True, device="cuda").validate()


def test_a_copy_without_peers_normalises_as_batch_norm_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("grasp_sparse.train.data_parallel.current_ranks", lambda: Ranks(size=2))
    torch.manual_seed(0)
    model, x = several_ranks.noisy_net(10, 3)[:3], torch.randn(4, 3, 8, 8)
    synchronized = synchronize_norms(small_config(sync_batchnorm=True, device="cuda"), several_ranks.noisy_net(10, 3)[:3])
    synchronized.load_state_dict(model.state_dict())
    assert isinstance(synchronized[1], nn.SyncBatchNorm)
    torch.testing.assert_close(without_peers(synchronized).train()(x), model.train()(x))
    assert isinstance(synchronized[1], nn.SyncBatchNorm)
