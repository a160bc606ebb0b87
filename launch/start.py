"""Start a command from its file, as in ``python launch/sweep.py``. Scripts of this folder import this by its bare name.

It needs nothing but Python 3.8 to tell a Python without the project's packages, or with those of another copy, what to
do.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

CLONE = Path(__file__).resolve().parent.parent


def start(script: str) -> NoReturn:
    """Run the command of a script with the arguments of this process, and end the process with its exit code."""
    package = find_spec("hfprune_launch")
    installed = None if package is None else Path(str(package.origin)).resolve().parent
    if installed is None or not installed.samefile(CLONE / "launch"):
        found = "lacks the project's packages" if installed is None else f"has the packages of {installed.parent}"
        print(
            f"error: this Python ({sys.executable}) {found}; run: source {CLONE}/.venv/bin/activate, "
            f"or install them: bash {CLONE}/launch/quickstart.sh",
            file=sys.stderr,
        )
        sys.exit(2)
    with contextlib.suppress(KeyboardInterrupt):  # during imports; a command that has begun says more
        sys.exit(importlib.import_module(f"hfprune_launch.{Path(script).stem}").main())
    sys.exit(130)
