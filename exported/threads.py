"""Work beside the caller's."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

Result = TypeVar("Result")


def in_thread(work: Callable[[], Result]) -> Future[Result]:
    """Begin work in a new thread. `result()` of what is returned waits for it, and raises what it raised.

    Not by an executor: a lasting one loses its threads where the process forks, and a new one refuses work once the main thread has
    ended. The thread keeps no process alive, so that a caller may leave without the result. Where the system gives no further thread,
    the work is done at once.
    """
    future: Future[Result] = Future()
    try:
        threading.Thread(target=_run, args=(work, future), daemon=True).start()
    except RuntimeError:
        _run(work, future)
    return future


def _run(work: Callable[[], Result], future: Future[Result]) -> None:
    try:
        future.set_result(work())
    except BaseException as error:  # the caller's to handle, as if it had done the work
        future.set_exception(error)
        del future  # or it, the error and this frame would hold one another, and with them all that the work had in hand
