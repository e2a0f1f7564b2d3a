"""The official accuracy of a trained model on a split, and the file for the challenge server."""

import hashlib
import json
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import numpy as np

from data.bad_images import check_any_exists
from data.batches import FileImages, NoImages, QuestionDataset
from data.h5_file import H5Images, Store
from data.question_table import QuestionTable
from data.sources import number_images
from experiments.prepare import source_of, split_files
from experiments.process_group import joined_group, this_process
from experiments.tables import aligned
from experiments.tasks import TASKS
from experiments.training.loop import predict_classes
from vqa.io.errors import InputError, printable
from vqa.io.files import read_json, write_json, written_whole
from vqa.io.locks import held
from vqa.metrics import Scores
from vqa.saved_model import SavedModel, load_model
from vqa.saved_model.files import find_model, settings_file
from vqa.settings.recipes import load_saved
from vqa.settings.schema import DataSettings, Role, Settings, role_of
from vqa.text.answers import NO_ANSWER, normalise_answer
from vqa.text.tokenizer import special_ids

MOST_TYPES_SHOWN = 12  # question types in the table; the file has all of them

_OF_TRAINING = ("name", "data.processes", "train.checkpoint_every", "train.tensorboard")  # without effect on a model


def evaluate(
    run: Path,
    split: str,
    out: Path | None = None,
    overrides: Sequence[str] = (),
    *,
    allow_trained: bool = False,
    per_question: bool = False,
) -> Scores | None:
    """Scores a model on a split; writes `metrics_SPLIT.json` and `results_SPLIT.json` (the challenge server's format).

    The questions come from the h5 file of the model's settings or, if that does not hold them, from the raw files.
    Under torchrun the processes share the questions; files and scores are those of one process.

    Args:
        run: a run directory, or a `model/` directory.
        split: a split of the data.
        out: where the files are written; by default `run`.
        overrides: `key=value` words over the model's settings: where the data are, and the device.
        allow_trained: score a split that was trained on; the metrics are marked so.
        per_question: also write `accuracies_SPLIT.npz`: `ids` and `accuracies` (0 to 1), in order of the official ids;
            the metrics then name the `epoch` whose model was scored, and a digest of what was `asked`.

    Returns:
        The scores; None for a split without annotations, of which only the results are written.

    Raises:
        InputError: no model, no such split, no data, a split that was trained on, `out` holds another model or another
            process evaluates into it, or the disk is full.
    """
    folder, settings = find_settings(run, overrides)
    out = out or run
    if settings_file(out).exists() and out.resolve() not in (folder.resolve(), folder.parent.resolve()):
        raise InputError(f"{out}: holds another model, with results of its own; --out must name another directory")
    processes = this_process()
    device = processes.device(settings.device)
    with joined_group(processes, device), ExitStack() as stack:

        def prepare() -> tuple[SavedModel, QuestionDataset]:
            saved = load_model(folder, device)
            if _was_trained_on(saved, settings, split) and not allow_trained:
                raise InputError(
                    f"{run}: was trained on split {split!r}; --allow-trained scores it anyway and marks the metrics"
                )
            data = split_data(saved, settings, split)
            if processes.is_main:
                _warn_about_unknown_words(saved, data.table, split)
                _warn_about_other_data(out, split, saved.settings.data, settings.data, len(data.table))
                stack.enter_context(held(out / f".{split}.lock", f"{out}, split {split!r}"))
            return saved, data

        saved, data = processes.agreed(prepare)
        prepare_images, what = saved.preprocessing.normalise, f"{folder}: answering"
        classes = predict_classes(saved.model, data, settings, processes, prepare_images=prepare_images, what=what)
        answers = [saved.answers[class_] for class_ in classes]
        seen = _was_trained_on(saved, settings, split)
        return processes.on_main(lambda: _write_scores(out, split, saved, data.table, answers, per_question, seen))


def _was_trained_on(saved: SavedModel, settings: Settings, split: str) -> bool:
    """Whether a model was trained on a split, also under another name of the same file of questions."""
    trained, splits = saved.training.get("trained_on", []), settings.data.splits
    files = {files.questions for name, files in saved.settings.data.splits.items() if name in trained}
    return split in trained or (split in splits and splits[split].questions in files)


def _write_scores(
    out: Path,
    split: str,
    saved: SavedModel,
    table: QuestionTable,
    answers: Sequence[str],
    per_question: bool,
    seen: bool,
) -> Scores | None:
    """Writes the files of `evaluate`, the metrics last: once they exist, so does the rest."""
    results = [{"question_id": id_, "answer": text} for id_, text in zip(table.ids.tolist(), answers, strict=True)]
    write_json(out / f"results_{split}.json", results, indent=None)
    if not table.given.size:
        return None
    task, training = TASKS[saved.settings.task], saved.training
    of_questions = task.accuracies(answers, table)
    if per_question:
        order = np.argsort(table.ids)
        with written_whole(out / f"accuracies_{split}.npz") as aside, aside.open("wb") as file:
            np.savez_compressed(file, ids=table.ids[order], accuracies=np.asarray(of_questions)[order])
    scores = task.summary(of_questions, table, saved.categories)
    metrics: dict[str, Any] = {"split": split, "trained_on": training.get("trained_on", []), **scores}
    if per_question:
        metrics |= {"epoch": training.get("epoch"), "asked": _digest_of(table)}
    if seen:
        metrics["seen_in_training"] = True
    write_json(out / f"metrics_{split}.json", metrics)
    return scores


