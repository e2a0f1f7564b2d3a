"""Runs what is missing of a suite: each run and seed in a process of its own, one a GPU, or one a core."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments import ROOT
from experiments.evaluate import evaluate
from experiments.prepare import prepare
from experiments.recalibrate import recalibrate
from experiments.suite import Run, Suite, Test
from experiments.training.run_directory import RunDirectory
from experiments.training.trainer import train
from vqa.io.errors import InputError
from vqa.io.files import naming_write_errors, read_json
from vqa.io.locks import held
from vqa.io.processes import Interrupted, StopRequest, block_signals_in_children
from vqa.settings.recipes import load_saved, load_settings
from vqa.settings.schema import Role, Settings, difference, role_of

MAIN = ROOT / "main.py"
# glibc gives large arrays back to the system at each step, and each page of them is a fault when it is used again
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


@dataclass(frozen=True)
class Job:
    """One training with all its tests."""

    run: Run
    seed: int

    @property
    def name(self) -> str:
        """As it is shown."""
        return f"{self.run.name}, seed {self.seed}"

    @property
    def settings(self) -> Settings:
        """Its settings."""
        return self.run.seeded(self.seed)

    def folder(self, runs: Path) -> Path:
        """Its run directory."""
        return runs / self.settings.name

    def is_finished(self, runs: Path, tests: Sequence[Test]) -> bool:
        """Whether it is trained and tested.

        Raises:
            InputError: the results there were made with other settings.
        """
        return all(is_tested(self.settings, runs, test) for test in tests)


def jobs_of(suite: Suite) -> list[Job]:
    """Every run with every seed; seed by seed, so that an unfinished suite can be compared."""
    return [Job(run, seed) for seed in suite.seeds for run in suite.runs]


def missing_jobs(suite: Suite, runs: Path) -> list[Job]:
    """The jobs that are not finished."""
    return [job for job in jobs_of(suite) if not job.is_finished(runs, suite.tests)]


def job_named(suite: Suite, name: str, seed: int | None) -> Job:
    """A job of the suite. Raises InputError if it has no such run or seed."""
    for job in jobs_of(suite):
        if job.run.name == name and job.seed == seed:
            return job
    known = ", ".join(run.name for run in suite.runs)
    raise InputError(f"{suite.file}: no run {name!r} with seed {seed}; runs are {known}; seeds {suite.seeds}")


def folder_of(folder: Path, test: Test) -> Path:
    """Where a test of a run is written: the run directory itself for the plain one."""
    return folder if test.label == "plain" else folder / "tests" / test.label


def is_tested(settings: Settings, runs: Path, test: Test) -> bool:
    """Whether the run directory that these settings name holds the results of a test; raises as `check_settings`."""
    tested = folder_of(runs / settings.name, test)
    if not all((tested / name).exists() for name in test.files):
        return False
    check_settings(settings, runs)
    return True


def check_settings(settings: Settings, runs: Path) -> None:
    """Raises InputError if the results in the run directory that these settings name were made with other ones."""
    folder = runs / settings.name
    if why := difference(load_saved(folder / "config.yaml"), settings):
        raise InputError(f"{folder}: its results were made with other settings: {why}; move the directory away")


def run_job(job: Job, suite: Suite, runs: Path) -> None:
    """Trains and tests one run with one seed, as far as that is not done, in this process.

    What is finished is left alone, also where only its results are there (published evidence). The data and the
    backbone that it needs, and that other runs may share, are made first.

    Raises:
        InputError: as `prepare`, `train` and `evaluate`.
    """
    folder = job.folder(runs)
    if job.is_finished(runs, suite.tests):
        print(f"{folder}: finished, nothing to do")
        return
    with held(runs / "experiments" / ".lock", "data and backbones", wait=True):
        prepare(job.settings)
        for test in suite.tests:
            if test.words:
                words = (*job.run.words, *suite.words, *test.words)
                prepare(load_settings(suite.recipe, words, where=suite.file))
    with held(folder / ".lock", folder, wait=True):
        if not RunDirectory(folder).checkpoint.exists():
            _remove_results(folder)
        train(job.settings, resume=True, runs=runs)
        for test in suite.tests:
            out = folder_of(folder, test)
            if is_tested(job.settings, runs, test):
                continue
            words = [word for word in (*suite.words, *test.words) if role_of(word.partition("=")[0]) is Role.DATA]
            if test.recalibrate:
                recalibrate(folder, out, test.recalibrate, words)
            evaluate(out if test.recalibrate else folder, test.split, out, words, per_question=True)


def _remove_results(folder: Path) -> None:
    """Of a training that is gone (its results came from a zip file): the new one's must not stand beside them."""
    shutil.rmtree(folder / "tests", ignore_errors=True)
    of_tests = [file for kind in ("metrics_*.json", "accuracies_*.npz", "results_*.json") for file in folder.glob(kind)]
    for file in (*of_tests, *(folder / name for name in ("metrics.jsonl", "environment.json", "config.yaml"))):
        file.unlink(missing_ok=True)


