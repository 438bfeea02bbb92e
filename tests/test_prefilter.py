"""The pre-filter: recall by brute force, order of prompts, scores that survive a stop, a whole pipeline from the command line."""

import csv
import json
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator

from defenses.errors import UserError
from eval import prefilter
from eval import run as evaluation
from eval.config import AttackConfig, GenerateConfig, check
from eval.detectors import PrefilterConfig
from eval.prefilter import SHARES, measured, prompt_scores, table
from eval.samples import prompts_of
from eval.suite import Scene
from tests.test_config import load
from tests.test_detectors import SIZES, planted
from tests.test_entry_points import SMALL_DATA, evaluate, folders, pictures, text_pipeline  # noqa: F401
from train import cli
from train.data import Dataset, Record


def dataset_of(captions, copies=None, block=None):
    records = [
        Record(
            f"{row:04d}", f"{row}.png", split="train", kept=True, cluster=row, copies=copies[row] if copies else 1,
            block=block[row] if block else row, caption=caption,
        )
        for row, caption in enumerate(captions)
    ]  # fmt: skip
    return Dataset(records, np.zeros((len(captions), 1, 4, 4), np.uint8))


def clique(number, flagged, verified=False):
    return {"prompt": f"{number:05d}", "flagged": flagged, "verified": verified}


def rows_of(scores, hits):
    names = [f"p{place}" for place in range(len(scores))]
    cliques = [clique(place, place in hits) for place in range(len(scores))]
    return table(dict(zip(names, scores, strict=True)), names, cliques, dataset_of(["other"]))


@pytest.mark.parametrize("prompts", [7, 20, 133])
def test_recall_is_that_of_brute_force(prompts):
    random = np.random.default_rng(prompts)
    scores = random.normal(size=prompts).round(1).tolist()  # with equal ones
    hits = set(random.choice(prompts, 5, replace=False).tolist())
    rows = rows_of(scores, hits)
    found = measured(rows, "flagged", np.arange(prompts), 0)
    for share in SHARES:
        most = int(np.ceil(round(share * prompts, 6)))
        # a threshold that lets at most so many prompts through, and lets none of several equal ones through alone
        allowed = [s for s in sorted(set(scores)) if sum(other >= s for other in scores) <= most]
        caught = [place for place in hits if allowed and scores[place] >= allowed[0]]
        assert found["recall"][f"{share:g}"] == pytest.approx(len(caught) / 5)
        low, high = found["recall_ci95"][f"{share:g}"]
        assert 0 <= low <= len(caught) / 5 <= high <= 1
    pairs = [
        (scores[a] > scores[b]) + (scores[a] == scores[b]) / 2 for a in hits for b in range(prompts) if b not in hits
    ]
    assert found["auc"]["auc"] == pytest.approx(np.mean(pairs))
    assert found["auc"]["ci95"][0] < found["auc"]["auc"] < found["auc"]["ci95"][1]


def test_a_perfect_and_a_blind_filter():
    perfect = measured(rows_of([9.0, 8.0, *[1.0] * 18], {0, 1}), "flagged", np.arange(20), 0)
    assert [perfect["recall"][f"{share:g}"] for share in SHARES] == [0.5, 0.5, 1, 1, 1]
    assert perfect["auc"]["auc"] == 1
    blind = measured(rows_of([1.0] * 20, {0, 1}), "flagged", np.arange(20), 0)  # equal scores choose nobody
    assert set(blind["recall"].values()) == {0.0} and blind["auc"]["auc"] == 0.5
    everyone = measured(rows_of([1.0, 2.0], {0, 1}), "flagged", np.arange(2), 0)
    assert everyone["auc"] is None and everyone["recall"]["0.5"] == 0.5
    assert measured(rows_of([1.0, 2.0], set()), "flagged", np.arange(2), 0) is None


def test_prompts_of_one_patient_count_together():
    """Twelve prompts of two patients, all of one of them flagged: the interval is that of two people, not of twelve."""
    rows = rows_of([float(12 - place) for place in range(12)], set(range(6)))
    alone = measured(rows, "flagged", np.arange(12), 0)["auc"]
    together = measured(rows, "flagged", np.repeat([0, 1], 6), 0)["auc"]
    assert alone["auc"] == together["auc"] == 1 and together["ci95"][0] < alone["ci95"][0] - 0.2


def test_the_table_joins_scores_copies_and_the_attack():
    dataset = dataset_of(["a", "b", "a", None], copies=[2, 1, 5, 9])
    cliques = [clique(1, True, True), {"prompt": "b", "flagged": False, "verified": False}]
    rows = table({"a": 1.0, "b": 3.0, "free": 2.0, "left out": 3.0}, ["b", "free"], cliques, dataset)
    assert [(row["prompt"], row["rank"], row["number"]) for row in rows] == [
        ("b", 2, 0), ("left out", 2, None), ("free", 3, 1), ("a", 4, None),
    ]  # fmt: skip
    assert [row["copies"] for row in rows] == [1, None, None, 5]
    assert [(row["flagged"], row["verified"]) for row in rows] == [
        (False, False),
        (None, None),
        (True, True),
        (None, None),
    ]


