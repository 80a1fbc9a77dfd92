"""The bundle writer: whatever goes wrong, a target is absent, the old bundle or the new one."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from smc.compiler import bundle_writer
from smc.compiler.bundle_writer import Staging, prepare_target, sweep_stale, target_lock
from smc.exported.bundle import open_bundle
from smc.exported.errors import BundleDamaged, Busy, CannotWrite, DiskError, InputMissing, SmcError
from smc.exported.manifest import MANIFEST_NAME
from tests.bundles import FILES, FUZZ, Crash, FailPoints, leftovers, locked, write_bundle

ROOT = Path(__file__).parent.parent.parent
OLD, NEW = FILES, {name: data + b"new" for name, data in FILES.items()}


@pytest.fixture(params=["exchange", "two steps"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of replacing a bundle, whatever the file system here can do."""
    if request.param == "two steps":
        monkeypatch.setattr(bundle_writer, "_exchange", bundle_writer._replace_in_two_steps)
    return str(request.param)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "place").mkdir()
    return tmp_path / "place" / "bundle"


def contents(target: Path) -> dict[str, bytes] | None:
    """What a visible bundle holds; None if there is none. Raises if it is not whole."""
    return {name: bytes(data) for name, data in open_bundle(target).files.items()} if target.exists() else None


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def sweep(target: Path) -> None:
    with locked(prepare_target(target)):
        sweep_stale(target)


def python(script: str, *arguments: object) -> list[str]:
    """A command that runs a script beside the tests, so that it can import them."""
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{script}", *map(str, arguments)]


# Commits


@pytest.mark.parametrize("before", ["absent", "empty", "bundle", "damaged", "damaged manifest"])
def test_a_commit_replaces_what_was_there(target: Path, way: str, before: str) -> None:
    if before == "empty":
        target.mkdir()
    elif before != "absent":
        write_bundle(target, OLD)
    if before.startswith("damaged"):
        flip(target / ("encoder.onnx" if before == "damaged" else MANIFEST_NAME), 1)
    assert prepare_target(target) == target
    write_bundle(target, NEW)
    assert contents(target) == NEW
    assert not leftovers(target)
    assert stat.S_IMODE(target.stat().st_mode) == 0o755


def test_a_build_that_does_not_commit_leaves_nothing(target: Path) -> None:
    write_bundle(target, OLD)
    with Staging(target) as staging:
        (staging.path / "file").write_bytes(b"half")
    assert contents(target) == OLD
    assert not leftovers(target)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOSYS])
def test_file_systems_without_exchange_take_two_steps(target: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    write_bundle(target, OLD)
    monkeypatch.setattr(bundle_writer.ctypes, "CDLL", lambda *args, **kwargs: SimpleNamespace(renameat2=lambda *arguments: -1))
    monkeypatch.setattr(bundle_writer.ctypes, "get_errno", lambda: code)
    write_bundle(target, NEW)
    assert contents(target) == NEW
    assert not leftovers(target)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EBADF])
