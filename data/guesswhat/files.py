"""Read `guesswhat.{train,valid,test}.jsonl.gz`, or the same unpacked, a game a line and one line at a time."""

import codecs
import gzip
import reprlib
import zlib
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from data.vqa_files import Id, check_texts
from vqa.io.errors import InputError
from vqa.tasks.objects import Box, check_box

_LONGEST_LINE = 2**24  # bytes; a game has some thousands
_LONGEST_NAME = 255  # bytes of a file's name
_GZIP = b"\x1f\x8b"

_Side = Annotated[int, msgspec.Meta(ge=1, le=2**16)]
_Status = Literal["success", "failure", "incomplete"]
_Answer = Literal["Yes", "No", "N/A"]


# Entries of the official files; other fields are ignored.
class _Picture(msgspec.Struct, gc=False):
    width: _Side
    height: _Side
    file_name: str


class _Object(msgspec.Struct, gc=False):
    category: str
    category_id: Id
    bbox: Box


class _Asked(msgspec.Struct, gc=False):
    id: Id
    q: str
    a: _Answer


class Game(msgspec.Struct):
    """A game: questions about the object `object_id`."""

    dialogue_id: Id
    status: _Status
    picture_id: Id
    picture: _Picture
    object_id: Id
    objects: dict[Id, _Object]
    qas: list[_Asked]


# The same games, as the authors' later code names their fields.
class _Image(_Picture):
    id: Id


class _ListedObject(_Object):
    id: Id


class _LaterAsked(msgspec.Struct, gc=False):
    id: Id
    q: str = msgspec.field(name="question")
    a: _Answer = msgspec.field(name="answer")


class _LaterGame(msgspec.Struct):
    id: Id
    status: _Status
    image: _Image
    object_id: Id
    objects: list[_ListedObject]
    qas: list[_LaterAsked]


class _Named(msgspec.Struct):
    dialogue_id: Any = msgspec.UNSET
    id: Any = msgspec.UNSET


def read_games(file: Path, status: Collection[str]) -> Iterator[tuple[str, Game]]:
    """Yield the games of some status that have a question, each with its place for messages: file, line and game.

    Each game lists the object that it asks about, whose box is within the image; its texts can be used, and the file
    name of its image names no folder.

    Raises:
        InputError: a line is malformed, the file is truncated, or a game of one of these status lacks one of the above.
    """
    for number, line in _lines(file):
        place = f"{file}: line {number}"
        try:
            game = _decoded(line)
            place += f", game {game.dialogue_id}"
            if game.status not in status or not game.qas:
                continue
            _check(game)
        except msgspec.ValidationError as error:
            with suppress(Exception):
                named = msgspec.json.decode(line, type=_Named)
                found = named.id if named.dialogue_id is msgspec.UNSET else named.dialogue_id
                place += f", game {found}" if isinstance(found, int) else ""
            raise InputError(f"{place}: not a game of GuessWhat?!: {error}") from None
        except RecursionError:
            raise InputError(f"{place}: nested too deeply") from None
        except msgspec.DecodeError as error:
            raise InputError(f"{place}: {error}") from None
        except ValueError as error:  # of `_check`, or bytes that are no UTF-8
            said = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error
            raise InputError(f"{place}: {said}") from None
        yield place, game


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers."""
    number = 0
    with file.open("rb") as raw:
        try:
            stream = gzip.GzipFile(fileobj=raw) if raw.peek(2).startswith(_GZIP) else raw
            while line := stream.readline(_LONGEST_LINE + 1):
                number += 1
                if len(line) > _LONGEST_LINE:
                    raise InputError(f"{file}: line {number}: longer than {_LONGEST_LINE} bytes; needs a game per line")
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if not line.isspace():
                    yield number, line
        except (EOFError, OSError, zlib.error) as error:
            raise InputError(f"{file}: line {number + 1}: truncated or damaged ({error!s:.100})") from None


def _decoded(line: bytes) -> Game:
    try:
        return msgspec.json.decode(line, type=Game)
    except msgspec.ValidationError:
        named = msgspec.json.decode(line, type=_Named)
        if named.dialogue_id is not msgspec.UNSET or named.id is msgspec.UNSET:
            raise
    later = msgspec.json.decode(line, type=_LaterGame)
    objects = {listed.id: listed for listed in later.objects}
    return Game(later.id, later.status, later.image.id, later.image, later.object_id, objects, later.qas)


def _check(game: Game) -> None:
    """Raise ValueError if a game is wrong (see `read_games`)."""
    if game.object_id not in game.objects:
        raise ValueError(f"object_id {game.object_id} is not among its objects")
    name = game.picture.file_name
    check_texts((name, *(found.category for found in game.objects.values()), *(asked.q for asked in game.qas)))
    if not all(found.category.strip() for found in game.objects.values()):
        raise ValueError("holds an object without the name of its category")
    if name in ("", ".", "..") or "/" in name or "\\" in name or len(name.encode()) > _LONGEST_NAME:
        raise ValueError(f"file_name {reprlib.repr(name)} is not the name of a file without its folder")
    check_box(game.objects[game.object_id].bbox, game.picture.width, game.picture.height)
