"""Raw questions, annotations and images to one h5 file.

1. A finished file made from the same sources (by their hashes) and settings is left as it is. One that lacks a split,
   or was made with another vocabulary or other answer classes, is replaced by a new one, which copies its images.
2. Read questions and annotations; vocabulary and answer classes come from the split `train` only, or from the splits
   that are named. Write them to the file, which is `NAME.h5.partial` until it is complete.
3. Copy the images of the finished file; decode and resize the others, and mark what is written every few images.
4. List images that are missing or unreadable; put stand-ins in their place, or stop and keep the work.

A run that finds a partial file resumes at step 3.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data import h5_file
from data.bad_images import check_any_exists, settle_bad_images, stand_in
from data.h5_rows import RowWriter, opened_for_filling, set_rows
from data.provenance import TRAINING_SPLIT, check_same, is_made, provenance_of, settings_of, stand_ins_note
from data.question_table import NO_ANSWER
from data.sources import Crop, NeededImage, Source, decode, defect_of, number_images
from data.vqa_files import Question, SplitFiles
from vqa.io.errors import InputError
from vqa.io.files import check_room, size_text
from vqa.io.locks import held, lock_beside
from vqa.io.progress import progress
from vqa.text.tokenizer import PAD, UNKNOWN, train_tokenizer

_IMAGES_A_FLUSH = 256
_FILES_A_TASK = 8  # of a thread
_OTHER_DISK = "name another data.h5 or a smaller data.image_size"
_BYTES_A_QUESTION = 230  # approximate size in the file of a question, without its text


def preprocess(
    splits: Mapping[str, SplitFiles],
    path: Path,
    *,
    image_size: int,
    min_word_count: int,
    source: Source,
    skip_bad_images: bool,
    threads: int,
    vocabulary_from: Sequence[str] = (TRAINING_SPLIT,),
) -> None:
    """Make the h5 file `path`; a second run resumes where the first stopped, or prints that there is nothing to do.

    Args:
        splits: raw files by split; one must be called `train`.
        path: the file to make.
        image_size: side S of the stored images, in pixels.
        min_word_count: how often the questions of `vocabulary_from` must hold a word of the vocabulary.
        source: how the raw files are read.
        skip_bad_images: continue without images that are missing or unreadable: training skips their questions,
            evaluation answers them from an image of the mean colour. False decodes those of a finished file again.
        threads: images that are decoded at the same time.
        vocabulary_from: splits, with annotations, whose questions give the words and the answer classes.

    Raises:
        InputError: a source is missing or malformed, `path` was made otherwise or is locked by another process, images
            are bad and not skipped, or the disk is full.
    """
    _check_splits(splits, vocabulary_from, source)
    settings = {"image_size": image_size, "min_word_count": min_word_count, **source.settings}
    wanted = provenance_of(splits, settings, vocabulary_from)
    if is_made(path, wanted, skip_bad_images):
        return
    with held(lock_beside(path), path):
        if is_made(path, wanted, skip_bad_images):  # another process has finished it since
            return
        partial = h5_file.partial_path(path)
        finished = h5_file.Store(path) if path.exists() else None
        moved: list[NeededImage] = []
        if partial.exists():
            begun = h5_file.read_provenance(partial)
            check_same(partial, begun, wanted)
            check_room(partial, partial.stat().st_size, _OTHER_DISK)
            moved = _images_of({name: splits[name] for name in begun["sources"]}, source)
        else:
            _begin(partial, splits, wanted, finished, source)
        with opened_for_filling(partial) as file:
            if finished is not None:
                _copy_images(finished, file)
            bad = _decode_images(file, threads, moved)
            if bad and not skip_bad_images:
                print(f"{partial}: holds the images that could be read")
            ids = file["images/id"][:]
            settle_bad_images([(ids[row], reason) for row, reason in bad.items()], skip_bad_images)
            h5_file.fill_unusable(file, list(bad), stand_in(image_size))
        h5_file.finish(partial, path)
    print(f"{path}: complete, {path.stat().st_size / 1e6:.1f} MB{stand_ins_note(h5_file.Store(path))}")


def _check_splits(splits: Mapping[str, SplitFiles], vocabulary_from: Sequence[str], source: Source) -> None:
    """Raise InputError if a split or a file of questions or annotations is missing."""
    if TRAINING_SPLIT not in splits:
        raise InputError(f"data.splits: one split must be called {TRAINING_SPLIT!r}, got {', '.join(splits) or 'none'}")
    if not source.has_answers(splits[TRAINING_SPLIT]):
        raise InputError(f"data.splits.{TRAINING_SPLIT}.annotations: the training split needs annotations")
    for name in vocabulary_from:
        if name not in splits:
            raise InputError(f"data.vocabulary_from: no split {name!r}; data.splits has {', '.join(splits)}")
        if not source.has_answers(splits[name]):
            raise InputError(f"data.vocabulary_from: split {name!r} has no annotations, and so no answers")
    for name, files in splits.items():
        for file in filter(None, (files.questions, files.annotations)):
            if not file.is_file():
                raise InputError(f"{file}: no such file (split {name!r})")


def _begin(
    partial: Path,
    splits: Mapping[str, SplitFiles],
    wanted: Mapping[str, Any],
    finished: h5_file.Store | None,
    source: Source,
) -> None:
    """Write the file without its pixels; the images of a finished one are its first."""
    stored = [] if finished is None else list(finished.provenance["sources"])
    splits = {name: splits[name] for name in [*stored, *splits]}
    questions = {name: source.read(files) for name, files in splits.items()}
    numbers: dict[NeededImage, int] = {}
    rows: dict[str, np.ndarray] = {}
    about: dict[str, list[str]] = {}  # the image files of each split
    for name, asked in questions.items():
        needed = source.images(splits[name], asked)
        rows[name] = number_images(needed, numbers)
        about[name] = list(dict.fromkeys(image.file for image in chain.from_iterable(needed)))
    images = list(numbers)
    for name in splits:
        if name not in stored:
            check_any_exists(map(Path, about[name]), name)
    if finished is not None:
        if finished.provenance == wanted:
            _check_any_is_mended(finished, images)
        print(f"{finished.path}: its {finished.usable.sum()} images are kept")
    for name, asked in questions.items():
        print(f"{name}: {len(asked)} questions about {len(about[name])} images")
    settings = settings_of(wanted)
    pixels = 3 * settings["image_size"] ** 2 * len(images)
    words = sum(46 + len(image.file) for image in images)
    words += sum(_BYTES_A_QUESTION + len(question.text) for asked in questions.values() for question in asked)
    print(f"{partial}: needs {size_text(pixels + words)}, {size_text(pixels)} of them for {len(images)} images")
    check_room(partial, pixels + words, _OTHER_DISK)
    h5_file.begin(
        partial,
        image_size=settings["image_size"],
        images=images,
        categories=source.categories,
        provenance=wanted | {"sources": {name: wanted["sources"][name] for name in splits}},
        **_tables(source, questions, rows, settings),
    )


def _images_of(splits: Mapping[str, SplitFiles], source: Source) -> list[NeededImage]:
    """The images of a begun file, in the order of its rows, by their names of today: their folder may have moved."""
    rows: dict[NeededImage, int] = {}
    for files in splits.values():
        number_images(source.images(files, source.read(replace(files, annotations=None))), rows)
    return list(rows)


def _check_any_is_mended(finished: h5_file.Store, images: Sequence[NeededImage]) -> None:
    """Refuse to make a file again while all images that were bad still are."""
    bad = []
    for row in np.flatnonzero(~finished.usable):
        if (defect := defect_of(images[row], finished.image_size)) is None:
            return
        bad.append((images[row].id, defect))
    settle_bad_images(bad, skip=False)


def _tables(
    source: Source,
    questions: Mapping[str, Sequence[Question]],
    rows: Mapping[str, np.ndarray],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The tokenizer, the answer classes and the table of each split, as `h5_file.begin` takes them."""
    named = settings["vocabulary_from"]
    known = [question for name in named for question in questions[name]]
    tokenizer = train_tokenizer((question.text for question in known), settings["min_word_count"])
    if tokenizer.get_vocab_size() <= len((PAD, UNKNOWN)):
        raise InputError(
            f"data.min_word_count: no word occurs {settings['min_word_count']} times in the questions of "
            f"{' and '.join(named)}"
        )
    for remark in source.remarks(list(chain.from_iterable(questions.values()))):
        print(remark)
    given = chain.from_iterable(question.answers for question in known)
    vocabulary = source.vocabulary(given)
    print(f"{tokenizer.get_vocab_size()} words and {len(vocabulary)} answers from {' and '.join(named)}")
    tables = {name: source.table(asked, rows[name], tokenizer, vocabulary) for name, asked in questions.items()}
    for name, table in tables.items():
        if (labels := table.labels()[table.given != NO_ANSWER]).size:
            print(f"{name}: {100 * (labels != NO_ANSWER).mean():.1f} % of the given answers are classes")
    return {"tokenizer": tokenizer, "vocabulary": vocabulary, "splits": tables}


