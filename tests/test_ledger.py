"""The ledger: on disk before it counts, never shorter than what was booked, whatever a kill leaves of the file."""

import json
import os
import stat

import pytest

from defenses.errors import UserError
from defenses.ledger import Ledger, Mechanism, history

ONE = Mechanism("record", 1, "zero-out", 0.25, 2.0, 1e-3, 6.0, "0123456789ab", False)
TWO = Mechanism("record", 1, "zero-out", 0.25, 1.5, 1e-3, 6.0, "ba9876543210", False)


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl")


def book(ledger: Ledger, steps: int, mechanism=ONE, segment=0, process="a", first=0) -> bytes:
    """Books steps; returns the file."""
    for step in range(first, first + steps):
        ledger.append(mechanism, segment, step, process)
    return ledger.file.read_bytes()


def test_nothing_was_spent_without_a_file(ledger):
    assert ledger.lines() == [] and ledger.segments() == [] and ledger.processes() == 0


def test_every_step_is_one_line_that_can_be_read_back(ledger):
    text = book(ledger, 3).decode()
    assert text.count("\n") == 3 and text.endswith("\n")
    assert [json.loads(line)["step"] for line in text.splitlines()] == [0, 1, 2]
    (segment,) = ledger.segments()
    assert (segment.mechanism, segment.steps) == (ONE, 3)


def test_a_line_is_on_disk_when_append_returns(ledger, monkeypatch):
    """At the time of the fsync the whole line has left this process, and the descriptor is the ledger's."""
    synced = []

    def fsync(descriptor):
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            assert os.path.samestat(status, ledger.file.stat())
            synced.append(ledger.file.read_bytes())

    monkeypatch.setattr(os, "fsync", fsync)
    for step in range(3):
        after = book(ledger, 1, first=step)
        assert len(synced) == step + 1 and synced[-1] == after and after.count(b"\n") == step + 1


def test_the_name_of_a_new_file_is_on_disk(ledger, monkeypatch):
    """A file whose directory was not synced may be gone after a power failure, with all that it holds."""
    folders = []

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            folders.append(os.path.samestat(os.fstat(descriptor), ledger.file.parent.stat()))

    monkeypatch.setattr(os, "fsync", fsync)
    book(ledger, 2)
    assert folders and all(folders)


def test_a_failed_write_is_not_hidden(ledger, monkeypatch):
    """A full disk stops the run: the step must not be made."""

    def fsync(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="No space"):
        book(ledger, 1)


def test_truncated_at_every_byte_it_never_counts_fewer_steps_than_whole_lines(ledger):
    """Of a file cut after n bytes: at least the lines that are whole, at most one more, and never fewer for more bytes."""
    whole = book(ledger, 3)
    counts = []
    for size in range(len(whole) + 1):
        ledger.file.write_bytes(whole[:size])
        counts.append(len(ledger.lines()))
        lines = whole[:size].count(b"\n")
        assert lines <= counts[-1] <= lines + 1
    assert counts == sorted(counts) and counts[-1] == 3


def test_steps_add_up_over_a_cut_at_every_byte(ledger):
    """The next start counts what it finds; with the steps it books itself the file then holds exactly that many."""
    whole = book(ledger, 2)
    for size in range(len(whole) + 1):
        ledger.file.write_bytes(whole[:size])
        found = len(ledger.lines())
        book(ledger, 2, process="b")
        assert len(ledger.lines()) == found + 2, whole[:size]


def test_a_torn_last_line_counts_like_its_neighbour(ledger):
    text = book(ledger, 3)
    ledger.file.write_bytes(text[:-20])
    assert [segment.steps for segment in ledger.segments()] == [3]
    assert ledger.segments()[0].mechanism == ONE


def test_a_torn_line_stays_and_the_next_start_writes_below_it(ledger):
    text = book(ledger, 3)[:-20]
    ledger.file.write_bytes(text)
    assert book(ledger, 2, process="b").startswith(text + b"\n")
    assert len(ledger.lines()) == 5 and ledger.processes() == 2


