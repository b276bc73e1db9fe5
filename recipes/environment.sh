# Sourced by quickstart.sh and tests/run.sh: makes a virtual environment once and installs the project into it.
#   make_environment FOLDER EXTRAS     e.g. make_environment .venv test
# Afterwards $PYTHON is its interpreter. Nothing outside FOLDER changes.

find_python() {
    local candidate
    for candidate in "${PYTHON3:-}" python3 python3.13 python3.12 python3.11 python3.10; do
        if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
            "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 10))' >/dev/null 2>&1; then
            command -v "$candidate"
            return
        fi
    done
    echo "No Python >= 3.10 found. Install one (Debian/Ubuntu: apt-get install python3 python3-venv; macOS: brew" \
        "install python) or name it: PYTHON3=/path/to/python3 $0" >&2
    return 1
}

make_environment() {
    local folder=$1 extras=$2 python
    local stamp=$folder/installed-$extras
    PYTHON=$folder/bin/python
    if [ -e "$stamp" ] && [ ! pyproject.toml -nt "$stamp" ] && "$PYTHON" -c 'import asymgqa_peft' >/dev/null 2>&1; then
        return
    fi
    python=$(find_python) || return 1
    if ! "$python" -m venv "$folder"; then
        echo "Python's venv module is missing. Debian/Ubuntu: apt-get install python3-venv" >&2
        return 1
    fi
    echo "Installing into $folder (once) ..."
    # torch first and alone: this version has wheels for every supported Python, so nothing is compiled.
    if ! "$PYTHON" -m pip install --quiet torch==2.13.0 || ! "$PYTHON" -m pip install --quiet -e ".[$extras]"; then
        echo "Installation failed, see pip's message above. Without a network, point PIP_INDEX_URL or PIP_FIND_LINKS" \
            "at your package index; if pip wants to compile, install a compiler (Debian/Ubuntu: apt-get install" \
            "build-essential python3-dev) or use a Python version that has wheels (3.10 to 3.13)." >&2
        return 1
    fi
    touch "$stamp"
}
