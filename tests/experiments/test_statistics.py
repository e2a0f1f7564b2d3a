"""Intervals against what is known of them: the normal approximation, how often they cover, and what has none."""

import numpy as np
import pytest

from experiments.report.statistics import Answered, bootstrap_interval, compare, mean_and_deviation, seed_interval

OFFICIAL = np.array([0, 0.3, 0.6, 0.9, 1])


def answered(accuracies, first=0):
    return Answered(np.arange(first, first + len(accuracies)), np.asarray(accuracies, float))


def drawn(rng, questions, shares=(0.4, 0.1, 0.1, 0.1, 0.3)):
    return rng.choice(OFFICIAL, questions, p=shares)


def test_many_questions_are_as_the_normal_approximation_says_and_take_seconds():
    rng = np.random.default_rng(0)
    ours = {seed: answered(drawn(rng, 121_512, (0.35, 0.1, 0.1, 0.1, 0.35))) for seed in range(5)}
    theirs = {seed: answered(drawn(rng, 121_512)) for seed in range(5)}
    differences = np.mean([ours[seed].accuracies - theirs[seed].accuracies for seed in ours], 0)
    error = differences.std() / 121_512**0.5
    found = compare(ours, theirs)
    assert found.points == pytest.approx(100 * differences.mean())
    assert found.low == pytest.approx(100 * (differences.mean() - 1.96 * error), abs=5 * error)
    assert found.high == pytest.approx(100 * (differences.mean() + 1.96 * error), abs=5 * error)
    assert found.verdict == "holds"
    assert found.questions == 121_512


def test_few_questions_are_as_all_their_resamples():
    """Three questions: of the 27 resamples 1 has the mean −1 and 1 the mean 1, 3.7 % each, so the interval is whole."""
    assert bootstrap_interval(np.array([-1.0, 0.0, 1.0])) == (-1, 1)
    # six of a hundred: the binomial distribution of their count has its percentiles 2.5 and 97.5 at 2 and 11
    assert bootstrap_interval(np.repeat([1.0, 0.0], [6, 94])) == pytest.approx((0.02, 0.11), abs=1e-9)


def test_many_distinct_values():
    values = np.random.default_rng(0).normal(0.5, 1, 1000)
    error = values.std() / 1000**0.5
    low, high = bootstrap_interval(values)
    assert (low, high) == pytest.approx((values.mean() - 1.96 * error, values.mean() + 1.96 * error), abs=0.1 * error)


def test_pairing_takes_the_questions_difficulty_out():
    """Ours is right where theirs is, and 0.3 better on every tenth question: unpaired that would drown in the rest."""
    theirs = np.repeat([0.0, 0.6], 500)
    ours = theirs + np.where(np.arange(1000) % 10 == 0, 0.3, 0)
    found = compare({1: answered(ours)}, {1: Answered(np.arange(1000)[::-1], theirs[::-1])})
    assert found.points == pytest.approx(3)
    deviation = 0.3 * (0.1 * 0.9 / 1000) ** 0.5
    assert found.low == pytest.approx(3 - 196 * deviation, abs=0.1)
    assert found.high == pytest.approx(3 + 196 * deviation, abs=0.1)


def test_identical_rows_differ_by_exactly_nothing():
    """Also if their seeds are added in another order."""
    rng = np.random.default_rng(0)
    seeds = {seed: answered(drawn(rng, 999)) for seed in range(3)}
    found = compare(seeds, dict(reversed(seeds.items())))
    assert (found.low, found.high, found.verdict, found.seeds_above) == (0, 0, "inconclusive", 0)
    assert found.points == pytest.approx(0, abs=1e-9)
    assert found.deviation == 0


def test_a_tie_is_a_tie_whatever_the_order_of_its_questions():
    """0.6 − 0.3 + 0.3 − 0.9 + 0.9 − 0.6 is not 0 in floating point in every order."""
    values = np.array([0.3, 0.9, 0.6] * 7)
    for shift in (1, 2):
        found = compare(*({seed: answered(np.roll(values, part)) for seed in (1, 2, 3)} for part in (0, shift)))
        assert (set(found.per_seed.values()), found.seeds_above, found.verdict) == ({0}, 0, "inconclusive")


