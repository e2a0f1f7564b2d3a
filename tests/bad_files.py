"""Files that no command can use, each made where a test asks for it by its name."""

import gzip
import json
import os
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import h5py
import numpy as np
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT
from tests.raw_files import TRAIN, VAL, change, write_split


def png_block(name: bytes, content: bytes) -> bytes:
    """A block of a PNG file."""
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, depth: int, colour: int, pixels: bytes) -> bytes:
    """A PNG with the header that is asked for, whatever the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = png_block(b"IHDR", header) + png_block(b"IDAT", zlib.compress(pixels)) + png_block(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


def laughs(levels: int = 12) -> str:
    """YAML that unfolds into 9^levels values."""
    lines = ["l0: &l0 [x]"] + [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join([*lines, f"data: {{splits: *l{levels - 1}}}\n"])


IMAGES = {
    "empty.png": lambda: b"",
    "text.jpg": lambda: b"no image at all",
    "bomb.png": lambda: png(10_000, 10_000, 1, 0, b"\0"),
}


def image(folder: Path, name: str) -> Path:
    """A file that is not a usable image."""
    file = folder / name
    if name in IMAGES:
        file.write_bytes(IMAGES[name]())
    elif name == "folder.png":
        file.mkdir()
    elif name == "pipe.png":
        os.mkfifo(file)
    elif name == "float.tiff":
        Image.fromarray(np.zeros((8, 8), np.float32)).save(file)
    elif name.startswith("truncated"):
        Image.effect_noise((64, 64), 50).save(file)
        file.write_bytes(file.read_bytes()[:-700])
    return file


RECIPES = {
    "empty": "",
    "list": "- a\n- b\n",
    "laughs": laughs(),
    "upwards": "base: BASE\nname: ../../elsewhere\n",
    "absolute": "base: BASE\nname: /tmp/elsewhere\n",
    "split": "base: BASE\ndata: {splits: {../train: {questions: q, images: i}}}\n",
    "null": 'base: BASE\ndata: {h5: "a\\0b"}\n',
    "base_null": 'base: "a\\0b"\n',
    "base_folder": "base: .\n",
    "infinite": "base: BASE\ntrain: {learning_rate: .inf}\n",
    "fork": "base: BASE\ndata: {processes: 1000000}\n",
    "deep": "a: " + "[" * 1_000,
    "bool": "base: BASE\nseed: !!bool x\n",
    "bracket": "base: BASE\ninputs: [image\n",
    "quote": "base: BASE\nname: 'x\n\n",
}


def recipe(folder: Path, name: str) -> Path:
    """A file that is not a recipe."""
    file = folder / f"{name}.yaml"
    if name == "pipe":
        os.mkfifo(file)
    elif name == "utf16":
        file.write_bytes("name: x\n".encode("utf-16"))
    elif name == "gzip":
        file.write_bytes(gzip.compress(b"name: x\n"))
    else:
        file.write_text(RECIPES[name].replace("BASE", f"{ROOT}/config/base.yaml"))
    return file


SUITE = "title: t\nrecipe: {root}/config/demo.yaml\nseeds: [1]\nbaseline: a\nruns: {{a: {{}}}}\n"
SUITES = {
    "title_list": SUITE.replace("title: t", "title: [t]"),
    "formula": SUITE.replace("baseline: a", "baseline: '=1'").replace("{{a:", "{{'=1':"),
    "line": SUITE.replace("baseline: a", 'baseline: "a\\nb"').replace("{{a:", '{{"a\\nb":'),
    "runless": SUITE.replace("{{a: {{}}}}", "{{}}"),
    "many": SUITE + laughs(),
    "upwards": SUITE.replace("demo.yaml", "absent/../../absent.yaml"),
    "renamed": SUITE.replace("{{a: {{}}}}", "{{a: {{settings: name=../../x}}}}"),
    "recalibrate": SUITE + "tests: {{t: {{recalibrate: ../../x}}}}\n",
}


def suite(folder: Path, name: str) -> Path:
    """A suite that cannot be run."""
    file = folder / f"{name}.yaml"
    file.write_text(SUITES[name].format(root=ROOT) if name != "many" else SUITE.format(root=ROOT) + laughs())
    return file


def _written(content: bytes):
    return lambda files: files.questions.write_bytes(content)


DATA = {
    "text_id": lambda files: change(files.questions, lambda c: c["questions"][0].update(question_id="10")),
    "long_text": lambda files: change(files.questions, lambda c: c["questions"][0].update(question="word " * 10_000)),
    "utf16": lambda files: files.questions.write_bytes(files.questions.read_text().encode("utf-16")),
    "gzip": lambda files: files.questions.write_bytes(gzip.compress(files.questions.read_bytes())),
    "latin1": _written('{"questions": [{"question": "café"}]}'.encode("latin1")),
    "empty": _written(b""),
    "cut": lambda files: files.questions.write_bytes(files.questions.read_bytes()[:-40]),
    "trailing": lambda files: files.questions.write_bytes(files.questions.read_bytes() + b"]"),
    "deep": _written(b'{"questions": ' + b"[" * 200_000),
    "nan": _written(b'{"questions": [{"question_id": NaN}]}'),
    "digits": _written(b'{"questions": [{"question_id": ' + b"9" * 5_000 + b"}]}"),
    "pipe": lambda files: (files.questions.unlink(), os.mkfifo(files.questions)),
    "no_image": lambda files: files.image(1).unlink(),
    "empty_image": lambda files: files.image(1).write_bytes(b""),
}


def data(folder: Path, name: str) -> Path:
    """A recipe over raw files of which the training split's are broken; written beside them."""
    files = {split: write_split(folder, split, entries) for split, entries in (("train", TRAIN), ("val", VAL))}
    DATA[name](files["train"])
    splits = {
        split: {"questions": f.questions.name, "annotations": f.annotations.name, "images": Path(f.images).name}
        for split, f in files.items()
    }
    content = {"base": f"{ROOT}/config/base.yaml", "name": "bad", "workers": 0}
    content["data"] = {"folder": str(folder), "h5": "bad.h5", "image_size": 32, "processes": 1, "splits": splits}
    (folder / "bad.yaml").write_text(json.dumps(content))
    return folder / "bad.yaml"


