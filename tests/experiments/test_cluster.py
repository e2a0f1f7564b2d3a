"""Suites on a cluster: nothing is submitted twice, and a time limit costs no work. SLURM's commands are stand-ins."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import cluster
from experiments.runner import jobs_of, run_job
from tests.processes import CHILDREN, wait_until
from tests.tiny_suite import SUITE, TINY, TWO_BACKBONES

pytest.importorskip("submitit")
COMMANDS = {
    "sbatch": 'cp "$1" "$STAND_IN_OF_SLURM/script_$(ls "$STAND_IN_OF_SLURM" | grep -c script)"\n'
    'echo "Submitted batch job $((6 + $(ls "$STAND_IN_OF_SLURM" | grep -c script)))"',
    "srun": f'echo $$ > "$STAND_IN_OF_SLURM/task"\nwhile [ "$1" != "{sys.executable}" ]; do shift; done\nexec "$@"',
    "squeue": 'cat "$STAND_IN_OF_SLURM/queue"',
    "scontrol": 'echo "$@" >> "$STAND_IN_OF_SLURM/scontrol"',
}
# is asked to save, and resumes the next time
RUN = """
import pathlib, signal, sys, time
told = pathlib.Path(sys.argv[1])
def end(*_):
    time.sleep(0.5)
    told.write_text("saved")
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
if told.exists() and told.read_text() == "saved":
    told.write_text("finished")
    sys.exit()
told.write_text("begun")
time.sleep(60)
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Stand-ins of SLURM's commands; the folder of what they keep."""
    commands, kept = tmp_path / "bin", tmp_path / "slurm"
    commands.mkdir()
    kept.mkdir()
    for name, does in COMMANDS.items():
        (commands / name).write_text(f"#!/bin/sh\n{does}\n")
        (commands / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN_OF_SLURM", str(kept))
    return kept


def test_missing_runs_are_submitted_as_one_array_and_only_once(suite, slurm, tmp_path, done, refused):
    run_job(jobs_of(suite)[0], suite, tmp_path / "runs")
    words = ["experiment", "two.yaml", "--submit", "slurm", "--resources"]
    assert "3 runs submitted" in done(*words, "timeout_min=240 slurm_partition=gpu", *TINY).out
    script = (slurm / "script_0").read_text()
    for line in ("array=0-2%3", "time=240", "partition=gpu", "signal=USR2@90", "requeue", "job-name=two"):
        assert f"#SBATCH --{line}\n" in script
    assert "squeue cannot list the queued tasks" in refused(*words, "", *TINY)
    (slurm / "queue").write_text("7_0\n7_2\n")  # the second has failed
    told = done(*words, "", *TINY).out
    assert "2 runs are queued already and not submitted again" in told
    assert "1 runs submitted" in told
    assert "--array" not in (slurm / "script_1").read_text()
    (slurm / "queue").write_text("7_0\n7_2\n8\n")
    assert "0 runs submitted" in done(*words, "", *TINY).out
    (tmp_path / "again.yaml").write_text((tmp_path / "two.yaml").read_text())  # another suite with the same runs
    for file in ("./two.yaml", tmp_path / "again.yaml"):
        assert "3 runs are queued already" in done("experiment", file, *words[2:], "", *TINY).out
    record = tmp_path / "runs" / "experiments" / "submitted" / "tasks.json"
    record.write_text("[1]")
    assert "tasks.json: damaged" in refused(*words, "", *TINY)
    record.unlink()
    (slurm / "queue").write_text("")
    assert "'much' is not NAME=VALUE" in refused(*words, "much")
    assert "no closing quotation" in refused(*words, "'")
    assert "patrition" in refused(*words, "patrition=gpu")
    assert "timeout_min" in refused(*words, "timeout_min=long")


def test_seeds_with_backbones_of_their_own_are_other_tasks(suite, slurm, done):
    words = ["--submit", "slurm", *TINY]
    suite.file.write_text(TWO_BACKBONES)
    assert "2 runs submitted" in done("experiment", "two.yaml", *words).out
    (slurm / "queue").write_text("7_0\n7_1\n")
    suite.file.write_text(SUITE[: SUITE.index("  lost")])
    told = done("experiment", "two.yaml", *words).out
    assert "1 runs are queued already" in told  # seed 1, which changes nothing else
    assert "1 runs submitted" in told


def run_script(slurm) -> subprocess.Popen:
    """As SLURM runs it on a node."""
    around = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    environment = {**around, "SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"}
    return subprocess.Popen(["bash", slurm / "script_0"], env=environment)


@pytest.mark.skipif(not CHILDREN.exists(), reason="finds processes in Linux's /proc")
@pytest.mark.parametrize("children_too", [False, True])
def test_before_a_time_limit_a_task_saves_and_is_requeued(suite, slurm, tmp_path, monkeypatch, children_too):
    told = tmp_path / "told"
    monkeypatch.setattr("experiments.runner.missing_jobs", lambda *_: jobs_of(suite)[:1])
    monkeypatch.setattr("experiments.runner.command_of", lambda *_: [sys.executable, "-c", RUN, str(told)])
    assert cluster.submit(suite, tmp_path / "runs", "slurm", "timeout_min=60") == ["7"]
    script = run_script(slurm)
    wait_until(lambda: told.exists() and told.read_text() == "begun")
    task = int((slurm / "task").read_text())
    children = Path(f"/proc/{task}/task/{task}/children").read_text().split() if children_too else []
    for process in (*map(int, children), task):
        os.kill(process, signal.SIGUSR2)
    script.wait(timeout=60)
    assert told.read_text() == "saved"
    assert (slurm / "scontrol").read_text() == "requeue 7\n"
    assert run_script(slurm).wait(timeout=60) == 0
    assert told.read_text() == "finished"
