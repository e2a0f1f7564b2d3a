"""The commands, one function each; heavy imports are inside the functions, so that `--help` is fast."""

import errno
import io
import json
import os
import shlex
import sys
import warnings
from concurrent.futures import BrokenExecutor
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import vqa
from experiments.command_line import build_parser
from vqa.io.errors import InputError, NotWrittenError, is_out_of_memory, printable
from vqa.io.processes import Interrupted, listen, unmasked

TOO_MANY_FILES = (errno.EMFILE, errno.ENFILE)
OF_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EPIPE, errno.EIO)  # why standard output may fail
TRAINING = ("demo", "train", "experiment")
RESUMABLE = ("demo", "preprocess", "pretrain", "train", "experiment")  # started again, they keep finished work


def demo(config: Path, settings: list[str]) -> None:
    """Draws scenes, compares baseline and MODERN on them, inspects one question: a few minutes, no download."""
    from vqa.settings.recipes import load_settings

    loaded = load_settings(config, settings)  # refused before the import of torch, which takes seconds
    from experiments.demo import run_demo

    run_demo(loaded)


def preprocess(config: Path, settings: list[str]) -> None:
    """Converts raw questions, annotations and images to one h5 file; resumes where it stopped."""
    from vqa.settings.recipes import load_settings

    loaded = load_settings(config, settings)
    from data.preprocess import preprocess as run
    from experiments.prepare import prepare_scenes, preprocessing_of

    prepare_scenes(loaded)
    run(**preprocessing_of(loaded))


def pretrain(images: Path, file: Path, backbone: str, device: str, only_probe: bool, **options: int) -> None:
    """Pretrains a ResNet for `backbone.weights` on labelled images, one folder per class; resumes where it stopped."""
    from experiments.pretrain import pretrain_on_images

    if only_probe:
        from experiments.features.probe import probe, probe_table
        from vqa.devices import choose_device

        print(probe_table(probe(file, images, choose_device(device))))
        return
    made = pretrain_on_images(file, backbone, images, device=device, **options)
    right = f"{made['held_out_accuracy']:.1f} % by class ({len(made['classes'])} classes)"
    if "held_out_group_accuracy" in made:
        right += f", {made['held_out_group_accuracy']:.1f} % by group"
    print(f"{file}: accuracy on {made['held_out_images']} held-out images: {right}")


def train(config: Path, settings: list[str], resume: bool, init_from: Path | None) -> None:
    """Trains a recipe into runs/NAME; under torchrun on several GPUs or hosts."""
    from vqa.settings.recipes import load_settings

    loaded = load_settings(config, settings)
    from experiments.process_group import this_process
    from experiments.training.train import train as run

    if resume and not (Path("runs") / loaded.name).exists():
        this_process().say(f"runs/{loaded.name}: no such run yet, it starts from the beginning")
    run(loaded, resume=resume, init_from=init_from)


def evaluate(run: Path, split: str, out: Path | None, settings: list[str], allow_trained: bool) -> None:
    """Scores a trained model by the official accuracy; writes metrics_SPLIT.json and results_SPLIT.json."""
    from experiments.evaluate import evaluate as score
    from experiments.evaluate import scores_table
    from experiments.process_group import this_process

    scores = score(run, split, out, settings, allow_trained=allow_trained)
    if not this_process().is_main:
        return
    if scores is None:
        print(f"split {split!r} has no annotations: results_{split}.json written, nothing to score")
    else:
        print(f"{split}: {scores['questions']} questions\n{scores_table(scores)}")


def ask(run: Path, image: Path, question: str, top: int, as_json: bool, **of_object: Any) -> None:
    """Answers a question about any image, or about an object in it; the most probable answers first."""
    model = vqa.load(run)
    answers = model.ask(image, question, top, **of_object)
    if unknown := model.unknown_words(question):
        print(printable(f"not in the vocabulary: {', '.join(unknown)}"), file=sys.stderr)
    if as_json:
        print(json.dumps({"image": str(image), "question": question, "answers": answers}))
        return
    for entry in answers:
        print(f"{100 * entry['probability']:6.2f} %  {printable(entry['answer'])}")


def inspect(run: Path, image: Path, question: str, versus: str | None, out: Path | None, **of_object: Any) -> None:
    """Shows what one or two questions do to every channel; writes modulation.json, modulation.csv, report.html."""
    from vqa.inspect.inspection import inspect as inspection_of
    from vqa.inspect.inspection import summary, write_inspection

    out = out or run / "inspect"
    questions = [question] if versus is None else [question, versus]
    inspection = inspection_of(vqa.load(run), image, questions, **of_object)
    write_inspection(inspection, out, image)
    print(f"{summary(inspection)}\n{out / 'report.html'}")


def features(run: list[Path], split: str, out: Path | None, settings: list[str], pairs: int, seed: int) -> None:
    """t-SNE figures and nearest-neighbour accuracy of the features after each stage."""
    from experiments.features.compare import accuracy_table, compare_features

    out = out or run[0] / "features"
    comparison = compare_features(run, split, out, settings, pairs=pairs, seed=seed)
    print(accuracy_table(comparison))
    if comparison["pairs"] < pairs:
        print(f"split {split!r} has only {comparison['pairs']} pairs")
    print(out)


