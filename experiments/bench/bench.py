"""`main.py bench`: compare each fast path with what it replaces, in the same run.

Each part is a table with a row for each measurement. Alternatives are timed in turns, and medians are reported. Ratios
can be compared between similar machines, milliseconds cannot.
"""

import io
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from experiments.bench.loading import cache_rows, loading_rows, sharing_rows, waiting_rows
from experiments.bench.scale import scale_rows
from experiments.bench.setup import Measurement, Setup
from experiments.bench.step import memory_rows, step_rows
from experiments.machine import surroundings
from experiments.tables import aligned, write_lines
from vqa.devices import choose_device
from vqa.io.errors import InputError

PARTS: dict[str, tuple[Measurement, int]] = {  # with the most repeats, fewer for parts that take long
    "step": (step_rows, 1_000),
    "memory": (memory_rows, 1),
    "sharing": (sharing_rows, 1_000),
    "cache": (cache_rows, 3),
    "waiting": (waiting_rows, 1),
    "loading": (loading_rows, 3),
    "scale": (scale_rows, 3),
}


def bench(
    parts: Sequence[str], *, repeats: int, device: str, tiny: bool, out: Path | None, images: int
) -> dict[str, Any]:
    """Measure some parts and write `bench_PART.csv` for each into `out`.

    Args:
        parts: names of PARTS; none for all.
        repeats: turns of each measurement.
        device: as the setting; what needs no GPU is measured on the CPU.
        tiny: a small network and few images, to test that it runs.
        out: a folder; None writes nothing.
        images: number of images of the part `scale`, at least 8.

    Returns:
        `machine`, `repeats` and `parts`: each part's rows.

    Raises:
        InputError: the part or device is unknown.
    """
    if unknown := set(parts) - set(PARTS):
        raise InputError(f"bench: no part {', '.join(sorted(unknown))}; parts are {', '.join(PARTS)}")
    if images < 8:
        raise InputError(f"--images: at least 8, got {images}")
    chosen = choose_device(device)
    machine, results = surroundings(chosen), {}
    columns = {key: machine[key] for key in ("cpu", "threads", "device", "torch")} | {"commit": machine["git_commit"]}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        for part in parts or PARTS:
            measured, most = PARTS[part]
            turns = min(repeats, most)
            with redirect_stdout(io.StringIO()):  # of training and preprocessing
                results[part] = list(measured(Setup(chosen, tiny, Path(folder) / part, turns, images)))
            print(f"\n{part}\n{rows_table(results[part])}", flush=True)
            if out is not None:
                write_lines(out / f"bench_{part}.csv", [row | columns | {"repeats": turns} for row in results[part]])
    return {"machine": machine, "repeats": repeats, "parts": results}


def rows_table(rows: Sequence[dict[str, Any]]) -> str:
    """Align rows as text; rows with other columns get their own headings."""
    kinds: dict[tuple[str, ...], list[list[str]]] = {}
    for row in rows:
        cells = ["" if value is None else str(value) for value in row.values()]
        kinds.setdefault(tuple(row), [list(row)]).append(cells)
    return "\n".join(map(aligned, kinds.values()))
