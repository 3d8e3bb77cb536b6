"""Reads a page as a browser would: what must not happen in one is an error."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

_VOID = {"meta", "link", "br", "img", "input", "hr"}
_HIDDEN = {"style", "script", "svg", "title"}


class Page(HTMLParser):
    """`text` is what a reader sees outside of the figures; `figures` counts them; raises AssertionError for malformed markup."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.parts: list[str] = []
        self.identifiers: list[str] = []
        self.figures = 0
        source = path.read_text(encoding="utf-8")
        self.feed(source)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        assert len(set(self.identifiers)) == len(self.identifiers), "an id occurs twice"
        self.size = len(source)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in _VOID:
            self.open.append(tag)
        self.figures += tag == "svg"
        assert tag not in ("script", "link", "iframe", "object", "img"), f"<{tag}> may reach outside of the page"
        for name, value in attrs:
            assert not name.startswith("on"), f"{name} would run code"
            if name == "id":
                self.identifiers.append(value or "")
            if name in ("src", "href", "xlink:href"):
                assert (value or "").startswith("#"), f"{name} points outside of the page: {value}"

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        assert "url(" not in data.replace("url(#", ""), "a style reaches outside of the page"
        if not _HIDDEN & set(self.open):
            self.parts.append(data)
