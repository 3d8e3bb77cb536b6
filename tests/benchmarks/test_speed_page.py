"""README and docs/speed.md hold what the CSV files say, and the sums on them are right."""

from __future__ import annotations

import re

import pytest

from benchmarks import speed_figures, speed_page
from benchmarks.pages import filled, prose_of


@pytest.mark.parametrize(
    ("document", "blocks", "shared"),
    [(speed_page.DOCUMENT, speed_page.BLOCKS, False), (speed_page.README, speed_page.README_BLOCKS, True)],
    ids=["page", "readme"],
)
def test_the_documents_hold_what_the_rows_say(document, blocks, shared) -> None:
    text = document.read_text(encoding="utf-8")
    assert text == filled(text, blocks, shared), "run python -m benchmarks.speed_page --write"


def test_no_speed_on_the_page_is_typed_by_hand() -> None:
    assert not re.findall(r"\d×(?!\d)", prose_of(speed_page.DOCUMENT.read_text(encoding="utf-8")))


def _layer(shape: str, arm: str, median: float, sparsity: str = "0", **others: str) -> dict[str, str]:
    return {
        "group": shape.split()[0], "shape": f"{shape} batch 128", "precision": "float32", "sparsity": sparsity, "arm": arm,
        "median_s": f"{median}", "q1_s": f"{0.9 * median}", "q3_s": f"{1.1 * median}", "best": "", **others,
    }  # fmt: skip


def test_layers_are_compared_with_the_fastest_dense_path_and_averaged_over_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shapes, 2 and 8 times as fast at 90 %: 4 times; of one of them alone something is known at 99 %."""
    rows = [
        _layer("linear 4->4", "dense nn.Linear", 9.0), _layer("linear 4->4", "dense oneDNN", 4.0),
        _layer("linear 4->4", "sparse", 2.0, "0.9", **{"best": "yes", "vs dense nn.Linear": "4.5"}),
        _layer("linear 8->8", "dense nn.Linear", 8.0), _layer("linear 8->8", "dense oneDNN", 12.0),
        _layer("linear 8->8", "sparse", 1.0, "0.9", **{"best": "yes", "vs dense nn.Linear": "8"}),
        _layer("linear 8->8", "sparse", 0.5, "0.99", **{"best": "yes", "vs dense nn.Linear": "16"}),
        _layer("conv3x3 4->4", "dense nchw", 5.0), _layer("conv3x3 4->4", "sparse nchw", 1.0, "0.9", best="yes"),
    ]  # fmt: skip
    monkeypatch.setattr(speed_figures, "rows_of", lambda _: rows)
    assert speed_figures.layer_speeds("layers", "linear") == {0.9: pytest.approx(4.0)}
    assert speed_figures.layer_speeds("layers", "conv3x3") == {0.9: pytest.approx(5.0)}
    assert speed_figures.layer_speeds("layers", "resnet50") == {}
    assert speed_figures.speeds_against_linear("layers")[0.9] == pytest.approx(6.0)


def test_steps_come_with_the_quartiles_of_one_against_the_opposite_ones_of_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    case = {"model": "net", "budget": "flops", "sparsity": "0.9", "best": "yes", "vs best dense": "4", "rounds": "7"}
    rows = [_layer("net", "dense nchw", 8.0) | case, _layer("net", "sparse nchw", 2.0) | case, _layer("net", "dense channels_last", 1.0)]
    monkeypatch.setattr(speed_figures, "rows_of", lambda _: rows)
    assert speed_figures.step_speeds("models-zen4") == {("net", "flops", "0.9"): pytest.approx((4, 8 * 0.9 / 2.2, 8 * 1.1 / 1.8, 7))}


def test_what_own_norms_bring_is_taken_from_the_profiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dense 10 s, 2 of them norms; sparse 4 s, 1 of them: with the sparse one's norms 9 / 4 times as fast, not 10 / 4."""
    case = {"model": "net", "budget": "flops", "sparsity": "0.9"}
    seconds = {"dense nchw": {"norm": 2, "other": 8}, "sparse nchw": {"norm": 1, "other": 3}}
    rows = [case | {"arm": arm, "category": kind, "seconds": f"{of}"} for arm, kinds in seconds.items() for kind, of in kinds.items()]
    monkeypatch.setattr(speed_figures, "rows_of", lambda _: rows)
    assert speed_figures.without_own_norms("Zen 4") == ([pytest.approx(0.9)], False)
    rows += [case | {"arm": "refitted nchw", "category": kind, "seconds": f"{of}"} for kind, of in (("norm", 0.5), ("other", 8))]
    rows += [row | {"model": "no such network"} for row in rows[:4]]
    assert speed_figures.without_own_norms("Zen 4") == ([pytest.approx(0.85)], True)  # measured, where it was


