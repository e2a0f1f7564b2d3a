"""How far features keep kinds of questions apart: a number for it, and its figure's points.

Both are computed by one thread: the sums of several come in any order, and t-SNE makes much of the last bit.

Legend: N pairs of an image and a question, C channels.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.question_table import QuestionTable
from vqa.text.answers import answer_vocabulary, normalise_answer

FOLDS = 5
NEIGHBOURS = 15
PERPLEXITY = 30

_COLOUR = re.compile(
    "black|white|gray|grey|silver|red|maroon|pink|orange|brown|tan|beige|gold|yellow|green|teal|turquoise|cyan|blue|navy|"
    "purple|violet|lavender"
)


class Separation(NamedTuple):
    """How well the nearest neighbours tell a pair's class."""

    accuracy: float  # 0 to 1
    chance: float  # 0 to 1, share of the most common class
    classes: int
    pairs: int  # counted: those of the other classes are too few
    neighbours: int


def main_answers(table: QuestionTable) -> list[str]:
    """The answer that most annotators gave to each question, in its most common spelling."""
    return [(answer_vocabulary(table.answers(row), 1) or [""])[0] for row in range(len(table))]


def is_colour(answer: str) -> bool:
    """Whether an answer is a colour or several, as `black and white`."""
    words = [word for word in normalise_answer(answer).split() if word != "and"]
    return bool(words) and all(map(_COLOUR.fullmatch, words))


def labellings(table: QuestionTable) -> dict[str, list[str]]:
    """The classes of each question by name of the labelling: `answer type`, `question type` and `colour`."""
    colours = ["a colour" if is_colour(answer) else "no colour" for answer in main_answers(table)]
    return {"answer type": table.answer_types, "question type": table.question_types, "colour": colours}


def neighbour_accuracy(features: np.ndarray, labels: Sequence[str], images: np.ndarray, seed: int) -> Separation | None:
    """Accuracy of the nearest neighbours' majority (Euclidean, standardised channels), cross-validated in five folds.

    All pairs of an image are in one fold: else a pair's nearest neighbours are the other questions about its image,
    whose features are equal where the questions do not reach the network.

    Args:
        features: [N, C].
        labels: the class of each pair; a class with pairs of fewer images than folds is left out.
        images: int [N], the image of each pair.
        seed: of the folds.

    Returns:
        None where fewer than two classes are left.
    """
    from sklearn.model_selection import StratifiedGroupKFold
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    names, classes = np.unique(np.asarray(labels), return_inverse=True)
    enough = [name for name in range(len(names)) if len(np.unique(images[classes == name])) >= FOLDS]
    if len(enough) < 2:
        return None
    kept = np.isin(classes, enough)
    features, classes = features[kept], classes[kept]
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    folds = list(splitter.split(features, classes, images[kept]))
    neighbours = min(NEIGHBOURS, *(len(train) for train, _ in folds))
    right = 0
    with threadpool_limits(1):
        for train, test in folds:
            classifier = make_pipeline(StandardScaler(), KNeighborsClassifier(neighbours))
            classifier.fit(features[train], classes[train])
            right += int((classifier.predict(features[test]) == classes[test]).sum())
    chance = np.bincount(classes).max() / len(classes)
    return Separation(right / len(classes), float(chance), len(enough), len(classes), neighbours)


def project(features: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE (van der Maaten and Hinton 2008) of features [N, C], standardised by channel → [N, 2].

    The perplexity is PERPLEXITY, less where there are fewer than three pairs to each of so many neighbours.
    """
    from sklearn.manifold import TSNE
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    if not np.ptp(features, axis=0).any():  # a network that says the same of everything: there are no directions
        return np.zeros((len(features), 2), np.float32)
    standardised = StandardScaler().fit_transform(features)
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    with threadpool_limits(1):
        return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(standardised)
