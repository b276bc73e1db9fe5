#!/usr/bin/env bash
# The whole path on the bundled model, without network beyond the package index: wrap at 4:1, initialise, recover with
# TRL, merge, save, and serve with stock transformers. Arguments go to quickstart.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source recipes/environment.sh
make_environment plot
exec env HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false "$PYTHON" -m recipes.quickstart "$@"
