"""Work on several ranks that fails on all of them or on none."""

from collections.abc import Callable
from typing import TypeVar

from accelerate.utils import broadcast_object_list, gather_object

from defenses.errors import UserError

T = TypeVar("T")


def together(accelerator, work: Callable[[], T]) -> T:
    """Runs ``work`` on every rank; if it fails on one, it fails on all, so that none waits for ever."""
    result, failure = None, None
    try:
        result = work()
    except Exception as error:
        failure = error
    plain = None
    if failure is not None:
        is_user = isinstance(failure, UserError)
        plain = (failure.key, failure.problem, failure.remedy) if is_user else repr(failure)
    failures = [(rank, each) for rank, each in enumerate(gather_object([plain])) if each is not None]
    if failure is not None:
        raise failure
    if failures:
        rank, other = failures[0]
        raise UserError(*other) if isinstance(other, tuple) else RuntimeError(f"rank {rank} failed: {other}")
    return result


def on_main(accelerator, work: Callable[[], T]) -> T:
    """The result of ``work`` from the main process, on every rank: for what is quick and must agree to the bit."""
    result = together(accelerator, lambda: work() if accelerator.is_main_process else None)
    return broadcast_object_list([result])[0]