def _digest_of(table: QuestionTable) -> str:
    """The first 12 digits of a SHA-256 of the questions and the answers given to them, in order of the ids."""
    rows = np.argsort(table.ids).tolist()
    asked = [(int(table.ids[row]), table.texts[row], table.answers(row)) for row in rows]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]


def find_settings(run: Path, overrides: Sequence[str]) -> tuple[Path, Settings]:
    """The model directory of a run, and its settings with `key=value` words over them.

    Raises:
        InputError: there is no model, or a word would change what it is.
    """
    for word in overrides:
        key = word.partition("=")[0]
        if key in _OF_TRAINING or role_of(key) not in (Role.COMPUTING, Role.DATA, Role.SKIPPING, Role.SCORING):
            raise InputError(
                f"command line: {word}: a trained model cannot be changed; only where the data are, "
                "data.skip_bad_images, device, precision, workers and train.batch_size can be given"
            )
    folder = find_model(run)
    return folder, load_saved(settings_file(folder), overrides)


def split_data(saved: SavedModel, settings: Settings, split: str) -> QuestionDataset:
    """The questions of a split with their images, in the words of the model's tokenizer.

    Raises:
        InputError: there are neither an h5 file nor raw files, or they are not of the model's image size; or other raw
            files are named, but no other h5 file.
    """
    h5, size = Path(settings.data.h5), saved.preprocessing.size
    store = Store(h5) if h5.exists() else None
    if store is not None and (split in store.splits or split not in settings.data.splits):
        table, asked, own = TASKS[settings.task].table(store, settings, split), settings.data, saved.settings.data
        if _same_place(asked.h5, own.h5) and not _same_files(asked, own, split):
            raise InputError(
                f"{h5}: is there and holds split {split!r}, so that nothing is read from {asked.folder}; name another "
                "data.h5 too (one that is absent, to read the raw files)"
            )
        if store.image_size != size:
            raise InputError(f"{h5}: holds images of {store.image_size} px, the model needs {size}")
        if store.categories != saved.categories:
            raise InputError(f"{h5}: its categories of objects are not those of the model")
        if store.tokenizer.to_str() != saved.tokenizer.to_str():
            table = table.encoded_with(saved.tokenizer)
        if stand_ins := store.stand_ins([split]):
            print(f"{h5}: {stand_ins} image(s) of split {split!r} were missing or unreadable: stand-ins are used")
        return QuestionDataset(table, H5Images(h5) if settings.views else NoImages())
    if split not in settings.data.splits:
        raise InputError(
            f"{saved.folder}: its settings have no split {split!r}, but {', '.join(settings.data.splits) or 'none'}"
        )
    files = split_files(settings)[split]
    if not files.questions.exists():
        raise InputError(
            f"{files.questions}: no such file, and no {h5}; say where the data are with data.h5=… or data.folder=…"
        )
    source = source_of(settings, settings.views or ["crop"], saved.categories)
    questions, rows = source.read(files), {}
    images = number_images(source.images(files, questions), rows)
    table = source.table(questions, images, saved.tokenizer, saved.answers)
    if not settings.views:
        return QuestionDataset(table, NoImages())
    check_any_exists((Path(image.file) for image in rows), split)
    return QuestionDataset(table, FileImages(list(rows), size))


def _same_files(one: DataSettings, other: DataSettings, split: str) -> bool:
    """Whether two settings name the same raw files of a split."""
    return _same_place(one.folder, other.folder) and one.splits.get(split) == other.splits.get(split)


def _same_place(one: str, other: str) -> bool:
    """Whether two paths lead to the same place, however they are written."""
    return Path(one).resolve() == Path(other).resolve()


def _warn_about_unknown_words(saved: SavedModel, table: QuestionTable, split: str) -> None:
    """Warns of questions without a known word, and of questions without an answer in the vocabulary."""
    of_words = ~np.isin(table.tokens, special_ids(saved.tokenizer))
    known = np.logical_or.reduceat(of_words, table.offsets)  # whether a word of each question is
    if unknown := int((~known).sum()):
        print(f"split {split!r}: all words of {unknown} of {len(table)} questions are unknown to the model")
    known_answers = {normalise_answer(answer) for answer in saved.answers}
    given = [normalise_answer(table.spellings[place]) for place in np.unique(table.given) if place != NO_ANSWER]
    if given and known_answers.isdisjoint(given):
        print(f"split {split!r}: none of the given answers is among the model's {len(saved.answers)} answers")


def _warn_about_other_data(out: Path, split: str, own: DataSettings, used: DataSettings, questions: int) -> None:
    """Says so where the scores in a run directory are replaced by those of other data than the run's own: by their
    settings, or (paths are relative) by the number of questions.
    """
    file = out / f"metrics_{split}.json"
    if split not in own.splits or not file.exists() or not (out / "config.yaml").exists():
        return
    same = _same_place(used.h5, own.h5) and _same_files(used, own, split)
    before: Any = None
    with suppress(InputError):  # damaged: it is replaced
        before = read_json(file)
    if not same or not isinstance(before, dict) or before.get("questions") != questions:
        print(f"{file}: replaced by that of other data than the run's own; another --out keeps both")


def scores_table(scores: Scores) -> str:
    """The scores as a small table for a terminal; question types only where they are few."""
    rows = [("overall", scores["overall"]), *scores["per_answer_type"].items()]
    if "error" in scores:
        rows.insert(1, ("error", scores["error"]))
    if len(scores["per_question_type"]) <= MOST_TYPES_SHOWN:
        rows += [(f"  {kind}", value) for kind, value in scores["per_question_type"].items()]
    return aligned([[printable(name), f"{value:6.2f} %"] for name, value in rows])  # the types are texts of the data
