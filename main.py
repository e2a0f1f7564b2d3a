"""The commands. Each sets up one job; heavy imports stand inside, so that `--help` answers at once."""

import argparse
import errno
import io
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from data.errors import InputError, printable
from data.interruption import Interrupted, listen

if TYPE_CHECKING:
    from experiments.suite import Suite

DEMO_CONFIG = Path(__file__).parent / "config" / "demo.yaml"
RESULTS = Path(__file__).parent / "experiments" / "results"
README = Path(__file__).parent / "README.md"
OF_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EPIPE)  # why standard output may fail
GOING_ON = ("demo", "preprocess", "train", "experiment")  # started again after a kill, they keep what was done


def demo(arguments: argparse.Namespace) -> None:
    """Generated scenes, baseline and MODERN compared, one question inspected: a few minutes, no download."""
    from experiments.demo import run_demo
    from vqa.recipes import load_settings

    run_demo(load_settings(arguments.config, arguments.settings))


def preprocess(arguments: argparse.Namespace) -> None:
    """Raw questions, annotations and images to one h5 file; run again, it goes on where it stopped."""
    from data.preprocess import preprocess as run
    from vqa.recipes import load_settings
    from vqa.settings import preprocessing_of

    run(**preprocessing_of(load_settings(arguments.config, arguments.settings)))


def train(arguments: argparse.Namespace) -> None:
    """Trains a recipe into runs/NAME; under torchrun on several GPUs or hosts."""
    from vqa.recipes import load_settings
    from vqa.train import train as run

    settings = load_settings(arguments.config, arguments.settings)
    run(settings, resume=arguments.resume)


def evaluate(arguments: argparse.Namespace) -> None:
    """Official accuracy of a trained model; writes metrics_SPLIT.json and results_SPLIT.json."""
    from vqa.evaluate import evaluate as run
    from vqa.evaluate import table_of

    scores = run(
        arguments.run,
        arguments.split,
        arguments.out,
        arguments.settings,
        allow_trained=arguments.allow_trained,
    )
    if scores is None:
        print(f"split {arguments.split!r} has no annotations: results_{arguments.split}.json written, nothing to score")
    else:
        print(f"{arguments.split}: {scores['questions']} questions\n{table_of(scores)}")


def ask(arguments: argparse.Namespace) -> None:
    """The answers to one question about any image, most probable first."""
    from vqa.bundle import load_bundle
    from vqa.inspection import ask as run
    from vqa.inspection import unknown_words

    bundle = load_bundle(arguments.run)
    answers = run(bundle, arguments.image, arguments.question, arguments.top)
    if unknown := unknown_words(bundle, arguments.question):
        print(printable(f"not met in training: {', '.join(unknown)}"), file=sys.stderr)
    if arguments.json:
        print(json.dumps({"image": str(arguments.image), "question": arguments.question, "answers": answers}))
        return
    for entry in answers:
        print(f"{100 * entry['probability']:6.2f} %  {printable(entry['answer'])}")


def inspect(arguments: argparse.Namespace) -> None:
    """What a question (or two) does to every channel: modulation.json, modulation.csv, report.html."""
    from vqa.bundle import load_bundle
    from vqa.inspection import inspect as run
    from vqa.inspection import summary, write_inspection

    questions = [arguments.question] + ([arguments.versus] if arguments.versus is not None else [])
    out = arguments.out or arguments.run / "inspect"
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: must be a directory")
    inspection = run(load_bundle(arguments.run), arguments.image, questions)
    write_inspection(inspection, out, arguments.image)
    print(summary(inspection))
    print(f"{out / 'report.html'}")


def features(arguments: argparse.Namespace) -> None:
    """What the stages of trained networks hold of the question: t-SNE pictures, neighbours.json, points.csv."""
    from vqa.comparison import compare_features, table_of

    out = arguments.out or arguments.run[0] / "features"
    comparison = compare_features(
        arguments.run, arguments.split, out, arguments.settings, pairs=arguments.pairs, seed=arguments.seed
    )
    print(table_of(comparison))
    if comparison["pairs"] < arguments.pairs:
        print(f"split {arguments.split!r} has no more than these {comparison['pairs']} pairs")
    print(f"{out}")


def experiment(arguments: argparse.Namespace) -> None:
    """Runs what is missing of a suite of runs and prints its table beside the paper's numbers."""
    from experiments.report import write_report
    from experiments.runner import command_of, job_named, missing_jobs, run_job, run_suite
    from experiments.suite import load_suite

    if (arguments.only is None) != (arguments.seed is None):
        raise InputError("--only RUN and --seed N belong together")
    suite, runs = load_suite(arguments.suite, tuple(arguments.settings)), Path("runs")
    if arguments.list:
        print("\n".join(shlex.join(command_of(suite, job)) for job in missing_jobs(suite, runs)))
    elif arguments.only is not None:
        run_job(job_named(suite, arguments.only, arguments.seed), suite, runs)
    elif arguments.submit is not None:
        from experiments.cluster import submit

        tasks = submit(suite, runs, arguments.submit, arguments.resources)
        print(f"{len(tasks)} runs submitted; --report shows what is finished")
    else:
        failed = None if arguments.report or arguments.publish else run_suite(suite, runs, arguments.at_once)
        print(write_report(suite, runs, runs / "experiments" / "reports"))
        if arguments.publish:
            _publish(suite, runs)
        if failed:
            raise InputError(failed)