def _copy_images(finished: h5_file.Store, file: h5py.File) -> None:
    """Copy the images of a finished file, except stand-ins, to the same rows of the partial file."""
    count, splits = len(finished.usable), list(finished.provenance["sources"])
    begun = list(json.loads(file.attrs["provenance"])["sources"])
    if begun[: len(splits)] != splits or not np.array_equal(file["images/id"][:count], finished.image_ids):
        return  # begun before the finished file came here: its images have other rows
    images, writer = h5_file.H5Images(finished.path), RowWriter(file, "images/pixels")
    pending = np.flatnonzero(finished.usable & ~file["images/filled"][:count]).tolist()
    written = (_write_images(writer, [row], lambda rows: [images[row] for row in rows]) for row in pending)
    if damaged := _fill(file, chain.from_iterable(written)):
        print(f"{finished.path}: {len(damaged)} image(s) are damaged and decoded again")


def _decode_images(file: h5py.File, threads: int, moved: Sequence[NeededImage]) -> dict[int, str]:
    """Decode the images whose rows are not filled; returns what is wrong with those that cannot be, by row.

    `moved` are the images of a begun file as they are named now; none: as in the file.

    Threads do it, since Pillow releases Python's global lock while it decodes and resizes.
    """
    stand_ins = np.flatnonzero(~file["images/usable"][:]).tolist()
    set_rows(file, "images/filled", stand_ins, [False] * len(stand_ins))  # their images may have been repaired
    pending = np.flatnonzero(~file["images/filled"][:]).tolist()
    names, writer = list(file["images/file"].asstr()[:]), RowWriter(file, "images/pixels")
    if [image.id for image in moved] == file["images/id"][:].tolist():
        names = [image.file for image in moved]
    stored = file["images"].get("crop")
    crops = [None] * len(names) if stored is None else [Crop(*crop) for crop in stored[:].tolist()]

    def read(rows: Sequence[int]) -> list[np.ndarray]:
        return decode(Path(names[rows[0]]), [crops[row] for row in rows], writer.shape[1])

    def decode_some(files: Iterable[Sequence[int]]) -> list[tuple[int, int | str]]:
        return [done for rows in files for done in _write_images(writer, rows, read)]

    files = [list(rows) for _, rows in groupby(pending, names.__getitem__)]  # each is decoded once
    tasks = [files[start : start + _FILES_A_TASK] for start in range(0, len(files), _FILES_A_TASK)]
    with ThreadPoolExecutor(threads) as pool:
        try:
            return _fill(file, chain.from_iterable(pool.map(decode_some, tasks)))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _write_images(
    writer: RowWriter, rows: Sequence[int], read: Callable[[Sequence[int]], list[np.ndarray]]
) -> list[tuple[int, int | str]]:
    """Write the images of some rows; returns each row with its checksum, or with what is wrong with the images."""
    try:
        images = read(rows)
    except InputError as error:
        return [(row, str(error)) for row in rows]
    return [(row, writer.write(row, image)) for row, image in zip(rows, images, strict=True)]


def _fill(file: h5py.File, images: Iterable[tuple[int, int | str]]) -> dict[int, str]:
    """Mark the rows of images that `_write_images` wrote; returns what is wrong with the others, by row."""
    filled = file["images/filled"][:]
    bad: dict[int, str] = {}
    written: list[tuple[int, int]] = []
    try:
        for row, done in progress(images, len(filled), "images", done=int(filled.sum())):
            if isinstance(done, str):
                bad[row] = done
                continue
            written.append((row, done))
            if len(written) == _IMAGES_A_FLUSH:
                h5_file.mark(file, written)
                written = []
    finally:  # also when a signal ends it
        h5_file.mark(file, written)
    return bad
