from __future__ import annotations

import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest

from smc.exported.threads import in_thread


def test_work_is_done_in_another_thread() -> None:
    here = threading.get_ident()
    assert in_thread(threading.get_ident).result() != here


def test_what_it_raises_is_raised_where_the_result_is_asked_for() -> None:
    future = in_thread(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        future.result()


def test_what_failed_is_freed_with_its_error() -> None:
    class Large:
        pass

    made = []

    def work() -> None:
        large = Large()
        made.append(weakref.ref(large))
        raise ValueError("failed")

    gc.disable()  # which would free it sooner or later
    try:
        with pytest.raises(ValueError, match="failed"):
            in_thread(work).result()
        deadline = time.monotonic() + 60
        while made[0]() is not None and time.monotonic() < deadline:
            time.sleep(0.001)  # the thread is about to end
        assert made[0]() is None
    finally:
        gc.enable()


def test_where_no_thread_begins_the_work_is_done_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    assert in_thread(threading.get_ident).result() == threading.get_ident()


def test_it_works_after_the_main_thread_has_ended() -> None:
    script = """
import threading, time
from smc.exported.threads import in_thread
def late():
    threading.main_thread().join()
    time.sleep(0.2)
    print(in_thread(lambda: "done").result())
threading.Thread(target=late).start()
"""
    found = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert (found.stdout, found.stderr) == ("done\n", "")
