"""Kills a command at random moments, again and again, and compares what it makes with an undisturbed run.

    python -m tests.kill.harness train --kills 100

Tiny data are made first, and the command runs once undisturbed. Then it is started again and again, and killed
(SIGKILL, its workers and the runs it started included) after a random time since it began to work, spread over as long
as the undisturbed run worked. After each kill, what bears its final name must be whole, and no work that was kept may
be gone. Each time the command comes to its end, what it made must be what the undisturbed run made: weights and
checkpoints bit for bit, h5 files by content, metrics line for line (but for times and memory). Then it begins anew.
"""

import argparse
import csv
import multiprocessing
import os
import random
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from experiments.runner import MAIN
from tests.kill.cases import CASES, Case, content_of, kept_work
from vqa.io.files import written_whole

_LONGEST = 600.0  # seconds until a command that does not end is an error


@dataclass
class Killed:
    """What came of it."""

    command: str
    kills: int = 0
    ends: int = 0  # how often it came to its end all the same
    seconds: float = 0.0  # that the undisturbed run worked
    in_a_write: int = 0  # kills that left a file behind which was being written
    with_work_kept: int = 0  # kills after which the next start found work to go on with
    differences: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        found = "; ".join(self.differences) or "no difference from the undisturbed run"
        return (
            f"{self.command}: {self.kills} kills ({self.in_a_write} in the middle of a file, "
            f"{self.with_work_kept} with work kept), {self.ends} ends: {found}"
        )


def kill(case: Case, kills: int, folder: Path, seed: int = 0, words: Sequence[str] = ()) -> Killed:
    """Kills a command `kills` times.

    Args:
        case: one of CASES.
        kills: how often.
        folder: where data and outputs are made.
        seed: of the moments.
        words: `key.sub=value` over the settings of the command.

    Raises:
        RuntimeError: the undisturbed run failed.
    """
    moments, result = random.Random(seed), Killed(case.name)
    case.prepare(folder)
    command = [*case.words(folder), *words]
    whole, work = folder / "whole", folder / "killed"
    case.begin(whole)
    begun = _until_at_work(process := _start(command, whole), whole, case)
    process.join(_LONGEST)
    result.seconds = time.monotonic() - begun
    if process.exitcode != 0:
        raise RuntimeError(f"{case.name}: undisturbed, it ended with {process.exitcode}: {_log(whole)}")
    expected = content_of(whole)

    while True:
        case.begin(work)
        kept: dict[str, tuple[int, ...]] = {}
        ended = False
        while not ended:
            process = _start(command, work)
            _until_at_work(process, work, case)
            process.join(moments.uniform(0, result.seconds) if result.kills < kills else _LONGEST)
            ended = process.exitcode is not None
            _kill_group(process)
            if ended and process.exitcode != 0:
                result.differences.append(f"started after kill {result.kills}: {_log(work)}")
                return result
            if not ended:
                result.kills += 1
                if result.kills % 10 == 0:
                    print(f"{case.name}: {result.kills} kills", file=sys.stderr, flush=True)
                result.in_a_write += any(work.rglob(".*.unfinished"))
            try:
                found = kept_work(work)
            except Exception as error:  # of whatever kind: a file under its final name cannot be read
                result.differences.append(f"after kill {result.kills}: {error}")
                return result
            result.differences += [
                f"{name}: {kept[name]} was kept, {found.get(name)} is there after kill {result.kills}"
                for name in kept
                if found.get(name, ()) < kept[name]
            ]
            kept = found
            result.with_work_kept += bool(kept) and not ended
        result.ends += 1
        made = content_of(work)
        result.differences += [
            f"{name} differs (after kill {result.kills})"
            for name in sorted(expected.keys() | made.keys())
            if expected.get(name) != made.get(name)
        ]
        if result.kills >= kills or result.differences:
            return result


def _start(command: Sequence[str], work: Path) -> ForkServerProcess:
    # forked from a process that has imported everything: else most of the time, and of the kills, would go there
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.training.trainer", "experiments.runner"])
    process = context.Process(target=_run, args=(list(command), work))
    process.start()
    return process


def _run(command: list[str], work: Path) -> None:
    os.setsid()  # a group of its own, which is killed as a whole
    os.chdir(work)
    with (work.parent / f"{work.name}.log").open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.argv = [str(MAIN), *command]
    runpy.run_path(str(MAIN), run_name="__main__")


def _until_at_work(process: ForkServerProcess, work: Path, case: Case) -> float:
    """Waits until the process holds the lock on its output, or has ended; gives the time."""
    deadline = time.monotonic() + _LONGEST
    signs: set[str] = set()
    while process.exitcode is None and time.monotonic() < deadline and not signs:
        time.sleep(0.002)
        for lock in work.glob(case.lock):
            with suppress(FileNotFoundError):  # let go of meanwhile
                signs |= {line for line in lock.read_text().splitlines() if line.startswith(f"process {process.pid} ")}
    return time.monotonic()


def _kill_group(process: ForkServerProcess) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def _log(work: Path) -> str:
    return (work.parent / f"{work.name}.log").read_text(errors="replace").strip()[-300:]


def _write_csv(file: Path, result: Killed) -> None:
    row = asdict(result) | {"differences": len(result.differences), "seconds": round(result.seconds, 2)}
    with written_whole(file) as aside, aside.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, row, lineterminator="\n")
        writer.writeheader()
        writer.writerow(row)


def main() -> int:
    """The exit code is 0 if there was no difference."""
    parser = argparse.ArgumentParser(prog="python -m tests.kill.harness", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=CASES)
    parser.add_argument("--kills", type=int, default=100, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the moments")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="over the command's settings")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill-"))
    result = kill(CASES[arguments.command], arguments.kills, folder, arguments.seed, arguments.words)
    print(result)
    if arguments.csv is not None:
        _write_csv(arguments.csv, result)
    if result.differences:
        print(f"{folder} is kept")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
