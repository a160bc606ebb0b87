#!/usr/bin/env bash
# Tries the newest releases of everything, as a user would who installs from pyproject.toml's ranges today: clones the
# project into a new folder (the argument), installs there without the lock, runs the quick tests and a small sweep, and
# prints the versions and the verdict. Run it before launch/lock.sh, and when a library that matters has a new release.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:?usage: bash tests/newest.sh FOLDER}
git clone --quiet . "$folder"
cd "$folder"
source launch/setup.sh demo,test newest
verdict=passed
bash tests/run.sh quick --deselect tests/test_scripts.py::test_what_is_installed_is_what_is_locked || verdict="FAILED: quick tests"
bash launch/quickstart.sh --models llama --ratios 0.2 || verdict="FAILED: sweep"
"$PYTHON" - "$verdict" <<'END'
import platform, sys
from hfprune_dist.store.provenance import PACKAGES, package_versions
versions = {"Python": platform.python_version(), **package_versions(PACKAGES)}
print(*map(" ".join, versions.items()), sep="\n")
print(sys.argv[1])
END
[ "$verdict" = passed ]
