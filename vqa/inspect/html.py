"""The inspection's page: one HTML file with every image, style and script inline, which loads nothing.

Letters: C channels, H and W map size, G glimpses.
"""

import base64
import io
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image, ImageColor

from vqa.io.files import write_text

STRIP_COLUMNS = 256  # a strip of more channels goes on in further rows, so that every channel stays visible
STRONGEST = 20
PHOTO_SIZE = 480
NEARLY_SHUT = 0.1  # |gain| below which a channel counts as shut

# Safe for colour-blind readers: FLIPPED and SHUT are far from every gain colour under each of the three deficiencies.
LEVELS = 81
GAIN_COLOURS = ("#1f5fa8", "#7fb3d9", "#f7f6f2", "#f5a85c", "#b85a00")
SHIFT_COLOURS = ("#6a3d8f", "#b79cc9", "#f7f6f2", "#8fc497", "#1b7037")
FLIPPED, SHUT, UNDEFINED, PADDING = range(LEVELS, LEVELS + 4)
CLASS_COLOURS = ("#e11a60", "#1a1a1a", "#b4b4b4", "#ffffff")
VEIL = "#1a2150"  # lies over the photograph where the attention is not: blue, as dark parts would not show black
VEIL_SHARE = 0.8


def write_inspection(path: Path, inspection: dict[str, Any], image: Image.Image) -> None:
    """Write what one or two questions did to the network as a page; `path` is replaced in one step.

    The page links to `modulation.json` and `modulation.csv` beside it.

    `inspection` has `image` (its name), `model`, and `readings`: one or two, each with `question`, `words`,
    `unknown_words`, `answers` and `answers_without_modulation` (probabilities from 0 to 1), `attention` [G, H, W], and
    `layers` in order of depth with `gamma`, `beta`, `delta_gamma`, `delta_beta`, `gain` [C] (null where γ is 0).
    ValueError if two readings do not have equally many layers.
    """
    write_page(path, "inspection.html", view=inspection_view(inspection, image))


