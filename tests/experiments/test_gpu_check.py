"""`main.py gpu-check` on a CPU: every step runs, has its file in the archive, and one that fails stops no other."""

import json
import math
import multiprocessing
import os
import signal
import threading
import time
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from experiments.bench.setup import Setup
from experiments.gpu import check as gpu_check
from experiments.gpu import fast, right
from experiments.gpu.check import Step
from experiments.gpu.right import check_error, relative_error
from experiments.machine import surroundings
from tests.processes import fork_children, wait_until
from vqa.io.processes import Interrupted


@pytest.fixture(scope="module", autouse=True)
def _forked_steps():
    with pytest.MonkeyPatch.context() as patched:
        fork_children(patched, "experiments.gpu.check")
        yield


def test_real_sizes_are_not_run_on_a_cpu(refused, tmp_path):
    assert "--device cpu belongs to --tiny" in refused("gpu-check", "--out", tmp_path, "--device", "cpu")


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    out = tmp_path_factory.mktemp("checked")
    failed = gpu_check.gpu_check(out, minutes=20, device="cpu", tiny=True, suites=[])
    return out, failed


def test_every_step_passes_and_is_in_the_archive(checked):
    out, failed = checked
    assert failed == [], (out / "log.txt").read_text()
    with zipfile.ZipFile(out / "gpu-check.zip") as archive:
        told = {name: json.loads(archive.read(f"{name}.json")) for name in gpu_check.STEPS}
    for name, step in told.items():
        assert step["state"] == "passed"
        assert step["command"] == f"python main.py gpu-check --step {name} --device cpu --tiny"
        assert step["machine"]["torch"]
    assert [row["type"] for row in told["modulate"]["rows"]] == ["float32", "bfloat16", "float16"]
    assert told["resume"]["rows"][0]["difference"] == "0.0e+00"
    assert {row["way"] for row in told["step"]["rows"]} == {"ours", "plain", "usual", "stacked"}
    compiled = {f"{way}, compiled" for way in ("ours", "plain", "usual")}
    assert {row["way"] for row in told["compiled"]["rows"]} == {"ours", "plain", "usual", "stacked", *compiled}
    assert {row["what"] for name in fast.COMPILING for row in told[name]["rows"]} == {*compiled, "modern"}


def test_what_passed_is_not_run_again(checked, capsys):
    out, _ = checked
    before = (out / "step.json").stat().st_mtime_ns
    assert gpu_check.gpu_check(out, minutes=1, device="cpu", tiny=True, suites=[]) == []
    assert (out / "step.json").stat().st_mtime_ns == before
    assert capsys.readouterr().out == ""


def crash(_):
    os._exit(3)


def fail(_):
    yield {"row": 1}
    raise AssertionError("wrong")


def forked(_):
    yield {"cannot use CUDA": torch.cuda._is_in_bad_fork()}


def test_a_step_that_fails_or_crashes_stops_no_other_and_can_use_cuda(tmp_path, monkeypatch, capsys):
    steps = {"crash": Step(crash, 60), "fail": Step(fail, 60), "deltas": gpu_check.STEPS["deltas"]}
    steps["forked"] = Step(forked, 60)
    monkeypatch.setattr(gpu_check, "STEPS", steps)
    failed = gpu_check.gpu_check(tmp_path, minutes=5, device="cpu", tiny=True, suites=[])
    assert sorted(failed) == ["crash", "fail"]
    said = capsys.readouterr().out
    assert f"crash: failed: its process ended with 3; see {tmp_path / 'log.txt'}" in said
    assert "fail: failed: AssertionError: wrong" in said
    assert json.loads((tmp_path / "fail.json").read_text())["rows"] == [{"row": 1}]
    assert json.loads((tmp_path / "deltas.json").read_text())["state"] == "passed"
    assert json.loads((tmp_path / "forked.json").read_text())["rows"] == [{"cannot use CUDA": False}]


def test_a_step_that_takes_too_long_is_ended_and_the_exit_code_says_that_one_failed(tmp_path, monkeypatch, command):
    monkeypatch.setattr(gpu_check, "_START", 0)
    monkeypatch.setattr(gpu_check, "STEPS", {"deltas": gpu_check.STEPS["deltas"]._replace(seconds=0.01)})
    ended = command("gpu-check", "--out", tmp_path, "--device", "cpu", "--tiny", "--step", "deltas", "--no-suites")
    assert ended.code == 1
    assert ended.out.endswith("gpu-check.zip; failed: deltas\n")
    assert json.loads((tmp_path / "deltas.json").read_text())["error"] == "took too long"


def test_a_step_that_was_not_reached_is_named_and_one_that_failed_before_still_counts(tmp_path, capsys):
    (tmp_path / "deltas.json").write_text('{"state": "failed"}')
    words = {"device": "cpu", "tiny": True, "suites": []}
    assert gpu_check.gpu_check(tmp_path, minutes=-1, steps=["deltas", "modulate"], **words) == ["deltas"]
    assert capsys.readouterr().out == "not finished within -1 minutes: modulate\n"


def endless(_):
    yield {"row": 1}
    time.sleep(600)


