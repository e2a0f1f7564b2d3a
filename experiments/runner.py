"""Runs what is missing of a suite: each run and seed in its own process, several at once."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments import ROOT
from experiments.evaluate import evaluate
from experiments.prepare import prepare, prepare_data
from experiments.recalibrate import recalibrate
from experiments.suite import Run, Suite, Test
from experiments.training.run_directory import RunDirectory
from experiments.training.train import train
from vqa.io.errors import InputError
from vqa.io.files import naming_write_errors, read_json
from vqa.io.locks import held
from vqa.io.processes import Interrupted, StopRequest, block_signals_in_children
from vqa.saved_model.files import WEIGHTS
from vqa.settings.recipes import load_saved, load_settings
from vqa.settings.schema import Role, Settings, difference, role_of

MAIN = ROOT / "main.py"
# glibc returns large arrays to the system at each step, and every page of them faults when it is used again
_KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}


@dataclass(frozen=True)
class Job:
    """One training with all its tests."""

    run: Run
    seed: int

    @property
    def name(self) -> str:
        """Its name in messages."""
        return f"{self.run.name}, seed {self.seed}"

    @property
    def settings(self) -> Settings:
        """The settings it is trained with."""
        return self.run.settings[self.seed]

    def folder(self, runs: Path) -> Path:
        """Its run directory."""
        return runs / self.settings.name

    def check_settings(self, runs: Path) -> None:
        """Raises InputError if the results in its run directory were made with other settings."""
        folder = self.folder(runs)
        if why := difference(load_saved(folder / "config.yaml"), self.settings):
            raise InputError(f"{folder}: its results were made with other settings: {why}; move the directory away")

    def is_tested(self, runs: Path, test: Test) -> bool:
        """Whether the results of a test are there; raises as `check_settings`."""
        tested = test.folder(self.folder(runs))
        if not all((tested / name).exists() for name in test.files):
            return False
        self.check_settings(runs)
        return True

    def is_finished(self, runs: Path, tests: Sequence[Test]) -> bool:
        """Whether it is trained and tested; raises as `check_settings`."""
        return all(self.is_tested(runs, test) for test in tests)


def jobs_of(suite: Suite) -> list[Job]:
    """Every run with every seed; seed by seed, so that an unfinished suite can be compared."""
    return [Job(run, seed) for seed in suite.seeds for run in suite.runs]


def missing_jobs(suite: Suite, runs: Path) -> list[Job]:
    """The jobs that are not finished; raises as `Job.check_settings`."""
    return [job for job in jobs_of(suite) if not job.is_finished(runs, suite.tests)]


def job_named(suite: Suite, name: str, seed: int) -> Job:
    """A job of the suite. Raises InputError if it has no such run or seed."""
    for job in jobs_of(suite):
        if job.run.name == name and job.seed == seed:
            return job
    known, seeds = ", ".join(run.name for run in suite.runs), ", ".join(map(str, suite.seeds))
    raise InputError(f"{suite.file}: no run {name!r} with seed {seed}; runs are {known}; seeds are {seeds}")


def command_of(suite: Suite, job: Job) -> list[str]:
    """The command that runs one job alone."""
    only = ["--only", job.run.name, "--seed", str(job.seed)]
    file = os.path.join(".", suite.file) if str(suite.file).startswith("-") else str(suite.file)  # noqa: PTH118
    return [sys.executable, str(MAIN), "experiment", file, *only, *suite.words]


def run_job(job: Job, suite: Suite, runs: Path) -> None:
    """Trains and tests one run with one seed in this process, except for what is done already.

    A finished job is skipped, also where only its results are there (published evidence). The data and the backbone
    that it needs, which other runs may share, are made first. Raises InputError as `prepare`, `train`, `recalibrate`,
    `evaluate`.
    """
    folder = job.folder(runs)
    if job.is_finished(runs, suite.tests):
        print(f"{folder}: finished, nothing to do")
        return
    with held(runs / "experiments" / ".lock", "data and backbones", wait=True):
        prepare(job.settings)
        for test in suite.tests:
            if test.words:
                words = (*suite.seeds[job.seed], *job.run.words, *suite.words, *test.words)
                prepare_data(load_settings(suite.recipe, words, where=str(suite.file)))
    with held(folder / ".lock", folder, wait=True):
        run = RunDirectory(folder)
        if (run.model / WEIGHTS).exists():
            run.check(job.settings, resume=True)  # a run whose checkpoint alone is gone is not trained again
        if not run.checkpoint.exists():
            _remove_results(folder)
        train(job.settings, resume=True, runs=runs)
        for test in suite.tests:
            if job.is_tested(runs, test):
                continue
            out = test.folder(folder)
            words = [word for word in (*suite.words, *test.words) if role_of(word.partition("=")[0]) is Role.DATA]
            if test.recalibrate:
                recalibrate(folder, out, test.recalibrate, words)
            evaluate(out if test.recalibrate else folder, test.split, out, words, per_question=True)


def _remove_results(folder: Path) -> None:
    """Remove results whose training is gone (they came from a zip file), so that they do not mix with new ones."""
    shutil.rmtree(folder / "tests", ignore_errors=True)
    names = ("metrics_*.json", "accuracies_*.npz", "results_*.json", "metrics.jsonl", "environment.json")
    for file in [file for name in names for file in folder.glob(name)]:
        file.unlink()


def run_suite(suite: Suite, runs: Path, at_once: int | None = None) -> str | None:
    """Runs what is missing of a suite; a run that fails does not stop the others.

    Returns how many failed, and where the first one's log is; None if none did. `at_once` trainings run in parallel, by
    default one per GPU. Recipes that name the CPU get a thread each, so that their numbers do not depend on the number
    of cores, and by default as many at once as there are cores (and 2 GiB of memory a run).

    Raises:
        InputError: another process runs this suite.
        Interrupted: by a signal, after the runs have saved their state and ended.
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
                    scores = [read_json(test.folder(job.folder(runs)) / test.files[0]) for test in suite.tests]
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
    """Run jobs side by side; yield each one that ends, the reason if it failed, and its seconds."""
    free = _environments(jobs, at_once)
    waiting, running = list(jobs), {}
    try:
        while waiting or running:
            while waiting and free:
                job = waiting.pop(0)
                try:
                    with StopRequest():  # a signal waits until the new process is in `running`
                        process = _start(suite, job, runs, free[0])
                        running[process] = (job, free.pop(0), time.monotonic())
                except InputError as error:  # a full disk
                    yield job, f"error: {error}", 0.0
            time.sleep(0.2)
            for process in [process for process in running if process.poll() is not None]:
                job, environment, begun = running.pop(process)
                free.append(environment)
                yield job, _failure(process.returncode, job.folder(runs) / "log.txt"), time.monotonic() - begun
    finally:
        _end(running)


