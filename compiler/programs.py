"""How programs of this package that are no commands of `smc` end, such as `python -m smc.compiler.training`: as its commands do."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import NoReturn

from smc.compiler import cli
from smc.exported.errors import SmcError


def run(program: Callable[[], None]) -> NoReturn:
    """Run a program, and exit with the status that `smc.exported.errors` lists. Other errors are bugs, and end in their traceback."""
    try:
        program()
    except SmcError as error:
        sys.exit(cli._fail(error.code, str(error), error.fix, error.exit_status))
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)
