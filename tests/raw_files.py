"""Small raw files in the official format, for the tests of what reads them."""

import json
from pathlib import Path

from PIL import Image

from data.preprocess import preprocess
from data.sources import Source
from data.vqa_files import SplitFiles


def write_official(files: SplitFiles, entries, answer_type=lambda _: "other", size=(40, 30)) -> None:
    """Writes questions, annotations and images of (question id, image id, question, answers)."""
    questions = [{"question_id": q, "image_id": i, "question": text} for q, i, text, _ in entries]
    annotations = [
        {
            "question_id": q,
            "image_id": i,
            "question_type": next(iter(text.split()), ""),
            "answer_type": answer_type(q),
            "answers": [{"answer": answer, "answer_id": n} for n, answer in enumerate(answers)],
        }
        for q, i, text, answers in entries
    ]
    files.questions.parent.mkdir(parents=True, exist_ok=True)
    files.questions.write_text(json.dumps({"questions": questions}))
    files.annotations.write_text(json.dumps({"annotations": annotations}))
    for i in {entry[1] for entry in entries}:
        files.image(i).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (i % 256, 0, 100)).save(files.image(i))


def write_split(folder: Path, name: str, entries) -> SplitFiles:
    """Writes such files of a split into a folder that is there."""
    images = str(folder).replace("{", "{{").replace("}", "}}") + f"/{name}_{{image_id:012d}}.png"
    files = SplitFiles(folder / f"{name}_q.json", folder / f"{name}_a.json", images)
    write_official(files, entries)
    return files


TRAIN = [
    (10, 1, "What colour is the cat?", ["black"] * 10),
    (11, 1, "How many cats are there?", ["2"] * 6 + ["two"] * 4),
    (12, 2, "Is it day?", ["yes"] * 7 + ["no"] * 3),
]


VAL = [(20, 3, "What zebra is the cat?", ["lilac"] * 10), (21, 3, "", ["yes"] * 10)]


def make(splits, path, *, answers=10, **changed):
    settings = {
        "source": Source(answers),
        "image_size": 32,
        "min_word_count": 1,
        "skip_bad_images": False,
        "threads": 1,
    }
    preprocess(splits, path, **(settings | changed))


def change(file: Path, edit):
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


ASKED = {  # of each image, by split: questions with the answers of their annotators
    "train2014": [("Is this a cat?", "yes"), ("How many cats are there?", "2"), ("What is the cat doing?", "sleeping")],
    "val2014": [("Is the zebra a cat?", "no"), ("What color is the zebra?", "lilac")],
    "test2015": [("Is it a zebra?", ""), ("What is this?", "")],
}


COCO_IMAGES = {  # image ids by folder, with the mode and size of each JPEG
    "train2014": {9: ("RGB", (64, 48)), 25: ("L", (48, 64)), 30: ("CMYK", (50, 37))},
    "val2014": {42: ("RGB", (37, 50)), 73: ("L", (64, 64))},
    "test2015": {1: ("RGB", (64, 43)), 14: ("CMYK", (48, 64)), 16: ("L", (33, 50))},
}


COLOURS = {"RGB": (200, 40, 40), "L": 90, "CMYK": (200, 20, 20, 30)}


def write_vqa_v2(folder: Path) -> None:
    """Writes VQA v2 in miniature, as its downloads unpack; test-dev is a part of test."""
    folder.mkdir(parents=True)
    for name, images in COCO_IMAGES.items():
        (folder / name).mkdir()
        for i, (mode, size) in images.items():
            Image.new(mode, size, COLOURS[mode]).save(folder / name / f"COCO_{name}_{i:012d}.jpg")
    for name in (*COCO_IMAGES, "test-dev2015"):
        images = COCO_IMAGES.get(name, [1, 14])
        asked = ASKED.get(name, ASKED["test2015"][:1])
        ids = [(1000 * i + n, i, text, answer) for i in images for n, (text, answer) in enumerate(asked)]
        about = {
            "info": {
                "description": "VQA v2.0, in miniature",
                "version": "2.0",
                "year": 2017,
                "contributor": "",
                "url": "",
            },
            "license": {"url": "", "name": ""},
            "data_type": "mscoco",
            "data_subtype": name,
        }
        questions = [{"image_id": i, "question": text, "question_id": q} for q, i, text, _ in ids]
        content = about | {"task_type": "Open-Ended", "questions": questions}
        (folder / f"v2_OpenEnded_mscoco_{name}_questions.json").write_text(json.dumps(content))
        if name.startswith("test"):
            continue
        annotations = [
            {
                "question_type": " ".join(text.lower().split()[:2]),
                "multiple_choice_answer": answer,
                "answers": [
                    {"answer": answer if n < 8 else "maybe", "answer_confidence": "yes", "answer_id": n}
                    for n in range(1, 11)
                ],
                "image_id": i,
                "answer_type": {"yes": "yes/no", "no": "yes/no", "2": "number"}.get(answer, "other"),
                "question_id": q,
            }
            for q, i, text, answer in ids
        ]
        (folder / f"v2_mscoco_{name}_annotations.json").write_text(json.dumps(about | {"annotations": annotations}))


def many(folder, count):
    """A split `train` of that many questions, each on an image of its own."""
    entries = [(n, n, f"what is {n}", ["yes"] * 10) for n in range(count)]
    return {"train": write_split(folder, "train", entries)}


KILLED_IN_A_FLUSH = """
import os, sys
from pathlib import Path
from data.preprocess import preprocess
from data.sources import Source
from data.vqa_files import SplitFiles
import data.preprocess
data.preprocess._IMAGES_A_FLUSH = 16
real, flushes = os.fsync, []
def killed(file):
    flushes.append(1)
    if len(flushes) == int(sys.argv[2]):
        os.kill(os.getpid(), 9)
    real(file)
os.fsync = killed
folder = Path(sys.argv[1])
images = str(folder / "train_{image_id:012d}.png")
splits = {"train": SplitFiles(folder / "train_q.json", folder / "train_a.json", images)}
made = {"image_size": 32, "min_word_count": 1, "skip_bad_images": False, "threads": 1}
preprocess(splits, folder / "data.h5", source=Source(answers=10), **made)
"""
