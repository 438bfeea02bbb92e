"""The untargeted attack on fabricated generations, and against loops in float64."""

import numpy as np
import pytest

from defenses.errors import UserError
from eval.extraction import ExtractionConfig, check_tier, tier_of, untargeted
from tests.reference import brute_force, fabricated

QUICK = {"permutations": 199}


def attack(generations, training, heldout=None, names=None, **settings):
    config = ExtractionConfig(**(QUICK | settings))
    return untargeted(generations, training, heldout, config, exchangeable=True, seed=5, names=names)


def planted():
    """Training pictures 0..79, a folder of generations, and which training picture each of them copies (or None)."""
    training = fabricated.blobs(1, 80)
    strangers = fabricated.blobs(2, 20)
    rows: list[tuple[str, np.ndarray, int | None]] = []
    rows += [(f"exact{i}", training[i], i) for i in range(5)]
    rows += [(f"again{i}", training[i], i) for i in range(2)]
    rows += [(f"near{i}", fabricated.noisy(training[i], 0.01, seed=i), i) for i in range(5, 10)]
    rows += [("mirrored", training[10, :, :, ::-1], 10)]
    rows += [("brightened", np.minimum(training[11].astype(int) + 8, 255).astype(np.uint8), 11)]  # + 0.03
    blend = (training[12:22].astype(int) + training[22:32]) // 2
    rows += [(f"blend{i}", image.astype(np.uint8), None) for i, image in enumerate(blend)]
    noise = np.random.default_rng(3).integers(0, 256, (10, 1, 16, 16), dtype=np.uint8)
    rows += [(f"noise{i}", image, None) for i, image in enumerate(noise)]
    rows += [(f"stranger{i}", image, None) for i, image in enumerate(strangers)]
    return training, rows


def test_the_planted_answer_is_returned_exactly():
    training, rows = planted()
    result = attack(np.stack([row[1] for row in rows]), fabricated.pictures(training), names=[row[0] for row in rows])
    report = result.report
    assert {match["generation"] for match in result.matches if match["verified"]} == {
        r[0] for r in rows if r[2] is not None
    }
    for match, (name, _, copied) in zip(result.matches, rows, strict=True):
        assert match["generation"] == name and match["verified"] == (match["adaptive_score"] <= 1)
        assert copied is None or match["record_id"] == f"r{copied}"
    assert (report["candidates"], report["verified"], report["verified_units"]) == (14, 12, 12)
    assert report["verified_identity_view"] == 11  # all but the mirrored one
    assert report["verified_paper_rule"] == 12  # no copies: the same rule
    assert report["rate"] == 12 / 80 and report["rate_ci95"][0] < 0.15 < report["rate_ci95"][1]
    assert report["rate_ci95_method"] == "Wilson" and report["control"] is None
    assert report["generations"] == len(rows) and report["tier"] == "below smoke"
    assert report["at_l2"] == {"0.05": 12, "0.10": 12, "0.15": 12 + at_015(training, rows)}
    hits = {match["record_id"]: match for match in result.matches if match["verified"]}
    assert set(hits) == {f"r{i}" for i in range(12)}
    assert hits["r11"]["l2"] == pytest.approx(8 / 255, rel=0.05)


def at_015(training, rows) -> int:
    """Training pictures within 0.15 of some generation, other than the twelve that were copied."""
    generations = np.stack([row[1] for row in rows]) / 255.0
    views = [np.stack(brute_force.views(picture)) / 255.0 for picture in training[12:]]
    nearest = [min(((generations - view) ** 2).mean(axis=(1, 2, 3)).min() for view in each) ** 0.5 for each in views]
    return sum(distance <= 0.15 for distance in nearest)


@pytest.mark.parametrize("n", [3, 10])
def test_scores_and_counts_equal_brute_force(n):
    training = np.concatenate([fabricated.blobs(4, 14, side=8), fabricated.blobs(4, 2, side=8)])  # 0 and 1 twice
    picture = np.array([*range(14), 0, 1]) + 100
    generations = np.concatenate([fabricated.noisy(training[:5], 0.05), fabricated.blobs(6, 5, side=8)])
    result = attack(generations, fabricated.pictures(training, picture), n=n)
    verified, paper = set(), set()
    for match, generation in zip(result.matches, generations, strict=True):
        near = brute_force.distinct(generation, training, picture)
        assert match["adaptive_score"] == pytest.approx(brute_force.score([row[0] for row in near], 0.5, n), rel=1e-6)
        assert match["record_id"] == f"r{near[0][2]}" and match["l2"] == pytest.approx(near[0][0], rel=1e-6)
        if match["adaptive_score"] <= 1:
            verified.add(near[0][1])
        single = brute_force.records(generation, training, True)
        if brute_force.score([row[0] for row in single], 0.5, n) <= 1:
            paper.add(picture[single[0][1]])
    assert len(verified) >= 2 and result.report["verified"] == len(verified)
    assert result.report["verified_paper_rule"] == len(paper)


