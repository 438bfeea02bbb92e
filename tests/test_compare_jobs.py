"""How the jobs of a comparison run: side by side, past failures, and never alone."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from launch import jobs
from launch.plan import Job
from launch.settings import LauncherConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def plain_python(monkeypatch):
    """Jobs here are short Python programs, started without a launcher."""
    monkeypatch.setattr(jobs, "launcher", lambda config, slot=0: ([sys.executable, "-c"], {"SLOT": str(slot)}))


def job(folder: Path, arm: str, program: str, parent: Job | None = None) -> Job:
    """``program`` may use DONE, the path of its report."""
    directory = folder / arm
    directory.mkdir(parents=True, exist_ok=True)
    head = f"import os, sys, time\nfrom pathlib import Path\nDONE = Path({str(directory / 'report.json')!r})\n"
    return Job(
        arm=arm, seed=0, config=SimpleNamespace(), tree=OmegaConf.create(), directory=directory, manifest=directory / "manifest.csv",
        command=[head + program], parent=parent,
    )  # fmt: skip


def run(folder: Path, made: list[Job], parallel: int = 1) -> tuple[dict[str, jobs.Outcome], list[str]]:
    said: list[str] = []
    outcomes = jobs.run_all(made, LauncherConfig(parallel=parallel), folder / "logs", said.append)
    return outcomes, said


def test_failures_do_not_stop_the_rest(tmp_path):
    good = job(tmp_path, "good", "DONE.touch()")
    bad = job(tmp_path, "bad", "print('step 3\\rerror: data.source: is gone (mend it)'); print('later'); sys.exit(2)")
    child = job(tmp_path, "child", "DONE.touch()", parent=bad)
    silent = job(tmp_path, "silent", "pass")  # ends well, but without a report
    last = job(tmp_path, "last", "DONE.touch()", parent=good)
    outcomes, said = run(tmp_path, [bad, good, silent, child, last])
    assert {label: each.status for label, each in outcomes.items()} == {
        "bad, seed 0": "failed", "good, seed 0": "done", "silent, seed 0": "failed",
        "child, seed 0": "missing", "last, seed 0": "done",
    }  # fmt: skip
    assert outcomes["bad, seed 0"].error == "error: data.source: is gone (mend it)"
    assert outcomes["child, seed 0"].error == "the training of bad, seed 0 failed"
    assert any("bad, seed 0: FAILED: error: data.source" in line for line in said)


def test_an_old_error_is_not_told_again(tmp_path):
    """Logs are appended over restarts."""
    only = job(tmp_path, "a", "print('error: data.source: is gone'); sys.exit(2)")
    run(tmp_path, [only])
    only.command[0] = only.command[0].replace("error: data.source: is gone", "Killed")
    assert run(tmp_path, [only])[0]["a, seed 0"].error == "Killed"


def test_finished_jobs_are_not_started_again(tmp_path):
    first = job(tmp_path, "a", "DONE.touch(); (DONE.parent / 'count').open('a').write('x')")
    run(tmp_path, [first])
    outcomes, said = run(tmp_path, [first])
    assert (first.directory / "count").read_text() == "x" and said == []
    assert outcomes["a, seed 0"] == jobs.Outcome("done", None, None)


def test_side_by_side_on_slots_of_their_own(tmp_path):
    """Each waits until the other has started: one after another they would both give up."""
    program = """
(DONE.parent / os.environ['SLOT']).touch()
other = DONE.parent.parent / NAME
for _ in range(200):
    if any(other.glob('[01]')):
        DONE.touch()
        break
    time.sleep(0.05)
"""
    made = [job(tmp_path, name, program.replace("NAME", repr(other))) for name, other in (("a", "b"), ("b", "a"))]
    outcomes, _ = run(tmp_path, made, parallel=2)
    assert {each.status for each in outcomes.values()} == {"done"}
    assert sorted(path.name for each in made for path in each.directory.glob("[01]")) == ["0", "1"]


def test_a_stop_lets_the_arms_save(tmp_path):
    program = """
import signal
signal.signal(signal.SIGTERM, lambda *_: ((DONE.parent / 'saved').touch(), sys.exit(1)))
(DONE.parent / 'ready').touch()
time.sleep(60)
"""
    only = job(tmp_path, "a", program)
    child = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(tmp_path), only.command[0]], cwd=ROOT, text=True, stdout=subprocess.PIPE
    )
    wait_for(only.directory / "ready")
    child.send_signal(signal.SIGTERM)
    assert child.communicate(timeout=60)[0].strip().endswith("stopped")
    assert (only.directory / "saved").exists()


STOPPED = """
import sys
from pathlib import Path
from types import SimpleNamespace
from launch import jobs
from launch.plan import Job
from launch.settings import LauncherConfig
jobs.launcher = lambda config, slot=0: ([sys.executable, "-c"], {})
folder = Path(sys.argv[1]) / "a"
only = Job(arm="a", seed=0, config=SimpleNamespace(), tree=None, directory=folder, manifest=folder, command=[sys.argv[2]])
try:
    jobs.run_all([only], LauncherConfig(), folder.parent / "logs", print)
except jobs.Stopped:
    print("stopped", flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux'")
def test_no_arm_outlives_a_killed_comparison(tmp_path):
    """SIGKILL leaves no time to pass anything on: the kernel tells the arm."""
    only = job(tmp_path, "a", "(DONE.parent / 'pid').write_text(str(os.getpid())); time.sleep(120)")
    child = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(tmp_path), only.command[0]], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    wait_for(only.directory / "pid", content=True)
    pid = int((only.directory / "pid").read_text())
    child.kill()
    child.wait()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and alive(pid):
        time.sleep(0.1)
    assert not alive(pid)


def test_a_directory_that_is_still_locked_is_waited_for(tmp_path):
    """A process of a killed comparison still saves its step: the next one must not fail on its lock."""
    only = job(tmp_path, "a", "(DONE.parent / 'started').touch(); DONE.touch()")
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, os, sys, time; h = os.open(sys.argv[1], os.O_CREAT | os.O_WRONLY); "
         "fcntl.flock(h, fcntl.LOCK_EX); print('held', flush=True); time.sleep(2)", str(only.directory / ".lock")],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    outcomes, _ = run(tmp_path, [only])
    assert holder.poll() is not None  # it had ended when the job was started
    holder.communicate()
    assert outcomes["a, seed 0"].status == "done"


def wait_for(file: Path, content: bool = False) -> None:
    deadline = time.monotonic() + 60
    while not file.exists() or (content and not file.read_text()):
        assert time.monotonic() < deadline, f"{file} never came"
        time.sleep(0.05)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
