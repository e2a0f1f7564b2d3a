"""Questions to word ids: a word-level `tokenizers` tokenizer in one `tokenizer.json`.

Padding is id 0 and an unknown word id 1, two different words for the model (the LSTM never reads padding).
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

from vqa.io.errors import InputError
from vqa.io.files import read_text, write_text

PAD, UNKNOWN = "<pad>", "<unk>"
PAD_ID, UNKNOWN_ID = 0, 1
LONGEST = 10_000  # characters of a text; a batch is as wide as its longest question
# A word is letters and digits with their combining marks (\p{M}) and joiners (U+200C, U+200D); it keeps its inner
# apostrophes ("what's"). Any other character that is not white space is a word of its own, with its combining marks.
_LETTERS = r"[\p{L}\p{N}][\p{L}\p{N}\p{M}\x{200C}\x{200D}]*"
_WORD = rf"{_LETTERS}(?:['’]{_LETTERS})*|[^\s\p{{L}}\p{{N}}]\p{{M}}*"
# Of files and models made before, which keep it: it cuts words at combining marks.
_OLDER_WORD = r"[\p{L}\p{N}]+(?:['’][\p{L}\p{N}]+)*|[^\s\p{L}\p{N}]"


def train_tokenizer(questions: Iterable[str], min_count: int) -> Tokenizer:
    """A tokenizer whose vocabulary is every word that `questions` hold at least `min_count` times.

    It is the one that a `WordLevelTrainer` makes, which would look at each question and not at each of its pieces once.
    """
    tokenizer = _tokenizer_of([])
    counts: Counter[str] = Counter()
    for piece, count in Counter(piece for question in questions for piece in _pieces(question)).items():
        for word in words(tokenizer, piece):
            counts[word] += count
    common = sorted((-count, word) for word, count in counts.items() if count >= min_count)
    return _tokenizer_of([word for _, word in common])


def _tokenizer_of(vocabulary: Sequence[str], pattern: str = _WORD) -> Tokenizer:
    ids = {word: place for place, word in enumerate([PAD, UNKNOWN, *vocabulary])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    tokenizer.add_special_tokens([PAD, UNKNOWN])
    return tokenizer


def words(tokenizer: Tokenizer, question: str) -> list[str]:
    """The words the tokenizer sees in a question, unknown ones as they are written."""
    normal = tokenizer.normalizer.normalize_str(question)
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]


def encode(tokenizer: Tokenizer, questions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Word ids of all questions, one after the other, and their lengths: int32 [sum of T], int32 [N].

    A question without any word becomes one unknown word, since the LSTM needs one. "<pad>" in a question is text.
    """
    tokenizer.encode_special_tokens = True  # as text; tokenizer.json cannot say it
    pieces = list(dict.fromkeys(piece for question in questions for piece in _pieces(question)))
    known: dict[str, list[int]] = {}
    slice_ = 10_000  # encodings are large objects: a slice at a time keeps memory flat
    for start in range(0, len(pieces), slice_):
        some = pieces[start : start + slice_]
        known |= {piece: found.ids for piece, found in zip(some, tokenizer.encode_batch(some), strict=True)}
    ids = array("i")
    lengths = np.empty(len(questions), np.int32)
    for place, question in enumerate(questions):
        before = len(ids)
        for piece in _pieces(question):
            ids.extend(known[piece])
        if len(ids) == before:
            ids.append(UNKNOWN_ID)
        lengths[place] = len(ids) - before
    return np.array(ids, np.int32), lengths


def _pieces(question: str) -> list[str]:
    """What stands between blanks: a word holds none, so that a piece can be looked at alone, and once."""
    return question.split(" ")


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes `tokenizer.json`, and the small file with which `transformers` loads it from the same folder."""
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": PAD, "unk_token": UNKNOWN}
    config["split_special_tokens"] = True
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=1) + "\n")


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer in `folder`. Raises InputError if there is none, and as `read_tokenizer`."""
    file = folder / "tokenizer.json"
    return read_tokenizer(read_text(file), file)


def read_tokenizer(text: str, file: Path) -> Tokenizer:
    """The tokenizer that a text of `file` describes.

    Raises:
        InputError: it cannot be read, its words are not numbered as ours, or it finds words in another way: `encode`
            looks at each piece alone, and a regular expression from elsewhere may be made to take for ever. (A file
            made before keeps the older pattern.)
    """
    try:
        tokenizer = Tokenizer.from_str(text)
    except Exception as error:  # `tokenizers` raises plain Exception on malformed files
        raise InputError(f"{file}: cannot be read as a tokenizer: {error!s:.120}") from None
    ids = tokenizer.get_vocab()
    if sorted(ids.values()) != list(range(len(ids))) or (ids.get(PAD), ids.get(UNKNOWN)) != (PAD_ID, UNKNOWN_ID):
        raise InputError(f"{file}: words must be numbered from 0 without gaps, first {PAD} and {UNKNOWN}")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    ours = [_but_for_its_words(_tokenizer_of([], pattern)) for pattern in (_WORD, _OLDER_WORD)]
    if _but_for_its_words(tokenizer) not in ours:
        raise InputError(f"{file}: is not a tokenizer of this program: it finds words in another way")
    return tokenizer


def _but_for_its_words(tokenizer: Tokenizer) -> dict[str, Any]:
    content = json.loads(tokenizer.to_str())
    content["model"].pop("vocab", None)
    return content


def unusable(text: str) -> str:
    """Why a question, an answer or a type cannot be used; empty if it can."""
    if len(text) > LONGEST:
        return f"longer than {LONGEST} characters"
    if text.isprintable():
        return ""
    if "\0" in text:
        return "with a null character, which an h5 file cannot hold"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "not UTF-8 text (it holds half a surrogate pair)"
    return ""
