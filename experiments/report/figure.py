"""The figure of a suite: a line for each row, a dot for each seed."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from experiments.report.results import Line
from vqa.io.files import written_whole

INK, SOFT, GRID = "#1c2430", "#5b6675", "#e3e6ea"
ACCENT = "#0f766e"  # differs from the grey in lightness too, so that no information is in the hue alone


def write_figure(file: Path, title: str, lines: Sequence[Line], baseline: str) -> None:
    """Plot the overall accuracies of the lines of `SUITE_runs.csv` into a PNG file."""
    # a name may hold dollar signs
    with matplotlib.rc_context({"text.parse_math": False}), written_whole(file) as aside:
        draw(title, lines, baseline).savefig(aside, format="png", dpi=160, metadata={"Software": None})


def draw(title: str, lines: Sequence[Line], baseline: str) -> Figure:
    """The figure: rows from top to bottom in the order of the lines, the baseline in grey with a dashed line."""
    rows: dict[str, list[float]] = {}
    for line in lines:
        rows.setdefault(line["row"], []).append(line["overall"])
    figure = Figure(figsize=(8, 1.25 + 0.42 * len(rows)), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
    axes = figure.add_subplot()
    for place, (name, values) in enumerate(rows.items()):
        colour = SOFT if name == baseline else ACCENT
        mean = round(float(np.mean(values)), 4)  # as in the table
        # seeds one below the other, so that equal ones stay visible
        offsets = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else np.zeros(1)
        axes.plot([mean, mean], [place - 0.34, place + 0.34], color=colour, linewidth=2.5, solid_capstyle="butt")
        axes.scatter(values, place + offsets, s=26, color=colour, alpha=0.55, linewidths=0, zorder=3)
        axes.annotate(
            f"{mean:.2f}", (1.015, place), xycoords=("axes fraction", "data"), va="center_baseline", color=INK
        )
        if name == baseline:
            axes.axvline(mean, color=SOFT, linewidth=0.9, linestyle=(0, (4, 4)), zorder=1)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.margins(x=0.04)
    dashed = f", dashed: the mean of {baseline}" if baseline in rows else ""
    axes.set_xlabel(f"accuracy, %  (dot: one seed, bar and number: mean{dashed})", color=SOFT)
    figure.suptitle(title, x=0.015, ha="left", color=INK, fontsize=11, fontweight="bold", wrap=True)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelcolor=INK)
    axes.spines[:].set_visible(False)
    return figure
