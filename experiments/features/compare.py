"""Networks compared by their features (figures 4 to 7 of the paper): numbers, points and figures, stage by stage.

The numbers say where the question reaches the features, not how well it is answered: in a modulated network it is the
question itself that moves them apart.
"""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.question_table import QuestionTable
from experiments.features.figure import write_scatter
from experiments.features.neighbours import FOLDS, labellings, main_answers, neighbour_accuracy, project
from experiments.features.networks import STAGES, networks_of, open_runs, show_same_pairs, stage_features
from vqa.io.errors import InputError
from vqa.io.files import as_cell, write_json, written_whole
from vqa.io.progress import progress

_NUMBERS = ("labelling", "network", "stage", "accuracy", "chance", "classes", "pairs", "neighbours")
_POINTS = ("network", "stage", "question_id", "x", "y", "answer_type", "question_type", "answer")

Stages = list[np.ndarray]  # an array [N, …] a stage


def compare_features(
    folders: Sequence[Path], split: str, out: Path, overrides: Sequence[str] = (), *, pairs: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Writes `neighbours.json` and `.csv`, `points.csv`, and `answer_type.png`, `question_type.png`, `colour.png`.

    Args:
        folders: run directories, or `model/` directories (`networks_of` says which networks of them are shown).
        split: a split of the data, with annotations.
        out: where the files are written.
        overrides: `key=value` words over the models' settings: where the data are, and the device.
        pairs: random pairs of an image and a question, the same for all networks; all of the split if it has fewer.
        seed: of the pairs, the folds and t-SNE. On one machine the same seed gives the same files.

    Returns:
        What `neighbours.json` holds; its `accuracies` have an entry a labelling, network and stage, in percent.

    Raises:
        InputError: a run, the split or its data are not there; runs are of different questions or ResNets; the split
            has too few pairs or no annotations.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: must be a directory")
    runs = show_same_pairs(open_runs(folders, split, overrides), split, pairs, seed)
    networks = networks_of(runs)
    features = {network.name: stage_features(network) for network in networks}
    table = runs[0].data.table
    comparison = {
        "split": split,
        "pairs": len(table),
        "seed": seed,
        "folds": FOLDS,
        "networks": [
            {"name": network.name, "run": network.run.name, "modulated": network.modulate} for network in networks
        ],
        "accuracies": _accuracies(features, table, seed),
    }
    points = _points(features, seed)
    write_json(out / "neighbours.json", comparison)
    _write_csv(out / "neighbours.csv", _NUMBERS, (entry.values() for entry in comparison["accuracies"]))
    _write_csv(out / "points.csv", _POINTS, _point_rows(points, table))
    _draw(out, comparison, points, table)
    return comparison


def table_of(comparison: Mapping[str, Any]) -> str:
    """The accuracies as a table for a terminal."""
    names = [network["name"] for network in comparison["networks"]]
    width = max(map(len, names)) + 2
    cells = {(entry["labelling"], entry["network"], entry["stage"]): entry for entry in comparison["accuracies"]}
    lines = [f"{comparison['pairs']} pairs of split {comparison['split']}: % right by the nearest neighbours"]
    lines.append(" " * width + "".join(f"{f'stage {stage}':>9}" for stage in STAGES))
    for labelling in dict.fromkeys(entry["labelling"] for entry in comparison["accuracies"]):
        first = cells[labelling, names[0], STAGES[0]]
        lines.append(f"{labelling} ({first['classes']} classes, chance {first['chance']:.1f} %)")
        for name in names:
            values = "".join(f"{cells[labelling, name, stage]['accuracy']:9.1f}" for stage in STAGES)
            lines.append(f"  {name:<{width - 2}}{values}")
    return "\n".join(lines)


def _accuracies(features: Mapping[str, Stages], table: QuestionTable, seed: int) -> list[dict[str, Any]]:
    entries = []
    for labelling, labels in labellings(table).items():
        for name, stages in features.items():
            for stage, of_stage in zip(STAGES, stages, strict=True):
                if found := neighbour_accuracy(of_stage, labels, table.images, seed):
                    percent = {key: round(100 * getattr(found, key), 2) for key in ("accuracy", "chance")}
                    place = {"labelling": labelling, "network": name, "stage": stage}
                    entries.append(place | found._asdict() | percent)
    return entries


def _points(features: Mapping[str, Stages], seed: int) -> dict[str, Stages]:
    """t-SNE of every network's stages, [N, 2] each."""
    every = [of_stage for stages in features.values() for of_stage in stages]
    projected = (project(of_stage, seed) for of_stage in progress(every, len(every), "t-SNE"))
    return {name: [next(projected) for _ in stages] for name, stages in features.items()}


def _point_rows(points: Mapping[str, Stages], table: QuestionTable) -> Iterable[Sequence[Any]]:
    questions = list(zip(table.answer_types, table.question_types, main_answers(table), strict=True))
    for name, stages in points.items():
        for stage, places in zip(STAGES, stages, strict=True):
            for id_, (x, y), question in zip(table.ids.tolist(), places.tolist(), questions, strict=True):
                yield name, stage, id_, f"{x:.5g}", f"{y:.5g}", *map(as_cell, question)


def _write_csv(file: Path, columns: Sequence[str], rows: Iterable[Iterable[Any]]) -> None:
    with written_whole(file) as aside, aside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(columns)
        writer.writerows(rows)


def _draw(out: Path, comparison: Mapping[str, Any], points: Mapping[str, Stages], table: QuestionTable) -> None:
    """A figure for each labelling that tells pairs apart."""
    for labelling, labels in labellings(table).items():
        if len(set(labels)) < 2:
            continue
        of_labelling = [entry for entry in comparison["accuracies"] if entry["labelling"] == labelling]
        title = f"{labelling}: averaged feature maps of {len(table)} pairs of split {comparison['split']} (t-SNE)"
        if of_labelling:
            first = of_labelling[0]
            title += (
                f"\n%: right by {first['neighbours']} nearest neighbours (most common class: {first['chance']:.1f} %)"
            )
        notes = {name: [""] * len(STAGES) for name in points}
        for entry in of_labelling:
            notes[entry["network"]][entry["stage"] - 1] = f"{entry['accuracy']:.1f} %"
        write_scatter(out / f"{labelling.replace(' ', '_')}.png", points, labels, title, notes)