def test_a_step_that_the_time_limit_cuts_off_has_not_failed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "STEPS", {"endless": Step(endless, 60)})
    assert gpu_check.gpu_check(tmp_path, minutes=0.05, device="cpu", tiny=True, suites=[]) == []
    assert json.loads((tmp_path / "endless.json").read_text())["state"] == "cut off"
    assert capsys.readouterr().out.endswith("\nnot finished within 0.05 minutes: endless\n")


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("code", "failed"), [(2, ["table1", "table2"]), (0, [])])
def test_a_suite_that_ends_with_an_error_has_failed(tmp_path, monkeypatch, code, failed):
    ended = SimpleNamespace(poll=lambda: code, terminate=int, wait=int)
    monkeypatch.setattr(gpu_check, "STEPS", {})
    monkeypatch.setattr(gpu_check.subprocess, "Popen", lambda _command: ended)
    given = {"minutes": 5, "device": "cpu", "tiny": True, "suites": ["table1", "table2"]}
    assert gpu_check.gpu_check(tmp_path / "out", **given) == failed


def slept(_):
    (Path.cwd() / f"{os.getpid()}.began").touch()
    time.sleep(600)
    yield {}


@pytest.mark.usefixtures("listening")
def test_an_interrupted_check_begins_no_other_step(tmp_path, monkeypatch, here):
    monkeypatch.setattr(gpu_check, "STEPS", {f"step{number}": Step(slept, 600) for number in range(20)})
    monkeypatch.setattr(gpu_check, "TOGETHER", gpu_check.STEPS)

    def interrupt():
        wait_until(lambda: any(here.glob("*.began")))
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted):
        gpu_check.gpu_check(tmp_path, minutes=5, device="cpu", tiny=True, suites=[])
    thread.join()
    began = len(list(tmp_path.glob("step*.json")))
    time.sleep(1)
    assert len(list(tmp_path.glob("step*.json"))) == began < 20
    assert not multiprocessing.active_children()


@pytest.mark.parametrize(("of_map", "of_gradients"), [(0, 2e-3), (2e-3, 0), (0, 2e-2)])
def test_rounding_at_a_relu_is_no_error_of_the_gradients(monkeypatch, of_map, of_gradients):
    results = iter([[torch.ones(3)] * 3, *[[torch.ones(3) * (1 + off) for off in (of_map, 0, of_gradients)]] * 2])
    monkeypatch.setattr(right, "_map_and_gradients", lambda *_: next(results))
    check = partial(list, right.network_rows(Setup(torch.device("cpu"), True, Path())))
    if (of_map, of_gradients) == (0, 2e-3):  # as measured, in float32 on a CPU
        assert [row["Δβ"] for row in check()] == ["2.0e-03"] * 2
    else:
        with pytest.raises(AssertionError, match="fused, (map|Δβ): relative error"):
            check()


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, partial(RuntimeError, "GET was unable to find an engine")])
def test_the_largest_batch_is_found_where_memory_ends_in_either_error(monkeypatch, kind):
    def peak(job, _):
        batch = job.args[1]
        if batch > 50:
            raise kind()
        return 100.0 + batch

    monkeypatch.setattr(fast, "peak_mib", peak)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 200 * 2**20))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    (row,) = fast.largest_rows(Setup(torch.device("cuda"), True, Path()))
    assert row["mib_an_image"] == 1.0
    assert 45 < row["largest_batch"] <= 50


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_result_that_is_not_finite_is_an_error_among_others_that_are_right(wrong):
    right = torch.ones(3)
    for errors in ([right, right.clone().fill_(wrong)], [right.clone().fill_(wrong), right]):
        with pytest.raises(AssertionError, match="relative error inf"):
            check_error("y", max(relative_error(found, right) for found in errors), 1e-2)


def test_a_copy_without_its_history_says_its_commit(monkeypatch):
    monkeypatch.setenv("GIT_COMMIT", "abc")
    assert surroundings(torch.device("cpu"))["git_commit"] == "abc"


def test_wrong_words_are_refused(refused, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)  # where there is one, the check would begin
    out = ("--out", tmp_path / "out")
    for minutes in ("0", "nan", "1e3", "-1", "1,5"):
        assert "not a number of minutes" in refused("gpu-check", *out, f"--minutes={minutes}")
    assert "device: cuda" in refused("gpu-check", *out, "--minutes", f"{97 / 30}")  # as a script computes it
    assert "gpu-check: no step speed; steps are modulate, " in refused("gpu-check", *out, "--step", "speed")
    assert refused("gpu-check", *out, "--suite", "table9").endswith("table9.yaml: no such suite")
    assert "device: cuda" in refused("gpu-check", *out)
    (tmp_path / "file").touch()
    assert refused("gpu-check", "--out", tmp_path / "file").endswith("must be a directory")


def test_results_of_another_device_or_program_are_neither_taken_nor_overwritten(refused, tmp_path):
    ours = {"step": "resume", "state": "passed", "command": "python main.py gpu-check --step resume"}
    for content in ([1], {"step": 1}, ours, ours | {"command": f"{ours['command']} --device cpu"}):
        (tmp_path / "resume.json").write_text(json.dumps(content))
        said = refused("gpu-check", "--out", tmp_path, "--device", "cpu", "--tiny", "--no-suites")
        command = "python main.py gpu-check --step resume --device cpu --tiny"
        assert said.endswith(f"/resume.json: not written by `{command}`; name another --out")
        assert json.loads((tmp_path / "resume.json").read_text()) == content
