"""The command line by itself: help, options given twice, the version, and wrong words and files."""

import argparse
import re
import runpy
import warnings

import pytest
import torch
import yaml

import main
from experiments.command_line import build_parser
from tests.conftest import ROOT
from tests.processes import printed_by
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
    for words in (["--report", "s.yaml", "a=1", "b=2"], ["s.yaml", "--report", "a=1", "b=2"], ["s.yaml", "a=1", "b=2"]):
        given = parser.parse_args(["experiment", *words])
        assert (given.file.name, given.settings) == ("s.yaml", ["a=1", "b=2"])
    asked = ["--run", "a", "--image", "b", "--question", "what?", "--versus", "how?", "--vers", "why?"]
    assert "--versus is given twice" in refused("inspect", *asked)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        *(
            (["experiment", "--at-once", 2, *more], "--at-once belongs to running")
            for more in (["--report"], ["--publish"], ["--list"], ["--submit", "slurm"], ["--only", "a", "--seed", 1])
        ),
        (["experiment", "--resources", "timeout_min=9"], "--resources belongs to --submit"),
        (["experiment", "--resources", "timeout_min=9", "--list"], "--resources belongs to --submit"),
        *(
            (["pretrain", "--images", "a", "--out", "b", "--probe", option, 64], f"{option} belongs to training, not")
            for option in ("--backbone", "--image-size", "--epochs", "--seed")
        ),
        (["bench", "step", "--images", 9], "--images belongs to the part scale"),
        (["bench", "scale", "--images", 9, "--tiny"], "--images belongs to real sizes"),
        (["gpu-check", "--out", "a", "--no-suites", "--at-once", 8], "--at-once belongs to suites"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(refused, here, words, says):
    assert says in refused(words[0], *(["suite.yaml"] if words[0] == "experiment" else []), *words[1:])
    assert not list(here.iterdir())


def test_a_value_that_begins_with_a_minus_sign_is_written_with_an_equals_sign(refused):
    words = ["ask", "--run", "a", "--image", "b"]
    assert "--box: expected one argument; one that begins with a minus sign is written with =" in refused(
        *words, "--question", "what?", "--box", "-1,2,3,4"
    )
    assert "is written with =, as --box=-1,2,3,4" in refused(*words, "--question", "-what?")
    given = build_parser(main.COMMANDS).parse_args([*words, "--question=-what?", "--box=-1,2,3,4"])
    assert (given.question, given.box) == ("-what?", (-1, 2, 3, 4))


@pytest.mark.parametrize("words", ["experiment s.yaml --at-once", "pretrain --images a --out b.safetensors --epochs"])
def test_numbers_that_would_fill_the_memory_are_refused(refused, words):
    assert "'65537' is not a number from 1 to 65536" in refused(*words.split(), 65537)


@pytest.mark.parametrize(
    "words", ["inspect --run a --image b --question c --out", "pretrain --out b --images", "train --config"]
)
def test_an_empty_path_is_not_the_current_folder(refused, words):
    assert f"{words.split()[-1]}: the path is empty" in refused(*words.split(), "")


def test_a_warning_is_one_line(monkeypatch):
    monkeypatch.setattr("warnings.formatwarning", warnings.formatwarning)  # set back afterwards
    monkeypatch.setattr("sys.argv", ["main.py", "--version"])
    with pytest.raises(SystemExit):
        runpy.run_path(str(ROOT / "main.py"), run_name="__main__")
    assert warnings.formatwarning(UserWarning("no\nkernel"), UserWarning, "file.py", 3) == "warning: no\\nkernel\n"


def test_the_version_is_that_of_the_citation(command):
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]
    ended = command("--version")
    assert (ended.code, ended.out) == (0, f"modern-vqa {cited}\n")


def test_help_and_the_library_import_nothing_heavy():
    heavy = "torch torchvision transformers h5py numpy PIL pydantic msgspec yaml sklearn matplotlib"
    shown = "main.build_parser(main.COMMANDS).format_help()"
    code = f"import sys, vqa, main; {shown}; print([m for m in '{heavy}'.split() if m in sys.modules])"
    assert printed_by(code) == "[]"


def test_help_names_every_command(done):
    ended = done("--help")
    for name in main.COMMANDS:
        assert re.search(rf"^ +{name}\b", ended.out, re.MULTILINE)
        done(name, "--help")


