"""`main.py bench`: every part runs, its comparisons hold, and it writes its CSV."""

import csv
import json

import pytest

from experiments.bench.bench import PARTS, bench, rows_table
from experiments.bench.loading import time_training
from tests.processes import fork_workers, forking
from vqa.settings.recipes import load_settings


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("experiments.bench.scale.get_context", lambda _: forking())  # spawned, each job imports torch
        fork_workers(patched)
        patched.setenv("GIT_COMMIT", "abc")
        return out, bench([], repeats=1, device="cpu", tiny=True, out=out, images=80)


def test_an_epoch_is_the_most_that_is_timed(tiny, tmp_path):
    assert time_training(load_settings(tiny), tmp_path / "run", steps=8)[0] == 3


def test_every_part_has_its_file(results):
    out, found = results
    assert list(found["parts"]) == list(PARTS)
    for part, rows in found["parts"].items():
        with (out / f"bench_{part}.csv").open(newline="") as file:
            lines = list(csv.DictReader(file))
        assert len(lines) == len(rows) > 0
        assert all(line["torch"] and line["commit"] == "abc" and "cpu" in line for line in lines)
        for line, row in zip(lines, rows, strict=True):
            assert all(line[key] == ("" if value is None else str(value)) for key, value in row.items())


def test_ours_keeps_less_than_the_others(results):
    for row in results[1]["parts"]["step"]:
        assert (row["ours_kept"] == 1) if row["way"] == "ours" else (row["ours_kept"] < 0.55)
        assert min(row["training_ms"], row["forward_ms"]) > 0
    batches = {(row["precision"], row["way"]): row["largest_batch"] for row in results[1]["parts"]["memory"]}
    assert batches["float32", "ours"] > batches["float32", "usual"] > batches["float32", "stacked"] > 0


def test_shared_and_stored_maps_give_the_same(results):
    for row in results[1]["parts"]["sharing"]:
        assert float(row["largest_relative_difference"]) < 1e-5
    (row,) = results[1]["parts"]["cache"]
    assert row["train_loss_maps"] == pytest.approx(row["train_loss_images"], rel=1e-3)
    assert 0 < float(row["largest_relative_difference"]) < 1e-2


def test_memory_does_not_grow_with_the_number_of_images(results):
    few, many = (row["added_mib"] for row in results[1]["parts"]["loading"] if "added_mib" in row)
    assert many < few + 8


def test_every_job_of_the_scale_is_done_and_its_memory_does_not_grow_with_the_images(results):
    rows = {(row["job"], row["images"]): row for row in results[1]["parts"]["scale"]}
    done = {job: row["done"] for (job, images), row in rows.items() if images == 80}
    assert done == {
        "reading questions": 2200,
        "decoding alone": 80,
        "preprocess": 80,
        "train, 2 steps": 128,
        "eval": 200,
    }
    assert rows["preprocess", 80]["file_mb"] > rows["preprocess", 20]["file_mb"] > 0
    for job in ("preprocess", "train, 2 steps"):
        few, many = rows[job, 20], rows[job, 80]
        assert min(few["peak_mib"], few["cpu_seconds"], few["seconds"]) > 0
        # pages that processes share count in parts, and other tests' processes may end in between
        assert many["peak_mib"] < few["peak_mib"] + 250


def test_the_command(done, refused, tmp_path):
    ended = done("bench", "memory", "--tiny", "--repeats", 1, "--json", "--out", tmp_path)
    assert json.loads(ended.out)["parts"]["memory"][0]["network"] == "resnet10"
    assert (tmp_path / "bench_memory.csv").is_file()
    assert refused("bench", "scale", "--images", 7) == "error: --images: at least 8, got 7"


def test_kinds_of_rows_have_heads_of_their_own():
    assert rows_table([{"a": 1, "b": 22}, {"a": 333, "b": None}, {"c": 1}]) == "a     b\n1    22\n333\nc\n1"
