"""The control: its counts, and a p-value that is uniform where nothing leaks and small where copies were planted."""

import itertools

import numpy as np
import pytest
from scipy import stats

from defenses.neighbours import adaptive_score, search
from defenses.references import shuffled
from eval.control import PooledLists, Rule, _pooled, _Rerun, control, permutation_p_value
from eval.extraction import ExtractionConfig, adaptive_rule, untargeted
from tests.reference import brute_force, fabricated


def rule(n: int = 10) -> Rule:
    return Rule(n, lambda distance: adaptive_score(distance, 0.5, n))


def run(generations, training, heldout, n=10, exchangeable=True, permutations=199, seed=3):
    return control(
        generations, training, heldout, rule(n), exchangeable=exchangeable, permutations=permutations, seed=seed
    )


def test_planted_copies_give_a_small_p_value_and_an_empty_control():
    training, heldout = fabricated.blobs(1, 120), fabricated.blobs(2, 60)
    generations = np.concatenate([fabricated.noisy(training[:40], 0.02), fabricated.blobs(3, 60)])
    result = run(generations, fabricated.pictures(training), fabricated.pictures(heldout, offset=200))
    assert (result["verified"], result["n"], result["background"]) == (0, 60, 0.0)
    assert 12 <= result["verified_train_m"] <= 28  # half of the 40 are expected among the 60 of 120
    assert result["p_value"] == 1 / 200
    assert result["units"] == {"training": 60, "heldout": 60} and "note" not in result


def test_copies_of_heldout_pictures_are_counted_against_the_claim():
    training, heldout = fabricated.blobs(1, 60), fabricated.blobs(2, 60)
    result = run(
        fabricated.noisy(heldout[:9], 0.02), fabricated.pictures(training), fabricated.pictures(heldout, offset=99)
    )
    assert (result["verified"], result["verified_train_m"]) == (9, 0) and result["p_value"] > 0.9


def test_background_is_the_share_of_heldout_pictures_that_would_pass():
    training, heldout = fabricated.blobs(1, 60), fabricated.blobs(2, 40)
    heldout[:10] = fabricated.noisy(training[:10], 0.02)
    result = run(fabricated.blobs(3, 5), fabricated.pictures(training), fabricated.pictures(heldout, offset=99))
    assert result["background"] == 0.25


def test_no_heldout_no_control_and_no_p_value_where_not_exchangeable():
    training = fabricated.pictures(fabricated.blobs(1, 30))
    assert run(fabricated.blobs(3, 5), training, None) is None
    result = run(
        training.images[:5], training, fabricated.pictures(fabricated.blobs(2, 12), offset=99), exchangeable=False
    )
    assert result["p_value"] is None and result["n"] == 12 and "only 12 pictures" in result["note"]


