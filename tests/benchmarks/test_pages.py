"""Documents whose blocks programs write: every block has its place, and every place its block."""

from __future__ import annotations

import pytest

from benchmarks import accuracy_page, speed_page
from benchmarks.pages import filled, marks_of

BLOCKS = {"one": lambda: "1", "two": lambda: "2"}


def _document(*names: str) -> str:
    return "".join(f"<!-- {name} -->\nold\n<!-- end -->\n" for name in names)


def test_blocks_go_where_their_marks_are() -> None:
    assert filled("before\n" + _document("two", "one") + "after", BLOCKS) == (
        "before\n<!-- two -->\n2\n<!-- end -->\n<!-- one -->\n1\n<!-- end -->\nafter"
    )


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("names", [("one",), ("one", "two", "two")])
def test_a_block_without_its_one_mark_is_refused(names: tuple[str, ...], shared: bool) -> None:
    with pytest.raises(ValueError, match="Expected the marks one, two, each once, got one"):
        filled(_document(*names), BLOCKS, shared)


def test_the_marks_of_others_stay_in_a_shared_document_only() -> None:
    document = _document("one", "three", "two")
    assert "<!-- three -->\nold\n" in filled(document, BLOCKS, shared=True)
    with pytest.raises(ValueError, match="got one, three, two"):
        filled(document, BLOCKS)


def test_every_block_of_the_readme_is_written_by_a_program() -> None:
    marks = marks_of(speed_page.README.read_text(encoding="utf-8"))
    assert sorted(marks) == sorted([*speed_page.README_BLOCKS, *accuracy_page.README_BLOCKS])
