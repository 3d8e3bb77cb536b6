"""The report of a run is one well-formed page with nothing outside of it, made from two files, that says what they say."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
from made_up_runs import write_run
from page_reader import Page

from grasp_sparse.report.recipe import changed_settings, recipe_toml
from grasp_sparse.report.run_page import write_report
from grasp_sparse.report.style import human_bytes, human_seconds
from grasp_sparse.train.config import TrainConfig
from grasp_sparse.train.errors import UserError


@pytest.mark.parametrize("pruned", [True, False], ids=["pruned", "dense"])
@pytest.mark.parametrize("timed", [True, False], ids=["timed", "untimed"])
@pytest.mark.parametrize("counted", [True, False], ids=["counted", "uncounted"])
def test_a_page_stands_alone_and_shows_what_there_is(tmp_path: Path, pruned: bool, timed: bool, counted: bool) -> None:
    path = write_report(write_run(tmp_path / "run", pruned=pruned, timed=timed, counted=counted))
    page = Page(path)
    assert {file.name for file in path.parent.iterdir()} == {"result.json", "log.jsonl", "report.html"}
    assert page.figures == 2 + 2 * timed + 2 * counted + pruned
    assert "80.00%" in page.text and "81.00%" in page.text and "1 min 15 s" in page.text
    assert ("3.00 times as fast" in page.text) == (pruned and timed)
    assert ("97.00% of the weights and 98.00% of the multiply-adds" in page.text) == pruned
    assert ("Cost of a step" in page.text) == timed
    assert ("Memory and traffic" in page.text) == ("all-reduced in a step 4 kB" in page.text) == counted
    assert ("10.10%" in page.text) == (pruned and counted)
    assert page.size < 500_000


def test_traffic_is_every_gradient_once(tmp_path: Path) -> None:
    text = Page(write_report(write_run(tmp_path / "run"))).text
    assert "all-reduced in a step 4 kB 404 B 10.10%" in text


def test_the_moving_average_is_shown_where_there_is_one(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    rows = [json.loads(line) | {"ema_accuracy": 0.7654, "ema_loss": 1.0} for line in (folder / "log.jsonl").read_text().splitlines()]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "of the moving average of its weights 76.54%" in Page(write_report(folder)).text


def test_what_crossed_between_ranks_is_what_was_measured(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    result = json.loads((folder / "result.json").read_text())
    result["scale"] = {"ranks": 2, "reduced_bytes": 48_000, "values": 11_000, "dense_parameters": 1000}
    (folder / "result.json").write_text(json.dumps(result))
    assert "2 ranks trained this run and sent, as measured, 48 kB each a step: 11,000 kept weights" in Page(write_report(folder)).text


@pytest.mark.parametrize(
    ("ranks", "accumulate", "lead", "timed"),
    [(None, 1, "1 rank x batch 16 x 1 micro-batch = 16 images a step.", "a real batch of 16;"),
     (2, 4, "2 ranks x batch 16 x 4 micro-batches = 128 images a step.", "a real batch of 16 x 4 micro-batches;")],
    ids=["one rank, of an older version", "two ranks"],
)  # fmt: skip
def test_a_batch_is_of_all_ranks_and_micro_batches(
    tmp_path: Path, ranks: int | None, accumulate: int, lead: str, timed: str
) -> None:
    folder = write_run(tmp_path / "run", batch_size=16, accumulate=accumulate)
    result = json.loads((folder / "result.json").read_text())
    if ranks is None:
        del result["config"]["accumulate"]
    else:
        result["scale"] = {"ranks": ranks, "reduced_bytes": 48_000, "values": 11_000, "dense_parameters": 1000}
    (folder / "result.json").write_text(json.dumps(result))
    text = Page(write_report(folder)).text
    assert lead in text and timed in text


def test_a_name_is_text_and_never_markup(tmp_path: Path) -> None:
    page = Page(write_report(write_run(tmp_path / "run", name="<script>alert(1)</script>", criterion='"><img src=x onerror=y>')))
    assert "<script>alert(1)</script>" in page.text and '"><img src=x' in page.text


def test_a_run_without_phases_has_no_figure_of_them(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    result = json.loads((folder / "result.json").read_text())
    del result["timing"]["phases"]
    (folder / "result.json").write_text(json.dumps(result))
    assert Page(write_report(folder)).figures == 6


def _last_line_lost(folder: Path) -> None:
    """As where the disk was full at the last epoch."""
    lines = (folder / "log.jsonl").read_text().splitlines(keepends=True)
    (folder / "log.jsonl").write_text("".join(lines[:-1]))


def _second_line(folder: Path, **changes: object) -> None:
    """The log with something else in its second line; without what is None."""
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    rows[1] = {key: value for key, value in {**rows[1], **changes}.items() if value is not None}
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "result.json").unlink(), "Expected a finished run .* found no result.json; finish it with"),
        (lambda folder: (folder / "log.jsonl").write_text('{"half a li'), "damaged"),
        (lambda folder: (folder / "log.jsonl").write_text(""), "a line for each epoch"),
        (lambda folder: (folder / "result.json").write_text("[]"), "result.json holds no object"),
        (lambda folder: (folder / "result.json").write_text("{}"), "got no config, environment"),
        (lambda folder: (folder / "log.jsonl").write_text("3\n"), "line 1 of log.jsonl is no epoch's.*; write them anew with"),
        (lambda folder: (folder / "log.jsonl").write_text('{"epoch": 1, "test_accuracy": 0.5}\n'), "line 1 of log.jsonl is no epoch's"),
        (lambda folder: _second_line(folder, test_loss="high"), "line 2 of log.jsonl is no epoch's"),
        (lambda folder: _second_line(folder, lr=None), "line 2 of log.jsonl is no epoch's"),
        (_last_line_lost, "2 lines in log.jsonl for 3 epochs.*write them anew"),
    ],
    ids=["unfinished", "half a line", "no epoch", "a list", "empty", "a number", "too few columns", "a word", "no rate", "an epoch less"],
)
def test_a_folder_without_a_whole_run_is_refused(tmp_path: Path, damage, message: str) -> None:
    folder = write_run(tmp_path / "run")
    damage(folder)
    with pytest.raises(UserError, match=message):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_the_recipe_on_the_page_is_the_config_again() -> None:
    config = TrainConfig(
        name='a "quoted" näme\\ \x7f\n', model_args={"widths": [1, 2], "act": "relu", "deep": {"a b": 1e-05}}, sparsity=0.98, exclude=["fc*"],
        milestones=[0.3], lr=1e-5, augment=False,
    )  # fmt: skip
    read = tomllib.loads(recipe_toml(config.to_dict()))
    assert TrainConfig.from_dict(read, "the page") == config


def test_what_differs_from_the_defaults_is_what_was_set() -> None:
    config = TrainConfig(lr=0.2, dense=True)
    assert changed_settings(config.to_dict()) == [("dense", "true"), ("lr", "0.2")]


def test_numbers_carry_their_unit() -> None:
    assert [human_bytes(n) for n in (12, 1234, 6e6, 999_999, 2.5e9, 2e12)] == ["12 B", "1.23 kB", "6 MB", "1 MB", "2.5 GB", "2,000 GB"]
    assert [human_seconds(s) for s in (15e-6, 0.0612, 0.9999, 2.0)] == ["15 µs", "61.2 ms", "1 s", "2 s"]
