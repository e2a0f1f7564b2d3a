"""Points of many networks and stages as one figure: a row a network, a column a stage, a colour a class."""

from collections import Counter
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from vqa.io.files import written_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito (2008), safe for colour-blind readers; without their yellow, which is lost on white
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000")
OTHERS, OTHERS_COLOUR = "all others", "#bdbdbd"
PANEL = 2.6  # inches
PALETTE = 64  # shades in the file: dots and their smoothed edges need no more


def write_scatter(
    path: Path,
    points: Mapping[str, Sequence[np.ndarray]],
    labels: Sequence[str],
    title: str,
    notes: Mapping[str, Sequence[str]],
) -> None:
    """Writes a PNG that replaces `path` whole or not at all.

    Args:
        path: the file.
        points: for each network by its name, [N, 2] after each stage.
        labels: the class of each of the N points; the most common ones get a colour, the others share grey.
        title: what is shown.
        notes: for each network, a few words in the corner of each stage's panel.
    """
    import matplotlib
    from matplotlib.figure import Figure

    columns = len(next(iter(points.values())))
    colours = class_colours(labels)
    shades = [colours.get(label, OTHERS_COLOUR) for label in labels]
    # a name may hold dollar signs
    with matplotlib.rc_context({"text.parse_math": False}), written_whole(path) as aside:
        figure = Figure(figsize=(PANEL * columns, PANEL * len(points) + 1.1), dpi=150, layout="constrained")
        axes = figure.subplots(len(points), columns, squeeze=False)
        for row, (name, stages) in zip(axes, points.items(), strict=True):
            row[0].set_ylabel(name.replace("/", "/\n"), fontsize=10)
            for panel, places, note in zip(row, stages, notes[name], strict=True):
                panel.scatter(*places.T, s=7, c=shades, linewidths=0, alpha=0.85)
                panel.set(xticks=[], yticks=[])
                panel.margins(0.05)
                panel.spines[:].set_color("#cccccc")
                panel.set_xlabel(note, fontsize=8, color="#444444", labelpad=3)
        for stage, panel in enumerate(axes[0], 1):
            panel.set_title(f"stage {stage}", fontsize=11)
        figure.suptitle(title, fontsize=12)
        _legend(figure, colours, others=len(set(labels)) > len(colours))
        drawn = BytesIO()
        figure.savefig(drawn, format="png")
        Image.open(drawn).convert("RGB").quantize(PALETTE).save(aside, "PNG", optimize=True)  # a quarter of the size


def class_colours(labels: Sequence[str]) -> dict[str, str]:
    """A colour for each class, the most common first (equally common ones in alphabetical order)."""
    ranked = sorted(Counter(labels).items(), key=lambda item: (-item[1], item[0]))
    return {label: colour for (label, _), colour in zip(ranked, COLOURS, strict=False)}


def _legend(figure: "Figure", colours: Mapping[str, str], *, others: bool) -> None:
    from matplotlib.lines import Line2D

    shown = {**colours, OTHERS: OTHERS_COLOUR} if others else colours
    dots = [Line2D([], [], linestyle="", marker="o", markersize=7, color=colour) for colour in shown.values()]
    figure.legend(dots, list(shown), loc="outside lower center", ncols=min(len(shown), 4), fontsize=10, frameon=False)
