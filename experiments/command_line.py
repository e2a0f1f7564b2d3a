"""The options of every command. Nothing heavy is imported, so that `--help` is fast."""

import argparse
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from experiments import ROOT
from vqa import __version__
from vqa.io.errors import InputError

DEMO_CONFIG = ROOT / "config" / "demo.yaml"
RUN = ("--run", "--model")  # one option; torchrun takes --run for its own
_BELONG = {  # options of a command that do nothing without something else: what that is, and whether it is asked for
    "pretrain": [("backbone image_size epochs seed", "training, not to --probe", lambda given: not given.only_probe)],
    "bench": [
        ("images", "the part scale", lambda given: not given.parts or "scale" in given.parts),
        ("images", "real sizes, not to --tiny", lambda given: not given.tiny),
    ],
    "gpu-check": [("at_once", "suites, not to --no-suites", lambda given: given.suites != [])],
    "experiment": [
        ("at_once", "running what is missing", lambda given: given.does == "run" and not (given.only or given.cluster)),
        ("resources", "--submit", lambda given: given.cluster),
    ],
}


class _Once(argparse.Action):
    """Stores the value of an option and refuses a second one, which would silently replace it."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        given = vars(namespace).setdefault("given", set())
        if option_string is not None and self.dest in given:
            parser.error(f"{'/'.join(self.option_strings)} is given twice")
        given.add(self.dest)
        setattr(namespace, self.dest, values)


class _Parser(argparse.ArgumentParser):
    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.register("action", None, _Once)  # the default action

    def parse_args(self, words=None, namespace=None) -> argparse.Namespace:
        """As in the base class, but settings may also follow options that come after a positional argument. Refuses
        options that would do nothing, and an output folder that is a file.
        """
        arguments, rest = self.parse_known_args(words, namespace)
        given = vars(arguments).pop("given", set())
        for options, to, asked in _BELONG.get(arguments.command, ()):
            for idle in given.intersection(options.split()) if not asked(arguments) else ():
                self.error(f"--{idle.replace('_', '-')} belongs to {to}")
        if rest and (any(word.startswith("-") for word in rest) or not hasattr(arguments, "settings")):
            quote = "; put the question in quotation marks" if hasattr(arguments, "question") else ""
            self.error(f"unrecognized arguments: {' '.join(rest)}{quote}")
        if rest:
            arguments.settings = [*arguments.settings, *rest]
        out = getattr(arguments, "out", None)
        if out is not None and out.exists() and not out.is_dir():
            raise InputError(f"{out}: must be a directory")
        return arguments

    def error(self, message: str) -> NoReturn:
        """One line, as every other error."""
        if message.endswith("expected one argument"):
            message += "; one that begins with a minus sign is written with =, as --box=-1,2,3,4"
        raise InputError(f"{message} (see {self.prog} --help)")


def build_parser(functions: Mapping[str, Callable[..., None]]) -> argparse.ArgumentParser:
    """Build the parser of all commands. It returns the name of the `command` and the arguments of its function, whose
    docstring is the command's help.

    Raises:
        InputError: when it parses wrong arguments.
    """
    parser = _Parser(prog="main.py", description="Conditional batch normalisation for visual question answering.")
    parser.add_argument("--version", action="version", version=f"modern-vqa {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    settings, recipe, run, question, suite = (_Parser(add_help=False) for _ in range(5))  # options of several commands
    settings.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="override a setting, as train.epochs=3")
    recipe.add_argument("--config", type=_path, required=True, metavar="FILE.yaml", help="the recipe")
    run.add_argument(*RUN, type=_path, required=True, metavar="DIR", help="a run directory, or its model/")
    _question_options(question)

    def command(name: str, *shared: argparse.ArgumentParser) -> argparse.ArgumentParser:
        about = functions[name].__doc__
        return commands.add_parser(name, parents=shared, help=about, description=about)

    demo = command("demo", settings)
    of_demo = "a recipe with scenes (config/demo.yaml)"
    demo.add_argument("--config", type=_path, default=DEMO_CONFIG, metavar="FILE.yaml", help=of_demo)

    command("preprocess", recipe, settings)

    _pretrain_options(command("pretrain"))

    train = command("train", recipe, settings)
    train.add_argument("--resume", action="store_true", help="resume from the last checkpoint")
    init = "a run or model that provides the initial weights, where name and shape match"
    train.add_argument("--init-from", type=_path, metavar="DIR", help=init)

    evaluate = command("eval", run, settings)
    evaluate.add_argument("--split", default="val", help="the split that is answered (val)")
    evaluate.add_argument("--out", type=_path, metavar="DIR", help="folder of the files; by default DIR of --run")
    evaluate.add_argument("--allow-trained", action="store_true", help="score a split that was trained on, and mark it")

    ask = command("ask", run, question)
    ask.add_argument("--top", type=_positive, default=5, metavar="N", help="answers shown (5)")
    ask.add_argument("--json", action="store_true", dest="as_json", help="print JSON")

    inspect = command("inspect", run, question)
    inspect.add_argument("--versus", metavar="TEXT", help="a second question to compare with")
    inspect.add_argument("--out", type=_path, metavar="DIR", help="by default DIR/inspect")

    recalibrate = command("recalibrate", run, settings)
    recalibrate.add_argument("--config", type=_path, metavar="FILE.yaml", help="the recipe whose data are used")
    recalibrate.add_argument("--split", default="train", help="the split whose images are used (train)")
    recalibrate.add_argument("--batches", type=_positive, default=200, metavar="N", help="use at most N batches (200)")
    recalibrate.add_argument("--out", type=_path, metavar="DIR", help="by default DIR/recalibrated")

    export = command("export", run)
    export.add_argument("--to", type=_path, required=True, metavar="FOLDER", help="a new folder, or an empty one")
    export.add_argument("--format", dest="form", choices=("hub", "onnx"), default="hub", help="hub or onnx (hub)")

    _bench_options(command("bench"))
    _gpu_check_options(command("gpu-check"))
    _features_options(command("features", settings))
    suite.add_argument("file", type=_path, metavar="SUITE.yaml", help="as those in experiments/suites/")
    _experiment_options(command("experiment", suite, settings))  # the file first, then KEY=VALUE
    return parser


def _question_options(added: argparse.ArgumentParser) -> None:
    added.add_argument("--image", type=_path, required=True, metavar="FILE", help="any image file")
    added.add_argument("--question", required=True, metavar="TEXT", help="one question about it")
    box = "box of the object that the question is about, in pixels from the top left (GuessWhat?!)"
    added.add_argument("--box", type=_box, metavar="X,Y,W,H", help=box)
    added.add_argument("--category", metavar="NAME", help="category of that object (GuessWhat?!)")


def _pretrain_options(added: argparse.ArgumentParser) -> None:
    added.add_argument("--images", type=_path, required=True, metavar="FOLDER_OR_ZIP", help="one sub-folder per class")
    added.add_argument("--out", dest="file", type=_path, required=True, metavar="FILE", help="a .safetensors file")
    added.add_argument("--backbone", default="resnet18", metavar="NAME", help="a ResNet of torchvision (resnet18)")
    added.add_argument("--image-size", type=_positive, default=64, metavar="S", help="side in pixels (64)")
    added.add_argument("--epochs", type=_few, default=10, metavar="N", help="passes over the images (10)")
    added.add_argument("--seed", type=_natural, default=0, metavar="N", help="seed of weights, order and shifts (0)")
    what = "train nothing; fit linear probes to the features of a finished FILE and write FILE.probe.json"
    added.add_argument("--probe", action="store_true", dest="only_probe", help=what)
    added.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda (auto)")


def _bench_options(added: argparse.ArgumentParser) -> None:
    parts = "step, memory, sharing, cache, waiting, loading, scale (all)"
    added.add_argument("parts", nargs="*", metavar="PART", help=parts)
    added.add_argument("--repeats", type=_positive, default=7, metavar="N", help="turns of each measurement (7)")
    added.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda (auto)")
    added.add_argument("--images", type=_positive, default=4000, metavar="N", help="images of the part scale (4000)")
    added.add_argument("--tiny", action="store_true", help="a small network and few images, to test that it runs")
    added.add_argument("--json", action="store_true", dest="as_json", help="print JSON")
    added.add_argument("--out", type=_path, metavar="DIR", help="write bench_PART.csv there")


def _gpu_check_options(added: argparse.ArgumentParser) -> None:
    added.add_argument("--out", type=_path, required=True, metavar="DIR", help="a file per step, and gpu-check.zip")
    added.add_argument("--minutes", type=_minutes, default=9.0, metavar="N", help="time limit (9)")
    only = "run only this step; can be repeated"
    added.add_argument("--step", dest="steps", action="append", default=[], metavar="STEP", help=only)
    suites, instead = added.add_mutually_exclusive_group(), "a suite, instead of the default; can be repeated"
    suites.add_argument("--suite", dest="suites", action="append", metavar="NAME", help=instead)
    suites.add_argument("--no-suites", dest="suites", action="store_const", const=[], help="run no suite")
    added.add_argument("--at-once", type=_few, default=8, metavar="N", help="parallel trainings of a suite (8)")
    added.add_argument("--device", default="cuda", help="cuda, or cpu together with --tiny (cuda)")
    added.add_argument("--tiny", action="store_true", help="small sizes, to test that it runs")


def _features_options(added: argparse.ArgumentParser) -> None:
    added.add_argument(*RUN, type=_path, required=True, action="append", metavar="DIR", help="can be repeated")
    added.add_argument("--split", default="val", help="the split that the pairs are from (val)")
    added.add_argument("--pairs", type=_positive, default=1000, metavar="N", help="random pairs shown (1000)")
    added.add_argument("--seed", type=_natural, default=0, metavar="N", help="seed of pairs, folds and t-SNE (0)")
    added.add_argument("--out", type=_path, metavar="DIR", help="by default features/ in the first DIR of --run")


def _experiment_options(added: argparse.ArgumentParser) -> None:
    at_once = "parallel runs; by default one per GPU; without one, one per core if all recipes name the CPU, else 1"
    added.add_argument("--at-once", type=_few, metavar="N", help=at_once)
    added.add_argument("--seed", type=int, metavar="N", help="the seed of the run that --only names")
    resources = 'resources of each task: "timeout_min=240 gpus_per_node=1"'
    added.add_argument("--resources", default="", metavar="TEXT", help=resources)
    instead = added.add_mutually_exclusive_group()
    for name, does in (
        ("report", "run nothing; print the table of the finished runs"),
        ("publish", "the same, written into experiments/results with the evidence"),
        ("list", "print the commands of the missing runs"),
    ):
        instead.add_argument(f"--{name}", dest="does", action="store_const", const=name, default="run", help=does)
    instead.add_argument("--only", metavar="RUN", help="run only this run of the suite, with --seed")
    instead.add_argument("--submit", dest="cluster", choices=("slurm",), help="submit the missing runs as an array job")


def _path(text: str) -> Path:
    if not text:  # as of an unset variable of the shell: Path("") is the current folder
        raise argparse.ArgumentTypeError("the path is empty")
    return Path(text)


def _positive(text: str, least: int = 1, most: int = 10**9) -> int:
    if not text.isdecimal() or len(text) > 10 or not least <= int(text) <= most:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a number from {least} to {most}")
    return int(text)


def _few(text: str) -> int:
    return _positive(text, most=2**16)


def _box(text: str) -> tuple[float, ...]:
    if not re.fullmatch(r"-?\d{1,6}(\.\d+)?(,-?\d{1,6}(\.\d+)?){3}", text):
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a box; write X,Y,W,H in pixels, as 10,20,64,48")
    return tuple(map(float, text.split(",")))


def _natural(text: str) -> int:
    return _positive(text, 0, 2**32 - 1)


def _minutes(text: str) -> float:
    if not re.fullmatch(r"\d{1,6}(\.\d+)?", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r:.40} is not a number of minutes")
    return float(text)