def _publish(suite: "Suite", runs: Path) -> None:
    from experiments.collection import collect
    from experiments.evidence import keep_evidence
    from experiments.readme import update_readme
    from experiments.report import write_report
    from experiments.runner import missing_jobs

    if suite.words:
        raise InputError("--publish: a suite is published as its file says it; leave KEY=VALUE away")
    if not collect(suite, runs) and (RESULTS / f"{suite.name}_runs.csv").exists():
        raise InputError(f"--publish: nothing of {suite.name} is finished in {runs}, but results are published already")
    if missing := missing_jobs(suite, runs):
        print(f"{len(missing)} runs are not finished; they are published without them")
    write_report(suite, runs, RESULTS)
    keep_evidence(suite, runs, RESULTS / f"{suite.name}_runs.zip")
    update_readme(README, RESULTS)


def bench(arguments: argparse.Namespace) -> None:
    """What is fast, measured beside what it replaces: steps, memory, sharing, stored maps, loading, scale."""
    from contextlib import redirect_stdout

    from experiments.bench import as_json
    from experiments.bench import bench as run

    with redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        results = run(
            arguments.parts,
            repeats=arguments.repeats,
            device=arguments.device,
            tiny=arguments.tiny,
            out=arguments.out,
            images=arguments.images,
        )
    if arguments.json:
        print(as_json(results))


def recalibrate(arguments: argparse.Namespace) -> None:
    """Re-estimates the statistics of a model's norms on unlabelled images (AdaBN) and writes the model anew."""
    from vqa.recalibrate import recalibrate as run

    words = arguments.settings
    if arguments.config is not None:
        from vqa.recipes import load_settings

        data = load_settings(arguments.config).data
        words = [f"data.folder={data.folder}", f"data.h5={data.h5}", *words]
    out = arguments.out or arguments.run / "recalibrated"
    questions = run(arguments.run, out, arguments.split, words, batches=arguments.batches)
    print(f"statistics of {questions} questions' images; python main.py eval --run {out}")


class _Parser(argparse.ArgumentParser):
    def parse_args(self, words=None, namespace=None) -> argparse.Namespace:
        """As usual, but settings may also stand after options that follow a positional argument."""
        arguments, rest = self.parse_known_args(words, namespace)
        if rest and (any(word.startswith("-") for word in rest) or not hasattr(arguments, "settings")):
            self.error(f"unrecognized arguments: {' '.join(rest)}")
        if rest:
            arguments.settings = [*arguments.settings, *rest]
        return arguments

    def error(self, message: str) -> NoReturn:
        """One line, as every other error."""
        raise InputError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="main.py", description="Conditional batch normalisation for visual question answering.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(function, name: str | None = None) -> argparse.ArgumentParser:
        added = commands.add_parser(name or function.__name__, help=function.__doc__, description=function.__doc__)
        added.set_defaults(function=function)
        return added

    def takes_settings(added: argparse.ArgumentParser) -> None:
        added.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="override a setting, as train.epochs=3")

    def of_a_run(added: argparse.ArgumentParser) -> None:
        added.add_argument("--run", type=Path, required=True, metavar="DIR", help="a run directory, or its model/")

    def about_a_question(added: argparse.ArgumentParser) -> None:
        of_a_run(added)
        added.add_argument("--image", type=Path, required=True, metavar="FILE")
        added.add_argument("--question", required=True, metavar="TEXT")

    added = command(demo)
    added.add_argument("--config", type=Path, default=DEMO_CONFIG, metavar="FILE.yaml")
    takes_settings(added)

    added = command(preprocess)
    added.add_argument("--config", type=Path, required=True, metavar="FILE.yaml")
    takes_settings(added)

    added = command(train)
    added.add_argument("--config", type=Path, required=True, metavar="FILE.yaml")
    added.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    takes_settings(added)

    added = command(evaluate, "eval")
    of_a_run(added)
    added.add_argument("--split", default="val")
    added.add_argument("--out", type=Path, metavar="DIR", help="where the files are written; by default DIR of --run")
    added.add_argument("--allow-trained", action="store_true", help="score a split that was trained on, marked so")
    takes_settings(added)

    added = command(ask)
    about_a_question(added)
    added.add_argument("--top", type=_positive, default=5, metavar="N", help="answers shown (5)")
    added.add_argument("--json", action="store_true")

    added = command(inspect)
    about_a_question(added)
    added.add_argument("--versus", metavar="TEXT", help="a second question to compare with")
    added.add_argument("--out", type=Path, metavar="DIR", help="by default DIR/inspect")

    added = command(recalibrate)
    of_a_run(added)
    added.add_argument("--config", type=Path, metavar="FILE.yaml", help="the recipe whose data are taken")
    added.add_argument("--split", default="train", help="the split whose images are taken (train)")
    added.add_argument("--batches", type=_positive, default=200, metavar="N", help="batches at most (200)")
    added.add_argument("--out", type=Path, metavar="DIR", help="by default DIR/recalibrated")
    takes_settings(added)

    _bench_options(command(bench))
    _features_options(command(features), takes_settings)
    _experiment_options(command(experiment), takes_settings)
    return parser


