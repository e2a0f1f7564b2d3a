"""The times and memory in the README, `docs/speed.md` and `docs/vqa_v2.md` are those of the published files."""

import json
import math
import re

import pytest

from tests.conftest import ROOT
from tests.published import README, RESULTS, SPEED, numbers, read_lines, rows_of, shown


@pytest.fixture(scope="module")
def on_a_gpu():
    rows = json.loads((RESULTS / "gpu" / "compiled.json").read_text())["rows"]
    return {row["way"]: row for row in rows}


@pytest.fixture(scope="module")
def on_a_cpu():
    return {
        line["way"]: line
        for line in read_lines(RESULTS / "bench_step.csv")
        if (line["network"], line["pixels"], line["layout"]) == ("resnet50", "224", "channels last")
    }


def test_the_readmes_table_of_speed_and_memory(on_a_cpu, on_a_gpu):
    rows = rows_of(README, "| ResNet-50, 224 px, all stages |")
    assert [row[0].split(":")[0] for row in rows] == ["ours", "plain", "usual", "stacked"]
    for name, training, kept, gpu_training, gpu_kept in rows:
        way = name.split(":")[0]
        assert shown(training, float(on_a_cpu[way]["training_ms"]), digits=0)
        assert shown(kept, float(on_a_cpu[way]["kept_mib_an_image"]), digits=1)
        ways = {"ours": ["ours, compiled"], "usual": ["usual", "usual, compiled"]}.get(way, [way])
        assert ("compiled" in gpu_training) == (way in ("ours", "usual"))
        assert shown(gpu_training, *(on_a_gpu[way]["training_ms"] for way in ways), digits=1)
        assert shown(gpu_kept, *(on_a_gpu[way]["kept_mib_an_image"] for way in ways), digits=1)


def test_the_tables_of_steps(on_a_cpu, on_a_gpu):
    columns = ("training_ms", "forward_ms", "kept_mib_an_image")
    for name, *cells in rows_of(SPEED, "| ResNet-50, 224 px, all stages modulated |"):
        line = on_a_cpu[name.split(":")[0]]
        for cell, column, ratio in zip(cells, columns, ("ours_training", "ours_forward", "ours_kept"), strict=True):
            value, *ratios = numbers(cell)
            assert value == pytest.approx(float(line[column]), abs=0.5)
            assert ratios == ([] if line["way"] == "ours" else pytest.approx([float(line[ratio])], abs=0.0051))
    for name, *cells in rows_of(SPEED, "| ResNet-50, 224 px, all stages modulated, on a GPU |"):
        row = on_a_gpu[name.removesuffix(", not compiled")]
        for cell, column in zip(cells, columns, strict=True):
            assert shown(cell, row[column], digits=1)


def test_the_estimates_for_vqa_v2_are_of_measured_rates(on_a_cpu, on_a_gpu):
    page = (ROOT / "docs" / "vqa_v2.md").read_text(encoding="utf-8")
    gpu, cpu = on_a_gpu["ours, compiled"], on_a_cpu["ours"]
    epoch = json.loads((RESULTS / "gpu" / "epoch.json").read_text())["rows"][0]
    about_vqa_v1 = (RESULTS / "README.md").read_text(encoding="utf-8")
    of_model = numbers(rows_of(about_vqa_v1, "| ResNet-50 | baseline | MODERN |")[0][2])[0]
    assert f"{of_model} questions a second" in page
    training = (1 / epoch["questions_a_second"], 1 / of_model)
    shares = (gpu["forward_ms"] / gpu["training_ms"], float(cpu["forward_ms"]) / float(cpu["training_ms"]))
    seconds = {"training": training, "answering": tuple(t * share for t, share in zip(training, shares, strict=True))}
    assert f"{epoch['questions_a_second']:.0f} questions a second" in page
    assert f"{gpu['forward_ms']:.1f} of {gpu['training_ms']:.1f} ms on the H200" in page
    assert f"{float(cpu['forward_ms']):.0f} of {float(cpu['training_ms']):.0f} ms on the CPU" in page
    for what, questions, hours, days in rows_of(page, "| estimate |"):
        count = math.prod(numbers(questions))
        on_gpu, on_cpu = seconds["training" if what.endswith("training") else "answering"]
        assert shown(hours, count * on_gpu / 3600, digits=1)
        assert shown(days, count * on_cpu / 86_400, digits=1)


def test_the_table_of_other_savings():
    training, answering, stored, loading = (
        numbers(row[1])[0] for row in rows_of(SPEED, "| ResNet-50, 224 px, 2 cores")
    )
    four = next(line for line in read_lines(RESULTS / "bench_sharing.csv") if line["questions_an_image"] == "4")
    assert training == pytest.approx(float(four["training_times_faster"]), abs=0.05)
    assert answering == pytest.approx(float(four["answering_times_faster"]), abs=0.05)
    assert stored == pytest.approx(float(read_lines(RESULTS / "bench_cache.csv")[0]["times_faster"]), abs=0.05)
    assert loading == pytest.approx(float(read_lines(RESULTS / "bench_loading.csv")[0]["times_faster"]), abs=0.5)


def test_the_table_of_jobs_of_vqas_size():
    lines = {(line["job"].split(",")[0], line["images"]): line for line in read_lines(RESULTS / "bench_scale.csv")}
    jobs = ("preprocess", "reading questions", "decoding alone", "train", "eval")
    for job, row in zip(jobs, rows_of(SPEED, "| job, 2 threads or processes |"), strict=True):
        seconds, memory, fewer = (re.sub(r"\D", "", cell) for cell in row[1:])
        line = lines[job, "20000"]
        assert int(seconds) == round(float(line["seconds"])), job
        assert memory == line["peak_mib"], job
        assert not fewer or fewer == lines[job, "5000"]["peak_mib"], job
