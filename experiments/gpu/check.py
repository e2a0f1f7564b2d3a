"""`main.py gpu-check`: right, fast, and the first experiments on a GPU, in order of worth, in a bounded time.

The steps run in a process of their own, since a fault on a GPU spoils the process it happens in: one that fails or
takes too long is ended, and the next ones go on in a new process. Every step has a file, `DIR/STEP.json`, written anew
with each of its rows, and after each step all files are packed into `DIR/gpu-check.zip`: the check can be cut off
anywhere. Steps whose file says that they passed are not run again.
"""

import json
import os
import subprocess
import sys
import time
import traceback
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

from experiments import ROOT
from vqa.io.errors import InputError
from vqa.io.files import read_json, write_json, written_whole

# The seconds that each step may take: of what is right (`right.NAME_rows`) and fast (`fast.NAME_rows`).
RIGHT = {"modulate": 120, "commands": 120, "resume": 120, "compile": 120, "network": 60, "deltas": 40, "nccl": 60}
FAST = {"ceilings": 30, "step": 180, "operation": 60, "compiled": 180, "epoch": 180, "largest": 60}
STEPS = RIGHT | FAST
SUITES = ("settled_rates", "settled", "table2_224")
_START = 60  # seconds that a new process may take before its first step
_telling = Lock()  # one step at a time is told of
_SAVING = 15  # seconds before the end at which running trainings are asked to save


