"""Raw questions, annotations and images to one h5 file.

1. a finished file made from the same sources (by their hashes) and settings is left alone; one that lacks a split, or
   was made with other words or answer classes, is made anew as follows, but its images are copied and not decoded;
2. read the questions of every split, from which the images are known;
3. begin a file and, in several processes, to decode and resize the images into it;
4. meanwhile, read the annotations, and write questions and answers into the file, which is `NAME.h5.partial` from then
   on; words and answer classes come from the split `train` only;
5. mark what is decoded; list the images that are missing or unreadable, and finish, or stop and keep the work done.

A run that finds the partial file copies and decodes what is missing and does step 5. Until the new file is whole, the
finished one stays as it is.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from data import h5_file
from data.bad_images import check_any_exists, settle_bad_images, stand_in
from data.decoding import Decoding
from data.h5_rows import copied_rows, place_of_rows, set_rows
from data.provenance import check_same, is_made, provenance_of, stand_ins_said
from data.question_table import question_table
from data.vqa_files import Question, SplitFiles, read_asked, remarks, with_annotations
from vqa.io.errors import InputError
from vqa.io.files import check_room, shown
from vqa.io.images import decode_image
from vqa.io.locks import held
from vqa.io.progress import progress
from vqa.text.answers import NO_ANSWER, answer_vocabulary
from vqa.text.tokenizer import PAD, UNKNOWN, train_tokenizer

TRAINING_SPLIT = "train"
_IMAGES_A_FLUSH = 256
_OTHER_DISK = "name another data.h5 or a smaller data.image_size"
_BYTES_A_QUESTION = 230  # about, that the file needs for a question beside its text

Decoded = Iterator[tuple[int, int | str]]  # rows, each with its checksum or what is wrong with its image


def preprocess(
    splits: Mapping[str, SplitFiles],
    path: Path,
    *,
    image_size: int,
    min_word_count: int,
    answers: int,
    skip_bad_images: bool,
    processes: int,
) -> None:
    """Makes the h5 file `path`; run again, goes on where it stopped; finished, says so and does nothing.

    A finished file to which splits are added, or which is to have other words or answer classes, is made anew with the
    images that it has; those that were skipped are decoded again where they no longer may be skipped.

    Args:
        splits: raw files by split; one must be called `train`.
        path: the file to make.
        image_size: side S of the stored images, in pixels.
        min_word_count: a word is in the vocabulary if the training questions hold it that often.
        answers: number of answer classes.
        skip_bad_images: go on without the images that are missing or unreadable: training leaves their questions
            out, evaluation answers them from an image of the mean colour.
        processes: decoding processes.

    Raises:
        InputError: a source is missing or malformed, `path` was made otherwise or is being made by another process,
            images are bad and not skipped, or the disk is full.
    """
    if TRAINING_SPLIT not in splits:
        raise InputError(f"data.splits: one split must be called {TRAINING_SPLIT!r}, got {', '.join(splits) or 'none'}")
    if splits[TRAINING_SPLIT].annotations is None:
        raise InputError(f"data.splits.{TRAINING_SPLIT}.annotations: the training split needs annotations")
    for name, files in splits.items():
        for file in filter(None, (files.questions, files.annotations)):
            if not file.is_file():
                raise InputError(f"{file}: no such file (split {name!r})")
    settings = {"image_size": image_size, "min_word_count": min_word_count, "answers": answers}
    wanted = provenance_of(splits, settings)
    if is_made(path, wanted, skip_bad_images):
        return
    with held(path.with_name(f".{path.name}.lock"), path):
        if is_made(path, wanted, skip_bad_images):  # another process has finished it since
            return
        partial = h5_file.partial_path(path)
        kept = h5_file.Store(path) if path.exists() else None
        with Decoding(image_size, processes) as decoding:
            decoded = None
            if partial.exists():
                check_same(partial, h5_file.read_provenance(partial), wanted)
                check_room(partial, partial.stat().st_size, _OTHER_DISK)
            else:
                decoded = _begin(partial, splits, wanted, decoding, kept)
            if kept is not None:
                _copy_images(kept, partial)
            bad = _mark_filled(partial, _go_on(partial, decoding) if decoded is None else decoded)
        if bad:
            _settle_bad_images(partial, bad, skip_bad_images)
        h5_file.finish(partial, path)
    print(f"{path}: complete, {path.stat().st_size / 1e6:.1f} MB{stand_ins_said(h5_file.Store(path))}")


def _copy_images(kept: h5_file.Store, partial: Path) -> None:
    """Copies the images of a finished file, whose rows are the first of the partial file, but for stand-ins."""
    count, splits = len(kept.usable), list(kept.provenance["sources"])
    with h5_file.opened_for_writing(partial) as file:
        place, filled = place_of_rows(file, "images/pixels"), file["images/filled"][:count]
        same = np.array_equal(file["images/id"][:count], kept.image_ids)
    if not same or list(h5_file.read_provenance(partial)["sources"])[: len(splits)] != splits:
        return  # begun before the finished file came here
    pending = np.flatnonzero(kept.usable & ~filled).tolist()
    damaged = _mark_filled(partial, copied_rows(h5_file.H5Images(kept.path), place, pending))
    if damaged:
        print(f"{kept.path}: {len(damaged)} image(s) are damaged and decoded again")


def _go_on(partial: Path, decoding: Decoding) -> Decoded:
    """Begins to decode the images whose rows are not filled."""
    with h5_file.opened_for_writing(partial) as file:
        names = file["images/file"].asstr()[:]
        stand_ins = np.flatnonzero(~file["images/usable"][:]).tolist()
        set_rows(file, "images/filled", stand_ins, [False] * len(stand_ins))  # they may be mended by now
        pending = np.flatnonzero(~file["images/filled"][:]).tolist()
        return decoding.begin(place_of_rows(file, "images/pixels"), [(row, names[row]) for row in pending])


def _begin(
    partial: Path,
    splits: Mapping[str, SplitFiles],
    wanted: Mapping[str, Any],
    decoding: Decoding,
    kept: h5_file.Store | None,
) -> Decoded | None:
    """Writes the tables; begins to decode meanwhile, unless there are images to be kept, which are copied first."""
    stored = [] if kept is None else list(kept.provenance["sources"])
    splits = {name: splits[name] for name in [*stored, *splits]}  # so that stored images keep their rows
    questions = {name: read_asked(files.questions) for name, files in splits.items()}
    files, ids, rows = _number_images(splits, questions)
    for name in splits:
        if name not in stored:
            check_any_exists((splits[name].image(image_id) for image_id in rows[name]), name)
    if kept is not None:
        if kept.provenance == wanted:
            _check_any_is_mended(kept, ids, files)
        print(f"{kept.path}: its {kept.usable.sum()} images are kept")
    for name, asked in questions.items():
        print(f"{name}: {len(asked)} questions about {len(rows[name])} images")
    settings = wanted["settings"]
    size = settings["image_size"]
    pixels = 3 * size**2 * len(ids)
    words = sum(46 + len(file) for file in files)
    words += sum(_BYTES_A_QUESTION + len(question.text) for asked in questions.values() for question in asked)
    print(f"{partial}: needs {shown(pixels + words)}, {shown(pixels)} of them for {len(ids)} images")
    check_room(partial, pixels + words, _OTHER_DISK)
    with h5_file.begun(partial, image_size=size, image_ids=ids, image_files=files) as (file, place):
        decoded = decoding.begin(place, list(enumerate(files))) if kept is None else None
        tables = _tables(splits, questions, rows, settings)
        sources = {name: wanted["sources"][name] for name in splits}
        h5_file.write_tables(file, provenance=wanted | {"sources": sources}, **tables)
    return decoded


def _check_any_is_mended(kept: h5_file.Store, ids: Sequence[int], files: Sequence[str]) -> None:
    """Refuses to make a file anew for images that are as bad as they were."""
    bad = []
    for row in np.flatnonzero(~kept.usable):
        try:
            decode_image(Path(files[row]), kept.image_size)
        except InputError as error:
            bad.append((ids[row], str(error)))
        else:
            return
    settle_bad_images(bad, skip=False)


def _tables(
    splits: Mapping[str, SplitFiles],
    questions: dict[str, list[Question]],
    rows: Mapping[str, Mapping[int, int]],
    settings: Mapping[str, int],
) -> dict[str, Any]:
    """The words, the answer classes and the table of each split: what `h5_file.write_tables` takes."""
    for name, files in splits.items():
        if files.annotations is not None:
            questions[name] = with_annotations(questions[name], files.questions, files.annotations)
    training = questions[TRAINING_SPLIT]
    tokenizer = train_tokenizer((question.text for question in training), settings["min_word_count"])
    if tokenizer.get_vocab_size() <= len((PAD, UNKNOWN)):
        raise InputError(
            f"data.min_word_count: no word occurs {settings['min_word_count']} times in the training questions"
        )
    for remark in remarks(list(chain.from_iterable(questions.values()))):
        print(remark)
    given = chain.from_iterable(question.answers for question in training)
    vocabulary = answer_vocabulary(given, settings["answers"])
    print(f"{tokenizer.get_vocab_size()} words and {len(vocabulary)} answers from split {TRAINING_SPLIT!r}")
    tables = {name: question_table(asked, rows[name], tokenizer, vocabulary) for name, asked in questions.items()}
    for name, table in tables.items():
        if (labels := table.labels()[table.given != NO_ANSWER]).size:
            print(f"{name}: {100 * (labels != NO_ANSWER).mean():.1f} % of the given answers are classes")
    return {"tokenizer": tokenizer, "vocabulary": vocabulary, "splits": tables}


def _number_images(
    splits: Mapping[str, SplitFiles], questions: Mapping[str, Sequence[Question]]
) -> tuple[list[str], list[int], dict[str, dict[int, int]]]:
    """Each image file once, in order of first use."""
    places: dict[str, int] = {}
    ids: list[int] = []
    rows: dict[str, dict[int, int]] = {}
    for name, asked in questions.items():
        rows[name] = {}
        for image_id in dict.fromkeys(question.image_id for question in asked):
            file = str(splits[name].image(image_id))
            if file not in places:
                places[file] = len(places)
                ids.append(image_id)
            rows[name][image_id] = places[file]
    return list(places), ids, rows


def _mark_filled(partial: Path, decoded: Decoded) -> dict[int, str]:
    """Marks the rows that are decoded or copied; returns what is wrong with those that cannot be, by row."""
    with h5_file.opened_for_writing(partial) as file:
        filled = file["images/filled"][:]
        bad: dict[int, str] = {}
        written: list[tuple[int, int]] = []
        try:
            for row, done in progress(decoded, len(filled), "images", done=int(filled.sum())):
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


def _settle_bad_images(partial: Path, bad: Mapping[int, str], skip: bool) -> None:
    with h5_file.opened_for_writing(partial) as file:
        ids, size = file["images/id"][:], file["images/pixels"].shape[1]
        if not skip:
            print(f"{partial}: keeps the other images")
        settle_bad_images([(ids[row], reason) for row, reason in bad.items()], skip)
        h5_file.fill_unusable(file, list(bad), stand_in(size))
