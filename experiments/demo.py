"""The demo: synthetic scenes, from drawing them to a comparison of the baseline with MODERN, by the same code as VQA.

1. draw scenes and ask questions about them (VQA v1 files);
2. preprocess them into h5;
3. pretrain a small ResNet to name shapes, then freeze it;
4. train the baseline and MODERN; 5. evaluate both; 6. inspect one question; write `summary.json` and `report.html`.
"""

import json
import os
import shlex
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from data.h5_file import Store
from data.preprocess import preprocess
from data.question_table import QuestionTable
from experiments.demo_page import NAMES, write_demo
from experiments.evaluate import evaluate, question_accuracies, score
from experiments.prepare import prepare_backbone, prepare_world, preprocessing_of, split_files
from experiments.report.tables import aligned
from experiments.training.trainer import train
from vqa.inspect.inspection import inspect, write_inspection
from vqa.io.errors import InputError
from vqa.io.files import read_json, write_json
from vqa.io.images import read_image
from vqa.metrics import Scores
from vqa.saved_model import load_bundle
from vqa.settings.schema import Settings

MODELS = ("baseline", "modern")
EXAMPLES = 12
EXAMPLE = "example.png"  # the image of the inspected question


def run_demo(settings: Settings, runs: Path = Path("runs")) -> dict[str, Any]:
    """Runs the demo into `runs/NAME`; returns what `summary.json` holds.

    A demo that was interrupted goes on; one that was finished is run again.

    Raises:
        InputError: the settings describe no synthetic scenes, or something of another run is in the way.
    """
    if settings.scenes is None:
        raise InputError("scenes: the demo draws its own world; use config/demo.yaml or a file over it")
    started = time.monotonic()
    out = runs / settings.name
    if (out / "summary.json").exists():
        for model in MODELS:
            shutil.rmtree(out / model, ignore_errors=True)
        (out / "summary.json").unlink()

    print("1/6  drawing scenes, asking questions", flush=True)
    prepare_world(settings)
    print("2/6  preprocessing into h5", flush=True)
    preprocess(**preprocessing_of(settings))
    print("3/6  pretraining the backbone to name shapes", flush=True)
    named = prepare_backbone(settings)
    print(f"the shape of {named:.1f} % of held-out objects is named")

    scores: dict[str, Scores] = {}
    for step, model in enumerate(MODELS, 4):
        print(f"{step}/6  training {model}", flush=True)
        train(_recipe(settings, model), resume=True, runs=runs)
        scores[model] = evaluate(out / model, "val")
    store = Store(Path(settings.data.h5))
    table = store.table("val")
    blind = score(best_blind_answers(store.table("train"), table), table)

    print("6/6  inspecting one question", flush=True)
    summary = {
        "blind": blind,
        **scores,
        "difference": round(scores["modern"]["overall"] - scores["baseline"]["overall"], 2),
        "backbone_shapes": named,
        "seed": settings.seed,
        "machine": f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    questions = _write_report(settings, out, summary, table, started)
    summary["seconds"] = round(time.monotonic() - started, 1)
    write_json(out / "summary.json", summary)
    print(_comparison(summary))
    print(f"{out / 'report.html'}  ({summary['seconds']:.0f} s)")
    print("Ask the model yourself:")
    print(f"  {_ask_command(out, questions[0])}")
    return summary


def best_blind_answers(training: QuestionTable, asked: QuestionTable) -> list[str]:
    """For each question the most common training answer to the very same words: no model without the image does better
    where training is large. A question never met gets the most common answer of its type.
    """
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    for row in range(len(training)):
        by_text[training.texts[row]].update(training.answers(row))
        by_type[training.question_types[row]].update(training.answers(row))
    known = (by_text.get(text) or by_type[kind] for text, kind in zip(asked.texts, asked.question_types, strict=True))
    return [counts.most_common(1)[0][0] if counts else "" for counts in known]


def _recipe(settings: Settings, model: str) -> Settings:
    changes: dict[str, Any] = {"name": f"{settings.name}/{model}"}
    if model == "baseline":
        changes["cbn"] = settings.cbn.model_copy(update={"stages": []})
    return settings.model_copy(update=changes)


def _write_report(
    settings: Settings, out: Path, summary: dict[str, Any], table: QuestionTable, started: float
) -> list[str]:
    """Writes the inspection of one question and the report; returns the questions inspected."""
    results = {model: read_json(out / model / "results_val.json") for model in MODELS}
    answers = {model: _in_order(table, entries, "answer") for model, entries in results.items()}
    right = {model: [accuracy == 1 for accuracy in question_accuracies(answers[model], table)] for model in MODELS}
    raw = split_files(settings)["val"]
    files = [raw.image(id_) for id_ in _in_order(table, read_json(raw.questions)["questions"], "image_id")]
    # most telling where MODERN is right about a colour and the baseline is not; any question does for a tiny world
    telling = [right["modern"][row] - right["baseline"][row] for row in range(len(table))]
    chosen = max(range(len(table)), key=lambda row: (telling[row], table.question_types[row] == "what color", -row))
    others = [row for row in range(len(table)) if table.images[row] == table.images[chosen] and row != chosen]
    questions = [table.texts[row] for row in (chosen, *others[:1])]
    example = out / EXAMPLE
    shutil.copyfile(files[chosen], example)
    inspection = inspect(load_bundle(out / "modern"), example, questions)
    write_inspection(inspection, out / "inspect", example)

    examples = []
    for row in range(0, len(table), max(len(table) // EXAMPLES, 1)):
        shown = {"image": read_image(files[row]), "question": table.texts[row], "truth": table.answers(row)[0]}
        examples.append(shown | {model: answers[model][row] for model in MODELS})
    demo = summary | {
        "seconds": round(time.monotonic() - started, 1),
        "questions": len(table),
        "curves": {model: _curve(out / model) for model in MODELS},
        "settings": {
            "training questions": len(Store(Path(settings.data.h5)).table("train")),
            "validation questions": len(table),
            "image size": settings.data.image_size,
            "backbone": settings.backbone.name,
            "epochs": settings.train.epochs,
            "batch": settings.train.batch_size,
        },
        "examples": examples[:EXAMPLES],
        "commands": [
            _ask_command(out, questions[0]),
            f"python main.py eval --run {out / 'baseline'}",
            "python main.py preprocess --config config/daquar.yaml",
        ],
    }
    write_demo(out / "report.html", demo, inspection, read_image(example))
    return questions


def _ask_command(out: Path, question: str) -> str:
    words = ["ask", "--run", str(out / "modern"), "--image", str(out / EXAMPLE), "--question", question]
    return shlex.join(["python", "main.py", *words])


def _in_order(table: QuestionTable, entries: Iterable[dict[str, Any]], key: str) -> list[Any]:
    """What entries with a `question_id` hold under a key, in the order of the table's questions."""
    by_question = {entry["question_id"]: entry[key] for entry in entries}
    return [by_question[id_] for id_ in table.ids.tolist()]


def _curve(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["val_overall"] for line in lines]


def _comparison(summary: dict[str, Any]) -> str:
    rows = [["", "overall", *summary["modern"]["per_question_type"]]]
    for name, (title, _) in NAMES.items():
        values = [summary[name]["overall"], *summary[name]["per_question_type"].values()]
        rows.append([title, *(f"{value:.1f} %" for value in values)])
    return "\n".join(["", aligned(rows), f"MODERN is {summary['difference']:+.1f} points from the baseline", ""])
