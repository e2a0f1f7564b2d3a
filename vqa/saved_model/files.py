"""Write, find and load the files of a trained model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from tokenizers import Tokenizer
from torch import Tensor

from vqa.build import build_model
from vqa.io.errors import InputError, first_line
from vqa.io.files import naming_write_errors, read_json, write_json, written_whole
from vqa.io.weight_files import as_safetensors, read_safetensors
from vqa.model import ConditionedModel
from vqa.preprocessing import Preprocessing
from vqa.saved_model.asking import SavedModel
from vqa.settings.recipes import load_saved
from vqa.settings.schema import Settings, difference
from vqa.text.encoder import CONFIGURATION, check_tokenizer, empty_encoder
from vqa.text.tokenizer import load_tokenizer, save_tokenizer, unusable

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"  # names the files into which `save_pretrained` splits the weights, if asked to
CATEGORIES = "categories.json"
HUB_CONFIGURATION = "question_encoder"  # the key of a text encoder's configuration in `config.json`
HUB_PREFIX = "model."  # of the weights' names in a folder for `transformers`


class Training(BaseModel):
    """How a model was trained, from the metadata of its weights; each entry may be missing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    trained_on: list[str] = []  # splits
    epoch: int = 0  # from 1
    val_overall: float | None = None  # percent
    recalibrated_on: str = ""  # split


def save_companions(
    folder: Path,
    settings: Settings,
    tokenizer: Tokenizer,
    answers: list[str],
    preprocessing: Preprocessing,
    text_encoder: dict[str, Any] | None,
    categories: Sequence[str] = (),
) -> None:
    """Write everything but the weights."""
    with naming_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    settings.save(folder / "config.yaml")
    save_tokenizer(tokenizer, folder)
    write_json(folder / "answers.json", answers)
    if categories:
        write_json(folder / CATEGORIES, list(categories))
    preprocessing.save(folder / "preprocessing.json")
    if text_encoder is not None:
        write_json(folder / CONFIGURATION, text_encoder)


def save_weights(folder: Path, model: ConditionedModel, training: dict[str, Any], prefix: str = "") -> None:
    """Write the weights, their names after `prefix`, whole or not at all."""
    weights = {prefix + name: value for name, value in model.state_dict().items()}
    with written_whole(folder / WEIGHTS) as aside:
        aside.write_bytes(as_safetensors(weights, {"training": json.dumps(training)}))


