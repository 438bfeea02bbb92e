"""Arms of a planted comparison against the reference and on the fronts: differences, tests and front by hand."""

import dataclasses
import shutil

import pytest
from scipy import stats

from eval.arms import read_training
from eval.comparison import UtilityFloor, assemble
from tests.comparisons import KID, edit_report, rewrite, write_comparison


@pytest.fixture
def planted(tmp_path):
    """Arms by name, and the keywords of `assemble`."""
    folder = tmp_path / "planted"
    arms, options = write_comparison(folder, images=False)
    return {arm.name: arm for arm in arms}, options


@pytest.fixture
def compared(planted):
    """comparison.json, its arms by name."""
    arms, options = planted
    result = assemble(list(arms.values()), **options)
    return result, {arm["name"]: arm for arm in result["arms"]}


def test_below_the_floor_is_not_comparable(compared):
    result, arms = compared
    assert [arms[name]["comparable"] for name in arms] == [True, True, False, True]
    assert "0.0331" in arms["dpsgd"]["why"] and "0.02" in arms["dpsgd"]["why"]
    assert "dpsgd" not in result["fronts"]["weights"]["front"] + result["fronts"]["outputs"]["front"]


def test_without_a_floor_all_are_ranked(planted):
    arms, options = planted
    result = assemble(list(arms.values()), **options | {"utility": UtilityFloor(metric="fid")})
    assert all(arm["comparable"] for arm in result["arms"])
    assert "dpsgd" in result["fronts"]["weights"]["front"]  # it leaks nothing
    assert any("No utility floor" in sentence for sentence in result["not_measured"])


def test_two_fronts(compared):
    """Outputs: the filter passes 1 and 0 pictures, dedup gives 2 and 1 at a better kid. Weights: the filter's leak as none."""
    fronts = compared[0]["fronts"]
    assert fronts["outputs"]["front"] == ["dedup", "filter"] and fronts["weights"]["front"] == ["dedup"]
    points = {name: {p["arm"]: (p["x"], p["y"]) for p in front["points"]} for name, front in fronts.items()}
    assert points["outputs"]["filter"] == pytest.approx((0.00675, 0.5))
    marked = {name: [p["arm"] for p in front["points"] if p["by_construction"]] for name, front in fronts.items()}
    assert marked == {"weights": [], "outputs": ["filter"]}
    for name in ("filter", "none"):
        assert points["weights"][name] == pytest.approx((0.0066, 13))
    assert points["weights"]["dpsgd"] == (0.0331, 0)


def test_a_filter_takes_nobody_off_the_front(planted):
    """At the quality of the undefended model and with nothing behind it, it would leave no other arm."""
    arms, options = planted
    for run, kid in zip(arms["filter"].runs, KID["dedup"], strict=True):
        edit_report(run, "utility.kid", kid)
    fronts = assemble(list(arms.values()), **options)["fronts"]
    assert fronts["outputs"]["front"] == ["dedup", "filter"]


def test_fronts_are_drawn_over_the_seeds_that_all_have(planted):
    """dpsgd lacks seed 1: ranked, it leaves seed 0 to all; below the floor, it leaves them theirs."""
    arms, options = planted
    for utility, n, none in ((UtilityFloor(), 1, (0.0061, 14)), (options["utility"], 2, (0.0066, 13))):
        found = assemble(list(arms.values()), **options | {"utility": utility})["fronts"]["weights"]["points"]
        points = {point["arm"]: point for point in found}
        assert (points["none"]["x"], points["none"]["y"]) == pytest.approx(none)
        assert points["dedup"]["n"] == points["none"]["n"] == n and points["none"]["seeds"] == list(range(n))
        assert (points["dpsgd"]["n"], points["dpsgd"]["x"]) == (1, 0.0331)


def test_arms_without_a_common_seed_are_not_ranked(planted):
    arms, options = planted
    gone = dataclasses.replace(arms["dedup"].runs[0], status="failed")
    arms["dedup"] = dataclasses.replace(arms["dedup"], runs=[gone, arms["dedup"].runs[1]])
    result = assemble([arms[name] for name in ("none", "dedup", "dpsgd")], **options | {"utility": UtilityFloor()})
    assert result["fronts"]["weights"]["front"] == []
    assert [point["n"] for point in result["fronts"]["weights"]["points"]] == [2, 1, 1]


