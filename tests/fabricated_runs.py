"""Made-up run directories of a suite: what trainings and tests leave behind, without training."""

import csv
import json

import numpy as np

from experiments.report.page import write_report
from experiments.suite import load_suite
from tests.conftest import ROOT

SUITE = """\
title: Which stages, by how much
recipe: {root}/config/demo.yaml
seeds: [1, 2, 3]
baseline: none
order: [none, last, all]
contrasts: {{all: [last, none]}}
paper: VQA v1, accuracy on val
runs:
  none: {{settings: "cbn.stages=[]", paper: {{overall: 56.12}}}}
  last: {{settings: "cbn.stages=[4] train.epochs=2", paper: {{overall: 57.68, number: 36.5}}}}
  all: {{paper: {{overall: 58.56}}}}
not_run:
  MCB | ResNet-152: {{overall: 62.5}}
"""
ALWAYS_RIGHT, OFTEN_RIGHT, NEVER_RIGHT = [1.0] * 8, [1, 1, 0.6, 1, 1, 0.3, 1, 1], [0.0] * 8


def suite_of(folder, text):
    file = folder / "stages.yaml"
    file.write_text(text.format(root=ROOT))
    return load_suite(file)


def finish(
    suite,
    runs,
    row_name,
    seed,
    accuracies,
    first=0,
    kinds=("how many", "is there"),
    number="number",
    seconds=100.0,
    backbone=None,
    data=None,
    asked=None,
):
    """Writes what training and testing leave behind; question n has the id `first` + n, and every other is a number."""
    row = next(row for row in suite.rows if row.name == row_name)
    folder = runs / row.run.settings[seed].name
    tested = row.test.folder(folder)
    tested.mkdir(parents=True, exist_ok=True)
    epochs = [{"epoch": n, "val_overall": value, "peak_memory_mib": 903.0 - n} for n, value in ((1, 40.0), (2, 39.0))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e | {"seconds": seconds / 2}) + "\n" for e in epochs))
    environment = {
        "torch": "2.15.0",
        "python": "3.11.7",
        "git_commit": "0123456789abcdef-dirty",
        "device": "cpu",
        "cpu": "EPYC",
    }
    environment |= {"processes": 1, "cpus": 2, "threads": 2, "trained_parameters": 1058002}
    environment |= {"backbone": backbone, "data": data}
    (folder / "environment.json").write_text(json.dumps(environment))
    row.run.settings[seed].save(folder / "config.yaml")
    values = np.array(accuracies, float)
    np.savez(tested / "accuracies_val.npz", ids=np.arange(first, first + len(values)), accuracies=values)
    by_kind = {kind: 100 * values[n :: len(kinds)].mean() for n, kind in enumerate(kinds[: len(values)])}
    types = {number: 100 * values[::2].mean(), "yes/no": 100 * values[1::2].mean()}
    scores = {"overall": 100 * values.mean(), "per_answer_type": types, "per_question_type": by_kind}
    (tested / "metrics_val.json").write_text(json.dumps({"questions": len(values), "asked": asked} | scores))


def report(suite, runs):
    """Writes the report of a suite into `runs/out`; returns what is told and the page."""
    told = write_report(suite, runs, runs / "out")
    return told, (runs / "out" / f"{suite.report_name}.md").read_text()


def lines_by_row(file):
    return {line["row"]: line for line in csv.DictReader(file.open())}
