"""Hands the missing runs of a suite to a cluster: one array job, started and followed by submitit."""

import shlex
from pathlib import Path

from data.errors import InputError, first_line
from experiments.runner import command_of, missing_jobs
from experiments.suite import Suite


def submit(suite: Suite, runs: Path, cluster: str, resources: str) -> list[str]:
    """Submits each missing run and seed as a task of an array; the first to come makes the data and the backbone.

    Args:
        suite: what to run.
        runs: where run directories are, on a disk that the cluster's machines share.
        cluster: `slurm`.
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
    try:
        words = shlex.split(resources)
    except ValueError as error:
        raise InputError(f"--resources: {str(error).lower()}") from None
    given = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise InputError(f"--resources: {word!r} is no NAME=VALUE")
        given[name] = int(value) if value.isdecimal() else value
    commands = [command_of(suite, job) for job in missing_jobs(suite, runs)]
    if not commands:
        return []
    try:
        executor = submitit.AutoExecutor(runs / "experiments" / "submitted", cluster=cluster)
        executor.update_parameters(name=suite.name, **given)
        with executor.batch():
            tasks = [executor.submit(submitit.helpers.CommandFunction(command, cwd=Path.cwd())) for command in commands]
    except (NameError, TypeError, RuntimeError, ValueError) as error:  # of submitit: wrong parameters, no cluster
        raise InputError(f"--submit {cluster}: {first_line(error)}") from None
    return [task.job_id for task in tasks]