def test_holm_over_the_arms_that_are_comparable_and_tested(compared):
    """dedup alone: dpsgd (six units, like dedup) is below the floor, the filter has no test."""
    arms = compared[1]
    found = arms["dedup"]["versus_reference"]["verified"]
    for key in ("p_value", "p_value_holm", "smallest_p_value", "smallest_p_value_holm"):
        assert found[key] == pytest.approx(2 / 64)
    assert found["note"] is None
    found = arms["dpsgd"]["versus_reference"]["verified"]
    assert [found[key] for key in ("p_value", "smallest_p_value")] == pytest.approx([2 / 64] * 2)
    assert found["p_value_holm"] is found["smallest_p_value_holm"] is None


def test_holm_and_what_it_could_show_at_best(planted):
    """Without a floor: dedup and dpsgd, six units each, 2/64 at best, times two."""
    arms, options = planted
    found = assemble(list(arms.values()), **options | {"utility": UtilityFloor()})["arms"]
    for arm in found[1:3]:
        test = arm["versus_reference"]["verified"]
        assert [test[key] for key in ("p_value_holm", "smallest_p_value_holm")] == pytest.approx([4 / 64] * 2)
        assert "6 units that differ cannot give less than p = 0.0312 (0.0625 after Holm over 2 tests)" in test["note"]


def test_an_arm_that_differs_little_is_not_held_to_the_size_of_the_family(planted):
    """dpsgd, seed 0, as if it leaked as the reference but for patients 5 and 6: 2/4. With dedup's 2/64: 4/64 and 1/2."""
    arms, options = planted
    run = arms["dpsgd"].runs[0]
    record_of = {picture: record for record, picture in read_training(run.manifest).picture.items()}
    leaked = iter(range(10))

    def leak(row):
        picture = next(leaked, None)
        return row if picture is None else row | {"record_id": record_of[picture], "verified": "true"}

    rewrite(run.directory / "attack" / "matches.csv", leak)
    edit_report(run, "privacy.extraction.verified", 10)
    chosen = [arms[name] for name in ("none", "dedup", "dpsgd")]
    found = assemble(chosen, **options | {"utility": UtilityFloor()})["arms"][1:]
    tests = [arm["versus_reference"]["verified"] for arm in found]
    assert [test["units_differing"] for test in tests] == [6, 2]
    for key in ("p_value_holm", "smallest_p_value_holm"):
        assert [test[key] for test in tests] == [4 / 64, 1 / 2]
    assert "2 units that differ cannot give less than p = 0.5 (0.5 after" in tests[1]["note"]


def test_a_count_behind_a_filter_is_not_tested(compared):
    found = compared[1]["filter"]["versus_reference"]["verified"]
    assert found["differences"] == [-13, -12] and "own score" in found["test"]
    assert all(found[key] is None for key in ("p_value", "p_value_holm", "smallest_p_value", "units", "note"))


def test_paired_test_by_hand(compared):
    """none leaks pictures 0..13 and 0..11, dedup 2, 3 and 2. Units: {0..3} (a copy joins two patients), then pairs.

    Differences: {0..3}: -2 - 3, {4,5} ... {10,11}: -4 each, {12,13}: -2. Six units, all negative: 2 of 64 patterns reach it.
    """
    found = compared[1]["dedup"]["versus_reference"]["verified"]
    assert found["differences"] == [-12, -11] and (found["sign"], found["ties"], found["agree"]) == ("less", 0, True)
    assert found["p_value"] == pytest.approx(2 / 64) and (found["units"], found["units_differing"]) == (11, 6)
    assert found["mean"] == -11.5 and "groups" in found["test"]
    assert compared[1]["none"]["versus_reference"] is None


def test_paired_test_among_equally_many_copies_by_hand(compared):
    """Four pictures have four copies: none leaks all of them twice, dedup 2 and 3, then 2. They are units {0..3} and pairs, so that unit
    {0..3} alone differs, by 8 - 3: p = 1. The others: units {4, 5} to {12, 13}, five, all one way: 2 of 32 patterns."""
    rows = compared[1]["dedup"]["versus_reference"]["verified"]["by_copies"]
    once = {"copies": 1, "pictures": 20, "mean": 0, "reference_mean": 9, "units_differing": 5, "p_value": 2 / 32}
    often = {"copies": 4, "pictures": 4, "mean": 1.5, "reference_mean": 4, "units_differing": 1, "p_value": 1}
    assert rows == [pytest.approx(once), pytest.approx(often)]
    assert compared[1]["filter"]["versus_reference"]["verified"]["by_copies"] == []


