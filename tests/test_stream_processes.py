"""One and two processes (gloo), and two of which one dies and one that goes on alone: the same streamed attack."""

import json

import pytest

from tests.test_distributed import launch

pytestmark = [pytest.mark.multi, pytest.mark.slow]
SCRIPT = "tests/distributed_stream.py"


def results(folder, world) -> list[dict]:
    return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(world)]


def test_processes_agree_and_one_goes_on_where_two_stopped(tmp_path):
    folders = {name: tmp_path / name for name in ("one", "two", "killed")}
    for folder in folders.values():
        folder.mkdir()
    launch(1, SCRIPT, str(folders["one"]))
    launch(2, SCRIPT, str(folders["two"]))
    assert launch(2, SCRIPT, str(folders["killed"]), "2", check=False).returncode != 0
    done = len(list((folders["killed"] / "prompts").rglob("0*.json")))
    assert not (folders["killed"] / "result-0.json").exists() and done >= 2
    launch(1, SCRIPT, str(folders["killed"]))
    one, (first, second), resumed = (
        results(folders["one"], 1)[0],
        results(folders["two"], 2),
        results(folders["killed"], 1)[0],
    )
    assert one.pop("passes") == 7 and (first.pop("passes"), second.pop("passes")) == (4, 3)
    assert resumed.pop("passes") <= 7 - 2  # at least what the process that died had saved
    assert one == first == second == resumed
    assert one["report"]["verified"] == 2 and one["report"]["candidates"] == 3
