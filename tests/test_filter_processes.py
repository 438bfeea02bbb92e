"""One and two processes (gloo): the same threshold, images and counts; copies by correlation likewise."""

import json

import pytest

from tests.test_distributed import launch

pytestmark = [pytest.mark.multi, pytest.mark.slow]


def test_one_and_two_processes_agree(tmp_path):
    results = {}
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        launch(world, "tests/distributed_filter.py", str(folder))
        results[world] = json.loads((folder / "result.json").read_text())
        assert results[world].pop("world") == world
        lines = [file.read_text().split() for file in sorted((folder / "output_filter").glob("draws-*.jsonl"))]
        assert len(lines) == world
    assert results[1] == results[2]
    findings = results[1]["findings"]
    assert (findings["generations"], findings["withheld"]) == (14, 3) and findings["flagged"] >= 6
    assert findings["redrawn"] >= 3 + 3 * 2
    assert results[1]["correlation"]["verified"] >= 5 and results[1]["correlation"]["control"]["verified"] >= 15