def config_of(order="copies", seed=3, **settings):
    generate = GenerateConfig(order=order, max_prompts=2, candidates=4 if order == "prefilter" else None)
    attack = AttackConfig(prefilter=PrefilterConfig(**{"draws": 1} | settings))
    return SimpleNamespace(generate=generate, attack=attack, run=SimpleNamespace(seed=seed))


CAPTIONS = ["x", "y", "another one", "z", "a memorised prompt"]


def test_candidates_by_copies_then_the_highest_scores():
    dataset = dataset_of(CAPTIONS, copies=[5, 4, 3, 2, 1])
    asked = []

    def by_size(prompts):
        asked.append(prompts)
        return [SIZES.get(prompt, 1.0) for prompt in prompts]

    assert prompts_of(config_of().generate, dataset) == ["x", "y"]
    assert prompts_of(config_of("prefilter").generate, dataset, by_size) == ["another one", "x"]
    assert asked == [["x", "y", "another one", "z"]]
    everyone = GenerateConfig(order="prefilter", max_prompts=2)
    assert prompts_of(everyone, dataset, by_size) == ["a memorised prompt", "another one"]


def scored(folder, prompts, config, monkeypatch, calls):
    real = prefilter.score
    monkeypatch.setattr(
        prefilter, "score", lambda model, some, *rest: calls.append(list(some)) or real(model, some, *rest)
    )
    target = SimpleNamespace(output=SimpleNamespace(attack=folder))
    found = prompt_scores(target, planted(), config, Accelerator(cpu=True), prompts)
    monkeypatch.setattr(prefilter, "score", real)
    return found


def test_what_was_scored_is_not_scored_again(tmp_path, monkeypatch):
    monkeypatch.setattr(prefilter, "_BLOCK", 2)
    calls = []
    first = scored(tmp_path, CAPTIONS, config_of(), monkeypatch, calls)
    assert first == pytest.approx([SIZES.get(prompt, 1.0) for prompt in CAPTIONS], rel=1e-4)
    assert calls == [CAPTIONS[:2], CAPTIONS[2:4], CAPTIONS[4:]]
    (log,) = tmp_path.iterdir()
    whole = log.read_text()
    log.write_text(whole[: whole.index("another one") + 4])  # killed while it wrote the second block
    assert scored(tmp_path, CAPTIONS, config_of(), monkeypatch, calls) == first
    assert calls[3:] == [CAPTIONS[2:4], CAPTIONS[4:]]
    assert scored(tmp_path, CAPTIONS[::-1], config_of(batch_size=1), monkeypatch, calls) == first[::-1]
    assert len(calls) == 5
    scored(tmp_path, CAPTIONS, config_of(seed=4), monkeypatch, calls)  # another noise
    assert len(calls) == 8


def test_an_order_that_images_may_follow_is_not_changed(tmp_path, monkeypatch):
    scored(tmp_path, CAPTIONS, config_of("prefilter"), monkeypatch, [])
    scored(tmp_path, CAPTIONS, config_of("prefilter"), monkeypatch, [])
    with pytest.raises(UserError, match=r"attack\.prefilter\.detector.*'wen', now 'webster'"):
        scored(tmp_path, CAPTIONS, config_of("prefilter", detector="webster"), monkeypatch, [])
    scored(tmp_path, CAPTIONS, config_of("copies", detector="webster"), monkeypatch, [])


def scene_of(folder, cliques, order="copies", captions=CAPTIONS):
    output = SimpleNamespace(attack=folder)
    extraction = None if cliques is None else SimpleNamespace(cliques=cliques)
    config = config_of(order)
    config.generate.max_prompts = len(captions) if order == "copies" else 2
    return Scene(
        SimpleNamespace(output=output, dataset=dataset_of(captions), run=None),
        config,
        Accelerator(cpu=True),
        planted(),
        None,
        extraction,
    )


