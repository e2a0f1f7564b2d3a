"""Confidence intervals of a difference: paired bootstrap over questions, Student's t over seeds.

Letters: N questions, K distinct values, S seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
FEWEST_SEEDS = 3  # for an interval over seeds: with two, Student's t has one degree of freedom
INTERVAL = (2.5, 97.5)  # percentiles
_SEED = 20170703


class Answered(NamedTuple):
    """The accuracy of one training on each question."""

    ids: np.ndarray  # [N] question ids, each once
    accuracies: np.ndarray  # [N] 0 to 1


@dataclass(frozen=True)
class Difference:
    """One row minus another, in points, over the questions that all their trainings were tested on."""

    points: float
    low: float  # of the 95 % interval over questions
    high: float
    questions: int
    per_seed: dict[int, float]  # of the seeds that both have

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation over seeds; None with fewer than two."""
        return mean_and_deviation(list(self.per_seed.values()))[1] if self.per_seed else None

    @property
    def seeds_above(self) -> int:
        """The number of seeds in which the first row is above the second."""
        return sum(points > 0 for points in self.per_seed.values())

    @property
    def seed_interval(self) -> tuple[float, float] | None:
        """`seed_interval` of the differences of the seeds that both rows have."""
        return seed_interval(list(self.per_seed.values()))

    @property
    def verdict(self) -> str:
        """Whether the intervals over questions and over seeds support that the first row is above the second."""
        if self.seed_interval is None:
            return "too few seeds"
        intervals = [(self.low, self.high), self.seed_interval]
        if all(low > 0 for low, _ in intervals):
            return "holds"
        return "reversed" if all(high < 0 for _, high in intervals) else "inconclusive"


def compare(ours: Mapping[int, Answered], theirs: Mapping[int, Answered]) -> Difference | None:
    """Compare two rows, each given by seed, question by question; None if they have no question in common.

    Only seeds that both have count, so that the difference, its deviation and its intervals are of the same trainings;
    where they have none in common, all of them.

    The bootstrap resamples questions for fixed trainings; `per_seed` shows the variance between seeds.
    """
    if both := sorted(ours.keys() & theirs.keys()):
        ours, theirs = ({seed: row[seed] for seed in both} for row in (ours, theirs))
    common = reduce(np.intersect1d, [answered.ids for answered in (*ours.values(), *theirs.values())])
    if not common.size:
        return None
    our, their = ({seed: _of(common, answered) for seed, answered in row.items()} for row in (ours, theirs))
    differences = np.mean(list(our.values()), axis=0) - np.mean(list(their.values()), axis=0)
    low, high = bootstrap_interval(differences)
    return Difference(
        points=100 * float(differences.mean()),
        low=100 * low,
        high=100 * high,
        questions=common.size,
        # rounded, so that a tie is 0 in whatever order its questions are added
        per_seed={seed: round(100 * float((our[seed] - their[seed]).mean()), 9) for seed in both},
    )


def _of(ids: np.ndarray, answered: Answered) -> np.ndarray:
    """The accuracies of the questions `ids`, in their sorted order."""
    return answered.accuracies[np.intersect1d(answered.ids, ids, return_indices=True)[1]]


def bootstrap_interval(values: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of the mean of `values` [N].

    How often each of the K distinct values is drawn when N values are drawn with replacement is multinomial: the same
    bootstrap, in K numbers per resample instead of N. The official metric has the values 0, 0.3, 0.6, 0.9 and 1, so
    that means of five seeds differ by one of 101 values, however many questions there are.
    """
    # rounded, so that sums of the same accuracies in another order are the same value
    distinct, counts = np.unique(np.round(values, 9), return_counts=True)
    # RandomState, because numpy keeps its draws; those of a Generator changed with numpy 2.5
    drawn = np.random.RandomState(_SEED).multinomial(values.size, counts / values.size, size=RESAMPLES)
    low, high = np.percentile(drawn @ distinct / values.size, INTERVAL)
    return float(low), float(high)


def seed_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of one difference a seed (Student's t); None with fewer than three seeds."""
    if len(differences) < FEWEST_SEEDS:
        return None
    from scipy import stats

    mean, half = np.mean(differences), stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return float(mean - half), float(mean + half)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean over S seeds and the sample standard deviation, which one seed does not have."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
