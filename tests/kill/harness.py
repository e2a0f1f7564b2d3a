"""Kill a command at random moments, again and again, and compare its output with that of an undisturbed run.

    python -m tests.kill.harness train --kills 100

Makes tiny data and runs the command once undisturbed. Then starts it again and again, and kills it (SIGKILL, with its
workers and the runs it started) after a random time since it began to work, at most as long as the undisturbed run
worked. After each kill, every file under its final name must be complete, and no saved work may be lost. Each time the
command ends by itself, its output must be that of the undisturbed run: weights and checkpoints bit for bit, h5 files by
content, metrics line for line (except times and memory). Then it starts again.
"""

import argparse
import os
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
from random import Random

from experiments.tables import write_lines
from tests.kill.cases import CASES, Case, content_of, saved_work
from tests.processes import MainProcess

_LONGEST = 600.0  # seconds until a command that does not end is an error


@dataclass
class Outcome:
    """What killing a command showed."""

    command: str
    kills: int = 0
    ends: int = 0  # how often it ended by itself
    seconds: float = 0.0  # that the undisturbed run worked
    in_a_write: int = 0  # kills that left an unfinished temporary file
    with_work_kept: int = 0  # kills after which the next start found saved work
    differences: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        found = "; ".join(self.differences) or "no difference from the undisturbed run"
        return (
            f"{self.command}: {self.kills} kills ({self.in_a_write} in the middle of a file, "
            f"{self.with_work_kept} with work kept), {self.ends} ends: {found}"
        )


def kill(case: Case, kills: int, folder: Path, seed: int = 0, words: Sequence[str] = ()) -> Outcome:
    """Kill a command `kills` times; stop at the first difference.

    Args:
        case: one of CASES.
        kills: number of kills.
        folder: where data and outputs are made.
        seed: seed of the moments.
        words: `key.sub=value` settings of the command.

    Raises:
        RuntimeError: the undisturbed run failed.
    """
    random, outcome = Random(seed), Outcome(case.name)
    case.prepare(folder)
    command = [*case.words(folder), *words]
    whole, work = folder / "whole", folder / "killed"
    case.begin(whole)
    process = _start(command, whole)
    _wait_for_work(process, whole, case)
    start = time.monotonic()
    process.join(_LONGEST)
    outcome.seconds = time.monotonic() - start
    if process.exitcode != 0:
        raise RuntimeError(f"{case.name}: undisturbed, it ended with {process.exitcode}: {_log(whole)}")
    expected = content_of(whole)

    while outcome.kills < kills and not outcome.differences:
        case.begin(work)
        saved: dict[str, tuple[int, ...]] = {}
        ended = False
        while not ended:
            process = _start(command, work)
            _wait_for_work(process, work, case)
            process.join(random.uniform(0, outcome.seconds) if outcome.kills < kills else _LONGEST)
            ended = process.exitcode is not None
            _kill_group(process)
            if not ended:
                outcome.kills += 1
                outcome.in_a_write += any(work.rglob(".*.unfinished"))
                if outcome.kills % 10 == 0:
                    print(f"{case.name}: {outcome.kills} kills", file=sys.stderr, flush=True)
            elif process.exitcode != 0:
                outcome.differences.append(f"started after kill {outcome.kills}: {_log(work)}")
                return outcome
            try:
                found = saved_work(work)
            except Exception as error:  # of whatever kind: a file under its final name cannot be read
                outcome.differences.append(f"after kill {outcome.kills}: {error}")
                return outcome
            outcome.differences += [
                f"{name}: {progress} was saved, {found.get(name)} is there after kill {outcome.kills}"
                for name, progress in saved.items()
                if found.get(name, ()) < progress
            ]
            saved = found
            outcome.with_work_kept += bool(saved) and not ended
        outcome.ends += 1
        made = content_of(work)
        outcome.differences += [
            f"{name} differs (after kill {outcome.kills})"
            for name in sorted(expected.keys() | made.keys())
            if expected.get(name) != made.get(name)
        ]
    return outcome


def _start(command: Sequence[str], work: Path) -> ForkServerProcess:
    # forked: else most of the time, and of the kills, would go into imports
    return MainProcess(*command, folder=work, own_group=True, log=work.parent / f"{work.name}.log").process


def _wait_for_work(process: ForkServerProcess, work: Path, case: Case) -> None:
    """Wait until the process holds the lock on its output, or has ended."""
    deadline, mark = time.monotonic() + _LONGEST, f"process {process.pid} "
    while process.exitcode is None and time.monotonic() < deadline:
        for lock in work.glob(case.lock):
            with suppress(FileNotFoundError):  # released meanwhile
                if any(line.startswith(mark) for line in lock.read_text().splitlines()):
                    return
        time.sleep(0.002)


def _kill_group(process: ForkServerProcess) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()


def _log(work: Path) -> str:
    return (work.parent / f"{work.name}.log").read_text(errors="replace").strip()[-300:]


def main() -> int:
    """Return exit code 0 if there was no difference."""
    parser = argparse.ArgumentParser(prog="python -m tests.kill.harness", description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=CASES)
    parser.add_argument("--kills", type=int, default=100, metavar="N")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the moments")
    parser.add_argument("--csv", type=Path, metavar="FILE")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="settings of the command")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kill-"))
    outcome = kill(CASES[arguments.command], arguments.kills, folder, arguments.seed, arguments.words)
    print(outcome)
    if arguments.csv is not None:
        row = asdict(outcome) | {"differences": len(outcome.differences), "seconds": round(outcome.seconds, 2)}
        write_lines(arguments.csv, [row])
    if outcome.differences:
        print(f"{folder} is kept")
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
