"""What a Python without the project's packages, or with those of another copy, is told. Scripts of this folder import
this first, by its bare name.

It needs nothing but Python 3, of any version.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

CLONE = Path(__file__).resolve().parent.parent

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
