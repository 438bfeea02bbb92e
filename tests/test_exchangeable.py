"""The i.i.d. check: false alarms where both sides are drawn alike, alarms where they are not."""

import numpy as np
from accelerate import Accelerator

from eval.exchangeable import blind_check
from eval.members import Candidates
from train.data import Record


def candidates(members, nonmembers, per_block=1, grouped=False):
    count = members + nonmembers
    block = np.concatenate([np.arange(members) // per_block, 1000 + np.arange(nonmembers) // per_block])
    records = [Record(str(row), str(row), group=str(block[row]) if grouped else None) for row in range(count)]
    return Candidates(np.arange(count), np.arange(count) < members, block, records)


def noise(count, seed):
    return np.random.default_rng(seed).integers(0, 256, (count, 1, 16, 16), dtype=np.uint8)


def test_pictures_of_one_population_pass():
    """The p-value is exact, so 1 % fail: none or one of 12 (two have a chance of 0.6 %)."""
    found = [blind_check(noise(60, seed), candidates(35, 25), True, seed, Accelerator(cpu=True)) for seed in range(12)]
    assert sum(each["passed"] for each in found) >= 11
    assert abs(np.mean([each["blind_auc"] for each in found]) - 0.5) < 0.1
    assert found[0]["note"] == "" and found[0]["exchangeable"]


def test_another_preprocessing_is_named():
    images = noise(120, 4)
    images[60:] = images[60:] // 2 + 64  # the held-out side has been through a weaker contrast
    apart = blind_check(images, candidates(60, 60), True, 0, Accelerator(cpu=True))
    assert apart["passed"] is False and apart["blind_auc"] > 0.95 and apart["blind_ci95"][0] > 0.9
    assert apart["blind_p_value"] < 0.01 and "never saw the model" in apart["note"]


def test_pictures_of_one_person_are_one_unit():
    """10 + 10 people, each with a look of their own, show nothing; their 400 pictures taken singly are told apart by it."""
    who, alone = candidates(200, 200, per_block=20, grouped=True), candidates(200, 200)
    people, place = np.unique(who.block, return_inverse=True)
    looks = np.kron(np.random.default_rng(0).integers(0, 256, (len(people), 1, 4, 4)), np.ones((4, 4)))
    images = (noise(400, 1) / 2 + looks[place] / 2).astype(np.uint8)
    assert blind_check(images, who, True, 0, Accelerator(cpu=True))["passed"]
    assert blind_check(images, alone, True, 0, Accelerator(cpu=True))["passed"] is False


def test_pictures_of_another_source_never_pass():
    found = blind_check(noise(60, 5), candidates(30, 30), False, 0, Accelerator(cpu=True))
    assert found["passed"] is False and not found["exchangeable"] and "not split off at random" in found["note"]


def test_too_few_people_are_not_judged():
    who = candidates(40, 40, per_block=5, grouped=True)
    found = blind_check(noise(80, 6), who, True, 0, Accelerator(cpu=True))
    assert found["passed"] is None and found["blind_auc"] is None and "fewer than 10" in found["note"]
