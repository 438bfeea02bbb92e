"""What the entry points do with errors that are the user's to mend."""

import errno

import pytest

from defenses.errors import UserError
from train import cli

ARGUMENTS = cli.Arguments(None, False, [])


def raising(error: BaseException):
    def main(arguments):
        raise error

    return main


def nested() -> RuntimeError:
    """What a writer makes of a failed write: the system's error is only the cause."""
    outer = RuntimeError("cannot save")
    outer.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    return outer


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),  # safetensors
        nested(),
    ],
    ids=["system", "quota", "safetensors", "nested"],
)
def test_a_full_disk_is_one_line(error, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(raising(error), ARGUMENTS)
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "error: run.output_dir: the disk is full; nothing that was complete is lost (make room, then give the same command)\n"
    )


def test_other_errors_are_not_hidden():
    with pytest.raises(OSError, match="denied"):
        cli.run(raising(PermissionError(errno.EACCES, "Permission denied")), ARGUMENTS)


def test_a_users_mistake_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.run(raising(UserError("data.source", "is gone", "mend it")), ARGUMENTS)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: data.source: is gone (mend it)\n"


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "3,2"}, 3),
        ({}, None),
        ({"OMP_NUM_THREADS": "0"}, None),
        ({"OMP_NUM_THREADS": "1", "LOCAL_RANK": "0"}, None),  # torchrun sets both
        ({"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}, None),  # so does `accelerate launch`
    ],
)
def test_threads_of_the_environment_count_where_no_launcher_set_them(monkeypatch, environment, threads):
    for name in ("OMP_NUM_THREADS", "LOCAL_RANK", "ACCELERATE_MIXED_PRECISION"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli._chosen_threads() == threads
