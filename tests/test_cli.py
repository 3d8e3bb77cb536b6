"""The command line as a person meets it: exit codes, one line for a mistake, and a last line for programs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import grasp_sparse as gs
from grasp_sparse import _extension, cli, pruning
from grasp_sparse.flags import make_parser
from grasp_sparse.masks import MaskSet
from grasp_sparse.train.checkpoint import load_checkpoint, save_checkpoint
from grasp_sparse.train.checkpoint_files import checkpoint_name, has_run

_SMALL = [
    "--data", "fake", "--image-size", "8", "--train-limit", "64", "--test-limit", "20", "--model-arg", "widths=[16]",
    "--model-arg", "depth=1", "--samples-per-class", "2", "--sparsity", "0.8", "--batch-size", "16", "--epochs", "1",
    "--plan", "density", "--tensorboard", "off",
]  # fmt: skip

_SCORING = _SMALL[: _SMALL.index("--batch-size")]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def _exit_code(*arguments: str) -> int:
    try:
        return cli.main(list(arguments))
    except SystemExit as stop:  # argparse
        return stop.code


def test_train_prints_results_and_ends_with_a_line_for_programs(capsys: pytest.CaptureFixture) -> None:
    assert _exit_code("train", *_SMALL, "--name", "demo", "--budget", "flops", "--timing-rounds", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    number = r"\d+(\.\d+)?"
    keys = "accuracy weight_sparsity flop_sparsity dense_step_s sparse_step_s dense_bytes sparse_bytes".split()
    assert re.fullmatch("demo: " + " ".join(f"{key}={number}" for key in keys), lines[-1])
    values = dict(pair.split("=") for pair in lines[-1].removeprefix("demo: ").split())
    assert float(values["flop_sparsity"]) >= 0.8 and int(values["sparse_bytes"]) < int(values["dense_bytes"])
    for name in (checkpoint_name(1, 0), "masks.safetensors", "log.jsonl", "result.json", "report.html"):
        assert Path("runs/demo", name).stat().st_size > 0
    text = "\n".join(lines)
    assert "runs/demo/report.html" in text and f"runs/demo/{checkpoint_name(1, 0)}" in text and "best dense" in text
    assert not torch.tensor([1e-40]).mul(1.0).any()  # denormals count as zero


def test_memory_is_told_where_no_step_is_timed(capsys: pytest.CaptureFixture) -> None:
    assert _exit_code("train", *_SMALL, "--timing-rounds", "0") == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"train: accuracy=\S+ weight_sparsity=\S+ flop_sparsity=\S+ dense_bytes=\d+ sparse_bytes=\d+", lines[-1])
    assert any(line.startswith("bytes kept") for line in lines) and not any(line.startswith("seconds a training step") for line in lines)


def test_flags_win_over_the_recipe(capsys: pytest.CaptureFixture) -> None:
    Path("mine.toml").write_text('data = "fake"\nepochs = 7\nlr = 0.25\nexclude = ["classifier"]\n')
    assert _exit_code("train", "--recipe", "mine.toml", *_SMALL, "--timing-rounds", "0", "--no-nesterov") == 0
    assert "warning: a step has 16 images, and 128 in the recipe as it is" in capsys.readouterr().err
    config = json.loads(Path("runs/mine/result.json").read_text())["config"]
    assert (config["epochs"], config["lr"], config["nesterov"], config["exclude"]) == (1, 0.25, False, ["classifier"])
    assert (config["model_args"], config["name"]) == ({"widths": [16], "depth": 1}, "mine")
    assert _exit_code("train", "--recipe", "mine.toml", *_SMALL, "--timing-rounds", "0", "--lr", "0.25", "--out", "other") == 0
    assert "a step has" not in capsys.readouterr().err


def _values(*flags: str) -> tuple[dict, dict]:
    """(model_args, criterion_args) of training by mine.toml with these flags."""
    config = cli._config(make_parser().parse_args(["train", "--recipe", "mine.toml", *flags]))
    return config.model_args, config.criterion_args


@pytest.mark.parametrize("named", ['model = "vgg_small"\ncriterion = "grasp"\n', ""], ids=["named", "by default"])
def test_arguments_of_a_recipe_stay_with_its_model_and_criterion(named: str) -> None:
    Path("mine.toml").write_text(named + "model_args = {stem = 8, depth = 1}\ncriterion_args = {temperature = 150, redraw = 'all'}\n")
    of_recipe = {"stem": 8, "depth": 1}, {"temperature": 150, "redraw": "all"}
    assert _values() == _values("--criterion", "grasp", "--model", "vgg_small") == of_recipe
    changed = {"stem": 8, "depth": 2}, {"temperature": 200, "redraw": "all"}
    assert _values("--model-arg", "depth=2", "--criterion-arg", "temperature=200") == changed
    assert _values("--model", "resnet32", "--criterion", "snip") == ({}, {})
    assert _values("--model", "resnet32", "--model-arg", "width=2") == ({"width": 2}, of_recipe[1])


def test_dense_training_prunes_nothing(capsys: pytest.CaptureFixture) -> None:
    assert _exit_code("train", *_SMALL, "--dense", "--timing-rounds", "2") == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"train: accuracy=\S+ dense_step_s=\S+ dense_bytes=\d+", last)
    assert not Path("runs/train/masks.safetensors").exists()


def test_prune_saves_masks_that_train_accepts(capsys: pytest.CaptureFixture) -> None:
    flags = _SMALL[: _SMALL.index("--batch-size")]
    assert _exit_code("prune", *flags, "--criterion", "snip", "--out", "deep/masks.safetensors") == 0
    assert "all" in capsys.readouterr().out
    assert MaskSet.load("deep/masks.safetensors").sparsity == pytest.approx(0.8, abs=0.002)
    assert _exit_code("train", *_SMALL, "--masks", "deep/masks.safetensors", "--timing-rounds", "0") == 0


@pytest.mark.parametrize(
    ("pattern", "blocks"), [("block(4, 4)", (4, 4)), ("vector(4)", None), ("nm(1, 2)", None), ("channel", None)]
)
def test_a_pattern_is_one_flag(pattern: str, blocks: tuple | None, capsys: pytest.CaptureFixture) -> None:
    share = [] if pattern == "nm(1, 2)" else ["--sparsity", "0.8"]
    flags = [flag for flag in _SMALL if flag not in ("--sparsity", "0.8")] + share + ["--max-density", "1", "--timing-rounds", "0"]
    assert _exit_code("train", *flags, "--name", "run", "--pattern", pattern) == 0
    assert MaskSet.load("runs/run/masks.safetensors").recipe["pattern"] == pattern
    state = load_checkpoint(Path("runs/run"))["model"]
    values = [tensor for name, tensor in state.items() if name.endswith(".values")]
    assert values and all(tuple(tensor.shape[1:]) == blocks if blocks else tensor.dim() == 2 for tensor in values)


def test_a_budget_of_time_is_measured_and_said(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def search(model, masks_at, sparsest, names, batch, speedup, *rest):
        seen.update(shape=tuple(batch.inputs.shape), speedup=speedup)
        masks = masks_at(0.5, dict.fromkeys(names, 1e-6))
        masks.recipe.update(dense_step_s=0.5, sparse_step_s=0.125)
        return masks

    monkeypatch.setattr(pruning, "time_search", search)
    flags = [*_SCORING[: _SCORING.index("--sparsity")], "--budget", "time", "--speedup", "4", "--batch-size", "24"]
    assert _exit_code("prune", *flags, "--out", "fast.safetensors") == 0
    assert seen == {"shape": (24, 3, 8, 8), "speedup": 4.0}
    assert "a step of these masks: 0.1250 s, dense 0.5000 s, 4.00 times as fast" in capsys.readouterr().out
    assert MaskSet.load("fast.safetensors").recipe["budget"] == "time"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget", "time"], "Expected budget: with 'time', a --speedup too"),
        (["--speedup", "4"], "Expected speedup: none unless --budget time"),
        (["--budget", "time", "--speedup", "0.5"], "Expected speedup: a factor above 1, got 0.5"),
        (["--budget", "time", "--speedup", "4", "--sparsity", "0.9"], "Expected --speedup with budget time, got --sparsity"),
        (["--recipe", "both.toml"], "leave sparsity out"),
    ],
)
def test_what_a_budget_of_time_means_has_to_be_clear(flags: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    Path("both.toml").write_text('budget = "time"\nspeedup = 3\nsparsity = 0.9\n')
    assert _exit_code("prune", *flags) == 2
    assert message in capsys.readouterr().err


def test_info_says_what_runs(capsys: pytest.CaptureFixture) -> None:
    assert _exit_code("info") == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("python", "torchvision", "grasp_sparse", "kernels", "compiled", "threads", torch.__version__))
    assert _exit_code("info", "--json") == 0
    assert json.loads(capsys.readouterr().out)["torch"] == torch.__version__


def test_info_says_why_nothing_compiled_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    absent = _extension.ExtensionStatus(False, "no compiler; install one", "reference", (), {})
    monkeypatch.setattr(_extension, "_status", absent)
    assert _exit_code("info") == 0
    text = capsys.readouterr().out
    assert "pure-torch reference" in text and "no: no compiler; install one" in text


@pytest.mark.parametrize("command", [[], ["train"], ["prune"], ["bench"], ["report"], ["export"], ["info"]])
def test_help_exists(command: list[str], capsys: pytest.CaptureFixture) -> None:
    assert _exit_code(*command, "--help") == 0
    assert "usage: grasp-sparse" in capsys.readouterr().out


def _unwritable() -> list[str]:
    Path("a-file").write_text("")
    return ["train", *_SMALL, "--out", "a-file/run"]


def _broken_checkpoint() -> list[str]:
    Path("broken").mkdir()
    Path("broken", checkpoint_name(1, 0)).write_bytes(b"PK\x03\x04 torn")
    return ["train", "--resume", "broken"]


def _unknown_key() -> list[str]:
    Path("bad.toml").write_text("sparsty = 0.9\n")
    return ["train", "--recipe", "bad.toml"]


def _foreign_masks() -> list[str]:
    Path("foreign.safetensors").write_bytes(b"not masks")
    return ["train", *_SMALL, "--masks", "foreign.safetensors"]


def _binary_recipe() -> list[str]:
    Path("binary.toml").write_bytes(b"\x80\xff")
    return ["train", "--recipe", "binary.toml"]


def _a_list_as_temperature() -> list[str]:
    Path("list.toml").write_text("criterion_args = {temperature = [1]}\n")
    return ["prune", "--recipe", "list.toml", *_SCORING]


def _checkpoint_without_a_config() -> list[str]:
    assert _exit_code("train", *_SMALL, "--out", "run", "--timing-rounds", "0") == 0
    save_checkpoint(Path("run"), {**load_checkpoint(Path("run")), "config": 3})
    return ["train", "--resume", "run"]


def _criterion_arg(value: str) -> list[str]:
    return ["prune", *_SCORING, "--criterion-arg", value]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (_criterion_arg("foo=1"), "Expected criterion_args to be options of grasp, got 'foo'; valid names: temperature"),
        (_criterion_arg("seed=3"), "got 'seed'; use --seed"),
        (_criterion_arg('temperature="x"'), "Expected temperature in criterion_args to be float, got 'x'"),
        (_criterion_arg('dtype="x"'), "Expected dtype in criterion_args to be one of float32, float64"),
        (_criterion_arg('micro_batch_size="x"'), "Expected micro_batch_size in criterion_args to be int"),
        (_criterion_arg('iterations="x"'), "Expected iterations in criterion_args to be int"),
        ([*_criterion_arg("generator=5"), "--criterion-arg", 'redraw="all"'], "got 'generator'; valid names"),
        (_a_list_as_temperature, "Expected temperature in criterion_args to be float, got \\[1\\]"),
        (["train", "--data", "fake", "--image-size", "100000"], "Expected image_size: 1 to"),
        (["train", "--data", "fake", "--image-size", "10000"], "Expected fake images of at most .* lower --image-size"),
        (["train", *_SMALL, "--seed", "123456789012345678901"], "Expected seed"),
        (["train", *_SMALL, "--threads", "1000000"], "Expected threads: 1 to 4096"),
        (["train", *_SMALL, "--masks", "."], "Expected --masks to be a mask file, got a folder"),
        (["train", *_SMALL, "--name", "../elsewhere"], "Expected --name to be that of one folder in runs"),
        (["train", *_SMALL, "--out", os.devnull], "Expected --out to be a folder for the run, got the file"),
        (["prune", *_SCORING, "--out", "."], "Expected --out to be a file for the masks, got the folder"),
        (_binary_recipe, "Expected recipe binary.toml to be a TOML file"),
        (_checkpoint_without_a_config, "Expected config in run/checkpoint-e001-s000000.pt to be dict, got 3"),
        (["train", *_SMALL, "--sparsity", "1"], "Expected sparsity: 0 <= sparsity < 1"),
        (["prune", "--sparsity", "1.5"], "Expected sparsity"),
        (["train", *_SMALL, "--model", "resnet181"], "unknown model 'resnet181'; did you mean resnet18"),
        (["train", "--data-dir", "no/such/folder"], "Expected --data-dir to be a folder"),
        (["train", "--data", "imagefolder", "--data-dir", "nowhere"], "Expected --data-dir to be a folder with the train"),
        (["train", "--data", "mnist"], "invalid choice: 'mnist'"),
        (["train", *_SMALL, "--lr", "1e30"], "the loss is (nan|inf) at step"),
        (["train", *_SMALL, "--model-arg", "widths"], "Expected KEY=VALUE"),
        (["train", "--recipe", "no-such"], "Expected --recipe to be a TOML file or one of: cifar10"),
        (["train", "--resume", "nowhere"], "Expected nowhere to hold a run"),
        (["train", "--resume", "x", "--recipe", "demo", "--out", "y"], "leave out --recipe, --out"),
        (["train", "--resume", "x", "--overwrite"], "Expected --resume or --overwrite, got both"),
        (["train", *_SMALL, "--masks", "nowhere.safetensors"], "nowhere.safetensors"),
        (["train", "--epochs", "many"], "invalid int value: 'many'"),
        (["bake"], "invalid choice: 'bake'"),
        ([], "required"),
        (_unwritable, "a-file"),
        (_broken_checkpoint, "cannot read any checkpoint in broken .*its end is missing or changed, 9 bytes are left"),
        (_unknown_key, "unknown key 'sparsty' in recipe bad.toml; did you mean sparsity"),
        (_foreign_masks, "Expected a mask file"),
    ],
    ids=lambda value: value.__name__.strip("_") if callable(value) else None,
)
def test_a_mistake_ends_in_one_line_and_code_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert _exit_code(*(arguments() if callable(arguments) else arguments)) == 2
    last = capsys.readouterr().err.strip()
    assert re.fullmatch("grasp-sparse: error: .*" + message + ".*", last), last


def _raises(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr("grasp_sparse.train.run.start_run", refuse)


def test_the_unexpected_ends_in_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    _raises(RuntimeError("out of\nluck"), monkeypatch)
    assert _exit_code("train", *_SMALL) == 2
    assert capsys.readouterr().err == "grasp-sparse: error: unexpected RuntimeError: out of luck (--debug shows where)\n"
    with pytest.raises(RuntimeError, match="luck"):
        cli.main(["--debug", "train", *_SMALL])


def test_ctrl_c_before_training_says_that_nothing_was_saved(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    _raises(KeyboardInterrupt(), monkeypatch)
    assert _exit_code("train", *_SMALL) == 130
    assert capsys.readouterr().err == "\ngrasp-sparse: interrupted; nothing was saved\n"


def test_ctrl_c_during_the_report_says_how_to_write_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("grasp_sparse.report.run_page.write_report", interrupt)
    assert _exit_code("train", *_SMALL, "--out", "run", "--timing-rounds", "0") == 130
    assert "training is saved, write the report with: grasp-sparse report run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("owner", "name", "message"),
    [("grasp_sparse.report.run_page", "plot_curve", "cannot write the report .RuntimeError: no such font.; .* grasp-sparse report run"),
     ("grasp_sparse.train.beside_dense", "measure_steps", "cannot compare with dense steps .RuntimeError: no such font.; .* --resume run")],
    ids=["page", "comparison with dense"],
)  # fmt: skip
def test_what_fails_once_training_is_finished_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, owner: str, name: str, message: str
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such font")

    flags = [*_SMALL, "--out", "run", "--timing-rounds", "2", "--threads", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(f"{owner}.{name}", fail)
        assert _exit_code("train", *flags) == 0
    said = capsys.readouterr()
    assert re.search(f"grasp-sparse: warning: {message}", said.err) and "accuracy=" in said.out.splitlines()[-1]
    timed, reported = name != "measure_steps", name != "plot_curve"
    assert bool(json.loads(Path("run/result.json").read_text())["timing"]) == timed
    assert Path("run/report.html").exists() == reported and ("run/report.html" in said.out) == reported
    assert _exit_code("train", "--resume", "run") == 0  # and tries again
    assert json.loads(Path("run/result.json").read_text())["timing"] and Path("run/report.html").exists()


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(Exception, match="Expected sparsity"):
        cli.main(["--debug", "train", "--sparsity", "1"])


def test_ctrl_c_saves_says_how_to_go_on_and_exits_130(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "grasp_sparse", "train", *_SMALL, "--epochs", "100000", "--out", "run", "--threads", "1"]
    environment = {**os.environ, "PYTHONPATH": str(Path(gs.__file__).parents[1])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        deadline = time.monotonic() + 60
        while not has_run(Path("run")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert errors.strip().splitlines()[-1] == "grasp-sparse: interrupted; saved, go on with: grasp-sparse train --resume run"
    assert load_checkpoint(Path("run"))["position"]["step"] >= 0 and "Traceback" not in errors


def test_kernels_that_cannot_run_here_are_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    status = _extension.ExtensionStatus(False, "GRASP_SPARSE_ISA: Expected one of scalar, got 'mmx'", "none", ("scalar",), {})
    monkeypatch.setattr(_extension, "_status", status)
    assert _exit_code("train", *_SMALL, "--out", "run") == 2
    assert capsys.readouterr().err == "grasp-sparse: error: GRASP_SPARSE_ISA: Expected one of scalar, got 'mmx'\n"
    assert not Path("run").exists()
    assert _exit_code("info") == 0
    assert "got 'mmx'" in capsys.readouterr().out
