"""Matplotlib figures as inline SVG: glyphs are drawn as paths, so a page looks the same on every device and needs no file."""

from __future__ import annotations

import io
import re

from markupsafe import Markup, escape
from matplotlib import pyplot as plt

_IDENTIFIER = re.compile(r'(\bid="|xlink:href="#|url\(#)')


def inline_svg(figure: plt.Figure, prefix: str, description: str) -> Markup:
    """The figure, closed afterwards, as an <svg> element that scales to its column.

    `prefix` keeps the identifiers inside apart from those of the page's other figures; `description` is what is read aloud.
    """
    text = io.StringIO()
    with plt.rc_context({"svg.fonttype": "path", "svg.hashsalt": prefix}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    plt.close(figure)
    svg = text.getvalue()
    svg = _IDENTIFIER.sub(rf"\g<1>{prefix}-", svg[svg.index("<svg"):])
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    return Markup(svg.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1).strip())
