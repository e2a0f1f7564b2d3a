"""Write pages as one HTML file with every image, style and script inline; the inspection's content."""

import base64
import io
from collections.abc import Sequence
from heapq import nlargest
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image, ImageColor, ImageDraw

from vqa.io.files import write_text
from vqa.settings.schema import CONDITIONS

STRIP_COLUMNS = 256  # a strip of more channels has several rows, so that every channel stays visible
STRONGEST = 20
PHOTO_SIZE = 480
NEARLY_SHUT = 0.1  # |gain| below which a channel counts as shut

# Safe for colour-blind readers: FLIPPED and SHUT differ clearly from every gain colour under each deficiency.
LEVELS = 81
GAIN_COLOURS = ("#1f5fa8", "#7fb3d9", "#f7f6f2", "#f5a85c", "#b85a00")
SHIFT_COLOURS = ("#6a3d8f", "#b79cc9", "#f7f6f2", "#8fc497", "#1b7037")
FLIPPED, SHUT, UNDEFINED, PADDING = range(LEVELS, LEVELS + 4)
CLASS_COLOURS = ("#e11a60", "#1a1a1a", "#b4b4b4", "#ffffff")
VEIL = "#1a2150"  # darkens the image where the attention is low: blue, as black would not show on dark parts
VEIL_SHARE = 0.8
BOX_COLOUR = CLASS_COLOURS[0]  # of the object that a question is about


def write_page(path: Path, template: str, folders: Sequence[Path] = (), **content: Any) -> None:
    """Fill a template of `folders` or of this module and write it to `path`, whole or not at all."""
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
    """Format with fixed decimals, with a power of ten where those would not show the value, NaN as a dash."""
    if np.isnan(value):
        return "–"
    if value == 0 or 0.5 * 10**-decimals <= abs(value) < 1e4:
        return f"{value:.{decimals}f}".replace("-", "−")
    digits, exponent = f"{value:.1e}".split("e")
    power = str(int(exponent)).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{digits}×10{power}".replace("-", "−")


def signed(value: float, decimals: int = 3) -> str:
    """Format as `number`, positive values with a plus sign."""
    return ("+" if value > 0 else "") + number(value, decimals)


def percent(share: float) -> str:
    """Format a share from 0 to 1 as percent with one decimal."""
    return "<\u00a00.1\u00a0%" if 0 < share < 0.0005 else f"{100 * share:.1f}\u00a0%"


def grouped(value: int) -> str:
    """Format an integer in groups of three digits, separated by narrow spaces."""
    return f"{value:,}".replace(",", "\u202f")


def inspection_view(inspection: dict[str, Any], image: Image.Image) -> dict[str, Any]:
    """Prepare the content of `_inspection.html`.

    Args:
        inspection: as in `modulation.json`, with one or two readings.
        image: the image of the questions.

    Returns:
        The inspection with its images, and `depth`: for each layer, in order of depth, the layer of each reading.

    Raises:
        ValueError: the readings do not have the same number of layers.
    """
    readings = inspection["readings"]
    depth = [[_as_arrays(layer) for layer in layers] for layers in zip(*(r["layers"] for r in readings), strict=True)]
    every = [layer for layers in depth for layer in layers]
    gain_span = min(1.0, _span([layer["gain"] - 1 for layer in every]))  # the scale ends at 0: signs have their colour
    shift_span = _span([layer["delta_beta"] for layer in every])
    for layer in every:
        layer["gain_strip"] = _strip(_gain_levels(layer["gain"], gain_span), GAIN_COLOURS)
        layer["shift_strip"] = _strip(_levels(layer["delta_beta"], shift_span), SHIFT_COLOURS)
    ranked = "gamma" if any(layer["delta_gamma"].any() for layer in every) else "beta"  # a model may predict one alone
    sizes = [[np.abs(layer[f"delta_{ranked}"]) for layer in layers] for layers in zip(*depth, strict=True)]
    return {"box": None, "category": None, **inspection} | {
        "photo": inline_image(_with_box(image, inspection.get("box"))),
        "crop": inline_image(image.crop(inspection["crop"])) if "crop" in inspection else None,
        "readings": [
            reading
            | {"letter": letter, "glimpses": [_glimpse(image, np.array(a)) for a in reading.get("attention", [])]}
            for letter, reading in zip("AB", readings, strict=False)
        ],
        "depth": depth,
        "condition": CONDITIONS[inspection["model"]["condition"]],
        "ranked": ranked,
        "stages": [(stage, len(list(run))) for stage, run in groupby(layers[0]["stage"] for layers in depth)],
        "charts": [_chart(depth, "delta_gamma", "γ"), _chart(depth, "delta_beta", "β")] if depth else [],
        "strongest": [_strongest(depth, of_reading) for of_reading in sizes],
        "difference": _difference(depth, f"delta_{ranked}") if len(readings) > 1 else {},
        "numbers": [
            [[[_short(value) for value in layer[key]] for key in ("gain", "delta_beta")] for layer in layers]
            for layers in depth
        ],
        "spans": {"gain": gain_span, "shift": shift_span},
        "legend": {
            "gain": _strip(np.arange(LEVELS), GAIN_COLOURS),
            "shift": _strip(np.arange(LEVELS), SHIFT_COLOURS),
            "classes": CLASS_COLOURS,
            "veil": VEIL,
        },
    }


