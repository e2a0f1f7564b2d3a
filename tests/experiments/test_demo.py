"""The demo on a world of a few images: the same code, the same files; and its blind reference."""

import json
import re
from collections import Counter

import pytest

from data.h5_file import Store
from experiments.demo import MODELS, _recipe, best_blind_answers, run_demo
from experiments.evaluate import evaluate
from experiments.tasks.vqa import score
from vqa.build import build_model
from vqa.io.errors import InputError
from vqa.io.files import write_json
from vqa.settings.recipes import load_settings


@pytest.fixture
def settings(tiny, tmp_path):
    places = [f"data.folder={tmp_path}/world", f"data.h5={tmp_path}/w.h5", f"backbone.weights={tmp_path}/b.safetensors"]
    return load_settings(tiny, ["name=demo", *places])


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def without_seconds(page):
    return re.sub(r"\b[\d.]+\s*(s|seconds)\b", "", page)


def test_the_demo_writes_its_summary_and_report(settings, tmp_path, capsys, monkeypatch):
    summary = run_demo(settings, runs=tmp_path / "runs")
    out = tmp_path / "runs" / "demo"
    assert json.loads((out / "summary.json").read_text()) == summary
    for model in ("baseline", "modern"):
        metrics = json.loads((out / model / "metrics_val.json").read_text())
        assert summary[model]["overall"] == metrics["overall"]
    assert summary["difference"] == pytest.approx(
        summary["modern"]["overall"] - summary["baseline"]["overall"], abs=0.01
    )
    assert summary["seconds"] > 0
    assert {path.name for path in (out / "inspect").iterdir()} == {"modulation.json", "modulation.csv", "report.html"}
    assert (out / "example.png").exists()
    page = (out / "report.html").read_text()
    assert "says nothing about VQA" in page
    for link in re.findall(r'href="([^"]+)"', page):
        assert (out / link).stat().st_size > 0
    assert {"blind", "baseline", "MODERN"} <= set(re.findall(r"^\w+", capsys.readouterr().out, re.MULTILINE))
    inspected = (out / "inspect" / "modulation.json").read_bytes()

    def evaluate_and_reverse(run, split):
        scores = evaluate(run, split)
        write_json(run / "results_val.json", json.loads((run / "results_val.json").read_text())[::-1])
        return scores

    # run again, nothing is trained, and the page is the same in whatever order the results are written
    monkeypatch.setattr("experiments.demo.evaluate", evaluate_and_reverse)
    again = run_demo(settings, runs=tmp_path / "runs")
    assert (out / "inspect" / "modulation.json").read_bytes() == inspected
    assert without_seconds((out / "report.html").read_text()) == without_seconds(page)
    for what in ("blind", "baseline", "modern", "seconds"):
        assert again[what] == summary[what]

    # both models differ in their conditioned stages only
    one, other = (load_settings(out / model / "config.yaml").model_dump() for model in ("baseline", "modern"))
    assert one.pop("name") != other.pop("name")
    assert (one["cbn"].pop("stages"), other["cbn"].pop("stages")) == ([], [1, 2, 3, 4])
    assert one == other


def test_the_demo_needs_a_split_to_validate_on(settings, tmp_path):
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"validate_on": None})})
    with pytest.raises(InputError, match=r"train.validate_on: the demo shows the accuracy after each epoch"):
        run_demo(settings, runs=tmp_path / "runs")
    assert not list(tmp_path.iterdir())  # refused before anything is made


def test_the_demo_needs_a_stage_that_is_conditioned(settings, tmp_path):
    without = settings.model_copy(update={"cbn": settings.cbn.model_copy(update={"stages": []})})
    with pytest.raises(InputError, match=r"cbn.stages: the demo compares MODERN with the baseline, which has \[\]"):
        run_demo(without, tmp_path)


def test_a_demo_of_other_settings_leaves_a_finished_one_as_it_is(settings, tmp_path):
    run_demo(settings, runs=tmp_path)
    (tmp_path / "demo" / "modern" / "recalibrated").mkdir()
    before = contents(tmp_path / "demo")
    other = settings.model_copy(update={"seed": settings.seed + 1})
    with pytest.raises(InputError, match="this run was started with seed .*, not .*; choose another `name`"):
        run_demo(other, runs=tmp_path)
    assert contents(tmp_path / "demo") == before


def test_no_norm_of_the_baseline_is_conditioned_whatever_the_recipe_conditions(tiny):
    settings = load_settings(tiny, ["cbn.stem=true", "cbn.shortcuts=true"])
    layers = [build_model(_recipe(settings, model), 9, 5, pretrained=False).resnet.layers for model in MODELS]
    assert layers[0] == []
    assert layers[1][0].name == "bn1"


def test_the_blind_reference_is_the_best_answer_to_each_text(tiny):
    store = Store(tiny.parent / "world.h5")
    train = store.table("train")
    answers = best_blind_answers(train, train)
    by_text = {}
    for row, text in enumerate(train.texts):
        by_text.setdefault(text, Counter()).update(train.answers(row))
    best = sum(max(counts.values()) for counts in by_text.values()) / sum(c.total() for c in by_text.values())
    assert score(answers, train)["overall"] == pytest.approx(100 * best)
