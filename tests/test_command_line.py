"""The command line by itself: options given twice, and the version."""

import argparse
import tomllib

import pytest

import main
from experiments.command_line import build_parser
from tests.conftest import ROOT
from vqa.io.errors import InputError

SEVERAL = {"features --run", "gpu-check --step", "gpu-check --suite"}  # options that may be given as often as wanted


def options_with_a_value():
    """Every option of every command that takes a value, as `COMMAND --option`."""
    (commands,) = (a for a in build_parser(main.COMMANDS)._actions if isinstance(a, argparse._SubParsersAction))
    return [
        f"{name} {action.option_strings[0]}"
        for name, parser in commands.choices.items()
        for action in parser._actions
        if action.option_strings and action.nargs != 0
    ]


@pytest.mark.parametrize("option", [option for option in options_with_a_value() if option not in SEVERAL])
def test_an_option_given_twice_is_refused(option):
    command, name = option.split()
    value = {"--submit": "slurm", "--format": "hub", "--box": "1,2,3,4"}.get(name, "1")
    with pytest.raises(InputError, match=rf"{name}\S* is given twice \(see main.py {command} --help\)"):
        build_parser(main.COMMANDS).parse_args([command, "suite.yaml", name, value, f"{name}={value}"])


def test_words_may_stand_anywhere_and_options_once(refused):
    parser = build_parser(main.COMMANDS)
    given = parser.parse_args(["train", "--config", "a.yaml", "train.epochs=1", "--resume", "train.clip=2", "--resume"])
    assert (given.settings, given.resume) == (["train.epochs=1", "train.clip=2"], True)
    assert parser.parse_args(["features", "--run", "a", "--run", "b"]).run[1].name == "b"
    asked = ["--run", "a", "--image", "b", "--question", "what?", "--versus", "how?", "--vers", "why?"]
    assert "--versus is given twice" in refused("inspect", *asked)


def test_the_version_is_the_packages(command):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    ended = command("--version")
    assert (ended.code, ended.out) == (0, f"modern-vqa {version}\n")