def write_page(path: Path, template: str, folders: Sequence[Path] = (), **content: Any) -> None:
    """Fill a template of `folders`, which may use the templates beside this module, and replace `path` with it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, Path(__file__).parent / "templates"]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "signed": signed, "percent": percent, "grouped": grouped}
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    write_text(path, environment.get_template(template).render(content))


def number(value: float, decimals: int = 3) -> str:
    """`value` with fixed decimals, or with a power of ten if those would not show it; a dash for what is no number."""
    if np.isnan(value):
        return "–"
    if value == 0 or 0.5 * 10**-decimals <= abs(value) < 1e4:
        return f"{value:.{decimals}f}".replace("-", "−")
    digits, exponent = f"{value:.1e}".split("e")
    power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{digits}×10{power}".replace("-", "−")


def signed(value: float, decimals: int = 3) -> str:
    """As `number`, with a plus sign before what is positive."""
    return ("+" if value > 0 else "") + number(value, decimals)


def percent(share: float) -> str:
    """A share from 0 to 1 as percent with one decimal."""
    return "<\u00a00.1\u00a0%" if 0 < share < 0.0005 else f"{100 * share:.1f}\u00a0%"


def grouped(value: int) -> str:
    """A whole number in groups of three digits, held together by narrow spaces."""
    return f"{value:,}".replace(",", "\u202f")


def inspection_view(inspection: dict[str, Any], image: Image.Image) -> dict[str, Any]:
    """What `_inspection.html` shows; `depth` lists, for each layer, what each question did to it."""
    readings = inspection["readings"]
    depth = [[_arrays(layer) for layer in layers] for layers in zip(*(r["layers"] for r in readings), strict=True)]
    gains = np.concatenate([layer["gain"] for layers in depth for layer in layers] or [np.ones(1)])
    shifts = np.concatenate([layer["delta_beta"] for layers in depth for layer in layers] or [np.zeros(1)])
    gain_span = min(1.0, _span(gains - 1))  # a gain below 0 has its own colour, so the scale ends there
    shift_span = _span(shifts)
    for layer in (layer for layers in depth for layer in layers):
        layer["gain_strip"] = _strip(_gain_levels(layer["gain"], gain_span), GAIN_COLOURS)
        layer["shift_strip"] = _strip(_levels(layer["delta_beta"], 0, shift_span), SHIFT_COLOURS)
    ramp = np.arange(LEVELS)
    return inspection | {
        "photo": inline_image(image),
        "readings": [
            reading | {"letter": letter, "glimpses": [_glimpse(image, np.array(a)) for a in reading["attention"]]}
            for letter, reading in zip("AB", readings, strict=False)
        ],
        "depth": depth,
        "stages": [(stage, len(list(run))) for stage, run in groupby(layers[0]["stage"] for layers in depth)],
        "charts": [_chart(depth, letter) for letter in ("gamma", "beta")] if depth else [],
        "strongest": [
            _strongest([[layers[i]] for layers in depth], [np.abs(layers[i]["delta_gamma"]) for layers in depth])
            for i in range(len(readings))
        ],
        "parting": _parting(depth) if len(readings) > 1 else {},
        "numbers": [
            [[[_short(gain) for gain in layer["gain"]], [_short(b) for b in layer["delta_beta"]]] for layer in layers]
            for layers in depth
        ],
        "spans": {"gain": gain_span, "shift": shift_span},
        "legend": {
            "gain": _strip(ramp, GAIN_COLOURS),
            "shift": _strip(ramp, SHIFT_COLOURS),
            "classes": CLASS_COLOURS,
            "veil": VEIL,
        },
    }


def _arrays(layer: dict[str, Any]) -> dict[str, Any]:
    lists = ("gamma", "beta", "delta_gamma", "delta_beta", "gain")
    arrays = {key: np.array(layer[key], dtype=float) for key in lists}
    defined = arrays["gain"][np.isfinite(arrays["gain"])]
    return layer | {
        **arrays,
        "strip_rows": -(-layer["channels"] // STRIP_COLUMNS),
        # The median: one channel with γ near 0 has a gain of thousands and would be all that a mean shows.
        "typical_change": float(np.median(np.abs(defined - 1))) if defined.size else np.nan,
        "strongly_changed": int(np.sum(np.abs(defined - 1) > 0.5)),
        "largest_shift": float(np.max(np.abs(arrays["delta_beta"]))),
    }


def _difference(layers: list[dict[str, Any]], letter: str) -> np.ndarray:
    """|Δ of the first question − Δ of the second| [C] in one layer."""
    return np.abs(layers[0][f"delta_{letter}"] - layers[1][f"delta_{letter}"])


def _chart(depth: list[list[dict[str, Any]]], letter: str) -> dict[str, Any]:
    """Mean |Δ| per layer: a line a question and, for two, a line for their difference."""
    lines = [
        [float(np.mean(np.abs(layer[f"delta_{letter}"]))) for layer in layers] for layers in zip(*depth, strict=True)
    ]
    if len(lines) > 1:
        lines.append([float(np.mean(_difference(layers, letter))) for layers in depth])
    step = _nice(max(max(line) for line in lines) / 4)
    ticks = [step * i for i in range(5)]
    return {"symbol": {"gamma": "γ", "beta": "β"}[letter], "lines": lines, "ticks": ticks}


def _strongest(depth: list[list[dict[str, Any]]], scores: list[np.ndarray]) -> list[dict[str, Any]]:
    """The channels of the largest scores ([C] a layer) over all layers, with their numbers in each reading."""
    starts = np.cumsum([0, *(len(score) for score in scores)])
    found = np.argsort(-np.concatenate([np.zeros(0), *scores]), kind="stable")[:STRONGEST]
    keys = ("gamma", "delta_gamma", "gain", "beta", "delta_beta")
    rows = []
    for place in found:
        at = int(np.searchsorted(starts, place, side="right")) - 1
        channel = int(place - starts[at])
        values = [{key: float(layer[key][channel]) for key in keys} for layer in depth[at]]
        rows.append({"layer": depth[at][0]["name"], "channel": channel, "readings": values})
    return rows


def _parting(depth: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Where two questions differ most: layers by mean |difference of Δγ|, channels by |difference of Δγ|."""
    differences = [_difference(layers, "gamma") for layers in depth]
    means = [(layers[0]["name"], float(np.mean(d))) for layers, d in zip(depth, differences, strict=True)]
    ranked = sorted(means, key=lambda pair: -pair[1])
    return {"layers": ranked[:STRONGEST], "channels": _strongest(depth, differences)}


