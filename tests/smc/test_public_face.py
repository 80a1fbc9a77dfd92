"""What `import smc` brings, offers, and is installed as."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

import smc

ROOT = Path(__file__).parent.parent.parent
FOLDERS = ("smc", "compiler", "passes", "plugins", "exported", "examples")


def test_importing_and_loading_stay_clear_of_the_compiler(tiny_bundle: Path) -> None:
    script = f"import sys, json, smc; smc.load({str(tiny_bundle)!r}); print(json.dumps(sorted(sys.modules)))"
    modules = json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, check=True).stdout)
    assert "onnxruntime" in modules
    for heavy in ("torch", "onnx", "onnxscript", "triton", "smc.compiler", "smc.passes", "smc.plugins", "click", "rich"):
        assert heavy not in modules


def test_onnx_runtime_reports_nothing_to_its_maker(tiny_bundle: Path, tmp_path: Path) -> None:
    """It would keep an identifier and what it has to report in the user's cache."""
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    script = f"import smc; smc.load({str(tiny_bundle)!r})"
    subprocess.run([sys.executable, "-c", script], env=environment | {"XDG_CACHE_HOME": str(tmp_path)}, check=True)
    assert not list(tmp_path.iterdir())


def test_importing_alone_loads_no_engine() -> None:
    script = "import sys, smc; print('onnxruntime' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "False\n"


def test_all_is_the_public_surface() -> None:
    public = {name for name, value in vars(smc).items() if not name.startswith("_") and not isinstance(value, ModuleType)}
    assert public == set(smc.__all__)


def test_runtime_modules_import_nothing_of_the_compiler() -> None:
    for path in (ROOT / "exported").rglob("*.py"):
        text = path.read_text()
        for forbidden in ("smc.compiler", "smc.passes", "smc.plugins", "import torch", "import onnx\n", "import triton"):
            assert forbidden not in text, f"{path.name} holds {forbidden!r}"


@pytest.fixture(scope="module")
def wheel(module_tmp_path: Path) -> set[str]:
    """The file names of the built wheel."""
    source = module_tmp_path / "source"
    names = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(module_tmp_path), str(source)], check=True)
    with zipfile.ZipFile(next(module_tmp_path.glob("*.whl"))) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_the_sources_and_the_sample_images(wheel: set[str]) -> None:
    wanted = {"smc/py.typed"}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            relative = path.relative_to(ROOT / folder).as_posix()
            wanted.add(f"smc/{relative}" if folder == "smc" else f"smc/{folder}/{relative}")
    wanted |= {f"smc/examples/{name}" for name in ("graf1.png", "graf3.png", "H1to3p.xml", "README.md")}
    wanted |= {f"smc/compiler/tuned/{path.name}" for path in (ROOT / "compiler/tuned").glob("*.json")}
    assert wheel == wanted


def test_every_module_imports() -> None:
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            module = ".".join(("smc", *(() if folder == "smc" else (folder,)), *path.relative_to(ROOT / folder).with_suffix("").parts))
            importlib.import_module(module.removesuffix(".__init__"))
