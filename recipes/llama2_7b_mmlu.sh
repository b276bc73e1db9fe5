#!/usr/bin/env bash
# The published headline: Llama-2-7B from 32 to 8 KV heads, MMLU with 5 examples, evenly split neighbours against ours.
# Not run by this project's authors: it needs the weights (hf auth login, Meta's licence accepted), one GPU of 80 GB,
# and `pip install -e .[eval]`. Both arms read the same data for as many steps; only the method differs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

base=meta-llama/Llama-2-7b-hf
out=out/llama2_7b_mmlu
recover=(python recipes/recover.py --config recipes/configs/llama2_7b.yaml --model_name_or_path "$base")

# Classic GQA (Ainslie et al., 2023): neighbours, mean of their heads, plain fine-tuning.
"${recover[@]}" --output_dir "$out/neighbour" --grouping neighbour --merge mean --refit_output false \
    --distillation_weight 0

# The published idea (Chen et al., 2024): unequal groups of heads with similar activations, mean, plain fine-tuning.
"${recover[@]}" --output_dir "$out/cosine" --criterion cosine --merge mean --refit_output false \
    --distillation_weight 0

# Ours: what recipes/configs/llama2_7b.yaml says.
"${recover[@]}" --output_dir "$out/ours"

# One table of all four, and out/llama2_7b_mmlu/evaluation.json.
python recipes/evaluate.py "$base" "$out"/{neighbour,cosine,ours}/plain --dtype bfloat16 --batch-size 8 \
    --tasks mmlu --num-fewshot 5 --output "$out/evaluation.json"