def test_which_steps_take_denormals_for_zero_is_what_their_rows_say() -> None:
    zero, kept = {"model": "resnet50", "budget": "weights", "denormals": "zero"}, {"model": "mlp", "budget": "flops", "denormals": ""}
    assert [speed_page._flushed(rows) for rows in ([zero], [kept], [zero, kept])] == ["all", "none", "ResNet-50 by weights"]


def test_layers_that_are_slower_than_dense_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the faster layout of each, and not the whole step."""

    def row(layer: str, arm: str, median: float, speed: float, **others: str) -> dict[str, str]:
        usual = {"layer": layer, "runs": "masked", "pass": "forward+backward", "vs best dense": f"{speed}"}
        return _layer("layer", arm, median) | usual | others

    rows = [
        row("first", "dense nchw", 1.0, 1.0), row("first", "dense channels_last", 0.9, 1.0, best="yes"),
        row("first", "sparse nchw", 1.0, 0.9, best="yes"), row("first", "sparse channels_last", 2.0, 0.45),
        row("middle", "dense nchw", 1.0, 1.0, best="yes"), row("middle", "sparse nchw", 0.5, 2.0, best="yes"),
        row("last", "dense nchw", 1.0, 1.0, best="yes"), row("last", "sparse nchw", 2.0, 0.5, best="yes", runs="sparse"),
        row("whole step", "dense nchw", 1.0, 1.0, **{"best": "yes", "pass": "training step"}),
        row("whole step", "sparse nchw", 2.0, 0.5, **{"best": "yes", "pass": "training step"}),
    ]  # fmt: skip
    monkeypatch.setattr(speed_figures, "rows_of", lambda _: rows)
    assert speed_figures.slower_layers("bench-x") == (3, [("first", "masked", 0.9, True), ("last", "sparse", 0.5, False)])


def test_ranges_and_machines() -> None:
    assert speed_page._range([3.04, 2.0, 2.5]) == "2.0–3.0×"
    assert speed_page._range([2.04, 2.0]) == "2.0×"
    assert speed_page._share_range([0.4, 0.35, 0.48]) == "35 % to 48 %"
    assert speed_page._share_range([0.4, None]) == "40 % to more than was measured"
    assert speed_page._share_range([None, None]) == "more than was measured"
    assert speed_figures.machine_of("bench-vgg19-zen4") == "Zen 4"
    assert speed_figures.machine_of("layers-xeon-default-allocator") == "Xeon"
    assert speed_figures.machine_of("layers-cold") == "Zen 5"


def test_a_peer_that_is_faster_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(arm: str, speed: str, what: str = "forward+backward", best: str = "") -> dict[str, str]:
        return {"shape": "linear 4->4 batch 2", "arm": arm, "sparsity": "0.95", "pass": what, "vs best dense": speed, "best": best}

    rows = [row("dense nn.Linear", "1"), row("sparse", "2.0"), row("torch CSR by hand", "3.0", best="yes"), row("SparseProp", "9", "forward")]
    monkeypatch.setattr(speed_page, "rows_of", lambda file: rows if file == "peers-zen4" else [])
    table = speed_page.peer_table().splitlines()
    assert [cell.strip() for cell in table[-1].strip("|").split("|")][1:] == ["Zen 4", "95%", "2.0×", "", "", "3.0×"]


def test_a_speed_that_was_asked_for_is_told_beside_what_came_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the faster format that the dense network can be in as it is: oneDNN's own is none."""
    sparse = {
        "arm": "sparse nchw", "best": "yes", "speed in the search": "3.9", "vs dense nchw": "5.2", "vs dense channels_last": "3.8",
        "vs dense rows": "", "vs dense oneDNN": "3.1",
    }  # fmt: skip
    removed = {"weight_sparsity": "0.85", "flop_sparsity": "0.86"}
    rows = [
        {"model": "mlp", "asked": "4", "arm": "dense nchw", "best": ""}, {"model": "mlp", "asked": "4", **sparse, **removed},
        {"model": "mlp", "asked": "99", "arm": "", "best": "", "most": "31.5"},
    ]  # fmt: skip
    monkeypatch.setattr(speed_figures, "rows_of", lambda _: rows)
    *_, met, refused = speed_page.asked_table().splitlines()
    assert [cell.strip() for cell in met.split("|")[2:-1]] == ["4×", "3.90×", "3.80×", "85.0%", "86.0%"]
    assert [cell.strip() for cell in refused.split("|")[1:-1]] == ["", "99×", "cannot be had: at most 31.5×", "", "", ""]
