"""Killed at random moments, commands end with what an undisturbed run makes; `experiments.kill` tells where not."""

import pytest

from experiments.kill import kill
from experiments.kill_cases import CASES


@pytest.mark.parametrize(("name", "kills"), [("preprocess", 2), ("maps", 2), ("train", 2), ("eval", 2)])
def test_killed_at_random_moments_a_command_ends_as_undisturbed(name, kills, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    result = kill(CASES[name], kills, tmp_path)
    assert result.differences == []
    assert result.kills == kills
    assert result.ends >= 1
