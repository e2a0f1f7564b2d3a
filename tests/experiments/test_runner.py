"""The runner: what is finished is not repeated, what was killed resumes, what fails does not stop the rest."""

import json
import os
import shutil
import signal
import zipfile
from dataclasses import replace

import pytest

from experiments.pretrain import header_of
from experiments.report.results import keep_evidence
from experiments.runner import _environments, jobs_of, missing_jobs, run_job, run_suite
from experiments.suite import Test as SuiteTest
from experiments.suite import load_suite
from tests.processes import MainProcess, fork_children, wait_until
from tests.tiny_suite import SUITE, TINY, TWO_BACKBONES
from vqa.io.errors import InputError
from vqa.settings.recipes import load_saved


def test_a_failed_run_is_reported_and_the_others_continue(suite, tmp_path, monkeypatch, capsys, refused):
    fork_children(monkeypatch, "experiments.runner")
    runs = tmp_path / "runs"
    failed = run_suite(suite, runs, at_once=2)
    assert failed.startswith("2 of 4 runs failed; see ")
    told = capsys.readouterr().out
    assert "lost, seed 1: error: nowhere.txt: no such file" in told
    assert [job.name for job in missing_jobs(suite, runs)] == ["lost, seed 1", "lost, seed 2"]
    finished = [job.folder(runs) / "model" / "model.safetensors" for job in jobs_of(suite) if job.run.name == "none"]
    made = [file.stat().st_mtime_ns for file in finished]
    assert "2 of 2 runs failed" in refused("experiment", "two.yaml", "--at-once", 2, *TINY)
    assert [file.stat().st_mtime_ns for file in finished] == made  # nothing finished was trained again


@pytest.mark.usefixtures("wide")  # a run is started by a process that is not forked
def test_killed_it_resumes_and_repeats_nothing(suite, tmp_path, monkeypatch, done):
    (tmp_path / "two.yaml").write_text(SUITE[: SUITE.index("  lost")])
    words = ["two.yaml", "--at-once", "1", *TINY, "train.epochs=20"]
    runs = tmp_path / "runs"
    suite = load_suite(tmp_path / "two.yaml", (*TINY, "train.epochs=20"))
    first, second = jobs_of(suite)
    run_job(first, suite, runs)
    begun = MainProcess("experiment", *words, own_group=True)
    wait_until((second.folder(runs) / "checkpoints" / "last.pt").exists)
    os.killpg(begun.pid, signal.SIGKILL)
    begun.wait()
    assert not second.is_finished(runs, suite.tests)
    made = (first.folder(runs) / "model" / "model.safetensors").stat().st_mtime_ns
    fork_children(monkeypatch, "experiments.runner")
    ended = done("experiment", *words)
    assert "2 runs, 1 of them finished" in ended.out
    assert "resumes at epoch" in (second.folder(runs) / "log.txt").read_text()
    assert not missing_jobs(suite, runs)
    assert (first.folder(runs) / "model" / "model.safetensors").stat().st_mtime_ns == made


@pytest.mark.usefixtures("suite")
def test_commands_that_are_listed_run_one_job_each(done, refused):
    words = list(TINY)
    listed = done("experiment", "two.yaml", "--list", *words).out.splitlines()
    assert len(listed) == 4
    assert "--only none --seed 1 " in listed[0]
    done("experiment", "two.yaml", "--only", "none", "--seed", 1, *words)
    assert len(done("experiment", "two.yaml", "--list", *words).out.splitlines()) == 3
    assert "no run 'nine'" in refused("experiment", "two.yaml", "--only", "nine", "--seed", 1)
    assert "no run 'none' with seed 9" in refused("experiment", "two.yaml", "--only", "none", "--seed", 9)
    assert "belong together" in refused("experiment", "two.yaml", "--only", "none")


DARK = '"scenes.look=dark data.folder=dark data.h5=dark.h5"'


def test_a_seed_is_prepared_trained_and_tested_with_what_it_changes(suite, tmp_path, done):
    suite.file.write_text(f"{TWO_BACKBONES}tests: {{'': {{}}, dark: {{settings: {DARK}}}}}\n")
    first, second = done("experiment", "two.yaml", "--list", *TINY).out.splitlines()
    assert "--only none --seed 2 " in second
    done("experiment", "two.yaml", "--only", "none", "--seed", 2, *TINY)
    assert done("experiment", "two.yaml", "--list", *TINY).out.splitlines() == [first]
    backbones = [file for file in tmp_path.rglob("*.safetensors") if file.parent.name != "model"]
    assert [(file.name, header_of(file)["seed"]) for file in backbones] == [("five.safetensors", 5)]
    (saved,) = map(load_saved, (tmp_path / "runs").rglob("seed_2/config.yaml"))
    assert (saved.seed, saved.backbone.seed, saved.backbone.weights) == (2, 5, "five.safetensors")
    keep_evidence(load_suite(suite.file, TINY), tmp_path / "runs", tmp_path / "kept.zip")
    with zipfile.ZipFile(tmp_path / "kept.zip") as archive:
        assert sum(name.endswith("accuracies_val.npz") for name in archive.namelist()) == 2


