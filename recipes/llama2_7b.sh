#!/usr/bin/env bash
# Llama-2-7B from 32 to 8 KV heads, start to end, on one GPU of 80 GB with the weights and the data at hand
# (hf auth login, and Meta's licence accepted). Not run by this project's authors: it needs the weights.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
repository="${1:?pass the repository to push to, e.g. me/Llama-2-7b-gqa8}"

# 1. Wrap, initialise, recover, save the adapter, merge: everything lands in out/llama2_7b. After an interruption, the
#    same line with --resume_from_checkpoint true goes on. On several GPUs: accelerate launch --config_file
#    recipes/configs/accelerate/fsdp2.yaml instead of python.
python recipes/recover.py --config recipes/configs/llama2_7b.yaml

# 2. The plain checkpoint needs nothing of this package. Its cache takes 128 KiB per token instead of 512.
python -c "
from transformers import pipeline
generate = pipeline('text-generation', 'out/llama2_7b/plain', dtype='bfloat16', device_map='auto')
print(generate('The KV cache of a language model', max_new_tokens=40)[0]['generated_text'])
"

# 3. Publish it, private until you say otherwise.
python recipes/merge_and_push.py out/llama2_7b/adapter --output out/llama2_7b/plain --overwrite \
    --report out/llama2_7b/initialization.json --evaluation out/llama2_7b/evaluation.json \
    --push "$repository"
