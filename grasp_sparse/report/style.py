"""What all plots and pages share: colours, matplotlib's settings, numbers with their unit."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (the backend must be chosen first)

DENSE, SPARSE, ACCENT, INK, FAINT = "#94a3b8", "#0f766e", "#c2410c", "#1e293b", "#e2e8f0"
# Petrol to ochre, told apart in grey too; runs that are compared take them in turn.
SERIES = (SPARSE, ACCENT, "#64748b", "#b08d2f", "#5eaaa3", "#7c3f58", "#334155", "#d6b48a")
STYLE = {
    "figure.dpi": 144, "figure.facecolor": "white", "font.family": "DejaVu Sans", "font.size": 9.5,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": "#64748b", "xtick.color": INK, "ytick.color": INK,
    "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 10,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": FAINT,
    "axes.axisbelow": True, "legend.frameon": False, "lines.linewidth": 1.8,
}


def save_plot(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path)
    plt.close(figure)


def human_bytes(count: float) -> str:
    """1234567 -> "1.23 MB" (decimal units)."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.0f} GB" if count >= 999.5 else f"{count:.3g} GB"


def human_seconds(seconds: float) -> str:
    """0.0612 -> "61.2 ms"."""
    if seconds < 0.9995e-3:
        return f"{seconds * 1e6:.3g} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.9995 else f"{seconds:.3g} s"
