"""Hands the missing runs of a suite to a cluster: one array job, started and followed by submitit."""

import shlex
from pathlib import Path

from data.errors import InputError
from experiments.runner import command_of, missing_jobs, prepare_suite
from experiments.suite import Suite


def submit(suite: Suite, runs: Path, cluster: str, resources: str) -> list[str]:
    """Submits each missing run and seed as a task of an array; data and backbones are made here first.

    Args:
        suite: what to run.
        runs: where run directories are, on a disk that the cluster's machines share.
        cluster: `slurm`, or `local` for processes on this machine.
        resources: what a task is given, in submitit's words: `timeout_min=240 gpus_per_node=1 slurm_partition=gpu`.

    Returns:
        The tasks' ids; none where nothing is missing.

    Raises:
        InputError: submitit or the cluster's commands are not there, or do not know a resource.
    """
    try:
        import submitit
    except ImportError:
        raise InputError("--submit needs submitit: pip install submitit") from None
    given = {}
    for word in shlex.split(resources):
        name, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"--resources: {word!r} is no NAME=VALUE")
        given[name] = int(value) if value.isdecimal() else value
    prepare_suite(suite, runs)
    commands = [command_of(suite, job) for job in missing_jobs(suite, runs)]
    if not commands:
        return []
    try:
        executor = submitit.AutoExecutor(runs / "experiments" / "submitted", cluster=cluster)
        executor.update_parameters(name=suite.name, **given)
    except (NameError, TypeError, RuntimeError, ValueError) as error:  # what submitit raises on wrong parameters
        raise InputError(f"--submit {cluster}: {str(error).splitlines()[0]}") from None
    with executor.batch():
        tasks = [executor.submit(submitit.helpers.CommandFunction(command, cwd=Path.cwd())) for command in commands]
    return [task.job_id for task in tasks]
