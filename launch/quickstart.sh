#!/usr/bin/env bash
# From a fresh clone to the demo's table of results: installs into .venv, makes the demo's models and text, and runs the
# sweep. Running it again resumes; further arguments, e.g. --models llama for half of it, are passed to launch/sweep.py.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh demo
"$PYTHON" launch/demo_assets.py
exec "$PYTHON" launch/sweep.py --config configs/demo.yaml "$@" # models llama,qwen and ratios 0.2,0.5, if not given
