"""What a Python without the project's packages is told. Scripts of this folder import this first, by its bare name.

It needs nothing but Python 3, of any version.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path

_CLONE = Path(__file__).resolve().parent.parent


def how_to_activate() -> str:
    """The command after which ``python`` has the project's packages."""
    environment = _CLONE / ".venv"
    if (environment / "bin" / "activate").exists() and environment.resolve() != Path(sys.prefix).resolve():
        return "run: source " + os.path.relpath(str(environment / "bin" / "activate"))
    if not (_CLONE / "pyproject.toml").exists():  # installed from a wheel, which has no quickstart.sh
        return "install the project's wheel again, with its dependencies"
    return "install them: bash " + os.path.relpath(str(_CLONE / "launch" / "quickstart.sh"))


if find_spec("hfprune_launch") is None:
    print(f"error: this Python ({sys.executable}) lacks the project's packages; {how_to_activate()}", file=sys.stderr)
    sys.exit(2)
