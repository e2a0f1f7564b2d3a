"""Run the demo: draw synthetic scenes, then compare the baseline with MODERN on them, by the same code as for VQA.

1. draw scenes and ask questions about them (VQA v1 files);
2. preprocess them into h5;
3. pretrain a small ResNet to name shapes (or classes of photographs), then freeze it;
4. train and evaluate the baseline; 5. MODERN; 6. inspect one question, write `summary.json` and `report.html`.
"""

import json
import os
import shlex
import shutil
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from data.h5_file import Store
from data.preprocess import preprocess
from data.question_table import QuestionTable
from data.vqa_files import read_questions
from experiments.evaluate import evaluate
from experiments.prepare import prepare_backbone, prepare_world, preprocessing_of, split_files
from experiments.tables import aligned
from experiments.tasks.vqa import VQATask, score
from experiments.training.train import train
from vqa.inspect.html import inline_image, inspection_view, signed, write_page
from vqa.inspect.inspection import inspect, write_inspection
from vqa.io.errors import InputError
from vqa.io.files import read_json, write_json
from vqa.io.images import read_image
from vqa.metrics import Scores
from vqa.saved_model import load_model
from vqa.settings.schema import CONDITIONS, Settings

MODELS = ("baseline", "modern")
NAMES = {  # name in summary.json: name on the page, what it is
    "blind": ("blind", "the most common answer to the question, without the image"),
    "baseline": ("baseline", "frozen ResNet"),
    "modern": ("MODERN", "the same ResNet with CBN"),
}
EXAMPLES = 12
EXAMPLE = "example.png"  # the image of the inspected question


def run_demo(settings: Settings, runs: Path = Path("runs")) -> dict[str, Any]:
    """Run the demo into `runs/NAME`; resume one that was interrupted. Of a finished one the page is made again.

    Returns:
        The content of `summary.json`.

    Raises:
        InputError: the settings describe no synthetic scenes or no validation, or a demo of other settings or a file
            of another run is in the way.
    """
    if settings.scenes is None or settings.task != "vqa":
        raise InputError("scenes: the demo needs a VQA recipe with scenes; use config/demo.yaml or a file over it")
    if not settings.cbn.stages:
        raise InputError("cbn.stages: the demo compares MODERN with the baseline, which has []; name a stage or more")
    if settings.train.validate_on is None:
        raise InputError("train.validate_on: the demo shows the accuracy after each epoch; it must be a split")
    started = time.monotonic()
    out = runs / settings.name
    file = out / "summary.json"
    earlier = read_json(file) if file.exists() else {}  # of a finished demo
    if not isinstance(earlier, dict):
        raise InputError(f"{file}: not written by the demo; remove it")
    named, scores = _train_both(settings, runs)
    print("6/6  inspecting one question", flush=True)
    store = Store(Path(settings.data.h5))
    training, table = store.table("train"), store.table("val")
    answers = {model: _answers(out / model, table) for model in MODELS}
    images = _image_files(settings, table)
    rows = _telling_rows(answers, table)
    questions, example = [table.texts[row] for row in rows], out / EXAMPLE
    shutil.copyfile(images[rows[0]], example)
    inspection = inspect(load_model(out / "modern"), example, questions)
    write_inspection(inspection, out / "inspect", example)
    summary = {
        "blind": score(best_blind_answers(training, table), table),
        **scores,
        "difference": round(scores["modern"]["overall"] - scores["baseline"]["overall"], 2),
        "backbone_shapes": named,
        "world": settings.scenes.world,
        "seed": settings.seed,
        "machine": f"{os.cpu_count()} CPU cores, threads: {torch.get_num_threads()}, torch {torch.__version__}",
        "seconds": earlier.get("seconds", round(time.monotonic() - started, 1)),
    }
    ask = ["ask", "--run", str(out / "modern"), "--image", str(example), "--question", questions[0]]
    ask_command = shlex.join(["python", "main.py", *ask])
    content = {
        "questions": len(table),
        "curves": {model: _curve(out / model) for model in MODELS},
        "settings": _described(settings, training, table),
        "examples": _examples(answers, table, images),
        "commands": [
            ask_command,
            f"python main.py eval --run {out / 'baseline'}",
            shlex.join(["python", "main.py", "features", *(f"--run={out / model}" for model in MODELS)]),
        ],
    }
    write_demo(out / "report.html", summary | content, inspection, read_image(example))
    write_json(file, summary)
    print(_comparison(summary))
    print(f"{out / 'report.html'}  ({summary['seconds']:.0f} s)")
    print(f"Ask the model yourself:\n  {ask_command}")
    return summary