def _nice(value: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `value`; 1 for 0."""
    if value == 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(value))
    return float(next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * (1 - 1e-9)))


def _span(values: np.ndarray) -> float:
    """Half the width of a colour scale around 0 that leaves out only the two per cent of largest size."""
    finite = np.abs(values[np.isfinite(values)])
    return _nice(float(np.percentile(finite, 98))) if finite.size else 1.0


def _short(value: float) -> float | None:
    return float(f"{value:.3g}") if np.isfinite(value) else None


def _levels(values: np.ndarray, centre: float, span: float) -> np.ndarray:
    """Places [C] in a diverging scale that reaches `span` to each side; what lies outside takes the end."""
    return np.clip(np.rint((1 + (values - centre) / span) * (LEVELS // 2)), 0, LEVELS - 1)


def _gain_levels(gain: np.ndarray, span: float) -> np.ndarray:
    levels = _levels(gain, 1, span)
    levels[gain < 0] = FLIPPED
    levels[np.abs(gain) < NEARLY_SHUT] = SHUT
    levels[np.isnan(gain)] = UNDEFINED
    return levels


def _ramp(anchors: tuple[str, ...]) -> np.ndarray:
    """LEVELS colours [LEVELS, 3] evenly between the anchors."""
    colours = np.array([ImageColor.getrgb(anchor) for anchor in anchors], dtype=float)
    at = np.linspace(0, len(anchors) - 1, LEVELS)
    return np.stack([np.interp(at, np.arange(len(anchors)), channel) for channel in colours.T], axis=-1)


def _strip(levels: np.ndarray, anchors: tuple[str, ...]) -> str:
    """An image with one pixel per channel, as a data URI."""
    columns = min(len(levels), STRIP_COLUMNS)
    pixels = np.full(-(-len(levels) // columns) * columns, PADDING, dtype=np.uint8)
    pixels[: len(levels)] = levels
    strip = Image.fromarray(pixels.reshape(-1, columns))
    classes = [ImageColor.getrgb(colour) for colour in CLASS_COLOURS]
    strip.putpalette(np.concatenate([_ramp(anchors).round(), classes]).astype(np.uint8).tobytes())
    return _data_uri(strip, "png", transparency=PADDING)


def inline_image(image: Image.Image) -> dict[str, Any]:
    """An image as a data URI, at most PHOTO_SIZE wide and high."""
    photo = image.convert("RGB")
    photo.thumbnail((PHOTO_SIZE, PHOTO_SIZE))
    tiny = max(photo.size) <= 128
    src = _data_uri(photo, "png") if tiny else _data_uri(photo, "jpeg", quality=85)
    return {"src": src, "tiny": tiny}


def _glimpse(image: Image.Image, weights: np.ndarray) -> dict[str, Any]:
    """The photograph under a veil that the attention [H, W] lifts, so that the colours it looks at stay visible."""
    scale = PHOTO_SIZE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    photo = image.convert("RGB").resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)
    few = weights.size <= 16  # smoothing so few cells would draw shapes that the model never had
    clear = Image.fromarray(np.rint(255 * (1 - VEIL_SHARE * (1 - weights / weights.max()))).astype(np.uint8))
    clear = clear.resize(size, Image.Resampling.NEAREST if few else Image.Resampling.BICUBIC)
    return {
        "src": _data_uri(Image.composite(photo, Image.new("RGB", size, VEIL), clear), "jpeg", quality=85),
        "highest": float(weights.max()),
        "mean": float(weights.mean()),
        "shape": weights.shape,
        "cells": weights.tolist() if few else [],
    }


def _data_uri(image: Image.Image, kind: str, **options: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