def weight_files(folder: Path) -> list[Path]:
    """The file of a model's weights, or those that its index names; none where there is no model.

    Raises:
        InputError: the index is malformed.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (index := folder / INDEX).is_file():
        return []
    try:
        return [folder / Path(name).name for name in sorted(set(read_json(index)["weight_map"].values()))]
    except (TypeError, KeyError, AttributeError):
        raise InputError(f"{index}: must name the file of each weight in weight_map") from None


def find_model(run: Path) -> Path:
    """Find the model directory of a run directory; a model directory is returned as it is.

    Raises:
        InputError: the model is missing, or its settings are not those of the run directory.
    """
    for folder in (run / "model", run):
        if weight_files(folder):
            made, asked = settings_file(folder), run / "config.yaml"
            if made != asked and asked.exists() and (why := difference(load_saved(made), load_saved(asked))):
                raise InputError(f"{made}: not a model of {asked}: {why}; resume the run, or name the model itself")
            return folder
    why = f"neither model/{WEIGHTS} nor {WEIGHTS}" if run.exists() else "no such folder"
    raise InputError(f"{run}: no model here ({why}); `train` writes runs/NAME/model")


def download(name: str, **options: Any) -> Path:
    """Download a model from the Hub by its name, once; options as of `snapshot_download`. Raises InputError."""
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*config.yaml", "*model*.safetensors"]
        return Path(snapshot_download(name, allow_patterns=patterns, **options))
    except Exception as error:  # of the name, the network, the access: of several libraries
        why = f"no such folder, and no model of this name could be downloaded ({first_line(error):.100})"
        raise InputError(f"{name}: {why}") from None


def settings_file(folder: Path) -> Path:
    """The file with the settings of a model: `config.yaml`, or the `config.json` of a folder for `transformers`."""
    ours, hub = folder / "config.yaml", folder / "config.json"
    return hub if hub.is_file() and not ours.exists() else ours


def load_model(run: Path, device: torch.device | None = None) -> SavedModel:
    """Load a model from a run directory, a copied `model/` or a folder for `transformers`, ready to answer.

    Raises:
        InputError: a file is missing or broken, or the weights do not fit the settings.
    """
    folder = find_model(run)
    made = settings_file(folder)
    settings = load_saved(made)
    of_transformers = settings.question.encoder == "transformers"
    tokenizer = load_tokenizer(folder, ours=not of_transformers)
    text_encoder = None
    if made.suffix == ".json":
        answers, preprocessing = _hub_answers(made), _hub_preprocessing(folder / "processor_config.json")
    else:
        answers = _checked_texts(read_json(folder / "answers.json"), folder / "answers.json", "answer")
        preprocessing = Preprocessing.load(folder / "preprocessing.json")
    described = made if made.suffix == ".json" else folder / CONFIGURATION
    if of_transformers:
        content = read_json(described)
        text_encoder = content.get(HUB_CONFIGURATION) if described == made else content
        check_tokenizer(tokenizer, text_encoder, str(described))
    categories = []
    if settings.guesswhat is not None:
        categories = _checked_texts(read_json(folder / CATEGORIES), folder / CATEGORIES, "category")
    try:
        with torch.device("meta"):  # allocates nothing, whatever sizes config.yaml names
            sizes = {"answers": len(answers), "categories": len(categories)}
            encoder = empty_encoder(text_encoder, str(described)) if of_transformers else None
            model = build_model(settings, tokenizer.get_vocab_size(), **sizes, pretrained=False, text_encoder=encoder)
    except (RuntimeError, OverflowError) as error:
        raise InputError(f"{made}: no model can be built from it ({error!s:.100})") from None
    training = load_weights(model, folder)
    model.to(device or torch.device("cpu")).eval().requires_grad_(False)
    return SavedModel(folder, model, settings, tokenizer, answers, preprocessing, training, text_encoder, categories)


def _hub_answers(file: Path) -> list[str]:
    """The answers of a `config.json`, where they are `id2label`."""
    names = read_json(file).get("id2label")
    places = list(map(str, range(len(names)))) if isinstance(names, dict) else []
    if not isinstance(names, dict) or names.keys() != set(places):
        raise InputError(f"{file}: id2label must name the answers from 0 on without gaps")
    return _checked_texts([names[place] for place in places], file, "answer")


def _hub_preprocessing(file: Path) -> Preprocessing:
    content = read_json(file)
    try:
        made = content["image_processor"]
        content = {"size": made["size"]["height"], "mean": made["image_mean"], "std": made["image_std"]}
    except (TypeError, KeyError):
        raise InputError(f"{file}: holds no image_processor with size, image_mean and image_std") from None
    return Preprocessing.of(content | {"resize": "bilinear"}, file)


def _checked_texts(texts: Any, file: Path, what: str) -> list[str]:
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{file}: must be a list of texts")
    for place, text in enumerate(texts):
        if reason := unusable(text) or ("" if text.strip() else "empty"):
            raise InputError(f"{file}: {what} {place} is {reason}")
    return texts


def read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the weights of a folder and their metadata. Raises InputError if a file is missing or damaged."""
    weights, metadata = {}, {}
    for part in weight_files(folder) or [folder / WEIGHTS]:
        try:
            tensors, header = read_safetensors(part)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"{part}: cannot be read as weights ({error!s:.100})") from None
        weights |= {name.removeprefix(HUB_PREFIX): value for name, value in tensors.items()}
        metadata |= header
    return weights, metadata


def load_weights(model: ConditionedModel, folder: Path) -> dict[str, Any]:
    """Load the weights of a folder into a model on the meta device; returns how it was trained, entries of `Training`.

    Raises:
        InputError: a file is missing or damaged, or a weight is missing, unknown or of another shape.
    """
    (weights, metadata), file = read_weights(folder), folder / WEIGHTS
    expected = model.state_dict()
    for name in sorted(expected.keys() | weights.keys()):
        theirs, ours = (tuple(part[name].shape) if name in part else "none" for part in (weights, expected))
        if theirs != ours:
            made = settings_file(folder).name
            raise InputError(f"{file}: not the weights of this folder's {made}: {name} is {theirs}, not {ours}")
    model.to_empty(device="cpu").float()  # whatever torch's default type is
    model.load_state_dict(weights)
    try:
        return Training.model_validate_json(metadata.get("training", "{}")).model_dump(exclude_unset=True)
    except ValueError:
        raise InputError(f"{file}: its header does not record how the model was trained") from None
