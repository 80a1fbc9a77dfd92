"""Maps the top-level folders into the one import package `smc`; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup

OPERATIONS = sorted(path.parent.name for path in Path(__file__).parent.glob("plugins/*/__init__.py"))

FOLDERS = {
    "smc": "smc",
    "smc.compiler": "compiler",
    "smc.compiler.backends": "compiler/backends",
    "smc.compiler.bench": "compiler/bench",
    "smc.compiler.evaluation": "compiler/evaluation",
    "smc.compiler.lowering": "compiler/lowering",
    "smc.compiler.scenes": "compiler/scenes",
    "smc.compiler.training": "compiler/training",
    "smc.passes": "passes",
    "smc.plugins": "plugins",
    **{f"smc.plugins.{name}": f"plugins/{name}" for name in OPERATIONS},
    "smc.exported": "exported",
    "smc.exported.engines": "exported/engines",
    "smc.examples": "examples",
}

DATA = {"smc.examples": ["*.png", "*.jpg", "*.xml", "*.md"], "smc.compiler": ["tuned/*.json"], "smc": ["py.typed"]}

setup(packages=list(FOLDERS), package_dir=FOLDERS, package_data=DATA)
