"""Running a module of cases under Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def run_cases(module: str) -> Any:
    """What `python -m tests.plugins.MODULE` prints, as JSON. In a process of its own: triton reads TRITON_INTERPRET when first imported."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.plugins.{module}"],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
