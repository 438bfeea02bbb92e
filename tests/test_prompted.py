"""The prompted protocol on planted prompts."""

from types import SimpleNamespace

import numpy as np
import pytest

from eval.extraction import ExtractionConfig
from eval.prompted import clique_size, prompted, tiled_l2
from eval.promptrecords import NearestGenerations
from tests.reference import brute_force, fabricated


def run(prompts, training, heldout=None, **settings):
    config = ExtractionConfig(**({"permutations": 99} | settings))
    return prompted(prompts, training, heldout, config, exchangeable=True, seed=1)


def prompt(name, images):
    return name, [f"{name}/{index:03d}.png" for index in range(len(images))], images


def test_tiled_l2_is_the_largest_over_the_tiles():
    images = np.random.default_rng(0).integers(0, 256, (4, 3, 10, 9), dtype=np.uint8)
    found = tiled_l2(images)
    for i in range(4):
        for j in range(4):
            tiles = [
                brute_force.l2(images[i][:, y][:, :, x], images[j][:, y][:, :, x])
                for y in (slice(0, 3), slice(3, 6), slice(6, 8), slice(8, 10))
                for x in (slice(0, 3), slice(3, 5), slice(5, 7), slice(7, 9))
            ]
            assert found[i, j] == pytest.approx(max(tiles), rel=1e-12)


