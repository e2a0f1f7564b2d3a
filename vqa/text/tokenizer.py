"""Questions to word ids: a word-level tokenizer of the `tokenizers` library, stored as `tokenizer.json`.

Padding (id 0) and an unknown word (id 1) are different words for the model; the LSTM never reads padding. The
tokenizer of a text encoder is another, of any kind.
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import WordLevel

from vqa.io.errors import InputError
from vqa.io.files import read_json, read_text, write_text

PAD, UNKNOWN = "<pad>", "<unk>"
PAD_ID, UNKNOWN_ID = 0, 1
LONGEST = 10_000  # characters of a text: a batch is as wide as its longest question
# A word is letters and digits with their combining marks (\p{M}), joiners (U+200C, U+200D) and inner apostrophes
# ("what's"). Any other character that is not white space is a word by itself, with its combining marks.
_LETTERS = r"[\p{L}\p{N}][\p{L}\p{N}\p{M}\x{200C}\x{200D}]*"
_WORD = rf"{_LETTERS}(?:['’]{_LETTERS})*|[^\s\p{{L}}\p{{N}}]\p{{M}}*"
_SPLIT = pre_tokenizers.Split(Regex(_WORD), behavior="removed", invert=True)


def train_tokenizer(questions: Iterable[str], min_count: int) -> Tokenizer:
    """Make the tokenizer whose vocabulary is every word that occurs at least `min_count` times in `questions`.

    It equals that of a `WordLevelTrainer`, in a quarter of its time: each distinct piece between blanks is split once.
    """
    tokenizer = _tokenizer_of([])
    counts: Counter[str] = Counter()
    for piece, count in Counter(piece for question in questions for piece in question.split(" ")).items():
        for word in words(tokenizer, piece):
            counts[word] += count
    common = sorted((-count, word) for word, count in counts.items() if count >= min_count)
    return _tokenizer_of([word for _, word in common])


def _tokenizer_of(vocabulary: Sequence[str]) -> Tokenizer:
    ids = {word: id_ for id_, word in enumerate([PAD, UNKNOWN, *vocabulary])}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = _SPLIT
    tokenizer.add_special_tokens([PAD, UNKNOWN])
    return tokenizer


def _is_ours(tokenizer: Tokenizer) -> bool:
    """Whether it splits words as this program does, and puts nothing around them."""
    splits = tokenizer.pre_tokenizer is not None and tokenizer.pre_tokenizer.__getstate__()
    return splits == _SPLIT.__getstate__() and tokenizer.post_processor is None


def words(tokenizer: Tokenizer, question: str) -> list[str]:
    """Return the words of a question, unknown ones included, as this program's tokenizer splits them."""
    tokenizer = tokenizer if _is_ours(tokenizer) else _tokenizer_of([])
    normal = tokenizer.normalizer.normalize_str(question)
    return [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(normal)]


def encode(tokenizer: Tokenizer, questions: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the word ids of all questions, concatenated, and their lengths: int32 [sum of lengths], int32 [N].

    A question without any word becomes one unknown word, since the LSTM needs one. "<pad>" in a question is text.
    """
    tokenizer.encode_special_tokens = True  # as text; tokenizer.json cannot hold this option
    ours = _is_ours(tokenizer)

    def parts(question: str) -> list[str]:
        # none of our words holds a blank: to encode each distinct piece between blanks once takes a third of the time
        return question.split(" ") if ours else [question]

    distinct = {part for question in questions for part in parts(question)}
    ids_of = {part: tokenizer.encode(part).ids for part in distinct}  # one by one: together they would be padded
    encoded = [[id_ for part in parts(question) for id_ in ids_of[part]] or [UNKNOWN_ID] for question in questions]
    lengths = np.fromiter(map(len, encoded), np.int32, len(encoded))
    return np.fromiter(chain.from_iterable(encoded), np.int32, lengths.sum()), lengths


def special_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the ids that are not words: padding, unknown words, and what a text encoder puts around a question."""
    return [id_ for id_, token in tokenizer.get_added_tokens_decoder().items() if token.special]


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write `tokenizer.json`, and the file with which `transformers` loads it."""
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **transformers_options(tokenizer)}
    write_text(folder / "tokenizer_config.json", json.dumps(config, indent=1) + "\n")


def transformers_options(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what `PreTrainedTokenizerFast` needs in addition to `tokenizer.json`."""
    if _is_ours(tokenizer):
        return {"pad_token": PAD, "unk_token": UNKNOWN, "split_special_tokens": True}
    longest, pad = tokenizer.truncation["max_length"], tokenizer.padding["pad_token"]
    return {"pad_token": pad, "model_max_length": longest, "split_special_tokens": True}


def load_tokenizer(folder: Path, *, ours: bool = True) -> Tokenizer:
    """Load the tokenizer of a folder; one that is not `ours` may be of any kind.

    Raises:
        InputError: a file is missing, and as `read_tokenizer`.
    """
    file, options = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if ours:
        return read_tokenizer(read_text(file), file)
    tokenizer, named = _parsed(read_text(file), file), read_json(options)
    try:  # `transformers` writes into tokenizer.json how it was called last: another length, no padding
        pad, longest = named["pad_token"], named["model_max_length"]
        tokenizer.enable_padding(pad_id=tokenizer.token_to_id(pad), pad_token=pad)
        tokenizer.enable_truncation(min(longest, LONGEST))
    except (KeyError, TypeError, OverflowError):
        raise InputError(f"{options}: must name a pad_token of {file.name} and a model_max_length") from None
    return tokenizer


def _parsed(text: str, file: Path) -> Tokenizer:
    try:
        return Tokenizer.from_str(text)
    except Exception as error:  # `tokenizers` raises plain Exception on malformed files
        raise InputError(f"{file}: cannot be read as a tokenizer: {error!s:.120}") from None


def read_tokenizer(text: str, file: Path) -> Tokenizer:
    """Read the text of a `tokenizer.json` that came from `file`.

    Raises:
        InputError: it cannot be read, its words are not numbered as ours, or it splits words in another way: `encode`
            relies on ours, and a foreign regular expression may take forever.
    """
    tokenizer = _parsed(text, file)
    ids = tokenizer.get_vocab()
    if sorted(ids.values()) != list(range(len(ids))) or (ids.get(PAD), ids.get(UNKNOWN)) != (PAD_ID, UNKNOWN_ID):
        raise InputError(f"{file}: words must be numbered from 0 without gaps, first {PAD} and {UNKNOWN}")
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.post_processor = None  # `transformers` saves one that changes nothing
    if _without_vocabulary(tokenizer) != _without_vocabulary(_tokenizer_of([])):
        raise InputError(f"{file}: is not a tokenizer of this program: it splits words in another way")
    return tokenizer


def _without_vocabulary(tokenizer: Tokenizer) -> dict[str, Any]:
    content = json.loads(tokenizer.to_str())
    content["model"].pop("vocab", None)
    return content


def unusable(text: str) -> str:
    """Return why a question, an answer or a type cannot be used; empty if it can."""
    if len(text) > LONGEST:
        return f"longer than {LONGEST} characters"
    if text.isprintable():
        return ""
    if "\0" in text:
        return "not usable: it holds a null character, which an h5 file cannot store"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "not UTF-8 text (it holds half a surrogate pair)"
    return ""
