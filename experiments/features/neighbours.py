"""k-NN accuracy and t-SNE of features, both by one thread: sums of several threads differ in the last bit, which t-SNE
amplifies.

Legend: N pairs of an image and a question, C channels.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from sklearn.manifold import TSNE
from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits

from data.question_table import QuestionTable
from vqa.text.answers import answer_vocabulary, normalise_answer

FOLDS = 5
NEIGHBOURS = 15
PERPLEXITY = 30

_COLOUR = re.compile(
    "black|white|gray|grey|silver|red|maroon|pink|orange|brown|tan|beige|gold|yellow|green|teal|turquoise|cyan|blue|navy|"
    "purple|violet|lavender"
)


def main_answers(table: QuestionTable) -> list[str]:
    """The most common answer to each question, in its most common spelling."""
    return [(answer_vocabulary(table.answers(row), 1) or [""])[0] for row in range(len(table))]


def is_colour(answer: str) -> bool:
    """Whether an answer consists of colours, as `black and white`."""
    words = [word for word in normalise_answer(answer).split() if word != "and"]
    return bool(words) and all(map(_COLOUR.fullmatch, words))


def labellings(table: QuestionTable) -> dict[str, list[str]]:
    """The class of each question in three labellings: `answer type`, `question type` and `colour`."""
    colours = ["a colour" if is_colour(answer) else "no colour" for answer in main_answers(table)]
    return {"answer type": table.answer_types, "question type": table.question_types, "colour": colours}


def neighbour_accuracy(
    features: np.ndarray, labels: Sequence[str], images: np.ndarray, seed: int
) -> dict[str, Any] | None:
    """Cross-validate a k-nearest-neighbour classifier (Euclidean, standardised channels) in five folds.

    All pairs of an image are in one fold: otherwise the nearest neighbours of a pair are the other questions about its
    image, whose features are equal where the questions do not reach the network.

    Args:
        features: [N, C].
        labels: the class of each pair; a class with pairs of fewer images than folds is skipped.
        images: int [N], the image of each pair, or [N, 2], a crop and the whole image: then the whole one counts.
        seed: of the folds.

    Returns:
        `accuracy` and `chance` (the share of the most common class) in percent, and the numbers of `classes`, `pairs`
        (without those of skipped classes) and `neighbours`; None if fewer than two classes remain.
    """
    images = images.reshape(len(images), -1)[:, -1]
    names, classes = np.unique(np.asarray(labels), return_inverse=True)
    enough = [name for name in range(len(names)) if len(np.unique(images[classes == name])) >= FOLDS]
    if len(enough) < 2:
        return None
    kept = np.isin(classes, enough)
    features, classes = features[kept], classes[kept]
    splitter = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    folds = list(splitter.split(features, classes, images[kept]))
    neighbours = min(NEIGHBOURS, *(len(train) for train, _ in folds))
    classifier = make_pipeline(StandardScaler(), KNeighborsClassifier(neighbours))
    with threadpool_limits(1):
        accuracy = np.mean(cross_val_predict(classifier, features, classes, cv=folds) == classes)
    return {
        "accuracy": round(100 * float(accuracy), 2),
        "chance": round(100 * float(np.bincount(classes).max() / len(classes)), 2),
        "classes": len(enough),
        "pairs": len(classes),
        "neighbours": neighbours,
    }


def project(features: np.ndarray, seed: int) -> np.ndarray:
    """t-SNE (van der Maaten and Hinton 2008) of features [N, C], standardised by channel → [N, 2].

    The perplexity is PERPLEXITY, or a third of the number of pairs if that is less.
    """
    if not np.ptp(features, axis=0).any():  # all features are equal: there are no directions
        return np.zeros((len(features), 2), np.float32)
    standardised = StandardScaler().fit_transform(features)
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    with threadpool_limits(1):
        return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(standardised)
