"""`main.py bench`: measure each fast path beside what it replaces, in the same run.

Each part is a table with a row a measurement; what is compared takes turns, and medians are given. Ratios can be
compared between machines of a kind, milliseconds cannot.
"""

import io
import tempfile
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from experiments.bench.loading import cache_rows, loading_rows, sharing_rows, waiting_rows
from experiments.bench.scale import scale_rows
from experiments.bench.step import TINY, Case, cases, memory_rows, step_rows
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
    """Measure some parts and write `bench_PART.csv` for each into `out`.

    Args:
        parts: names of PARTS; none for all.
        repeats: turns of each measurement.
        device: as the setting; what needs no GPU is measured on the CPU.
        tiny: a small network and few images, to show that it runs.
        out: a folder; None writes nothing.
        images: number of images of the part `scale`, at least 8.

    Returns:
        `machine`, `repeats` and `parts`: each part's rows.

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
    machine, results = surroundings(chosen), {}
    columns = {key: machine[key] for key in ("cpu", "threads", "device", "torch")} | {"commit": machine["git_commit"]}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for part in parts or PARTS:
            turns = min(repeats, MOST_REPEATS.get(part, repeats))
            with redirect_stdout(io.StringIO()):  # what training and preprocessing say
                results[part] = _measured(part, turns, chosen, Path(folder) / part, tiny, images)
            print(f"\n{part}\n{table_of(results[part])}", flush=True)
            if out is not None:
                write_lines(out / f"bench_{part}.csv", [row | columns | {"repeats": turns} for row in results[part]])
    return {"machine": machine, "repeats": repeats, "parts": results}


def _measured(
    part: str, repeats: int, device: torch.device, folder: Path, tiny: bool, scale: int
) -> list[dict[str, Any]]:
    network, size, images = ("resnet10", 64, 16) if tiny else ("resnet50", 224, 128)
    largest = Case("resnet10", 64, 2) if tiny else Case("resnet152", 448, 1)
    steps = TINY if tiny else cases(device)
    jpegs = 128 if tiny else 3072
    questions, scale, training = ({"train": 2000, "val": 200}, 80, (2, 0)) if tiny else (QUESTIONS, scale, (50, 2))
    measure: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "step": lambda: [row for case in steps for row in step_rows(case, repeats, device)],
        "memory": lambda: memory_rows(largest, 24, device),
        "sharing": lambda: sharing_rows(network, size, 16, repeats, device),
        "cache": lambda: cache_rows(network, size, images, folder, repeats, device),
        "waiting": lambda: waiting_rows(network, size, images // 2, 8, folder, device),
        "loading": lambda: loading_rows(size, jpegs, folder, repeats),
        "scale": lambda: scale_rows(questions, size, scale, *training, repeats, folder),
    }
    return measure[part]()


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """Align rows as text; rows of other columns get headings of their own."""
    kinds: dict[tuple[str, ...], list[list[str]]] = {}
    for row in rows:
        cells = ["" if value is None else str(value) for value in row.values()]
        kinds.setdefault(tuple(row), [list(row)]).append(cells)
    return "\n".join(map(aligned, kinds.values()))
