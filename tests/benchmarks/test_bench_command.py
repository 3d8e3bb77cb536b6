"""`grasp-sparse bench` and `grasp-sparse report` as a person meets them."""

from __future__ import annotations

import csv
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from grasp_sparse import cli
from grasp_sparse.bench.layers import verdict
from grasp_sparse.bench.results import read_rows
from grasp_sparse.nn import SparseConv2d
from grasp_sparse.planning import Times, measure

_RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def tiny() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4),
    )  # fmt: skip


def rows_only(num_classes: int = 7) -> nn.Module:
    return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, num_classes))


def two_outputs() -> nn.Module:
    class Two(nn.Linear):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return super().forward(x), x

    return Two(24, 4)


def aux_in_training() -> nn.Module:
    class Aux(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
            y = super().forward(x)
            return (y, y) if self.training else y

    return Aux(24, 4)


@pytest.fixture(autouse=True)
def importable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "own_models", sys.modules[__name__])
    monkeypatch.chdir(tmp_path)


def _bench(*flags: str) -> int:
    return cli.main(["bench", "--threads", "1", "--rounds", "2", "--seconds-per-layer", "0.001", *flags])


def test_layers_whole_steps_and_a_csv(capsys: pytest.CaptureFixture) -> None:
    assert _bench("--model", "own_models:tiny", "--input", "4x3x9x9", "--sparsity", "0.8", "--out", "mine.csv") == 0
    out = capsys.readouterr().out
    assert "random normal inputs and random targets" in out and "removed: 80.0" in out
    assert re.search(r"^3 +4x8x9x9 +sparse +\d+\.\d\d% +[\d.]+ +[\d.]+ +[\d.]+x$", out, re.M), out
    assert re.search(r"the sparse step is [\d.]+ times as fast as the fastest dense one \(dense (nchw|channels_last)\)", out)
    rows = read_rows(Path("mine.csv"))
    steps = [row for row in rows if row["layer"] == "whole step"]
    assert [row["arm"] for row in steps] == ["dense nchw", "dense channels_last", "sparse nchw", "sparse channels_last"]
    first, other = ({row["input_grad"] for row in rows if row["layer"] == layer} for layer in ("0", "3"))
    assert (first, other) == ({"no"}, {"yes"})
    assert all(row["kernels"] and row["threads"] == "1" and row["criterion"] == "grasp" for row in rows)
    assert {row["denormals"] for row in rows} == {"zero"} and not torch.tensor([1e-40]).mul(1.0).any()