def _as_arrays(layer: dict[str, Any]) -> dict[str, Any]:
    """The layer with arrays [C] for lists, and its summary; an undefined gain is NaN."""
    arrays = {key: np.array(layer[key], dtype=float) for key in ("gamma", "beta", "delta_gamma", "delta_beta", "gain")}
    changes = np.abs(arrays["gain"][np.isfinite(arrays["gain"])] - 1)
    return layer | {
        **arrays,
        "strip_rows": -(-layer["channels"] // STRIP_COLUMNS),
        # the median, as one channel with γ near 0 has a gain of thousands and would dominate a mean
        "typical_change": float(np.median(changes)) if changes.size else np.nan,
        "strongly_changed": int(np.sum(changes > 0.5)),
        "largest_shift": float(np.max(np.abs(arrays["delta_beta"]))),
    }


def _chart(depth: list[list[dict[str, Any]]], delta: str, symbol: str) -> dict[str, Any]:
    """Mean |Δ| per layer: a line for each question and, for two, a line for their difference."""
    curves = [[layer[delta] for layer in layers] for layers in zip(*depth, strict=True)]
    if len(curves) > 1:
        curves.append([first - second for first, second in zip(*curves, strict=True)])
    lines = [[float(np.mean(np.abs(values))) for values in curve] for curve in curves]
    step = _nice(max(map(max, lines)) / 4)
    return {"symbol": symbol, "lines": lines, "ticks": [step * i for i in range(5)]}


def _strongest(depth: list[list[dict[str, Any]]], scores: list[np.ndarray]) -> list[dict[str, Any]]:
    """The channels with the largest scores ([C] for each layer), with their values in each reading."""
    channels = [
        (score, layers, channel)
        for layers, of_layer in zip(depth, scores, strict=True)
        for channel, score in enumerate(of_layer.tolist())
    ]
    keys = ("gamma", "delta_gamma", "gain", "beta", "delta_beta")
    return [
        {
            "layer": layers[0]["name"],
            "channel": channel,
            "readings": [{key: float(layer[key][channel]) for key in keys} for layer in layers],
        }
        for _, layers, channel in nlargest(STRONGEST, channels, key=lambda entry: entry[0])
    ]


def _difference(depth: list[list[dict[str, Any]]], delta: str) -> dict[str, Any]:
    """Where two questions differ most in `delta`, by layer and by channel; empty where all Δγ and Δβ are the same."""
    same = (np.array_equal(one[key], other[key]) for one, other in depth for key in ("delta_gamma", "delta_beta"))
    if all(same):
        return {}
    differences = [np.abs(first[delta] - second[delta]) for first, second in depth]
    means = [(layers[0]["name"], float(np.mean(of_layer))) for layers, of_layer in zip(depth, differences, strict=True)]
    return {
        "layers": nlargest(STRONGEST, means, key=lambda entry: entry[1]),
        "channels": _strongest(depth, differences),
    }


def _nice(value: float) -> float:
    """The smallest of 1, 2, 2.5, 5 times a power of ten that is not below `value`; 1 for 0."""
    if value == 0:
        return 1.0
    power = 10.0 ** np.floor(np.log10(value))
    return float(next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= value * (1 - 1e-9)))


