"""`main.py gpu-check`: correctness, speed and the first experiments on a GPU within a time limit, most important first.

Each step runs in its own process, because a GPU fault corrupts the process; a step that exceeds its time is killed. A
step rewrites `DIR/STEP.json` after each of its rows, and after each step all files are packed into `DIR/gpu-check.zip`,
so that the check can be interrupted at any time. A step whose file records that it passed is not run again; one that
the check's time limit cuts off has not failed.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import traceback
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from experiments import ROOT
from experiments.bench.bench import rows_table
from experiments.bench.setup import Measurement, Setup
from experiments.gpu import fast, right
from experiments.machine import surroundings
from experiments.report.results import keep_evidence
from experiments.suite import load_suite
from vqa.devices import choose_device
from vqa.io.errors import InputError
from vqa.io.files import read_json, write_json, written_whole


class Step(NamedTuple):
    """The rows that a step computes, and the seconds that it may take."""

    rows: Measurement
    seconds: float


TOGETHER = {  # several at a time: what else runs changes no result but the seconds of compiling
    "modulate": Step(right.modulate_rows, 120),
    "commands": Step(right.commands_rows, 180),
    "resume": Step(right.resume_rows, 120),
    "compile": Step(right.compile_rows, 120),
    "network": Step(right.network_rows, 60),
    "deltas": Step(right.deltas_rows, 40),
    "nccl": Step(right.nccl_rows, 60),
    **{step: Step(partial(fast.compiling_rows, what=what), 240) for step, what in fast.COMPILING.items()},
}
ALONE = {
    "ceilings": Step(fast.ceilings_rows, 30),
    "compiled": Step(fast.compiled_rows, 300),
    "epoch": Step(fast.epoch_rows, 240),
    "step": Step(fast.uncompiled_rows, 180),
    "operation": Step(fast.operation_rows, 60),
    "largest": Step(fast.largest_rows, 60),
}
STEPS = TOGETHER | ALONE
SUITES = ("settled", "gating", "table2_224")
_START = 60  # seconds that a process may take before its step begins
_SAVING = 15  # seconds before the end at which running trainings are asked to save


def gpu_check(
    out: Path,
    *,
    minutes: float,
    device: str,
    tiny: bool,
    steps: Sequence[str] = (),
    suites: Sequence[str] | None = None,
    at_once: int = 8,
) -> list[str]:
    """Run the steps and then the suites within the time limit.

    Args:
        out: where the files are written.
        minutes: the time limit; everything is ended then.
        device: as the setting.
        tiny: small sizes, to show on a CPU that it runs.
        steps: names of STEPS; none for all.
        suites: names of files in `experiments/suites`; None for SUITES.
        at_once: trainings of a suite at the same time.

    Returns:
        The names of the steps that failed, now or before, and of the suites whose `experiment` ended with an error.

    Raises:
        InputError: an unknown step or suite, an unavailable device, a CPU without `tiny`, or `out` holds the results of
            another device or size.
    """
    if device == "cpu" and not tiny:
        raise InputError("gpu-check: --device cpu belongs to --tiny; real sizes need a GPU")
    if unknown := set(steps) - STEPS.keys():
        raise InputError(f"gpu-check: no step {', '.join(sorted(unknown))}; steps are {', '.join(STEPS)}")
    suite_files = [
        ROOT / "experiments" / "suites" / f"{suite}.yaml" for suite in (SUITES if suites is None else suites)
    ]
    for file in suite_files:
        if not file.is_file():
            raise InputError(f"{file}: no such suite")
    choose_device(device)
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    files = [out / f"{name}.json" for name in steps or STEPS]
    missing = [file for file in files if not (file.exists() and _passed(file, _command(file.stem, device, tiny)))]
    together, alone = ([file for file in missing if (file.stem in TOGETHER) is kind] for kind in (True, False))
    run = partial(_run_step, device=device, tiny=tiny, deadline=deadline)
    for chosen, processes in ((together, min(max((os.cpu_count() or 1) // 2, 1), 8)), (alone, 1)):
        with ThreadPoolExecutor(processes) as pool:
            try:
                for done in as_completed([pool.submit(run, file) for file in chosen]):
                    if (result := done.result()) is not None:
                        print(_summary(result), flush=True)
                        _pack(out)
            finally:  # after a signal, which the steps' processes may not have got
                pool.shutdown(wait=False, cancel_futures=True)
                for process in multiprocessing.active_children():
                    process.kill()
    refused = []
    for file in suite_files:
        if time.monotonic() < deadline - _SAVING and _run_suite(file, out, device, at_once, deadline):
            refused.append(file.stem)
    _pack(out)
    states = {file.stem: read_json(file)["state"] if file.exists() else "waiting" for file in files}
    if left := [name for name, state in states.items() if state not in ("passed", "failed")]:
        print(f"not finished within {minutes:g} minutes: {', '.join(left)}", flush=True)
    return [name for name, state in states.items() if state == "failed"] + refused


def _command(step: str, device: str, tiny: bool) -> str:
    on_device = "" if device == "cuda" else f" --device {device}"
    return f"python main.py gpu-check --step {step}{on_device}{' --tiny' if tiny else ''}"


def _passed(file: Path, command: str) -> bool:
    """Whether a step passed, from its file. Raises InputError if another command or program wrote it."""
    content = read_json(file)
    if not isinstance(content, dict) or "state" not in content or content.get("command", command) != command:
        raise InputError(f"{file}: not written by `{command}`; name another --out")
    return content["state"] == "passed"


def _run_step(file: Path, device: str, tiny: bool, deadline: float) -> dict[str, Any] | None:
    """Run the step of a file in its own process; return the content of the file, or None if no time is left."""
    rows, seconds = STEPS[file.stem]
    seconds = min(_START + (5 if tiny else 1) * seconds, deadline - time.monotonic())  # tiny: on a busy CPU
    if seconds <= 0:
        return None
    write_json(file, {"step": file.stem, "state": "running", "rows": []})
    # nothing that is imported before the fork may initialise CUDA, to count GPUs
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.gpu.check"])  # each process begins with everything imported
    process = context.Process(target=_write_rows, args=(file, rows, device, tiny))
    process.start()
    process.join(seconds)
    code = process.exitcode
    process.kill()
    process.join()
    result = read_json(file)
    if result["state"] == "running":
        why = "took too long" if code is None else f"its process ended with {code}; see {file.with_name('log.txt')}"
        cut = code is None and time.monotonic() >= deadline
        result |= {"state": "cut off"} if cut else {"state": "failed", "error": why}
        write_json(file, result)
    return result


def _write_rows(file: Path, rows: Measurement, device: str, tiny: bool) -> None:
    """Rewrite a step's file after each row; redirect everything that is printed to the log."""
    with file.with_name("log.txt").open("a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    chosen, start, written = choose_device(device), time.monotonic(), []
    about = {"step": file.stem, "machine": surroundings(chosen), "command": _command(file.stem, device, tiny)}

    def write(state: str, **more: str) -> None:
        seconds = round(time.monotonic() - start, 1)
        write_json(file, about | {"state": state, "seconds": seconds, "rows": written} | more)

    write("running")
    try:
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
            for row in rows(Setup(chosen, tiny, Path(folder), repeats=1 if tiny else 7)):
                written.append(row)
                write("running")
    except Exception:  # whatever it is, the other steps run
        traceback.print_exc()
        write("failed", error=traceback.format_exc())
    else:
        write("passed")


def _summary(result: dict[str, Any]) -> str:
    rows = "\n" + rows_table(result["rows"]) if result["rows"] else ""
    why = f": {result['error'].strip().splitlines()[-1]}" if "error" in result else ""
    return f"\n{result['step']}: {result['state']}{why}  ({result.get('seconds', 0):.0f} s){rows}"


def _run_suite(file: Path, out: Path, device: str, at_once: int, deadline: float) -> int | None:
    """Run a suite until the deadline; pack its finished runs every few seconds. Return its exit code, or None."""
    words = [f"device={device}"]
    command = [sys.executable, str(ROOT / "main.py"), "experiment", str(file), "--at-once", str(at_once), *words]
    suite = load_suite(file, tuple(words))
    process = subprocess.Popen(command)
    try:
        while process.poll() is None and time.monotonic() < deadline - _SAVING:
            time.sleep(2)
            keep_evidence(suite, Path("runs"), out / f"{file.stem}_runs.zip")
            _pack(out)
        code = process.poll()
    finally:
        process.terminate()
        process.wait()
    keep_evidence(suite, Path("runs"), out / f"{file.stem}_runs.zip")
    return code


def _pack(out: Path) -> None:
    """Pack all files of the check into one archive."""
    with written_whole(out / "gpu-check.zip") as aside, zipfile.ZipFile(aside, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(out.iterdir()):
            if file.suffix in (".json", ".txt") or file.name.endswith("_runs.zip"):
                archive.write(file, file.name)
