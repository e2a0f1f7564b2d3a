"""The commands. Each sets up one job; heavy imports stand inside, so that `--help` answers at once."""

import argparse
import errno
import io
import json
import os
import shlex
import sys
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import vqa
from experiments.command_line import build_parser
from vqa.io.errors import InputError, NotWrittenError, printable
from vqa.io.processes import Interrupted, listen

if TYPE_CHECKING:
    from experiments.suite import Suite

RESULTS = Path(__file__).parent / "experiments" / "results"
TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
OF_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EPIPE)  # why standard output may fail
GOING_ON = ("demo", "preprocess", "train", "experiment")  # started again after a kill, they keep what was done


def demo(arguments: argparse.Namespace) -> None:
    """Generated scenes, baseline and MODERN compared, one question inspected: a few minutes, no download."""
    from experiments.demo import run_demo
    from vqa.settings.recipes import load_settings

    run_demo(load_settings(arguments.config, arguments.settings))


def preprocess(arguments: argparse.Namespace) -> None:
    """Raw questions, annotations and images to one h5 file; run again, it goes on where it stopped."""
    from data.preprocess import preprocess as run
    from experiments.prepare import preprocessing_of
    from vqa.settings.recipes import load_settings

    run(**preprocessing_of(load_settings(arguments.config, arguments.settings)))


def train(arguments: argparse.Namespace) -> None:
    """Trains a recipe into runs/NAME; under torchrun on several GPUs or hosts."""
    from experiments.training.trainer import train as run
    from vqa.settings.recipes import load_settings

    settings = load_settings(arguments.config, arguments.settings)
    run(settings, resume=arguments.resume)


def evaluate(arguments: argparse.Namespace) -> None:
    """Official accuracy of a trained model; writes metrics_SPLIT.json and results_SPLIT.json."""
    from experiments.evaluate import evaluate as run
    from experiments.evaluate import table_of
    from experiments.process_group import this_process

    scores = run(
        arguments.run,
        arguments.split,
        arguments.out,
        arguments.settings,
        allow_trained=arguments.allow_trained,
    )
    if not this_process().is_main:
        return
    if scores is None:
        print(f"split {arguments.split!r} has no annotations: results_{arguments.split}.json written, nothing to score")
    else:
        print(f"{arguments.split}: {scores['questions']} questions\n{table_of(scores)}")


def ask(arguments: argparse.Namespace) -> None:
    """The answers to one question about any image, most probable first."""
    model = vqa.load(arguments.run)
    answers = model.ask(arguments.image, arguments.question, arguments.top)
    if unknown := model.unknown_words(arguments.question):
        print(printable(f"not met in training: {', '.join(unknown)}"), file=sys.stderr)
    if arguments.json:
        print(json.dumps({"image": str(arguments.image), "question": arguments.question, "answers": answers}))
        return
    for entry in answers:
        print(f"{100 * entry['probability']:6.2f} %  {printable(entry['answer'])}")


def inspect(arguments: argparse.Namespace) -> None:
    """What a question (or two) does to every channel: modulation.json, modulation.csv, report.html."""
    from vqa.inspect.inspection import inspect as run
    from vqa.inspect.inspection import summary, write_inspection

    questions = [arguments.question] + ([arguments.versus] if arguments.versus is not None else [])
    out = arguments.out or arguments.run / "inspect"
    if out.exists() and not out.is_dir():
        raise InputError(f"{out}: must be a directory")
    inspection = run(vqa.load(arguments.run), arguments.image, questions)
    write_inspection(inspection, out, arguments.image)
    print(summary(inspection))
    print(f"{out / 'report.html'}")


