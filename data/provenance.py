"""The provenance of an h5 file, which decides whether it is complete, its images are kept, or it is refused.

A provenance is plain data: {"settings": {…}, "sources": {SPLIT: {"images": …, "files": [{name, bytes, sha256}, …]}}}.
Its settings name `vocabulary_from` where that is not `train` alone: older files lack the key.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data import h5_file
from data.vqa_files import SplitFiles
from vqa.io.errors import InputError

TRAINING_SPLIT = "train"
_OF_TABLES = ("min_word_count", "answers", "vocabulary_from")  # settings that change no image


def provenance_of(
    splits: Mapping[str, SplitFiles], settings: Mapping[str, int], vocabulary_from: Sequence[str]
) -> dict[str, Any]:
    """The provenance of an h5 file of these raw files; reads them for their hashes."""
    sources = {}
    for name, files in splits.items():
        sources[name] = {"images": "/".join(Path(files.within or files.images).parts[-2:]), "files": []}
        for file in filter(None, (files.questions, files.annotations)):
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            sources[name]["files"].append({"name": file.name, "bytes": file.stat().st_size, "sha256": digest})
    named = {} if list(vocabulary_from) == [TRAINING_SPLIT] else {"vocabulary_from": list(vocabulary_from)}
    return {"settings": {**settings, **named}, "sources": sources}


def settings_of(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a file was made with, `vocabulary_from` included."""
    return {"vocabulary_from": [TRAINING_SPLIT], **provenance["settings"]}


def is_made(path: Path, wanted: Mapping[str, Any], skip_bad_images: bool) -> bool:
    """Whether the file is finished; prints so if it is.

    Raises:
        InputError: the file exists and its images cannot be kept.
    """
    if not path.exists():
        return False
    made, partial = h5_file.Store(path), h5_file.partial_path(path)
    _check_images(path, made.provenance, wanted)
    done = made.provenance == wanted
    if done and not made.usable.all():
        mending = partial.exists() and h5_file.read_provenance(partial) == wanted
        done = skip_bad_images and not mending
    if done:
        print(f"{path}: complete, nothing to do{stand_ins_note(made)}")
    return done


def stand_ins_note(made: h5_file.Store) -> str:
    """The end of a line about a file: how many of its images are stand-ins."""
    if made.usable.all():
        return ""
    count = f"; {(~made.usable).sum()} of its {len(made.usable)} images were missing or unreadable: "
    return count + "stand-ins replace them until they are repaired and data.skip_bad_images is false"


def check_same(partial: Path, begun: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise InputError if a partial file was begun from other sources or with other settings."""
    _check_images(partial, begun, wanted)
    now = settings_of(wanted)
    others = [f"data.{key}={value}" for key, value in settings_of(begun).items() if now.get(key) != value]
    others += [f"no split {name!r}" for name in wanted["sources"] if name not in begun["sources"]]
    if others:
        raise InputError(
            f"{partial}: begun with {' and '.join(others)}; finish it with these first (its images are then kept), "
            "name another data.h5 or remove it"
        )


def _check_images(path: Path, made: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise InputError if a file, finished or partial, holds other images or other questions about them."""
    before, now = made["settings"], wanted["settings"]
    for key in before | now:
        if key not in _OF_TABLES and before.get(key) != now.get(key):
            raise InputError(
                f"{path}: made with {key} {before.get(key)}, now {now.get(key)}; name another data.h5 or remove it"
            )
    for name, source in made["sources"].items():
        if name not in wanted["sources"]:
            raise InputError(
                f"{path}: holds a split {name!r}; name it in data.splits, name another data.h5 or remove it"
            )
        if source != wanted["sources"][name]:
            raise InputError(f"{path}: split {name!r} was made from other files; name another data.h5 or remove it")
