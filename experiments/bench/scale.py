"""Time and memory of jobs on generated data of VQA's size: each job runs in its own process.

Every job has all questions; two numbers of images show what grows with them.
"""

import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout, suppress
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from data.h5_file import Store
from data.preprocess import preprocess
from data.question_table import question_table
from data.vqa_files import SplitFiles, read_questions
from experiments.bench.setup import Rows, Setup
from experiments.bench.vqa_sized_data import QUESTIONS, write_coco_like
from vqa.io.files import check_room
from vqa.io.images import decode_image
from vqa.text.answers import answer_vocabulary
from vqa.text.tokenizer import train_tokenizer

RECIPE = Path(__file__).with_name("scale.yaml")
_JPEG_BYTES = 165_000


def scale_rows(setup: Setup) -> Rows:
    """Time, memory and size of the jobs with a quarter of the images and with all of them; a fifth of these is val's.

    `preprocess` and decoding alone take `repeats` turns, and the row of each is the one of the median time.

    Raises:
        InputError: the disk has no room.
    """
    (_, size), folder = setup.network, setup.folder
    questions, images = setup.pick(({"train": 2000, "val": 200}, 80), (QUESTIONS, setup.images))
    steps, workers = setup.pick((2, 0), (50, 2))  # of training, 64 questions each; processes that prepare batches
    needed = images * (_JPEG_BYTES + 3 * size**2) + 2000 * sum(questions.values())
    check_room(folder / "raw", needed, "take fewer --images")
    for count in (images // 4, images):
        here = folder / str(count)
        raw, h5, run = here / "raw", here / "data.h5", here / "run"
        val = max(1, count // 5)
        splits = write_coco_like(raw, {"train": count - val, "val": val}, questions, setup.pick(1, 2))
        words = [f"data.folder={raw}", f"data.h5={h5}", f"data.image_size={size}", f"workers={workers}"]
        jobs: dict[str, tuple[Any, ...]] = {
            "preprocess": (_preprocess, h5, words),
            f"train, {steps} steps": (_train, run, words, steps),
        }
        if count == images:  # they do not depend on the number of images, or take long
            files = [path for split in splits.values() for path in sorted(Path(split.images).parent.iterdir())]
            jobs |= {
                "reading questions": (_read, splits),
                "decoding alone": (decode_alone, files, size, 2),
                "eval": (_evaluate, run, words),
            }
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
        for turn in range(setup.repeats):
            for name, job in jobs.items():
                if turn == 0 or name in ("decoding alone", "preprocess"):
                    results[name].append(measured(*job))
        for name, several in results.items():
            row = {"job": name, "images": count, "questions": sum(questions.values()), "pixels": size}
            row |= sorted(several, key=itemgetter("seconds"))[len(several) // 2]
            yield row | {"file_mb": round(h5.stat().st_size / 1e6, 1) if name == "preprocess" else None}
        shutil.rmtree(here)


def measured(job: Callable[..., int], *arguments: Any) -> dict[str, Any]:
    """Run a job in its own process.

    Returns:
        `done`: the number that the job returns; `seconds` and `done_a_second` without the start of the process;
        `cpu_seconds` with it; `peak_mib`: the memory of the process and its children (what they share counts once).
    """
    peak = 0
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        process = psutil.Process(pool.submit(os.getpid).result())
        running = pool.submit(_timed, job, arguments)
        while not running.done():
            peak = max(peak, _memory(process))
            time.sleep(0.1)
        done, seconds, cpu = running.result()
    return {
        "done": done,
        "seconds": round(seconds, 2),
        "done_a_second": round(done / seconds, 1),
        "cpu_seconds": round(cpu, 2),
        "peak_mib": round(peak / 2**20),
    }


def _timed(job: Callable[..., int], arguments: tuple[Any, ...]) -> tuple[int, float, float]:
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        start = time.perf_counter()
        done = job(*arguments)
        seconds = time.perf_counter() - start
    return done, seconds, sum(psutil.Process().cpu_times()[:4])  # its own and its children's


def _memory(process: psutil.Process) -> int:
    """Bytes held by a process and its descendants; of memory that n processes share, each counts an n-th."""
    held = 0
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.Error):  # it has ended
            info = one.memory_full_info()
            held += getattr(info, "pss", info.uss)  # without Linux's pss, what is the process's alone
    return held


def _read(splits: Mapping[str, SplitFiles]) -> int:
    asked = {name: read_questions(files.questions, files.annotations) for name, files in splits.items()}
    tokenizer = train_tokenizer((question.text for question in asked["train"]), 2)
    vocabulary = answer_vocabulary((answer for question in asked["train"] for answer in question.answers), 2000)
    for questions in asked.values():
        question_table(questions, np.zeros(len(questions), np.int64), tokenizer, vocabulary)
    return sum(map(len, asked.values()))


def decode_alone(files: Sequence[Path], size: int, threads: int) -> int:
    """Decode and resize images in so many threads, as `preprocess`, without storing them; return their number."""
    with ThreadPoolExecutor(threads) as pool:
        return sum(1 for _ in pool.map(lambda file: decode_image(file, size), files))


def _preprocess(h5: Path, words: Sequence[str]) -> int:
    from experiments.prepare import preprocessing_of
    from vqa.settings.recipes import load_settings

    h5.unlink(missing_ok=True)
    preprocess(**preprocessing_of(load_settings(RECIPE, words)))
    return len(Store(h5).usable)


def _train(run: Path, words: Sequence[str], steps: int) -> int:
    from experiments.bench.loading import time_training
    from vqa.settings.recipes import load_settings

    settings = load_settings(RECIPE, [*words, "data.cache_gib=0"])
    time_training(settings, run, steps=steps, save=True)
    return steps * settings.train.batch_size


def _evaluate(run: Path, words: Sequence[str]) -> int:
    from experiments.evaluate import evaluate

    words = [word for word in words if not word.startswith("data.image_size")]  # which the model has
    return evaluate(run, "val", run, [*words, "train.batch_size=256"])["questions"]
