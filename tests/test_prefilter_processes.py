"""One and two processes (gloo): the same scores, and one log."""

import json

import pytest

from tests.test_distributed import launch

pytestmark = [pytest.mark.multi, pytest.mark.slow]


def test_one_and_two_processes_agree(tmp_path):
    results = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        launch(world, "tests/distributed_prefilter.py", str(folder))
        results[world] = json.loads((folder / "result.json").read_text())
        assert results[world].pop("world") == world
        (log,) = (folder / "attack").iterdir()
        lines = [json.loads(line) for line in log.read_text().splitlines() if line]
        assert [len(line["scores"]) for line in lines] == [5, 7]
    for detector in ("wen", "webster"):
        assert results[1][detector] == pytest.approx(results[2][detector], rel=1e-5)
    assert results[1]["wen"] == pytest.approx([1.0] * 11 + [7.0], rel=1e-4)
