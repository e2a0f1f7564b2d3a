"""The official normal form of answers, and the vocabulary of answers that a model predicts."""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

NO_ANSWER = -1  # padding of a question's answers, and the class of an answer outside the vocabulary
NOT_GIVEN = -2  # padding of a question's classes, where others were given more answers

_TABLES = json.loads(Path(__file__).with_name("answer_normalisation.json").read_text(encoding="utf-8"))
_CONTRACTIONS: dict[str, str] = _TABLES["contractions"]
_NUMBERS: dict[str, str] = _TABLES["numbers"]
_ARTICLES = frozenset(_TABLES["articles"])
_PUNCTUATION: list[str] = _TABLES["punctuation"]
_COMMA_IN_NUMBER = re.compile(_TABLES["comma_pattern"])
_PERIOD = re.compile(_TABLES["period_pattern"])
# The official code passes a flag as the number of replacements of `re.sub`.
_MOST_PERIODS = int(re.UNICODE)


def strip_answer(answer: str) -> str:
    """Remove line breaks, tabs and outer blanks, as the official evaluator does before anything else."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(maxsize=1 << 16)
def normalise_answer(answer: str) -> str:
    """Return the official evaluator's normal form: punctuation, number words, articles and contractions.

    It equals the official code on every answer, quirks included: punctuation that touches a blank is dropped and other
    punctuation becomes a blank (all of it is dropped if digits surround a comma); at most 32 periods are dropped, those
    that are not followed by a digit.
    """
    text = answer = strip_answer(answer)
    has_number = _COMMA_IN_NUMBER.search(answer) is not None
    for mark in _PUNCTUATION:
        dropped = has_number or f"{mark} " in answer or f" {mark}" in answer
        text = text.replace(mark, "" if dropped else " ")
    text = _PERIOD.sub("", text, count=_MOST_PERIODS)
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def answer_vocabulary(answers: Iterable[str], size: int) -> list[str]:
    """Return the `size` most common answers, most common first (ties in alphabetical order).

    Answers with the same normal form are one class, written in its most common spelling, because the official evaluator
    compares the spelling itself where all annotators agree.
    """
    spellings: dict[str, Counter[str]] = defaultdict(Counter)
    for answer, count in Counter(answers).items():
        if spelling := strip_answer(answer):
            spellings[normalise_answer(answer)][spelling] += count
    ranked = sorted(spellings.items(), key=lambda item: (-item[1].total(), item[0]))
    return [min(counts.items(), key=lambda item: (-item[1], item[0]))[0] for _, counts in ranked[:size]]