def test_a_pattern(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(measure, "measure_layer", lambda *_: Times(2e-3, 2e-3, 1e-3))  # whatever they take, layers run sparse
    flags = ["--sparsity", "0.6", "--pattern", "block(4, 3)", "--out", "mine.csv"]
    assert _bench("--model", "own_models:tiny", "--input", "4x3x9x9", *flags) == 0
    assert {row["pattern"] for row in read_rows(Path("mine.csv"))} == {"block(4, 3)"}
    assert re.search(r"^3 +4x8x9x9 +sparse ", capsys.readouterr().out, re.M)
    assert _bench("--model", "own_models:tiny", "--input", "4x3x9x9", "--pattern", "block(4)") == 2
    assert "written block(bh, bw)" in capsys.readouterr().err


def test_the_verdict_counts_layers_and_weighs_the_slower_ones() -> None:
    def arms(layer: str, dense: float, sparse: float) -> list[dict]:
        times = {"dense a": dense, "dense b": 2 * dense, "sparse a": sparse}
        return [
            {"layer": layer, "arm": arm, "median_s": seconds, "best": "" if arm == "dense b" else "yes",
             "vs best dense": dense / seconds}
            for arm, seconds in times.items()
        ]  # fmt: skip

    rows = arms("conv", 0.9, 0.3) + arms("noise", 0.09, 0.092) + arms("fc", 0.01, 0.0125)
    assert verdict(rows) == "2 of 3 layers as fast as dense or faster (within 3%); slower: fc 0.80x, 1.00% of the time of all"
    assert verdict(rows[:6]) == "2 of 2 layers as fast as dense or faster (within 3%)"


def test_a_network_of_linear_layers_meets_onednn(capsys: pytest.CaptureFixture) -> None:
    flags = ["--budget", "flops", "--criterion", "snip", "--num-classes", "5", "--out", "rows.csv"]
    assert _bench("--model", "own_models:rows_only", "--input", "6x24", *flags) == 0
    rows = read_rows(Path("rows.csv"))
    assert {row["arm"] for row in rows if row["layer"] == "whole step"} == {"dense rows", "dense oneDNN", "sparse rows"}
    assert next(row["shape"] for row in rows if row["layer"] == "2") == "5x32"


def test_wrong_kernels_print_no_speed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    forward = SparseConv2d.forward
    monkeypatch.setattr(SparseConv2d, "forward", lambda self, x: forward(self, x) * 1.5)
    assert _bench("--model", "own_models:tiny", "--input", "4x3x9x9", "--sparsity", "0.8", "--out", "mine.csv") == 2
    streams = capsys.readouterr()
    assert "a pruned layer computes something else than the dense one" in streams.err and "times as fast" not in streams.out
    assert not Path("mine.csv").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model", "own_models:tiny", "--input", "4x3x9x"], "Expected --input as BATCHxCHANNELS"),
        (["--model", "own_models:tiny", "--input", "1x3x9x9"], "a batch of at least 2; got '1x3x9x9'"),
        (["--model", "own_models:tiny", "--input", "4x24"], "model own_models:tiny cannot take an input 4x24"),
        (["--model", "own_models:two_outputs", "--input", "4x24"], "to return logits .*, got tuple"),
        (["--model", "own_models:aux_in_training", "--input", "4x24"], "to return logits in training, got tuple"),
        (["--model", "own_models:none", "--input", "4x24"], "cannot load model own_models:none"),
        (["--model", "resnet5", "--input", "4x3x9x9"], "unknown model 'resnet5'"),
        (["--model", "own_models:tiny", "--input", "4x3x9x9", "--sparsity", "1"], "Expected --sparsity above 0 and below 1, got 1"),
        (["--model", "own_models:tiny", "--input", "4x3x9x9", "--rounds", "1"], "Expected --rounds of at least 2"),
        (["--model", "own_models:tiny", "--input", "4x3x9x9", "--seconds-per-layer", "0"], "Expected --seconds-per-layer above 0"),
        (["--model", "own_models:tiny", "--input", "4x3x9x9", "--threads", "0"], "Expected --threads: 1 to 4096"),
        (["--model", "own_models:tiny", "--input", "4x3x9x9", "--criterion", "luck"], "Expected criterion to be one of grasp"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_mistake_ends_in_one_line_and_code_2(flags: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert _bench(*flags) == 2
    assert re.fullmatch(f"grasp-sparse: error: .*{message}.*\n", capsys.readouterr().err)


def test_report_draws_a_png_for_every_committed_csv(capsys: pytest.CaptureFixture) -> None:
    files = sorted(_RESULTS.glob("*.csv"))
    assert {"layers.csv", "layers-cold.csv", "layers-crossover.csv"} <= {file.name for file in files}
    assert cli.main(["report", str(_RESULTS), "--out", "plots"]) == 0
    assert {path.stem for path in Path("plots").iterdir()} == {file.stem for file in files}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in Path("plots").iterdir())
    assert capsys.readouterr().out.count("wrote plots/") == len(files)


def test_report_writes_a_run_again(capsys: pytest.CaptureFixture) -> None:
    run = Path("run")
    run.mkdir()
    (run / "result.json").write_text((_RESULTS / "demo.json").read_text())
    epoch = {f"{split}_{what}": 0.5 for split in ("train", "test") for what in ("loss", "accuracy")}
    epochs = json.loads((run / "result.json").read_text())["training"]["epochs"]
    (run / "log.jsonl").write_text("".join(json.dumps({"epoch": number, **epoch}) + "\n" for number in range(1, epochs + 1)))
    assert cli.main(["report", "run"]) == 0
    assert "run/report.html" in capsys.readouterr().out and (run / "report.html").exists()


def _foreign_csv() -> str:
    with open("foreign.csv", "w", newline="") as file:
        csv.writer(file).writerows([["name", "age"], ["Ada", "36"]])
    return "foreign.csv"


def _words_for_numbers() -> str:
    Path("words.csv").write_text("shape,precision,sparsity,arm,median_s\nconv,float32,0.9,dense,fast\n")
    return "words.csv"


def _binary() -> str:
    Path("binary.csv").write_bytes(b"\x80\xff\n")
    return "binary.csv"


def _empty_folder() -> str:
    Path("empty").mkdir()
    return "empty"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (lambda: "nowhere.csv", "Expected a CSV file, a folder of them or a folder of a run, got nowhere.csv"),
        (_empty_folder, "Expected CSV files or a run's result.json in empty"),
        (_foreign_csv, "Expected columns of a benchmark in foreign.csv, got age, name"),
        (_words_for_numbers, "Expected numbers in the columns of words.csv"),
        (_binary, "Expected binary.csv to be a CSV file"),
    ],
)
def test_report_refuses_what_is_no_result(path, message: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["report", path()]) == 2
    assert re.fullmatch(f"grasp-sparse: error: {message}.*\n", capsys.readouterr().err)