def write_demo(path: Path, demo: dict[str, Any], inspection: dict[str, Any], image: Image.Image) -> None:
    """Write the page.

    Args:
        path: the file.
        demo: the content of `summary.json`, `questions` (their number), `curves` (percent per epoch, by model),
            `settings`, `commands` and `examples` (`image`, `question`, `truth`, and the answers of each model).
        inspection: the content of `modulation.json`.
        image: the image of the inspection.
    """
    write_page(
        path,
        "demo.html",
        [Path(__file__).parent / "templates"],
        demo=demo | {"examples": [each | {"image": inline_image(each["image"])} for each in demo["examples"]]},
        models=NAMES,
        gap=signed(demo["modern"]["overall"] - demo["baseline"]["overall"], 1),
        view=inspection_view(inspection, image),
    )


def best_blind_answers(training: QuestionTable, asked: QuestionTable) -> list[str]:
    """For each question the most common training answer to the same text, or to its type if no text is the same.

    With enough training questions no model without the image does better.
    """
    by_text: dict[str, Counter[str]] = defaultdict(Counter)
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    for row in range(len(training)):
        by_text[training.texts[row]].update(training.answers(row))
        by_type[training.question_types[row]].update(training.answers(row))
    known = (by_text.get(text) or by_type[kind] for text, kind in zip(asked.texts, asked.question_types, strict=True))
    return [counts.most_common(1)[0][0] if counts else "" for counts in known]


def _train_both(settings: Settings, runs: Path) -> tuple[float, dict[str, Scores]]:
    """Make the world and the backbone, then both models; finished ones are kept.

    Returns:
        Percent of the held-out images that the backbone names, and the scores of each model.
    """
    print("1/6  drawing scenes, asking questions", flush=True)
    prepare_world(settings)
    print("2/6  preprocessing into h5", flush=True)
    preprocess(**preprocessing_of(settings))
    print("3/6  pretraining the backbone", flush=True)
    named = prepare_backbone(settings)
    print(f"the backbone names {named:.1f} % of its held-out images")
    scores: dict[str, Scores] = {}
    for step, model in enumerate(MODELS, 4):
        print(f"{step}/6  training {model}", flush=True)
        train(_recipe(settings, model), resume=True, runs=runs)
        scores[model] = evaluate(runs / settings.name / model, "val")
    return named, scores


def _recipe(settings: Settings, model: str) -> Settings:
    changes: dict[str, Any] = {"name": f"{settings.name}/{model}"}
    if model == "baseline":
        changes["cbn"] = settings.cbn.model_copy(update={"stages": [], "stem": False})
    return settings.model_copy(update=changes)


def _answers(run: Path, table: QuestionTable) -> list[str]:
    """The answers of a run in the order of the table."""
    answers = {entry["question_id"]: entry["answer"] for entry in read_json(run / "results_val.json")}
    return [answers[id_] for id_ in table.ids.tolist()]


def _image_files(settings: Settings, table: QuestionTable) -> list[Path]:
    """The image file of each question of the table."""
    files = split_files(settings)["val"]
    image_ids = {question.question_id: question.image_id for question in read_questions(files.questions)}
    return [files.image(image_ids[id_]) for id_ in table.ids.tolist()]


def _telling_rows(answers: dict[str, list[str]], table: QuestionTable) -> list[int]:
    """The row of a question that MODERN answers right and the baseline wrong, about a colour if possible
    (any question if there is no such question), and of another question about the same image.
    """
    right = {model: [accuracy == 1 for accuracy in VQATask.accuracies(answers[model], table)] for model in MODELS}
    telling = [right["modern"][row] - right["baseline"][row] for row in range(len(table))]
    chosen = max(range(len(table)), key=lambda row: (telling[row], table.question_types[row] == "what color", -row))
    others = [row for row in range(len(table)) if table.images[row] == table.images[chosen] and row != chosen]
    return [chosen, *others[:1]]


def _described(settings: Settings, training: QuestionTable, table: QuestionTable) -> dict[str, Any]:
    return {
        "training questions": len(training),
        "validation questions": len(table),
        "image size": settings.data.image_size,
        "backbone": settings.backbone.name,
        "conditioned stages": ", ".join(map(str, settings.cbn.stages)),
        "condition": CONDITIONS[settings.cbn.condition],
        "epochs": settings.train.epochs,
        "batch": settings.train.batch_size,
    }


def _examples(answers: dict[str, list[str]], table: QuestionTable, images: list[Path]) -> list[dict[str, Any]]:
    """Questions spread evenly over the table, with their images and the models' answers."""
    return [
        {"image": read_image(images[row]), "question": table.texts[row], "truth": table.answers(row)[0]}
        | {model: answers[model][row] for model in MODELS}
        for row in range(0, len(table), max(len(table) // EXAMPLES, 1))[:EXAMPLES]
    ]


def _curve(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["val_overall"] for line in lines]


def _comparison(summary: dict[str, Any]) -> str:
    rows = [["", "overall", *summary["modern"]["per_question_type"]]]
    for name, (title, _) in NAMES.items():
        values = [summary[name]["overall"], *summary[name]["per_question_type"].values()]
        rows.append([title, *(f"{value:.1f} %" for value in values)])
    return "\n".join(["", aligned(rows), f"MODERN is {summary['difference']:+.1f} points from the baseline", ""])