def model(folder: Path, name: str, trained: Path) -> Path:
    """A copy of a model's directory with one file broken."""
    made = folder / "model"
    shutil.copytree(trained / "model", made)
    weights = made / "model.safetensors"
    if name == "header":
        weights.write_bytes(struct.pack("<Q", 2**40) + b"{}")
    elif name == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif name == "boasting":
        save_file(load_file(weights), weights, {"training": json.dumps({"trained_on": 5})})
    elif name == "enormous":
        config = made / "config.yaml"
        config.write_text(config.read_text().replace("hidden_size: 16", "hidden_size: 65536"))
    elif name == "no_answers":
        (made / "answers.json").write_text("[]")
    elif name == "blank_answer":
        (made / "answers.json").write_text('["yes", " "]')
    elif name == "half_pair":
        (made / "answers.json").write_text('["\\ud800"]')
    elif name == "pipe":
        (made / "answers.json").unlink()
        os.mkfifo(made / "answers.json")
    elif name == "infinite":
        (made / "preprocessing.json").write_text(
            '{"size": 1e999, "mean": [0, 0, 0], "std": [1, 1, 1], "resize": "bilinear"}'
        )
    elif name == "gap":
        content = json.loads((made / "tokenizer.json").read_text())
        word = sorted(content["model"]["vocab"])[-1]
        content["model"]["vocab"][word] = 10**6
        (made / "tokenizer.json").write_text(json.dumps(content))
    return made


def h5(folder: Path, name: str) -> Path:
    """A file in the place of an h5 file."""
    file = folder / f"{name}.h5"
    if name == "text":
        file.write_text("no h5")
    elif name == "folder":
        file.mkdir()
    else:
        with h5py.File(file, "w") as opened:
            opened["x"] = np.zeros(10_000)
        if name == "cut":
            file.write_bytes(file.read_bytes()[:3_000])
    return file


def glove(folder: Path, name: str) -> Path:
    """A file in the place of GloVe vectors."""
    file = folder / f"{name}.zip"
    numbers = " ".join(["0.5"] * 300)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(2 if name == "two" else 1):
            archive.writestr(f"{number}.txt", f"the {numbers}\n" * 50 if name != "nan" else f"the nan{numbers[3:]}\n")
    if name == "damaged":
        whole = bytearray(file.read_bytes())
        whole[50:60] = b"x" * 10
        file.write_bytes(whole)
    if name == "encrypted":
        whole = bytearray(file.read_bytes())
        whole[6] |= 1
        whole[whole.rindex(b"PK\x01\x02") + 8] |= 1
        file.write_bytes(whole)
    return file
