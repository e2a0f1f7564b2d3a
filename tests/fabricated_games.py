"""GuessWhat?! in miniature: a folder in the official format, drawn and written by the tests."""

import gzip
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from data.guesswhat.source import GuessWhatSource
from data.vqa_files import SplitFiles

SIZES = ((64, 48), (48, 64), (50, 37))  # width x height
MODES = {4: "L", 7: "CMYK"}  # of some of the JPEG files
CATEGORIES = {1: "person", 3: "car", 17: "cat", 62: "chair", 90: "toothbrush"}
COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (50, 60, 200)}
IMAGES = {"train": range(8), "valid": range(7, 10), "test": range(10, 12)}  # train and valid share one
GAMES = {"train": 20, "valid": 7, "test": 6}
STATUS = ("success", "success", "failure", "success", "incomplete")
RECIPE = """\
base: {root}/config/guesswhat/cbn.yaml
name: oracle
device: cpu
workers: 0
data: {{folder: {games}, h5: {folder}/games.h5, image_size: 32, min_word_count: 1, processes: 1, cache_gib: 0}}
backbone: {{name: resnet10, weights: none}}
cbn: {{hidden_size: 4}}
question: {{embedding_size: 8, hidden_size: 12}}
answer: {{hidden_size: 16}}
guesswhat: {{category_size: 6}}
train: {{epochs: 1, batch_size: 12, tensorboard: false}}
"""


def write_games(folder: Path) -> Path:
    """Writes `images/` and `guesswhat.{train,valid,test}.jsonl.gz`; the same at each call."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(5)
    images = [_draw(folder / "images", number, rng) for number in range(12)]
    for split, count in GAMES.items():
        first = {"train": 0, "valid": 100, "test": 200}[split]
        games = [_game(first + n, images[IMAGES[split][n % len(IMAGES[split])]], rng) for n in range(count)]
        write_lines(folder / f"guesswhat.{split}.jsonl.gz", games)
    return folder


def write_lines(file: Path, games) -> None:
    """Writes games, or lines as they are; packed if the name ends so."""
    lines = (game if isinstance(game, bytes) else json.dumps(game).encode() for game in games)
    content = b"".join(line + b"\n" for line in lines)
    file.write_bytes(gzip.compress(content, mtime=0) if file.suffix == ".gz" else content)


def read_lines(file: Path) -> list[dict]:
    """The games of such a file."""
    content = file.read_bytes()
    content = gzip.decompress(content) if file.suffix == ".gz" else content
    return [json.loads(line) for line in content.splitlines()]


def _draw(folder: Path, number: int, rng) -> dict:
    """One image with two to four coloured boxes, as the files describe it."""
    width, height = SIZES[number % len(SIZES)]
    image = Image.fromarray(rng.integers(90, 140, (height, width, 3), np.uint8))
    objects = {}
    for place in range(2 + number % 3):
        w, h = rng.uniform(8, width / 2), rng.uniform(8, height / 2)
        x, y = rng.uniform(0, width - w), rng.uniform(0, height - h)
        if place == 0:
            x = 0.0  # at the border
        colour = list(COLOURS)[rng.integers(3)]
        ImageDraw.Draw(image).rectangle((x, y, x + w, y + h), fill=COLOURS[colour])
        category = list(CATEGORIES)[rng.integers(5)]
        box = [round(value, 2) for value in (x, y, w, h)]
        objects[str(1000 + 10 * number + place)] = {
            "category": CATEGORIES[category],
            "category_id": category,
            "bbox": box,
            "area": round(w * h, 1),
            "segment": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            "iscrowd": False,
            "colour": colour,
        }
    name = f"COCO_val2014_{number + 500:012d}.jpg"
    image.convert(MODES.get(number, "RGB")).save(folder / name, quality=95)
    return {"id": number + 500, "width": width, "height": height, "file_name": name, "objects": objects}


def _game(number: int, image: dict, rng) -> dict:
    """A game about one object of an image."""
    ids = list(image["objects"])
    target = ids[rng.integers(len(ids))]
    it = image["objects"][target]
    category = CATEGORIES[list(CATEGORIES)[rng.integers(5)]]
    left = it["bbox"][0] + it["bbox"][2] / 2 < image["width"] / 2
    asked = [
        (f"Is it a {category}?", it["category"] == category),
        ("Is it in the left half?", left),
        ("Is it red?", it["colour"] == "red"),
        ("is it green", it["colour"] == "green"),
        ("Does the chair's owner like it?", None),
    ]
    chosen = sorted(rng.choice(len(asked), 2 + number % 3, replace=False).tolist())
    answers = {True: "Yes", False: "No", None: "N/A"}
    qas = [{"id": 10 * number + n, "q": asked[n][0], "a": answers[asked[n][1]]} for n in chosen]
    url = f"http://mscoco.org/images/{image['id']}"
    return {
        "dialogue_id": number,
        "questioner_id": 3,
        "timestamp": "2016-07-08 15:05:39",
        "status": STATUS[number % len(STATUS)],
        "picture_id": image["id"],
        "picture": {key: image[key] for key in ("width", "height", "file_name")} | {"coco_url": url},
        "object_id": int(target),
        "objects": image["objects"],
        "qas": qas,
    }


NAMES = {"train": "train", "val": "valid", "test": "test"}


def split_files(folder: Path, pattern: str = "{file_name}", ending: str = "jsonl.gz") -> dict[str, SplitFiles]:
    images = f"{folder}/images/{pattern}"
    return {name: SplitFiles(folder / f"guesswhat.{file}.{ending}", None, images) for name, file in NAMES.items()}


def source(status=("success",), factor=1.1, whole=False, categories=None) -> GuessWhatSource:
    return GuessWhatSource(status, factor, ["crop", "image"] if whole else ["crop"], categories)


def asked_in(games: Path, file: str, status=("success",)):
    """Each question of the games of some status with its game, in the file's order."""
    read = read_lines(games / f"guesswhat.{file}.jsonl.gz")
    return [(game, asked) for game in read if game["status"] in status for asked in game["qas"]]


def target(game) -> dict:
    return game["objects"][str(game["object_id"])]


def edited(file: Path, number: int, edit) -> None:
    """Changes the game in a line, counted from 1."""
    games = read_lines(file)
    edit(games[number - 1])
    write_lines(file, games)
