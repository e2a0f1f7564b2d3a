"""One question about one image: its answers, and what it did to every channel of the network."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vqa.cbn import Modulation
from vqa.inspect.html import NEARLY_SHUT
from vqa.inspect.html import write_inspection as write_report
from vqa.io.errors import InputError, printable
from vqa.io.files import as_cell, write_json, written_whole
from vqa.io.images import read_image
from vqa.model import Output
from vqa.saved_model import Bundle
from vqa.text.tokenizer import UNKNOWN_ID, encode, unusable, words


def ask(bundle: Bundle, image: Path, question: str, top: int = 5) -> list[dict[str, Any]]:
    """The most probable answers to a question, each `answer` and `probability` (0 to 1), most probable first.

    Raises:
        InputError: the question holds no word, or the image cannot be read.
    """
    return _top_answers(bundle, run_question(bundle, image, question), top)


@torch.inference_mode()
def run_question(bundle: Bundle, image: Path, question: str, *, modulate: bool = True) -> Output:
    """The model's output for one question on one image (B = 1). Raises InputError as `ask` does, and where the model's
    scores are not finite.
    """
    if reason := unusable(question):
        raise InputError(f"question: {reason}")
    if not words(bundle.tokenizer, question):
        raise InputError(f"question: {question!r} holds no word")
    device = next(bundle.model.parameters()).device
    tokens, lengths = (torch.from_numpy(part).long().to(device) for part in encode(bundle.tokenizer, [question]))
    pixels = torch.from_numpy(bundle.preprocessing.decode(image).copy())[None].to(device)
    output = bundle.model(bundle.preprocessing.normalise(pixels), tokens[None], lengths, modulate=modulate)
    if not output.logits.isfinite().all():
        raise InputError(f"{bundle.folder}: the model's scores of the answers are not finite; its weights are damaged")
    return output


def unknown_words(bundle: Bundle, question: str) -> list[str]:
    """The words of a question that the model has never met in training."""
    known = bundle.tokenizer.get_vocab()
    return [word for word in words(bundle.tokenizer, question) if known.get(word, UNKNOWN_ID) == UNKNOWN_ID]


def inspect(bundle: Bundle, image: Path, questions: Sequence[str], top: int = 5) -> dict[str, Any]:
    """Everything `modulation.json` holds: for each question its answers, attention, and each norm's γ, β and deltas.

    Args:
        bundle: a trained model.
        image: an image file.
        questions: one question, or two to compare.
        top: answers listed.

    Raises:
        InputError: as `ask`.
    """
    return {
        "image": image.name.encode("utf-8", "replace").decode(),  # a file's name may be of any bytes
        "model": {
            "backbone": bundle.settings.backbone.name,
            "stages": list(bundle.settings.cbn.stages),
            "image_size": bundle.preprocessing.size,
            **{"trained_on": [], "epoch": None, "val_overall": None, **bundle.training},
        },
        "readings": [_reading(bundle, image, question, top) for question in questions],
    }


def write_inspection(inspection: dict[str, Any], folder: Path, image: Path) -> None:
    """Writes `modulation.json`, `modulation.csv` and `report.html`."""
    write_json(folder / "modulation.json", inspection, indent=None)
    _write_csv(folder / "modulation.csv", inspection["readings"])
    write_report(folder / "report.html", inspection, read_image(image))


def summary(inspection: dict[str, Any]) -> str:
    """A few lines for a terminal: the best answer to each question, and the layers it moves most."""
    lines = []
    for reading in inspection["readings"]:
        best = reading["answers"][0]
        lines.append(printable(f"{reading['question']}  {best['answer']} ({100 * best['probability']:.1f} %)"))
        moved = [
            (float(np.mean(np.abs(layer["delta_gamma"]) + np.abs(layer["delta_beta"]))), layer)
            for layer in reading["layers"]
        ]
        for size, layer in sorted(moved, key=lambda pair: -pair[0])[:3]:
            lines.append(
                f"  {layer['name']}: mean |Δγ| + |Δβ| {size:.3f}, {layer['sign_flips']} sign flips and "
                f"{layer['nearly_shut']} nearly shut of {layer['channels']} channels"
            )
        if not moved:
            lines.append("  this model conditions no norm: there is no modulation to show")
    return "\n".join(lines)


def _reading(bundle: Bundle, image: Path, question: str, top: int) -> dict[str, Any]:
    heard = run_question(bundle, image, question)
    deaf = run_question(bundle, image, question, modulate=False)
    return {
        "question": question,
        "words": words(bundle.tokenizer, question),
        "unknown_words": unknown_words(bundle, question),
        "answers": _top_answers(bundle, heard, top),
        "answers_without_modulation": _top_answers(bundle, deaf, top),
        "attention": heard.attention[0].float().tolist(),
        "layers": _layers(bundle, heard.modulation) if heard.modulation else [],
    }


def _top_answers(bundle: Bundle, output: Output, top: int) -> list[dict[str, Any]]:
    best = output.logits[0].float().softmax(0).topk(min(top, len(bundle.answers)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [{"answer": bundle.answers[place], "probability": value} for place, value in pairs]


def _layers(bundle: Bundle, modulation: Modulation) -> list[dict[str, Any]]:
    resnet = bundle.model.resnet
    widths = [layer.channels for layer in resnet.layers]

    def per_layer(part: Tensor | None) -> list[np.ndarray]:
        part = torch.zeros(1, sum(widths)) if part is None else part.float().cpu()
        return [columns.numpy() for columns in part[0].split(widths)]

    described = []
    for layer, delta_gamma, delta_beta in zip(
        resnet.layers, per_layer(modulation.gamma), per_layer(modulation.beta), strict=True
    ):
        norm = resnet.norm(layer.name)
        gamma, beta = (value.detach().float().cpu().numpy() for value in (norm.weight, norm.bias))
        described.append({"name": layer.name, "stage": layer.stage, "channels": layer.channels})
        described[-1] |= describe_channels(gamma, beta, delta_gamma, delta_beta)
    return described


def describe_channels(
    gamma: np.ndarray, beta: np.ndarray, delta_gamma: np.ndarray, delta_beta: np.ndarray
) -> dict[str, Any]:
    """What deltas do to a norm; all arguments are [C].

    Returns:
        The arguments as lists; `gain` = (γ + Δγ) / γ, None where γ is 0; `sign_flips`, channels whose gain is negative;
        `nearly_shut`, channels whose gain is nearer to 0 than NEARLY_SHUT.
    """
    open_ = gamma != 0
    gain = np.divide(gamma + delta_gamma, gamma, out=np.full_like(gamma, np.nan), where=open_)
    return {
        "gamma": _rounded(gamma),
        "beta": _rounded(beta),
        "delta_gamma": _rounded(delta_gamma),
        "delta_beta": _rounded(delta_beta),
        "gain": [value if known else None for value, known in zip(_rounded(gain), open_.tolist(), strict=True)],
        "sign_flips": int((gain < 0).sum()),
        "nearly_shut": int((np.abs(gain) < NEARLY_SHUT).sum()),
    }


def _rounded(values: np.ndarray) -> list[float]:
    """Seven significant digits: what a float32 holds."""
    return [float(f"{value:.7g}") for value in values.tolist()]


def _write_csv(file: Path, readings: Sequence[dict[str, Any]]) -> None:
    """A row a question and channel."""
    columns = ("gamma", "beta", "delta_gamma", "delta_beta", "gain")
    with written_whole(file) as aside, aside.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["question", "layer", "stage", "channel", *columns])
        for reading in readings:
            for layer in reading["layers"]:
                for channel, values in enumerate(zip(*(layer[column] for column in columns), strict=True)):
                    writer.writerow([as_cell(reading["question"]), layer["name"], layer["stage"], channel, *values])
