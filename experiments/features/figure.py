"""The points of networks and stages as one figure: a row per network, a column per stage, a colour per class."""

from collections import Counter
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from vqa.io.files import written_whole

# Okabe and Ito (2008), safe for colour-blind readers; without their yellow, which is faint on white
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#000000")
OTHERS, OTHERS_COLOUR = "all others", "#bdbdbd"
PANEL = 2.6  # inches
PALETTE = 64  # colours in the file, which is a quarter of the size so; smooth edges of dots need no more


def write_scatter(
    path: Path,
    points: Mapping[tuple[str, int], np.ndarray],
    labels: Sequence[str],
    title: str,
    notes: Mapping[tuple[str, int], str],
) -> None:
    """Write the figure as PNG, whole or not at all.

    Args:
        path: the file.
        points: [N, 2] for each network (by its name) and stage, network by network.
        labels: the class of each of the N points; the most common classes get a colour, the others share grey.
        title: of the figure.
        notes: the text below the panel of a network and stage, if any.
    """
    names, stages = (list(dict.fromkeys(part)) for part in zip(*points, strict=True))
    colours = class_colours(labels)
    shades = [colours.get(label, OTHERS_COLOUR) for label in labels]
    with matplotlib.rc_context({"text.parse_math": False}), written_whole(path) as aside:  # a name may hold a $
        figure = Figure(figsize=(PANEL * len(stages), PANEL * len(names) + 1.1), dpi=150, layout="constrained")
        axes = figure.subplots(len(names), len(stages), squeeze=False)
        for panel, ((name, stage), places) in zip(axes.flat, points.items(), strict=True):
            panel.scatter(*places.T, s=7, c=shades, linewidths=0, alpha=0.85)
            panel.set(xticks=[], yticks=[])
            panel.margins(0.05)
            panel.spines[:].set_color("#cccccc")
            panel.set_xlabel(notes.get((name, stage), ""), fontsize=8, color="#444444", labelpad=3)
            if stage == stages[0]:
                panel.set_ylabel(name.replace("/", "/\n"), fontsize=10)
            if name == names[0]:
                panel.set_title(f"stage {stage}", fontsize=11)
        figure.suptitle(title, fontsize=12)
        shown = colours | ({OTHERS: OTHERS_COLOUR} if len(set(labels)) > len(colours) else {})
        dots = [Line2D([], [], linestyle="", marker="o", markersize=7, color=colour) for colour in shown.values()]
        columns = min(len(shown), 4)
        figure.legend(dots, list(shown), loc="outside lower center", ncols=columns, fontsize=10, frameon=False)
        drawn = BytesIO()
        figure.savefig(drawn, format="png")
        Image.open(drawn).convert("RGB").quantize(PALETTE).save(aside, "PNG", optimize=True)


def class_colours(labels: Sequence[str]) -> dict[str, str]:
    """Colours of the most common classes, most common first, ties in alphabetical order."""
    common = Counter(sorted(labels)).most_common(len(COLOURS))  # equally common ones stay in order
    return {label: colour for (label, _), colour in zip(common, COLOURS, strict=False)}