def run_suite(suite: Suite, runs: Path, at_once: int | None = None) -> str | None:
    """Runs what is missing of a suite; a run that fails does not stop the others.

    Args:
        suite: what to run.
        runs: where run directories are.
        at_once: trainings at the same time; by default one a GPU. Recipes that name the CPU get a thread each, so that
            their numbers do not depend on the number of cores, and by default as many at once as there are cores (and
            2 GiB of memory a run).

    Returns:
        How many failed, and where the first one's log is; None if none did.

    Raises:
        InputError: another process runs this suite.
        Interrupted: by a signal, when the runs have saved what they did and ended.
    """
    with held(runs / "experiments" / f".{suite.report_name}.lock", f"suite {suite.report_name}"):
        missing = missing_jobs(suite, runs)
        count = len(jobs_of(suite))
        print(f"{suite.name}: {count} runs, {count - len(missing)} of them finished", flush=True)
        failed = []
        with closing(_run_all(suite, missing, runs, at_once)) as ended:
            for number, (job, failure, seconds) in enumerate(ended, 1):
                said = failure
                if failure is None:
                    scores = [read_json(folder_of(job.folder(runs), test) / test.files[0]) for test in suite.tests]
                    said = ", ".join(f"{score['overall']:.2f} %" for score in scores)
                else:
                    failed.append(job)
                print(f"{number}/{len(missing)}  {job.name}: {said}  ({seconds:.0f} s)", flush=True)
    if failed:
        return f"{len(failed)} of {len(missing)} runs failed; see {failed[0].folder(runs) / 'log.txt'}"
    return None


def _run_all(
    suite: Suite, jobs: Sequence[Job], runs: Path, at_once: int | None
) -> Iterator[tuple[Job, str | None, float]]:
    """Starts jobs as places become free; gives each with why it failed, if it did, and its seconds when it ends."""
    on_cpu = all(job.settings.device == "cpu" for job in jobs)
    gpus = 0 if on_cpu else torch.cuda.device_count()
    count = at_once or gpus or (_cores_with_memory() if on_cpu else 1)
    threads = 1 if on_cpu else max((os.cpu_count() or 1) // count, 1)
    places = list(range(min(count, len(jobs))))
    waiting, running = list(jobs), {}
    try:
        while waiting or running:
            while waiting and places:
                job = waiting.pop(0)
                try:
                    with StopRequest():  # else a signal might come before the new process is known here
                        process = _start(suite, job, runs, _surroundings(places[0], gpus, threads))
                        running[places.pop(0)] = (job, process, time.monotonic())
                except InputError as error:  # a full disk
                    yield job, f"error: {error}", 0.0
            time.sleep(0.2)
            for place, (job, process, begun) in list(running.items()):
                if process.poll() is not None:
                    del running[place]
                    places.append(place)
                    yield job, _failure(process.returncode, job.folder(runs)), time.monotonic() - begun
    finally:
        _end([process for _, process, _ in running.values()])


def _start(suite: Suite, job: Job, runs: Path, surroundings: dict[str, str]) -> subprocess.Popen:
    log = job.folder(runs) / "log.txt"
    with naming_write_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("a")
    # every signal is answered here, and handed on as SIGTERM
    with file, block_signals_in_children(but=signal.SIGTERM):
        return subprocess.Popen(
            command_of(suite, job), stdout=file, stderr=subprocess.STDOUT, env=os.environ | surroundings
        )


def _failure(code: int, folder: Path) -> str | None:
    """Why a job failed, by its exit code and the last line that it could write; None if it did not."""
    if code <= 0:
        return f"killed by signal {-code}" if code else None
    said = _last_line(folder / "log.txt")
    return said if said.startswith("error: ") else f"exit code {code}: {said}"


def _end(processes: Sequence[subprocess.Popen]) -> None:
    """Asks processes to save and end, and waits until they have; another Ctrl-C kills them."""
    while True:
        try:
            for process in processes:
                process.terminate()
            for process in processes:
                process.wait()
            return
        except Interrupted as again:
            if again.number == signal.SIGINT:
                for process in processes:
                    process.kill()


def command_of(suite: Suite, job: Job) -> list[str]:
    """The command that runs one job alone."""
    only = ["--only", job.run.name, "--seed", str(job.seed)]
    return [sys.executable, str(MAIN), "experiment", str(suite.file), *only, *suite.words]


def _cores_with_memory() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(min(os.cpu_count() or 1, memory // 2**31), 1)


def _surroundings(place: int, gpus: int, threads: int) -> dict[str, str]:
    """Environment variables of a job: its GPU, or its share of the cores."""
    if gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        return {"CUDA_VISIBLE_DEVICES": visible[place % gpus]}
    return _KEEP_MEMORY | {"OMP_NUM_THREADS": str(threads)}


def _last_line(file: Path) -> str:
    lines = file.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1] if lines else "no word"
