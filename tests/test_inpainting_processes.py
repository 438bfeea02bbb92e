"""One and two processes (gloo): the same reconstructions, extrapolations, the same table of risks, on every rank."""

import json

import pytest

from tests.test_distributed import launch

pytestmark = [pytest.mark.multi, pytest.mark.slow]


def test_one_and_two_processes_agree(tmp_path):
    results = []
    for world in (1, 2):
        folder = tmp_path / str(world)
        folder.mkdir()
        launch(world, "tests/distributed_inpainting.py", str(folder))
        found = [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(world)]
        assert all(each.pop("world") == world for each in found)
        results += found
    assert results[0] == results[1] == results[2]
    assert [each["generations"] for each in results[0]["finetuning"]["weights"]] == [10, 10] and results[0][
        "candidates"
    ]
    assert len(results[0]["table"]) == 9 and results[0]["report"]["members"] == 5
    assert sum(row["verified"] for row in results[0]["risk"]) == 3
    assert {row["generation"].split("/")[0] for row in results[0]["risk"] if row["verified"]} == {
        f"prompt {row}" for row in range(3)
    }
