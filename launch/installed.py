"""What a Python without the project's packages is told. Scripts of this folder import this first, by its bare name.

It needs nothing but Python 3, of any version.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

CLONE = Path(__file__).resolve().parent.parent

if find_spec("hfprune_launch") is None:
    print(
        f"error: this Python ({sys.executable}) lacks the project's packages; run: source {CLONE}/.venv/bin/activate, "
        f"or install them: bash {CLONE}/launch/quickstart.sh",
        file=sys.stderr,
    )
    sys.exit(2)