def test_file_systems_that_cannot_flush_directories(target: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    fsync = os.fsync

    def files_only(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", files_only)
    write_bundle(target, NEW)
    assert contents(target) == NEW


NAMES = [
    "plain",
    "größe 图像 🙂",
    "two words",
    "line\nbreak",
    "-rf",
    "**",
    "[ab]*?",
    "[bold]",
    "'\"$(x)\\",
    ".hidden",
    "x.staging-y",
    "x.old-y.lock",
    "x" * 255,
    "ü" * 127,
    "🙂" * 50,
    os.fsdecode(b"not \xff unicode"),
]


@pytest.mark.parametrize("name", NAMES, ids=map(ascii, range(len(NAMES))))
def test_any_name_will_do(target: Path, way: str, name: str) -> None:
    target = target.with_name(name)
    for files in (OLD, NEW):
        assert prepare_target(target) == target
        stale = Staging(target).__enter__()  # as a killed build leaves it
        with locked(target):
            sweep_stale(target)
            assert not stale.path.exists()
            write_bundle(target, files)
        assert contents(target) == files
        assert not leftovers(target)


def test_relative_targets(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = target / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert prepare_target(Path("a/b")) == inner / "a" / "b"
    assert prepare_target(Path("a")) == inner / "a"
    with pytest.raises(CannotWrite):
        prepare_target(Path(".."))  # it holds a folder
    (inner / "a").rmdir()
    assert prepare_target(Path()) == inner
    inner.rmdir()
    with pytest.raises(CannotWrite):
        prepare_target(Path("a"))  # the working directory is gone


# What may not be replaced


def make_folder(target: Path, **files: str) -> None:
    target.mkdir()
    for name, text in files.items():
        (target / name.replace("_", ".")).write_text(text)


REFUSED: dict[str, Callable[[Path], object]] = {
    "a file": lambda target: target.write_text("mine"),
    "a link to a file": lambda target: target.symlink_to(__file__),
    "a link to an empty directory": lambda target: target.symlink_to(target.parent / "elsewhere"),
    "a dangling link": lambda target: target.symlink_to("nowhere"),
    "foreign files": lambda target: make_folder(target, notes="mine"),
    "a foreign folder": lambda target: (target / "folder").mkdir(parents=True),
    "another program's manifest": lambda target: make_folder(target, manifest_json='{"name": "web app"}', index_html="mine"),
    "an empty manifest": lambda target: make_folder(target, manifest_json=""),
    "a folder called manifest": lambda target: (target / MANIFEST_NAME).mkdir(parents=True),
    "a FIFO": os.mkfifo,
}


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED.keys())
def test_what_is_no_bundle_is_not_replaced(target: Path, make: Callable[[Path], object]) -> None:
    (target.parent / "elsewhere").mkdir()
    make(target)
    before = {path: path.lstat() for path in target.parent.rglob("*")}
    with pytest.raises(CannotWrite) as caught:
        prepare_target(target)
    assert caught.value.exit_status == 73
    with pytest.raises(CannotWrite):
        write_bundle(target)  # it came there during the build
    after = {path: path.lstat() for path in target.parent.rglob("*")}
    assert after.keys() == before.keys()
    assert all(after[path].st_ino == before[path].st_ino and after[path].st_mtime_ns == before[path].st_mtime_ns for path in after)


def test_targets_that_cannot_be(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (target.parent / "file").write_text("")
    for path in ("x" * 256, "file/bundle", "x" * 256 + "/bundle"):
        with pytest.raises(CannotWrite):
            prepare_target(target.parent / path)
    for system in (Path("/"), Path("/proc/bundle")):
        with pytest.raises(CannotWrite):
            prepare_target(system)
    target.mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: path == target)
    with pytest.raises(CannotWrite, match="mount point"):
        prepare_target(target)


# Failing disks


@pytest.mark.parametrize("before", [None, OLD], ids=["absent", "old"])
@pytest.mark.parametrize(("code", "error"), [(errno.ENOSPC, DiskError), (errno.EIO, DiskError), (errno.EROFS, CannotWrite)])
def test_any_failing_call_leaves_the_old_bundle(
    target: Path, way: str, before: dict[str, bytes] | None, code: int, error: type[SmcError]
) -> None:
    if before:
        write_bundle(target, before)
    called = []
    statuses = set()
    for n in itertools.count():
        with FailPoints(n, error=code).active() as points:
            try:
                write_bundle(target, NEW)
            except error as caught:
                statuses.add(caught.exit_status)
            else:
                assert not points.fired
                break
        called.append(points.fired)
        assert contents(target) == before, f"after a failing {points.fired}, number {n}"
        assert not leftovers(target)
    assert contents(target) == NEW
    assert statuses == {74 if error is DiskError else 73}
    assert {"mkdir", "write", "fsync", "chmod", "exchange" if before else "rename"} <= set(called)
    assert len(called) >= 20


def test_a_write_that_falls_short_without_an_error_number_is_a_full_disk(target: Path) -> None:
    with pytest.raises(DiskError), Staging(target) as staging, staging.writing():
        raise OSError("262144 requested and 125000 written")  # as numpy says it
    assert not leftovers(target)


WRITE_TOO_MUCH = {
    "plain file": "(directory / 'x').write_bytes(bytes(1 << 17))",
    "manifest": "[(directory / f'file{i}').touch() for i in range(600)]; staging.commit(sample_manifest(staging.seal()))",
    "plan": (
        "import numpy, onnx_graphsurgeon as gs\n"
        "        from smc.compiler.graph_files import write_graph\n"
        "        x, y = (gs.Variable(name, numpy.float32, [1024, 1024]) for name in 'xy')\n"
        "        w = gs.Constant('w', numpy.ones((1024, 1024), numpy.float32))\n"
        "        node = gs.Node('MatMul', inputs=[x, w], outputs=[y])\n"
        "        write_graph(gs.Graph([node], [x], [y], opset=23), directory, 'encoder')"
    ),
}


@pytest.mark.parametrize("write", WRITE_TOO_MUCH.values(), ids=WRITE_TOO_MUCH.keys())
def test_a_real_limit_of_the_file_size(target: Path, write: str) -> None:
    write_bundle(target, OLD)
    script = f"""
import resource, sys
from pathlib import Path
from smc.compiler.bundle_writer import Staging
from smc.exported.errors import DiskError
from tests.bundles import sample_manifest
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
try:
    with Staging(Path(sys.argv[1])) as staging, staging.writing() as directory:
        {write}
except DiskError as error:
    sys.exit(error.exit_status)
"""
    run = subprocess.run(python(script, target), capture_output=True, text=True)
    assert run.returncode == 74, run.stderr
    assert contents(target) == OLD
    assert not leftovers(target)


# Killed builds

KILL_AT_EACH_CALL = """
import itertools, os
from pathlib import Path
from smc.compiler import bundle_writer
from tests.bundles import FailPoints, write_bundle
from tests.compiler.test_bundle_writer import NEW, OLD
place, way, before = Path(sys.argv[1]), *sys.argv[2:]
if way == "two steps":
    bundle_writer._exchange = bundle_writer._replace_in_two_steps
for n in itertools.count():
    target = place / f"{n:03}" / "bundle"
    target.parent.mkdir()
    if before == "old":
        write_bundle(target, OLD)
    if os.fork() == 0:
        with FailPoints(n, "kill").active():
            write_bundle(target, NEW)
        os._exit(0)
    _, status = os.wait()
    if status == 0:
        break
    assert os.WTERMSIG(status) == 9
"""


@pytest.mark.parametrize("before", ["absent", "old"])
def test_a_kill_at_any_call(tmp_path: Path, way: str, before: str) -> None:
    subprocess.run(python(KILL_AT_EACH_CALL, tmp_path, way, before), check=True)
    visible: list[str] = []
    swept: list[str] = []
    for target in [place / "bundle" for place in sorted(tmp_path.iterdir())]:
        for seen in (visible, swept):
            found = contents(target)
            assert found in (None, OLD, NEW)
            seen.append("absent" if found is None else "old" if found == OLD else "new")
            sweep(target)
        assert not leftovers(target)
    assert len(visible) > 20
    # In time: the target changes once, but for the moment between two steps, which the sweep mends.
    assert [state for state, _ in itertools.groupby(swept)] == [before, "new"]
    gap = ["absent"] if way == "two steps" and before == "old" else []
    assert [state for state, _ in itertools.groupby(visible)] == [before, *gap, "new"]


def test_kills_at_random_moments_of_a_loop_of_commits(target: Path) -> None:
    script = (
        "import itertools; from pathlib import Path\n"
        "from smc.compiler.bundle_writer import prepare_target, sweep_stale; from tests.bundles import locked, write_bundle\n"
        "target = prepare_target(Path(sys.argv[1]))\n"
        "with locked(target):\n"
        "    sweep_stale(target); print(flush=True)\n"
        "    for i in itertools.count(): write_bundle(target, {f'{name}': b'%d' % i for name in sys.argv[2:]})\n"
    )
    moments = random.Random(0)
    for _ in range(15):
        process = subprocess.Popen(python(script, target, *FILES), stdout=subprocess.PIPE)
        assert process.stdout is not None
        with process, process.stdout:
            process.stdout.readline()
            assert len(leftovers(target)) <= 1, "the sweep left what the killed build before had left"
            time.sleep(moments.uniform(0, 0.05))
            process.kill()
        visible = contents(target)
        assert visible is None or (visible.keys() == FILES.keys() and len(set(visible.values())) == 1)
    assert visible is not None
    sweep(target)
    assert not leftovers(target)


# Locks


def test_builds_of_one_target_exclude_each_other(target: Path) -> None:
    script = "from pathlib import Path; from tests.bundles import locked\nwith locked(Path(sys.argv[1])): print(flush=True); input()"
    with subprocess.Popen(python(script, target), stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(Busy, match="another build") as caught, locked(target):
            pass
        assert caught.value.exit_status == 75
        with locked(target.with_name("another")):
            pass
        waits = []

        def on_wait() -> None:
            waits.append(1)
            process.kill()  # the operating system frees the lock

        with target_lock(target, wait=True, on_wait=on_wait):
            assert waits == [1]


def test_a_lock_that_cannot_be_made(target: Path) -> None:
    (target.parent / ".bundle.lock").mkdir()
    with pytest.raises(CannotWrite), locked(target):
        pass


def test_a_sweep_leaves_the_neighbours_alone(target: Path) -> None:
    with Staging(target.with_name("bundle2")) as other, Staging(target.with_name("bundle.staging-x")) as alike:
        (target.parent / ".bundle.old-link").symlink_to(other.path)
        sweep(target)
        assert other.path.exists()
        assert alike.path.exists()


# Permissions


def restricted(script: str, *arguments: object) -> list[str]:
    """A command that runs a script to which permissions apply, even if root runs it."""
    drop = (
        "import ctypes, os\n"
        "for capability in (1, 2) if os.geteuid() == 0 else ():\n"  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        "    assert ctypes.CDLL(None).prctl(24, capability, 0, 0, 0) == 0\n"  # PR_CAPBSET_DROP, in force from the next exec
        "os.execv(sys.executable, sys.argv[1:])"
    )
    return python(drop, *python(script, *arguments))


@pytest.fixture
def protect() -> Iterator[Callable[[Path, int], None]]:
    """chmod, undone afterwards."""
    changed = []

    def chmod(path: Path, mode: int) -> None:
        changed.append((path, path.stat().st_mode))
        path.chmod(mode)

    yield chmod
    for path, mode in reversed(changed):
        path.chmod(mode)


def test_read_only_places_are_refused_before_any_work(tmp_path: Path, protect: Callable[[Path, int], None]) -> None:
    script = """
import json
from pathlib import Path
from smc.compiler import build
from smc.exported.errors import SmcError
try:
    (Path(sys.argv[1]) / "file").touch()
    sys.exit("permissions do not apply")
except PermissionError:
    pass
def work(*arguments):
    raise AssertionError("work was done")
build._read_weights = work
statuses = []
for target in sys.argv[1:]:
    try:
        build.build(build.BuildRequest(gpu="cpu", out=Path(target), random_seed=0, model="small"))
    except SmcError as error:
        statuses.append(error.exit_status)
print(json.dumps(statuses))
"""
    read_only, parent, unsearchable, unreadable = (tmp_path / name for name in ("target", "parent", "unsearchable", "unreadable"))
    targets = [read_only, parent / "bundle", parent / "absent", parent / "deep" / "absent", unsearchable / "bundle", unreadable]
    for target in (targets[0], targets[1], targets[4], targets[5]):
        target.parent.mkdir(exist_ok=True)
        write_bundle(target)
    for path, mode in ((read_only, 0o555), (parent, 0o555), (unsearchable, 0o666), (unreadable, 0o333)):
        protect(path, mode)
    run = subprocess.run(restricted(script, *targets), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == [73] * len(targets)


def test_a_bundle_that_may_only_be_read_loads(
    tiny_bundle: Path, target: Path, tmp_path: Path, protect: Callable[[Path, int], None]
) -> None:
    copy = shutil.copytree(tiny_bundle, tmp_path / "copy")
    write_bundle(target)
    for file in copy.iterdir():
        protect(file, 0o444)
    protect(copy, 0o555)
    protect(tmp_path, 0o555)
    protect(target / "encoder.onnx", 0o000)
    script = """
import smc
for path in (sys.argv[1], sys.argv[1] + "/manifest.json"):
    try:
        open(path + "x" if path == sys.argv[1] else path, "ab")
        sys.exit("permissions do not apply")
    except PermissionError:
        pass
smc.load(sys.argv[1])
try:
    smc.load(sys.argv[2])
except smc.InputMissing as error:
    print(error)
"""
    run = subprocess.run(restricted(script, copy, target), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "encoder.onnx: Permission denied" in run.stdout


def test_a_parent_that_cannot_be_listed_is_written_to(target: Path, protect: Callable[[Path, int], None]) -> None:
    protect(target.parent, 0o333)
    script = (
        "from pathlib import Path; from smc.compiler.bundle_writer import prepare_target, sweep_stale\n"
        "from tests.bundles import locked, write_bundle\n"
        "target = prepare_target(Path(sys.argv[1]))\n"
        "with locked(target): sweep_stale(target); write_bundle(target)"
    )
    subprocess.run(restricted(script, target), check=True)
    assert contents(target) == FILES


# Everything at once


class Builds(RuleBasedStateMachine):
    """Builds, kills, full disks, damage and removals in any order. Every visible bundle is whole, or was damaged here."""

    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp())
        self.target = self.place / "bundle"
        self.count = 0
        self.damaged: set[str] = set()
        self.current: str | None = None
        """Which bundle is visible."""

    def teardown(self) -> None:
        shutil.rmtree(self.place)

    def visible(self) -> str | None:
        """The name of the visible bundle, which one of its files bears."""
        return next((path.name for path in self.target.glob("bundle*")), None)

    def write(self, points: FailPoints, two_steps: bool) -> str:
        self.count += 1
        name = f"bundle{self.count}"
        replace = bundle_writer._replace_in_two_steps if two_steps else bundle_writer._exchange
        with mock.patch.object(bundle_writer, "_exchange", replace), points.active():
            write_bundle(self.target, FILES | {name: name.encode()}, name)
        return name

    @rule(two_steps=st.booleans())
    def build(self, two_steps: bool) -> None:
        self.current = self.write(FailPoints(-1), two_steps)

    @rule(n=st.integers(0, 30), code=st.sampled_from([errno.ENOSPC, errno.EIO, errno.EACCES]), two_steps=st.booleans())
    def fail(self, n: int, code: int, two_steps: bool) -> None:
        points = FailPoints(n, error=code)
        try:
            self.current = self.write(points, two_steps)
        except (DiskError, CannotWrite):
            assert points.fired

    @rule(n=st.integers(0, 45), two_steps=st.booleans())
    def kill(self, n: int, two_steps: bool) -> None:
        try:
            self.current = self.write(FailPoints(n, "crash"), two_steps)
        except Crash:
            visible = self.visible()
            assert visible in (self.current, f"bundle{self.count}") or (visible is None and two_steps)
            self.current = visible

    @rule(name=st.sampled_from(sorted(FILES)), data=st.binary(min_size=1))
    @precondition(lambda self: self.current is not None)
    def damage(self, name: str, data: bytes) -> None:
        assert self.current is not None
        with (self.target / name).open("ab") as stream:
            stream.write(data)
        self.damaged.add(self.current)

    @rule()
    @precondition(lambda self: self.current is not None)
    def remove(self) -> None:
        shutil.rmtree(self.target)
        self.current = None

    @rule()
    def sweep(self) -> None:
        aside = {path.name for path in self.place.glob(".bundle.old-*/bundle*")}  # by kills in the middle of two steps
        sweep(self.target)
        assert not leftovers(self.target)
        if self.current is None and aside:
            assert self.visible() in aside
            self.current = self.visible()

    @invariant()
    def the_visible_bundle_is_whole(self) -> None:
        assert self.visible() == self.current
        if self.current is None:
            with pytest.raises(InputMissing):
                open_bundle(self.target)
        elif self.current in self.damaged:
            with pytest.raises(BundleDamaged):
                open_bundle(self.target)
        else:
            assert open_bundle(self.target).files == FILES | {self.current: self.current.encode()}


Builds.TestCase.settings = settings(FUZZ, max_examples=40, stateful_step_count=15)
TestBuilds: Any = Builds.TestCase
