"""Runs the jobs of a comparison: side by side where asked, none lost when one fails, none left behind when this ends."""

import contextlib
import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from eval.wording import duration
from launch.plan import Job
from launch.settings import LauncherConfig, launcher
from train import cli

POLL_SECONDS = 0.2
LONGEST_FAREWELL = 300.0  # seconds that a stopped arm gets to end its step and save it
PR_SET_PDEATHSIG = 1  # prctl(2)


@dataclass
class Outcome:
    """How a job ended: "done", "failed" or "missing" (not tried, because its training failed or this was stopped)."""

    status: str
    seconds: float | None = None  # None: it was done before
    error: str | None = None  # the line that it ended with


@dataclass
class _Running:
    job: Job
    process: subprocess.Popen
    slot: int
    written: int  # bytes of the log before this start
    started: float = field(default_factory=time.monotonic)


class Stopped(Exception):
    """SIGTERM or SIGINT came; what was running has saved its state. ``outcomes``: of what had ended, or run, until then."""

    def __init__(self, outcomes: dict[str, Outcome]):
        self.outcomes = outcomes
        super().__init__("stopped by a signal")


def run_all(jobs: list[Job], config: LauncherConfig, logs: Path, say: Callable[[str], None]) -> dict[str, Outcome]:
    """Runs what is not done yet; outcomes by `Job.label`.

    A job whose training failed is not tried; all others are. Each job's output is appended to ``logs/ARM-sSEED.log``.

    Raises:
        Stopped: by a signal.
    """
    outcomes = {job.label: Outcome("done") for job in jobs if job.done}
    waiting = [job for job in jobs if job.label not in outcomes]
    running: list[_Running] = []
    told: set[str] = set()  # jobs that were said to wait
    logs.mkdir(parents=True, exist_ok=True)
    with _signals() as received:
        try:
            while waiting or running:
                _start_ready(waiting, running, outcomes, config, logs, say, told)
                for each in [each for each in running if each.process.poll() is not None]:
                    running.remove(each)
                    outcome = outcomes[each.job.label] = _outcome(each, logs)
                    text = "done" if outcome.status == "done" else f"FAILED: {outcome.error}"
                    say(f"{each.job.label}: {text}, {duration(outcome.seconds)} ({len(outcomes)} of {len(jobs)})")
                if received:
                    spent = {each.job.label: Outcome("missing", time.monotonic() - each.started) for each in running}
                    raise Stopped({**outcomes, **spent})
                time.sleep(POLL_SECONDS)
        finally:
            _end([each.process for each in running])
    return outcomes


def _start_ready(
    waiting: list[Job],
    running: list[_Running],
    outcomes: dict[str, Outcome],
    config: LauncherConfig,
    logs: Path,
    say: Callable[[str], None],
    told: set[str],
) -> None:
    """Starts jobs while there are free places; drops those whose training failed."""
    for job in list(waiting):
        parent = outcomes.get(job.parent.label) if job.parent else Outcome("done")
        if parent is None:
            continue
        if parent.status != "done":
            waiting.remove(job)
            outcomes[job.label] = Outcome("missing", error=f"the training of {job.parent.label} failed")
            continue
        free = sorted(set(range(config.parallel)) - {each.slot for each in running})
        if not free:
            return
        if not _unlocked(job):  # a process of an earlier, killed comparison still saves its last step
            if job.label not in told:
                told.add(job.label)
                say(f"{job.label}: waits for another process that works in {job.directory}")
            continue
        waiting.remove(job)
        say(f"{job.label}: started")
        log = log_of(job, logs)
        written = log.stat().st_size if log.exists() else 0
        running.append(_Running(job, _start(job, config, free[0], log), free[0], written))


def log_of(job: Job, logs: Path) -> Path:
    return logs / f"{job.arm}-s{job.seed}.log"


def _start(job: Job, config: LauncherConfig, slot: int, file: Path) -> subprocess.Popen:
    words, environment = launcher(config, slot)
    own = {**os.environ, **environment, cli.DIES_WITH_PARENT: str(os.getpid())}
    own.setdefault("OMP_NUM_THREADS", "1")  # the trainer sets its threads itself
    with file.open("ab") as log:
        return subprocess.Popen(
            [*words, *job.command],
            env=own,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a signal to this process is passed on once, by us
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )


def _die_with_parent() -> None:
    """In the child: the launcher is killed with us; the arm itself then saves its step and ends (`train.cli.start`)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _unlocked(job: Job) -> bool:
    """Whether no process works in the job's directory (`train.runlog.RunDirectory` holds a lock while it lives)."""
    try:
        handle = os.open(job.directory / ".lock", os.O_WRONLY)
    except OSError:
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    finally:
        os.close(handle)


def _outcome(each: _Running, logs: Path) -> Outcome:
    seconds = time.monotonic() - each.started
    if each.process.returncode == 0 and each.job.done:
        return Outcome("done", seconds)
    return Outcome("failed", seconds, last_words(log_of(each.job, logs), each.written))


def last_words(log: Path, start: int) -> str:
    """The last line beginning with ``error:``, else the last line, of what a log got after its first ``start`` bytes."""
    with log.open("rb") as file:
        file.seek(start)
        text = file.read().decode(errors="replace")
    lines = [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return ([*lines[-1:], *errors[-1:]] or ["it printed nothing"])[-1][:500]


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGTERM and SIGINT."""
    received: list[int] = []
    kinds = (signal.SIGTERM, signal.SIGINT)
    before = {kind: signal.signal(kind, lambda number, frame: received.append(number)) for kind in kinds}
    try:
        yield received
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _end(processes: list[subprocess.Popen]) -> None:
    """Asks what is running to save its step and end, and waits for it: the launcher ends at once, the arm itself later."""
    alive = [process for process in processes if _signalled(process.pid, signal.SIGTERM)]
    deadline = time.monotonic() + LONGEST_FAREWELL
    while alive and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        for process in alive:
            process.poll()  # a group whose launcher was not waited for never looks empty
        alive = [process for process in alive if _signalled(process.pid, 0)]
    for process in alive:
        _signalled(process.pid, signal.SIGKILL)


def _signalled(group: int, kind: int) -> bool:
    """Whether the process group still has a living member."""
    try:
        os.killpg(group, kind)
    except ProcessLookupError:
        return False
    members = [state for state, own in _processes() if own == group]
    return not members or any(state not in "ZX" for state in members)  # without /proc: as the signal says


def _processes() -> Iterator[tuple[str, int]]:
    """State and group of every process, from /proc; none where there is no such thing. An unreaped orphan is a zombie."""
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, group = file.read_text().rpartition(")")[2].split()[:3]
            yield state, int(group)