def features(arguments: argparse.Namespace) -> None:
    """What the stages of trained networks hold of the question: t-SNE figures, neighbours.json, points.csv."""
    from experiments.features.compare import compare_features, table_of

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
    from experiments.report.page import write_report
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
    from experiments.report.page import write_report
    from experiments.report.results import collect, keep_evidence
    from experiments.runner import missing_jobs

    if suite.words:
        raise InputError("--publish: a suite is published as its file says it; leave KEY=VALUE away")
    if not collect(suite, runs) and (RESULTS / f"{suite.name}_runs.csv").exists():
        raise InputError(f"--publish: nothing of {suite.name} is finished in {runs}, but results are published already")
    if missing := missing_jobs(suite, runs):
        print(f"{len(missing)} runs are not finished; they are published without them")
    write_report(suite, runs, RESULTS)
    keep_evidence(suite, runs, RESULTS / f"{suite.name}_runs.zip")


def bench(arguments: argparse.Namespace) -> None:
    """What is fast, measured beside what it replaces: steps, memory, sharing, stored maps, loading, scale."""
    from contextlib import redirect_stdout

    from experiments.bench.bench import bench as run

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
        print(json.dumps(results, indent=2))


def gpu_check(arguments: argparse.Namespace) -> None:
    """Whether all is right on a GPU, how fast it is, and the first experiments there, in bounded time."""
    from experiments.gpu.check import SUITES
    from experiments.gpu.check import gpu_check as run

    failed = run(
        arguments.out,
        minutes=arguments.minutes,
        device=arguments.device,
        tiny=arguments.tiny,
        steps=arguments.step,
        suites=[] if arguments.no_suites else arguments.suite or SUITES,
        at_once=arguments.at_once,
    )
    print(f"\n{arguments.out / 'gpu-check.zip'}; " + (f"failed: {', '.join(failed)}" if failed else "all passed"))
    if failed:
        sys.exit(1)


def recalibrate(arguments: argparse.Namespace) -> None:
    """Re-estimates the statistics of a model's norms on unlabelled images (AdaBN) and writes the model anew."""
    from experiments.recalibrate import recalibrate as run

    words = arguments.settings
    if arguments.config is not None:
        from vqa.settings.recipes import load_settings

        data = load_settings(arguments.config).data
        words = [f"data.folder={data.folder}", f"data.h5={data.h5}", *words]
    out = arguments.out or arguments.run / "recalibrated"
    questions = run(arguments.run, out, arguments.split, words, batches=arguments.batches)
    print(f"statistics of {questions} questions' images; python main.py eval --run {out}")


COMMANDS = {
    "demo": demo,
    "preprocess": preprocess,
    "train": train,
    "eval": evaluate,
    "ask": ask,
    "inspect": inspect,
    "recalibrate": recalibrate,
    "bench": bench,
    "gpu-check": gpu_check,
    "features": features,
    "experiment": experiment,
}


def main() -> int:
    """Runs a command; the exit code is 0 if it was done, 2 if the user's input is wrong, 128 + N after signal N."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # a name or an answer that the terminal cannot show is no error
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = argparse.Namespace()
    try:
        listen()
        arguments = build_parser(COMMANDS).parse_args()
        arguments.function(arguments)
        sys.stdout.flush()
    except InputError as error:
        elsewhere = isinstance(error, NotWrittenError) and getattr(arguments, "out", "") is None
        return _failed(f"{error}; --out can name another directory" if elsewhere else error)
    except OSError as error:
        if error.errno in TOO_MANY_FILES:
            why = "too many open files: raise `ulimit -n`, or set fewer `workers` or `data.processes`"
        elif error.filename is None and error.errno not in OF_OUTPUT:
            raise
        else:
            why = f"{error.filename or 'standard output'}: {os.strerror(error.errno).lower()}"
        return _failed(why)
    except BrokenExecutor:
        why = "a worker process was killed, as the system does where memory is short"
        return _failed(f"{why} (`workers` or `data.processes` can be less); {_how_to_go_on(sys.argv[1:])}")
    except KeyboardInterrupt as interrupted:
        _say_last(f"interrupted; {_how_to_go_on(sys.argv[1:])}")
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
    return f"{shlex.join([command, *rest])} {does}"


if __name__ == "__main__":
    sys.exit(main())