def test_a_test_on_scenes_of_another_seed_pretrains_nothing(suite, tmp_path, done):
    other = "scenes.seed=7 data.folder=seven data.h5=seven.h5"
    own = TWO_BACKBONES.replace("backbone.seed=5 ", "")
    suite.file.write_text(f"{own}tests: {{'': {{}}, other: {{settings: \"{other}\"}}}}\n")
    done("experiment", "two.yaml", "--only", "none", "--seed", 2, *TINY)
    assert len([file for file in tmp_path.rglob("*.safetensors") if file.parent.name != "model"]) == 1
    asked = {json.loads(file.read_text())["asked"] for file in (tmp_path / "runs").rglob("metrics_val.json")}
    assert len(asked) == 2


def test_the_file_of_a_suite_may_begin_with_a_dash(suite, done):
    suite.file.rename("-two.yaml")
    assert " experiment ./-two.yaml --only " in done("experiment", "./-two.yaml", "--list", *TINY).out


def test_a_training_that_is_gone_leaves_no_results_beside_the_new_one(suite, tmp_path):
    runs, job = tmp_path / "runs", jobs_of(suite)[0]
    run_job(job, suite, runs)
    for part in ("checkpoints", "model"):  # as when it was brought back from published evidence
        shutil.rmtree(job.folder(runs) / part)
    suite = replace(suite, tests=(*suite.tests, SuiteTest("re-estimated", (), "train")))  # which needs the model
    (job.folder(runs) / "metrics_val.json").write_text("{}")
    (job.folder(runs) / "environment.json").write_text('{"git_commit": "of the old one"}')
    run_job(job, suite, runs)
    assert "of the old one" not in (job.folder(runs) / "environment.json").read_text()
    assert "overall" in json.loads((job.folder(runs) / "metrics_val.json").read_text())


def test_a_run_whose_checkpoint_alone_is_gone_is_not_trained_again(suite, tmp_path):
    """As when it was removed for its size, and a test is added to the suite."""
    runs, suite = tmp_path / "runs", load_suite(suite.file, (*TINY, "train.epochs=2"))
    job = jobs_of(suite)[0]
    run_job(job, suite, runs)
    shutil.rmtree(job.folder(runs) / "checkpoints")
    before = {file: file.stat().st_mtime_ns for file in job.folder(runs).rglob("*.*")}
    suite = replace(suite, tests=(*suite.tests, SuiteTest("re-estimated", (), "train")))
    with pytest.raises(InputError, match="last.pt: missing, so that the run cannot be resumed"):
        run_job(job, suite, runs)
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_runs_on_a_gpu_that_is_named_see_every_gpu(suite, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(16)), raising=False)

    def seen(*words):
        jobs = jobs_of(load_suite(suite.file, (*TINY, *words)))
        environments = _environments(jobs, at_once=3)
        assert {each["OMP_NUM_THREADS"] for each in environments} == {"5"}
        return [each.get("CUDA_VISIBLE_DEVICES") for each in environments]

    assert seen("device=cuda") == ["4", "5", "4"]
    assert seen("device=cuda:1") == [None] * 3


def test_on_a_cpu_no_more_runs_start_at_once_than_this_process_may_use_cores(suite, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 64)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {5}, raising=False)  # as in a job of a cluster
    assert len(_environments(jobs_of(suite), at_once=None)) == 1


def test_a_suite_is_not_run_by_torchrun(suite, refused, monkeypatch):
    """Its processes would wait for each other: one holds the run's lock, the others are to train with it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for words in ([], ["--only", "none", "--seed", 1]):
        assert "experiment: torchrun runs only train and eval" in refused("experiment", suite.file, *words, *TINY)


def test_evidence_brings_reports_back_without_training(suite, tmp_path, done):
    runs, file = tmp_path / "runs", tmp_path / "two_runs.zip"
    job = jobs_of(suite)[0]
    run_job(job, suite, runs)
    reported = done("experiment", "two.yaml", "--report", *TINY).out
    keep_evidence(suite, runs, file)
    kept = file.read_bytes()
    keep_evidence(suite, runs, file)
    assert file.read_bytes() == kept
    assert len(kept) < 20_000
    (tmp_path / "elsewhere").mkdir()
    runs.rename(tmp_path / "elsewhere" / "runs")
    shutil.unpack_archive(file, runs)
    assert job.is_finished(runs, suite.tests)
    assert done("experiment", "two.yaml", "--report", *TINY).out == reported
    assert "finished, nothing to do" in done("experiment", "two.yaml", "--only", "none", "--seed", 1, *TINY).out
    assert not (job.folder(runs) / "checkpoints").exists()