def test_a_defense_that_takes_away_copies_alone_shows_among_them(planted):
    """As deduplication did on emoji: repeated pictures no longer leak, others leak instead. In all: no difference."""
    arms, options = planted
    once = list(range(4, 24, 2))  # one of every pair: ten independent pictures without a copy
    for arm, leaked in (("none", [0, 1, 2, 3, *once[:5]]), ("dedup", once[1:10])):
        for run in arms[arm].runs:
            record_of = {picture: record for record, picture in read_training(run.manifest).picture.items()}
            rest = iter(leaked)

            def leak(row, rest=rest, record_of=record_of):
                found = next(rest, None)
                return row | (
                    {"verified": "false"} if found is None else {"record_id": record_of[found], "verified": "true"}
                )

            rewrite(run.directory / "attack" / "matches.csv", leak)
            edit_report(run, "privacy.extraction.verified", len(leaked))
    test = assemble([arms["none"], arms["dedup"]], **options)["arms"][1]["versus_reference"]["verified"]
    assert test["mean"] == 0 and test["p_value"] == 1
    assert [row["mean"] - row["reference_mean"] for row in test["by_copies"]] == [4, -4]


def test_other_data_have_no_paired_test(planted):
    arms, options = planted
    for run in arms["dedup"].runs:
        rewrite(run.manifest, lambda row: row | {"record_id": row["record_id"][::-1]})
        rewrite(run.directory / "attack" / "matches.csv", lambda row: row | {"record_id": row["record_id"][::-1]})
    chosen = [dataclasses.replace(arms[name], level=level) for name, level in (("none", 1), ("dedup", 2))]
    found = assemble(chosen, **options | {"factor": "data.phantom.pictures"})["arms"][1]["versus_reference"]["verified"]
    assert found["differences"] == [-12, -11] and found["p_value"] is found["p_value_holm"] is None
    assert "not trained on the same pictures" in found["test"]


def test_figures_of_different_numbers_of_images_are_not_compared(planted):
    arms, options = planted
    edit_report(arms["filter"].runs[0], "utility.fid_n", 7)
    result = assemble(list(arms.values()), **options | {"utility": UtilityFloor(metric="fid")})
    found = result["arms"][3]["versus_reference"]
    assert found["fid"]["differences"] == [None, pytest.approx(15 * 0.0001)]
    assert "different numbers of images" in found["fid"]["test"] and "different" not in found["kid"]["test"]
    assert found["kid"]["differences"] == pytest.approx([0.0002, 0.0001])


def test_utility_is_compared_over_seeds(compared):
    found = compared[1]["dedup"]["versus_reference"]["kid"]
    assert found["differences"] == pytest.approx([-0.0009, -0.0014]) and found["sign"] == "less"
    assert found["p_value"] is None and "needs 3" in found["test"]
    assert compared[1]["dedup"]["versus_reference"]["downstream.accuracy"]["mean"] == pytest.approx(0.03)


def test_three_seeds_give_a_paired_t_test(planted):
    arms, options = planted
    kids = {"none": [0.006, 0.007, 0.0062], "dedup": [0.005, 0.0064, 0.0051]}
    extended = []
    for name, values in kids.items():
        first = arms[name].runs[1]
        third = dataclasses.replace(first, seed=2, directory=first.directory.with_name(f"{name}-s2"))
        shutil.copytree(first.directory, third.directory)
        for run, kid in zip([*arms[name].runs, third], values, strict=True):
            edit_report(run, "utility.kid", kid)
        extended.append(dataclasses.replace(arms[name], runs=[*arms[name].runs, third]))
    found = assemble(extended, **options)["arms"][1]["versus_reference"]["kid"]
    assert found["p_value"] == pytest.approx(stats.ttest_rel(kids["dedup"], kids["none"]).pvalue)


def test_a_failed_reference_leaves_no_differences(planted):
    arms, options = planted
    gone = [dataclasses.replace(run, status="failed", error="no space left") for run in arms["none"].runs]
    arms["none"] = dataclasses.replace(arms["none"], runs=gone)
    result = assemble(list(arms.values()), **options)
    found = result["arms"][1]["versus_reference"]["verified"]
    assert found["differences"] == [None, None] and found["sign"] is None and "none: no seed" in found["test"]
    assert result["design"]["steps"] is None and result["design"]["training_pictures"] == 24
