"""How much of a set of questions can be answered without looking where it has to be looked."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable


def best_guess(asked: list[tuple], known: Callable[..., Hashable]) -> float:
    """How often the best answer to what is `known` is right, chosen on the very questions that it is scored on.

    Args:
        asked: pairs of what is shown and a question with its `answer`.
        known: of such a pair, what the answer may depend on.
    """
    answers = defaultdict(Counter)
    for shown, question in asked:
        answers[known(shown, question)][question.answer] += 1
    return sum(max(counts.values()) for counts in answers.values()) / len(asked)
