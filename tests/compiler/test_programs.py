"""Programs that are no commands of `smc` end as its commands do."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from smc.compiler.programs import run
from smc.exported.errors import BadInput


def ending(program: Callable[[], None]) -> int | str | None:
    with pytest.raises(SystemExit) as exit:
        run(program)
    return exit.value.code


def failing(error: BaseException) -> Callable[[], None]:
    def program() -> None:
        raise error

    return program


def test_an_error_is_printed_with_its_advice(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(failing(BadInput("it is bent", fix="straighten it"))) == 65
    assert capsys.readouterr() == ("", "smc: error[BAD_INPUT]: it is bent\nfix: straighten it\n")


def test_the_other_endings(capsys: pytest.CaptureFixture[str]) -> None:
    assert ending(lambda: None) == 0
    assert ending(failing(KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "")
    with pytest.raises(ZeroDivisionError):
        run(failing(ZeroDivisionError()))


@pytest.mark.parametrize(
    ("module", "options", "status", "message"),
    [
        ("training", ["--steps", "1", "--out"], 69, "error[NO_TARGET]: training needs torch"),
        ("scenes.photographs", ["{tmp}/none", "--out"], 66, "error[INPUT_MISSING]: none of the training photographs is in"),
        ("evaluation.rendered", ["--pairs", "0", "--out"], 2, "error[USAGE]: 0 pairs: at least 1"),
        ("evaluation.rendered", ["--pairs", "1", "--out"], 69, "error[NO_TARGET]: rendering scenes needs torch"),
    ],
)
def test_the_programs_say_what_is_wrong_where_torch_is_absent(
    tmp_path: Path, module: str, options: list[str], status: int, message: str
) -> None:
    code = f"import runpy, sys; sys.modules['torch'] = None; runpy.run_module('smc.compiler.{module}', run_name='__main__', alter_sys=True)"
    arguments = [option.format(tmp=tmp_path) for option in options]
    found = subprocess.run([sys.executable, "-c", code, *arguments, tmp_path / "out"], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (status, "")
    assert message in found.stderr
    assert "Traceback" not in found.stderr
    assert not (tmp_path / "out").exists()