def test_a_last_line_without_its_end_of_line_is_whole(ledger):
    ledger.file.write_bytes(book(ledger, 2)[:-1])
    assert len(ledger.lines()) == 2
    book(ledger, 1, process="b")
    assert len(ledger.lines()) == 3


@pytest.mark.parametrize("order", [(ONE, TWO), (TWO, ONE)])
def test_a_torn_line_between_settings_costs_what_the_dearer_of_them_costs(ledger, order):
    first = book(ledger, 2, order[0])
    ledger.file.write_bytes(first + book(ledger, 1, order[0], first=2)[len(first) : -30])
    book(ledger, 2, order[1], segment=1, process="b")
    steps = {segment.mechanism: segment.steps for segment in ledger.segments()}
    assert steps == {ONE: 2, TWO: 3}  # less noise at the same rate


def test_every_start_may_leave_one_torn_line(ledger):
    for start in range(6):
        ledger.file.write_bytes(book(ledger, 2, process=str(start))[:-9])
    assert len(ledger.lines()) == 12 and ledger.processes() == 6


@pytest.mark.parametrize("damage", [b"\x00", b"\xff", b"{", b" "])
@pytest.mark.parametrize("places", [(4,), (3, 4, 5)])
def test_a_damaged_middle_is_refused(ledger, damage, places):
    """A kill tears the last line of a process; a hole among the lines of one process is something else."""
    lines = book(ledger, 9).splitlines(keepends=True)
    for place in places:
        lines[place] = damage * (len(lines[place]) - 1) + b"\n"
    ledger.file.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match="ledger.jsonl.*cannot be read.*restore"):
        ledger.lines()


def test_a_lost_end_of_line_does_not_lose_a_step(ledger):
    """Two lines that became one are two steps, or the file is refused."""
    text = bytearray(book(ledger, 6))
    text[text.index(b"\n")] = ord(" ")
    ledger.file.write_bytes(text)
    try:
        assert len(ledger.lines()) >= 6
    except UserError as error:
        assert "cannot be read" in str(error)


@pytest.mark.parametrize("value", ['"much"', "null", "-1.0", "NaN", "[]"])
def test_a_value_that_cannot_be_is_told_in_one_line(ledger, value):
    text = book(ledger, 3).decode().replace('"noise_multiplier": 2.0', f'"noise_multiplier": {value}')
    ledger.file.write_text(text)
    with pytest.raises(UserError):
        history(ledger.segments())


def test_segments_follow_the_constants(ledger):
    """Consecutive equal constants are one segment, over processes too; going back to earlier ones opens another."""
    book(ledger, 2, ONE)
    book(ledger, 1, ONE, process="b")
    book(ledger, 3, TWO, segment=1, process="b")
    book(ledger, 4, ONE, segment=2, process="c")
    assert [(s.mechanism, s.steps) for s in ledger.segments()] == [(ONE, 3), (TWO, 3), (ONE, 4)]
    assert [(s.noise_multiplier, s.sample_rate, s.steps) for s in history(ledger.segments())] == [
        (2.0, 0.25, 3),
        (1.5, 0.25, 3),
        (2.0, 0.25, 4),
    ]


@pytest.mark.parametrize("field", Mechanism.__dataclass_fields__)
def test_every_constant_separates_segments(ledger, field):
    other = {**vars(ONE), field: {str: "other", bool: True, int: 2, float: 0.125}[type(getattr(ONE, field))]}
    book(ledger, 1, ONE)
    book(ledger, 1, Mechanism(**other))
    assert len(ledger.segments()) == 2


def test_starts_are_counted_by_process(ledger):
    for process in ("a", "b", "b", "c"):
        book(ledger, 1, process=process)
    assert ledger.processes() == 3


def test_a_line_holds_constants_and_nothing_else(ledger):
    """No seed, mask, realised batch size or loss has a place in it."""
    (line,) = book(ledger, 1).splitlines()
    assert set(json.loads(line)) == {
        "segment", "step", "process", "unit", "copies", "adjacency", "sample_rate", "noise_multiplier", "clip_norm",
        "divisor", "settings", "test",
    }  # fmt: skip
