"""Compare the features of networks stage by stage (figures 4 to 7 of the paper): accuracies, points and figures.

The accuracies show at which stage the features depend on the question, not how well it is answered: in a modulated
network the question itself separates them.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from data.question_table import QuestionTable
from experiments.features.figure import write_scatter
from experiments.features.neighbours import FOLDS, labellings, main_answers, neighbour_accuracy, project
from experiments.features.networks import STAGES, networks_of, open_runs, select_pairs, stage_features
from experiments.tables import aligned, write_lines
from vqa.io.files import as_cell, write_csv, write_json
from vqa.io.locks import held
from vqa.io.progress import progress

_POINTS = ("network", "stage", "question_id", "x", "y", "answer_type", "question_type", "answer")

Stages = dict[tuple[str, int], np.ndarray]  # an array [N, …] for each network (by its name) and stage


def compare_features(
    folders: Sequence[Path], split: str, out: Path, overrides: Sequence[str] = (), *, pairs: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Write `neighbours.json` and `.csv`, `points.csv`, and `answer_type.png`, `question_type.png`, `colour.png`.

    Args:
        folders: run directories, or `model/` directories (`networks_of` chooses the networks).
        split: a split of the data, with annotations.
        out: the directory of the files.
        overrides: `key=value` words over the models' settings: where the data are, and the device.
        pairs: number of random pairs of an image and a question, the same for all networks; at most the whole split.
        seed: of the pairs, the folds and t-SNE. On one machine the same seed makes the same files.

    Returns:
        The content of `neighbours.json`; its `accuracies` (percent) have an entry per labelling, network and stage.

    Raises:
        InputError: a run, the split or its data are missing; runs have different questions or ResNets; the split has
            too few pairs or no annotations; or another process writes to `out`.
    """
    runs = select_pairs(open_runs(folders, split, overrides), split, pairs, seed)
    networks = networks_of(runs)
    with held(out / ".features.lock", out):  # also ends at once if nothing can be written there
        features = {
            (network.name, stage): of_stage
            for network in networks
            for stage, of_stage in zip(STAGES, stage_features(network), strict=True)
        }
        table = runs[0].data.table
        classes = labellings(table)
        comparison = {
            "split": split,
            "pairs": len(table),
            "seed": seed,
            "folds": FOLDS,
            "networks": [
                {"name": network.name, "run": network.run.name, "modulated": network.modulate} for network in networks
            ],
            "accuracies": [
                {"labelling": labelling, "network": name, "stage": stage, **found}
                for labelling, labels in classes.items()
                for (name, stage), of_stage in features.items()
                if (found := neighbour_accuracy(of_stage, labels, table.images, seed))
            ],
        }
        of_stages = progress(features.items(), len(features), "t-SNE")
        points = {place: project(of_stage, seed) for place, of_stage in of_stages}
        write_json(out / "neighbours.json", comparison)
        write_lines(out / "neighbours.csv", comparison["accuracies"])
        write_csv(out / "points.csv", _POINTS, _point_rows(points, table))
        for labelling, labels in classes.items():
            if len(set(labels)) > 1:
                _draw(out / f"{labelling.replace(' ', '_')}.png", labelling, labels, points, comparison)
        return comparison


def accuracy_table(comparison: Mapping[str, Any]) -> str:
    """The accuracies as a table for a terminal."""
    rows = [["", *(f"stage {stage}" for stage in STAGES)]]
    heading = itemgetter("labelling", "classes", "chance")
    for (labelling, classes, chance), of_labelling in groupby(comparison["accuracies"], heading):
        rows.append([f"{labelling} ({classes} classes, chance {chance:.1f} %)", *("" for _ in STAGES)])
        for name, of_network in groupby(of_labelling, itemgetter("network")):
            rows.append([f"  {name}", *(f"{entry['accuracy']:.1f}" for entry in of_network)])
    title = f"{comparison['pairs']} pairs of split {comparison['split']}: % right by the nearest neighbours"
    return f"{title}\n{aligned(rows)}"


def _point_rows(points: Stages, table: QuestionTable) -> Iterable[Sequence[Any]]:
    questions = list(zip(table.answer_types, table.question_types, main_answers(table), strict=True))
    for place, of_stage in points.items():
        for id_, (x, y), question in zip(table.ids.tolist(), of_stage.tolist(), questions, strict=True):
            yield *place, id_, f"{x:.5g}", f"{y:.5g}", *map(as_cell, question)


def _draw(file: Path, labelling: str, labels: Sequence[str], points: Stages, comparison: Mapping[str, Any]) -> None:
    pairs, split = comparison["pairs"], comparison["split"]
    title = f"{labelling}: averaged feature maps of {pairs} pairs of split {split} (t-SNE)"
    entries = [entry for entry in comparison["accuracies"] if entry["labelling"] == labelling]
    if entries:
        neighbours, chance = entries[0]["neighbours"], entries[0]["chance"]
        title += f"\n%: right by {neighbours} nearest neighbours (most common class: {chance:.1f} %)"
    notes = {(entry["network"], entry["stage"]): f"{entry['accuracy']:.1f} %" for entry in entries}
    write_scatter(file, points, labels, title, notes)
