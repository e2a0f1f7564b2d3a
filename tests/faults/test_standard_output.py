"""Standard output and error that are full or closed: one line where there is room for it, and the right exit code."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

PRINTING = """
import sys
import main
from vqa.io.errors import InputError
def preprocess(config, settings):
    print("nothing to do")
    if not config.exists():
        raise InputError(f"{config}: no such file")
main.COMMANDS["preprocess"] = preprocess
sys.exit(main.main())
"""


def test_a_full_disk_under_the_log_is_one_line_of_the_process(tiny):
    arguments = [sys.executable, "-c", PRINTING, "preprocess", "--config", str(tiny)]
    for buffered in (None, "1"):  # whether or not lines wait in memory
        surroundings = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        surroundings |= {"PYTHONUNBUFFERED": buffered} if buffered else {}
        with Path("/dev/full").open("w") as full:
            ended = subprocess.run(
                arguments, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False, env=surroundings
            )
            assert (ended.returncode, ended.stderr) == (2, "error: standard output: no space left on device\n")
            wrong = [*arguments[:-1], "nowhere.yaml"]
            ended = subprocess.run(wrong, cwd=ROOT, stdout=full, stderr=full, check=False, env=surroundings)
            assert ended.returncode == 2


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_a_command_works_without_standard_output_and_error(tiny, closed):
    for config, code in ((tiny, 0), ("nowhere.yaml", 2)):
        words = shlex.join([sys.executable, "-c", PRINTING, "preprocess", "--config", str(config)])
        ended = subprocess.run(["sh", "-c", f"{words} {closed}"], cwd=ROOT, capture_output=True, text=True, check=False)
        assert ended.returncode == code
        assert "Traceback" not in ended.stderr
