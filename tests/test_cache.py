"""Arrays that several processes fill together: a kill loses little and changes nothing."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from train import cache

SHAPE, BATCH = (23, 2, 3), 4


class Killed(BaseException):
    """Nothing tidies up after it, as after SIGKILL."""


class Encoder:
    """A row's values are a function of the row; the call number ``last`` + 1 is a kill."""

    def __init__(self, last: int = 10**9):
        self.last, self.rows = last, []

    def __call__(self, places: np.ndarray) -> torch.Tensor:
        if len(self.rows) == self.last:
            raise Killed
        self.rows.append(places.tolist())
        return torch.from_numpy(expected()[places])


def expected() -> np.ndarray:
    return np.random.Generator(np.random.Philox(3)).standard_normal(SHAPE).astype(np.float32)


def killed(folder, ranks: int, each: int) -> None:
    """What ``ranks`` processes leave that are killed after ``each`` blocks, and garbage where the next block was being written."""
    partial = folder / ".latents-0123456789ab.npy.tmp"
    finished = cache._begun(partial, SHAPE)
    blocks = [(start, min(start + BATCH, SHAPE[0])) for start in range(0, SHAPE[0], BATCH)]
    missing = [block for block in blocks if block not in finished]
    for rank in range(ranks):
        with pytest.raises(Killed):
            cache._fill(partial, missing[rank::ranks], Encoder(each), rank)
    table = np.lib.format.open_memmap(partial, "r+")
    table[missing[ranks * each][0] :][:2] = np.nan
    table.flush()
    with partial.with_name(f"{partial.name}.0").open("a") as notes:
        notes.write("20 2")  # of "20 23\\n"


@pytest.mark.parametrize(
    ("stops", "left"), [([(1, 2)], 4), ([(2, 1)], 4), ([(2, 1), (1, 1), (3, 0)], 3), ([(1, 0)], 6)]
)
def test_a_killed_call_goes_on_with_any_number_of_processes(tmp_path, monkeypatch, stops, left):
    monkeypatch.setattr(cache, "NOTE_EVERY_SEC", 0.0)
    for ranks, each in stops:
        killed(tmp_path, ranks, each)
    encoder, path = Encoder(), tmp_path / "latents-0123456789ab.npy"
    table = cache._filled(path, SHAPE, encoder, BATCH, Accelerator(cpu=True))
    assert np.array_equal(table, expected())
    assert len(encoder.rows) == left
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert np.array_equal(cache._filled(path, SHAPE, Encoder(0), BATCH, Accelerator(cpu=True)), expected())


def test_notes_without_their_file_count_for_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "NOTE_EVERY_SEC", 0.0)
    killed(tmp_path, 2, 1)
    (tmp_path / ".latents-0123456789ab.npy.tmp").unlink()
    path = tmp_path / "latents-0123456789ab.npy"
    assert np.array_equal(cache._filled(path, SHAPE, Encoder(), BATCH, Accelerator(cpu=True)), expected())


def test_blocks_are_noted_no_more_often_than_they_are_flushed(tmp_path):
    partial = tmp_path / ".latents-0123456789ab.npy.tmp"
    cache._begun(partial, SHAPE)
    with pytest.raises(Killed):
        cache._fill(partial, [(0, 4), (4, 8)], Encoder(1), 0)
    assert cache._begun(partial, SHAPE) == set()  # the ten seconds are not over


def test_other_versions_of_an_array_are_removed_and_nothing_else(tmp_path):
    gone = ["latents-ffffffffffff.npy", ".latents-eeeeeeeeeeee.npy.tmp", ".latents-eeeeeeeeeeee.npy.tmp.notes"]
    gone.append(".latents-eeeeeeeeeeee.npy.tmp.12")
    stay = ["text-ffffffffffff.npy", "latents-mine.npy", "latents-ffffffffffff.npy.bak", "notes.txt"]
    for name in gone + stay:
        (tmp_path / name).touch()
    path = tmp_path / "latents-0123456789ab.npy"
    with pytest.raises(Killed):
        cache._filled(path, SHAPE, Encoder(3), BATCH, Accelerator(cpu=True))
    assert all((tmp_path / name).exists() for name in gone + stay)  # until the new one is complete
    cache._filled(path, SHAPE, Encoder(), BATCH, Accelerator(cpu=True))
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([path.name, *stay])
