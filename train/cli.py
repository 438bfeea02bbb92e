"""What the two entry points share: arguments, errors as one line, the accelerator."""

import argparse
import ctypes
import errno
import os
import shlex
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

LONGEST_WAIT = timedelta(hours=6)  # of one rank for another; the default of 10 minutes is too short for large data sets
DIES_WITH_PARENT = (
    "DEFFUSE_DIES_WITH_PARENT"  # environment: get SIGTERM when the launcher dies, so that no arm runs on alone
)
ROOT = Path(__file__).resolve().parent.parent  # of the repository


@dataclass
class Arguments:
    """The command line: a file, overrides ``key=value``, whether to stop after the plan."""

    config: Path | None
    dry_run: bool
    overrides: list[str]


def parse(description: str) -> Arguments:
    """Reads ``sys.argv``; bad flags end with exit status 2."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="YAML file (default: configs/quickstart.yaml)")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the plan, do nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, e.g. train.steps=2000")
    parsed = parser.parse_intermixed_args()
    return Arguments(parsed.config, parsed.dry_run, parsed.overrides)


def command_line() -> str:
    """The command as the user gave it (processes and launch options are recorded by world size)."""
    return "accelerate launch " + shlex.join([os.path.relpath(sys.argv[0]), *sys.argv[1:]])


def check_libraries() -> None:
    """Ends the process with one clear line where torch and torchvision do not fit each other.

    A CPU build of torch beside a CUDA build of torchvision fails on ``torchvision::nms``, and then `import diffusers` fails
    with it, far from the cause.
    """
    import torch

    try:
        import torchvision
    except Exception as error:  # RuntimeError, ImportError or OSError, depending on what does not fit
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        fail(
            f"torchvision does not match torch {torch.__version__}: {reason} (install both from the same index, e.g. pip install torch torchvision)"
        )
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 11):
        fail(
            f"torch {torch.__version__} is too old, torchvision {torchvision.__version__} with it (install torch>=2.11)"
        )


def fail(message: str) -> None:
    """Prints one line on the first process and exits with status 2."""
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def run(main: Callable[[Arguments], int], arguments: Arguments) -> None:
    """Calls ``main`` and exits with its status; a `UserError` becomes one line and status 2."""
    from defenses.errors import UserError

    try:
        status = main(arguments)
    except UserError as error:
        fail(str(error))
    except Exception as error:
        if not is_disk_full(error):
            raise
        fail(
            "run.output_dir: the disk is full; nothing that was complete is lost (make room, then give the same command)"
        )
    sys.exit(status)


def is_disk_full(error: BaseException) -> bool:
    """Whether a write failed for want of room; safetensors says so in words only."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    text = str(error)
    cause = error.__cause__ or error.__context__
    return "No space left on device" in text or (cause is not None and is_disk_full(cause))


def die_with_parent() -> None:
    """Asks Linux for SIGTERM when the process that started this one dies, where the environment names the comparison's process.

    To be called before the heavy imports: a comparison that is killed while they last could not tell this process any more.
    """
    comparison = os.environ.get(DIES_WITH_PARENT)
    if comparison is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    try:
        os.kill(int(comparison), 0)
    except ProcessLookupError:
        sys.exit(1)  # it died before we could ask


def start(config: SimpleNamespace, project: Path | None = None, trackers: list[str] | None = None):
    """The Accelerator, with quiet libraries and, on CPUs, all cores shared among this machine's processes.

    `accelerate launch` and torchrun give every process a single thread where there is no GPU, which would halve the speed on two cores.
    They do so by OMP_NUM_THREADS, and theirs cannot be told from the user's: it is respected where neither started this process.
    `run.cpu_threads` always is.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
    from diffusers.utils import logging
    from transformers.utils import logging as transformers_logging

    from defenses.errors import UserError

    threads = config.run.cpu_threads or _chosen_threads()  # before accelerate adds to the environment
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    folder = ProjectConfiguration(project_dir=str(project), logging_dir=str(project / "trackers")) if project else None
    try:
        accelerator = Accelerator(
            mixed_precision="no",
            log_with=trackers or None,
            project_config=folder,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
        )
    except (ValueError, ImportError) as error:
        raise UserError("train.trackers", str(error).splitlines()[0], "install it, or train.trackers=[]") from error
    if len(accelerator.log_with) < len(trackers or []):
        raise UserError(
            "train.trackers", f"one of {', '.join(trackers)} is not installed", "install it, or train.trackers=[]"
        )
    kind = accelerator.distributed_type.value
    if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        raise UserError("accelerate", f"{kind} is not supported", "use a launch file of launch/accelerate/")
    if accelerator.device.type == "cpu":
        local = int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(threads or max(1, cores // local))
    return accelerator


def _chosen_threads() -> int | None:
    """OMP_NUM_THREADS as the user set it; None where it is not set or may be a launcher's."""
    chosen = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # further ones are of nested regions
    launched = "LOCAL_RANK" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ
    return int(chosen) if chosen.isdigit() and int(chosen) and not launched else None