def test_forty_copies_are_verified_by_distinct_pictures_and_missed_by_the_paper_rule():
    """The 40 copies fill most of the 50 neighbours, so the paper's mean shrinks with the nearest distance."""
    base = fabricated.blobs(7, 61)
    copies = np.stack([fabricated.noisy(base[0], 0.004, seed=i) for i in range(40)])
    training = fabricated.pictures(np.concatenate([copies, base[1:]]), picture=[0] * 40 + list(range(1, 61)))
    generations = fabricated.noisy(base[:2], 0.05, seed=50)
    report = attack(generations, training).report
    assert (report["verified"], report["verified_paper_rule"]) == (2, 1)
    assert report["by_copies"] == {"1": {"pictures": 60, "verified": 1}, "40": {"pictures": 1, "verified": 1}}
    assert report["rate"] == 2 / 61


def test_pictures_never_trained_on_are_not_verified():
    report = attack(fabricated.blobs(8, 300), fabricated.pictures(fabricated.blobs(9, 150))).report
    assert (report["candidates"], report["verified"], report["verified_units"]) == (0, 0, 0)
    assert report["rate_ci95"] == [0.0, 3 / 150] and report["tier"] == "smoke"


def test_units_count_every_group_that_holds_a_verified_picture():
    training = fabricated.blobs(10, 60)
    images = np.concatenate([training, training[:1]])  # picture 0 occurs in the groups a and b
    group = ["a", "a", "c", None] + [f"g{i}" for i in range(4, 60)] + ["b"]
    records = fabricated.pictures(images, picture=[*range(60), 0], block=[0, 0, 2, 3, *range(4, 60), 0], group=group)
    report = attack(training[[0, 1, 3]], records).report
    assert (report["verified"], report["verified_units"]) == (3, 3)  # a, b, and picture 3 by itself
    assert "bootstrap over 59 groups" in report["rate_ci95_method"]


def test_fewer_pictures_than_n_are_all_used_and_said():
    training = fabricated.blobs(11, 6)
    report = attack(training[:1], fabricated.pictures(training)).report
    assert (report["settings"]["n"], report["settings"]["n_effective"], report["verified"]) == (50, 6, 1)
    one = attack(training[:1], fabricated.pictures(training[:1])).report
    assert one["verified"] == 0  # a single picture has no other to stand out from


def test_tiers_are_named_by_their_sizes():
    assert [tier_of(n) for n in (255, 256, 8191, 8192, 2**16, 2**20)] == [
        "below smoke",
        "smoke",
        "smoke",
        "small",
        "standard",
        "paper",
    ]
    assert [tier_of(0, *size) for size in ((8, 15), (8, 16), (200, 64), (350_000, 64))] == [
        "below smoke",
        "smoke",
        "small",
        "small",
    ]
    check_tier(ExtractionConfig(tier="smoke"), 256)
    with pytest.raises(UserError, match="attack.extraction.tier: small needs generate.count=8192"):
        check_tier(ExtractionConfig(tier="small"), 8191)


@pytest.mark.parametrize(
    ("key", "value"),
    [("alpha", 0.0), ("n", 1), ("edge_threshold", float("nan")), ("clique_size", 1), ("permutations", 0)],
)
def test_bad_settings_name_their_key(key, value):
    with pytest.raises(UserError, match=f"attack.extraction.{key}"):
        ExtractionConfig(**{key: value})


def test_what_is_known_of_each_training_picture_equals_loops():
    training = np.concatenate([fabricated.blobs(4, 14, side=8), fabricated.blobs(4, 1, side=8)])  # 0 twice
    picture = np.array([*range(14), 0]) + 100
    generations = np.concatenate([fabricated.noisy(training[:5], 0.05), fabricated.blobs(6, 5, side=8)])
    names = [f"g{index}" for index in range(10)]
    result = attack(generations, fabricated.pictures(training, picture), names=names, n=5)
    near = [dict((row[1], row[0]) for row in brute_force.distinct(image, training, picture)) for image in generations]
    verified = {picture for match, each in zip(result.matches, near, strict=True) if match["verified"]
                for picture in [min(each, key=each.get)]}  # fmt: skip
    for place, number in enumerate(range(100, 114)):
        distance = [each[number] for each in near]
        scores = [each[number] / (0.5 * np.mean(sorted(each.values())[:5])) for each in near]
        asked = {int(np.argmin(distance)), *(i for i, each in enumerate(near) if min(each, key=each.get) == number)}
        assert result.pictures.l2[place] == pytest.approx(min(distance), rel=1e-6)
        assert result.pictures.generation[place] == names[int(np.argmin(distance))]
        assert result.pictures.score[place] == pytest.approx(min(scores[i] for i in asked), rel=1e-6)
        assert result.pictures.verified[place] == (number in verified)
    assert (result.pictures.score[result.pictures.verified] <= 1).all() and result.pictures.verified.any()
