# Sourced by quickstart.sh and tests/run.sh: a virtual environment with the project in it, made once.
#   make_environment EXTRA     e.g. make_environment test
# It stays in .venv (or $ASYMGQA_VENV) and is installed again only when pyproject.toml has changed. Afterwards $PYTHON
# is its interpreter. A Python to make it with can be named: PYTHON3=/path/to/python3.

CPU_TORCH=https://download.pytorch.org/whl/cpu

fail() {
    echo "$0: $*" >&2
    exit 1
}

find_python() {
    local candidate
    for candidate in "${PYTHON3:-}" python3 python3.13 python3.12 python3.11 python; do
        if [[ -n $candidate ]] && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

# Sets `index`, options of pip, and `size`, what it will download. PyPI's torch for Linux brings all of CUDA; PyTorch's
# own index has builds for machines without an NVIDIA GPU.
choose_torch() {
    index=() size="0.2 GB"
    [[ $(uname) == Linux ]] || return 0
    local reach="import urllib.request as request; request.urlopen('$CPU_TORCH/torch/', timeout=10)"
    if ! command -v nvidia-smi >/dev/null && "$PYTHON" -c "$reach" 2>/dev/null; then
        index=(--extra-index-url "$CPU_TORCH")
    else
        size="with CUDA up to 5.3 GB"
    fi
}

make_environment() {
    local extra=$1 folder=${ASYMGQA_VENV:-.venv} python
    local stamp=$folder/installed-$extra
    PYTHON=$folder/bin/python
    [[ -e $stamp && ! pyproject.toml -nt $stamp ]] && return
    python=$(find_python) || fail "Python 3.11 or newer is needed: install it (Debian/Ubuntu: apt-get install python3" \
        "python3-venv; macOS: brew install python), or name one with PYTHON3=/path/to/python3."
    echo "$0: installing into $folder, once and for some minutes"
    if [[ ! -x $PYTHON ]]; then
        "$python" -m venv "$folder" || fail "$python cannot make a virtual environment: install its venv module" \
            "(Debian/Ubuntu: apt-get install python3-venv), remove $folder and try again."
    fi
    "$PYTHON" -m pip --version >/dev/null 2>&1 || fail "$folder has no pip: install python3-venv (Debian/Ubuntu:" \
        "apt-get install python3-venv), remove $folder and try again."
    # torch first: the resolver then keeps it, and does not fetch another build along the way.
    local index size
    choose_torch
    echo "$0: downloading torch ($size)"
    # An empty array, to the old bash of macOS, is not set: hence the plus sign.
    "$PYTHON" -m pip install --quiet "torch==2.13.0" ${index[@]+"${index[@]}"} || fail "torch 2.13.0 could not be" \
        "installed: it needs a 64-bit Python 3.11 to 3.14 and the package index; this is $("$PYTHON" -VV | head -1)."
    echo "$0: downloading transformers, peft, trl and what they need (0.2 GB)"
    "$PYTHON" -m pip install --quiet --editable ".[$extra]" || fail "installing the package failed, see above. If pip" \
        "wants to compile something, it found no wheel for this Python: take 3.11 to 3.13, or install a compiler" \
        "(Debian/Ubuntu: apt-get install build-essential python3-dev)."
    touch "$stamp"
}
