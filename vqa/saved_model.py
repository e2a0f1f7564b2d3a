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

from vqa.build import build_model
from vqa.io.errors import InputError
from vqa.io.files import read_json, write_json, written_whole
from vqa.io.weight_files import as_safetensors, read_safetensors
from vqa.model import VQAModel
from vqa.preprocessing import Preprocessing
from vqa.settings.recipes import load_saved
from vqa.settings.schema import Settings, difference
from vqa.text.tokenizer import load_tokenizer, save_tokenizer, unusable

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
        InputError: there is none, or it was not made with the settings of the run directory.
    """
    for folder in (run / "model", run):
        if (folder / WEIGHTS).is_file():
            made, asked = folder / "config.yaml", run / "config.yaml"
            if made != asked and asked.exists() and (why := difference(load_saved(made), load_saved(asked))):
                raise InputError(f"{made}: not a model of {asked}: {why}; resume the run, or name the model itself")
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
    answers = _read_answers(folder / "answers.json")
    preprocessing = Preprocessing.load(folder / "preprocessing.json")
    try:
        with torch.device("meta"):  # takes no memory, whatever sizes config.yaml names
            model = build_model(settings, tokenizer.get_vocab_size(), len(answers), pretrained=False)
    except (RuntimeError, OverflowError) as error:
        raise InputError(f"{folder / 'config.yaml'}: no model can be built of it ({error!s:.100})") from None
    training = _load_weights(model, folder / WEIGHTS)
    model.to(device or torch.device("cpu")).eval().requires_grad_(False)
    return Bundle(folder, model, settings, tokenizer, answers, preprocessing, training)


def _read_answers(file: Path) -> list[str]:
    answers = read_json(file)
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise InputError(f"{file}: must be a list of texts")
    for place, answer in enumerate(answers):
        if reason := unusable(answer) or ("" if answer.strip() else "empty"):
            raise InputError(f"{file}: answer {place} is {reason}")
    return answers


def _load_weights(model: VQAModel, file: Path) -> dict[str, Any]:
    """Fills a model that has no memory yet; returns what the file says of the training."""
    try:
        weights, said = read_safetensors(file)
        training = json.loads(said.get("training", "{}"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file}: cannot be read as weights ({error!s:.100})") from None
    expected = model.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        theirs, ours = (tuple(part[name].shape) if name in part else "none" for part in (weights, expected))
        if theirs != ours:
            raise InputError(f"{file}: not the weights of this folder's config.yaml: {name} is {theirs}, not {ours}")
    model.to_empty(device="cpu")
    model.load_state_dict(weights)
    return _checked_facts(training, file)


def _checked_facts(training: Any, file: Path) -> dict[str, Any]:
    """What `save_weights` was given, if it has the form of `Bundle.training`."""
    kinds = {"trained_on": list, "epoch": int, "val_overall": (int, float, type(None)), "recalibrated_on": str}
    if not isinstance(training, dict) or not all(
        isinstance(value, kinds.get(key, ())) for key, value in training.items()
    ):
        raise InputError(f"{file}: its header says nothing of the training that can be read")
    if not all(isinstance(split, str) for split in training.get("trained_on", [])):
        raise InputError(f"{file}: trained_on must be names of splits")
    return training
