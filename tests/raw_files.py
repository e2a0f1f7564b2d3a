"""Small raw files in the official format, for the tests of what reads them."""

import json
from pathlib import Path

from PIL import Image

from data.preprocess import preprocess
from data.vqa_files import SplitFiles


def write_split(folder: Path, name: str, entries, annotated=True) -> SplitFiles:
    """Writes official files of (question id, image id, question, answers)."""
    questions = [{"question_id": q, "image_id": i, "question": text} for q, i, text, _ in entries]
    annotations = [
        {
            "question_id": q,
            "image_id": i,
            "question_type": next(iter(text.split()), ""),
            "answer_type": "other",
            "answers": [{"answer": answer, "answer_id": n} for n, answer in enumerate(answers)],
        }
        for q, i, text, answers in entries
    ]
    (folder / f"{name}_q.json").write_text(json.dumps({"questions": questions}))
    (folder / f"{name}_a.json").write_text(json.dumps({"annotations": annotations}))
    for i in {entry[1] for entry in entries}:
        Image.new("RGB", (40, 30), (i % 256, 0, 100)).save(folder / f"{name}_{i:012d}.png")
    pattern = str(folder / (name + "_{image_id:012d}.png"))
    return SplitFiles(folder / f"{name}_q.json", folder / f"{name}_a.json" if annotated else None, pattern)


TRAIN = [
    (10, 1, "What colour is the cat?", ["black"] * 10),
    (11, 1, "How many cats are there?", ["2"] * 6 + ["two"] * 4),
    (12, 2, "Is it day?", ["yes"] * 7 + ["no"] * 3),
]
VAL = [(20, 3, "What zebra is the cat?", ["lilac"] * 10), (21, 3, "", ["yes"] * 10)]


def make(splits, path, **changed):
    settings = {"image_size": 32, "min_word_count": 1, "answers": 10, "skip_bad_images": False, "threads": 1}
    preprocess(splits, path, **(settings | changed))


def change(file: Path, edit):
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))
