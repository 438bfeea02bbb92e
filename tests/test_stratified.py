"""The test by captions among pictures with equally many copies: against brute force, a published example, and simulated truth."""

import itertools

import numpy as np
import pytest

from eval import stratified
from eval.captionunits import exact_p_value
from eval.captionunits import stratified as caption_strata
from eval.stratified import Outcomes, Stratum, strata
from eval.wording import beyond_caption


@pytest.mark.parametrize(
    "shape", [[(2, 3, 1, 2)], [(3, 2, 2, 1), (2, 3, 1, 1), (4, 0, 3, 0)], [(1, 4, 1, 0), (3, 3, 2, 1)]]
)
def test_the_stratified_p_value_counts_all_permutations_within_strata(shape):
    """Brute force: every way to put the units of every stratum on the sides, all equally likely. (n, n held out, S = 1 of either)."""
    parts, ways = [], []
    for kind, (n, m, own, other) in enumerate(shape):
        parts.append(Stratum(kind, n, own, m, other))
        pool = np.r_[np.arange(n) < own, np.arange(m) < other]
        ways.append([pool[list(chosen)].sum() for chosen in itertools.combinations(range(n + m), n)])
    totals = np.array([sum(each) for each in itertools.product(*ways)])
    assert stratified.p_value(parts) == pytest.approx(
        np.mean(totals >= sum(part.training_own for part in parts)), rel=1e-12
    )


def test_a_published_example_of_the_stratified_test():
    """Penicillin and rabbits (Agresti 1990, pages 231 to 237): R's mantelhaen.test(exact=TRUE) has p = 0.020 one-sided."""
    cured = [
        (6, 0, 5, 0),
        (6, 3, 6, 0),
        (6, 6, 6, 2),
        (6, 5, 6, 6),
        (2, 2, 5, 5),
    ]  # at once: all, cured; later: all, cured
    assert round(stratified.p_value([Stratum(level, *row) for level, row in enumerate(cured)]), 3) == 0.020


def test_one_stratum_is_fishers_test_and_strata_of_one_side_say_nothing():
    random = np.random.default_rng(0)
    for _ in range(20):
        training, heldout = random.random(random.integers(1, 40)) < 0.5, random.random(random.integers(1, 40)) < 0.3
        one = Stratum(1, len(training), int(training.sum()), len(heldout), int(heldout.sum()))
        alone = [Stratum(40, 8, 8, 0, 0), Stratum(3, 0, 0, 5, 2)]
        assert stratified.p_value([one]) == pytest.approx(exact_p_value(training, heldout), rel=1e-9)
        assert stratified.p_value([one, *alone]) == stratified.p_value([one])
    assert stratified.p_value(alone) is None


def sides_of(random, copies, chance, training: int, asked: int, learnt: float = 0.0) -> list[Outcomes]:
    """Units put on the sides at random, of each side the ``asked`` most copied ones: S = 1 by chance[copies], and of training units
    with the probability ``learnt`` too."""
    order = random.permutation(len(copies))
    found = []
    for rows, share in ((order[:training], learnt), (order[training:], 0.0)):
        rows = rows[np.argsort(-copies[rows], kind="stable")][:asked]
        own = (random.random(len(rows)) < chance[copies[rows]]) | (random.random(len(rows)) < share)
        found.append(Outcomes(own, copies[rows]))
    return found


def rejected(found: list[list[Outcomes]]) -> tuple[float, float]:
    """Share of p-values up to 0.05: of Fisher's test, of the stratified one (without one: not rejected)."""
    fisher = [exact_p_value(training.own, heldout.own) for training, heldout in found]
    parts = [stratified.p_value(strata(*sides)) for sides in found]
    return np.mean(np.array(fisher) <= 0.05), np.mean([value is not None and value <= 0.05 for value in parts])


