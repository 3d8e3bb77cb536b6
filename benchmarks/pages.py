"""Pages whose numbers a program prints: each block of text between two marks is written anew, and a test compares."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"
Blocks = Mapping[str, Callable[[], str]]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, all columns but the first to the right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def marks_of(document: str) -> list[str]:
    return [mark for mark in re.findall(r"<!-- ([a-z0-9 ]+) -->", document) if mark != "end"]


def filled(document: str, blocks: Blocks, shared: bool = False) -> str:
    """`document` with each of `blocks` between its two marks. Raises ValueError for a block without its mark and, unless the document
    is `shared` with other programs, the other way round."""
    marks = [mark for mark in marks_of(document) if mark in blocks or not shared]
    if sorted(marks) != sorted(blocks):
        raise ValueError(f"Expected the marks {', '.join(blocks)}, each once, got {', '.join(marks)}")
    for name, write in blocks.items():
        block = re.compile(rf"<!-- {name} -->\n.*?<!-- end -->", re.DOTALL)
        text = f"<!-- {name} -->\n{write()}\n<!-- end -->"
        document = block.sub(lambda _: text, document)
    return document


def prose_of(document: str) -> str:
    """What no program has written."""
    return re.sub(r"<!-- [a-z0-9 ]+ -->\n.*?<!-- end -->", "", document, flags=re.DOTALL)


def print_or_write(
    module: str, description: str | None, path: Path, blocks: Blocks, plot: Callable[[Path], None], arguments: list[str] | None = None,
    others: Mapping[Path, Blocks] | None = None,
) -> None:  # fmt: skip
    """The command line of a page: print its blocks or, with --write, put them into it and draw its plot beside it.

    `others` are documents that quote blocks of their own from the same figures, perhaps beside those of other pages.
    """
    others = others or {}
    documents = {path: blocks, **others}
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    image = path.with_suffix(".png")
    names = " and ".join(document.name for document in (*documents, image))
    parser.add_argument("--write", action="store_true", help=f"into {names}")
    if not parser.parse_args(arguments).write:
        for own in documents.values():
            for name, write in own.items():
                print(f"{name}\n\n{write()}\n")
        return
    texts = {document: filled(document.read_text(encoding="utf-8"), own, document in others) for document, own in documents.items()}
    for document, text in texts.items():
        document.write_text(text, encoding="utf-8")
    plot(image)
    print(f"wrote {names}")
