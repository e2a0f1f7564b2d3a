"""Time and memory of jobs on data of VQA's size: each job runs in a process of its own.

The data are made here (`vqa_sized_data`). Every job has all questions; what could grow with the images is measured
for two numbers of them.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection
from operator import itemgetter
from pathlib import Path
from typing import Any

import psutil

from data.preprocess import preprocess
from data.question_table import question_table
from data.vqa_files import read_questions
from experiments import ROOT
from experiments.bench.decoding import decode_alone
from experiments.bench.vqa_sized_data import write_coco_like
from vqa.io.files import check_room
from vqa.text.answers import answer_vocabulary
from vqa.text.tokenizer import train_tokenizer

RECIPE = ROOT / "config" / "vqa_v1" / "modern.yaml"
_JPEG_BYTES = 165_000
_COMPARED = ("decoding alone", "preprocess")


def scale_rows(
    questions: dict[str, int], size: int, images: int, steps: int, workers: int, repeats: int, folder: Path
) -> list[dict[str, Any]]:
    """Time, memory and size of the jobs with a quarter of the images and with all of them.

    Args:
        questions: of train and val.
        size: of the stored images, pixels.
        images: of which a fifth is val's.
        steps: of training, 64 questions each.
        workers: processes that prepare batches.
        repeats: of `preprocess` and of decoding alone, in turns; the row of each is that of its median time.
        folder: where everything is made.

    Raises:
        InputError: the disk has no room.
    """
    check_room(
        folder / "raw", images * (_JPEG_BYTES + 3 * size**2) + 2000 * sum(questions.values()), "take fewer --images"
    )
    rows = []
    for count in (images // 4, images):
        here = folder / str(count)
        raw, h5, run = here / "raw", here / "data.h5", here / "run"
        val = max(1, count // 5)
        made = {"train": count - val, "val": val}
        splits = write_coco_like(raw, made, questions)
        words = [*_WORDS, f"data.folder={raw}", f"data.h5={h5}", f"data.image_size={size}", f"workers={workers}"]
        files = [path for split in splits.values() for path in sorted(Path(split.images).parent.iterdir())]
        jobs: dict[str, tuple[Callable[..., int], ...]] = {
            "reading questions": (_read, splits),
            "decoding alone": (decode_alone, files, size, 2),
            "preprocess": (_preprocess, words),
            f"train, {steps} steps": (_train, words, run, steps),
            "eval": (_evaluate, words, run),
        }
        if count < images:  # the others do not depend on it, or would take long
            jobs = {name: job for name, job in jobs.items() if name.startswith(("preprocess", "train"))}
        told: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
        for name in [name for turn in range(repeats) for name in jobs if turn == 0 or name in _COMPARED]:
            if name == "preprocess":
                h5.unlink(missing_ok=True)
            row = {"job": name, "images": count, "questions": sum(questions.values()), "pixels": size}
            told[name].append(row | measured(*jobs[name]))
            if name == "preprocess":
                told[name][-1]["file_mb"] = round(h5.stat().st_size / 1e6, 1)
        rows += [sorted(several, key=itemgetter("seconds"))[len(several) // 2] for several in told.values()]
        shutil.rmtree(here)
    return rows


def measured(job: Callable[..., int], *arguments: Any) -> dict[str, Any]:
    """Runs a job in a process of its own.

    Returns:
        `done` as the job says, `seconds` and `done_a_second` without the start of the process, `cpu_seconds` with it,
        and `peak_mib`: the memory of the process and its children (what some of them share counts once).

    Raises:
        RuntimeError: it failed; it has said why.
    """
    context = get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(theirs, job, arguments))
    process.start()
    theirs.close()
    peak = 0
    while not ours.poll(0.1):
        peak = max(peak, _memory(process.pid))
    try:
        done, seconds, cpu = ours.recv()
    except EOFError:
        raise RuntimeError(f"{job.__name__.strip('_')} failed") from None
    finally:
        process.join()
    return {
        "done": done,
        "seconds": round(seconds, 2),
        "done_a_second": round(done / seconds, 1),
        "cpu_seconds": round(cpu, 2),
        "peak_mib": round(peak / 2**20),
        "file_mb": None,
    }


def _run(sender: Connection, job: Callable[..., int], arguments: tuple[Any, ...]) -> None:
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        begun = time.perf_counter()
        done = job(*arguments)
        seconds = time.perf_counter() - begun
    sender.send((done, seconds, sum(psutil.Process().cpu_times()[:4])))  # its own and its children's


def _memory(process: int) -> int:
    """The bytes that a process, its children and theirs hold; of what n processes share, each is counted an n-th."""
    held = 0
    with suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process)
        for one in (parent, *parent.children(recursive=True)):
            with suppress(psutil.Error):  # it has ended
                info = one.memory_full_info()
                held += getattr(info, "pss", info.uss)  # without Linux's pss, what is the process's alone
    return held


_WORDS = [
    "backbone.name=resnet10",
    "backbone.weights=none",
    "cbn.stages=[]",  # the data are measured, not the network: each image of a batch passes through it once
    "question.glove=null",
    "question.embedding_size=64",
    "question.hidden_size=128",
    "question.layers=1",
    "attention.units=64",
    "answer.fusion_size=128",
    "answer.hidden_size=0",
    "train.batch_size=64",
    "train.validate_on=null",
    "train.tensorboard=false",
    "device=cpu",
]


def _read(splits: dict[str, Any]) -> int:
    asked = {name: read_questions(files.questions, files.annotations) for name, files in splits.items()}
    tokenizer = train_tokenizer((question.text for question in asked["train"]), 2)
    vocabulary = answer_vocabulary((answer for question in asked["train"] for answer in question.answers), 2000)
    for questions in asked.values():
        question_table(questions, {question.image_id: 0 for question in questions}, tokenizer, vocabulary)
    return sum(map(len, asked.values()))


def _preprocess(words: Sequence[str]) -> int:
    from data.h5_file import Store
    from experiments.prepare import preprocessing_of
    from vqa.settings.recipes import load_settings

    settings = load_settings(RECIPE, words)
    preprocess(**preprocessing_of(settings))
    return len(Store(Path(settings.data.h5)).usable)


def _train(words: Sequence[str], run: Path, steps: int) -> int:
    from experiments.process_group import Processes
    from experiments.training.run_data import VQATask
    from experiments.training.run_directory import RunDirectory
    from experiments.training.trainer import prepare
    from vqa.saved_model import save_weights
    from vqa.settings.recipes import load_settings

    settings = load_settings(RECIPE, [*words, "data.cache_gib=0"])
    trainer = prepare(VQATask(settings), RunDirectory(run), Processes())
    for _ in trainer.steps(trainer.model, islice(trainer.batches(epoch=1), steps)):
        pass
    save_weights(trainer.run.model, trainer.model, {"trained_on": ["train"]})
    return steps * settings.train.batch_size


def _evaluate(words: Sequence[str], run: Path) -> int:
    from experiments.evaluate import evaluate

    words = [word for word in words if word.startswith(("data.folder", "data.h5", "device", "workers"))]
    return evaluate(run, "val", run, [*words, "train.batch_size=256"])["questions"]