def _bench_options(added: argparse.ArgumentParser) -> None:
    added.add_argument(
        "parts", nargs="*", metavar="PART", help="step, memory, sharing, cache, waiting, loading, scale (all)"
    )
    added.add_argument("--repeats", type=_positive, default=7, metavar="N", help="turns of each measurement (7)")
    added.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda (auto)")
    added.add_argument("--images", type=_positive, default=4000, metavar="N", help="of the part scale (4000)")
    added.add_argument("--tiny", action="store_true", help="a small network and few pictures: whether it runs")
    added.add_argument("--json", action="store_true")
    added.add_argument("--out", type=Path, metavar="DIR", help="write bench_PART.csv there")


def _features_options(added: argparse.ArgumentParser, takes_settings: Callable) -> None:
    added.add_argument("--run", type=Path, required=True, action="append", metavar="DIR", help="as often as wanted")
    added.add_argument("--split", default="val")
    added.add_argument("--pairs", type=_positive, default=1000, metavar="N", help="random pairs shown (1000)")
    added.add_argument("--seed", type=_natural, default=0, metavar="N", help="of the pairs, the folds and t-SNE (0)")
    added.add_argument("--out", type=Path, metavar="DIR", help="by default features/ in the first DIR of --run")
    takes_settings(added)


def _experiment_options(added: argparse.ArgumentParser, takes_settings: Callable) -> None:
    added.add_argument("suite", type=Path, metavar="SUITE.yaml")
    added.add_argument(
        "--at-once", type=_positive, metavar="N", help="runs at the same time; by default one a GPU, or a core"
    )
    added.add_argument("--seed", type=int, metavar="N")
    added.add_argument("--resources", default="", metavar="TEXT", help='of a task: "timeout_min=240 gpus_per_node=1"')
    instead = added.add_mutually_exclusive_group()
    instead.add_argument("--report", action="store_true", help="run nothing: the table of what is there")
    instead.add_argument("--publish", action="store_true", help="that, and into experiments/results and README.md")
    instead.add_argument("--only", metavar="RUN", help="this run of the suite alone, with --seed")
    instead.add_argument("--list", action="store_true", help="the commands of the runs that are missing")
    instead.add_argument("--submit", choices=("slurm",), help="hand them to a cluster as one array job")
    takes_settings(added)


def _positive(text: str) -> int:
    if not text.isdecimal() or len(text) > 9 or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no positive number below a thousand million")
    return int(text)


def _natural(text: str) -> int:
    if not text.isdecimal() or len(text) > 10 or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"{text!r:.40} is no number from 0 to {2**32 - 1}")
    return int(text)


def main() -> int:
    """Runs a command; the exit code is 0 if it was done, 2 if the user's input is wrong, 130 or 143 after a signal."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name or an answer that the terminal cannot show is no error
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        listen()
        arguments = _parser().parse_args()
        arguments.function(arguments)
        sys.stdout.flush()
    except InputError as error:
        return _failed(error)
    except OSError as error:
        if error.filename is None and error.errno not in OF_OUTPUT:
            raise
        return _failed(f"{error.filename or 'standard output'}: {os.strerror(error.errno).lower()}")
    except KeyboardInterrupt as interrupted:
        _say_last(_how_to_go_on(sys.argv[1:]))
        return interrupted.exit_code if isinstance(interrupted, Interrupted) else 130
    return 0


def _failed(why: object) -> int:
    _say_last(f"error: {printable(str(why))}")
    return 2


def _say_last(line: str) -> None:
    """Says a line on standard error; what the disk of a log has no room for is not tried again at exit."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError, ValueError):  # a stream that is none of the system's
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _how_to_go_on(words: Sequence[str]) -> str:
    command, *rest = words or [""]
    if command == "train" and "--resume" not in rest:
        rest.append("--resume")
    does = "goes on" if command in GOING_ON else "begins again"
    return f"interrupted; {shlex.join([command, *rest])} {does}"


if __name__ == "__main__":
    sys.exit(main())
