"""`main.py bench`: what is fast, measured beside what it replaces, all in one run.

Each part is a table with a line a measurement; what is compared takes turns, and medians are given. Ratios can be
compared between machines of a kind, milliseconds cannot.
"""

import io
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from experiments.bench import loading, step
from experiments.bench.step import Case
from experiments.bench.vqa_sized_data import QUESTIONS
from experiments.report.tables import aligned, write_lines
from experiments.training.run_directory import surroundings
from vqa.devices import choose_device
from vqa.io.errors import InputError

PARTS = ("step", "memory", "sharing", "cache", "waiting", "loading", "scale")
MOST_REPEATS = {"memory": 1, "cache": 3, "waiting": 1, "loading": 3, "scale": 3}  # of parts that take long


def bench(
    parts: Sequence[str], *, repeats: int, device: str, tiny: bool, out: Path | None, images: int = 4_000
) -> dict[str, Any]:
    """Measures some parts (all if none is named) and writes `bench_PART.csv` for each into `out`.

    Args:
        parts: of PARTS.
        repeats: turns of each measurement.
        device: as the setting; what needs no GPU is measured on the CPU.
        tiny: a small network and few images: whether it runs, not how fast it is.
        out: a folder; None writes nothing.
        images: of the part scale, at least 8.

    Returns:
        `machine` and `parts`: each part's rows.

    Raises:
        InputError: there is no such part or device, or `out` is a file.
    """
    if unknown := set(parts) - set(PARTS):
        raise InputError(f"bench: no part {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    if images < 8:
        raise InputError(f"--images: at least 8, got {images}")
    if out is not None and out.exists() and not out.is_dir():
        raise InputError(f"{out}: must be a directory")
    chosen = choose_device(device)
    results = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for part in parts or PARTS:
            with redirect_stdout(io.StringIO()):  # what training and preprocessing say
                turns = min(repeats, MOST_REPEATS.get(part, repeats))
                results[part] = _measured(part, turns, chosen, Path(folder) / part, tiny, images)
            print(f"\n{part}\n{table_of(results[part])}", flush=True)
            if out is not None:
                told = _machine(chosen) | {"repeats": turns}
                write_lines(out / f"bench_{part}.csv", [row | told for row in results[part]])
    return {"machine": surroundings(chosen), "repeats": repeats, "parts": results}


def _measured(
    part: str, repeats: int, device: torch.device, folder: Path, tiny: bool, scale: int
) -> list[dict[str, Any]]:
    network, size, images = ("resnet10", 64, 16) if tiny else ("resnet50", 224, 128)
    largest = Case("resnet10", 64, 2) if tiny else Case("resnet152", 448, 1)
    measure: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "step": lambda: step.step_rows(step.TINY if tiny else step.cases(device), repeats, device),
        "memory": lambda: step.memory_rows(largest, 24, device),
        "sharing": lambda: loading.sharing_rows(network, size, 16, repeats, device),
        "cache": lambda: loading.cache_rows(network, size, images, folder, repeats, device),
        "waiting": lambda: loading.waiting_rows(network, size, images // 2, 8, folder, device),
        "loading": lambda: loading.loading_rows(size, 24 * images if not tiny else 128, folder, repeats),
        "scale": lambda: (
            scale.scale_rows({"train": 2000, "val": 200}, size, 80, 2, 0, repeats, folder)
            if tiny
            else scale.scale_rows(QUESTIONS, size, scale, 50, 2, repeats, folder)
        ),
    }
    return measure[part]()


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as aligned text; each kind of row under a head of its own."""
    kinds: dict[tuple[str, ...], list[list[str]]] = {}
    for row in rows:
        cells = ["" if value is None else str(value) for value in row.values()]
        kinds.setdefault(tuple(row), [list(row)]).append(cells)
    return "\n".join(map(aligned, kinds.values()))


def _machine(device: torch.device) -> dict[str, Any]:
    told = surroundings(device)
    return {key: told[key] for key in ("cpu", "threads", "device", "torch")} | {"commit": told["git_commit"]}
