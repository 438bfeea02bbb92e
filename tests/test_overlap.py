"""Agreement of runs against enumeration, and from files."""

import csv
import sys
from itertools import combinations, product

import numpy as np
import pytest
from scipy.stats import hypergeom

from defenses.errors import UserError
from eval import risk
from eval.overlap import RiskOfRun, across_runs, intersection, memorised_rows, read_run
from train.files import write_csv


def table(name: str, memorised, pictures: int = 12, copies=()) -> RiskOfRun:
    rows = {
        f"p{index}": {
            "record_id": f"r{index}", "copies": "5" if index in copies else "1", "outlierness": "0.2", "l2": "0.1",
            "adaptive_score": "0.5", "verified": "true" if index in memorised else "false",
        }
        for index in range(pictures)
    }  # fmt: skip
    return RiskOfRun(name, rows)


@pytest.mark.parametrize("sizes", [[2, 3], [1, 2, 3], [3, 3, 4], [0, 2, 2]])
def test_chance_equals_enumeration(sizes):
    total = 5
    choices = [list(combinations(range(total), size)) for size in sizes]
    counts = np.zeros(sizes[0] + 1)
    for sets in product(*choices):
        counts[len(set.intersection(*map(set, sets)))] += 1
    assert intersection(sizes, total) == pytest.approx(counts / counts.sum())


def test_two_runs_that_agree_and_two_that_do_not():
    found = across_runs([table("a", range(4)), table("b", range(4)), table("c", range(4, 8))])
    assert found["runs"] == {"a": 4, "b": 4, "c": 4} and found["pictures"] == 12
    pairs = {(pair["first"], pair["second"]): pair for pair in found["pairs"]}
    assert pairs["a", "b"]["shared"] == 4 and pairs["a", "b"]["expected"] == pytest.approx(4 * 4 / 12)
    assert pairs["a", "b"]["p_value"] == pytest.approx(hypergeom.sf(3, 12, 4, 4))
    assert pairs["a", "c"]["shared"] == 0 and pairs["a", "c"]["p_value"] == 1
    assert found["all"] == {"shared": 0, "expected": pytest.approx(12 / 27), "p_value": 1}
    assert [row["pictures"] for row in found["at_least"]] == [8, 4, 0]
    expected = [12 * (1 - (2 / 3) ** 3), 12 * (3 * (1 / 3) ** 2 * (2 / 3) + 1 / 27), 12 / 27]
    assert [row["expected"] for row in found["at_least"]] == pytest.approx(expected)


def test_p_values_are_not_too_small_for_runs_without_a_common_cause():
    random, low = np.random.default_rng(0), 0
    for _ in range(200):
        runs = [
            table(name, random.choice(40, size, replace=False), 40) for name, size in (("a", 15), ("b", 20), ("c", 18))
        ]
        low += across_runs(runs)["all"]["p_value"] <= 0.1
    assert 0.01 < low / 200 < 0.15  # a discrete test stays at or below its level


def test_single_copies_are_counted_apart():
    found = across_runs([table("a", range(6), copies=range(4)), table("b", range(6), copies=range(4))])
    assert found["pairs"][0]["shared"] == 6
    single = found["single_copies"]
    assert single["pictures"] == 8 and single["pairs"][0]["shared"] == 2
    assert across_runs([table("a", [1], copies=range(12)), table("b", [1], copies=range(12))])["single_copies"] is None


def test_pictures_of_most_runs_come_first():
    rows = memorised_rows([table("a", [1, 2]), table("b", [2, 3])])
    assert [(row["picture"], row["runs"], row["memorised_by"]) for row in rows] == [
        ("p2", 2, "a b"), ("p1", 1, "a"), ("p3", 1, "b"),
    ]  # fmt: skip


def write_run(folder, memorised, prefix: str, digest=True):
    (folder / "attack").mkdir(parents=True)
    rows = [
        {name: None for name in risk.COLUMNS}
        | {"record_id": f"{prefix}{i}", "copies": 1, "outlierness": 0.1, "l2": 0.05 * i, "verified": i in memorised}
        for i in range(6)
    ]
    write_csv(folder / "attack" / "risk.csv", risk.COLUMNS, rows)
    manifest = [{"record_id": f"{prefix}{i}", "sha256": f"sha{i}" if digest else ""} for i in range(6)]
    write_csv(folder / "manifest.csv", ["record_id", "sha256"], manifest)


def test_runs_are_matched_by_file_and_the_command_writes_both_tables(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "one", {1, 2}, "a")
    write_run(tmp_path / "two", {2, 5}, "b")
    arguments = ["risk", str(tmp_path / "one"), str(tmp_path / "two"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    assert risk.main() == 0
    page = capsys.readouterr().out
    assert page == (tmp_path / "out" / "risk_overlap.md").read_text()
    assert "| one, two | 1 | 0.67 | 0.6 |" in page
    with (tmp_path / "out" / "risk_overlap.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["picture"], row["runs"]) for row in rows] == [("sha2", "2"), ("sha1", "1"), ("sha5", "1")]
    assert float(rows[1]["best_l2"]) == pytest.approx(0.05)


def test_an_evaluation_below_a_run_uses_the_manifest_of_the_run(tmp_path):
    write_run(tmp_path / "one", {1}, "a")
    (tmp_path / "one" / "eval" / "again").mkdir(parents=True)
    (tmp_path / "one" / "attack").rename(tmp_path / "one" / "eval" / "again" / "attack")
    assert read_run(tmp_path / "one" / "eval" / "again").memorised == {"sha1"}


def test_mistakes_are_one_line(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "one", {1}, "a", digest=False)
    write_run(tmp_path / "two", {1}, "b", digest=False)
    for runs, words in ((["one"], "two or more"), (["one", "missing"], "risk.csv"), (["one", "two"], "in common")):
        monkeypatch.setattr(sys, "argv", ["risk", *(str(tmp_path / run) for run in runs)])
        assert risk.main() == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    write_csv(tmp_path / "one" / "attack" / "risk.csv", risk.COLUMNS, [{"record_id": "a1", "copies": 1}])
    with pytest.raises(UserError, match="knows of no extraction"):
        read_run(tmp_path / "one")
