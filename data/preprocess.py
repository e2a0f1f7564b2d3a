"""Raw questions, annotations and images to one h5 file.

1. a finished file made from the same sources (by their hashes) and settings is left alone;
2. read the questions of every split, from which the images are known;
3. begin a file and, in several processes, to decode and resize the images into it;
4. meanwhile, read the annotations, and write questions and answers into the file, which is `NAME.h5.partial` from then
   on; words and answer classes come from the split `train` only;
5. mark what is decoded; list the images that are missing or unreadable, and finish, or stop and keep the work done.

A run that finds the partial file decodes what is missing and does step 5.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from data import store
from data.answers import answer_vocabulary
from data.decoding import Decoding
from data.errors import InputError
from data.images import IMAGENET_MEAN
from data.locks import held
from data.progress import progress
from data.rows import place_of_rows
from data.space import check_room, shown
from data.table import NO_ANSWER, question_table
from data.tokenizer import PAD, UNKNOWN, train_tokenizer
from data.vqa_files import Question, SplitFiles, read_asked, remarks, with_annotations

TRAINING_SPLIT = "train"
_IMAGES_A_FLUSH = 256
_OTHER_DISK = "name another data.h5 or a smaller data.image_size"
_LISTED = 20  # bad images said one by one
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
    if path.exists():
        _check_same(path, store.Store(path).provenance, _provenance(splits, settings))
        print(f"{path}: complete, nothing to do")
        return
    with held(path.with_name(f".{path.name}.lock"), path):
        if path.exists():  # another process has finished it since
            return
        partial = store.partial_path(path)
        with Decoding(image_size, processes) as decoding:
            if partial.exists():
                _check_same(partial, store.read_provenance(partial), _provenance(splits, settings))
                decoded = _go_on(partial, decoding)
            else:
                decoded = _begin(partial, splits, settings, decoding)
            bad = _mark_decoded(partial, decoded)
        if bad:
            _settle_bad_images(partial, bad, image_size, skip_bad_images)
        store.finish(partial, path)
    print(f"{path}: complete, {path.stat().st_size / 1e6:.1f} MB")


def _provenance(splits: Mapping[str, SplitFiles], settings: Mapping[str, int]) -> dict[str, Any]:
    sources = {}
    for name, files in splits.items():
        # without the folder, which may move
        sources[name] = {"images": "/".join(Path(files.images).parts[-2:]), "files": []}
        for file in filter(None, (files.questions, files.annotations)):
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            sources[name]["files"].append({"name": file.name, "bytes": file.stat().st_size, "sha256": digest})
    return {"settings": dict(settings), "sources": sources}


def _check_same(path: Path, made: Mapping[str, Any], provenance: Mapping[str, Any]) -> None:
    """Refuses to touch a file, finished or begun, that was made from other sources or with other settings."""
    for key, value in provenance["settings"].items():
        if made["settings"].get(key) != value:
            raise InputError(
                f"{path}: made with {key} {made['settings'].get(key)}, now {value}; name another data.h5 or remove it"
            )
    for name in made["sources"].keys() | provenance["sources"].keys():
        if made["sources"].get(name) != provenance["sources"].get(name):
            raise InputError(f"{path}: split {name!r} was made from other files; name another data.h5 or remove it")


def _go_on(partial: Path, decoding: Decoding) -> Decoded:
    """Begins to decode the images whose rows are not filled."""
    with store.opened_for_writing(partial) as file:
        check_room(partial, file.id.get_filesize(), _OTHER_DISK)
        names = file["images/file"].asstr()[:]
        pending = np.flatnonzero(~file["images/filled"][:]).tolist()
        return decoding.begin(place_of_rows(file, "images/pixels"), [(row, names[row]) for row in pending])


def _begin(partial: Path, splits: Mapping[str, SplitFiles], settings: Mapping[str, int], decoding: Decoding) -> Decoded:
    """Begins to decode, and writes the tables meanwhile."""
    questions = {name: read_asked(files.questions) for name, files in splits.items()}
    files, ids, rows = _number_images(splits, questions)
    for name, asked in questions.items():
        print(f"{name}: {len(asked)} questions about {len(rows[name])} images")
    size = settings["image_size"]
    pixels = 3 * size**2 * len(ids)
    words = sum(46 + len(file) for file in files)
    words += sum(_BYTES_A_QUESTION + len(question.text) for asked in questions.values() for question in asked)
    print(f"{partial}: needs {shown(pixels + words)}, {shown(pixels)} of them for {len(ids)} images")
    check_room(partial, pixels + words, _OTHER_DISK)
    with store.begun(partial, image_size=size, image_ids=ids, image_files=files) as (file, place):
        decoded = decoding.begin(place, list(enumerate(files)))
        tables = _tables(splits, questions, rows, settings)
        store.write_tables(file, provenance=_provenance(splits, settings), **tables)
    return decoded


def _tables(
    splits: Mapping[str, SplitFiles],
    questions: dict[str, list[Question]],
    rows: Mapping[str, Mapping[int, int]],
    settings: Mapping[str, int],
) -> dict[str, Any]:
    """The words, the answer classes and the table of each split: what `store.write_tables` takes."""
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
    """Each image file once, in order of first use; refuses a split of which not one image exists."""
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
        if not any(splits[name].image(image_id).exists() for image_id in rows[name]):
            first = splits[name].image(next(iter(rows[name])))
            raise InputError(
                f"{first}: no such file, nor any other image of split {name!r}; see data.splits.{name}.images"
            )
    return list(places), ids, rows


def _mark_decoded(partial: Path, decoded: Decoded) -> dict[int, str]:
    """Marks the rows that are decoded; returns what is wrong with those that cannot be, by row."""
    with store.opened_for_writing(partial) as file:
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
                    store.mark(file, written)
                    written = []
        finally:  # also when a signal ends it
            store.mark(file, written)
    return bad


def _settle_bad_images(partial: Path, bad: Mapping[int, str], image_size: int, skip: bool) -> None:
    with store.opened_for_writing(partial) as file:
        ids = file["images/id"][:]
        print(f"{len(bad)} image(s) missing or unreadable:")
        for row, reason in islice(bad.items(), _LISTED):
            print(f"  {ids[row]}: {reason}")
        if len(bad) > _LISTED:
            print(f"  and {len(bad) - _LISTED} more")
        if not skip:
            listed = ", ".join(str(ids[row]) for row in islice(bad, 5)) + (", …" if len(bad) > 5 else "")
            raise InputError(
                f"{len(bad)} image(s) missing or unreadable, by id: {listed}; mend them, or go on without them with "
                "data.skip_bad_images=true (the other images are kept)"
            )
        neutral = np.full((image_size, image_size, 3), np.round(255 * np.array(IMAGENET_MEAN)), np.uint8)
        store.fill_unusable(file, list(bad), neutral)
