"""The `model/` directory: everything needed to answer questions, in one folder that can be copied.

model.safetensors    all weights, the frozen ResNet's included; its header says what it was trained on
config.yaml          the settings
tokenizer.json       the words (tokenizer_config.json beside it lets `transformers` load them)
answers.json         the answer classes, in order
preprocessing.json   what is done to an image
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer

from data.errors import InputError
from data.files import read_json, write_json, written_whole
from data.images import Preprocessing
from data.tokenizer import load_tokenizer, save_tokenizer
from vqa.build import build_model
from vqa.model import VQAModel
from vqa.recipes import load_saved
from vqa.settings import Settings
from vqa.verified import as_safetensors, read_safetensors

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Bundle:
    """A trained model with all that belongs to it."""

    folder: Path
    model: VQAModel
    settings: Settings
    tokenizer: Tokenizer
    answers: list[str]
    preprocessing: Preprocessing
    training: dict[str, Any]  # trained_on: splits, epoch: from 1, val_overall: percent or None


def save_companions(
    folder: Path, settings: Settings, tokenizer: Tokenizer, answers: list[str], preprocessing: Preprocessing
) -> None:
    """Writes everything but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    settings.save(folder / "config.yaml")
    save_tokenizer(tokenizer, folder)
    write_json(folder / "answers.json", answers)
    preprocessing.save(folder / "preprocessing.json")


def save_weights(folder: Path, model: VQAModel, training: dict[str, Any]) -> None:
    """Writes the weights, with `training` in their header, whole or not at all."""
    with written_whole(folder / WEIGHTS) as aside:
        aside.write_bytes(as_safetensors(model.state_dict(), {"training": json.dumps(training)}))


def find_model(run: Path) -> Path:
    """The model directory of a run directory, or the directory itself if it is one.

    Raises:
        InputError: there is none.
    """
    for folder in (run / "model", run):
        if (folder / WEIGHTS).is_file():
            return folder
    raise InputError(f"{run}: no model here (neither model/{WEIGHTS} nor {WEIGHTS}); `train` writes runs/NAME/model")


def load_bundle(run: Path, device: torch.device | None = None) -> Bundle:
    """Loads a model from a run directory or a copied `model/`, ready to answer.

    Raises:
        InputError: a file of it is missing or broken, or the weights do not fit the settings.
    """
    folder = find_model(run)
    settings = load_saved(folder / "config.yaml")
    tokenizer = load_tokenizer(folder)
    answers = read_json(folder / "answers.json")
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f"{folder / 'answers.json'}: must be a list of texts")
    model = build_model(settings, tokenizer.get_vocab_size(), len(answers), pretrained=False)
    training = _load_weights(model, folder / WEIGHTS)
    model.to(device or torch.device("cpu")).eval().requires_grad_(False)
    preprocessing = Preprocessing.load(folder / "preprocessing.json")
    return Bundle(folder, model, settings, tokenizer, answers, preprocessing, training)


def _load_weights(model: VQAModel, file: Path) -> dict[str, Any]:
    try:
        weights, said = read_safetensors(file)
        training = json.loads(said.get("training", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file}: cannot be read as weights ({error!s:.100})") from None
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = " ".join(str(error).split("\n")[1:2]).strip()
        raise InputError(f"{file}: not the weights of this folder's config.yaml: {first:.150}") from None
    return training