def test_the_part_of_the_report(tmp_path):
    cliques = [clique(4, True, True), clique(2, True), *(clique(place, False) for place in (0, 1, 3))]
    finding = prefilter.run(scene_of(tmp_path, cliques))
    report = finding.report
    assert (report["prompts"], report["attacked"], report["flagged"], report["verified"]) == (5, 5, 2, 1)
    assert report["recall"]["flagged"] == {"0.01": 0.5, "0.05": 0.5, "0.1": 0.5, "0.25": 1.0, "0.5": 1.0}
    assert set(report["recall"]["verified"].values()) == {1.0}
    assert report["auc"]["flagged"]["auc"] == report["auc"]["verified"]["auc"] == 1.0
    assert report["reason"] is None and report["seconds"] > 0 and report["detector"] == "wen"
    assert report["settings"] == {"detector": "wen", "draws": 1, "steps": 1, "guidance": 7.5, "seed": 3}
    columns, rows = finding.tables["prompt_scores.csv"]
    assert [row["prompt"] for row in rows[:2]] == ["a memorised prompt", "another one"] and set(rows[0]) == set(columns)
    json.dumps(report, allow_nan=False)


def test_no_recall_without_an_attack_on_all_prompts(tmp_path):
    for number, (cliques, order, words) in enumerate(
        [
            (None, "copies", "did not run"),
            ([clique(0, True), clique(1, False)], "prefilter", "2 of 4 scored prompts"),
            ([clique(place, False) for place in range(5)], "copies", "flagged no prompt"),
        ]
    ):
        report = prefilter.run(scene_of(tmp_path / str(number), cliques, order)).report
        assert words in report["reason"]
        assert report["recall"] == report["auc"] == {"flagged": None, "verified": None}


def test_a_pipeline_from_the_command_line(folders, tmp_path, monkeypatch):  # noqa: F811
    """The order is that of the scores, a second look draws and scores nothing, and the report says what is known."""
    text_pipeline(tmp_path / "model")
    (tmp_path / "prompts.txt").write_text("an x-ray\na heart\nlungs\n")
    arguments = [
        f"pipeline={tmp_path / 'model'}", f"data.source={folders[0]}", f"data.heldout_source={folders[1]}",
        f"generate.prompts={tmp_path / 'prompts.txt'}", "generate.per_prompt=4", "generate.max_prompts=2",
        "generate.order=prefilter", "attack.prefilter={draws: 1}", f"run.output_dir={tmp_path}", "run.name=text",
    ]  # fmt: skip
    report = evaluate(*arguments)
    part = report["privacy"]["prefilter"]
    assert (part["prompts"], part["attacked"]) == (3, 2) and "2 of 3" in part["reason"]
    folder = tmp_path / "text"
    with (folder / "attack" / "prompt_scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["score"]) for row in rows] == sorted((float(row["score"]) for row in rows), reverse=True)
    assert [row["number"] for row in rows] == ["0", "1", ""]
    with (folder / "generations" / "index.csv").open() as file:
        drawn = {row["file"].split("/")[0]: row["condition"] for row in csv.DictReader(file)}
    assert drawn == {"00000": rows[0]["prompt"], "00001": rows[1]["prompt"]}
    calls = count()
    monkeypatch.setattr(prefilter, "score", lambda *_: next(calls))
    (folder / "report.json").unlink()
    assert evaluate(*arguments)["privacy"]["prefilter"] == part and next(calls) == 0
    assert 'id="prefilter"' in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["generations=a", "attack.prefilter={}"], "attack.prefilter"),
        (["pipeline=a", "generate.order=prefilter"], "generate.order"),
        (["pipeline=a", "generate.candidates=3", "generate.max_prompts=4"], "generate.candidates"),
    ],
)
def test_refused_before_any_work(overrides, key, tmp_path):
    given = ["data.source=phantom", "data.image_size=16", SMALL_DATA[-1], f"run.output_dir={tmp_path}"]
    with pytest.raises(UserError) as caught:
        evaluation.main(cli.Arguments(None, False, [*given, *overrides]))
    assert caught.value.key == key and not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["gan", "pixel"])
def test_models_without_prompts_are_refused(family):
    with pytest.raises(UserError, match=r"attack\.prefilter"):
        check(load(f"model.family={family}", "attack.prefilter={}"))


def test_prompts_of_an_earlier_file_are_in_no_table(tmp_path, monkeypatch):
    """Their scores stay in the log; what was not asked about now was not attacked, and says nothing of the recall."""
    other = [f"an earlier prompt {number}" for number in range(7)]
    scored(tmp_path, [*other, CAPTIONS[0]], config_of(), monkeypatch, [])
    cliques = [clique(4, True), *(clique(place, False) for place in range(4))]
    finding = prefilter.run(scene_of(tmp_path, cliques))
    rows = finding.tables["prompt_scores.csv"][1]
    assert sorted(row["prompt"] for row in rows) == sorted(CAPTIONS)
    assert (finding.report["prompts"], finding.report["attacked"], finding.report["reason"]) == (5, 5, None)
    ordered = prefilter.run(scene_of(tmp_path / "ordered", [clique(0, True), clique(1, False)], "prefilter"))
    assert ordered.report["prompts"] == 4  # candidates that were not attacked are there
