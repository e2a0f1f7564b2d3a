"""Questions and answers distributed as those of VQA, in words that mean nothing: for measuring, not for learning."""

from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np

WORDS, PHRASES, NUMBERS = 16_000, 60_000, 400  # words of questions; answers of type other; and of type number

# Official question types by the answer type that most of their questions have.
_BEGINNINGS = {
    "yes/no": (
        "is the",
        "is this",
        "is this a",
        "are the",
        "is there a",
        "does the",
        "are there",
        "is it",
        "do",
        "can",
    ),
    "number": ("how many", "how many people are", "what number is", "how many people are in"),
    "other": (
        "what is the",
        "what color is the",
        "what",
        "what kind of",
        "where is the",
        "what is on the",
        "which",
        "why",
    ),
}
_SHARES = {"yes/no": 0.38, "number": 0.12, "other": 0.5}
_AGREEMENT = {"yes/no": 0.88, "number": 0.72, "other": 0.55}  # annotators who give a question's own answer
_SYLLABLES = tuple(first + vowel for first in "bdfgklmnprstvz" for vowel in "aeiou")
_DIGITS_IN_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class Asked(NamedTuple):
    """One question as people asked and answered it."""

    text: str
    question_type: str
    answer_type: str
    answers: list[str]  # ten, as written


def asked(count: int, rng: np.random.Generator) -> Iterator[Asked]:
    """So many questions: a few words are in most of them and thousands in one or two (Zipf's law), and so with answers.

    Some answers are written otherwise than others mean them ("Two", "a dog.", "DOG"), as annotators do.
    """
    kinds = list(_SHARES)
    of_kind = rng.choice(len(kinds), count, p=list(_SHARES.values()))
    words = _by_rank(WORDS, 1.0, 2.7, rng, int(2.2 * count) + 10)
    fillers = 1 + np.minimum(rng.poisson(1.2, count), 20)
    ends = np.cumsum(fillers) % (len(words) - 21)  # begins again where the words are used up
    own = np.empty(count, np.int64)
    others = np.empty((count, 10), np.int64)
    for number, kind in enumerate(kinds):
        rows = np.flatnonzero(of_kind == number)
        drawn = _answer_ranks(kind, rng, 11 * len(rows)).reshape(-1, 11)
        own[rows], others[rows] = drawn[:, 0], drawn[:, 1:]
    agreement = np.array([_AGREEMENT[kind] for kind in kinds])[of_kind]
    given = np.where(rng.random((count, 10)) < agreement[:, None], own[:, None], others)
    ways = np.where(rng.random((count, 10)) < 0.03, rng.integers(1, 4, (count, 10)), 0)
    beginnings = rng.integers(0, 1 << 30, count)
    for row in range(count):
        kind = kinds[of_kind[row]]
        beginning = _BEGINNINGS[kind][beginnings[row] % len(_BEGINNINGS[kind])]
        filler = " ".join(map(_word, words[ends[row] : ends[row] + fillers[row]].tolist()))
        answers = [_written(kind, *pair) for pair in zip(given[row].tolist(), ways[row].tolist(), strict=True)]
        yield Asked(f"{beginning.capitalize()} {filler}?", beginning, kind, answers)


def most_common(answers: list[str]) -> str:
    """What most annotators wrote; of several the first."""
    return Counter(answers).most_common(1)[0][0]


def _answer_ranks(kind: str, rng: np.random.Generator, count: int) -> np.ndarray:
    if kind == "yes/no":
        return rng.choice(3, count, p=[0.58, 0.41, 0.01])
    if kind == "number":
        return _by_rank(NUMBERS, 1.6, 1.0, rng, count)
    return _by_rank(PHRASES, 1.1, 2.0, rng, count)


def _by_rank(size: int, exponent: float, shift: float, rng: np.random.Generator, count: int) -> np.ndarray:
    """Ranks drawn by Zipf's law as Mandelbrot wrote it: in proportion to (rank + shift) ** -exponent."""
    weights = np.cumsum((np.arange(size) + shift) ** -exponent)
    return np.searchsorted(weights, rng.random(count) * weights[-1])


@cache
def _word(rank: int) -> str:
    """A word for each rank, all different; the commonest are the shortest."""
    word = ""
    while rank >= 0:
        rank, place = divmod(rank, len(_SYLLABLES))
        word, rank = word + _SYLLABLES[place], rank - 1
    return word


@cache
def _written(kind: str, rank: int, way: int) -> str:
    """The answer of a rank: plain, or with a capital, an article or a period (the official normal form is the same)."""
    if kind == "yes/no":
        plain = ("yes", "no", "not sure")[rank]
    elif kind == "number":
        plain = str(rank) if way != 2 or rank >= len(_DIGITS_IN_WORDS) else _DIGITS_IN_WORDS[rank]
    else:  # one word, or two: a rarer one before a common one
        plain = _word(rank) if rank < 4_000 else f"{_word(rank // 40)} {_word(rank % 40)}"
    return {0: plain, 1: plain.capitalize(), 2: plain if kind == "number" else f"a {plain}", 3: f"{plain}."}[way]
