from __future__ import annotations

import subprocess
import sys
import threading

import pytest

from smc.exported.threads import in_thread


def test_work_is_done_in_another_thread() -> None:
    here = threading.get_ident()
    assert in_thread(threading.get_ident).result() != here


def test_what_it_raises_is_raised_where_the_result_is_asked_for() -> None:
    future = in_thread(lambda: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        future.result()


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