@pytest.mark.parametrize("name", ["train", "demo", "preprocess"])
def test_settings_are_refused_before_torch_is_imported(tiny, name):
    words = [name, "--config", str(tiny), "train.epoch=3"]
    code = f"import sys, main; sys.argv[1:] = {words}; print(main.main(), 'torch' in sys.modules)"
    assert printed_by(code) == "2 False"


def test_preprocess_makes_what_is_missing_of_a_recipe_and_other_scenes_are_refused(tiny, here, done, refused):
    words = ["--config", tiny, "data.folder=drawn", "data.h5=drawn.h5", "backbone.weights=drawn.safetensors"]
    assert "drawn.h5: complete" in done("preprocess", *words).out
    assert (
        "runs/mine: no such run yet, it starts from the beginning" in done("train", *words, "name=mine", "--resume").out
    )
    assert (here / "runs" / "mine" / "model" / "model.safetensors").exists()
    (here / "drawn.safetensors").unlink()
    done("preprocess", *words)
    assert (here / "drawn.safetensors").exists()
    for command in (["preprocess"], ["train", "name=other"]):
        said = refused(*command, *words, "scenes.seed=8")
        assert "drawn: holds scenes made with seed " in said
        assert "not 8; remove it or name another" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "required: --config"),
        (["train", "--config", "absent.yaml"], "absent.yaml: no such file"),
        (["train", "--config", "{tiny}", "train.epoch=3"], "did you mean train.epochs?"),
        (
            ["preprocess", "--config", "{tiny}", "data.folder=absent", "data.h5=x.h5", "scenes=null"],
            "absent/train_questions.json: no",
        ),
        (["eval", "--run", "absent"], "absent: no model here"),
        (["eval", "--run", "{trained}", "train.epochs=3"], "train.epochs=3: a trained model cannot be changed"),
        (["eval", "--run", "{trained}", "name=other"], "name=other: a trained model cannot be changed"),
        (["features", "--run", "{trained}", "data.processes=1"], "data.processes=1: a trained model cannot be changed"),
        (["eval", "--run", "{trained}", "data.h5=a.h5", "data.folder=b"], "b/val_questions.json: no such file, and no"),
        (["ask", "--run", "{trained}", "--image", "absent.jpg", "--question", "what?"], "absent.jpg: no such file"),
        (["ask", "--run", "{trained}", "--image", "{tiny}", "--question", "what?"], "cannot be read as an image"),
        (["ask", "--run", "{trained}", "--image", "{image}", "--question", ""], "holds no word"),
        (["ask", "--run", "{trained}", "--image", "{image}", "--question", "caf\udce9"], "not UTF-8"),
        (
            ["inspect", "--run", "{trained}", "--image", "{image}", "--question", "what?", "--out", "{tiny}"],
            "directory",
        ),
        (["eval", "--run", "{trained}", "--out", "{tiny}"], "must be a directory"),
        (["train", "--config", "{tiny}", "seed=99999999999999999999999"], "seed"),
        (["demo", "scenes=null"], "scenes"),
    ],
)
def test_bad_input_is_one_clear_line(refused, tiny, trained, image, here, arguments, message):
    names = {"tiny": tiny, "trained": trained, "image": image}
    words = [word.format(**names) if word.startswith("{") else word for word in arguments]
    assert message in refused(*words)
    assert not [path for path in here.iterdir() if path.name != "runs"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_memory_that_runs_out_is_one_line(refused, monkeypatch, error):
    def run(**_):
        raise error

    monkeypatch.setitem(main.COMMANDS, "train", run)
    line = refused("train", "--config", "any.yaml")
    assert line.startswith("error: memory ran out; training needs less with a smaller `train.batch_size`")
    assert line.endswith("; to resume: train --config any.yaml --resume")
    monkeypatch.setitem(main.COMMANDS, "ask", run)
    asked = ("ask", "--run", "any", "--image", "any.png", "--question", "any")
    assert refused(*asked).startswith("error: memory ran out; to begin again: ask")


def test_another_runtime_error_is_not_taken_for_it(command, monkeypatch):
    def run(**_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setitem(main.COMMANDS, "train", run)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        command("train", "--config", "any.yaml")
