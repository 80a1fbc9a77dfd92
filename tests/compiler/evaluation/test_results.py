"""The file of results: continued, refused, damaged."""

from __future__ import annotations

import errno
import json
import resource
from pathlib import Path
from typing import Any

import msgspec
import pytest

from smc.compiler.evaluation.records import SCHEMA, Config, DataConfig, Estimate, Header, PairResult
from smc.compiler.evaluation.results import open_results, read_results
from smc.exported.errors import BadInput, Busy, CannotWrite, DiskError, InputMissing, UsageError

DATA = DataConfig("planted", "pose", 2, "digest", "own size")
CONFIG = Config({"matcher": "planted", "options": {"subsample": 8}}, [DATA], None, 0, 1, 1000, 1.0, 3.0, "poselib 2")
HEADER = Header(SCHEMA, CONFIG, "2026-01-01", {}, {})


def row(name: str) -> PairResult:
    return PairResult("planted", name, 10, [Estimate(9, 1.5, 1.5, 0.5)], {"1 px": 0.5}, {"match": 0.1})


def write(path: Path, *names: str) -> None:
    with open_results(path, HEADER) as file:
        for name in names:
            file.add(row(name))


def test_what_is_written_is_read_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path, "a", "b")
    assert [json.loads(line).get("name") for line in path.read_text().splitlines()] == [None, "a", "b"]
    with open_results(path, HEADER) as file:
        assert file.rows == {("planted", name): row(name) for name in "ab"}
        file.add(row("c"))
    header, rows = read_results(path)
    assert header == HEADER
    assert list(rows) == [("planted", name) for name in "abc"]


@pytest.mark.parametrize("cut", [1, 5, 100])
def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "r.jsonl"
    write(path, "a", "b")
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    assert list(read_results(path)[1]) == [("planted", "a")]
    write(path, "b")
    assert path.read_bytes() == whole


def test_a_header_that_was_cut_off_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path)
    whole = path.read_bytes()
    for end in (0, 3, len(whole) - 1):
        path.write_bytes(whole[:end])
        write(path)
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"limit": 5}, "limit is null there, 5 here"),
        ({"matcher": {"matcher": "planted", "options": {"subsample": 4}}}, "matcher.options.subsample is 8 there, 4 here"),
        ({"data": [msgspec.structs.replace(DATA, digest="other")]}, r'data\[0\].digest is "digest" there, "other" here'),
        ({"data": []}, "data is"),
    ],
)
def test_results_of_another_evaluation_are_left_alone(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "r.jsonl"
    write(path, "a")
    before = path.read_bytes()
    other = msgspec.structs.replace(HEADER, config=msgspec.structs.replace(CONFIG, **changes))
    with pytest.raises(UsageError, match=message), open_results(path, other):
        pass
    assert path.read_bytes() == before


def test_another_machine_continues_what_was_begun(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path, "a")
    elsewhere = msgspec.structs.replace(HEADER, created="later", machine={"processor": "another"})
    with open_results(path, elsewhere) as file:
        assert len(file.rows) == 1


def test_data_that_another_torch_rendered_is_the_same_by_its_digest(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path, "a")
    config = msgspec.structs.replace(CONFIG, data=[msgspec.structs.replace(DATA, origin="rendered by torch 9")])
    with open_results(path, msgspec.structs.replace(HEADER, config=config)) as file:
        assert len(file.rows) == 1
    assert read_results(path)[0] == HEADER  # the first run's


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hello", "not results of smc eval"),
        ("hello\n", "not results of smc eval"),
        ("\x00\xff\n", "not results of smc eval"),
        ('{"schema": 99}\n', f"schema 99, {SCHEMA} was expected"),
        (f'{{"schema": {SCHEMA}}}\n', "missing required field"),
        ("[1]\n", "not results"),
    ],
)
def test_other_files_are_left_alone(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(text, "latin-1")
    with pytest.raises(BadInput, match=message), open_results(path, HEADER):
        pass
    assert path.read_text("latin-1") == text


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path, "a", "b", "c")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b'"matches":10', b'"matches":"x"'), lines[3]]))
    with pytest.raises(BadInput, match=r"r.jsonl, line 3: .*matches"):
        read_results(path)


def test_two_evaluations_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    with open_results(path, HEADER), pytest.raises(Busy, match="another evaluation writes"), open_results(path, HEADER):
        pass
    write(path, "a")


def test_a_file_that_may_not_grow_is_told_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    write(path, "a")
    before = path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before + 10, limits[1]))
    try:
        with pytest.raises(DiskError, match=r"r\.jsonl: File too large"):
            write(path, "b")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.stat().st_size == before + 10
    write(path, "b")
    assert list(read_results(path)[1]) == [("planted", "a"), ("planted", "b")]


def test_results_go_into_regular_files_alone() -> None:
    with pytest.raises(CannotWrite, match="/dev/null: not a regular file"), open_results(Path("/dev/null"), HEADER):
        pass


def test_files_that_cannot_be_read_or_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputMissing, match="No such file"):
        read_results(tmp_path / "absent")
    for path in (tmp_path, tmp_path / "absent" / "r.jsonl"):
        with pytest.raises(CannotWrite), open_results(path, HEADER):
            pass

    class Full:
        def write(self, data: bytes) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    with open_results(tmp_path / "r.jsonl", HEADER) as file:
        monkeypatch.setattr(file, "_file", Full())
        with pytest.raises(DiskError, match="No space left"):
            file.add(row("a"))
        assert not file.rows
