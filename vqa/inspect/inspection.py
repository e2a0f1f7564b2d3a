"""The effect of one or two questions on the network: answers, attention, and the modulation of every channel."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vqa.cbn import Modulation
from vqa.inspect.html import NEARLY_SHUT, inspection_view, write_page
from vqa.io.errors import printable
from vqa.io.files import as_cell, write_csv, write_json
from vqa.io.images import ImageSource, read_image
from vqa.norms import ModulatedAdaptiveNorm2d
from vqa.saved_model import SavedModel
from vqa.tasks.objects import Box, crop_region
from vqa.text.tokenizer import words

_VALUES = ("gamma", "beta", "delta_gamma", "delta_beta", "gain")  # of each channel


def inspect(
    saved: SavedModel, image: Path, questions: Sequence[str], box: Box | None = None, category: str | None = None
) -> dict[str, Any]:
    """The content of `modulation.json`: the model, and a reading of each question (one, or two to compare).

    A model that is asked about an object names its `box` and `category`, and the `crop` that it sees.

    Raises:
        InputError: as `SavedModel.ask`.
    """
    readings = [read(saved, image, question, box, category) for question in questions]
    asked_about: dict[str, Any] = {}
    if (made := saved.settings.guesswhat) is not None:
        asked_about = {"box": None if box is None else list(map(float, box)), "category": category}
        if "crop" in saved.settings.inputs:
            asked_about["crop"] = crop_region(box, *read_image(image).size, made.crop_factor)
    return {
        "image": image.name.encode("utf-8", "replace").decode(),  # a file name may hold any bytes
        "model": {
            "backbone": saved.settings.backbone.name,
            "stages": list(saved.settings.cbn.stages),
            "condition": saved.settings.cbn.condition,
            "image_size": saved.preprocessing.size,
            **{"trained_on": [], "epoch": None, "val_overall": None, "recalibrated_on": "", **saved.training},
        },
        **asked_about,
        "readings": readings,
    }


def read(
    saved: SavedModel, image: ImageSource, question: str, box: Box | None = None, category: str | None = None
) -> dict[str, Any]:
    """Inspect one question; `SavedModel.inspect` says what is returned."""
    image = read_image(image)
    modulated, plain = (
        saved.run(image, question, modulate=modulate, box=box, category=category) for modulate in (True, False)
    )
    attention = modulated.attention
    return {
        "question": question,
        "words": words(saved.tokenizer, question),
        "unknown_words": saved.unknown_words(question),
        "answers": saved.top_answers(modulated),
        "answers_without_modulation": saved.top_answers(plain),
        **({} if attention is None else {"attention": attention[0].float().tolist()}),
        "layers": _layers(saved, modulated.modulation) if modulated.modulation else [],
    }


def write_inspection(inspection: dict[str, Any], folder: Path, image: Path) -> None:
    """Write `modulation.json`, `modulation.csv` and `report.html`."""
    write_json(folder / "modulation.json", inspection, indent=None)
    columns = ("question", "layer", "stage", "channel", *_VALUES)
    write_csv(folder / "modulation.csv", columns, _channel_rows(inspection["readings"]))
    write_page(folder / "report.html", "inspection.html", view=inspection_view(inspection, read_image(image)))


def summary(inspection: dict[str, Any]) -> str:
    """Lines for a terminal: the best answer to each question, the layers with the largest deltas and differences."""
    lines, readings = [], inspection["readings"]
    for reading in readings:
        best = reading["answers"][0]
        lines.append(printable(f"{reading['question']}  {best['answer']} ({100 * best['probability']:.1f} %)"))
        for size, layer in _largest([_deltas(layer) for layer in reading["layers"]], reading["layers"]):
            lines.append(
                f"  {layer['name']}: mean |Δγ| + |Δβ| {size:.3f}, {layer['sign_flips']} sign flips and "
                f"{layer['nearly_shut']} nearly shut of {layer['channels']} channels"
            )
        if not reading["layers"]:
            lines.append("  this model conditions no norm: there is no modulation to show")
    if len(readings) == 2 and (layers := readings[0]["layers"]):
        pairs = zip(layers, readings[1]["layers"], strict=True)
        largest = _largest([_deltas(one) - _deltas(other) for one, other in pairs], layers)
        told = ", ".join(f"{layer['name']} {size:.3f}" for size, layer in largest)
        lines.append(f"difference of the two, mean |Δγ| + |Δβ|: {told}")
    return "\n".join(lines)


def _deltas(layer: dict[str, Any]) -> np.ndarray:
    """Δγ and Δβ, [2, C]."""
    return np.array([layer["delta_gamma"], layer["delta_beta"]])


def _largest(deltas: Sequence[np.ndarray], layers: Sequence[dict[str, Any]]) -> list[tuple[float, dict[str, Any]]]:
    """The three layers whose deltas [2, C] have the largest mean |Δγ| + |Δβ|, with it."""
    sizes = (float(np.abs(of_layer).sum(0).mean()) for of_layer in deltas)
    return sorted(zip(sizes, layers, strict=True), key=lambda pair: -pair[0])[:3]


def _layers(saved: SavedModel, modulation: Modulation) -> list[dict[str, Any]]:
    """The conditioned norms; an adaptive one as the batch norm that it equals."""
    resnet = saved.model.resnet
    widths = [layer.channels for layer in resnet.layers]
    zeros = torch.zeros(1, sum(widths))  # of a part that is not predicted
    deltas = [(zeros if part is None else part)[0].split(widths) for part in (modulation.gamma, modulation.beta)]
    described = []
    for layer, *of_layer in zip(resnet.layers, *deltas, strict=True):
        norm = resnet.norm(layer.name)
        gamma, beta, share = norm.weight, norm.bias, 1.0
        if isinstance(norm, ModulatedAdaptiveNorm2d):
            (gamma, beta), share = norm.folded(), norm.b.item()
        parts = (gamma, beta, *(share * part for part in of_layer))
        values = [value.detach().float().cpu().numpy() for value in parts]
        described.append(
            {"name": layer.name, "stage": layer.stage, "channels": layer.channels, **describe_channels(*values)}
        )
    return described


def describe_channels(
    gamma: np.ndarray, beta: np.ndarray, delta_gamma: np.ndarray, delta_beta: np.ndarray
) -> dict[str, Any]:
    """Describe the effect of deltas on a norm; all arguments are [C].

    Returns:
        The arguments as lists; `gain` = (γ + Δγ) / γ, None where γ is 0; `sign_flips`, the number of channels with a
        negative gain; `nearly_shut`, the number of channels with |gain| below NEARLY_SHUT.
    """
    defined = gamma != 0
    nan = np.full(gamma.shape, np.nan)  # float64: a quotient of a tiny γ stays finite
    gain = np.divide(gamma + delta_gamma, gamma, out=nan, where=defined, dtype=np.float64)
    return {
        "gamma": _rounded(gamma),
        "beta": _rounded(beta),
        "delta_gamma": _rounded(delta_gamma),
        "delta_beta": _rounded(delta_beta),
        "gain": [value if known else None for value, known in zip(_rounded(gain), defined.tolist(), strict=True)],
        "sign_flips": int((gain < 0).sum()),
        "nearly_shut": int((np.abs(gain) < NEARLY_SHUT).sum()),
    }


def _rounded(values: np.ndarray) -> list[float]:
    """Round to seven significant digits, the precision of float32."""
    return [float(f"{value:.7g}") for value in values.tolist()]


def _channel_rows(readings: Sequence[dict[str, Any]]) -> Iterator[list[Any]]:
    for reading in readings:
        for layer in reading["layers"]:
            for channel, values in enumerate(zip(*(layer[key] for key in _VALUES), strict=True)):
                yield [as_cell(reading["question"]), layer["name"], layer["stage"], channel, *values]
