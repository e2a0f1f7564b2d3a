"""Killed at random moments, commands end with what an undisturbed run makes; `tests.kill.harness` reports where not."""

import pytest

from tests.kill.cases import CASES, content_of
from tests.kill.harness import kill


@pytest.mark.parametrize(("name", "kills"), [("preprocess", 2), ("maps", 1), ("train", 2), ("oracle", 2), ("eval", 1)])
def test_killed_at_random_moments_a_command_ends_as_undisturbed(name, kills, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = kill(CASES[name], kills, tmp_path)
    assert result.differences == []
    assert result.kills == kills
    assert result.ends >= 1


def test_reports_are_compared_without_times_and_memory(tmp_path):
    """The runs of a killed suite take other times than those of an undisturbed one."""
    contents = []
    for number, (accuracy, seconds, memory) in enumerate(((8.3, 1.3, 883.2), (8.3, 1.4, 902.9), (8.4, 1.3, 883.2))):
        (tmp_path / f"{number}").mkdir()
        text = f"run,overall,seconds,peak_memory_mib\nnone,{accuracy},{seconds},{memory}\n"
        (tmp_path / f"{number}" / "two_runs.csv").write_text(text)
        contents.append(content_of(tmp_path / f"{number}"))
    assert contents[0] == contents[1] != contents[2]