def _environments(jobs: Sequence[Job], at_once: int | None) -> list[dict[str, str]]:
    """The environment variables of each of the runs at the same time: its GPU, and its share of the cores.

    Where a run names its own GPU, as `cuda:1`, all see every GPU.
    """
    # a cluster gives a job some cores of a machine; macOS cannot tell
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if all(job.settings.device == "cpu" for job in jobs):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        count, threads = at_once or max(min(cores, memory // 2**31), 1), 1
    elif (gpus := torch.cuda.device_count()) and not any(":" in job.settings.device for job in jobs):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus)))).split(",")
        count = at_once or gpus
        threads = {"OMP_NUM_THREADS": str(max(cores // count, 1))}
        return [threads | {"CUDA_VISIBLE_DEVICES": visible[place % gpus]} for place in range(count)]
    else:
        count, threads = at_once or 1, max(cores // (at_once or 1), 1)
    return [_KEEP_MEMORY | {"OMP_NUM_THREADS": str(threads)} for _ in range(count)]


def _start(suite: Suite, job: Job, runs: Path, environment: dict[str, str]) -> subprocess.Popen:
    log = job.folder(runs) / "log.txt"
    with naming_write_errors(log):
        log.parent.mkdir(parents=True, exist_ok=True)
        file = log.open("a")
    # signals are handled by this process, which sends SIGTERM to its children
    with file, block_signals_in_children(but=signal.SIGTERM):
        return subprocess.Popen(
            command_of(suite, job), stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment
        )


def _failure(code: int, log: Path) -> str | None:
    """Why a job failed, by its exit code and the last line of its log; None if it did not."""
    if code <= 0:
        return f"killed by signal {-code}" if code else None
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    last = lines[-1] if lines else "the log is empty"
    return last if last.startswith("error: ") else f"exit code {code}: {last}"


def _end(processes: Iterable[subprocess.Popen]) -> None:
    """Ask processes to save and end, and wait until they have; another Ctrl-C kills them."""
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