def _span(parts: list[np.ndarray]) -> float:
    """Half the width of a colour scale around 0 that covers 98 % of the values."""
    sizes = np.abs(np.concatenate([np.zeros(0), *parts]))
    finite = sizes[np.isfinite(sizes)]
    return _nice(float(np.percentile(finite, 98))) if finite.size else 1.0


def _short(value: float) -> float | None:
    return float(f"{value:.3g}") if np.isfinite(value) else None


def _levels(values: np.ndarray, span: float) -> np.ndarray:
    """Colour indices [C] in a diverging scale from -span to span; values outside take its ends."""
    return np.clip(np.rint((1 + values / span) * (LEVELS // 2)), 0, LEVELS - 1)


def _gain_levels(gain: np.ndarray, span: float) -> np.ndarray:
    levels = _levels(gain - 1, span)
    levels[gain < 0] = FLIPPED
    levels[np.abs(gain) < NEARLY_SHUT] = SHUT
    levels[np.isnan(gain)] = UNDEFINED
    return levels


def _strip(levels: np.ndarray, anchors: tuple[str, ...]) -> str:
    """An image with one pixel per channel as a data URI; the colours are interpolated between the anchors."""
    columns = min(len(levels), STRIP_COLUMNS)
    pixels = np.full(-(-len(levels) // columns) * columns, PADDING, dtype=np.uint8)
    pixels[: len(levels)] = levels
    strip = Image.fromarray(pixels.reshape(-1, columns))
    at = np.linspace(0, len(anchors) - 1, LEVELS)
    channels = np.transpose([ImageColor.getrgb(anchor) for anchor in anchors])
    ramp = np.stack([np.interp(at, np.arange(len(anchors)), channel).round() for channel in channels], axis=-1)
    classes = [ImageColor.getrgb(colour) for colour in CLASS_COLOURS]
    strip.putpalette(np.concatenate([ramp, classes]).astype(np.uint8).tobytes())
    return _data_uri(strip, "png", transparency=PADDING)


def _with_box(image: Image.Image, box: Sequence[float] | None) -> Image.Image:
    """The image with the box of the object that is asked about, if there is one."""
    if box is None:
        return image
    marked, (x, y, width, height) = image.copy(), box
    line = 1 + max(image.size) // 200  # outside of the box
    around = (x - line, y - line, x + width - 1 + line, y + height - 1 + line)
    ImageDraw.Draw(marked).rectangle(around, outline=BOX_COLOUR, width=line)
    return marked


def inline_image(image: Image.Image) -> dict[str, Any]:
    """Encode an image as a data URI, at most PHOTO_SIZE wide and high."""
    photo = image.copy()
    photo.thumbnail((PHOTO_SIZE, PHOTO_SIZE))
    tiny = max(photo.size) <= 128
    src = _data_uri(photo, "png") if tiny else _data_uri(photo, "jpeg", quality=85)
    return {"src": src, "tiny": tiny}


def _glimpse(image: Image.Image, weights: np.ndarray) -> dict[str, Any]:
    """The image under a veil that is clear where the attention [H, W] is high, so that its colours stay visible."""
    scale = PHOTO_SIZE / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    photo = image.resize(size, Image.Resampling.NEAREST if scale > 2 else Image.Resampling.BICUBIC)
    few = weights.size <= 16  # smoothing so few cells would suggest shapes that are not there
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
