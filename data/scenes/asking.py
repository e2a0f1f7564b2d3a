"""How questions about synthetic scenes are asked: in rounds of one question of each kind."""

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice, permutations
from typing import Any, NamedTuple

import numpy as np

MAX_QUESTIONS = 10  # an image: every world can ask that many, and question id = image id * 10 + place


class SceneQuestion(NamedTuple):
    """A question and its answer, in the terms of the VQA files."""

    question_type: str
    answer_type: str
    text: str
    answer: str


Candidates = list[tuple[str, str, float]]  # subject, answer, and how much it is preferred to come first


class Kind(NamedTuple):
    """A kind of question, and what it can ask about the things in a scene."""

    question_type: str  # every wording begins with it, as in VQA
    answer_type: str
    wordings: tuple[str, ...]  # of the rest, around the subject
    candidates: Callable[[Any], Candidates]


def ask(kinds: Sequence[Kind], things: Any, rng: np.random.Generator, count: int) -> list[SceneQuestion]:
    """`count` (at most MAX_QUESTIONS) different questions: rounds of one of each kind, in random order.

    A kind that has nothing (more) to ask about the things leaves its turn to the others.
    """
    queues = [_spread(kind.candidates(things), rng) for kind in kinds]
    questions: list[SceneQuestion] = []
    while len(questions) < count:
        for place in rng.permutation(len(kinds)):
            kind = kinds[place]
            for subject, answer in islice(queues[place], 1):
                wording = kind.wordings[rng.integers(len(kind.wordings))]
                text = f"{kind.question_type} {wording.format(subject)}"
                questions.append(SceneQuestion(kind.question_type, kind.answer_type, text, answer))
    return questions[:count]


def _spread(candidates: Candidates, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """The candidates in random order; each comes first with a chance proportional to its weight."""
    order = np.argsort(rng.exponential(size=len(candidates)) / np.array([weight for *_, weight in candidates]))
    return (candidates[place][:2] for place in order)


def mixtures(things: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
    """Pairs (shape, colour) of a shape and a colour that both occur, but not together: of two things whose shapes could
    be exchanged for two new things. So neither shapes alone nor colours alone tell them from what is there.
    """
    return {
        (shape, colour)
        for (shape, hers), (his, colour) in permutations(things, 2)
        if shape != his and hers != colour and (shape, colour) not in things and (his, hers) not in things
    }


def existence(there: Collection[str], absent: Sequence[Collection[str]]) -> Candidates:
    """Whether something is there: "yes" as often as "no", and each kind of what is not there as often as the others."""
    kinds = [kind for kind in absent if kind]
    candidates = [(subject, "yes", len(kinds) / len(there)) for subject in there]
    return candidates + [(subject, "no", 1 / len(kind)) for kind in kinds for subject in kind]


def plural(shape: str) -> str:
    """More than one of a shape."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"
