"""Submit the missing runs of a suite to a cluster as one array job, through submitit."""

import os
import shlex
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments import ROOT
from vqa.io.errors import InputError, first_line
from vqa.io.files import read_json, write_json
from vqa.io.locks import held
from vqa.io.processes import block_signals_in_children

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

    from experiments.suite import Suite

_REQUEUES = 100  # after time limits; submitit's own default is 3


class Task:
    """A command as a task of the cluster; before the time limit its process saves, and the task is requeued."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.command, self.folder, self.process = command, folder, 0

    def __call__(self) -> None:
        """Run the command to its end; raises CalledProcessError if it failed."""
        # submitit handles the cluster's signal in this process, by `checkpoint`; children may get it or not
        with block_signals_in_children(but=signal.SIGTERM):
            process = subprocess.Popen(self.command, cwd=self.folder)
            self.process = process.pid
        _wait(self.process)
        if code := process.wait():
            raise subprocess.CalledProcessError(code, self.command)

    def checkpoint(self) -> "DelayedSubmission":
        """Ask the process to save, wait until it has, and return the task to be requeued."""
        from submitit.helpers import DelayedSubmission

        if self.process:
            with suppress(ProcessLookupError, ChildProcessError):  # it has ended by itself
                os.kill(self.process, signal.SIGTERM)
                _wait(self.process)
        return DelayedSubmission(Task(self.command, self.folder))


def _wait(process: int) -> None:
    """Wait for the end of a process, without the lock of Popen.wait: a signal handler may do it meanwhile."""
    os.waitid(os.P_PID, process, os.WEXITED | os.WNOWAIT)


def submit(suite: "Suite", runs: Path, cluster: str, resources: str) -> list[str]:
    """Submits each missing run and seed that is not queued yet, by this suite or another with the same tests, as a task
    of an array; the first task that starts makes the data and the backbone. Returns the tasks' ids.

    `runs` is on a disk that the cluster's machines share. `resources` are those of each task, by submitit's names:
    `timeout_min=240 gpus_per_node=1 slurm_partition=gpu`.

    Raises:
        InputError: submitit or the cluster's commands are missing, or a resource is unknown to them.
    """
    try:
        import submitit
    except ImportError:
        raise InputError("--submit needs submitit: pip install submitit") from None
    from experiments.runner import command_of, missing_jobs  # with torch, which a task does without

    parameters = _parameters(resources)
    folder = runs / "experiments" / "submitted"
    record = folder / "tasks.json"
    with held(folder / ".lock", folder, wait=True):
        queued = _still_queued(record)
        tests = [str(test.folder(Path()) / test.files[0]) for test in suite.tests]
        missing = {shlex.join([job.settings.name, *tests]): command_of(suite, job) for job in missing_jobs(suite, runs)}
        commands = {does: command for does, command in missing.items() if does not in queued}
        if len(commands) < len(missing):
            print(f"{len(missing) - len(commands)} runs are queued already and not submitted again")
        if not commands:
            return []
        try:
            executor = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=_REQUEUES)
            executor.update_parameters(name=suite.name, **parameters)
            with executor.batch():
                tasks = [executor.submit(Task(command, Path.cwd())) for command in commands.values()]
        # submitit's errors for wrong parameters, or no cluster
        except (NameError, TypeError, RuntimeError, ValueError, AssertionError) as error:
            raise InputError(f"--submit {cluster}: {first_line(error)}") from None
        ids = [task.job_id for task in tasks]
        write_json(record, queued | dict(zip(commands, ids, strict=True)))
    return ids


def _parameters(resources: str) -> dict[str, Any]:
    try:
        words = shlex.split(resources)
    except ValueError as error:
        raise InputError(f"--resources: {str(error).lower()}") from None
    given: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"--resources: {word!r} is not NAME=VALUE")
        given[name] = int(value) if value.isdecimal() else value
    given["slurm_setup"] = [f"export PYTHONPATH={shlex.quote(str(ROOT))}${{PYTHONPATH:+:$PYTHONPATH}}"]
    return given | {"slurm_additional_parameters": {"requeue": True}}


def _still_queued(record: Path) -> dict[str, str]:
    """The ids, by what they do, of the tasks that were submitted and are still waiting or running."""
    submitted = read_json(record) if record.exists() else {}
    if not isinstance(submitted, dict):
        raise InputError(f"{record}: damaged; remove it when none of these tasks is queued")
    if not submitted:
        return {}
    words = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    except (OSError, subprocess.SubprocessError) as error:
        raise InputError(f"--submit: squeue cannot list the queued tasks ({first_line(error)})") from None
    return {does: task for does, task in submitted.items() if task in said}