def gpu_check(
    out: Path,
    *,
    minutes: float,
    device: str,
    tiny: bool,
    steps: Sequence[str] = (),
    suites: Sequence[str] = SUITES,
    at_once: int = 8,
) -> list[str]:
    """Runs the steps and then the suites, as far as the time allows.

    Args:
        out: where the files are written.
        minutes: after which everything is ended.
        device: as the setting.
        tiny: small sizes: whether it runs, on a CPU too.
        steps: of STEPS; all if none is named.
        suites: names of files in `experiments/suites`.
        at_once: trainings of a suite at the same time.

    Returns:
        The names of the steps that failed.

    Raises:
        InputError: an unknown step or suite, a device that is not there, or `out` is a file.
    """
    from vqa.devices import choose_device

    if unknown := set(steps) - STEPS.keys():
        raise InputError(f"gpu-check: no step {', '.join(sorted(unknown))}; steps are {', '.join(STEPS)}")
    files = [ROOT / "experiments" / "suites" / f"{suite}.yaml" for suite in suites]
    if missing := [file for file in files if not file.is_file()]:
        raise InputError(f"{missing[0]}: no such suite")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: must be a directory")
    if not tiny:
        choose_device(device)
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    missing = [name for name in steps or STEPS if not _passed(out, name)]
    right, fast = ([name for name in missing if name in kind] for kind in (RIGHT, FAST))
    groups = min(max((os.cpu_count() or 1) // 4, 1), len(right)) or 1  # side by side, as nothing is timed
    run = partial(_run_steps, out=out, device=device, tiny=tiny, deadline=deadline)
    with ThreadPoolExecutor(groups) as pool:
        failed = [name for names in pool.map(run, [right[place::groups] for place in range(groups)]) for name in names]
    failed += run(fast)
    for file in files:
        if time.monotonic() < deadline - _SAVING:
            _run_suite(file, out, device, at_once, deadline)
    _pack(out)
    return failed


def _passed(out: Path, name: str) -> bool:
    file = out / f"{name}.json"
    return file.exists() and read_json(file).get("state") == "passed"


def _run_steps(names: list[str], out: Path, device: str, tiny: bool, deadline: float) -> list[str]:
    """Runs steps one after the other; which failed."""
    failed = []
    while names and time.monotonic() < deadline:
        names, failures = _run_until_one_fails(names, out, device, tiny, deadline)
        failed += failures
    return failed


def _run_until_one_fails(
    names: list[str], out: Path, device: str, tiny: bool, deadline: float
) -> tuple[list[str], list[str]]:
    """Runs steps in one process until one fails: which are still to be run, and which failed."""
    command = [sys.executable, "-m", "experiments.gpu.check", json.dumps([names, str(out.resolve()), device, tiny])]
    patience = 5 if tiny else 1  # on a CPU that does other work too
    log = out / "log.txt"
    for name in names:
        (out / f"{name}.json").unlink(missing_ok=True)
    with log.open("a", encoding="utf-8") as stream:
        process = subprocess.Popen(command, cwd=ROOT, stdout=stream, stderr=subprocess.STDOUT)
    try:
        for place, name in enumerate(names):
            limit = min(time.monotonic() + patience * STEPS[name] + (0 if place else _START), deadline)
            while process.poll() is None and not _ended(out, name) and time.monotonic() < limit:
                time.sleep(0.1)
            if not _ended(out, name):
                code = process.poll()
                why = "took too long" if code is None else f"its process ended with {code}; see {log}"
                file = out / f"{name}.json"
                begun = read_json(file) if file.exists() else {"step": name, "rows": []}
                write_json(file, begun | {"state": "failed", "error": why})
            told = read_json(out / f"{name}.json")
            with _telling:
                print(_line(told), flush=True)
                _pack(out)
            if told["state"] == "failed":
                return names[place + 1 :], [name]
    finally:
        process.kill()
        process.wait()
    return [], []


def _ended(out: Path, name: str) -> bool:
    file = out / f"{name}.json"
    return file.exists() and read_json(file)["state"] != "running"


def _line(told: dict[str, Any]) -> str:
    from experiments.bench.bench import table_of

    rows = "\n" + table_of(told["rows"]) if told["rows"] else ""
    why = f": {told['error'].strip().splitlines()[-1]}" if "error" in told else ""
    return f"\n{told['step']}: {told['state']}{why}  ({told.get('seconds', 0):.0f} s){rows}"


def _run_suite(file: Path, out: Path, device: str, at_once: int, deadline: float) -> None:
    """Runs a suite until the deadline; what is finished of it is kept every few seconds."""
    from experiments.report.results import keep_evidence
    from experiments.suite import load_suite

    words = [f"device={device}"]
    command = [sys.executable, str(ROOT / "main.py"), "experiment", str(file), "--at-once", str(at_once), *words]
    suite = load_suite(file, tuple(words))
    process = subprocess.Popen(command)
    try:
        while process.poll() is None and time.monotonic() < deadline - _SAVING:
            time.sleep(2)
            keep_evidence(suite, Path("runs"), out / f"{file.stem}_runs.zip")
            _pack(out)
    finally:
        process.terminate()
        process.wait()
    keep_evidence(suite, Path("runs"), out / f"{file.stem}_runs.zip")


def _pack(out: Path) -> None:
    """All files of the check in one archive."""
    with written_whole(out / "gpu-check.zip") as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(out.iterdir()):
            if file.suffix in (".json", ".txt") or file.name.endswith("_runs.zip"):
                archive.write(file, file.name)


def _run_here(names: Sequence[str], out: str, device: str, tiny: bool) -> int:
    """Runs steps in this process, up to the first that fails."""
    import tempfile

    from experiments.gpu import fast, right
    from experiments.training.run_directory import surroundings
    from vqa.devices import choose_device

    functions = vars(right) | vars(fast)
    chosen = choose_device(device)
    machine = surroundings(chosen)
    for name in names:
        begun, rows = time.monotonic(), []
        told: dict[str, Any] = {"step": name, "machine": machine, "command": f"python main.py gpu-check --step {name}"}

        def tell(state: str, told=told, begun=begun, rows=rows, name=name, **more: Any) -> None:
            seconds = round(time.monotonic() - begun, 1)
            write_json(Path(out) / f"{name}.json", told | {"state": state, "seconds": seconds, "rows": rows} | more)

        tell("running")
        try:
            with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
                found = functions[f"{name}_rows"](right.Check(chosen, tiny, Path(folder)))
                for part in [found] if isinstance(found, list) else found:
                    rows += part
                    tell("running")
        except Exception:  # whatever it is, the other steps go on
            traceback.print_exc()
            tell("failed", error=traceback.format_exc())
            return 1
        tell("passed")
    return 0


if __name__ == "__main__":
    sys.exit(_run_here(*json.loads(sys.argv[1])))
