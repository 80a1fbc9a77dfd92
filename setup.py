"""Maps the top-level folders into the one import package `smc`; everything else is in pyproject.toml."""

from setuptools import setup

FOLDERS = {
    "smc": "smc",
    "smc.compiler": "compiler",
    "smc.compiler.backends": "compiler/backends",
    "smc.passes": "passes",
    "smc.plugins": "plugins",
    "smc.plugins.flash_attention": "plugins/flash_attention",
    "smc.exported": "exported",
    "smc.exported.engines": "exported/engines",
    "smc.examples": "examples",
}

setup(packages=list(FOLDERS), package_dir=FOLDERS, package_data={"smc.examples": ["*.png", "*.jpg", "*.xml", "*.md"], "smc": ["py.typed"]})