def experiment(
    file: Path,
    settings: list[str],
    does: str,
    only: str | None,
    seed: int | None,
    at_once: int | None,
    cluster: str | None,
    resources: str,
) -> None:
    """Runs the missing runs of a suite and prints its table with the paper's numbers."""
    from experiments.process_group import this_process
    from experiments.report.page import publish, write_report
    from experiments.runner import command_of, job_named, missing_jobs, run_job, run_suite
    from experiments.suite import load_suite

    if (only is None) != (seed is None):
        raise InputError("--only RUN and --seed N belong together")
    if this_process().world_size > 1:
        raise InputError("experiment: torchrun runs only train and eval; start it with python")
    suite, runs = load_suite(file, tuple(settings)), Path("runs")
    if only is not None:
        run_job(job_named(suite, only, seed), suite, runs)
    elif cluster is not None:
        from experiments.cluster import submit

        print(f"{len(submit(suite, runs, cluster, resources))} runs submitted; --report shows what is finished")
    elif does == "list":
        print("\n".join(shlex.join(command_of(suite, job)) for job in missing_jobs(suite, runs)))
    elif does == "publish":
        print(publish(suite, runs))
    else:
        failed = run_suite(suite, runs, at_once) if does == "run" else None
        print(write_report(suite, runs, runs / "experiments" / "reports"))
        if failed:
            raise InputError(failed)


def bench(as_json: bool, **options: Any) -> None:
    """Measures time and memory of each fast path and of the code that it replaces."""
    from experiments.bench.bench import bench as run

    with redirect_stdout(sys.stderr if as_json else sys.stdout):
        results = run(**options)
    if as_json:
        print(json.dumps(results, indent=2))


def gpu_check(out: Path, **options: Any) -> None:
    """Checks correctness and speed on a GPU and runs the first experiments there, within a time limit."""
    from experiments.gpu.check import gpu_check as run

    failed = run(out, **options)
    print(f"\n{out / 'gpu-check.zip'}; " + (f"failed: {', '.join(failed)}" if failed else "no step failed"))
    if failed:
        sys.exit(1)


def recalibrate(
    run: Path, config: Path | None, split: str, batches: int, out: Path | None, settings: list[str]
) -> None:
    """Re-estimates a model's statistics of norms on other images, without answers (AdaBN), and writes a new model."""
    from experiments.recalibrate import recalibrate as estimate

    if config is not None:
        from vqa.settings.recipes import load_settings

        data = load_settings(config).data.model_dump(include={"folder", "h5", "splits"})
        words = (f"data.{key}={json.dumps(value, ensure_ascii=False)}" for key, value in data.items())  # as YAML
        settings = [*words, *settings]
    out = out or run / "recalibrated"
    questions = estimate(run, out, split, settings, batches=batches)
    print(f"statistics re-estimated on the images of {questions} questions; next: python main.py eval --run {out}")


def export(run: Path, to: Path, form: str) -> None:
    """Writes a trained model as a folder that transformers' Auto classes load, or as an ONNX file."""
    from experiments.export import export as write

    write(run, to, form)
    print(to)


COMMANDS = {
    "demo": demo,
    "preprocess": preprocess,
    "pretrain": pretrain,
    "train": train,
    "eval": evaluate,
    "ask": ask,
    "inspect": inspect,
    "recalibrate": recalibrate,
    "export": export,
    "bench": bench,
    "gpu-check": gpu_check,
    "features": features,
    "experiment": experiment,
}


def main() -> int:
    """Runs a command; the exit code is 0 if it was done, 2 if the user's input is wrong, 128 + N after signal N."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, as by `>&-`
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 (open to the end)
    if isinstance(sys.stdout, io.TextIOWrapper):  # escape what the terminal cannot show
        sys.stdout.reconfigure(errors="backslashreplace")
    command, options = "", dict[str, Any]()
    try:
        listen()
        options = vars(build_parser(COMMANDS).parse_args())
        command = options.pop("command")
        with unmasked():
            COMMANDS[command](**options)
        sys.stdout.flush()
        return 0
    except InputError as error:
        elsewhere = isinstance(error, NotWrittenError) and options.get("out", "") is None
        why = f"{error}; --out can name another directory" if elsewhere else str(error)
    except OSError as error:
        if error.errno in TOO_MANY_FILES:
            why = "too many open files: raise `ulimit -n`, or set fewer `workers` or `data.processes`"
        elif error.filename is None and error.errno not in OF_OUTPUT:
            raise
        else:
            why = f"{error.filename or 'standard output'}: {os.strerror(error.errno).lower()}"
    except BrokenExecutor:
        why = "a worker process was killed, probably because memory ran out; set fewer `workers` or `data.processes`"
        why = f"{why}; {_how_to_resume()}"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        less = "training needs less with a smaller `train.batch_size`, `train.accumulate` or `speed.recompute`; "
        why = f"memory ran out; {less if command in TRAINING else ''}{_how_to_resume()}"
    except KeyboardInterrupt as interrupted:
        _say_last(f"interrupted; {_how_to_resume()}")
        return interrupted.exit_code if isinstance(interrupted, Interrupted) else 130
    _say_last(f"error: {printable(why)}")
    return 2


def _say_last(line: str) -> None:
    """Print a line on standard error; drop what a full disk has no room for, so that the exit does not fail on it."""
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError, ValueError):  # a stream without a file descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _how_to_resume() -> str:
    command, *rest = sys.argv[1:] or [""]
    if command == "train" and "--resume" not in rest:
        rest.append("--resume")
    return f"to {'resume' if command in RESUMABLE else 'begin again'}: {shlex.join([command, *rest])}"


if __name__ == "__main__":
    warnings.formatwarning = lambda message, *_, **__: f"warning: {printable(str(message))}\n"  # one line
    sys.exit(main())
