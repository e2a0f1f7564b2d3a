"""Ask questions about synthetic scenes in rounds of one question of each kind."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice, permutations, product
from typing import Any, NamedTuple

import numpy as np

MAX_QUESTIONS = 10  # about an image; every world has as many, and question id = image id * 10 + index


class SceneQuestion(NamedTuple):
    """A question and its answer, with the fields of the VQA files."""

    question_type: str
    answer_type: str
    text: str
    answer: str


Pair = tuple[str, str]  # shape, colour
Candidates = list[tuple[str, str, float]]  # subject, answer, weight: the chance to come first is proportional to it


class Kind(NamedTuple):
    """A kind of question; `candidates` lists what it can ask about the objects of a scene."""

    question_type: str  # the first words of every question of the kind, as in VQA
    answer_type: str
    wordings: tuple[str, ...]  # the rest, around the subject
    candidates: Callable[[Any], Candidates]


def ask(kinds: Sequence[Kind], objects: Any, rng: np.random.Generator, count: int) -> list[SceneQuestion]:
    """Ask `count` (at most MAX_QUESTIONS) different questions: rounds of one of each kind, in random order.

    A kind without (more) candidates is skipped.
    """
    queues = [_shuffled(kind.candidates(objects), rng) for kind in kinds]
    questions: list[SceneQuestion] = []
    while len(questions) < count:
        for index in rng.permutation(len(kinds)):
            kind = kinds[index]
            for subject, answer in islice(queues[index], 1):
                wording = kind.wordings[rng.integers(len(kind.wordings))]
                text = f"{kind.question_type} {wording.format(subject)}"
                questions.append(SceneQuestion(kind.question_type, kind.answer_type, text, answer))
    return questions[:count]


def _shuffled(candidates: Candidates, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    order = np.argsort(rng.exponential(size=len(candidates)) / np.array([weight for *_, weight in candidates]))
    return (candidates[index][:2] for index in order)


def mixtures(pairs: Sequence[Pair]) -> set[Pair]:
    """Return the new pairs that exchanging the shapes of two of `pairs` would make, where both are new.

    Neither shapes alone nor colours alone show that they are absent.
    """
    return {
        (shape, colour)
        for (shape, colour_of_first), (shape_of_second, colour) in permutations(pairs, 2)
        if (shape, colour) not in pairs and (shape_of_second, colour_of_first) not in pairs
    }


def pair_kinds(pairs: Sequence[Pair], shapes: Iterable[str], colours: Iterable[str]) -> list[list[Pair]]:
    """Return the pairs that are present and three kinds that are absent, each sorted: mixtures, pairs of a missing
    colour, pairs of a missing shape.

    Mixtures need shape and colour together; the other two make the question learnable step by step.
    """
    shapes_there, colours_there = map(set, zip(*pairs, strict=True))
    kinds = (
        set(pairs),
        mixtures(pairs),
        set(product(shapes_there, set(colours) - colours_there)),
        set(product(set(shapes) - shapes_there, colours_there)),
    )
    return [sorted(kind) for kind in kinds]


def existence(there: Sequence[str], *absent: Sequence[str]) -> Candidates:
    """Return yes/no candidates, both answers equally likely, and so are all kinds of absent subjects.

    Return none where only one answer would be possible.
    """
    kinds = [kind for kind in absent if kind]
    if not there or not kinds:
        return []
    yes = [(subject, "yes", 0.5 / len(there)) for subject in there]
    return yes + [(subject, "no", 0.5 / len(kinds) / len(kind)) for kind in kinds for subject in kind]


def counts(values: Iterable[str], subjects: Mapping[str, str], weights: Sequence[float]) -> Candidates:
    """Return how often each of `subjects`' values occurs; those that occur n times share the weight `weights[n]`."""
    number = Counter(values)
    alike = Counter(number[value] for value in subjects)
    return [
        (subject, str(number[value]), weights[number[value]] / alike[number[value]])
        for value, subject in subjects.items()
    ]


def plural(shape: str) -> str:
    """Return the plural of a shape's name."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


def with_article(*words: str) -> str:
    """Return the words behind a or an."""
    return " ".join(("an" if words[0][0] in "aeiou" else "a", *words))
