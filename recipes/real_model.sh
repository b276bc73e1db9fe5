# Sourced by smollm2_135m.sh and qwen2_5_coder.sh, after environment.sh: the steps that are the same for every model.

stage() { echo "[$SECONDS s] $*"; }

# The environment with lm-eval, and with the library that reads the model's file.
make_model_environment() {
    make_environment eval
    "$PYTHON" -c "import gguf" 2>/dev/null || "$PYTHON" -m pip install --quiet gguf
}

has_gpu() { "$PYTHON" -c "import sys, torch; sys.exit(not torch.cuda.is_available())"; }

# Sets `train` and `text`, files to recover on and to measure on: TRAIN and TEXT, or without them two in the folder $1
# of the text of Python's standard library.
choose_texts() {
    train=${TRAIN:-$1/train.txt} text=${TEXT:-$1/held_out.txt}
    [[ -z ${TRAIN:-} || -z ${TEXT:-} ]] || return 0
    stage "   The text of Python's standard library"
    "$PYTHON" - "$1" <<'PYTHON'
import random
import sys
from pathlib import Path

from recipes.stdlib_text import held_out_texts, training_texts

texts = training_texts()
random.Random(0).shuffle(texts)
Path(sys.argv[1], "train.txt").write_text("\n".join(texts), encoding="utf-8")
Path(sys.argv[1], "held_out.txt").write_text("\n".join(held_out_texts()), encoding="utf-8")
PYTHON
}

# The folder $1's plain/ beside its base/ on the file $2, with more options for each recipe from the arrays
# `evaluation`, `needles` and `instructions`.
measure_beside_the_base() {
    local models=("$1/base" "$1/plain")
    # An empty array, to the old bash of macOS, is not set: hence the plus signs.
    "$PYTHON" recipes/evaluate.py "${models[@]}" --text "$2" --output "$1/beside_the_base.json" \
        ${evaluation[@]+"${evaluation[@]}"}
    "$PYTHON" recipes/needles.py "${models[@]}" --output "$1/needles.jsonl" ${needles[@]+"${needles[@]}"}
    "$PYTHON" recipes/instructions.py "${models[@]}" --output "$1/instructions.jsonl" \
        ${instructions[@]+"${instructions[@]}"}
}

# The checkpoint $1 answers $2, with nothing of this package.
chat() {
    "$PYTHON" - "$1" "$2" <<'PYTHON'
import sys

from transformers import pipeline

_, checkpoint, question = sys.argv
messages = [{"role": "user", "content": question}]
reply = pipeline("text-generation", checkpoint)(messages, max_new_tokens=60, do_sample=False)
print(reply[0]["generated_text"][-1]["content"])
PYTHON
}