def test_pictures_that_are_copied_and_easy_to_draw_accuse_nobody_by_the_stratified_test():
    """A model that knows captions alone, and draws often copied pictures (logos) from them more easily. 400 training units, 80 held out:
    the 40 prompts of either side are not alike in copies."""
    random, limit = np.random.default_rng(1), 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)
    chance = np.array([0, 0.1, 0.5, 0.9])
    copies = np.repeat([1, 2, 3], [380, 60, 40])
    fisher, within = rejected([sides_of(random, copies, chance, 400, 40) for _ in range(400)])
    assert fisher > 0.5 and within <= limit
    fisher, within = rejected([sides_of(random, copies, chance, 400, 40, learnt=0.7) for _ in range(100)])
    assert within > 0.3  # and memory is still found
    alike = [sides_of(random, copies, chance, 240, 240) for _ in range(400)]  # all captions of both sides
    assert max(rejected(alike)) <= limit


def test_copies_that_were_planted_afterwards_leave_fishers_test_exact():
    """Eight of 80 training units are repeated 40 times, whichever they are: asked first, without counterpart."""
    random, found = np.random.default_rng(2), {0.0: [], 0.9: []}
    for learnt, runs in found.items():
        for _ in range(400):
            base = sides_of(random, np.ones(160, dtype=np.int64), np.array([0, 0.3]), 80, 80)
            planted = Outcomes(
                base[0].own[:40] | (np.arange(40) < 8) & (random.random(40) < learnt), np.repeat([40, 1], [8, 32])
            )
            runs.append([planted, Outcomes(base[1].own[:40], base[1].kind[:40])])
    limit = 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)
    assert max(rejected(found[0.0])) <= limit
    fisher, within = rejected(found[0.9])
    assert fisher > 0.15 > limit >= within  # the stratified test knows nothing of the planted ones
    report = caption_strata(strata(*found[0.9][0]), None)
    assert report["without_counterpart"] == {"tested": 8, "own": int(found[0.9][0][0].own[:8].sum())}


def test_where_the_rule_on_both_p_values_does_not_keep_the_level():
    """Often copied pictures are easy to draw, and eight others were planted: one of these that comes back leaves all to Fisher's test.
    The title of a report says so (`tests.test_captioncontrol`); asking all captions of both sides mends it."""
    random, chance, rates = np.random.default_rng(3), np.array([0, 0.1, 0.5, 0.9]), {}
    for asked in (40, 480):
        found = []
        for _ in range(200):
            natural = np.repeat([1, 2, 3], [380, 60, 40])
            order, own = random.permutation(480), random.random(480) < chance[natural]
            copies = natural.copy()
            copies[random.choice(order[:400][natural[order[:400]] == 1], 8, replace=False)] = 40
            sides = [rows[np.argsort(-copies[rows], kind="stable")][:asked] for rows in (order[:400], order[400:])]
            training, heldout = (Outcomes(own[rows], copies[rows]) for rows in sides)
            part = caption_strata(strata(training, heldout), None)
            found.append(
                beyond_caption({"p_value": exact_p_value(training.own, heldout.own), "stratified": part}) <= 0.05
            )
        rates[asked] = np.mean(found)
    assert rates[40] > 0.4 and rates[480] <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 200)


def test_why_there_is_no_stratified_p_value():
    report = caption_strata([Stratum(40, 8, 8, 0, 0), Stratum(1, 0, 0, 8, 0)], None)
    assert report["p_value"] is None and "as many copies" in report["reason"]
    assert report["without_counterpart"] == {"tested": 8, "own": 8}
    report = caption_strata([Stratum(1, 8, 8, 8, 0)], "the sides differ")
    assert (report["p_value"], report["reason"]) == (None, "the sides differ")
    assert report["strata"] == [{"copies": 1, "tested": 8, "own": 0, "training": {"tested": 8, "own": 8}}]


@pytest.mark.parametrize(
    ("fisher", "within", "alone", "expected"),
    [(0.01, 0.3, 0, 0.3), (0.3, 0.01, 0, 0.3), (0.01, 1.0, 8, 0.01), (0.01, None, 0, 0.01), (None, None, 0, None)],
)
def test_which_of_both_the_verdict_rests_on(fisher, within, alone, expected):
    part = {"p_value": within, "without_counterpart": {"tested": 8, "own": alone}}
    assert beyond_caption({"p_value": fisher, "stratified": part}) == expected
    assert beyond_caption({"p_value": fisher}) == fisher and beyond_caption(None) is None  # reports of before