def test_a_shared_flat_background_is_close_in_plain_l2_but_not_tiled():
    pair = np.full((2, 1, 32, 32), 200, np.uint8)
    pair[0, :, 2:7, 2:7], pair[1, :, 2:7, 2:7] = 0, 150
    assert brute_force.l2(pair[0], pair[1]) < 0.15 < 0.3 < tiled_l2(pair)[0, 1]
    images = np.full((16, 1, 32, 32), 200, np.uint8)
    for index, level in enumerate(range(0, 256, 16)):
        images[index, :, 2 * (index % 4) : 2 * (index % 4) + 8, 8 * (index // 4) : 8 * (index // 4) + 8] = level
    report = run(
        [prompt("flat", images)], fabricated.pictures(fabricated.blobs(2, 20, side=32)), edge_threshold=0.05
    ).report
    assert report["candidates"] == 0


def chain(count: int = 20) -> np.ndarray:
    """A path: each picture is within 0.15 of the one before, none of the one before that; 20 in one component."""
    images = np.zeros((count, 1, 16, 16), np.uint8)
    for index in range(count):
        images[index] = 13 * index
    return images


def test_a_chain_is_one_component_but_no_clique():
    images = chain()
    joined = tiled_l2(images) <= 0.1
    assert joined.sum() == 20 + 2 * 19
    result = run([prompt("chain", images)], fabricated.pictures(fabricated.blobs(2, 20)), edge_threshold=0.1)
    assert result.cliques[0]["clique_size"] == 2 and not result.cliques[0]["flagged"]
    assert result.cliques[0]["edges"] == 19 and result.report["candidates"] == 0


def test_the_clique_that_flags_follows_what_was_drawn_not_what_a_guard_left():
    """Of 100 images the clique needs 10; 6 alike flag a prompt of 16 images, not one of which 84 were withheld."""
    training = fabricated.blobs(1, 40)
    images = np.concatenate([fabricated.noisy(np.repeat(training[4:5], 6, 0), 0.03), fabricated.blobs(4, 10)])
    config, pictures = ExtractionConfig(permutations=99), fabricated.pictures(training)
    for asked, flagged in ((16, True), (100, False)):
        options = {"exchangeable": True, "seed": 1, "asked": [asked]}
        result = prompted([prompt("a", images)], pictures, None, config, **options)
        assert result.cliques[0]["flagged"] is flagged and result.cliques[0]["clique_size"] == 6
        assert result.report["settings"]["clique_size"] == (4 if asked == 16 else 10)


def test_the_planted_answer_is_returned_exactly():
    training, strangers = fabricated.blobs(1, 40), fabricated.blobs(2, 3)
    prompts = [
        prompt("strangers", fabricated.blobs(3, 16)),
        prompt("agreed", fabricated.noisy(np.repeat(strangers[:1], 16, 0), 0.01)),  # a clique, but no training picture
        prompt(
            "loose", np.concatenate([fabricated.noisy(np.repeat(training[4:5], 6, 0), 0.03), fabricated.blobs(4, 10)])
        ),
        prompt("tight", np.concatenate([fabricated.blobs(5, 10), np.repeat(training[7:8, :, :, ::-1], 6, 0)])),
        prompt("few", np.concatenate([fabricated.blobs(6, 13), np.repeat(training[9:10], 3, 0)])),
    ]
    result = run(
        [(name, names, (lambda images=images: images)) for name, names, images in prompts],
        fabricated.pictures(training),
    )
    report = result.report
    assert [row["prompt"] for row in result.cliques] == ["tight", "agreed", "loose", "strangers", "few"]
    assert [row["flagged"] for row in result.cliques] == [True, True, True, False, False]
    assert [row["verified"] for row in result.cliques] == [True, False, True, False, False]
    assert [row["clique_size"] for row in result.cliques] == [6, 16, 6, result.cliques[3]["clique_size"], 3]
    assert result.cliques[0]["medoid"] == "tight/010.png" and result.cliques[0]["record_id"] == "r7"
    assert result.cliques[0]["mean_distance"] == 0 and result.cliques[2]["l2"] < 0.05
    assert (report["candidates"], report["verified"], report["verified_identity_view"]) == (3, 2, 1)
    assert (report["generations"], report["prompts"], report["tier"]) == (80, 5, "below smoke")
    assert report["settings"]["clique_size"] == 4 and report["settings"]["inexact_cliques"] == 0
    assert report["at_l2"]["0.05"] == 3  # the few that were not flagged reproduce a picture too
    assert [m["generation"] for m in result.matches] == [name for _, names, _ in prompts for name in names]
    verified = [m for m in result.matches if m["verified"]]
    assert [m["record_id"] for m in verified] == ["r4", "r7"] and all(m["clique"] for m in verified)
    assert sum(m["clique"] == "tight" for m in result.matches) == 6 and all(
        m["adaptive_score"] is None for m in result.matches
    )
    assert {match["record_id"] for match in result.matches if match["verified"]} == {"r7", "r4"}


def test_only_the_single_nearest_picture_within_the_limit_counts():
    training = fabricated.blobs(1, 10)
    training[1] = fabricated.noisy(training[0], 0.04)  # a stranger within 0.15 of the candidate
    images = np.repeat(training[:1], 5, 0)
    assert run([prompt("p", images)], fabricated.pictures(training)).report["verified"] == 1
    far = np.clip(images.astype(int) + 60, 0, 255).astype(np.uint8)
    assert run([prompt("p", far)], fabricated.pictures(training)).report["verified"] == 0


def test_the_medoid_is_the_most_central_and_the_lowest_of_equals():
    base = fabricated.blobs(1, 1)[0].astype(int)
    images = np.stack([np.clip(base + step, 0, 255) for step in (8, 8, 0, 4, 16, 8)]).astype(np.uint8)
    result = run([prompt("p", images)], fabricated.pictures(fabricated.blobs(1, 9)))
    assert result.cliques[0]["clique_size"] == 6 and result.cliques[0]["medoid"] == "p/000.png"


def test_control_of_the_prompted_protocol():
    training, heldout = fabricated.blobs(1, 30), fabricated.blobs(2, 30)
    prompts = [prompt(f"p{i}", np.repeat(training[i : i + 1], 5, 0)) for i in range(12)]
    prompts += [prompt(f"q{i}", np.repeat(heldout[i : i + 1], 5, 0)) for i in range(2)]
    control = run(prompts, fabricated.pictures(training), fabricated.pictures(heldout, offset=99)).report["control"]
    assert (control["verified_train_m"], control["verified"], control["n"]) == (12, 2, 30)
    assert control["p_value"] < 0.04 and control["background"] <= 0.2  # P(Binomial(14, 1/2) >= 12) = 0.006


def test_clique_size_follows_the_number_of_generations():
    config = ExtractionConfig()
    assert [clique_size(config, n) for n in (8, 16, 40, 41, 99, 100, 500)] == [4, 4, 4, 5, 10, 10, 10]
    assert clique_size(ExtractionConfig(clique_size=7), 16) == 7


def test_no_flagged_prompt_is_a_result_not_an_error():
    heldout = fabricated.pictures(fabricated.blobs(2, 30), offset=99)
    report = run([prompt("p", fabricated.blobs(3, 16))], fabricated.pictures(fabricated.blobs(1, 30)), heldout).report
    assert (report["candidates"], report["verified"], report["control"]["p_value"]) == (0, 0, 1.0)
    assert report["rate_ci95"] == [0.0, 0.1]


def test_the_nearest_generation_of_each_picture_is_known():
    training = fabricated.blobs(1, 6)
    prompts = [prompt(name, fabricated.noisy(np.repeat(training[[row, 5 - row]], 5, axis=0), 0.03, seed=row)) for row, name in
               enumerate(("one", "two", "three"))]  # fmt: skip
    found = run(prompts, fabricated.pictures(training)).pictures
    every = [(name, image) for _, names, images in prompts for name, image in zip(names, images, strict=True)]
    for row in range(6):
        near = [min(brute_force.l2(image, view) for view in brute_force.views(training[row])) for _, image in every]
        assert found.l2[row] == pytest.approx(min(near), rel=1e-6)
        assert found.generation[row] == every[int(np.argmin(near))][0]
    assert found.score is None and found.verified.sum() == len({r["record_id"] for r in run(
        prompts, fabricated.pictures(training)).cliques if r["verified"]})  # fmt: skip


def test_nearest_generations_do_not_depend_on_the_order_and_the_parts():
    """Few distances, so that most are equal: always the lowest prompt of the nearest, prompts in any order and twice."""
    random = np.random.default_rng(0)
    distance, query = random.integers(1, 4, (9, 30)) / 10, random.integers(0, 5, (9, 30))
    places = np.array([2, 3, 5, 7, 11])
    lowest = distance.argmin(axis=0)  # the first of equals
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(np.r_[np.arange(9), 3, 4])
        parts = [NearestGenerations.none(30) for _ in range(3)]
        for turn, prompt in enumerate(order.tolist()):
            near = SimpleNamespace(best_distance=distance[prompt], best_query=query[prompt])
            parts[turn % 3].add(prompt, near, places)
        found = NearestGenerations.merged(parts)
        np.testing.assert_array_equal(found.distance, distance.min(axis=0))
        np.testing.assert_array_equal(found.prompt, lowest)
        np.testing.assert_array_equal(found.place, places[query[lowest, np.arange(30)]])