def copied_places(copied: np.ndarray, total: int) -> PooledLists:
    """One candidate for each place in ``copied``, far nearer to it than to all others."""
    place = np.array([np.roll(np.arange(total), -i) for i in copied])
    distance = np.tile(np.concatenate([[0.02], np.linspace(0.2, 0.3, total - 1)]), (len(place), 1))
    return PooledLists(place, distance, total // 2)


def test_p_value_is_hypergeometric_and_uniform_where_nothing_leaks():
    """Copies of pictures of either side alike: the number on one side is hypergeometric, and P(p <= q) is at most q."""
    exact = []
    for seed in range(150):
        copied = np.flatnonzero(np.random.default_rng(seed).random(60) < 0.4)
        exact.append(stats.hypergeom.sf((copied < 30).sum() - 1, 60, len(copied), 30))
        if seed < 30:
            found = permutation_p_value(copied_places(copied, 60), np.arange(60), rule(5), 499, seed)
            assert found == pytest.approx(exact[-1], abs=4 * np.sqrt(exact[-1] * (1 - exact[-1]) / 499) + 0.004)
    for q in (0.05, 0.1, 0.3, 0.5):
        assert np.mean(np.array(exact) <= q) <= q + 2.5 * np.sqrt(q * (1 - q) / 150)
    assert 0.45 < np.mean(exact) < 0.65  # ties lift it a little above 1/2


def test_with_groups_whole_groups_change_sides():
    """One patient with 15 leaked pictures is one draw: p is 1/2, not 2^-15."""
    lists = copied_places(np.arange(15), 60)
    grouped = permutation_p_value(lists, np.repeat([0, 1, 2, 3], 15), rule(5), 999, 0)
    alone = permutation_p_value(lists, np.arange(60), rule(5), 999, 0)
    assert grouped == pytest.approx(0.5, abs=0.06) and alone < 0.003


def naive_difference(near, sides, n):
    """verified(True) - verified(False), the rule run from scratch on each side; near: (distance, place) of each candidate."""
    counted = []
    for side in (True, False):
        own = [[row for row in rows if sides[row[1]] == side] for rows in near]
        hits = {rows[0][1] for rows in own if brute_force.score([row[0] for row in rows], 0.5, n) <= 1}
        counted.append(len(hits))
    return counted[0] - counted[1]


def test_permuted_differences_equal_the_rule_run_from_scratch():
    """All 70 splits of 8 pictures: blends and near copies, so that places, sums and second neighbours matter."""
    images = fabricated.blobs(12, 8, side=6)
    images[5] = fabricated.noisy(images[1], 0.08)
    mixed = (0.8 * images[:6] + 0.2 * images[2:8]).astype(np.uint8)
    generations = np.concatenate([fabricated.noisy(images[:4], 0.05), mixed])
    n = 3
    found = [search(generations, images[4 * i : 4 * i + 4], np.arange(4), 4 * n).distinct for i in range(2)]
    for neighbours, offset in zip(found, (0, 4), strict=True):
        neighbours.picture += offset
    lists = _pooled(found, [np.arange(4), np.arange(4, 8)], rule(n))
    rerun, expected = _Rerun(lists, rule(n)), []
    near = [brute_force.records(generation, images, True) for generation in generations]
    labels = np.zeros((70, 8), dtype=bool)
    for index, chosen in enumerate(itertools.combinations(range(8), 4)):
        labels[index, list(chosen)] = True
        expected.append(naive_difference(near, labels[index], n))
    assert rerun.difference(labels).tolist() == expected
    assert len(set(expected)) > 3 and not rerun.certain[rerun.possible].all()


def test_incomplete_lists_still_give_the_observed_difference():
    training, heldout = fabricated.blobs(1, 100), fabricated.blobs(2, 100)
    generations = fabricated.noisy(np.concatenate([training[:12], heldout[:4]]), 0.02)
    result = run(generations, fabricated.pictures(training), fabricated.pictures(heldout, offset=500), n=5)
    assert (result["verified_train_m"], result["verified"]) == (12, 4)
    exact = stats.hypergeom.sf(11, 200, 16, 100)  # of 16 copied among 200, at least 12 on one side: 0.034
    assert result["p_value"] == pytest.approx(exact, abs=0.03)


def test_shuffled_keeps_blocks_together():
    block = np.array([5, 1, 5, 2, 1, 5])
    for seed in range(20):
        order = block[shuffled(block, np.random.default_rng(seed))].tolist()
        assert [name for name, _ in itertools.groupby(order)] == list(dict.fromkeys(order))


def test_the_same_seed_gives_the_same_control():
    training, heldout = (
        fabricated.pictures(fabricated.blobs(1, 80)),
        fabricated.pictures(fabricated.blobs(2, 30), offset=99),
    )
    generations = fabricated.noisy(training.images[:20], 0.02)
    assert run(generations, training, heldout) == run(generations, training, heldout)
    report = untargeted(
        generations, training, heldout, ExtractionConfig(n=10, permutations=199), exchangeable=True, seed=3
    ).report
    assert report["control"] == run(generations, training, heldout)
    assert adaptive_rule(ExtractionConfig()).n == 50