def test_sign():
    better, worse = ({n: answered(row) for n in (1, 2, 3)} for row in ([1, 1, 0.9, 1], [0, 0.3, 0.3, 0]))
    assert compare(better, worse).verdict == "holds"
    found = compare(worse, better)
    assert found.verdict == "reversed"
    assert found.points == pytest.approx(-82.5)
    assert found.low <= found.points <= found.high < 0


def test_ninety_five_of_a_hundred_intervals_cover_the_truth(monkeypatch):
    monkeypatch.setattr("experiments.report.statistics.RESAMPLES", 2_000)
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        sample = drawn(rng, 300) - drawn(rng, 300, (0.5, 0.1, 0.1, 0.1, 0.2))
        truth = (0.18 + 0.3) - (0.18 + 0.2)
        low, high = bootstrap_interval(sample)
        covered += low <= truth <= high
    assert 0.9 < covered / 200 < 0.99  # three standard errors are 0.046


def test_only_questions_that_all_were_asked_are_compared():
    ours = {1: answered([1, 1, 0, 0], first=10), 2: answered([0, 0, 0, 1], first=9)}
    theirs = {1: Answered(np.array([12, 11, 10]), np.array([0.3, 0, 1.0])), 3: answered([1, 1, 1], first=10)}
    found = compare(ours, theirs)
    assert found.questions == 3
    # seed 1, the only one that both have; question 10: 1 − 1; 11: 1 − 0; 12: 0 − 0.3
    assert found.points == pytest.approx(100 * (0 + 1 - 0.3) / 3)
    assert found.per_seed == {1: pytest.approx(100 * (0 + 1 - 0.3) / 3)}
    assert found.deviation is None
    assert compare({2: ours[2]}, theirs).per_seed == {}
    assert compare(ours, {1: answered([1, 1], first=100)}) is None


def test_spread_over_seeds():
    found = compare({n: answered([n / 10] * 4) for n in (1, 2, 3)}, {n: answered([0.2] * 4) for n in (1, 2, 3, 4)})
    assert found.per_seed == pytest.approx({1: -10, 2: 0, 3: 10})
    assert (found.deviation, found.seeds_above) == (pytest.approx(10), 1)
    # a seed that one of them lacks moves neither the difference nor its intervals
    ours, theirs = ({n: answered([n * share] * 4) for n in (1, 2, 3)} for share in (0.2, 0.1))
    more = compare(ours, theirs | {4: answered([0.9] * 4)})
    assert (more.points, more.seed_interval) == (pytest.approx(20), compare(ours, theirs).seed_interval)
    assert mean_and_deviation([1, 2, 4]) == (pytest.approx(7 / 3), pytest.approx((7 / 3) ** 0.5))
    assert mean_and_deviation([5]) == (5, None)


# t(0.975, S − 1) for S seeds, from a table
STUDENTS = {3: 4.302653, 4: 3.182446, 5: 2.776445, 6: 2.570582, 7: 2.446912, 8: 2.364624, 9: 2.306004, 10: 2.262157}


@pytest.mark.parametrize("seeds", [1, 2, *STUDENTS])
def test_the_interval_over_a_number_of_seeds(seeds):
    differences = [n * n for n in range(seeds)]
    found = seed_interval(differences)
    if seeds not in STUDENTS:
        assert found is None
        return
    mean = sum(differences) / seeds
    error = (sum((n - mean) ** 2 for n in differences) / (seeds - 1) / seeds) ** 0.5
    assert found == pytest.approx((mean - STUDENTS[seeds] * error, mean + STUDENTS[seeds] * error), abs=1e-4)


def test_the_verdict_needs_both_intervals_and_three_seeds():
    ids = np.arange(100)
    theirs = {seed: Answered(ids, np.zeros(100)) for seed in (1, 2, 3)}
    ours = {seed: Answered(ids, (ids < right).astype(float)) for seed, right in ((1, 10), (2, 20), (3, 60))}
    found = compare(ours, theirs)
    assert found.seed_interval == pytest.approx(seed_interval([10, 20, 60]))
    assert found.low > 0
    assert found.verdict == "inconclusive"  # the seeds differ too much
    two = compare({1: ours[1], 2: ours[2]}, {1: theirs[1], 2: theirs[2]})
    assert two.seed_interval is None
    assert (two.low > 0, two.verdict) == (True, "too few seeds")
